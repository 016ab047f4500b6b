"""The model: what it computes, keeps, saves and refuses."""

import copy
import resource

import numpy
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, Trainer, TrainingArguments

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel, explained_variance
from hf_hierarchical_sae.hierarchical_topk import hierarchical_topk_loss_reference
from hf_hierarchical_sae.modeling_hierarchical_sae import geometric_median


OBJECTIVES = {
    "hierarchical": {},
    "subset": {"budgets": [1, 4, 8], "budget_weights": [1.0, 2.0, 1.0]},
    "topk": {"budgets": [8]},
    "batch_topk": {"budgets": [8], "selection": "batch_topk"},
    "matryoshka": {"budgets": [8], "matryoshka_prefixes": [8, 24, 64]},
    "both": {"budgets": [1, 3, 8], "budget_weights": [1.0, 2.0, 1.0], "matryoshka_prefixes": [8, 24, 64]},
    "auxiliary": {"aux_loss_coefficient": 0.1, "dead_after_tokens": 1, "aux_k": 4},
    "free decoder": {"normalize_decoder": False},
    "chunked": {"encoder_chunk_size": 10},
}
objectives = pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)


def make_sae(**options):
    config = HierarchicalSaeConfig(**{"d_in": 16, "d_sae": 64, "k": 8, **options})
    return HierarchicalSaeModel(config).eval()


def make_activations(tokens=256, scale=30.0):
    """Correlated activations, far from the origin and of large scale, as a language model's are."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(24, 16, generator=generator) * (torch.rand(tokens, 24, 1, generator=generator) < 0.2)
    strength = torch.rand(tokens, 24, 1, generator=generator)
    return scale * (mixing * strength).sum(dim=1) + 100


def train(sae, activations, steps=30, lr=1e-2):
    sae.train()
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sae(activations).loss
        loss.backward()
        optimizer.step()
    return sae.eval()


def dense_forward(sae, x, k):
    """The equations of the class docstring with dense tensors and stock autograd."""
    latents = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    values, indices = latents.topk(k, dim=1)
    sparse = torch.zeros_like(latents).scatter(1, indices, values)
    return sparse @ sae.W_dec + sae.b_dec


@pytest.mark.parametrize("k", [1, 3, 8])
def test_reconstruction_follows_the_equations_at_every_k(k):
    sae, x = make_sae(), make_activations(20, scale=1.0)

    torch.testing.assert_close(sae(x, k=k).reconstruction, dense_forward(sae, x, k), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 10])
def test_gradients_of_the_sparse_encoder_equal_dense_autograd(chunk):
    sae = make_sae(budgets=[8], normalize_decoder=False, encoder_chunk_size=chunk).double()
    # So that some inputs have fewer than 8 positive latents: what is selected beyond them has no gradient.
    torch.nn.init.constant_(sae.b_enc, -120.0)
    x = make_activations(20, scale=1.0).double().requires_grad_()
    assert ((sae.encode(x)[1] > 0).sum(dim=1) < 8).any()
    tensors = [sae.encoder_weight, sae.b_enc, sae.W_dec, sae.b_dec, x]
    expected = torch.autograd.grad((dense_forward(sae, x, 8) - x).square().mean(), tensors)

    gradients = torch.autograd.grad(sae(x).loss, tensors)

    for gradient, other in zip(gradients, expected):
        torch.testing.assert_close(gradient, other)


def test_loss_is_the_mean_error_over_budgets():
    sae, x = make_sae(), make_activations(20, scale=1.0)
    errors = [(dense_forward(sae, x, k) - x).square().mean() for k in range(1, 9)]

    output = sae(x)

    torch.testing.assert_close(output.budget_errors, torch.stack(errors))
    torch.testing.assert_close(output.loss, torch.stack(errors).mean())


def test_matryoshka_loss_is_the_mean_error_over_prefixes_of_the_dictionary():
    sae, x = make_sae(**OBJECTIVES["matryoshka"]), make_activations(20, scale=1.0)
    top_indices, top_values = sae.encode(x)
    errors = [(sae.decode(top_indices, top_values * (top_indices < end)) - x).square().mean() for end in (8, 24, 64)]

    torch.testing.assert_close(sae(x).loss, torch.stack(errors).mean())


def test_budgets_of_prefixes_are_those_of_the_strongest_latents_that_are_in_them():
    sae, x = make_sae(**OBJECTIVES["both"]), make_activations(20, scale=1.0)
    top_indices, top_values = sae.encode(x)
    errors = [
        [
            (sae.decode(top_indices[:, :k], (top_values * (top_indices < end))[:, :k]) - x).square().mean()
            for k in (1, 3, 8)
        ]
        for end in (8, 24, 64)
    ]
    expected = torch.tensor(errors)

    output = sae(x)

    torch.testing.assert_close(output.budget_errors, expected)
    torch.testing.assert_close(output.loss, (expected.mean(dim=0) * torch.tensor([0.25, 0.5, 0.25])).sum())
    assert sae(x, k=3).budget_errors.shape == (3, 2)


def test_batch_topk_keeps_k_latents_per_input_on_average_and_differently_many_per_input():
    sae, x = make_sae(**OBJECTIVES["batch_topk"]).train(), make_activations(40, scale=1.0)
    x[:20] *= 3

    used = (sae(x).top_values > 0).sum(dim=1)

    dense = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    strongest = dense.flatten().topk(8 * 40).values[-1]
    assert used.sum() == 8 * 40
    assert torch.equal(used, (dense >= strongest).sum(dim=1))
    assert used.max() > 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_threshold_is_known_after_one_batch_and_then_a_mean_over_the_last_ten_or_so(dtype):
    sae = make_sae(**OBJECTIVES["batch_topk"]).to(dtype).train()
    first, second = (factor * make_activations(40, scale=1.0).to(dtype) for factor in (1, 3))

    smallest = [top[top > 0].min() for top in (sae(x).top_values.detach() for x in (first, second))]

    # In a float64 model too it has gone through float32, in which processes add.
    torch.testing.assert_close(sae.threshold, 0.9 * smallest[0] + 0.1 * smallest[1], rtol=1e-6, atol=0)


def test_batch_topk_uses_its_learned_threshold_at_inference_one_input_at_a_time():
    sae, x = make_sae(**OBJECTIVES["batch_topk"]), make_activations()
    sae.initialize_from_activations(x)
    train(sae, x)
    # The threshold is a running mean: it settles once the weights do.
    sae.train()
    for _ in range(40):
        sae(x)
    sae.eval()

    together = sae(x)
    alone = torch.cat([sae(token.unsqueeze(0)).reconstruction for token in x])

    # float32 products of another batch size round differently.
    torch.testing.assert_close(alone, together.reconstruction, rtol=1e-5, atol=1e-4)
    assert (together.top_values > 0).sum(dim=1).float().mean() == pytest.approx(8, rel=0.02)


@pytest.mark.parametrize("chunk", [None, 10])
@pytest.mark.parametrize("training", [True, False])
def test_batch_topk_finds_all_latents_of_an_input_that_uses_many(chunk, training):
    sae = make_sae(**OBJECTIVES["batch_topk"], encoder_chunk_size=chunk).train(training)
    x = make_activations(40, scale=1.0) - 100
    x[3] *= 50
    sae.threshold.fill_(0.9)
    dense = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    threshold = dense.flatten().topk(8 * 40).values[-1] if training else sae.threshold

    top_indices, top_values = sae.encode(x)

    expected = torch.where(dense >= threshold, dense, 0.0)
    found = torch.zeros_like(dense).scatter_add(1, top_indices, top_values)
    # The same float32 products, blocked differently.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    used = (expected > 0).sum(dim=1)
    assert used[3] > 16 and used.min() == 0
    assert top_indices.shape == (40, used.max())


def test_batch_topk_gives_as_many_places_as_an_input_uses():
    sae, x = make_sae(**OBJECTIVES["batch_topk"]), make_activations(40, scale=1.0)
    dense = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    third, fourth = dense.flatten().topk(4).values[2:]
    sae.threshold.copy_((third + fourth) / 2)

    top_indices, top_values = sae.encode(x)

    used = (dense > sae.threshold).sum(dim=1).max()
    assert top_indices.shape == top_values.shape == (40, used)
    assert (top_values > 0).sum() == 3


def counted_flops():
    """torch does not count those of the operator that multiplies on AMD's processors."""
    linear = {torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: 2 * x[0] * x[1] * weight[0]}
    return FlopCounterMode(display=False, custom_mapping=linear)


