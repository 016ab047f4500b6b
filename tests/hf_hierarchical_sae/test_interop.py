"""Exchange with SAELens, sparsify and SAEBench, through those packages themselves."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel, evaluate_budgets, interop
from hf_hierarchical_sae.interop import load_saelens, load_sparsify, save_saelens, save_sparsify


pytestmark = pytest.mark.pinned

D_IN, D_SAE, K = 12, 40, 6


def make_sae(**options):
    torch.manual_seed(1)
    config = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "model_name": "some/model", "layer": 3, "hook_point": "output"}
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(**{**config, **options}))
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_()
    # Not 1: a forgotten scale would show.
    sae.input_scale.fill_(0.25)
    sae.threshold.fill_(0.3)
    return sae.eval()


@pytest.fixture
def x():
    return 4 * torch.randn(50, D_IN) + 1


@pytest.fixture(scope="module")
def saelens():
    os.environ["WANDB_MODE"] = "disabled"
    import sae_lens

    return sae_lens


@pytest.fixture(scope="module")
def sparsify():
    # Its Triton decoder does not ask where a tensor is.
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    import sparsify

    return sparsify


def close(found, expected):
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 3, K])
def test_saelens_loads_ours_with_equal_reconstructions_at_the_chosen_budget(saelens, x, tmp_path, k):
    sae = make_sae()
    expected = sae(x, k=k)

    save_saelens(sae, tmp_path, k)
    theirs = saelens.SAE.load_from_disk(tmp_path)

    with torch.no_grad():
        latents = theirs.encode(x)
        close(theirs(x), expected.reconstruction)
    close(latents.gather(1, expected.top_indices), expected.top_values)
    assert ((latents > 0).sum(dim=1) <= k).all() and theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    ours = load_saelens(tmp_path)
    close(ours(x).reconstruction, expected.reconstruction)
    assert (ours.config.k, ours.config.layer, ours.config.hook_point) == (k, 3, "output")
    assert ours.config.model_name == "some/model" and sae.input_scale == 0.25


@pytest.mark.parametrize(
    "options",
    [{}, {"apply_b_dec_to_input": False}, {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}],
    ids=["plain", "b_dec_not_applied", "rescaled"],
)
def test_ours_loads_a_topk_sae_of_saelens_with_equal_reconstructions(saelens, x, tmp_path, options):
    metadata = saelens.saes.sae.SAEMetadata(hook_name="blocks.3.hook_resid_pre", model_name="gpt2")
    theirs = saelens.TopKSAE(saelens.TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, metadata=metadata, **options))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    theirs.save_model(tmp_path)

    ours = load_saelens(tmp_path)

    with torch.no_grad():
        # Weights of unit variance make reconstructions of norm 100: float32 keeps seven digits of them.
        torch.testing.assert_close(ours(x).reconstruction, theirs(x), atol=1e-3, rtol=1e-5)
    assert ours.config.layer == 2 and ours.config.hook_point == "output" and not ours.training


def test_a_threshold_is_exchanged_with_saelens_as_a_jumprelu(saelens, x, tmp_path):
    sae = make_sae(selection="batch_topk", budgets=[K])

    save_saelens(sae, tmp_path)
    theirs = saelens.SAE.load_from_disk(tmp_path)
    ours = load_saelens(tmp_path)

    assert type(theirs) is saelens.JumpReLUSAE
    with torch.no_grad():
        close(theirs(x), sae(x).reconstruction)
        close(ours(x).reconstruction, sae(x).reconstruction)
    counts = (theirs.encode(x) > 0).sum(dim=1)
    assert counts.unique().numel() > 1 and ours.config.selection == "batch_topk" and ours.config.k == K


def test_ours_loads_a_batch_topk_sae_as_saelens_saves_it_after_training(saelens, x, tmp_path):
    training = saelens.BatchTopKTrainingSAE(saelens.BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K))
    with torch.no_grad():
        training.W_dec.normal_()
        training.W_enc.normal_()
        training.topk_threshold.fill_(9.0)
    training.save_inference_model(str(tmp_path))
    theirs = saelens.SAE.load_from_disk(tmp_path)

    ours = load_saelens(tmp_path)

    with torch.no_grad():
        torch.testing.assert_close(ours(x).reconstruction, theirs(x), atol=1e-3, rtol=1e-5)
    assert (ours.config.selection, ours.config.k) == ("batch_topk", K)


@pytest.mark.parametrize("k", [1, 3, K])
def test_sparsify_loads_ours_with_equal_reconstructions_at_the_chosen_budget(sparsify, x, tmp_path, k):
    sae, folder = make_sae(), tmp_path / "layers.3"

    save_sparsify(sae, folder, k)
    theirs = sparsify.SparseCoder.load_from_disk(folder)

    assert theirs.cfg.k == k
    with torch.no_grad():
        close(theirs(x).sae_out, sae(x, k=k).reconstruction)
        ours = load_sparsify(folder)
        close(ours(x).reconstruction, sae(x, k=k).reconstruction)
    assert (ours.config.k, ours.config.layer, ours.config.hook_point) == (k, 3, "output")
    assert set(sparsify.SparseCoder.load_many(tmp_path, local=True)) == {"layers.3"}


@pytest.mark.parametrize("options", [{"num_latents": D_SAE}, {"expansion_factor": 2, "normalize_decoder": False}])
def test_ours_loads_an_autoencoder_of_sparsify_with_equal_reconstructions(sparsify, x, tmp_path, options):
    theirs = sparsify.SparseCoder(D_IN, sparsify.SparseCoderConfig(k=K, **options))
    with torch.no_grad():
        theirs.b_dec.normal_()
        theirs.encoder.bias.normal_(std=0.1)
    theirs.save_to_disk(tmp_path / "layers.7.mlp")

    ours = load_sparsify(tmp_path / "layers.7.mlp")

    with torch.no_grad():
        close(ours(x).reconstruction, theirs(x).sae_out)
        close(ours(x, k=2).reconstruction, ours.decode(*(part[:, :2] for part in ours.encode(x))))
    assert ours.config.layer is None and ours.config.hook_point == "layers.7.mlp"


def test_a_format_is_read_from_the_hub(hub, tmp_path):
    from huggingface_hub import HfApi

    save_sparsify(make_sae(), tmp_path / "layers.5")
    HfApi().create_repo("tester/sparsify", exist_ok=True)
    HfApi().upload_folder(repo_id="tester/sparsify", folder_path=tmp_path)

    assert load_sparsify("tester/sparsify", "layers.5").config.layer == 5


def edit(folder, drop=(), weights=None, **settings):
    """Change the files of a saved autoencoder."""
    found = {**json.loads((folder / "cfg.json").read_text()), **settings}
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in found.items() if key not in drop}))
    (path,) = folder.glob("*.safetensors")
    tensors = {**load_file(path), **(weights or {})}
    save_file({name: value for name, value in tensors.items() if name not in drop}, path)


TRANSPOSED = {"W_dec": torch.zeros(D_IN, D_SAE)}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"drop": ["k"]}, r"cfg.json must have the keys .* got none for \['k'\]"),
        ({"foo": 1}, r"cfg.json must have the keys .* got the unknown \['foo'\]"),
        ({"drop": ["b_enc"]}, r"the weights must have the keys .* got none for \['b_enc'\]"),
        ({"weights": {"log_scale": torch.zeros(2)}}, r"the weights must have .* got the unknown \['log_scale'\]"),
        ({"weights": TRANSPOSED}, r"W_dec must have shape \(40, 12\), got \(12, 40\), which is transposed"),
        ({"weights": {"b_dec": torch.zeros(D_IN + 1)}}, r"b_dec must have shape \(12,\), got \(13,\)$"),
        ({"architecture": "standard"}, "got architecture 'standard', whose activation function has no budget"),
        ({"architecture": "gated"}, "got architecture 'gated', whose activation function has no budget"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='none', got 'layer_norm'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='none', got 'hook_z'"),
        ({"metadata": {"sae_lens_version": "5.10.1"}}, "SAELens 6 or later, got version 5.10.1"),
        ({"metadata": {}}, "SAELens 6 or later, got version None"),
        ({"metadata": []}, "SAELens 6 or later, got version None"),
        ({"metadata": "gpt2"}, "metadata in cfg.json must hold settings by name, got 'gpt2'"),
        ({"k": True}, "k in cfg.json must be an integer, got True"),
        ({"k": 2.5}, "k in cfg.json must be an integer, got 2.5"),
        ({"k": None}, "k in cfg.json must be an integer, got None"),
        ({"k": 0}, "k in cfg.json must be at least 1, got 0"),
        ({"k": 41}, r"does not describe an autoencoder: k must be in \[1, d_sae=40\], got 41"),
        ({"d_in": "12"}, "d_in in cfg.json must be an integer, got '12'"),
        ({"d_sae": -40}, "d_sae in cfg.json must be at least 1, got -40"),
        ({"weights": {"b_dec": torch.full((D_IN,), torch.nan)}}, "b_dec must be finite, got NaN or infinity"),
        (
            {"weights": {"b_enc": torch.zeros(D_SAE, dtype=torch.int32)}},
            "b_enc must be floating point, got torch.int32",
        ),
    ],
)
def test_what_saelens_files_cannot_hold_is_refused(tmp_path, changes, message):
    save_saelens(make_sae(), tmp_path)
    edit(tmp_path, **changes)

    with pytest.raises(ValueError, match=message):
        load_saelens(tmp_path)


def test_a_jumprelu_sae_has_no_budget(tmp_path):
    sae = make_sae(selection="batch_topk", budgets=[K])
    with pytest.raises(ValueError, match="selects by a threshold and has one budget, k=6, got 3"):
        save_saelens(sae, tmp_path, k=3)
    with pytest.raises(ValueError, match="sparsify holds a fixed number of latents per input"):
        save_sparsify(sae, tmp_path)
    save_saelens(sae, tmp_path)
    edit(tmp_path, weights={"threshold": torch.linspace(0, 1, D_SAE)})

    with pytest.raises(ValueError, match="a JumpReLU SAE with a threshold for each latent has no budget"):
        load_saelens(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"drop": ["k"]}, r"cfg.json must have the keys .* got none for \['k'\]"),
        ({"foo": 1}, r"got the unknown \['foo'\]"),
        ({"activation": "groupmax"}, "expected a TopK autoencoder with activation='topk', got activation='groupmax'"),
        ({"transcode": True}, "got transcode=True"),
        ({"skip_connection": True}, "got skip_connection=True"),
        ({"signed": True}, "got signed=True"),
        ({"k": False}, "k in cfg.json must be an integer, got False"),
        ({"d_in": None}, "d_in in cfg.json must be an integer, got None"),
        ({"num_latents": 0, "expansion_factor": 1.5}, "expansion_factor in cfg.json must be an integer, got 1.5"),
        ({"weights": TRANSPOSED}, r"W_dec must have shape \(40, 12\), got \(12, 40\), which is transposed"),
        ({"drop": ["W_dec"]}, r"the weights must have the keys .* got none for \['W_dec'\]"),
    ],
)
def test_what_sparsify_files_cannot_hold_is_refused(tmp_path, changes, message):
    save_sparsify(make_sae(), tmp_path)
    edit(tmp_path, **changes)

    with pytest.raises(ValueError, match=message):
        load_sparsify(tmp_path)


@pytest.mark.parametrize("load", [load_saelens, load_sparsify])
def test_a_pickle_is_never_loaded(tmp_path, load, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("loaded a pickle"))
    (tmp_path / "ae.pt").write_bytes(b"not even a pickle")
    (tmp_path / "cfg.json").write_text("{}")

    with pytest.raises(ValueError, match=r"got the pickle ae.pt: loading one can run any code, so it is never done"):
        load(tmp_path)
    (tmp_path / "ae.pt").unlink()
    with pytest.raises(ValueError, match=r"expected sae.*safetensors in .*, got \['cfg.json'\]"):
        load(tmp_path)


def test_a_torn_file_is_refused(tmp_path):
    save_saelens(make_sae(), tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"torn")

    with pytest.raises(ValueError, match="expected JSON in cfg.json and safetensors in sae_weights.safetensors"):
        load_saelens(tmp_path)


@pytest.mark.parametrize("content", ["", '{"k"', "[]", "3", "null"])
@pytest.mark.parametrize("save, load", [(save_saelens, load_saelens), (save_sparsify, load_sparsify)])
def test_settings_that_are_none_are_refused(tmp_path, save, load, content):
    save(make_sae(), tmp_path)
    (tmp_path / "cfg.json").write_text(content)

    with pytest.raises(ValueError, match=r"expected JSON in cfg.json|must hold settings by name, got"):
        load(tmp_path)


@pytest.mark.parametrize("save, load", [(save_saelens, load_saelens), (save_sparsify, load_sparsify)])
def test_weights_cut_short_are_refused(tmp_path, save, load):
    save(make_sae(), tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(ValueError, match=r"safetensors in sae.* of .*, got"):
        load(tmp_path)


@pytest.mark.parametrize(
    "options, hook_name",
    [
        ({}, "blocks.3.hook_resid_post"),
        ({"hook_point": None}, "blocks.3.hook_resid_post"),
        ({"hook_point": "blocks.3.hook_mlp_out"}, "blocks.3.hook_mlp_out"),
        ({"hook_point": "blocks.3.hook_mlp_out", "layer": None}, "blocks.3.hook_mlp_out"),
        ({"hook_point": "layers.3.self_attn"}, "layers.3.self_attn"),
        ({"hook_point": "mlp"}, "layers.3.mlp"),
        ({"hook_point": "blocks.0.hook_resid_pre", "layer": None}, "blocks.0.hook_resid_pre"),
        ({"hook_point": None, "layer": None}, None),
    ],
)
def test_an_autoencoder_of_something_else_than_layer_outputs_stays_one(tmp_path, options, hook_name):
    save_saelens(make_sae(**options), tmp_path / "saelens")

    assert json.loads((tmp_path / "saelens" / "cfg.json").read_text())["metadata"]["hook_name"] == hook_name
    loaded = load_saelens(tmp_path / "saelens").config
    is_output = hook_name == "blocks.3.hook_resid_post"
    assert (loaded.layer, loaded.hook_point) == ((3, "output") if is_output else (None, hook_name))
    save_saelens(load_saelens(tmp_path / "saelens"), tmp_path / "again")
    assert (tmp_path / "again" / "cfg.json").read_text() == (tmp_path / "saelens" / "cfg.json").read_text()


@pytest.mark.parametrize(
    "options, name",
    [
        ({"hook_point": "layers.3.mlp"}, "layers.3"),
        ({"hook_point": "blocks.3.hook_attn_out", "layer": None}, "layers.3"),
        ({}, "layers.3.mlp"),
    ],
)
def test_a_folder_called_after_another_place_is_refused(tmp_path, options, name):
    with pytest.raises(
        ValueError, match=r"takes the folder's name for the place of the autoencoder, which is .*, got"
    ):
        save_sparsify(make_sae(**options), tmp_path / name)

    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    "options, name, place",
    [
        ({"hook_point": "layers.3.mlp"}, "layers.3.mlp", (None, "layers.3.mlp")),
        ({"hook_point": "blocks.3.hook_mlp_out"}, "layers.3.mlp", (None, "layers.3.mlp")),
        ({}, "model.layers.3", (3, "output")),
        ({}, "h.3", (3, "output")),
        ({"layer": None, "hook_point": None}, "layers.5", (5, "output")),
    ],
)
def test_a_folder_of_sparsify_says_the_place(tmp_path, options, name, place):
    save_sparsify(make_sae(**options), tmp_path / name)

    loaded = load_sparsify(tmp_path / name).config
    assert (loaded.layer, loaded.hook_point) == place


@pytest.mark.parametrize("save", [save_saelens, save_sparsify])
def test_an_export_that_fails_leaves_the_older_one(tmp_path, save, monkeypatch):
    save(make_sae(), tmp_path / "there")
    before = {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}

    def fail(tensors, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(interop, "save_file", fail)
    for folder in ("there", "new"):
        with pytest.raises(OSError, match="No space left"):
            save(make_sae(), tmp_path / folder, 2)

    assert {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()} == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("k", [0, K + 1])
def test_a_budget_out_of_range_is_refused(tmp_path, k):
    for save in (save_saelens, save_sparsify):
        with pytest.raises(ValueError, match=rf"k must be in \[1, 6\], the trained budget, got {k}"):
            save(make_sae(), tmp_path, k)


@pytest.mark.slow
def test_saebench_evaluates_ours(saelens, tmp_path):
    """SAEBench's own core evaluation, on a language model of TransformerLens, against our evaluation."""
    from sae_bench.evals.core import main as core
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.sae_bench_utils.general_utils import check_decoder_norms, load_and_format_sae
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 2, "d_model": 32, "n_ctx": 64, "d_head": 8, "d_vocab": 300, "act_fn": "gelu"}
    model = HookedTransformer(HookedTransformerConfig(**sizes, init_weights=True))
    ids = torch.randint(300, (4, 64))
    sae = make_sae(d_in=32, layer=1)
    save_saelens(sae, tmp_path, 4)
    _, theirs, _ = load_and_format_sae("ours", saelens.SAE.load_from_disk(tmp_path), "cpu")

    class Tokens:
        context_size, store_batch_size_prompts = 64, 4

        def get_batch_tokens(self, batch_size):
            return ids

        def reset_input_dataset(self):
            pass

    metrics, features = core.run_evals(
        theirs,
        Tokens(),
        model,
        CoreEvalConfig(
            n_eval_reconstruction_batches=1,
            n_eval_sparsity_variance_batches=1,
            compute_kl=True,
            compute_ce_loss=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
        ),
    )

    assert check_decoder_norms(theirs.W_dec)
    states = model.run_with_cache(ids)[1]["blocks.1.hook_resid_post"].reshape(-1, 32)
    expected = evaluate_budgets(sae, states, [4])
    # Its explained variance takes the mean square of a dimension for its mean, so that is not compared.
    assert metrics["reconstruction_quality"]["cossim"] == pytest.approx(expected.cosine[0], rel=1e-4)
    assert metrics["shrinkage"]["l2_ratio"] == pytest.approx(expected.l2_ratio[0], rel=1e-4)
    assert metrics["sparsity"]["l0"] == pytest.approx(expected.latents_per_token[0])
    assert len(features["feature_density"]) == D_SAE
    assert theirs.cfg.hook_layer == 1
