"""What trained steering vectors do: tokens they promote, their size and rank, and what each layer contributes."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from .merging import in_evaluation_mode
from .residual import find_decoder, text_pass
from .vectors import layers_of, set_steering_vectors, steering_vectors
from .whole_files import whole_file


@dataclass
class TokenScore:
    """A token of the vocabulary and how much a vector raises it (lowers it, if negative)."""

    token_id: int
    token: str
    score: float


@dataclass
class TokenRanking:
    """The tokens that a vector raises most and those that it lowers most, the strongest first."""

    promoted: list[TokenScore]
    suppressed: list[TokenScore]


@dataclass
class LayerLens:
    """
    One layer's vector `s` seen through the unembedding `W_U` in three ways.

    Args:
        layer (`int`): Index of the layer.
        raw (`TokenRanking`): Ranked by `W_U s`, what the vector adds to the logits if nothing comes in between.
        cosine (`TokenRanking`): Ranked by the cosine of `s` and the rows of `W_U`, blind to the length of both.
        normed (`TokenRanking`):
            Ranked by `W_U (g * s)`, with the weight `g` of the model's final norm (and `s` centred for a LayerNorm).
    """

    layer: int
    raw: TokenRanking
    cosine: TokenRanking
    normed: TokenRanking


@dataclass
class VectorStatistics:
    """
    Shape of an adapter, seen as the matrix whose rows are its vectors.

    Args:
        layers (`list[int]`): Indices of the steered layers, in the order of the other fields.
        norms (`list[float]`): Length of each vector.
        singular_values (`list[float]`): Of the matrix, in descending order.
        stable_rank (`float`): `sum(sigma ** 2) / max(sigma) ** 2`: 1 if all layers share one direction. 0 if all are 0.
        cosines (`list[list[float]]`): Cosine between the vectors of any two layers.
    """

    layers: list[int]
    norms: list[float]
    singular_values: list[float]
    stable_rank: float
    cosines: list[list[float]]


@dataclass
class LayerAblation:
    """
    A metric with parts of an adapter.

    Args:
        groups (`list[list[int]]`): The layers that were treated together.
        none (`float`): The metric without any vector.
        all (`float`): The metric with all of them.
        left_out (`list[float]`): The metric without the vectors of each group.
        kept (`list[float]`): The metric with the vectors of each group alone.
    """

    groups: list[list[int]]
    none: float
    all: float
    left_out: list[float]
    kept: list[float]


@torch.no_grad()
def logit_lens(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, adapter_name: str = "default", top_k: int = 10
) -> list[LayerLens]:
    """
    Tokens that each layer's vector promotes and suppresses when it is read off by the unembedding, as in
    https://huggingface.co/papers/2505.18706.

    For the last layers this is close to what they do; earlier vectors act through the layers that follow.

    Args:
        model (`PeftModel`): A causal language model with a BiasSteer adapter.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the adapter.
        top_k (`int`, *optional*, defaults to 10): Number of tokens in each ranking.

    Returns:
        `list[LayerLens]`: One entry for each steered layer.

    Raises:
        ValueError: If the model has no unembedding, or one that reads something else than the stream behind the last
            layer and its norm, or `top_k` does not fit the vocabulary.
    """
    base: Any = model.get_base_model()
    head = base.get_output_embeddings()
    if head is None:
        raise ValueError(f"expected a language model with an unembedding, got a {type(base).__name__}")
    unembedding = _plain(head.weight)
    if not 1 <= top_k <= len(unembedding):
        raise ValueError(f"top_k must be in [1, vocabulary size={len(unembedding)}], got {top_k}")
    vectors = {index: vector.float() for index, vector in steering_vectors(model, adapter_name).items()}
    matrix = torch.stack(list(vectors.values())).to(unembedding.device)
    norm = _final_norm(base, head, layers_of(model, adapter_name)[-1])
    normed = matrix if norm is None else _through_norm(norm, matrix, base.dtype)
    # OPT-350m's unembedding is narrower than its layers
    if (project_out := getattr(find_decoder(base), "project_out", None)) is not None:
        matrix, normed = (rows @ _plain(project_out.weight).T for rows in (matrix, normed))
    unit_rows = nn.functional.normalize(unembedding, dim=-1)
    readings = [
        matrix @ unembedding.T,
        nn.functional.normalize(matrix, dim=-1) @ unit_rows.T,
        normed @ unembedding.T,
    ]
    return [
        LayerLens(layer, *(_rank(scores[row], tokenizer, top_k) for scores in readings))
        for row, layer in enumerate(vectors)
    ]


def _plain(weight: Any) -> torch.Tensor:
    """In float32, also if torchao has quantised it."""
    plain = type(weight) in (torch.Tensor, nn.Parameter)
    return (weight if plain else weight.dequantize()).detach().float()


def _final_norm(base: Any, head: nn.Module, last: nn.Module) -> nn.Module | None:
    """
    The norm that the stream goes through between the last layer, `last`, and the unembedding, if there is one.

    Raises:
        ValueError: If it goes through something else, as in BERT's head.
    """
    aside = {*head.modules(), getattr(find_decoder(base), "project_out", None)}
    between = [
        module
        for module in _after(last, base)
        # nor what holds the unembedding, or has it as its own weight
        if module not in aside and not any(parameter is head.weight for parameter in module.parameters())
    ]
    if len(between) > 1 or not all(_is_norm(module) for module in between):
        raise ValueError(
            "expected a language model whose unembedding reads the stream behind the last layer, or behind its norm, got "
            f"a {type(base).__name__}, in which it goes through {', '.join(type(module).__name__ for module in between)}: "
            "the lens would not show what a vector promotes"
        )
    return between[0] if between else None


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _after(last: nn.Module, base: Any) -> list[nn.Module]:
    """The norms, and the modules with weights of their own, that begin after the last layer, as they follow."""
    began: list[nn.Module] = []
    watched = [m for m in base.modules() if _is_norm(m) or next(m.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_pre_hook(lambda module, args: began.append(module)) for module in watched]
    handles.append(last.register_forward_hook(lambda *_: began.clear()))
    run = text_pass(base, torch.zeros(1, 2, dtype=torch.long, device=base.device))
    try:
        with in_evaluation_mode(base):
            run(use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return began


def _through_norm(norm: nn.Module, matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # probed, since classes store their weight as w, as 1 + w or not at all: +1, -1, … has mean 0 and mean square 1
    ones = torch.ones(1, matrix.shape[-1], device=matrix.device, dtype=dtype)
    signs = ones.clone()
    signs[:, 1::2] = -1
    gain = ((norm(signs) - norm(-signs)) * signs).detach().float() / 2
    subtracts_mean = (norm(ones) - norm(-ones)).abs().max() < 1e-3 * gain.abs().max()
    return gain * (matrix - matrix.mean(-1, keepdim=True) if subtracts_mean else matrix)


def _rank(scores: torch.Tensor, tokenizer: PreTrainedTokenizerBase, top_k: int) -> TokenRanking:
    def describe(top: Any) -> list[TokenScore]:
        pairs = zip(top.indices.tolist(), top.values.tolist())
        return [TokenScore(index, str(tokenizer.decode([index])), value) for index, value in pairs]

    return TokenRanking(describe(scores.topk(top_k)), describe(scores.topk(top_k, largest=False)))


def vector_statistics(vectors: dict[int, torch.Tensor]) -> VectorStatistics:
    """
    Norms, singular values, stable rank and cosines of the vectors of an adapter.

    Args:
        vectors (`dict[int, torch.Tensor]`): What [`steering_vectors`] returns, each (hidden_size,).
    """
    matrix = torch.stack([vector.double() for vector in vectors.values()]).cpu()
    singular = torch.linalg.svdvals(matrix)
    largest = singular.max().item()
    unit = nn.functional.normalize(matrix, dim=-1)
    return VectorStatistics(
        layers=list(vectors),
        norms=matrix.norm(dim=-1).tolist(),
        singular_values=singular.tolist(),
        stable_rank=singular.square().sum().item() / largest**2 if largest else 0.0,
        cosines=(unit @ unit.T).tolist(),
    )


def adapter_cosines(first: dict[int, torch.Tensor], second: dict[int, torch.Tensor]) -> dict[int, float]:
    """
    Cosine between two adapters, layer by layer, for the layers that both steer.

    Args:
        first (`dict[int, torch.Tensor]`): What [`steering_vectors`] returns, each (hidden_size,).
        second (`dict[int, torch.Tensor]`): The same of another adapter of the same width.

    Raises:
        ValueError: If there is no such layer, or the widths differ.
    """
    shared = [layer for layer in first if layer in second]
    if not shared:
        raise ValueError(f"expected adapters with a layer in common, got layers {sorted(first)} and {sorted(second)}")
    widths = [sorted({vector.numel() for vector in vectors.values()}) for vectors in (first, second)]
    if widths[0] != widths[1]:
        raise ValueError(f"expected adapters of one width, got vectors of {widths[0]} and {widths[1]} numbers")
    return {
        layer: nn.functional.cosine_similarity(first[layer].double(), second[layer].double(), dim=0).item()
        for layer in shared
    }


@torch.no_grad()
def residual_ratios(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str | list[int]],
    adapter_name: str = "default",
) -> dict[int, float]:
    """
    Norm of each vector relative to the median norm of the residual stream that it is added to.

    The median is taken over all tokens of `texts` in the model without adapters; it does not see the few tokens of
    huge norm (attention sinks).

    Args:
        model (`PeftModel`): A model with a BiasSteer adapter.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        texts (`Iterable[str]`): Some texts of the kind that the model is meant for, or their token ids.
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the adapter.

    Raises:
        ValueError: If there is no text.
    """
    vectors = steering_vectors(model, adapter_name)
    base: Any = model.get_base_model()
    layers = layers_of(model, adapter_name)
    norms: dict[int, list[torch.Tensor]] = {index: [] for index in vectors}

    def record(index: int) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            norms[index].append(hidden.float().norm(dim=-1).flatten())

        return hook

    handles = [layers[index].register_forward_hook(record(index)) for index in vectors]
    try:
        with model.disable_adapter(), in_evaluation_mode(model):
            for text in texts:
                ids = tokenizer(text).input_ids if isinstance(text, str) else text
                model(input_ids=torch.tensor([ids], device=base.device))
    finally:
        for handle in handles:
            handle.remove()
    if not all(norms.values()):
        raise ValueError("expected at least one text, got none")
    return {
        index: (vector.norm().cpu() / torch.cat(norms[index]).median().cpu()).item()
        for index, vector in vectors.items()
    }


def layer_ablation(
    model: PeftModel,
    metric: Callable[[PeftModel], float],
    adapter_name: str = "default",
    groups: list[list[int]] | None = None,
) -> LayerAblation:
    """
    Measures a metric with groups of layers left out, and with each group alone.

    Args:
        model (`PeftModel`): A model with an active, unmerged BiasSteer adapter. It is left as it was.
        metric (`Callable[[PeftModel], float]`): Called with `model`, `2 * len(groups) + 2` times.
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the adapter.
        groups (`list[list[int]]`, *optional*): Layers to treat together; each layer by itself if unset.

    Raises:
        ValueError: If a group names a layer that is not steered, or the adapter is merged.
    """
    vectors = steering_vectors(model, adapter_name)
    groups = [[layer] for layer in vectors] if groups is None else groups
    unknown = sorted({layer for group in groups for layer in group} - vectors.keys())
    if unknown:
        raise ValueError(f"groups must name layers among {list(vectors)}, got {unknown}")

    def measure(kept: set[int]) -> float:
        chosen = {i: vector if i in kept else torch.zeros_like(vector) for i, vector in vectors.items()}
        set_steering_vectors(model, chosen, adapter_name)
        return float(metric(model))

    every = set(vectors)
    try:
        return LayerAblation(
            groups=groups,
            none=measure(set()),
            all=measure(every),
            left_out=[measure(every - set(group)) for group in groups],
            kept=[measure(set(group)) for group in groups],
        )
    finally:
        set_steering_vectors(model, vectors, adapter_name)


def lens_table(lenses: list[LayerLens], reading: str = "raw", shown: int = 5) -> Any:
    """
    A [`rich.table.Table`](https://rich.readthedocs.io) of what [`logit_lens`] returned.

    Args:
        lenses (`list[LayerLens]`): One row each.
        reading (`str`, *optional*, defaults to `"raw"`): `"raw"`, `"cosine"` or `"normed"`.
        shown (`int`, *optional*, defaults to 5): Tokens per cell.

    Raises:
        ValueError: If there is no such reading.
    """
    if reading not in ("raw", "cosine", "normed"):
        raise ValueError(f"reading must be raw, cosine or normed, got {reading!r}")
    table = new_table("layer", f"promoted ({reading})", f"suppressed ({reading})")
    for lens in lenses:
        ranking: TokenRanking = getattr(lens, reading)
        table.add_row(str(lens.layer), *(_tokens(side[:shown]) for side in (ranking.promoted, ranking.suppressed)))
    return table


def _tokens(scores: list[TokenScore]) -> Any:
    from rich.text import Text

    # as plain text: rich would take a token such as [b] for markup
    return Text("  ".join(f"{score.token!r} {score.score:+.2f}" for score in scores))


def statistics_table(statistics: VectorStatistics, ratios: dict[int, float] | None = None) -> Any:
    """
    A [`rich.table.Table`](https://rich.readthedocs.io) of norms and of the cosine with the layer before.

    Args:
        statistics (`VectorStatistics`): What [`vector_statistics`] returned.
        ratios (`dict[int, float]`, *optional*): What [`residual_ratios`] returned, for one more column.
    """
    titles = ["layer", "norm", "cosine with the one before", *([] if ratios is None else ["norm / residual"])]
    table = new_table(*titles)
    for row, layer in enumerate(statistics.layers):
        before = f"{statistics.cosines[row][row - 1]:+.3f}" if row else ""
        ratio = [] if ratios is None else [f"{ratios[layer]:.2%}"]
        table.add_row(str(layer), f"{statistics.norms[row]:.4f}", before, *ratio)
    table.caption = f"stable rank {statistics.stable_rank:.2f} of {len(statistics.layers)}"
    return table


def new_table(*titles: str) -> Any:
    """A table for the terminal. Raises `ImportError`, with what to install, without `rich`."""
    try:
        from rich.table import Table
    except ImportError as error:
        raise ImportError("tables need one more package: pip install 'peft_bias_steer[cli]'") from error
    return Table(*titles)


def figure_class() -> Any:
    """What is drawn on. Raises `ImportError`, with what to install, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need one more package: pip install 'peft_bias_steer[plot]'") from error
    return Figure


def plot_statistics(statistics: VectorStatistics, path: str | os.PathLike, title: str = "") -> None:
    """
    Draws norms, singular values and the cosines between layers into one image file.

    Args:
        statistics (`VectorStatistics`): What [`vector_statistics`] returned.
        path (`str` or `os.PathLike`): File to write; its ending (`.png`, `.svg`, `.pdf`) decides the format.
        title (`str`, *optional*): Text above the plot.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = figure_class()(figsize=(12, 3.6), layout="constrained")
    bars, spectrum, heat = figure.subplots(1, 3)
    bars.bar(range(len(statistics.layers)), statistics.norms)
    bars.set(title="norm of each vector", xlabel="layer", ylabel="norm")
    spectrum.plot(range(1, len(statistics.singular_values) + 1), statistics.singular_values, marker=".")
    spectrum.set(title=f"singular values, stable rank {statistics.stable_rank:.2f}", xlabel="rank", ylim=(0, None))
    image = heat.imshow(statistics.cosines, vmin=-1, vmax=1, cmap="RdBu_r")
    heat.set(title="cosine between layers", xlabel="layer", ylabel="layer")
    figure.colorbar(image, ax=heat)
    ticks = range(0, len(statistics.layers), max(1, len(statistics.layers) // 8))
    labels = [str(statistics.layers[tick]) for tick in ticks]
    bars.set_xticks(ticks, labels)
    heat.set_xticks(ticks, labels)
    heat.set_yticks(ticks, labels)
    figure.suptitle(title)
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format=Path(path).suffix.removeprefix(".") or "png")