def test_batch_topk_multiplies_by_the_encoder_once():
    sae, x = make_sae(**OBJECTIVES["batch_topk"]), make_activations(40, scale=1.0)
    sae.threshold.fill_(0.1)

    with counted_flops() as counted:
        assert sae.encode(x)[0].shape[1] > 16
    assert counted.get_total_flops() == 2 * x.numel() * sae.config.d_sae


FOR_USE = {name: {"selection": name, "k": 64, "budgets": [64]} for name in ("relu", "jumprelu")}
for_use = pytest.mark.parametrize("options", FOR_USE.values(), ids=FOR_USE)
any_number = pytest.mark.parametrize(
    "options", [*FOR_USE.values(), OBJECTIVES["batch_topk"]], ids=[*FOR_USE, "batch_topk"]
)


def make_for_use(**options):
    """One with a threshold for each latent, some of them negative."""
    sae = make_sae(**options)
    with torch.no_grad():
        sae.b_enc.normal_(mean=-1.0, std=0.2)
        sae.b_dec.normal_()
        if sae.config.selection == "jumprelu":
            sae.threshold.copy_(torch.linspace(-0.5, 2.5, 64))
    sae.input_scale.fill_(0.5)
    return sae


@pytest.mark.parametrize("chunk", [None, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@for_use
def test_every_latent_above_its_own_threshold_is_kept_and_no_other(options, dtype, chunk):
    sae, x = (
        make_for_use(**options, encoder_chunk_size=chunk).to(dtype),
        make_activations(40, scale=1.0).to(dtype) - 100,
    )
    # One input with many active latents, one with none.
    x[3] *= 50
    x[5] = sae.b_dec.detach() / sae.input_scale
    pre = (sae.input_scale * x - sae.b_dec) @ sae.W_enc + sae.b_enc
    expected = (pre.relu() * (pre > sae.threshold)).detach() / sae.input_scale

    top_indices, top_values = sae.encode(x)

    found = torch.zeros_like(expected).scatter_add(1, top_indices, top_values)
    # The same products, blocked differently.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    used = (expected > 0).sum(dim=1)
    assert used[3] > 20 > used.float().mean() and used[5] == 0 and top_indices.shape == (40, used.max())
    assert (top_values.diff(dim=1) <= 0).all() and top_values.dtype == dtype
    output = sae(x.view(2, 20, 16), attention_mask=torch.ones(2, 20).index_fill(1, torch.tensor([4]), 0))
    reconstruction = (expected @ sae.W_dec + sae.b_dec / sae.input_scale).view(2, 20, 16)
    reconstruction[:, 4] = 0
    torch.testing.assert_close(output.reconstruction, reconstruction, rtol=1e-5, atol=1e-3)
    assert output.loss.isfinite() and output.budget_errors.shape == (1,)


@for_use
def test_without_inputs_or_active_latents_there_is_one_empty_place(options):
    sae = make_for_use(**options)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)

    assert [tuple(part.shape) for part in sae.encode(torch.zeros(0, 16))] == [(0, 1), (0, 1)]
    indices, values = sae.encode(torch.zeros(3, 16))
    assert indices.shape == (3, 1) and (values == 0).all()
    torch.testing.assert_close(sae.decode(indices, values), (sae.b_dec / sae.input_scale).expand(3, 16))


@pytest.mark.parametrize("chunk", [None, 10])
@for_use
def test_parts_of_the_input_with_different_numbers_of_latents_are_put_together(options, chunk, monkeypatch):
    sae, x = make_for_use(**options, encoder_chunk_size=chunk), make_activations(40, scale=1.0) - 100
    x[33] *= 50
    expected = sae.encode(x)
    monkeypatch.setattr("hf_hierarchical_sae.modeling_hierarchical_sae.PRE_ACTIVATIONS", 640)

    found = sae.encode(x)

    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8])
