"""What an adapter is and does, as one report: its vectors, their dose, the tokens they promote, and what each layer brings."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import EvalResult, ModelCard
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .analysis import (
    LayerAblation,
    LayerLens,
    TokenRanking,
    VectorStatistics,
    adapter_cosines,
    figure_class,
    layer_ablation,
    logit_lens,
    plot_statistics,
    residual_ratios,
    vector_statistics,
)
from .extraction import is_chat
from .layer import as_factor
from .merging import in_evaluation_mode
from .model_card import set_metrics
from .vectors import layers_by_index, set_steering_vectors, steering_vectors
from .whole_files import whole_file


logger = logging.get_logger(__name__)


SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
METRIC = "log_probability_gain"
CARD_START, CARD_END = "<!-- bias-steer report -->", "<!-- end of the report -->"


@dataclass
class Gain:
    """
    How much likelier completions are with the vectors, or some of them, than without any.

    Args:
        mean (`float`): Over the completions, of the mean over the tokens of each of log p(with) - log p(without), nats.
        error (`float`): 1.96 standard errors of this mean over the completions; the difference is taken in each of them.
    """

    mean: float
    error: float


@dataclass
class AdapterReport:
    """
    Args:
        statistics (`VectorStatistics`): Norms, singular values, stable rank and cosines.
        doses (`dict[int, float]`): By layer, the vector's norm over the median norm of the stream that it is added to.
        lenses (`list[LayerLens]`): Tokens that each vector promotes and suppresses.
        completions (`dict[str, int]`): Completions of each data set.
        base (`dict[str, float]`): Their mean log-probability per token without vectors, nats; modules that the adapter
            trained whole stay trained.
        gains (`dict[str, Gain]`): With all vectors, on each data set.
        scales (`dict[float, Gain]`): At other scales, on the first data set.
        ablation (`LayerAblation`): Its metric is the gain on the first data set.
        errors (`dict[str, list[float]]`): Of the ablation's `left_out` and `kept`, as in [`Gain`].
        cosines (`dict[int, float]`): With the vectors of another adapter, by layer. Empty without one.
    """

    statistics: VectorStatistics
    doses: dict[int, float]
    lenses: list[LayerLens]
    completions: dict[str, int]
    base: dict[str, float]
    gains: dict[str, Gain]
    scales: dict[float, Gain]
    ablation: LayerAblation
    errors: dict[str, list[float]]
    cosines: dict[int, float]


def read_completions(path: str | os.PathLike, limit: int | None = None) -> list[dict]:
    """
    Rows of a JSON Lines file: `{"prompt": …, "completion": …}`, each a string or a list of messages, as TRL has them, or
    `{"text": …}`.

    Args:
        path (`str` or `os.PathLike`): The file.
        limit (`int`, *optional*): The first so many of its rows.

    Raises:
        ValueError: If a row is no such thing, or there is none.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"expected at least one row to read, got {limit}")
    rows = [_check_row(row, place) for place, row in islice(read_json_lines(path), limit)]
    if not rows:
        raise ValueError(f"expected rows with a prompt and a completion in {path}, got an empty file")
    return rows


def read_json_lines(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    """
    Each object of a JSON Lines file with its place, for errors; empty lines are passed over.

    Raises:
        ValueError: If a line is no JSON.
    """
    # In bytes: a string may hold characters at which Python would break lines and JSON Lines does not.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"line {number} of {path}"
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"expected JSON in {place}, got {line[:40]!r} ({error})") from error
                yield place, row


def _check_row(row: Any, place: str) -> dict:
    if not isinstance(row, dict) or not ({"prompt", "completion"} <= row.keys() or "text" in row):
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f'expected "prompt" and "completion", or "text", in {place}, got {keys}')
    parts = [row["text"]] if "text" in row else [row["prompt"], row["completion"]]
    are_texts, are_chats = all(isinstance(part, str) for part in parts), all(map(is_chat, parts))
    if not are_texts and (not are_chats or "text" in row):
        raise ValueError(
            f"expected strings, or a prompt and a completion that are both lists of messages with a role, in {place}, got "
            f"{json.dumps(row)[:80]}"
        )
    return row


@torch.no_grad()
def completion_log_probs(model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> torch.Tensor:
    """
    Mean log-probability of the tokens of each completion after its prompt.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        rows (`list[dict]`):
            What [`read_completions`] returns. Of a text, all tokens but the first are its completion; of a chat, all after
            those that its prompt, with what begins an answer, has in common with the whole, as in TRL.

    Returns:
        `torch.Tensor`: (rows,), float64, nats per token.

    Raises:
        ValueError: If a completion has no token.
    """
    found = []
    with in_evaluation_mode(model):
        for row in rows:
            prompt, ids = _tokens_of(tokenizer, row)
            logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, prompt - 1 : -1].float()
            targets = torch.tensor(ids[prompt:], device=logits.device)
            found.append(logits.log_softmax(-1).gather(1, targets[:, None]).double().mean().cpu())
    return torch.stack(found)


