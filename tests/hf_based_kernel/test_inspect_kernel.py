"""The example script that looks into a checkpoint, on random models."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from hf_based_kernel import RebasedConfig, RebasedForCausalLM
from hf_based_kernel.associative_recall import make_recall_dataset


SCRIPT = Path(__file__).parents[2] / "examples" / "studies" / "inspect_kernel.py"
SCRIPT_NAMES = runpy.run_path(str(SCRIPT))


def recall_model(**options):
    options = {"kernel": "rebased"} | options
    config = RebasedConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=0,
        num_hidden_layers=2,
        num_attention_heads=2,
        feature_dim=4,
        conv_type="base",
        use_position_embeddings=True,
        max_position_embeddings=16,
        sliding_window=16,
        initializer_range=0.5,
        attn_implementation="eager",
        **options,
    )
    return RebasedForCausalLM(config).eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"kernel": "taylor"}, {"layer_types": ["conv", "sliding_attention"]}],
    ids=["rebased", "taylor", "attention"],
)
def test_matrices_are_the_weights_that_the_layer_averages_values_with(options):
    model = recall_model(**options)
    attention, seen = model.model.layers[1].self_attn, {}
    attention.v_proj.register_forward_hook(lambda m, i, out: seen.update(values=out))
    attention.o_proj.register_forward_hook(lambda m, inputs, out: seen.update(averaged=inputs[0]))
    matrices, _ = SCRIPT_NAMES["attention_matrices"](model, torch.randint(40, (3, 16)))

    (weights,) = matrices.values()
    assert weights.shape == (3, 2, 16, 16) and not weights.triu(1).any()
    averaged = torch.einsum("bhij,bjhd->bihd", weights, seen["values"].unflatten(-1, (2, 8))).flatten(-2)
    torch.testing.assert_close(averaged, seen["averaged"], rtol=1e-4, atol=1e-5)


def test_true_associations_point_from_a_query_to_its_value():
    rows = make_recall_dataset(20, seq_len=16, num_pairs=3, vocab_size=40).with_format("torch")[:]
    queries, truth = SCRIPT_NAMES["true_associations"](rows["input_ids"], rows["labels"], 3)
    for tokens, labels, places, marks in zip(rows["input_ids"], rows["labels"], queries, truth):
        for place, mark in zip(places, marks):
            (value_at,) = mark.nonzero().flatten().tolist()
            assert tokens[value_at] == labels[place + 1]
            assert tokens[value_at - 1] == tokens[place]


def test_intersection_over_union_is_one_for_the_associations_and_little_for_flat_attention():
    truth = torch.zeros(5, 3, 6)
    truth[:, torch.arange(3), [1, 5, 3]] = 1
    elsewhere = truth.roll(1, -1)
    flat = torch.full_like(truth, 1 / 6)
    overlap = SCRIPT_NAMES["intersection_over_union"](torch.stack([truth, elsewhere, flat], 1), truth)
    torch.testing.assert_close(overlap, torch.tensor([1.0, 0.0, (1 / 6) / (1 + 5 / 6)]))


@pytest.mark.parametrize(("kernel", "key_heads"), [("rebased", 2), ("rebased", 1), ("taylor", 2)])
def test_one_command_leaves_pictures_and_numbers(monkeypatch, tmp_path, capsys, kernel, key_heads):
    recall_model(kernel=kernel, num_key_value_heads=key_heads).save_pretrained(tmp_path)
    arguments = [str(SCRIPT), str(tmp_path), "--num_pairs", "3", "--num_examples", "150"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(SCRIPT), run_name="__main__")

    said = capsys.readouterr().out
    assert ("not learned" in said) == (kernel == "taylor")
    least = float(said.split("\n| 1 |")[1].split("|")[4])
    # A sum of squares may vanish; 1 + s + s²/2 is never below 1/2.
    assert least >= 0.5 if kernel == "taylor" else least < 0.01
    numbers = json.loads((tmp_path / "associations.json").read_text())
    assert numbers["examples"] == 150
    assert len(numbers["iou"]["1"]["heads"]) == 2
    for picture in ("kernel.png", "attention_layer_1.png"):
        assert (tmp_path / picture).stat().st_size > 0


def test_similarity_without_gamma_and_beta_is_that_of_the_products():
    model = recall_model(num_key_value_heads=1)
    products, learned = SCRIPT_NAMES["induced_similarity"](model.model.layers[1].self_attn, model.config, pairs=50)

    assert products.shape == (50, 2)
    # normed twice, with an eps each time
    torch.testing.assert_close(learned, products.square(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (None, [], "expected a folder with a saved model"),
        ({"model_type": "mamba2"}, [], "got a mamba2 model"),
        ({"model_type": "rebased", "use_feature_map": True}, [], "got a rebased model converted from a Llama"),
        ({"model_type": "rebased"}, ["--num_pairs", "0"], "--num_pairs must be at least 1, got 0"),
        ({"model_type": "rebased"}, ["--num_examples", "0"], "--num_examples must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_looked_into_is_one_clear_sentence(monkeypatch, tmp_path, capsys, config, options, message):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path), *options])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert message in capsys.readouterr().err


def test_pairs_that_do_not_fit_the_sequences_are_one_clear_sentence(monkeypatch, tmp_path):
    recall_model(num_key_value_heads=1).save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path), "--num_pairs", "7"])
    with pytest.raises(SystemExit, match="--num_pairs does not fit the model: "):
        runpy.run_path(str(SCRIPT), run_name="__main__")