def test_indices_of_any_integer_type_are_decoded(dtype):
    sae = make_sae().eval()
    indices, values = sae.encode(make_activations(5))

    assert torch.equal(sae.decode(indices.to(dtype), values), sae.decode(indices, values))


@any_number
def test_each_place_of_an_input_is_another_latent(options, monkeypatch):
    monkeypatch.setattr("hf_hierarchical_sae.modeling_hierarchical_sae.PRE_ACTIVATIONS", 640)
    sae, x = make_for_use(**options), make_activations(40, scale=1.0) - 100
    x[33] *= 50
    x[5] = sae.b_dec.detach() / sae.input_scale

    indices, values = sae.encode(x)

    # So that neither `scatter` nor an edit of one latent's value in `splice` meets it twice.
    assert all(len(set(row)) == len(row) for row in indices.tolist()) and (values == 0).any()
    dense = torch.zeros(40, 64).scatter(1, indices, values)
    torch.testing.assert_close(dense @ sae.W_dec + sae.b_dec / sae.input_scale, sae.decode(indices, values))


@any_number
def test_activations_that_are_not_numbers_do_not_pass_for_inactive(options):
    sae, x = make_for_use(**options), make_activations(5, scale=1.0) - 100
    x[2, 7] = torch.nan

    assert sae(x).reconstruction.isnan().all(dim=1).tolist() == [False, False, True, False, False]


@for_use
def test_it_multiplies_by_the_encoder_once_and_has_gradients_of_its_input(options):
    sae, x = make_for_use(**options), make_activations(40, scale=1.0) - 100

    with counted_flops() as counted:
        sae.encode(x)
    assert counted.get_total_flops() == 2 * x.numel() * sae.config.d_sae
    own, dense = (x.clone().requires_grad_() for _ in range(2))
    sae(own).reconstruction.square().sum().backward()
    pre = (sae.input_scale * dense - sae.b_dec) @ sae.W_enc + sae.b_enc
    reconstruction = (pre.relu() * (pre > sae.threshold)) @ sae.W_dec + sae.b_dec
    (reconstruction / sae.input_scale).square().sum().backward()
    torch.testing.assert_close(own.grad, dense.grad, rtol=1e-4, atol=1e-4)


@for_use
def test_a_threshold_for_each_latent_is_folded_saved_and_loaded(options, tmp_path):
    sae, x = make_for_use(**options, normalize_decoder=False), make_activations(40, scale=1.0) - 100
    before = sae(x)
    sae.fold_input_scale()
    sae.save_pretrained(tmp_path)

    loaded = AutoModel.from_pretrained(tmp_path)

    assert torch.equal(loaded.threshold, sae.threshold) and loaded.threshold.ndim == (options["selection"] != "relu")
    assert torch.equal(loaded(x).reconstruction, before.reconstruction)
    assert torch.equal(loaded(x).top_values, before.top_values)


@for_use
def test_one_for_use_is_not_trained_and_has_no_budget(options):
    sae, x = make_for_use(**options), make_activations(40, scale=1.0)

    with pytest.raises(
        ValueError, match=f"a {options['selection']} SAE is for use: it is not trained here, got training"
    ):
        sae.train()(x)
    with pytest.raises(ValueError, match="is for use"):
        sae.initialize_from_activations(x)
    for call in (sae.eval(), sae.encode):
        with pytest.raises(ValueError, match="keeps any number of latents: it has no budget, got 8"):
            call(x, k=8)
    with pytest.raises(ValueError, match="keeps any number of latents: it has no budget, got 8"):
        explained_variance(sae, x, [8])
    assert explained_variance(sae, x).keys() == {64}


@objectives
def test_training_explains_more_variance(options):
    sae, x = make_sae(**options), make_activations()
    sae.initialize_from_activations(x)
    before = explained_variance(sae, x, [8])[8]

    train(sae, x, steps=60)

    assert explained_variance(sae, x, [8])[8] > max(before + 0.2, 0.6)


