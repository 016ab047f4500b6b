"""A page that shows what the latents of a sparse autoencoder respond to, at every budget."""

import base64
import gzip
import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .configuration_hierarchical_sae import integer, integers, place_name, positive_number
from .language_model import check_predicts, unembedding_weight
from .latent_activations import LatentActivations, decoded, read_latents
from .modeling_hierarchical_sae import HierarchicalSaeModel
from .sites import Site, final_norm, find_site, writes_to_stream
from .texts import check_dataset
from .whole_files import whole_file


logger = logging.get_logger(__name__)

# Latents that are compressed together: what a browser unpacks to show one of them.
CHUNK = 32
HISTOGRAM_BINS = 24
JSON: dict[str, Any] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
TOKENS_SHOWN, NEIGHBOURS_SHOWN, LABELS_SHOWN = 10, 8, 3
# Bytes of HTML besides the template and the data, and around each piece of data; upper bounds.
PAGE_OVERHEAD, BLOB_OVERHEAD = 10_000, 60
# Byte-level tokens that a character or emoji can take, and what stands for a part of one.
LONGEST_CHARACTER, REPLACEMENT = 12, "\ufffd"


def write_dashboard(
    sae: HierarchicalSaeModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str | dict],
    *,
    path: str | Path,
    layer: int | None = None,
    hook_point: str | None = None,
    max_tokens: int | None = 100_000,
    context_length: int = 128,
    contexts_per_latent: int = 10,
    latents: Sequence[int] | None = None,
    max_megabytes: float = 32.0,
    seed: int = 0,
    show_progress: bool = True,
    **settings: Any,
) -> dict[str, int]:
    """
    Write one HTML file that needs no network: a list of latents to search and sort and, for each, its strongest
    contexts with shaded tokens, its activations, the output tokens that it promotes and suppresses if it writes to the
    residual stream, its nearest decoder rows, and how often it is used at each budget. A slider sets the budget for
    everything at once.

    Every number at every budget is exact, from one encoding: contexts are kept if they are among the strongest at any
    budget. Latents that do not fit into `max_megabytes` are left out at random, and the page says so. The same
    arguments give the same file.

    Args:
        sae ([`HierarchicalSaeModel`]): the autoencoder.
        model (`PreTrainedModel`): the causal language model that it was trained on.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        texts (`Iterable`): texts, or rows, as in [`iterate_activations`]; any language, HTML too: nothing is executed.
        path (`str` or `Path`): file to write; its folder is made if it is not there. An older page stays whole until the
            new one is on disk, and after an error.
        layer (`int`, *optional*): decoder layer, counted from 0; by default the one in the autoencoder's config.
        hook_point (`str`, *optional*): where in the layer, as in [`iterate_activations`]; by default the one in the
            autoencoder's config, or else its output.
        max_tokens (`int`, *optional*, defaults to 100000): stop once exactly this many tokens were read. Activations take
            about `40 * k * max_tokens` bytes of memory.
        context_length (`int`, defaults to 128): longest context in tokens.
        contexts_per_latent (`int`, defaults to 10): contexts shown at each budget.
        latents (`Sequence[int]`, *optional*): show these only; by default all that fire, as many as fit.
        max_megabytes (`float`, defaults to 32.0): largest size of the file, in units of 10^6 bytes. A latent takes 1 to
            2 kB.
        seed (`int`, defaults to 0): which latents are drawn if not all fit.
        show_progress (`bool`, defaults to `True`): progress bars.
        settings (*optional*): others of [`ActivationSettings`], such as `text_column` and `skip_special_tokens`.

    Returns:
        `dict[str, int]`: `tokens` read, `live_latents` that fire on them, `latents` on the page, and its size in `bytes`.

    Raises:
        `ImportError`: If the extra `dashboard` (jinja2, vl-convert-python) is not installed.
        `ValueError`: If the language model, layer, site or tokenizer does not fit, it has no unembedding or weights that are NaN
            or infinite, there is no latent that fires, or too little room for any latent.
    """
    template = _template()
    contexts_per_latent, seed = integer("contexts_per_latent", contexts_per_latent), integer("seed", seed)
    latents = None if latents is None else integers("latents", latents)
    _check_arguments(sae, model, texts, contexts_per_latent, latents=latents, max_megabytes=max_megabytes)
    # Made before the work, so that a path that cannot be written fails before it.
    with whole_file(path) as unfinished:
        activations = read_latents(
            sae,
            model,
            tokenizer,
            texts,
            layer=layer,
            hook_point=hook_point,
            context_length=context_length,
            max_tokens=max_tokens,
            show_progress=show_progress,
            **settings,
        )
        live = activations.live_latents
        wanted = live if latents is None else live[torch.isin(live, torch.tensor(latents))]
        if not len(wanted):
            raise ValueError(f"none of the latents {latents or []} fires on the {activations.tokens} tokens")
        wanted = wanted[torch.randperm(len(wanted), generator=torch.Generator().manual_seed(seed))]
        written = sae.config.target_hook_point or hook_point or sae.config.hook_point or "output"
        site = find_site(model, sae.config.layer if layer is None else layer, written)
        page = _Page(sae, model, tokenizer, activations, site=site, contexts_per_latent=contexts_per_latent)
        blobs, shown = page.blobs(wanted, int(max_megabytes * 1e6), show_progress)
        html = template.render(
            config=sae.config,
            model_name=model.config.name_or_path or type(model).__name__,
            site=_site_name(sae, layer, hook_point),
            tokens=activations.tokens,
            live=len(live),
            wanted=len(wanted),
            shown=shown,
            blobs=blobs,
            histogram_bins=HISTOGRAM_BINS,
            settings={
                "k": activations.k,
                "tokens": activations.tokens,
                "chunk": CHUNK,
                "contexts": contexts_per_latent,
                "hasBudgets": sae.config.has_budgets,
            },
        )
        unfinished.write_text(html, encoding="utf-8")
        size = unfinished.stat().st_size
    found = {"tokens": activations.tokens, "live_latents": len(live), "latents": shown, "bytes": size}
    logger.info(f"{path}: {found}")
    return found