def _tokens_of(tokenizer: PreTrainedTokenizerBase, row: dict) -> tuple[int, list[int]]:
    """Number of the prompt's tokens, and all tokens."""
    if "text" in row:
        prompt, ids = 1, tokenizer(row["text"])["input_ids"]
    elif isinstance(row["prompt"], str):
        ids = tokenizer(row["prompt"])["input_ids"]
        prompt, ids = len(ids), ids + tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    else:
        chat: dict[str, Any] = {"tokenize": True, "return_dict": False}
        begun = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **chat)
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], **chat)
        # some templates begin an answer with a thought, and leave that out of an answered chat
        prompt = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(begun, ids)))
        if not prompt:
            raise ValueError(
                f"expected a chat template that begins the answered chat as its prompt, got other tokens from the first on in {row}"
            )
        if prompt < len(begun):
            logger.warning_once(
                "The chat template writes the prompt otherwise once it is answered: all that differs is scored"
            )
    if not 0 < prompt < len(ids):
        raise ValueError(f"expected at least one token in the prompt and in the completion, got the row {row}")
    return prompt, cast(list[int], ids)


def adapter_report(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: dict[str, list[dict]],
    adapter_name: str = "default",
    *,
    group_size: int = 5,
    scales: tuple[float, ...] = SCALES,
    top_k: int = 6,
    other: dict[int, torch.Tensor] | None = None,
    show_progress: bool = False,
) -> AdapterReport:
    """
    Measures an adapter by how much likelier it makes given completions, for instance right answers to held-out questions.

    Args:
        model (`PeftModel`): A causal language model with one active, unmerged BiasSteer adapter. It is left as it was.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        data (`dict[str, list[dict]]`):
            Data sets by name, each what [`read_completions`] returns: the first is what the adapter is for; on the others,
            gains say what it does elsewhere.
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the adapter.
        group_size (`int`, *optional*, defaults to 5): Layers that are left out, or kept, together.
        scales (`tuple[float]`, *optional*): Factors of the vectors.
        top_k (`int`, *optional*, defaults to 6): Tokens of each ranking.
        other (`dict[int, torch.Tensor]`, *optional*): Vectors of another adapter to compare the directions with.
        show_progress (`bool`, *optional*, defaults to `False`): Show a bar.

    Raises:
        ValueError: If it has an encoder, another adapter is active, or a scale other than 1, there is no data, or one completion alone, or `group_size`, `top_k` or a scale does not fit.
    """
    _check_measurable(model, adapter_name, data, group_size)
    scales = tuple(as_factor(scale, "each of scales") for scale in scales)
    vectors, first = steering_vectors(model, adapter_name), next(iter(data))
    # first what is quick, and refuses what does not fit
    lenses = logit_lens(model, tokenizer, adapter_name, top_k=top_k)
    cosines = {} if other is None else adapter_cosines(vectors, other)
    groups = list(_groups(list(vectors), group_size))
    # Each data set with and without; then, of the first, each scale, and each group alone and left out, beside none and all.
    bar = logging.tqdm(
        desc="report", total=2 * len(data) + len(scales) + 2 * len(groups) + 2, disable=not show_progress
    )

    def log_probs(name: str) -> torch.Tensor:
        found = completion_log_probs(model, tokenizer, data[name])
        bar.update()
        return found

    at_scale = {}
    try:
        # not without the adapter: modules that it has trained whole stay
        set_steering_vectors(model, {index: 0 * vector for index, vector in vectors.items()}, adapter_name)
        without = {name: log_probs(name) for name in data}
        set_steering_vectors(model, vectors, adapter_name)
        gains = {name: _gain(log_probs(name) - without[name]) for name in data}
        for scale in scales:
            scaled = {index: scale * vector for index, vector in vectors.items()}
            set_steering_vectors(model, scaled, adapter_name)
            at_scale[scale] = _gain(log_probs(first) - without[first])
    finally:
        set_steering_vectors(model, vectors, adapter_name)
    measured: list[Gain] = []

    def metric(_: PeftModel) -> float:
        measured.append(_gain(log_probs(first) - without[first]))
        return measured[-1].mean

    ablation = layer_ablation(model, metric, adapter_name, groups)
    bar.close()
    # layer_ablation asks for none and all first.
    errors = [gain.error for gain in measured[2:]]
    rows = [_tokens_of(tokenizer, row)[1] for row in data[first]]
    return AdapterReport(
        statistics=vector_statistics(vectors),
        doses=residual_ratios(model, tokenizer, rows, adapter_name),
        lenses=lenses,
        completions={name: len(rows) for name, rows in data.items()},
        base={name: values.mean().item() for name, values in without.items()},
        gains=gains,
        scales=at_scale,
        ablation=ablation,
        errors={"left_out": errors[: len(groups)], "kept": errors[len(groups) :]},
        cosines=cosines,
    )