@objectives
def test_explained_variance_is_equal_before_saving_and_after_loading(options, tmp_path):
    sae, x = make_sae(**options), make_activations()
    sae.initialize_from_activations(x)
    train(sae, x)
    before = explained_variance(sae, x)
    assert sae.input_scale != 1

    sae.save_pretrained(tmp_path / "unfolded")
    sae.fold_input_scale()
    sae.save_pretrained(tmp_path / "folded")

    assert sae.input_scale == 1
    assert explained_variance(AutoModel.from_pretrained(tmp_path / "unfolded"), x) == before
    assert explained_variance(AutoModel.from_pretrained(tmp_path / "folded"), x) == before


def test_what_is_saved_is_safetensors_with_unit_rows_and_a_config_that_names_its_origin(tmp_path):
    sae = make_sae(model_name="a/b", layer=3, hook_point="output", dataset_name="c/d")
    train(sae.train(), make_activations(scale=1.0))
    sae.train()
    with torch.no_grad():
        sae.W_dec.mul_(1.5)

    sae.save_pretrained(tmp_path)

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        norms = torch.linalg.vector_norm(file.get_tensor("W_dec"), dim=1)
    torch.testing.assert_close(norms, torch.ones(64))
    suffixes = {path.suffix for path in tmp_path.iterdir()}
    assert suffixes == {".safetensors", ".json", ".py"}
    config = AutoModel.from_pretrained(tmp_path).config
    assert (config.model_name, config.layer, config.hook_point, config.dataset_name) == ("a/b", 3, "output", "c/d")


def test_copies_of_data_parallel_are_not_trained():
    sae = make_sae().train()
    # As torch makes them for each GPU of a process.
    replica = sae._replicate_for_data_parallel()
    for name, parameter in sae.named_parameters():
        setattr(replica, name, parameter)

    with pytest.raises(ValueError, match="DataParallel.* with accelerate launch or torchrun"):
        replica(make_activations(8))
    replica.eval()
    assert replica(make_activations(8)).loss > 0


def test_decoder_rows_keep_unit_norm_and_their_gradient_is_tangent():
    sae, x = make_sae(), make_activations(scale=1.0)
    train(sae, x, steps=3)
    torch.testing.assert_close(torch.linalg.vector_norm(sae.W_dec, dim=1), torch.ones(64))

    sae.zero_grad()
    sae.train()
    sae(x).loss.backward()

    along = (sae.W_dec.grad * sae.W_dec).sum(dim=1)
    # Rounding of a sum of 16 float32 products.
    assert along.abs().max() < 1e-6 * sae.W_dec.grad.abs().max()
    assert sae.W_dec.grad.abs().max() > 0


def test_normalizing_twice_changes_nothing():
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(64, 1) + 0.5)
    sae.normalize_decoder()
    once = sae.W_dec.detach().clone()

    sae.normalize_decoder()

    assert torch.equal(sae.W_dec, once)


def test_any_leading_shape_gives_the_same_as_a_flat_batch():
    sae, x = make_sae(), make_activations(24)
    flat = sae(x)

    shaped = sae(x.reshape(2, 3, 4, 16))

    assert torch.equal(shaped.reconstruction, flat.reconstruction.reshape(2, 3, 4, 16))
    assert torch.equal(shaped.top_indices, flat.top_indices.reshape(2, 3, 4, 8))
    assert sae(x[0]).reconstruction.shape == (16,)
    assert torch.equal(shaped.loss, flat.loss)


def test_padding_takes_no_part_in_the_loss_or_the_counters():
    sae, x = make_sae().train(), make_activations(24).reshape(4, 6, 16)
    mask = torch.ones(4, 6)
    mask[0, 4:] = mask[2, 1:] = 0
    padded = x.clone()
    padded[mask == 0] = torch.nan

    output = sae(padded, attention_mask=mask)

    assert torch.equal(output.loss, sae(x[mask.bool()]).loss)
    assert (output.reconstruction[mask == 0] == 0).all() and (output.top_values[mask == 0] == 0).all()
    assert torch.isfinite(output.reconstruction).all()


@objectives
def test_a_batch_of_padding_only_gives_zero_loss_and_zero_gradients(options):
    sae = make_sae(**options).train()

    loss = sae(torch.zeros(2, 3, 16), attention_mask=torch.zeros(2, 3)).loss
    loss.backward()

    assert loss == 0
    assert all((parameter.grad == 0).all() for parameter in sae.parameters())


def test_a_smaller_k_is_a_prefix_of_a_larger_one():
    sae, x = make_sae(), make_activations(20)

    indices, values = sae.encode(x)
    fewer_indices, fewer_values = sae.encode(x, k=3)

    assert torch.equal(fewer_indices, indices[:, :3]) and torch.equal(fewer_values, values[:, :3])
    assert (values.diff(dim=1) <= 0).all()


def test_chunks_of_latents_select_what_the_whole_selects():
    whole, x = make_sae(), make_activations(20)
    chunked = make_sae(encoder_chunk_size=10)
    chunked.load_state_dict(whole.state_dict())

    indices, values = chunked.encode(x)
    expected_indices, expected_values = whole.encode(x)

    # One float32 product with another blocking of the sum.
    torch.testing.assert_close(values, expected_values, rtol=1e-5, atol=1e-4)
    assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("d_sae, k", [(2048, 8), (2048, 1), (2040, 8), (256, 16)])
