"""A threshold for a dictionary of many budgets: what it selects, keeps and refuses."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hierarchical_sae import (
    ActivationShards,
    HierarchicalSaeConfig,
    HierarchicalSaeModel,
    evaluate_budgets,
    iterate_activations,
    save_shards,
    select_by_threshold,
)


D, D_SAE = 12, 40


def make_sae(**options):
    torch.manual_seed(0)
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(**{"d_in": D, "d_sae": D_SAE, "k": 16, **options}))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        sae.input_scale.fill_(0.25)
    return sae.eval()


@pytest.fixture
def x():
    return 3 * torch.randn(2000, D, generator=torch.Generator().manual_seed(1)) + 1


def latents_of(sae, x):
    """(tokens, d_sae) by the formula, in units of x."""
    scale = sae.input_scale
    return torch.relu(((x * scale - sae.b_dec) @ sae.W_enc + sae.b_enc) / scale)


@pytest.mark.parametrize("k", [1, 5, 16])
@pytest.mark.parametrize("chunk", [None, 7])
def test_what_is_above_one_threshold_is_kept_k_per_input_on_average(x, k, chunk):
    sae = make_sae(encoder_chunk_size=chunk)
    expected = latents_of(sae, x)
    threshold = expected.flatten().topk(k * len(x)).values[-1]

    found = select_by_threshold(sae, x, k)

    indices, values = found.encode(x)
    dense = torch.zeros_like(expected).scatter(1, indices, values)
    # But for those within rounding of the threshold, as many as one in 32,768 of its size.
    sure = (expected - threshold).abs() > 1e-4 * threshold
    torch.testing.assert_close(dense[sure], (expected * (expected >= threshold))[sure], atol=1e-4, rtol=1e-5)
    counts = (values > 0).sum(dim=1)
    assert counts.float().mean() == pytest.approx(k, rel=2e-3) and counts.min() < k < counts.max()
    assert found.config.selection == "batch_topk" and found.config.budgets == [k] and not found.training


def test_the_same_of_a_tensor_of_pieces_of_a_stream_and_of_a_harvest(x, tiny_language_model, tmp_path):
    sae = make_sae()
    assert select_by_threshold(sae, x, 4).threshold == select_by_threshold(sae, x.split(300), 4).threshold
    model, tokenizer = (kind.from_pretrained(tiny_language_model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    of_model = make_sae(d_in=model.config.hidden_size, layer=0, hook_point="output")

    def stream():
        return iterate_activations(model, tokenizer, ["To be, or not to be"] * 9, 0, show_progress=False)

    save_shards(stream(), tmp_path)

    thresholds = [
        select_by_threshold(of_model, given, 4).threshold
        for given in (stream(), ActivationShards(tmp_path), torch.cat(list(stream())))
    ]
    assert thresholds[0] == thresholds[1] == thresholds[2] > 0


def test_the_autoencoder_is_left_alone_and_the_new_one_is_saved_and_loaded(x, tmp_path):
    sae = make_sae().train()
    before = copy.deepcopy(sae.state_dict())

    found = select_by_threshold(sae, x, 4)

    assert sae.training and sae.config.selection == "topk"
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())
    found.fold_input_scale()
    found.save_pretrained(tmp_path)
    loaded = HierarchicalSaeModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(x).reconstruction, found(x).reconstruction)


def test_less_is_lost_than_with_as_many_for_each_input():
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(D_SAE, D_SAE)).Q
    # Inputs of one feature and inputs of seven.
    count = torch.tensor([1, 7]).repeat_interleave(500)
    fires = torch.rand(1000, D_SAE).argsort(dim=1) < count[:, None]
    x = (fires * (1 + torch.rand(1000, D_SAE))) @ directions
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=D_SAE, d_sae=D_SAE, k=16)).eval()
    with torch.no_grad():
        sae.W_dec.copy_(directions)
        sae.encoder_weight.copy_(directions)

    by_threshold = evaluate_budgets(select_by_threshold(sae, x, 4), x)

    assert by_threshold.explained_variance[0] > evaluate_budgets(sae, x, [4]).explained_variance[0] + 0.05


@pytest.mark.parametrize(
    "options",
    [{"selection": "batch_topk", "budgets": [16]}, {"selection": "jumprelu", "k": D_SAE, "budgets": [D_SAE]}],
)
def test_other_selections_get_another_threshold(x, options):
    found = select_by_threshold(make_sae(**options), x, 4)

    assert found.threshold == select_by_threshold(make_sae(), x, 4).threshold


def test_transcoders_take_pairs(x):
    sites = {"layer": 0, "hook_point": "mlp.input", "target_hook_point": "mlp.output", "skip_connection": True}

    found = select_by_threshold(make_sae(d_out=5, **sites), (x, x[:, :5]), 4)

    assert (found.encode(x)[1] > 0).sum(dim=1).float().mean() == pytest.approx(4, rel=2e-3)


@pytest.mark.parametrize(
    "k, rows, message",
    [
        (0, 100, r"k must be in \[1, 16\], the trained budget, got 0"),
        (17, 100, r"k must be in \[1, 16\], the trained budget, got 17"),
        (2.5, 100, "k must be an integer, got 2.5"),
        (4, 0, "active, 0.0 per input on average over 0, got 4"),
    ],
)
def test_what_cannot_be_is_refused(x, k, rows, message):
    with pytest.raises(ValueError, match=message):
        select_by_threshold(make_sae(), x[:rows], k)


def test_activations_that_are_not_numbers_are_refused(x):
    x[3, 2] = torch.nan

    with pytest.raises(ValueError, match="expected finite activations, got 1 NaN"):
        select_by_threshold(make_sae(), x, 4)


def test_more_than_are_active_are_refused(x):
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-3.0)

    with pytest.raises(
        ValueError, match=r"k must be at most the number of latents that are active, \d+\.\d per input"
    ):
        select_by_threshold(sae, x, 16)
