"""Exchange with SAELens, sparsify and SAEBench, through those packages themselves."""

import json
import os
import zipfile

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel, evaluate_budgets, interop, splice
from hf_hierarchical_sae.interop import load_gemma_scope, load_saelens, load_sparsify, save_saelens, save_sparsify
from hf_hierarchical_sae.sites import find_site, site_hook


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
    assert ours.config.layer == 3 and ours.config.hook_point == "input" and not ours.training


def test_a_row_of_zeros_in_a_rescaled_sae_of_saelens_adds_nothing(saelens, x, tmp_path):
    options = {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}
    theirs = saelens.TopKSAE(saelens.TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=D_SAE, **options))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
        theirs.W_dec[3] = 0
    theirs.save_model(tmp_path)
    with torch.no_grad():
        pre_activations = ((x @ theirs.W_enc + theirs.b_enc) * theirs.W_dec.norm(dim=1)).relu()
        rows = torch.nn.functional.normalize(theirs.W_dec, dim=1)
        expected = pre_activations @ rows + theirs.b_dec

    ours = load_saelens(tmp_path)

    assert not ours.W_dec[3].any()
    torch.testing.assert_close(ours(x).reconstruction, expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("name", ["apply_b_dec_to_input", "rescale_acts_by_decoder_norm"])
def test_a_setting_that_is_no_truth_value_is_refused(tmp_path, name):
    save_saelens(make_sae(), tmp_path)
    settings = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**settings, name: "false"}))

    with pytest.raises(ValueError, match=f"{name} in cfg.json must be true or false, got 'false'"):
        load_saelens(tmp_path)


@pytest.mark.parametrize("load", [load_saelens, load_sparsify, load_gemma_scope])
def test_a_path_to_a_file_or_to_nothing_is_no_id_on_the_hub(tmp_path, load):
    (tmp_path / "weights.pt").write_text("")

    with pytest.raises(ValueError, match=r"expected the folder that holds [a-z_.]+, got the file .*weights.pt"):
        load(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"expected a folder with [a-z_.]+, or an id .*nothing, which does not exist"):
        load(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="runs/layers.3/sae, which does not exist"):
        load("runs/layers.3/sae")


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


@pytest.mark.parametrize("k", [K, float(K)])
def test_ours_loads_a_batch_topk_sae_as_saelens_saves_it_after_training(saelens, x, tmp_path, k):
    training = saelens.BatchTopKTrainingSAE(saelens.BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=k))
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


FOR_USE = {"selection": "jumprelu", "k": D_SAE, "budgets": [D_SAE]}


def theirs_of(saelens, kind, dtype="float32", **options):
    """A ReLU or JumpReLU SAE of SAELens, with weights such that it is sparse, some thresholds negative."""
    config = {"d_in": D_IN, "d_sae": D_SAE, "dtype": dtype, **options}
    if kind == "relu":
        theirs = saelens.StandardSAE(saelens.StandardSAEConfig(**config))
    else:
        theirs = saelens.JumpReLUSAE(saelens.JumpReLUSAEConfig(**config))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(std=0.3 if name.startswith("W") else 1.0)
        theirs.b_enc.sub_(2.0)
    return theirs


def dense(sae, x):
    """(tokens, d_sae): what `encode` found."""
    indices, values = sae.encode(x)
    return values.new_zeros(*x.shape[:-1], sae.config.d_sae).scatter_add(-1, indices, values)