def test_selection_among_many_latents_is_exact(d_sae, k):
    sae, x = make_sae(d_sae=d_sae, k=k), make_activations(30, scale=1.0)
    dense = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)

    indices, values = sae.encode(x)

    # The same float32 products, blocked differently.
    torch.testing.assert_close(values, dense.topk(k, dim=1).values, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dense.gather(1, indices), values, rtol=1e-5, atol=1e-4)
    assert all(len(set(row.tolist())) == k for row in indices)


class Sizes(TorchDispatchMode):
    """Records how many elements each tensor has that an operator returns in memory of its own, or numpy has made."""

    def __init__(self):
        super().__init__()
        self.allocated = []
        self.from_numpy = torch.from_numpy

    def __enter__(self):
        torch.from_numpy = lambda array: self.allocated.append(array.size) or self.from_numpy(array)
        return super().__enter__()

    def __exit__(self, *error):
        torch.from_numpy = self.from_numpy
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {part.data_ptr() for part in pytree.tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)}
        made = [part for part in pytree.tree_leaves(result) if isinstance(part, torch.Tensor)]
        self.allocated += [part.numel() for part in made if part.data_ptr() not in given]
        return result


def test_a_training_step_in_chunks_makes_nothing_larger_than_a_chunk_or_the_weights():
    sae, x = make_sae(d_sae=2**17, k=4, encoder_chunk_size=2**12).train(), make_activations(300, scale=1.0)

    with Sizes() as sizes:
        sae(x).loss.backward()

    assert 300 * 2**12 in sizes.allocated
    assert max(sizes.allocated) <= max(300 * 2**12, 2**17 * 16) < 300 * 2**17


def test_a_training_step_makes_one_copy_of_batch_times_latents_and_its_backward_none():
    sae, x = make_sae(d_sae=4096, k=4).train(), make_activations(300, scale=1.0)

    with Sizes() as forward:
        loss = sae(x).loss
    with Sizes() as backward:
        loss.backward()

    assert [size for size in forward.allocated if size > 300 * 4096 // 8] == [300 * 4096]
    assert max(backward.allocated) == 4096 * 16 < 300 * 4096 // 8


def test_latents_that_do_not_fire_are_counted_as_dead_and_the_count_is_saved(tmp_path):
    sae, x = make_sae(dead_after_tokens=40), make_activations(20, scale=1.0)
    with torch.no_grad():
        sae.b_enc[:10] = -1e4
    assert sae.dead_fraction == 0

    sae.train()
    for _ in range(2):
        top = sae(x)
    fired = torch.zeros(64, dtype=torch.bool)
    fired[top.top_indices[top.top_values > 0]] = True

    assert torch.equal(sae.tokens_since_fired, torch.where(fired, 0, 40))
    assert sae.dead_fraction == float((~fired).float().mean()) > 0
    sae.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).dead_fraction == sae.dead_fraction


def test_evaluation_mode_leaves_the_counters_alone():
    sae = make_sae()
    sae(make_activations(20))

    assert (sae.tokens_since_fired == 0).all()


def test_the_auxiliary_loss_gives_dead_latents_a_gradient():
    x = make_activations(40, scale=1.0) - 100
    gradients = {}
    for coefficient in (0.0, 0.1):
        sae = make_sae(aux_loss_coefficient=coefficient, dead_after_tokens=40)
        sae.load_state_dict({**sae.state_dict(), "W_dec": torch.eye(16).repeat(4, 1)})
        with torch.no_grad():
            sae.encoder_weight.copy_(sae.W_dec)
            sae.b_enc[:10] = -0.5
            sae.b_enc[10:] = 50.0
        sae.train()(x).loss.backward()
        gradients[coefficient] = sae.W_dec.grad[:10]

    assert (gradients[0.0] == 0).all()
    assert (gradients[0.1] != 0).any()


def test_initialization_centres_on_the_geometric_median_with_unit_scale():
    sae, x = make_sae(), make_activations()
    x[0] += 1e6

    sae.initialize_from_activations(x)

    center = sae.b_dec / sae.input_scale
    torch.testing.assert_close(center, geometric_median(x))
    assert torch.linalg.vector_norm(center - x[1:].mean(dim=0)) < 30
    assert sae.input_scale.log2() == sae.input_scale.log2().round()


def test_encoder_starts_as_the_transposed_decoder():
    sae = make_sae()

    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert sae.W_enc.shape == (16, 64)


def test_geometric_median_is_where_the_summed_distance_is_smallest():
    points = torch.randn(50, 3)
    center = geometric_median(points)
    distance = torch.linalg.vector_norm(points - center, dim=1).sum()

    for direction in torch.randn(20, 3):
        assert torch.linalg.vector_norm(points - center - 0.05 * direction, dim=1).sum() >= distance


