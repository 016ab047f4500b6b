"""A language model's hidden states as a stream of training data for a sparse autoencoder."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging


logger = logging.get_logger(__name__)


def iterate_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[str | dict],
    layer: int,
    *,
    text_column: str = "text",
    context_length: int = 256,
    batch_size: int = 8,
    max_tokens: int | None = None,
    skip_first_position: bool = True,
    max_norm_ratio: float | None = 5.0,
    show_progress: bool = True,
) -> Iterator[torch.Tensor]:
    """
    The residual stream after one decoder layer, token by token, over a text. The forward pass stops at that layer.

    Padding, the first position of each context and tokens whose norm is far above the median are left out: such
    attention sinks (over 100 times the median norm in many models) would dominate the loss. The counts are logged.

    Args:
        model (`PreTrainedModel`): any transformers model with a list of decoder layers.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        dataset (`Iterable`): texts, or rows with a text in `text_column`; a streaming `datasets` dataset too.
        layer (`int`): decoder layer, counted from 0; negative counts from the end.
        text_column (`str`, defaults to `"text"`): where a row holds its text.
        context_length (`int`, defaults to 256): longest piece of text in tokens; longer texts are cut into several.
        batch_size (`int`, defaults to 8): contexts per forward pass.
        max_tokens (`int`, *optional*): stop once this many tokens have been yielded.
        skip_first_position (`bool`, defaults to `True`): leave out the first token of each context.
        max_norm_ratio (`float`, *optional*, defaults to 5.0): leave out tokens with a norm above this many times the
            batch's median norm.
        show_progress (`bool`, defaults to `True`): progress bar with tokens per second.

    Yields:
        `torch.Tensor`: (tokens, hidden_size) float32, on the model's device.

    Raises:
        `ValueError`: the model has no such layer, or the dataset held no token to yield.
    """
    layers = decoder_layers(model)
    if not -len(layers) <= layer < len(layers):
        raise ValueError(f"layer must be in [0, {len(layers) - 1}], got {layer}")
    contexts = _contexts(tokenizer, dataset, text_column, context_length)
    bar = logging.tqdm(total=max_tokens, unit="token", unit_scale=True, desc="harvest", disable=not show_progress)
    yielded = first = outlying = 0
    with bar:
        for ids, mask in _padded_batches(contexts, batch_size, tokenizer):
            mask = mask.to(model.device)
            states = _hidden_states(model, layers[layer], ids.to(model.device), mask).float()
            keep = mask.bool()
            if skip_first_position:
                first += int(keep[:, 0].sum())
                keep[:, 0] = False
            states = states[keep]
            if max_norm_ratio is not None and len(states):
                norms = torch.linalg.vector_norm(states, dim=1)
                usual = norms <= max_norm_ratio * norms.median()
                outlying += int((~usual).sum())
                states = states[usual]
            if max_tokens is not None:
                states = states[: max_tokens - yielded]
            if len(states) == 0:
                continue
            yielded += len(states)
            bar.update(len(states))
            yield states
            if max_tokens is not None and yielded >= max_tokens:
                break
    logger.info(f"{yielded} tokens; left out: {first} at the first position, {outlying} of outlying norm")
    if yielded == 0:
        raise ValueError("the dataset gave no tokens: expected texts longer than one token, got none")


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers of a transformers model, found in what `get_decoder` returns."""
    decoder = model.get_decoder()
    for name in ("layers", "h", "block", "blocks"):
        layers = getattr(decoder, name, None)
        if isinstance(layers, nn.ModuleList):
            return layers
    raise ValueError(
        f"{type(model).__name__} has no list of decoder layers: expected its decoder {type(decoder).__name__} to hold "
        "a ModuleList named layers, h, block or blocks"
    )


class _LayerReached(Exception):
    """Ends a forward pass at the layer whose output is wanted."""


@torch.no_grad()
def _hidden_states(model, layer, ids, mask):
    """Output of `layer`: (batch, sequence, hidden_size)."""
    captured = []

    def capture(module, args, output):
        captured.append(output if isinstance(output, torch.Tensor) else output[0])
        raise _LayerReached

    handle = layer.register_forward_hook(capture)
    try:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    except _LayerReached:
        pass
    finally:
        handle.remove()
    return captured[0]


def _contexts(tokenizer, dataset, text_column, context_length):
    for row in dataset:
        text = row if isinstance(row, str) else row[text_column]
        # The piece is cut here, so the tokenizer's warning about its length does not apply.
        ids = tokenizer(text, verbose=False)["input_ids"]
        for start in range(0, len(ids), context_length):
            yield ids[start : start + context_length]


def _padded_batches(contexts, batch_size, tokenizer):
    batch = []
    for ids in contexts:
        batch.append(ids)
        if len(batch) == batch_size:
            yield _pad(batch, tokenizer)
            batch = []
    if batch:
        yield _pad(batch, tokenizer)


def _pad(batch, tokenizer):
    length = max(len(ids) for ids in batch)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(batch), length), padding)
    mask = torch.zeros_like(ids)
    for row, context in enumerate(batch):
        ids[row, : len(context)] = torch.tensor(context)
        mask[row, : len(context)] = 1
    return ids, mask
