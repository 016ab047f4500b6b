"""The screened encoder selects what float32 selects, whatever it is given."""

import pytest
import torch

from hf_hierarchical_sae.screened_encoder import screened_topk


def assert_selects_as_float64(x, weight, bias, k, **options):
    """The k values are the largest, each belongs to its index, and nothing outside is larger, up to float32 rounding."""
    values, indices, failed = screened_topk(x, weight, bias, k, **options)
    true = x.double() @ weight.double().T + bias.double()
    # Two sums of d_in float32 products, each in its own order.
    scale = (
        torch.linalg.vector_norm(x.double(), dim=1, keepdim=True)
        * torch.linalg.vector_norm(weight.double(), dim=1).max()
    )
    slack = 2 * x.shape[1] * 2**-24 * scale + 2**-22 * bias.double().abs().max()

    assert (indices.sort(dim=1).values.diff(dim=1) > 0).all()
    assert ((values.double() - true.gather(1, indices)).abs() <= slack).all()
    assert ((values.double() - true.topk(k, dim=1).values).abs() <= slack).all()
    return values, indices, failed


def whole_numbers(*shape, largest):
    """Numbers whose products and sums float32 holds exactly."""
    return torch.randint(-largest, largest + 1, shape).float()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("batch, k, d_sae, d_in", [(32, 4, 512, 64), (1, 1, 77, 5), (9, 16, 4096, 300), (3, 5, 6, 7)])
def test_random_inputs_give_the_exact_selection(batch, k, d_sae, d_in, device):
    x, weight, bias = torch.randn(batch, d_in), torch.randn(d_sae, d_in), torch.randn(d_sae)

    assert_selects_as_float64(*(tensor.to(device) for tensor in (x, weight, bias)), k)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_where_float32_rounds_nothing_the_selection_is_the_product_s_to_the_last_bit(device):
    x, weight = whole_numbers(64, 48, largest=600).to(device), whole_numbers(1024, 48, largest=500).to(device)
    bias = whole_numbers(1024, largest=3).to(device)
    # Half of the latents are others' neighbours, one unit of one weight away: bfloat16 cannot tell them apart.
    weight[512:] = weight[:512]
    weight[512:, 0] += 1

    values, indices, _ = screened_topk(x, weight, bias, 8)

    true = (x.double() @ weight.double().T + bias.double()).float()
    assert torch.equal(values, true.topk(8, dim=1).values)
    assert torch.equal(values, true.gather(1, indices))


def test_ties_in_bfloat16_beyond_the_candidates_fail_the_certificate_and_are_done_again():
    x, weight = torch.ones(3, 8), torch.ones(500, 8)
    # All 500 scores are 8 in bfloat16; the largest are the last.
    weight[:, 0] += torch.arange(500) * 2**-20

    values, indices, failed = assert_selects_as_float64(x, weight, torch.zeros(500), 4)

    assert failed.tolist() == [0, 1, 2]
    assert indices.tolist() == [[499, 498, 497, 496]] * 3


def test_equal_latents_give_equal_values():
    values, indices, _ = screened_topk(torch.randn(5, 16), torch.randn(1, 16).expand(200, 16), torch.zeros(200), 3)

    assert torch.equal(values.amax(dim=1), values.amin(dim=1))
    assert (indices.sort(dim=1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("scale_x, scale_weight", [(1e18, 1e15), (1e-25, 1e-10), (1e30, 1.0), (1e-18, 1e18)])
def test_huge_and_tiny_norms_give_the_exact_selection(scale_x, scale_weight):
    x, weight = scale_x * torch.randn(7, 33), scale_weight * torch.randn(300, 33)

    assert_selects_as_float64(x, weight, torch.zeros(300), 5)


def test_one_latent_of_huge_norm_fails_certificates_but_changes_no_selection():
    weight = torch.randn(300, 33)
    weight[123] *= 1e4

    _, _, failed = assert_selects_as_float64(torch.randn(50, 33), weight, torch.zeros(300), 5)

    assert len(failed) == 50


def test_a_large_bias_gives_the_exact_selection():
    assert_selects_as_float64(torch.randn(20, 33), torch.randn(300, 33), 100 * torch.randn(300), 5)


def test_usual_inputs_are_certified():
    weight = torch.nn.functional.normalize(torch.randn(8192, 128), dim=1)

    _, _, failed = assert_selects_as_float64(torch.randn(64, 128), weight, torch.zeros(8192), 8)

    assert len(failed) <= 3


def test_autocast_changes_nothing():
    x, weight, bias = torch.randn(9, 16), torch.randn(200, 16), torch.randn(200)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = screened_topk(x, weight, bias, 4)

    assert all(map(torch.equal, inside, screened_topk(x, weight, bias, 4)))


@pytest.mark.gpu
@pytest.mark.parametrize("batch, k, d_sae, d_in", [(1024, 64, 65536, 2304), (1001, 33, 4609, 577)])
def test_real_sizes_on_a_gpu_give_the_exact_selection(batch, k, d_sae, d_in):
    x, weight = torch.randn(batch, d_in, device="cuda"), torch.randn(d_sae, d_in, device="cuda")

    assert_selects_as_float64(x, torch.nn.functional.normalize(weight, dim=1), torch.zeros(d_sae, device="cuda"), k)