def test_autocast_multiplies_by_the_encoder_in_its_own_precision():
    sae, x = make_sae(), make_activations(20, scale=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, top_values = sae.encode(x)

    # Every pre-activation has been rounded to bfloat16, which float32 holds exactly.
    assert torch.equal(top_values, top_values.bfloat16().float())
    assert not torch.equal(top_values, sae.encode(x)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_parameters_gradients_and_loss_in_float32(dtype):
    sae, x = make_sae().train(), make_activations(20)
    sae.initialize_from_activations(x)
    with torch.autocast("cpu", dtype=dtype):
        output = sae(x)
    output.loss.backward()

    assert output.loss.dtype == output.top_values.dtype == torch.float32
    optimizer = torch.optim.AdamW(sae.parameters(), weight_decay=0.0)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert len(moments) == 8
    assert {tensor.dtype for part in sae.parameters() for tensor in (part, part.grad)} == {torch.float32}
    assert {tensor.dtype for tensor in moments} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_reconstruction_has_the_dtype_of_the_input(dtype):
    assert make_sae()(make_activations(20).to(dtype)).reconstruction.dtype == dtype


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(3, 17), r"shape \(..., d_in=16\), got \(3, 17\)"),
        (torch.zeros(3, 16, dtype=torch.int64), "floating point, got torch.int64"),
        (
            torch.tensor([[0.0, torch.nan, torch.inf] + [0.0] * 13] * 2),
            "got 2 NaN and 2 infinite of 32 entries in 2 tokens",
        ),
    ],
)
def test_activations_that_do_not_fit_are_refused_before_they_touch_a_weight(x, message):
    sae = make_sae().train()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}

    with pytest.raises(ValueError, match=message):
        sae(x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())


@pytest.mark.parametrize("k", [0, 9])
def test_k_beyond_the_trained_one_is_refused(k):
    with pytest.raises(ValueError, match=rf"k must be in \[1, 8\], the trained budget, got {k}"):
        make_sae()(make_activations(20), k=k)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(20,\), got \(19,\)"):
        make_sae()(make_activations(20), attention_mask=torch.ones(19))


def test_constant_activations_cannot_initialize():
    with pytest.raises(ValueError, match="all equal"):
        make_sae().initialize_from_activations(torch.ones(5, 16))


def test_trainer_trains_evaluates_and_its_model_loads(tmp_path):
    sae, x = make_sae(), make_activations()
    sae.initialize_from_activations(x)
    data = torch.utils.data.StackDataset(hidden_states=x)
    arguments = TrainingArguments(
        tmp_path, max_steps=30, per_device_train_batch_size=64, learning_rate=1e-2, report_to="none"
    )
    trainer = Trainer(model=sae, args=arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]

    trainer.train()

    assert trainer.evaluate()["eval_loss"] < 0.7 * before
    trainer.save_model(tmp_path / "final")
    loaded = AutoModel.from_pretrained(tmp_path / "final")
    assert explained_variance(loaded, x) == explained_variance(sae, x)


# On a GPU.


def gpu_sae(d_in=577, d_sae=4609, k=33, **options):
    sae = make_sae(d_in=d_in, d_sae=d_sae, k=k, **options).cuda().train()
    x = torch.randn(1001, d_in, device="cuda") + 3
    sae.initialize_from_activations(x)
    return sae, x


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16-autocast"])
def test_a_step_on_a_gpu_has_the_loss_and_gradients_of_its_selection_in_float64(autocast):
    sae, x = gpu_sae()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        output = sae(x)
    output.loss.backward()

    indices = output.top_indices
    values = (output.top_values * sae.input_scale).detach().double().requires_grad_()
    encoder_weight, W_dec, b_dec = (
        parameter.detach().double().requires_grad_() for parameter in (sae.encoder_weight, sae.W_dec, sae.b_dec)
    )
    scaled = x.double() * sae.input_scale
    loss = hierarchical_topk_loss_reference(indices, values, W_dec, b_dec, scaled)
    grad_values, grad_W_dec, grad_b_dec = torch.autograd.grad(loss, (values, W_dec, b_dec))
    grad_values = grad_values * (values > 0)
    grad_latents = torch.zeros(len(x), len(W_dec), dtype=torch.float64, device="cuda").scatter(1, indices, grad_values)
    expected = {
        "encoder_weight": grad_latents.T @ (scaled - b_dec),
        "b_enc": grad_latents.sum(dim=0),
        "W_dec": grad_W_dec - (grad_W_dec * W_dec).sum(dim=1, keepdim=True) * W_dec,
        "b_dec": grad_b_dec - grad_latents.sum(dim=0) @ encoder_weight,
    }
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-5, atol=0)
    for name, parameter in sae.named_parameters():
        assert parameter.grad.dtype == torch.float32
        # float32 sums of up to some thousand terms, relative to the largest element.
        atol = 2e-5 * float(expected[name].detach().abs().max())
        torch.testing.assert_close(parameter.grad.double(), expected[name], rtol=0, atol=atol)