class _Page:
    """The data of a page: compressed JSON by name, of which the browser unpacks what it shows."""

    def __init__(
        self,
        sae: HierarchicalSaeModel,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        activations: LatentActivations,
        *,
        site: Site,
        contexts_per_latent: int,
    ):
        self.activations, self.contexts_per_latent = activations, contexts_per_latent
        self.token_text = cache(partial(decoded, tokenizer))
        self.pieces, self.contexts, self.piece_of, self.place_of = _readable(activations, tokenizer, self.token_text)
        self.context_of = activations.position_contexts.numpy()
        self.decoder = F.normalize(sae.W_dec.detach().float(), dim=1)
        self.unembedding = unembedding_weight(model)
        self.through_final_norm = partial(_through_norm, final_norm(model), model.dtype)
        self.has_logits = writes_to_stream(model, site)

    def blobs(self, latents: torch.Tensor, size: int, show_progress: bool) -> tuple[dict[str, str], int]:
        """As many of `latents`, in this order, as fit into `size` bytes, and how many these are."""
        blobs = {"plotting": _plotting_library(), "text": _packed([self.pieces, self.contexts])}
        fixed = len(_source()) + PAGE_OVERHEAD + sum(map(len, blobs.values()))
        room, rows = size - fixed, []
        with logging.tqdm(total=len(latents), unit="latent", desc="describe", disable=not show_progress) as progress:
            for number, group in enumerate(latents.split(CHUNK)):
                details = self.details(group)
                group_rows = [self.row(latent, detail) for latent, detail in zip(group.tolist(), details)]
                chunk = _packed(details)
                # All rows are compressed together in the end, which takes no more than in parts.
                room -= len(chunk) + len(_packed(group_rows)) + BLOB_OVERHEAD
                if room < 0:
                    break
                blobs[f"chunk-{number}"] = chunk
                rows += group_rows
                progress.update(len(group))
        if not rows:
            raise ValueError(
                f"max_megabytes={size / 1e6:g} has no room for any latent: the page with its text alone takes "
                f"{fixed / 1e6:.2f}; raise max_megabytes or lower max_tokens"
            )
        return {**blobs, "rows": _packed(rows)}, len(rows)

    def row(self, latent: int, detail: dict) -> list:
        """What is listed, sorted and searched."""
        counts = np.bincount(self.activations.latent(latent)[2].numpy())[1:].tolist()
        promoted = [text for text, _ in detail["promoted"][:LABELS_SHOWN]]
        return [latent, detail["max"], detail["tokens"], promoted, counts]

    def details(self, latents: torch.Tensor) -> list[dict]:
        """What is shown of a latent that is looked at."""
        rows = self.decoder[latents.to(self.decoder.device)]
        cosines = rows @ self.decoder.T
        cosines[torch.arange(len(latents)), latents] = -torch.inf
        neighbours = cosines.topk(min(NEIGHBOURS_SHOWN, len(self.decoder) - 1))
        logits = self.logits(rows.to(self.unembedding.device))
        count = min(TOKENS_SHOWN, logits.shape[1])
        promoted, suppressed = logits.topk(count), logits.topk(count, largest=False)
        return [
            {
                **self.firing(latent),
                "promoted": [[self.token_text(token), score] for token, score in _pairs(promoted, place)],
                "suppressed": [[self.token_text(token), score] for token, score in _pairs(suppressed, place)],
                "neighbours": _pairs(neighbours, place),
            }
            for place, latent in enumerate(latents.tolist())
        ]

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """What directions of the residual stream promote, (n, vocabulary); none for those of another site or width."""
        if not self.has_logits or rows.shape[1] != self.unembedding.shape[1]:
            return rows[:, :0]
        return self.through_final_norm(rows) @ self.unembedding.T

    def firing(self, latent: int) -> dict:
        """Histogram by activation and rank, the tokens that the latent fires on most, and its strongest contexts."""
        k = self.activations.k
        positions, values, ranks = (part.numpy() for part in self.activations.latent(latent))
        bins = np.minimum((values / values.max() * HISTOGRAM_BINS).astype(np.int64), HISTOGRAM_BINS - 1)
        cells, counts = np.unique(bins * k + ranks - 1, return_counts=True)
        kinds, inverse = np.unique(self.piece_of[positions], return_inverse=True)
        usual = np.argsort(-np.bincount(inverse, weights=values), kind="stable")[:LABELS_SHOWN]
        contexts, places = self.context_of[positions], self.place_of[positions]
        shown = []
        # Without budgets, k is the largest number of latents of any token, and ranks make no difference.
        ranked = (ranks, k) if self.activations.has_budgets else (np.ones_like(ranks), 1)
        for context in _strongest(contexts, values, *ranked, count=self.contexts_per_latent).tolist():
            here = slice(*np.searchsorted(contexts, [context, context + 1]))
            shown.append([context, places[here].tolist(), [_short(x) for x in values[here]], ranks[here].tolist()])
        return {
            "max": _short(values.max()),
            "tokens": [self.pieces[kind] for kind in kinds[usual]],
            "histogram": [np.diff(cells, prepend=0).tolist(), counts.tolist()],
            "contexts": shown,
        }


