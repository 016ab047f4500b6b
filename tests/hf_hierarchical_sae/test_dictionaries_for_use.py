"""A dictionary that others trained, written small in the format of Gemma Scope, through all that is done with one."""

import json
import re

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_hierarchical_sae import (
    ablate,
    detection_scores,
    evaluate_budgets,
    evaluate_in_model,
    explain_latents,
    explained_variance,
    fuzzing_scores,
    iterate_activations,
    load_gemma_scope,
    load_saelens,
    plot_evaluations,
    read_latents,
    record_statistics,
    save_saelens,
    score_labels,
    splice,
    steer,
    write_dashboard,
)
from hf_hierarchical_sae.cli import main


IDS = torch.arange(5, 29).reshape(2, 12)
D_SAE = 64
# Two kinds, so that latents tell them apart.
TEXTS = [
    text
    for number in range(30)
    for text in (f"the {number} slings and arrows of outrageous fortune", f"WHETHER {number} TIS NOBLER IN THE MIND")
]
FOLDER = "gemma-scope-2b-pt-res/layer_0/width_16k/average_l0_9"


@pytest.fixture(scope="module")
def tokenizer(tiny_language_model):
    return AutoTokenizer.from_pretrained(tiny_language_model)


@pytest.fixture(scope="module")
def model(tiny_language_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from uniform predictions: a change of a layer's output then shows.
            parameter.mul_(6.0 if parameter.ndim == 2 else 1.0)
    return model


@pytest.fixture(scope="module")
def stream(model, tokenizer):
    return iterate_activations(model, tokenizer, TEXTS, 0, show_progress=False)


@pytest.fixture(scope="module")
def x(stream):
    return torch.cat(list(stream))


@pytest.fixture(scope="module")
def arrays(x):
    """The directions of a basis and their opposites, of several lengths, each for the tokens furthest along it."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
    lengths = torch.linspace(0.5, 2, D_SAE).unsqueeze(1)
    W_dec = lengths * torch.cat([basis, -basis])
    W_enc = (W_dec / lengths.square()).T.contiguous()
    b_dec = x.mean(dim=0)
    b_enc = -b_dec @ W_enc
    # In the middle of the widest gap: tokens come again, and their pre-activations up to rounding.
    high = (x @ W_enc + b_enc).sort(dim=0).values[int(0.7 * len(x)) : int(0.9 * len(x))]
    gap = high.diff(dim=0).argmax(dim=0, keepdim=True)
    threshold = (high.gather(0, gap) + high.gather(0, gap + 1))[0] / 2
    return {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}


@pytest.fixture(scope="module")
def dictionary(arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("downloaded") / FOLDER
    folder.mkdir(parents=True)
    numpy.savez(folder / "params.npz", **{name: value.numpy() for name, value in arrays.items()})
    return folder


@pytest.fixture
def sae(dictionary):
    return load_gemma_scope(dictionary)


def latents_of(arrays, x):
    """(..., d_sae), by the equations of Gemma Scope's model card."""
    pre = x @ arrays["W_enc"] + arrays["b_enc"]
    return pre.relu() * (pre > arrays["threshold"])


def reconstruction_of(arrays, x):
    return latents_of(arrays, x) @ arrays["W_dec"] + arrays["b_dec"]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def with_layer_output(model, replace, ids=IDS):
    """Logits with `replace(x)` as the output of the first layer, by a hook of the test's own."""
    handle = model.get_decoder().layers[0].register_forward_hook(lambda module, args, output: replace(output))
    try:
        return logits(model, ids)
    finally:
        handle.remove()


def test_it_is_evaluated_with_all_latents_above_their_thresholds(sae, arrays, x):
    expected = 1 - (x - reconstruction_of(arrays, x)).square().sum() / (x - x.mean(dim=0)).square().sum()

    found = evaluate_budgets(sae, x, batch_size=100)

    used = latents_of(arrays, x) > 0
    assert 0.2 < expected < 0.9 and found.explained_variance == [pytest.approx(expected.item(), rel=1e-4)]
    assert found.latents_per_token == [pytest.approx(used.float().sum(dim=1).mean().item())]
    assert 4 < found.latents_per_token[0] < used.sum(dim=1).max() and found.budgets == [D_SAE]
    torch.testing.assert_close(found.density[0], used.float().mean(dim=0))
    assert explained_variance(sae, x) == {D_SAE: pytest.approx(expected.item(), rel=1e-4)}
    assert f"{D_SAE:>6}" in str(found)


def test_a_plot_shows_it_at_the_number_of_latents_that_it_keeps(sae, x, tmp_path):
    found = evaluate_budgets(sae, x)

    plot_evaluations({"theirs": found}, tmp_path / "quality.svg")

    # matplotlib names the text that it draws as outlines.
    drawn = (tmp_path / "quality.svg").read_text()
    assert f"<!-- {found.latents_per_token[0]:.1f} -->" in drawn and f"<!-- {D_SAE} -->" not in drawn


def test_its_language_model_is_evaluated_with_it(sae, arrays, model, stream):
    found = evaluate_in_model(sae, stream)

    losses = []
    for text in TEXTS:
        ids = stream.tokenizer(text, return_tensors="pt")["input_ids"]

        def replace(states):
            # The first position is left out of what is read.
            return torch.cat([states[:, :1], reconstruction_of(arrays, states[:, 1:])], dim=1)

        predicted = with_layer_output(model, replace, ids)[0, 1:-1]
        losses.append(torch.nn.functional.cross_entropy(predicted, ids[0, 2:], reduction="none"))
    assert found.cross_entropy == [pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)]
    assert found.kl_divergence[0] > 0 and found.latents_per_token[0] > 4