@pytest.mark.gpu
def test_a_float32_step_on_a_gpu_selects_what_the_cpu_selects():
    sae, x = gpu_sae()
    values = sae(x).top_values

    expected = sae.cpu()(x.cpu()).top_values

    torch.testing.assert_close(values.cpu(), expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.gpu
@objectives
def test_training_on_a_gpu_explains_more_variance(options):
    sae, x = make_sae(**options).cuda(), make_activations().cuda()
    sae.initialize_from_activations(x)
    before = explained_variance(sae, x, [8])[8]

    train(sae, x, steps=60)

    assert explained_variance(sae, x, [8])[8] > max(before + 0.2, 0.6)


@pytest.mark.gpu
def test_two_steps_on_a_gpu_give_the_same_bits():
    gradients = []
    for _ in range(2):
        torch.manual_seed(0)
        sae, x = gpu_sae()
        sae(x).loss.backward()
        gradients.append([parameter.grad for parameter in sae.parameters()])

    assert all(map(torch.equal, *gradients))


@pytest.mark.gpu
@pytest.mark.parametrize("budgets", [None, [1, 8, 33], [33]])
def test_no_stage_of_a_step_makes_the_host_wait_for_the_gpu(budgets):
    sae, x = gpu_sae(budgets=budgets)
    optimizer = torch.optim.AdamW(sae.parameters(), weight_decay=0.0, fused=True)

    def step():
        sae(x).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_nan_on_a_gpu_is_refused_before_it_reaches_the_counters():
    sae, x = gpu_sae()
    sae(x)
    counters = sae.tokens_since_fired.clone()
    x[5, 7] = torch.nan

    with pytest.raises(ValueError, match="got 1 NaN and 0 infinite"):
        sae(x)

    assert torch.equal(sae.tokens_since_fired, counters)


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
def test_stock_trainer_trains_on_a_gpu(tmp_path, bf16):
    sae, x = gpu_sae()
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=1001,
        learning_rate=1e-3,
        bf16=bf16,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(sae, arguments, train_dataset=torch.utils.data.StackDataset(hidden_states=x.cpu()))

    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sae.device.type == "cuda" and losses[-1] < losses[0]
    assert all(parameter.isfinite().all() for parameter in sae.parameters())


def saved(folder, sae, **options):
    sae.save_pretrained(folder, **options)
    return folder


def change_of_weights(folder, change):
    """The saved tensors, all in one file or those of the first file of several, after `change`."""
    path = sorted(folder.glob("model*.safetensors"))[0]
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize("load", [HierarchicalSaeModel.from_pretrained, AutoModel.from_pretrained])
@pytest.mark.parametrize("pieces", [{}, {"max_shard_size": "5KB"}], ids=["whole", "in pieces"])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: dict(sorted(tensors.items())[1:]), r"got no (encoder_weight|W_dec|b_dec|b_enc)"),
        (
            lambda tensors: {name: tensor.new_zeros(3, 5) for name, tensor in tensors.items()},
            r"got another shape of .*\(",
        ),
        (lambda tensors: {**tensors, "W_skip": torch.zeros(16, 16)}, "got the unknown W_skip"),
    ],
    ids=["missing", "shape", "unknown"],
)
def test_weights_that_are_not_those_of_the_config_are_refused(tmp_path, load, pieces, change, message):
    saved(tmp_path, make_sae(), **pieces)
    change_of_weights(tmp_path, change)

    with pytest.raises(ValueError, match=f"expected the weights of an autoencoder of 64 latents .* {message}"):
        load(tmp_path)


def test_every_single_missing_tensor_is_named(tmp_path):
    names = list(load_file(saved(tmp_path, make_sae()) / "model.safetensors"))
    assert len(names) == 9
    for name in names:
        saved(tmp_path, make_sae())
        change_of_weights(tmp_path, lambda tensors, name=name: {one: tensors[one] for one in tensors if one != name})
        with pytest.raises(ValueError, match=f"got no {name}$"):
            HierarchicalSaeModel.from_pretrained(tmp_path)


def test_a_torn_file_is_refused_by_its_name(tmp_path):
    path = saved(tmp_path, make_sae()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])

    with pytest.raises(ValueError, match=f"the weights in {tmp_path} are torn"):
        HierarchicalSaeModel.from_pretrained(tmp_path)


def test_a_language_model_is_no_autoencoder(tiny_language_model):
    with pytest.raises(ValueError, match="model_type 'hierarchical_sae', got model_type 'llama'"):
        HierarchicalSaeModel.from_pretrained(tiny_language_model)


def test_what_is_loaded_is_told_on_request(tmp_path):
    sae, info = HierarchicalSaeModel.from_pretrained(saved(tmp_path, make_sae()), output_loading_info=True)

    assert isinstance(sae, HierarchicalSaeModel) and not info["missing_keys"]


def test_remote_code_refuses_weights_that_lack_a_tensor(tmp_path, run_isolated):
    change_of_weights(saved(tmp_path, make_sae()), lambda tensors: {"W_dec": tensors["W_dec"]})
    code = f"from transformers import AutoModel\nAutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)"

    with pytest.raises(
        RuntimeError, match="ValueError: expected the weights of an autoencoder .* got no b_dec, b_enc"
    ):
        run_isolated(code)