@pytest.mark.parametrize("options", [{}, {"apply_b_dec_to_input": False}], ids=["plain", "b_dec_not_applied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_ours_loads_a_relu_and_a_jumprelu_sae_of_saelens_with_equal_latents(
    saelens, x, tmp_path, kind, dtype, options
):
    metadata = saelens.saes.sae.SAEMetadata(hook_name="blocks.3.hook_resid_post", model_name="gpt2")
    # What float32 can hold, so that float64 compares the equations alone.
    theirs = theirs_of(saelens, kind, metadata=metadata, **options)
    theirs.save_model(tmp_path / "theirs")
    theirs, x = theirs.to(dtype), x.to(dtype)

    ours = load_saelens(tmp_path / "theirs")
    save_saelens(ours, tmp_path / "again")
    again = load_saelens(tmp_path / "again")
    back = saelens.SAE.load_from_disk(tmp_path / "again")

    assert ours.config.selection == kind and type(back) is type(theirs) and not ours.training
    assert (ours.config.layer, ours.config.hook_point, ours.config.model_name) == (3, "output", "gpt2")
    assert ours.config.normalize_decoder is False
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    with torch.no_grad():
        latents = theirs.encode(x)
        assert 0 < (latents > 0).sum(dim=1).float().mean() < D_SAE / 2
        for found in (ours.to(dtype), again.to(dtype)):
            close(dense(found, x), latents)
            close(found(x).reconstruction, theirs(x))
        close(back.to(dtype)(x), theirs(x))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_weights_of_another_dtype_are_read_as_float32(saelens, x, tmp_path, dtype):
    theirs = theirs_of(saelens, "jumprelu", dtype)
    theirs.save_model(tmp_path)

    ours = load_saelens(tmp_path)

    assert ours.dtype == torch.float32
    with torch.no_grad():
        close(ours(x).reconstruction, theirs.to(torch.float32)(x))


@pytest.mark.parametrize("k", [None, 2.5])
def test_one_threshold_for_all_without_a_mean_number_is_a_jumprelu(saelens, x, tmp_path, k):
    theirs = theirs_of(saelens, "jumprelu")
    theirs.threshold.data.fill_(0.7)
    theirs.cfg.metadata.training_architecture_details = {} if k is None else {"k": k}
    theirs.save_model(tmp_path)

    ours = load_saelens(tmp_path)

    assert ours.config.selection == "jumprelu" and (ours.threshold == 0.7).all()
    with torch.no_grad():
        close(ours(x).reconstruction, theirs(x))


@pytest.mark.parametrize("selection", ["jumprelu", "relu"])
def test_saelens_loads_ours_with_thresholds_in_units_of_x(saelens, x, tmp_path, selection):
    sae = make_sae(**{**FOR_USE, "selection": selection})
    sae.threshold.copy_(torch.linspace(0, 1, D_SAE) if selection == "jumprelu" else torch.tensor(0.0))

    save_saelens(sae, tmp_path)
    theirs = saelens.SAE.load_from_disk(tmp_path)

    with torch.no_grad():
        close(theirs.encode(x), dense(sae, x))
        close(theirs(x), sae(x).reconstruction)
    with pytest.raises(ValueError, match=f"a {selection} SAE keeps any number of latents: it has no budget, got 3"):
        save_saelens(sae, tmp_path, k=3)
    with pytest.raises(ValueError, match="sparsify holds a fixed number of latents per input"):
        save_sparsify(sae, tmp_path)


def test_heads_that_saelens_flattens_are_flat_here(saelens, x, tmp_path):
    metadata = saelens.saes.sae.SAEMetadata(hook_name="blocks.3.attn.hook_z")
    theirs = theirs_of(saelens, "jumprelu", reshape_activations="hook_z", metadata=metadata)
    theirs.save_model(tmp_path / "theirs")

    ours = load_saelens(tmp_path / "theirs")
    save_saelens(ours, tmp_path / "again")

    with torch.no_grad():
        close(ours(x).reconstruction, theirs(x.view(50, 3, 4)).flatten(1))
    assert saelens.SAE.load_from_disk(tmp_path / "again").cfg.reshape_activations == "hook_z"


def gemma_scope(folder, **changes):
    """Write a dictionary as Gemma Scope does, return its arrays."""
    random = numpy.random.default_rng(0)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    arrays = {name: random.normal(size=shape).astype(numpy.float32) for name, shape in shapes.items()}
    arrays["threshold"] = random.uniform(1, 4, D_SAE).astype(numpy.float32)
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: value for name, value in {**arrays, **changes}.items() if value is not None}
    numpy.savez(folder / "params.npz", **found)
    return arrays