def _check_measurable(model: PeftModel, adapter_name: str, data: dict[str, list[dict]], group_size: int) -> None:
    if (base := model.get_base_model()).config.is_encoder_decoder:
        raise ValueError(
            f"expected a causal language model, which reads a prompt and goes on with its completion, got a {type(base).__name__}"
        )
    layers = layers_by_index(model, [adapter_name]).values()
    is_off = any(layer.disable_adapters or layer.call.disabled for layer in layers)
    scales = sorted({layer.scale(adapter_name) for layer in layers})
    if is_off or model.active_adapters != [adapter_name] or scales != [1.0]:
        raise ValueError(
            f"expected {adapter_name!r} as the one active adapter, at scale 1, got {model.active_adapters}"
            f"{', switched off' * is_off}, at scale {' and '.join(map(str, scales))}: call set_adapter({adapter_name!r}) and "
            f"set_scale({adapter_name!r}, 1.0) outside disable_adapter()"
        )
    if not data:
        raise ValueError("expected at least one data set, got none: give rows with prompts and completions")
    for name, rows in data.items():
        if len(rows) < 2:
            raise ValueError(f"expected at least two completions in {name}, for an interval, got {len(rows)}")
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")


def _groups(layers: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(layers), size):
        yield layers[start : start + size]


def _gain(differences: torch.Tensor) -> Gain:
    return Gain(differences.mean().item(), 1.96 * differences.std().item() / len(differences) ** 0.5)


def write_report(report: AdapterReport, folder: str | os.PathLike, title: str) -> str:
    """
    Writes report.md, report.json, vectors.png and gains.png into a folder, which is made.

    Args:
        report (`AdapterReport`): What [`adapter_report`] returned.
        folder (`str` or `os.PathLike`): Where to.
        title (`str`): Heading.

    Returns:
        `str`: The text of report.md.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    text = f"# {title}\n\n{report_markdown(report)}"
    for name, content in (("report.md", text), ("report.json", json.dumps(asdict(report), indent=1) + "\n")):
        with whole_file(target / name) as unfinished:
            unfinished.write_text(content, encoding="utf-8")
    plot_statistics(report.statistics, target / "vectors.png")
    plot_gains(report, target / "gains.png")
    return text


def add_to_card(report: AdapterReport, adapter: str | os.PathLike, folder: str | os.PathLike) -> None:
    """
    Puts the report into the model card of a saved adapter, in the place of an earlier one, its gains into the card's metadata
    too (`model-index`), and its plots beside it.

    Args:
        report (`AdapterReport`): What [`adapter_report`] returned.
        adapter (`str` or `os.PathLike`): Folder of the adapter.
        folder (`str` or `os.PathLike`): Where [`write_report`] has written.

    Raises:
        ValueError: If the adapter is not in a folder, or has no card.
    """
    card = find_card(adapter)
    for name in ("vectors.png", "gains.png"):
        if Path(folder).resolve() != Path(adapter).resolve():
            shutil.copyfile(Path(folder, name), Path(adapter, name))
    text = card.read_text(encoding="utf-8")
    before, _, rest = text.partition(CARD_START)
    after = rest.partition(CARD_END)[2]
    section = f"{CARD_START}\n## What the vectors do\n\n{report_markdown(report)}{CARD_END}"
    found = ModelCard(f"{before.rstrip()}\n\n{section}{after or chr(10)}")
    others = [old for old in found.data.get("eval_results", []) if old.metric_type != METRIC]
    found.data["eval_results"] = others or None
    set_metrics(found, report_metrics(report), str(Path(adapter).resolve()))
    with whole_file(card) as unfinished:
        unfinished.write_text(str(found), encoding="utf-8")


def find_card(adapter: str | os.PathLike) -> Path:
    """
    The model card of a saved adapter.

    Raises:
        ValueError: If the adapter is not in a folder, or has no card.
    """
    card = Path(adapter) / "README.md"
    if not card.is_file():
        raise ValueError(f"expected the folder of an adapter with a README.md, got {adapter}: save the adapter again")
    return card


def report_metrics(report: AdapterReport) -> list[EvalResult]:
    """The gain on each data set, as a model card's metadata has it: a number, whose interval is in its name."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^\w.-]+", "-", name),
            dataset_name=name,
            metric_type=METRIC,
            metric_name=f"gain in log-probability, nats per token (± {gain.error:.3f}, 1.96 standard errors)",
            metric_value=round(gain.mean, 3),
        )
        for name, gain in report.gains.items()
    ]