def test_an_error_while_saving_leaves_the_older_model(tmp_path):
    older = make_sae()
    saved(tmp_path, older)
    files = sorted(path.name for path in tmp_path.iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises((OSError, SafetensorError)):
            make_sae(d_sae=640).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert torch.equal(HierarchicalSaeModel.from_pretrained(tmp_path).W_dec, older.W_dec)


def test_pieces_of_an_older_model_are_not_loaded_for_a_newer_one(tmp_path):
    for options in ({}, {"max_shard_size": "5KB"}, {"max_shard_size": "2KB"}, {}):
        sae = make_sae()
        loaded = HierarchicalSaeModel.from_pretrained(saved(tmp_path, sae, **options))
        assert torch.equal(loaded.W_dec, sae.W_dec)
    assert len(list(tmp_path.glob("model*.safetensors*"))) == 1


HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def in_half_precision(sae, dtype):
    """The autoencoder in half precision, and the same rounded weights in float32."""
    half = copy.deepcopy(sae).to(dtype)
    return half, copy.deepcopy(half).float()


@objectives
@pytest.mark.parametrize("dtype", HALF)
def test_inference_in_half_precision_is_that_of_the_rounded_weights(dtype, options):
    x = make_activations()
    sae = make_sae(**options)
    sae.initialize_from_activations(x)
    half, rounded = in_half_precision(train(sae, x), dtype)

    for inputs in (x, x.to(dtype)):
        indices, values = half.encode(inputs)
        expected_indices, expected_values = rounded.encode(inputs)
        assert torch.equal(indices, expected_indices)
        torch.testing.assert_close(values, expected_values, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(half.decode(indices, values), rounded.decode(indices, values), rtol=1e-6, atol=1e-5)
        with torch.no_grad():
            found, expected = half(inputs), rounded(inputs)
        assert found.reconstruction.dtype == inputs.dtype
        torch.testing.assert_close(found.reconstruction, expected.reconstruction)
        torch.testing.assert_close(found.loss, expected.loss)
    # and near the float32 model: each weight is off by one rounding at most
    error = torch.linalg.vector_norm(half.decode(*half.encode(x)) - sae.decode(*sae.encode(x)), dim=1)
    assert (error / torch.linalg.vector_norm(x, dim=1)).median() < 4 * HALF[dtype]


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_through_latents_in_half_precision_are_those_of_the_rounded_weights(dtype):
    half, rounded = in_half_precision(make_sae(), dtype)
    x, weight = torch.randn(40, 16), torch.randn(40, 16)

    found, expected = (
        torch.autograd.grad((sae.decode(*sae.encode(inputs)) * weight).sum(), inputs)[0]
        for sae, inputs in ((half, x.clone().requires_grad_()), (rounded, x.clone().requires_grad_()))
    )

    assert found.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
@objectives
def test_training_in_half_precision_says_that_it_needs_float32(dtype, options):
    sae, x = make_sae(**options).to(dtype), torch.randn(10, 16)

    with pytest.raises(ValueError, match=f"training needs float32 weights, got {dtype}"):
        sae.eval()(x).loss.backward()
    with pytest.raises(ValueError, match=f"training needs float32 weights, got {dtype}"):
        sae.train()(x)
    with pytest.raises(ValueError, match=f"training needs float32 weights, got {dtype}"):
        sae.train()(x, return_loss=False)


@pytest.mark.parametrize("dtype", HALF)
def test_normalizing_twice_changes_nothing_in_half_precision(dtype, tmp_path):
    sae = make_sae().to(dtype)
    before = sae.W_dec.detach().clone()

    sae.normalize_decoder()
    assert torch.equal(sae.W_dec, before)
    loaded = HierarchicalSaeModel.from_pretrained(saved(tmp_path, sae))
    assert loaded.W_dec.dtype == dtype and torch.equal(loaded.W_dec, before)
    with torch.no_grad():
        sae.W_dec.mul_(3)
    sae.normalize_decoder()
    torch.testing.assert_close(torch.linalg.vector_norm(sae.W_dec.float(), dim=1), torch.ones(64), rtol=0, atol=0.01)


def test_float64_inputs_are_computed_in_float64(tmp_path):
    sae, x = make_sae(), torch.randn(30, 16, dtype=torch.float64)
    expected = copy.deepcopy(sae).double()

    assert torch.equal(sae.encode(x)[0], expected.encode(x)[0])
    torch.testing.assert_close(sae.encode(x)[1], expected.encode(x)[1])


def test_an_empty_batch_is_encoded_in_half_precision():
    sae = make_sae().to(torch.bfloat16)

    assert sae.decode(*sae.encode(torch.empty(0, 16))).shape == (0, 16)


@pytest.mark.parametrize("x", [None, 2.5, "2", [[1.0] * 16], numpy.zeros((2, 16), dtype=numpy.float32)])
def test_what_is_no_tensor_is_refused(x):
    for call in (make_sae(), make_sae().encode):
        with pytest.raises(ValueError, match="activations must be a tensor, got a"):
            call(x)


@pytest.mark.parametrize(
    "indices, values, message",
    [
        ([1], [1.0], r"must be tensors \(..., k\)"),
        (torch.tensor(1), torch.tensor(1.0), r"must be tensors \(..., k\)"),
        (torch.tensor([1.0]), torch.tensor([1.0]), "must be integers .* got torch.float32 and torch.float32"),
        (torch.tensor([True]), torch.tensor([1.0]), "must be integers .* got torch.bool and torch.float32"),
        (torch.tensor([1]), torch.tensor([1]), "must be integers .* got torch.int64 and torch.int64"),
    ],
)
def test_what_names_no_latents_is_not_decoded(indices, values, message):
    with pytest.raises(ValueError, match=message):
        make_sae().decode(indices, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_more_exact_copy_of_an_optimizer_is_left_alone(dtype):
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=8, d_sae=16, k=2)).to(dtype)
    written = []
    # What DeepSpeed's ZeRO-1 and 2 give a parameter; tests/test_deepspeed.py trains with them.
    sae.W_dec.set_full_hp_param = written.append
    sae.normalize_decoder()

    assert len(written) == (dtype == torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 128}, r"k must be in \[1, d_sae=64\], got 128"),
        ({"budgets": [1, 200]}, "budgets"),
        ({"selection": "strongest"}, "selection must be 'topk', "),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_when_a_model_is_loaded_with_it(tmp_path, options, message):
    HierarchicalSaeModel(HierarchicalSaeConfig(d_in=16, d_sae=64, k=4)).save_pretrained(tmp_path)

    assert HierarchicalSaeModel.from_pretrained(tmp_path, k=2).config.k == 2
    with pytest.raises(ValueError, match=message):
        HierarchicalSaeModel.from_pretrained(tmp_path, **options)
