"""circuit-tracer itself reads our transcoders and draws attribution graphs with them. `make test-circuits` runs this."""

import importlib.util
import os
import runpy
import sys
import time
from pathlib import Path

import pytest


if importlib.util.find_spec("circuit_tracer") is None:
    pytest.skip("make test-circuits runs it in an environment of its own", allow_module_level=True)
# Before the import, and in that environment alone: other tests of this process need their hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import circuit_tracer  # noqa: E402
import torch  # noqa: E402
from circuit_tracer.transcoder.activation_functions import TopK  # noqa: E402
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformer_lens import HookedTransformerConfig  # noqa: E402


REPOSITORY = Path(__file__).parents[3]
CIRCUITS = REPOSITORY / "outputs" / "circuits"
EXAMPLE = str(REPOSITORY / "examples" / "hf_hierarchical_sae" / "trace_circuit.py")
PROMPT = "The capital of France is"
BUDGETS, D_SAE = (4, 16), 2048
budgets = pytest.mark.parametrize("k", BUDGETS)


@pytest.fixture(scope="module")
def reference():
    """What the transcoders take and give on the prompt, and what ours makes of it."""
    return load_file(CIRCUITS / "reference.safetensors")


def load(k):
    return runpy.run_path(EXAMPLE)["load_transcoders"](CIRCUITS / f"set_k{k}")


def latents(reference, k):
    """(layers, positions, d_sae) that ours finds, but for the first position, which graphs leave out."""
    indices, values = reference[f"indices_{k}"], reference[f"values_{k}"]
    found = torch.zeros(*indices.shape[:2], D_SAE).scatter(2, indices, values)
    found[:, 0] = 0.0
    return found


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """The example's graphs at each budget, with the lines that it prints."""
    folder, found = tmp_path_factory.mktemp("graphs"), {}
    for k in BUDGETS:
        start = time.perf_counter()
        arguments = [str(CIRCUITS / f"set_k{k}"), "--prompt", PROMPT, "--output_dir", str(folder), "--slug", f"k{k}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [EXAMPLE, *arguments])
            runpy.run_path(EXAMPLE, run_name="__main__")
        graph = circuit_tracer.Graph.from_pt(str(folder / f"k{k}.pt"))
        found[k] = graph
        sizes = {path.name: path.stat().st_size for path in folder.glob(f"k{k}.*")}
        print(f"k = {k}: {len(graph.active_features)} latents, {time.perf_counter() - start:.1f} s, {sizes} bytes")
        assert min(sizes.values()) > 100_000 and len(sizes) == 2
    return found


@budgets
def test_it_computes_from_the_same_activations_what_ours_does(reference, k):
    transcoders, config = load(k)

    with torch.no_grad():
        encoded = transcoders.encode(reference["taken"])
        given = transcoders.decode(encoded, reference["taken"])

    indices = reference[f"indices_{k}"]
    torch.testing.assert_close(encoded.gather(2, indices), reference[f"values_{k}"], atol=1e-4, rtol=1e-4)
    assert ((encoded != 0).sum(dim=2) == (reference[f"values_{k}"] > 0).sum(dim=2)).all()
    # The first position is an attention sink, of norms in the thousands.
    torch.testing.assert_close(given[:, 1:], reference[f"given_{k}"][:, 1:], atol=1e-4, rtol=1e-4)
    assert config["k"] == k and len(transcoders) == len(indices)


@budgets
def test_negative_pre_activations_stay_out_where_few_latents_are_active(k):
    transcoders, _ = load(k)
    transcoder = transcoders[3]
    x = torch.zeros(5, transcoder.d_model)
    with torch.no_grad():
        # No latent is active, or half of them are.
        transcoder.b_enc.copy_(torch.where(torch.arange(transcoder.d_transcoder) < k // 2, 1.0, -1.0))
        transcoder.b_enc[-k:] = 0.0
        encoded = transcoder.encode(x)

    assert encoded.min() == 0 and ((encoded > 0).sum(dim=1) == k // 2).all()


@budgets
def test_a_graph_has_the_latents_that_ours_finds_on_the_prompt(reference, graphs, k):
    graph = graphs[k]
    layers, positions = reference[f"indices_{k}"].shape[:2]
    expected = latents(reference, k)
    found = torch.zeros_like(expected)
    found[tuple(graph.active_features.T)] = graph.activation_values

    assert graph.input_tokens.tolist() == reference["input_ids"].tolist()
    # Two versions of transformers compute the language model: an input of a layer differs in its last digits.
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert len(graph.active_features) == layers * (positions - 1) * k
    assert torch.bincount(graph.active_features[:, 1]).tolist() == [0, *[layers * k] * (positions - 1)]


def test_the_smaller_graph_is_part_of_the_larger(graphs):
    small, large = ({tuple(one) for one in graphs[k].active_features.tolist()} for k in BUDGETS)

    assert small < large and len(large) == len(small) * BUDGETS[1] // BUDGETS[0]
    assert graphs[BUDGETS[0]].adjacency_matrix.shape[0] < graphs[BUDGETS[1]].adjacency_matrix.shape[0]


def test_more_latents_leave_less_to_errors(graphs):
    from circuit_tracer.graph import compute_graph_scores

    (few, _), (many, _) = (compute_graph_scores(graphs[k]) for k in BUDGETS)

    assert 0 < few < many < 1


def test_the_release_reads_no_activation_function_from_the_settings():
    transcoders, config = load_transcoder_from_hub(str((CIRCUITS / "set_k4").resolve()))

    assert config["activation"] == "topk" and not isinstance(transcoders[0].activation_function, TopK)


def test_the_other_backend_takes_the_set_at_the_same_hooks():
    """TransformerLens knows this model by no name: a random one of its size does."""
    transcoders, config = load(4)
    settings = HookedTransformerConfig(
        n_layers=len(transcoders), d_model=576, n_heads=9, d_head=64, d_mlp=64, n_ctx=64, d_vocab=128,
        act_fn="silu", gated_mlp=True, normalization_type="RMS", device="cpu", seed=0,
    )  # fmt: skip

    model = circuit_tracer.ReplacementModel.from_config(settings, transcoders, backend="transformerlens")
    _, found = model.get_activations(torch.arange(1, 9))

    assert ((found != 0).sum(dim=2)[:, 1:] == 4).all() and model.feature_input_hook == config["feature_input_hook"]