def _strongest(contexts: np.ndarray, values: np.ndarray, ranks: np.ndarray, k: int, *, count: int) -> np.ndarray:
    """The contexts, (n,), that are among the `count` with the largest activation at any budget up to k."""
    names, inverse = np.unique(contexts, return_inverse=True)
    best = np.zeros((len(names), k), dtype=np.float32)
    np.maximum.at(best, (inverse, ranks - 1), values)
    np.maximum.accumulate(best, axis=1, out=best)
    # Contexts in text order, so that equal activations are told apart in the same way everywhere.
    order = np.argsort(-best, axis=0, kind="stable")[:count]
    kept = np.unique(order[np.take_along_axis(best, order, axis=0) > 0])
    return names[kept]


def _readable(
    activations: LatentActivations, tokenizer: PreTrainedTokenizerBase, token_text: Callable[[int], str]
) -> tuple[list[str], list[list[int]], np.ndarray, np.ndarray]:
    """
    The text as it is shown. Tokens that are parts of one character make one piece.

    Returns the distinct pieces, the numbers of each context's pieces, and for each position the number of its piece
    and its place in the context.
    """
    ids, starts = activations.token_ids.tolist(), activations.context_starts.tolist()
    numbers, contexts = {}, []
    piece_of, place_of = (np.empty(len(ids), dtype=np.int64) for _ in range(2))
    for start, end in zip(starts, starts[1:]):
        shown = []
        while start < end:
            text, length = token_text(ids[start]), 1
            if REPLACEMENT in text:
                text, length = _character(tokenizer, ids[start : min(end, start + LONGEST_CHARACTER)])
            shown.append(numbers.setdefault(text, len(numbers)))
            piece_of[start : start + length] = shown[-1]
            place_of[start : start + length] = len(shown) - 1
            start += length
        contexts.append(shown)
    return list(numbers), contexts, piece_of, place_of


