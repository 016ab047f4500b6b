"""The k strongest latents of a float32 encoder, found with a product in bfloat16: screened, computed again, certified."""

import torch

from .hierarchical_topk_loss import suits_triton
from .modeling_hierarchical_sae import topk_of_rows


# Unit roundoffs; 2**-60 stands for what squares below the smallest float32 lose in a norm.
BFLOAT16, FLOAT32, TINY = 2.0**-8, 2.0**-24, 2.0**-60


@torch.no_grad()
def screened_topk(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, candidates: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""
    The k largest of x·w_f + b_f over f for each input, as in float32. `candidates` latents are screened by their scores
    in bfloat16 and computed again in float32. An input is certified if its k-th value exceeds what the last candidate's
    score s allows any latent outside to have,

        s + 3u (|s| + max |b|) + ‖x − x̃‖ max ‖w̃‖ + ‖x‖ max ‖w − w̃‖ + max |b − b̃| + 4 d_in 2⁻²⁴ ‖x‖ max ‖w‖,

    where x̃, w̃ and b̃ are rounded to bfloat16 and u = 2⁻⁸: the score is rounded at most twice, the product's rounding
    is bounded by Cauchy–Schwarz, the last term covers both sums in float32. Inputs that fail get the product in float32.

    Args:
        x (`torch.Tensor`): (batch, d_in), float32.
        weight (`torch.Tensor`): (d_sae, d_in), float32.
        bias (`torch.Tensor`): (d_sae,), float32.
        k (`int`): latents per input.
        candidates (`int`, *optional*): latents that are screened, more than k; 3 k by default.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: values and indices, (batch, k) each, strongest first, and the
        inputs that were not certified, (failed,).
    """
    width = min(candidates or 3 * k, len(weight))
    with torch.autocast(x.device.type, enabled=False):
        x_half, bias_half = x.bfloat16(), bias.bfloat16()
        weight_half, norms, errors = _halve(weight)
        scores, places = topk_of_rows(_product(x_half, weight_half, bias_half), width)
        exact = _scores_of(x, weight, bias, places)
        values, order = exact.topk(k, dim=1)
        indices = places.gather(1, order)
        if width == len(weight):
            return values, indices, indices.new_empty(0)
        last = scores[:, -1].float()
        norm = _row_norms(x)
        bound = _row_norms(x - x_half.float()) * norms.amax() + norm * errors.amax()
        bound += (bias - bias_half.float()).abs().amax() + 4 * x.shape[1] * FLOAT32 * norm * norms.amax()
        limit = last + 3 * BFLOAT16 * (last.abs() + bias.abs().amax()) + bound
        # Comparisons with NaN are false, so that an input with one fails.
        failed = (~(values[:, -1] > limit)).nonzero().squeeze(1)
        if len(failed):
            latents = torch.nn.functional.linear(x[failed], weight, bias)
            values[failed], indices[failed] = latents.topk(k, dim=1)
    return values, indices, failed


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`F.linear` in bfloat16 whose partial sums stay in float32."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    out = torch.nn.functional.linear(x, weight, bias)
    matmul.allow_bf16_reduced_precision_reduction = allowed
    return out


def _row_norms(x: torch.Tensor) -> torch.Tensor:
    # The sum of squares has its own rounding: one part in a thousand is more than that for any d_in below 8,000.
    return torch.linalg.vector_norm(x, dim=1) * 1.001 + TINY * x.shape[1] ** 0.5


def _halve(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weight in bfloat16 and, for each row, upper bounds of its norm and of the norm of what was rounded off."""
    if suits_triton(weight):
        from .screened_encoder_triton import halve_triton

        half, squares, squared_errors = halve_triton(weight)
        norms, errors = (tensor.sqrt() * 1.001 + TINY * weight.shape[1] ** 0.5 for tensor in (squares, squared_errors))
        return half, norms + errors, errors
    half = weight.bfloat16()
    errors = _row_norms(weight - half.float())
    return half, _row_norms(weight) + errors, errors


def _scores_of(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """x[b]·weight[places[b, c]] + bias[places[b, c]] in float32: (batch, candidates)."""
    if suits_triton(x, weight, bias):
        from .screened_encoder_triton import scores_triton

        return scores_triton(x, weight, bias, places)
    rows = [torch.mv(weight[chosen], row) for row, chosen in zip(x, places)]
    return torch.stack(rows) + bias[places]