def report_markdown(report: AdapterReport) -> str:
    """The tables of a report, with its two plots."""
    first, statistics, ablation = next(iter(report.gains)), report.statistics, report.ablation
    by_layer = [
        [str(lens.layer), f"{norm:.3f}", f"{report.doses[lens.layer]:.1%}"]
        + ([f"{report.cosines[lens.layer]:+.3f}" if lens.layer in report.cosines else ""] if report.cosines else [])
        + [_tokens(lens.normed, side) for side in ("promoted", "suppressed")]
        for lens, norm in zip(report.lenses, statistics.norms)
    ]
    columns = ["layer", "norm", "dose", *(["cosine"] if report.cosines else []), "promoted", "suppressed"]
    by_group = [
        [_range(group), _cell(Gain(kept, kept_error)), _cell(Gain(left, left_error))]
        for group, kept, kept_error, left, left_error in zip(
            ablation.groups, ablation.kept, report.errors["kept"], ablation.left_out, report.errors["left_out"]
        )
    ]
    by_data = [
        [name, str(report.completions[name]), f"{report.base[name]:.3f}", _cell(gain)]
        for name, gain in report.gains.items()
    ]
    by_scale = [[f"{scale:g}", _cell(gain)] for scale, gain in report.scales.items()]
    paragraphs = [
        "Gains are in nats per token of a completion: its mean log-probability with the vectors less that without; mean over "
        "the completions ± 1.96 standard errors.",
        _table(["data", "completions", "log-probability without", "gain"], by_data),
        "![Gains by scale and by layers](gains.png)",
        f"At other scales, on {first}:",
        _table(["scale", "gain"], by_scale),
        f"By layers, on {first}:",
        _table(["layers", "gain with these alone", "gain without these"], by_group),
        f"The vectors: stable rank {statistics.stable_rank:.2f} of {len(statistics.layers)}. Dose: norm over the median norm "
        "of the stream there. Promoted and suppressed: tokens, read through the final norm and the unembedding"
        + ("; cosine: with the other adapter's vector." if report.cosines else "."),
        _table(columns, by_layer),
        "![Norms, singular values and cosines](vectors.png)",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def _cell(gain: Gain) -> str:
    return f"{gain.mean:+.3f} ± {gain.error:.3f}"


def _range(group: list[int]) -> str:
    return str(group[0]) if len(group) == 1 else f"{group[0]} – {group[-1]}"


def _tokens(ranking: TokenRanking, side: str) -> str:
    shown = (repr(score.token).replace("|", "\\|") for score in getattr(ranking, side))
    # A token may be the mark that ends code.
    return " ".join(f"`` {text} ``" if "`" in text else f"`{text}`" for text in shown)


def plot_gains(report: AdapterReport, path: str | os.PathLike) -> None:
    """
    Draws the gains by scale and by layers into one image file.

    Args:
        report (`AdapterReport`): What [`adapter_report`] returned.
        path (`str` or `os.PathLike`): File to write; its ending decides the format.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = figure_class()(figsize=(10, 3.6), layout="constrained")
    by_scale, by_layers = figure.subplots(1, 2)
    gains, ablation = list(report.scales.values()), report.ablation
    by_scale.errorbar(list(report.scales), [g.mean for g in gains], [g.error for g in gains], marker=".", capsize=2)
    by_scale.set(xlabel="scale of the vectors", ylabel="gain, nats per token", title=next(iter(report.gains)))
    for shift, name in ((-0.2, "kept"), (0.2, "left_out")):
        label = "with these layers alone" if name == "kept" else "without these layers"
        positions = [i + shift for i in range(len(ablation.groups))]
        by_layers.bar(positions, getattr(ablation, name), 0.4, yerr=report.errors[name], capsize=2, label=label)
    by_layers.axhline(ablation.all, color="black", linestyle="--", label="all vectors")
    by_layers.axhline(0, color="grey", linewidth=0.8)
    by_layers.set_xticks(range(len(ablation.groups)), [_range(group) for group in ablation.groups], fontsize="small")
    by_layers.set(xlabel="layers")
    by_layers.legend(fontsize="small")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format=Path(path).suffix.removeprefix(".") or "png")