def test_it_is_spliced_and_ablated_by_its_own_latents(sae, arrays, model):
    with splice(model, sae, 0):
        spliced = logits(model)
    with ablate(model, sae, 0, [3, 40]):
        ablated = logits(model)
    with splice(model, sae, 0, keep_error=True):
        kept = logits(model)

    def without(hidden_states):
        latents = latents_of(arrays, hidden_states)
        return hidden_states - latents[..., [3, 40]] @ arrays["W_dec"][[3, 40]]

    torch.testing.assert_close(
        spliced, with_layer_output(model, lambda x: reconstruction_of(arrays, x)), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(ablated, with_layer_output(model, without), rtol=1e-4, atol=1e-4)
    assert torch.equal(kept, logits(model)) and not torch.allclose(ablated, kept, atol=1e-3)
    for change in (splice(model, sae, 0, k=4), ablate(model, sae, 0, 3, k=4)):
        with pytest.raises(ValueError, match="keeps any number of latents: it has no budget, got 4"), change:
            pass


@pytest.mark.parametrize("site, module", [("res", "layers.1"), ("mlp", "layers.1.post_feedforward_layernorm")])
def test_dictionaries_of_gemma_scope_stand_where_they_were_trained(site, module, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99, "head_dim": 8}
    config = AutoConfig.for_model("gemma2", **sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=16)
    gemma, folder = AutoModelForCausalLM.from_config(config).eval(), tmp_path / f"gemma-scope-2b-pt-{site}" / "layer_1"
    shapes = {"W_enc": (32, 64), "W_dec": (64, 32), "b_enc": (64,), "b_dec": (32,), "threshold": (64,)}
    arrays = {name: torch.randn(shape) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    numpy.savez(folder / "params.npz", **{name: value.numpy() for name, value in arrays.items()})
    with torch.no_grad():
        # Dictionaries of MLPs read what is added to the residual stream: in Gemma 2, behind a norm.
        hook = gemma.model.get_submodule(module).register_forward_hook(
            lambda module, args, output: reconstruction_of(arrays, output)
        )
        expected = gemma(input_ids=IDS).logits
        hook.remove()

        with splice(gemma, load_gemma_scope(folder), 1):
            spliced = gemma(input_ids=IDS).logits

    torch.testing.assert_close(spliced, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(spliced, gemma(input_ids=IDS).logits, atol=1e-2)


def test_it_steers_with_what_was_measured(sae, arrays, model, x):
    record_statistics(sae, x)

    latents = latents_of(arrays, x)
    typical = latents.sum(dim=0) / (latents > 0).sum(dim=0).clamp(min=1)
    torch.testing.assert_close(sae.mean_activation, typical, rtol=1e-4, atol=1e-4)
    with steer(model, sae, 0, 7, strength=2.0):
        steered = logits(model)
    expected = with_layer_output(model, lambda states: states + 2 * typical[7] * arrays["W_dec"][7])
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)


def test_its_latents_are_read_scored_and_drawn(sae, arrays, model, tokenizer, x, tmp_path):
    labelled = {"small": TEXTS[::2], "large": TEXTS[1::2]}
    found = read_latents(sae, model, tokenizer, labelled, show_progress=False)
    states = [piece for texts in labelled.values() for piece in iterate_activations(model, tokenizer, texts, 0)]
    latents = latents_of(arrays, torch.cat(states))

    assert found.latent_starts.diff().tolist() == (latents > 0).sum(dim=0).tolist()
    torch.testing.assert_close(found.latent(7)[1], latents[latents[:, 7] > 0, 7], rtol=1e-4, atol=1e-4)
    # As many ranks as the token with most latents has, not as there are latents.
    assert found.k == (latents > 0).sum(dim=1).max() < D_SAE
    assert found.rank_counts().sum() == (latents > 0).sum()
    scores = score_labels(found, permutations=2, show_progress=False)
    assert scores.budgets == found.check_budgets([found.k]) == [found.k]
    with pytest.raises(
        ValueError, match=f"has no other budget than all of its latents, {found.k} at most, got \\[4\\]"
    ):
        score_labels(found, budgets=[4], permutations=2, show_progress=False)
    assert scores.information[-1].nan_to_num(0).max() > 0.1
    judged = {"judge_tokenizer": tokenizer, "examples": 2, "window": 8, "show_progress": False}
    latent = int(scores.information[-1].nan_to_num(0).argmax())
    explanations = explain_latents(found, tokenizer, [latent], model, **judged)
    assert detection_scores(found, tokenizer, explanations, model, **judged).keys() == {latent}
    assert fuzzing_scores(found, tokenizer, explanations, model, **judged).keys() == {latent}

    page = write_dashboard(sae, model, tokenizer, TEXTS, path=tmp_path / "page.html", show_progress=False)

    assert page["live_latents"] == len(found.live_latents) == page["latents"]
    settings = re.search(r'"hasBudgets": ?(\w+)', (tmp_path / "page.html").read_text())
    assert settings is not None and settings[1] == "false"


@pytest.mark.slow
def test_it_is_saved_and_loaded_with_and_without_this_package(sae, x, tmp_path, run_isolated):
    expected = sae(x).reconstruction.detach()
    sae.save_pretrained(tmp_path / "sae")
    save_file({"x": x}, tmp_path / "x.safetensors")

    loaded = AutoModel.from_pretrained(tmp_path / "sae")
    run_isolated(f"""
from safetensors.torch import load_file, save_file
from transformers import AutoModel
sae = AutoModel.from_pretrained({str(tmp_path / "sae")!r}, trust_remote_code=True)
assert type(sae).__module__.startswith("transformers_modules.")
output = sae(load_file("x.safetensors")["x"]).reconstruction.detach()
save_file({{"output": output}}, "output.safetensors")
""")

    assert torch.equal(loaded(x).reconstruction, expected)
    assert torch.equal(load_file(tmp_path / "output.safetensors")["output"], expected)
    assert json.loads((tmp_path / "sae" / "config.json").read_text())["selection"] == "jumprelu"


@pytest.mark.pinned
def test_saelens_takes_it_and_gives_it_back(sae, arrays, x, tmp_path):
    import sae_lens

    save_saelens(sae, tmp_path)

    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    back = load_saelens(tmp_path)
    with torch.no_grad():
        for found in (theirs(x), sae(x).reconstruction, theirs.decode(theirs.encode(x))):
            torch.testing.assert_close(found, reconstruction_of(arrays, x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.encode(x), latents_of(arrays, x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in sae.state_dict().items())
    assert theirs.cfg.metadata.model_name == "google/gemma-2-2b" and back.config.layer == 0


def test_the_command_line_converts_it(sae, dictionary, tmp_path, capsys):
    source, ours, theirs = str(dictionary.parents[2]), str(tmp_path / "ours"), str(tmp_path / "theirs")

    main(["convert", source, ours, "--from", "gemma_scope", "--subfolder", "layer_0/width_16k/average_l0_9"])
    main(["convert", ours, theirs, "--to", "saelens"])

    assert f"{ours}: {D_SAE} latents, as many as are active, for hierarchical" in capsys.readouterr().out
    for loaded in (AutoModel.from_pretrained(ours), load_saelens(theirs)):
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in sae.state_dict().items())
    with pytest.raises(SystemExit):
        main(["convert", ours, str(tmp_path / "x"), "--to", "gemma_scope"])
    assert "invalid choice: 'gemma_scope'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="keeps any number of latents: it has no budget, got 4"):
        main(["convert", ours, str(tmp_path / "x"), "--to", "saelens", "--k", "4"])


def test_half_precision_and_a_few_latents_at_a_time_find_the_same_latents(sae, arrays, x):
    expected = reconstruction_of(arrays, x)
    sae.config.encoder_chunk_size = 10
    torch.testing.assert_close(sae(x).reconstruction, expected, rtol=1e-4, atol=1e-4)

    half = sae.to(torch.bfloat16)

    # Weights of 8 bits: latents near their thresholds come and go.
    distance = (half(x).reconstruction - expected).norm() / expected.norm()
    assert distance < 0.1
