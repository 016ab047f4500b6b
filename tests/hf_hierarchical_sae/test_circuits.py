"""Transcoder sets as circuit-tracer reads them; `make test-circuits` runs circuit-tracer itself on some."""

import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel, export_circuit_tracer
from hf_hierarchical_sae.cli import main
from tests.example_module import load_example


D, D_SAE, K = 6, 20, 8


def make_transcoder(layer, **options):
    torch.manual_seed(layer or 0)
    sites = {"hook_point": "mlp.input", "target_hook_point": "mlp.output"}
    settings = {"d_in": D, "d_sae": D_SAE, "k": K, "model_name": "some/model", "layer": layer, **sites}
    transcoder = HierarchicalSaeModel(HierarchicalSaeConfig(**{**settings, **options}))
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.normal_()
        # Few latents are active on an input: fewer than K on many.
        transcoder.b_enc.sub_(1.5)
        transcoder.input_scale.fill_(0.5)
        transcoder.threshold.fill_(0.0 if transcoder.config.selection == "relu" else 0.3)
        if transcoder.config.is_transcoder:
            transcoder.target_scale.fill_(4.0)
            transcoder.input_center.normal_()
    return transcoder.eval()


def save_all(folder, options=(None, None, None)):
    """Transcoders of several layers, saved, and their folders; without a target it is an autoencoder."""
    transcoders = []
    for layer, more in enumerate(options):
        transcoders.append(make_transcoder(**{"layer": layer, **(more or {})}))
        transcoders[-1].save_pretrained(folder / f"saved_{layer}")
    return transcoders, [folder / f"saved_{layer}" for layer in range(len(transcoders))]


def activations(config, tensors, x):
    """What circuit-tracer computes from these files."""
    latents = x @ tensors["W_enc"].T + tensors["b_enc"]
    if config["activation"] == "topk":
        return latents * torch.zeros_like(latents).scatter(1, latents.topk(config["k"]).indices, 1.0)
    if config["activation"] == "jumprelu":
        return latents * (latents > tensors["activation_function.threshold"])
    return latents.relu()


def assert_same(folder, transcoders, x, k=None):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for layer, transcoder in enumerate(transcoders):
        tensors = load_file(folder / f"layer_{layer}.safetensors")
        latents, expected = activations(config, tensors, x), transcoder(x, k=k)
        used = torch.zeros_like(latents).scatter(1, expected.top_indices, expected.top_values.detach())
        torch.testing.assert_close(latents, used, atol=1e-5, rtol=1e-5)
        skip = x @ tensors["W_skip"].T if "W_skip" in tensors else 0.0
        given = latents @ tensors["W_dec"] + tensors["b_dec"] + skip
        torch.testing.assert_close(given, expected.reconstruction.detach(), atol=1e-4, rtol=1e-5)
    return config


@pytest.fixture
def x():
    return 2 * torch.randn(60, D) + 1


@pytest.mark.parametrize("skip_connection", [False, True])
@pytest.mark.parametrize("k", [1, 3, None])
def test_a_set_gives_what_the_transcoders_give_at_its_budget(tmp_path, x, k, skip_connection):
    transcoders, folders = save_all(tmp_path, [{"skip_connection": skip_connection}] * 3)

    export_circuit_tracer(reversed(folders), tmp_path / "set", k)

    config = assert_same(tmp_path / "set", transcoders, x, k)
    assert config == {
        "model_name": "some/model",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "activation": "topk",
        "k": k or K,
    }
    counts = (transcoders[0].encode(x)[1] > 0).sum(dim=1)
    # Where fewer are active, a TopK of pre-activations keeps negative ones.
    assert counts.min() < K and counts.max() > 3