def _character(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[str, int]:
    """Text and number of the first tokens that together are whole characters; of one token if there are none."""
    for length in range(1, len(ids) + 1):
        text = decoded(tokenizer, *ids[:length])
        if REPLACEMENT not in text:
            return text, length
    return decoded(tokenizer, ids[0]), 1


def _through_norm(norm: nn.Module | None, dtype: torch.dtype, directions: torch.Tensor) -> torch.Tensor:
    """(n, hidden_size) directions times the gain of a norm of this dtype, centred if it centres."""
    if norm is None:
        return directions
    # Norms store their gain as w, 1 + w or not at all; on inputs of mean 0 and mean square 1 it can be read off.
    signs = torch.ones(1, directions.shape[1], device=directions.device, dtype=dtype)
    signs[:, 1::2] = -1
    with torch.no_grad():
        gain = (norm(signs) - norm(-signs)).float() * signs.float() / 2
        of_constant = norm(signs.abs()) - norm(-signs.abs())
    if of_constant.abs().max() < 1e-3 * gain.abs().max():
        directions = directions - directions.mean(dim=1, keepdim=True)
    return directions * gain


def _site_name(sae: HierarchicalSaeModel, layer: int | None, hook_point: str | None) -> str:
    config = sae.config
    layer = config.layer if layer is None else layer
    site = place_name(layer, hook_point or config.hook_point or "output")
    return f"{site} to {place_name(layer, config.target_hook_point)}" if config.is_transcoder else site


def _check_arguments(
    sae: HierarchicalSaeModel,
    model: PreTrainedModel,
    texts: Any,
    contexts_per_latent: int,
    *,
    latents: list[int] | None,
    max_megabytes: float,
) -> None:
    check_dataset(texts)
    if contexts_per_latent < 1:
        raise ValueError(f"contexts_per_latent must be positive, got {contexts_per_latent}")
    if latents is not None and not all(0 <= latent < sae.config.d_sae for latent in latents):
        raise ValueError(f"latents must be in [0, d_sae={sae.config.d_sae}), got {latents}")
    if positive_number("max_megabytes", max_megabytes) == math.inf:
        raise ValueError("max_megabytes must be finite, got inf")
    check_predicts(model)
    _check_finite_weights(sae, model)


def _check_finite_weights(sae: HierarchicalSaeModel, model: PreTrainedModel) -> None:
    """JSON has no NaN: no browser would read the page."""
    if not all(parameter.isfinite().all() for parameter in sae.parameters()):
        raise ValueError("expected an autoencoder of finite weights, got NaN or infinite ones")
    unembedding = unembedding_weight(model)
    ones = torch.ones(1, unembedding.shape[1], device=unembedding.device)
    directions = _through_norm(final_norm(model), model.dtype, ones)
    if not (directions.isfinite().all() and unembedding.isfinite().all()):
        raise ValueError(
            "expected finite weights in the language model's final norm and unembedding, got NaN or infinite ones"
        )


def _pairs(top: Any, row: int) -> list[list]:
    return [[index, _short(value)] for index, value in zip(top.indices[row].tolist(), top.values[row].tolist())]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _packed(content: Any) -> str:
    """JSON, compressed, in characters that HTML leaves alone; the same content gives the same text."""
    text = content if isinstance(content, str) else json.dumps(content, **JSON)
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=9, mtime=0)).decode()


@cache
def _plotting_library() -> str:
    """Vega-Lite with all it needs, in a scope of its own."""
    import vl_convert

    bundle = vl_convert.javascript_bundle()  # ty: ignore[missing-argument]
    return _packed(f"(() => {{{bundle}\n}})()")


def _source() -> str:
    return Path(__file__).with_name("dashboard.html").read_text(encoding="utf-8")


def _template() -> Any:
    try:
        import jinja2
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error}: the dashboard needs `pip install "hf_hierarchical_sae[dashboard]"`') from error
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_source())