def test_gemma_scope_is_read_from_its_own_format_and_goes_on_to_saelens(saelens, x, tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    arrays = {name: torch.from_numpy(value) for name, value in gemma_scope(folder).items()}
    # The equations of its model card, which take no b_dec from the input.
    pre = x @ arrays["W_enc"] + arrays["b_enc"]
    latents = pre.relu() * (pre > arrays["threshold"])
    expected = latents @ arrays["W_dec"] + arrays["b_dec"]

    ours = load_gemma_scope(folder)
    save_saelens(ours, tmp_path / "saelens")
    theirs = saelens.SAE.load_from_disk(tmp_path / "saelens")

    assert 2 < (latents > 0).sum(dim=1).float().mean() < D_SAE / 2
    with torch.no_grad():
        # Sums of a dozen terms of size 100: float32 keeps seven digits of them.
        torch.testing.assert_close(dense(ours, x), latents, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(ours(x).reconstruction, expected, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(theirs(x), expected, atol=1e-3, rtol=1e-5)
    assert torch.equal(ours.threshold, arrays["threshold"]) and torch.equal(ours.W_dec, arrays["W_dec"])
    assert (ours.config.selection, ours.config.model_name) == ("jumprelu", "google/gemma-2-2b")
    assert theirs.cfg.metadata.hook_name == "blocks.20.hook_resid_post" and not ours.training


@pytest.mark.parametrize(
    "path, model_name, hook_name",
    [
        ("gemma-scope-2b-pt-res/layer_0/width_16k/average_l0_105", "google/gemma-2-2b", "blocks.0.hook_resid_post"),
        ("gemma-scope-9b-it-res/layer_31/width_16k/canonical", "google/gemma-2-9b-it", "blocks.31.hook_resid_post"),
        ("gemma-scope-2b-pt-mlp/layer_5/width_65k/average_l0_9", "google/gemma-2-2b", "blocks.5.hook_mlp_out"),
        ("gemma-scope-9b-pt-att-canonical/layer_5/width_16k", "google/gemma-2-9b", "blocks.5.attn.hook_z"),
        (
            "models--google--gemma-scope-27b-pt-res/snapshots/ab12/layer_10",
            "google/gemma-2-27b",
            "blocks.10.hook_resid_post",
        ),
        ("mine/layer_7/width_1k", None, "blocks.7.hook_resid_post"),
        ("layer_12_study/gemma-scope-2b-pt-res/layer_20/width_16k", "google/gemma-2-2b", "blocks.20.hook_resid_post"),
        ("layer_3/mine/layer_7/width_1k", None, "blocks.7.hook_resid_post"),
        ("mine", None, None),
    ],
)
def test_the_path_of_gemma_scope_says_model_layer_and_site(tmp_path, path, model_name, hook_name):
    gemma_scope(tmp_path / path)

    sae = load_gemma_scope(tmp_path / path)
    save_saelens(sae, tmp_path / "saelens")

    metadata = json.loads((tmp_path / "saelens" / "cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == (model_name, hook_name)
    assert torch.equal(load_gemma_scope(tmp_path, path).threshold, sae.threshold)


@pytest.mark.parametrize("factor", [1.0, numpy.ones(D_SAE)])
def test_gemma_scope_may_spell_matrices_in_lower_case_and_hold_a_factor_of_one(tmp_path, factor):
    arrays = gemma_scope(tmp_path / "usual")
    lower = {"w_enc": arrays["W_enc"], "w_dec": arrays["W_dec"], "W_enc": None, "W_dec": None}
    gemma_scope(tmp_path / "other", **lower, scaling_factor=factor)

    usual, other = (load_gemma_scope(tmp_path / name).state_dict() for name in ("usual", "other"))

    assert all(torch.equal(tensor, other[name]) for name, tensor in usual.items())


def test_gemma_scope_is_read_from_the_hub(hub, tmp_path):
    from huggingface_hub import HfApi

    gemma_scope(tmp_path / "layer_5" / "width_16k")
    HfApi().create_repo("tester/gemma-scope-2b-pt-res", exist_ok=True)
    HfApi().upload_folder(repo_id="tester/gemma-scope-2b-pt-res", folder_path=tmp_path)

    config = load_gemma_scope("tester/gemma-scope-2b-pt-res", "layer_5/width_16k").config

    assert (config.layer, config.hook_point, config.model_name) == (5, "output", "google/gemma-2-2b")


@pytest.mark.parametrize("site", ["res", "mlp", "att"])
def test_gemma_scope_that_saelens_has_read_and_saved_is_the_same_dictionary(saelens, hub, tmp_path, site):
    from huggingface_hub import HfApi
    from sae_lens.loading import pretrained_sae_loaders as loaders

    name, folder = f"tester/gemma-scope-9b-pt-{site}", "layer_5/width_16k"
    gemma_scope(tmp_path / folder)
    HfApi().create_repo(name, exist_ok=True)
    HfApi().upload_folder(repo_id=name, folder_path=tmp_path)
    sizes = {"d_in": D_IN, "d_sae": D_SAE}
    settings, weights, _ = loaders.gemma_2_sae_huggingface_loader(name, folder, cfg_overrides=sizes)
    theirs = saelens.JumpReLUSAE(saelens.JumpReLUSAEConfig.from_dict(loaders.handle_config_defaulting(settings)))
    theirs.load_state_dict(weights)
    theirs.save_model(tmp_path / "saelens")

    through, own = load_saelens(tmp_path / "saelens"), load_gemma_scope(name, folder)

    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in through.state_dict().items())
    assert (through.config.layer, through.config.hook_point) == (own.config.layer, own.config.hook_point)


class Planted:
    """Says so if it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("ran code of a pickle",)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"threshold": None}, r"the weights must have the keys .* got none for \['threshold'\]"),
        ({"log_scale": numpy.ones(1)}, r"the weights must have .* got the unknown \['log_scale'\]"),
        ({"scaling_factor": numpy.full(1, 2.0)}, r"the weights must have .* got the unknown \['scaling_factor'\]"),
        ({"w_enc": numpy.zeros((D_IN, D_SAE))}, r"the weights must have .* got the unknown \['w_enc'\]"),
        (
            {"W_enc": numpy.zeros((D_SAE, D_IN))},
            r"W_enc must have shape \(12, 40\), got \(40, 12\), which is transposed",
        ),
        (
            {"W_dec": numpy.zeros((D_IN, D_SAE))},
            r"W_dec must have shape \(40, 12\), got \(12, 40\), which is transposed",
        ),
        ({"threshold": numpy.zeros(())}, r"threshold must have shape \(40,\), got \(\)"),
        ({"b_dec": numpy.zeros(D_IN, dtype=int)}, "b_dec must be floating point, got torch.int64"),
        ({"b_dec": numpy.full(D_IN, "one")}, "expected arrays in params.npz in .*, got can't convert"),
        ({"b_dec": numpy.full(D_IN, numpy.nan)}, "b_dec must be finite, got NaN or infinity"),
        ({"b_dec": numpy.full(D_IN, 1e300)}, "b_dec must be finite, got NaN or infinity"),
        (
            {"W_enc": numpy.array([Planted()], dtype=object)},
            "params.npz in .*, got pickled objects: loading them can run any code, so it is never done",
        ),
        (
            {
                name: numpy.zeros((0, 0) if name.startswith("W") else 0)
                for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
            },
            "does not describe an autoencoder: d_in and d_sae must be positive, got 0 and 0",
        ),
    ],
)
def test_what_is_no_dictionary_of_gemma_scope_is_refused(tmp_path, changes, message):
    gemma_scope(tmp_path, **changes)

    with pytest.raises(ValueError, match=message):
        load_gemma_scope(tmp_path)


@pytest.mark.parametrize(
    "name, message",
    [
        ("gemma-scope-2b-pt-res/embedding/width_4k", "attention outputs, or a transcoder, got embeddings"),
        ("gemma-scope-2b-pt-transcoders/width_16k", "expected the layer of a transcoder in the path, such as layer_5"),
    ],
)
def test_what_gemma_scope_trained_for_something_else_is_refused(tmp_path, name, message):
    gemma_scope(tmp_path / name)

    with pytest.raises(ValueError, match=message):
        load_gemma_scope(tmp_path / name)


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    path = tmp_path / "params.npz"
    gemma_scope(tmp_path)
    whole = path.read_bytes()
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as file:
        file.writestr("readme.txt", "no array")
    (tmp_path / "array.npy").write_bytes(b"")
    numpy.save(tmp_path / "array.npy", numpy.zeros(3))
    numpy.save(tmp_path / "object.npy", numpy.array([Planted()]), allow_pickle=True)
    others = [(tmp_path / name).read_bytes() for name in ("other.npz", "array.npy", "object.npy")]
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1

    for content in (b"", b"torn", whole[:-100], whole[: len(whole) // 2], bytes(flipped), *others):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"expected arrays in params.npz in {tmp_path}.*, got"):
            load_gemma_scope(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"expected params.npz in .*, got \['array.npy'"):
        load_gemma_scope(tmp_path)


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
    assert (ours.config.layer, ours.config.hook_point) == (7, "mlp")


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
        (
            {"architecture": "gated"},
            r"expected a standard \(ReLU\), TopK or JumpReLU SAE or a transcoder, got architecture 'gated'",
        ),
        ({"architecture": ["topk"]}, r"or JumpReLU SAE or a transcoder, got architecture \['topk'\]"),
        ({"architecture": "transcoder"}, "metadata.hook_name_out in cfg.json must be the name of a place, got None"),
        ({"d_out": 12}, r"cfg.json must have .* got the unknown \['d_out'\]"),
        ({"architecture": "standard"}, r"cfg.json must have .* got the unknown \['k', 'rescale_acts"),
        ({"architecture": "jumprelu"}, r"cfg.json must have .* got the unknown \['k', 'rescale_acts"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='none', got 'layer_norm'"),
        (
            {"normalize_activations": "constant_norm_rescale"},
            "normalize_activations='none', got 'constant_norm_rescale'",
        ),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations='none', got 'expected_average"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='none', got 'hook_z'"),
        ({"metadata": {"sae_lens_version": "5.10.1"}}, "SAELens 6 or later, got version 5.10.1"),
        ({"metadata": {}}, "SAELens 6 or later, got version None"),
        ({"metadata": []}, "SAELens 6 or later, got version None"),
        (
            {"metadata": {"sae_lens_version": "6.54.0", "hook_name": ["layers.3"]}},
            r"metadata.hook_name in cfg.json must be the name of a place, got \['layers.3'\]",
        ),
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
            {"weights": {"b_dec": torch.full((D_IN,), 1e300, dtype=torch.float64)}},
            "b_dec must be finite, got NaN or infinity",
        ),
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


def test_a_batch_topk_sae_has_one_budget(tmp_path):
    sae = make_sae(selection="batch_topk", budgets=[K])
    with pytest.raises(ValueError, match="selects by a threshold and has one budget, k=6, got 3"):
        save_saelens(sae, tmp_path, k=3)
    with pytest.raises(ValueError, match="sparsify holds a fixed number of latents per input"):
        save_sparsify(sae, tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"drop": ["k"]}, r"cfg.json must have the keys .* got none for \['k'\]"),
        ({"foo": 1}, r"got the unknown \['foo'\]"),
        ({"activation": "groupmax"}, "expected a TopK autoencoder with activation='topk', got activation='groupmax'"),
        ({"transcode": True}, "expected a transcoder in a folder called after the layer, attention or MLP"),
        ({"transcode": 1}, "transcode in cfg.json must be true or false, got 1"),
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


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"drop": ["threshold"]}, r"the weights must have the keys .* got none for \['threshold'\]"),
        ({"weights": {"threshold": torch.zeros(1)}}, r"threshold must have shape \(40,\), got \(1,\)"),
        ({"weights": {"threshold": torch.full((D_SAE,), torch.inf)}}, "threshold must be finite, got NaN or infinity"),
        ({"k": 3}, r"cfg.json must have the keys .* got the unknown \['k'\]"),
    ],
)
def test_what_a_jumprelu_file_cannot_hold_is_refused(tmp_path, changes, message):
    save_saelens(make_sae(**FOR_USE), tmp_path)
    edit(tmp_path, **changes)

    with pytest.raises(ValueError, match=message):
        load_saelens(tmp_path)


@pytest.mark.parametrize("load", [load_saelens, load_sparsify, load_gemma_scope])
def test_a_pickle_is_never_loaded(tmp_path, load, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("loaded a pickle"))
    (tmp_path / "ae.pt").write_bytes(b"not even a pickle")
    (tmp_path / "cfg.json").write_text("{}")

    with pytest.raises(ValueError, match=r"got the pickle ae.pt: loading one can run any code, so it is never done"):
        load(tmp_path)
    (tmp_path / "ae.pt").unlink()
    with pytest.raises(ValueError, match=r"expected (sae.*safetensors|params.npz) in .*, got \['cfg.json'\]"):
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
    "options, hook_name, place",
    [
        ({}, "blocks.3.hook_resid_post", (3, "output")),
        ({"hook_point": None}, "blocks.3.hook_resid_post", (3, "output")),
        ({"hook_point": "blocks.3.hook_mlp_out"}, "blocks.3.hook_mlp_out", (3, "mlp.output")),
        ({"hook_point": "blocks.3.hook_mlp_out", "layer": None}, "blocks.3.hook_mlp_out", (3, "mlp.output")),
        ({"hook_point": "layers.3.self_attn"}, "layers.3.self_attn", (3, "self_attn")),
        ({"hook_point": "mlp"}, "layers.3.mlp", (3, "mlp")),
        ({"hook_point": "blocks.0.hook_resid_pre", "layer": None}, "blocks.0.hook_resid_pre", (0, "input")),
        ({"hook_point": None, "layer": None}, None, (None, None)),
    ],
)
def test_an_autoencoder_of_something_else_than_layer_outputs_stays_one(tmp_path, options, hook_name, place):
    save_saelens(make_sae(**options), tmp_path / "saelens")

    assert json.loads((tmp_path / "saelens" / "cfg.json").read_text())["metadata"]["hook_name"] == hook_name
    loaded = load_saelens(tmp_path / "saelens").config
    assert (loaded.layer, loaded.hook_point) == place
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
        ({"hook_point": "layers.3.mlp"}, "layers.3.mlp", (3, "mlp")),
        ({"hook_point": "blocks.3.hook_mlp_out"}, "layers.3.mlp", (3, "mlp")),
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


D_OUT = 9
MLP = {"hook_point": "mlp.input", "target_hook_point": "mlp.output"}


def make_transcoder(**options):
    """One that has units of its own for inputs and targets, and thresholds, of which some are negative."""
    transcoder = make_sae(**{"d_out": D_IN, **MLP, **options})
    with torch.no_grad():
        transcoder.encoder_weight.normal_(std=0.3)
        transcoder.input_center.normal_()
        transcoder.target_scale.fill_(8.0)
        if transcoder.config.skip_connection:
            transcoder.W_skip.normal_()
        if transcoder.config.selection == "jumprelu":
            transcoder.threshold.copy_(torch.linspace(-1, 2, D_SAE))
        elif transcoder.config.selection == "relu":
            transcoder.threshold.fill_(0.0)
    return transcoder


def assert_same_function(found, expected, x):
    """Latents and outputs; what is of size 30 has five digits behind the point in float32."""
    with torch.no_grad():
        torch.testing.assert_close(dense(found, x), dense(expected, x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found(x).reconstruction, expected(x).reconstruction, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("skip_connection", [False, True])
@pytest.mark.parametrize("k", [1, 3, K])
def test_sparsify_runs_our_transcoders_at_the_chosen_budget(sparsify, x, tmp_path, k, skip_connection):
    transcoder, folder = make_transcoder(skip_connection=skip_connection), tmp_path / "layers.3.mlp"
    before = {name: tensor.clone() for name, tensor in transcoder.state_dict().items()}
    expected = transcoder(x, k=k)

    save_sparsify(transcoder, folder, k)
    theirs, ours = sparsify.SparseCoder.load_from_disk(folder), load_sparsify(folder)

    assert (theirs.cfg.transcode, theirs.cfg.skip_connection, theirs.cfg.k) == (True, skip_connection, k)
    with torch.no_grad():
        found = theirs(x)
        torch.testing.assert_close(found.sae_out, expected.reconstruction, atol=1e-4, rtol=1e-5)
        latents = torch.zeros(50, D_SAE).scatter(1, found.latent_indices, found.latent_acts)
        close(latents, torch.zeros(50, D_SAE).scatter(1, expected.top_indices, expected.top_values.detach()))
        torch.testing.assert_close(ours(x).reconstruction, expected.reconstruction, atol=1e-4, rtol=1e-5)
    assert (ours.config.layer, ours.config.hook_point, ours.config.target_hook_point) == (3, "mlp.input", "mlp")
    assert (ours.config.k, ours.config.skip_connection) == (k, skip_connection)
    assert all(torch.equal(tensor, before[name]) for name, tensor in transcoder.state_dict().items())


@pytest.mark.parametrize("skip_connection", [False, True])
@pytest.mark.parametrize(
    "name, place",
    [
        ("layers.7.mlp", (7, "mlp.input", "mlp")),
        ("gpt_neox.layers.7.attention", (7, "attention.input", "attention")),
        ("transformer.h.7", (7, "input", "output")),
    ],
)
def test_ours_loads_a_transcoder_of_sparsify_and_gives_it_back(sparsify, x, tmp_path, name, place, skip_connection):
    config = sparsify.SparseCoderConfig(k=K, num_latents=D_SAE, transcode=True, skip_connection=skip_connection)
    theirs = sparsify.SparseCoder(D_IN, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
    theirs.save_to_disk(tmp_path / name)

    ours = load_sparsify(tmp_path / name)
    save_sparsify(ours, tmp_path / "again" / name)

    with torch.no_grad():
        torch.testing.assert_close(ours(x).reconstruction, theirs(x).sae_out, atol=1e-4, rtol=1e-5)
    assert (ours.config.layer, ours.config.hook_point, ours.config.target_hook_point) == place
    again = load_file(tmp_path / "again" / name / "sae.safetensors")
    assert all(torch.equal(tensor, again[key]) for key, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("skip_connection", [False, True])
@pytest.mark.parametrize("selection", ["relu", "jumprelu", "batch_topk"])
def test_saelens_runs_our_transcoders(saelens, x, tmp_path, selection, skip_connection):
    sizes = {"budgets": [K]} if selection == "batch_topk" else FOR_USE
    options = {**sizes, "selection": selection, "skip_connection": skip_connection, "d_out": D_OUT}
    transcoder = make_transcoder(**options)

    save_saelens(transcoder, tmp_path)
    theirs, ours = saelens.SAE.load_from_disk(tmp_path), load_saelens(tmp_path)

    kind = ("" if selection == "relu" else "JumpReLU") + ("Skip" if skip_connection else "") + "Transcoder"
    assert type(theirs) is getattr(saelens.saes.transcoder, kind)
    latents = dense(transcoder, x)
    assert 0 < (latents > 0).sum(dim=1).float().mean() < D_SAE
    with torch.no_grad():
        close(theirs.encode(x), latents)
        torch.testing.assert_close(theirs(x), transcoder(x).reconstruction, atol=1e-4, rtol=1e-5)
    assert_same_function(ours, transcoder, x)
    names = theirs.cfg.metadata.hook_name, theirs.cfg.metadata.hook_name_out
    assert names == ("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out")
    for name in ("selection", "k", "d_out", "layer", "hook_point", "target_hook_point", "model_name"):
        assert getattr(ours.config, name) == getattr(transcoder.config, name)


@pytest.mark.parametrize("architecture", interop.TRANSCODERS)
def test_ours_loads_each_transcoder_of_saelens_and_gives_it_back(saelens, x, tmp_path, architecture):
    kind, settings = saelens.registry.SAE_CLASS_REGISTRY[architecture]
    metadata = saelens.saes.sae.SAEMetadata(
        hook_name="blocks.2.ln2.hook_normalized", hook_name_out="blocks.2.hook_mlp_out", model_name="gpt2"
    )
    theirs = kind(settings(d_in=D_IN, d_sae=D_SAE, d_out=D_OUT, apply_b_dec_to_input=False, metadata=metadata))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
    theirs.save_model(tmp_path / "theirs")

    ours = load_saelens(tmp_path / "theirs")
    save_saelens(ours, tmp_path / "again")
    back = saelens.SAE.load_from_disk(tmp_path / "again")

    assert type(back) is kind and not ours.training
    with torch.no_grad():
        close(dense(ours, x), theirs.encode(x))
        torch.testing.assert_close(ours(x).reconstruction, theirs(x), atol=1e-4, rtol=1e-5)
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    assert (ours.config.layer, ours.config.hook_point, ours.config.target_hook_point) == (
        2,
        "blocks.2.ln2.hook_normalized",
        "mlp.output",
    )
    assert back.cfg.metadata.hook_name == metadata.hook_name
    assert back.cfg.metadata.hook_name_out == metadata.hook_name_out


@pytest.mark.parametrize(
    "names, place",
    [
        (("blocks.3.hook_resid_mid", "blocks.3.hook_mlp_out"), (3, "middle", "mlp.output")),
        (("layers.3.norm", "layers.3.mlp"), (3, "norm", "mlp")),
        (
            ("blocks.3.hook_resid_pre", "blocks.4.hook_mlp_out"),
            (None, "blocks.3.hook_resid_pre", "blocks.4.hook_mlp_out"),
        ),
        (
            ("vision.layers.3.norm", "vision.layers.3.mlp"),
            (None, "vision.layers.3.norm", "vision.layers.3.mlp"),
        ),
        (("embed", "lm_head"), (None, "embed", "lm_head")),
    ],
)
def test_both_places_of_a_transcoder_survive_the_way_through_saelens(tmp_path, names, place):
    save_saelens(make_transcoder(**FOR_USE), tmp_path)
    metadata = {"sae_lens_version": "6.54.0", "hook_name": names[0], "hook_name_out": names[1]}
    edit(tmp_path, metadata=metadata)

    config = load_saelens(tmp_path).config
    save_saelens(load_saelens(tmp_path), tmp_path / "again")

    assert (config.layer, config.hook_point, config.target_hook_point) == place
    again = json.loads((tmp_path / "again" / "cfg.json").read_text())["metadata"]
    assert (again["hook_name"], again["hook_name_out"]) == names


def test_gemma_scope_transcoders_are_read_from_their_own_format(saelens, x, hub, tmp_path):
    from huggingface_hub import HfApi
    from sae_lens.loading import pretrained_sae_loaders as loaders

    name, folder = "tester/gemma-scope-2b-pt-transcoders", "layer_5/width_16k/average_l0_30"
    arrays = {key: torch.from_numpy(value) for key, value in gemma_scope(tmp_path / folder).items()}
    HfApi().create_repo(name, exist_ok=True)
    HfApi().upload_folder(repo_id=name, folder_path=tmp_path)
    sizes = {"d_in": D_IN, "d_out": D_IN, "d_sae": D_SAE}
    settings, weights, _ = loaders.gemma_2_transcoder_huggingface_loader(name, folder, cfg_overrides=sizes)
    theirs = saelens.JumpReLUTranscoder(
        saelens.JumpReLUTranscoderConfig.from_dict(loaders.handle_config_defaulting(settings))
    )
    theirs.load_state_dict(weights)

    ours = load_gemma_scope(name, folder)
    save_saelens(ours, tmp_path / "saelens")

    pre = x @ arrays["W_enc"] + arrays["b_enc"]
    latents = pre.relu() * (pre > arrays["threshold"])
    assert 2 < (latents > 0).sum(dim=1).float().mean() < D_SAE / 2
    with torch.no_grad():
        close(dense(ours, x), latents)
        torch.testing.assert_close(ours(x).reconstruction, latents @ arrays["W_dec"] + arrays["b_dec"])
        torch.testing.assert_close(ours(x).reconstruction, theirs(x))
    back = saelens.SAE.load_from_disk(tmp_path / "saelens")
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in theirs.state_dict().items())
    assert ours.config.model_name == "google/gemma-2-2b" and ours.config.is_transcoder
    assert back.cfg.metadata.hook_name == settings["hook_name"] == "blocks.5.ln2.hook_normalized"
    assert back.cfg.metadata.hook_name_out == settings["hook_name_out"] == "blocks.5.hook_mlp_out"


def test_gemma_scope_transcoders_stand_in_for_an_mlp_once_the_weights_of_the_norm_are_divided_out(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    sizes = {"hidden_size": D_IN, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 50}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).eval()
    norm = model.model.layers[1].pre_feedforward_layernorm
    torch.nn.init.normal_(norm.weight, std=0.3)
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_1"
    gemma_scope(folder)
    ids, taken = torch.randint(50, (2, 7)), []
    norm.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    transcoder = load_gemma_scope(folder)
    message = "hook_point must be one of .* got 'blocks.1.ln2.hook_normalized'"
    with pytest.raises(ValueError, match=message), splice(model, transcoder):
        pass

    with torch.no_grad():
        transcoder.encoder_weight.data /= 1 + norm.weight
        transcoder.config.hook_point = "mlp.input"
        found = []
        site = find_site(model, 1, "mlp.output")
        with splice(model, transcoder), site_hook(site, found.append):
            model(ids)
        original = load_gemma_scope(folder)
        normed = taken[-1] / (taken[-1].pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()

        torch.testing.assert_close(found[-1], original(normed).reconstruction, atol=1e-4, rtol=1e-5)
    assert (original.encode(normed)[1] > 0).any()


def test_a_transcoder_of_the_k_strongest_is_none_of_saelens(tmp_path):
    with pytest.raises(
        ValueError, match="SAELens has no transcoder that selects the k strongest latents: use save_sparsify"
    ):
        save_saelens(make_transcoder(), tmp_path / "set")

    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    "options, name, message",
    [
        ({"hook_point": "middle"}, "layers.3.mlp", r"got one from middle \(12\) to mlp.output \(12\)"),
        ({"hook_point": "attention.input"}, "layers.3.mlp", "sparsify's transcoders go from what a layer"),
        ({"d_out": D_OUT}, "layers.3.mlp", r"of one size, got one from mlp.input \(12\) to mlp.output \(9\)"),
        ({"hook_point": "norm", "target_hook_point": "router"}, "layers.3.router", "got one from norm"),
        ({}, "layers.3", "which is blocks.3.hook_mlp_out, got layers.3: give the folder that name"),
        (FOR_USE, "layers.3.mlp", "this transcoder selects by a threshold"),
    ],
)
def test_a_transcoder_that_sparsify_cannot_hold_is_refused(tmp_path, options, name, message):
    with pytest.raises(ValueError, match=message):
        save_sparsify(make_transcoder(**options), tmp_path / name)

    assert not (tmp_path / name).exists()


SKIP = {"W_skip": torch.zeros(D_IN, D_IN)}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weights": SKIP}, r"the weights must have the keys .* got the unknown \['W_skip'\]"),
        ({"skip_connection": True}, r"the weights must have the keys .* got none for \['W_skip'\]"),
        ({"skip_connection": None}, "skip_connection in cfg.json must be true or false, got None"),
        (
            {"skip_connection": True, "weights": {"W_skip": torch.zeros(D_IN, 1)}},
            r"W_skip must have shape \(12, 12\), got \(12, 1\)",
        ),
        ({"transcode": False, "skip_connection": True}, "got skip_connection=True"),
    ],
)
def test_what_a_transcoder_of_sparsify_cannot_hold_is_refused(tmp_path, changes, message):
    save_sparsify(make_transcoder(), tmp_path / "layers.3.mlp")
    edit(tmp_path / "layers.3.mlp", **changes)

    with pytest.raises(ValueError, match=message):
        load_sparsify(tmp_path / "layers.3.mlp")


PLACES = {"sae_lens_version": "6.54.0", "hook_name": "blocks.3.mlp.hook_in"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weights": SKIP}, r"the weights must have the keys .* got the unknown \['W_skip'\]"),
        ({"architecture": "jumprelu_skip_transcoder"}, r"the weights must have .* got none for \['W_skip'\]"),
        ({"architecture": "transcoder"}, r"the weights must have .* got the unknown \['threshold'\]"),
        ({"architecture": "jumprelu"}, r"cfg.json must have the keys .* got the unknown \['d_out'\]"),
        ({"drop": ["d_out"]}, r"cfg.json must have the keys .* got none for \['d_out'\]"),
        ({"d_out": 1.5}, "d_out in cfg.json must be an integer, got 1.5"),
        ({"d_out": 9}, r"W_dec must have shape \(40, 9\), got \(40, 12\)"),
        ({"foo": 1}, r"cfg.json must have the keys .* got the unknown \['foo'\]"),
        ({"apply_b_dec_to_input": True}, "a transcoder with apply_b_dec_to_input=False, got True"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='none', got 'hook_z'"),
        ({"metadata": PLACES}, "metadata.hook_name_out in cfg.json must be the name of a place, got None"),
        (
            {"metadata": {**PLACES, "hook_name_out": "blocks.3.mlp.hook_in"}},
            "does not describe an autoencoder: a transcoder computes another site than it reads",
        ),
    ],
)
def test_what_a_transcoder_of_saelens_cannot_hold_is_refused(tmp_path, changes, message):
    save_saelens(make_transcoder(**FOR_USE), tmp_path)
    edit(tmp_path, **changes)

    with pytest.raises(ValueError, match=message):
        load_saelens(tmp_path)


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