@pytest.mark.parametrize(
    "options",
    [
        {"selection": "batch_topk", "budgets": [K]},
        {"selection": "jumprelu", "k": D_SAE},
        {"selection": "relu", "k": D_SAE},
    ],
    ids=["batch_topk", "jumprelu", "relu"],
)
def test_transcoders_without_budgets_keep_their_thresholds(tmp_path, x, options):
    options = {"budgets": [options.get("k", K)], **options}
    transcoders, folders = save_all(tmp_path, [options] * 2)

    export_circuit_tracer(folders, tmp_path / "set")

    config = assert_same(tmp_path / "set", transcoders, x)
    assert config["activation"] == ("relu" if options["selection"] == "relu" else "jumprelu") and "k" not in config
    with pytest.raises(ValueError, match="any number of latents|selects by a threshold"):
        export_circuit_tracer(folders, tmp_path / "other", 2)


def test_transcoders_of_the_residual_stream_before_the_mlp_are_taken(tmp_path, x):
    transcoders, folders = save_all(tmp_path, [{"hook_point": "middle"}])

    export_circuit_tracer(folders, tmp_path / "set", 2)

    assert assert_same(tmp_path / "set", transcoders, x, 2)["feature_input_hook"] == "hook_resid_mid"


def test_layers_of_an_older_and_deeper_set_are_gone(tmp_path):
    _, folders = save_all(tmp_path)
    export_circuit_tracer(folders, tmp_path / "set")

    export_circuit_tracer(folders[:2], tmp_path / "set", 2)

    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "config.yaml",
        "layer_0.safetensors",
        "layer_1.safetensors",
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        ([{}, {"layer": 2}], "every layer from 0 on, got 2, of layers 0, 2"),
        ([{}, {"layer": 0}], "got 2, of layers 0, 0"),
        ([{"layer": None}], "of layers None"),
        ([], "got 0, of layers none"),
        ([{}, {"target_hook_point": None}], "saved_1 holds an autoencoder"),
        ([{"hook_point": "attention.input"}], "from mlp.input or middle to mlp.output .* goes from attention.input"),
        ([{"target_hook_point": "output"}], r"to output \(6\)"),
        ([{"d_out": 5}], r"to mlp.output \(5\)"),
        (
            [{}, {"model_name": "other/model"}],
            "one model_name, got 'some/model' for layer 0 and 'other/model' for layer 1",
        ),
        ([{"model_name": None}] * 2, "by its name, which the transcoders do not say: set model_name"),
        ([{}, {"hook_point": "middle"}], "one hook_point"),
        ([{}, {"d_sae": 30}], "one d_sae, got 20 for layer 0 and 30"),
        ([{}, {"skip_connection": True}], "one skip_connection"),
        ([{}, {"selection": "batch_topk", "budgets": [K]}], "one selection"),
        ([{}, {"k": 4}], r"trained for the budgets \[4, 8\]: say with k"),
    ],
)
def test_what_is_no_whole_set_is_refused(tmp_path, options, message):
    _, folders = save_all(tmp_path, options)

    with pytest.raises(ValueError, match=message):
        export_circuit_tracer(folders, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_budget_that_one_was_not_trained_for_is_refused(tmp_path):
    _, folders = save_all(tmp_path, [{}, {"k": 4}])

    with pytest.raises(ValueError, match="got 5"):
        export_circuit_tracer(folders, tmp_path / "set", 5)


def test_the_example_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "circuit_tracer", None)
    monkeypatch.setattr(sys, "argv", ["trace_circuit.py", "set", "--prompt", "hello"])

    with pytest.raises(SystemExit, match="pip install circuit-tracer==.* nnsight==.*, in an environment of its own"):
        load_example("hf_hierarchical_sae/trace_circuit.py").main()


def test_the_command_line_writes_a_set(tmp_path, x, capsys):
    transcoders, folders = save_all(tmp_path)

    main(["circuits", *map(str, folders), "--output", str(tmp_path / "set"), "--k", "2"])

    assert_same(tmp_path / "set", transcoders, x, 2)
    assert "3 layers" in capsys.readouterr().out
