"""Steering vectors without training: from contrasting prompts, or from the biases that a merge wrote."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import BiasSteerConfig, as_index, layer_indices
from .merging import merge_sites
from .residual import find_layers, refuse_seq_first, residual_width, seq_first_type
from .vectors import from_vectors, unwrap


__all__ = ["extract_vectors", "from_merged"]
Method = Literal["mean", "pca_diff", "pca_center"]
METHODS = ("mean", "pca_diff", "pca_center")
SIDES = ("positive", "negative")


@torch.no_grad()
def extract_vectors(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[Mapping[str, Any]],
    *,
    method: Method = "mean",
    layers_to_transform: int | list[int] | None = None,
    token: int = -1,
    batch_size: int = 8,
    layers_pattern: str | None = None,
) -> dict[int, torch.Tensor]:
    """
    Vectors that lead from the negative to the positive one of two prompts; [`from_vectors`] makes an adapter of them.

    What is read is `h_l`, the output of decoder layer `l` at one token, in the model without adapters: there a vector
    is added as well. With `d = h_l(positive) - h_l(negative)`, one for each pair, the vector of layer `l` is

    - `"mean"`: the mean of `d`, as long as it is: at scale 1 it is the average step between two prompts
      (https://huggingface.co/papers/2312.06681; the default of steering-vectors);
    - `"pca_diff"`: the first principal component of `d` around its mean, of length 1 (the default of repeng);
    - `"pca_center"`: the first principal component of `d` around zero, of length 1: the axis along which prompts
      differ from the middle of their pair (`pca_center` of repeng, `pca_aggregator` of steering-vectors;
      https://huggingface.co/papers/2310.01405).

    A principal component is an axis: its sign is that of its product with the mean of `d`, as in steering-vectors.
    repeng lets the pairs vote, one by one, and reads its last layer behind the model's final norm.

    The pairs are read once. Memory does not grow with their number: a layer holds the sum of `d`, or, for a principal
    component, at most `2 * hidden_size` rows.

    Args:
        model (`PeftModel` or `PreTrainedModel`): A decoder or an encoder, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        pairs (`Iterable[Mapping]`):
            Rows with a `"positive"` and a `"negative"` prompt, a [`datasets.Dataset`] for example. A prompt is a text,
            which is tokenized with the tokenizer's own special tokens, or a list of messages, to which its chat template
            is applied, up to where the next answer begins or, if the last message is the assistant's, the end of that.
        method (`str`, *optional*, defaults to `"mean"`): `"mean"`, `"pca_diff"` or `"pca_center"`.
        layers_to_transform (`int` or `list[int]`, *optional*):
            Layers to make vectors for; negative ones count from the last layer. All layers if unset.
        token (`int`, *optional*, defaults to -1): Position that is read in each prompt; negative from its end.
        batch_size (`int`, *optional*, defaults to 8): Number of pairs in a forward pass.
        layers_pattern (`str`, *optional*): As in [`BiasSteerConfig`].

    Returns:
        `dict[int, torch.Tensor]`: Vectors by index of their layer, each (hidden_size,), in float32 on the CPU.

    Raises:
        TypeError: If an index or a number is no integer, or `pairs` no iterable.
        ValueError: If there are too few pairs or no difference, a row or prompt is none, a layer does not exist, hidden
            states are not finite, or the model is in training mode, or has an encoder beside its decoder or layers that
            return (seq, batch, hidden_size).
    """
    base = unwrap(model)
    _check_model(base)
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if as_index(batch_size, "batch_size") < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    chosen = BiasSteerConfig(layers_to_transform=layers_to_transform).layers_to_transform
    layers = dict(enumerate(find_layers(base, layers_pattern)[1]))
    if chosen is not None:
        layers = {index: layers[index] for index in layer_indices(chosen, len(layers))}
    # a mean needs their sum alone
    most_rows = 1 if method == "mean" else 2 * residual_width(base)
    rows: dict[int, list[torch.Tensor]] = {index: [] for index in layers}
    token, done = as_index(token, "token"), 0
    prompts = _prompts(tokenizer, pairs, token)
    with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
        while batch := list(islice(prompts, batch_size)):
            for index, differences in _differences(base, layers, batch, token=token, first=done).items():
                rows[index].append(nn.functional.pad(differences, (1, 0), value=1.0))
                if sum(map(len, rows[index])) > most_rows:
                    rows[index] = [_folded(torch.cat(rows[index]), method)]
            done += len(batch)
    fewest = 2 if method == "pca_diff" else 1
    if done < fewest:
        raise ValueError(f"expected at least {fewest} pairs for {method}, got {done}")
    return {index: _vector(torch.cat(rows[index]), method, index) for index in rows}


def _check_model(base: PreTrainedModel) -> None:
    if base.training:
        raise ValueError("expected a model in evaluation mode, got one in training mode: call model.eval()")
    if base.config.is_encoder_decoder:
        raise ValueError(
            f"expected a decoder or an encoder, got a {type(base).__name__}, which reads a prompt with both"
        )
    refuse_seq_first(seq_first_type(base), "extract_vectors", "train its vectors")


def _prompts(
    tokenizer: PreTrainedTokenizerBase, pairs: Iterable[Mapping[str, Any]], token: int
) -> Iterator[list[list[int]]]:
    """Token ids of the positive and the negative prompt of each pair."""
    try:
        rows = iter(pairs)
    except TypeError as error:
        raise TypeError(f"pairs must be rows with a positive and a negative prompt, got {pairs!r}") from error
    for number, pair in enumerate(rows):
        if not isinstance(pair, Mapping) or not set(SIDES) <= pair.keys():
            raise ValueError(f"expected a row with a positive and a negative prompt as pair {number}, got {pair!r}")
        both = [_token_ids(tokenizer, pair[side], f"the {side} prompt of pair {number}") for side in SIDES]
        for side, ids in zip(SIDES, both):
            if not -len(ids) <= token < len(ids):
                raise ValueError(
                    f"expected a token {token} in the {side} prompt of pair {number}, got one of {len(ids)} tokens: "
                    f"{pair[side]!r}"
                )
        yield both


def _token_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any, name: str) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if not is_chat(prompt):
        raise ValueError(f"expected a text or a list of messages as {name}, got {prompt!r}")
    answered = prompt[-1]["role"] == "assistant"
    try:
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=not answered, continue_final_message=answered, return_dict=False
        )
    except Exception as error:  # templates raise errors of their own
        raise ValueError(f"expected {name} to be a chat that the tokenizer's template takes, got {error}") from error
    return cast(list[int], ids)


def is_chat(value: Any) -> bool:
    """Whether it is a list of messages, each of somebody, and not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def _differences(
    base: PreTrainedModel, layers: dict[int, nn.Module], batch: list[list[list[int]]], *, token: int, first: int
) -> dict[int, torch.Tensor]:
    """The differences of these pairs, of which the first has a number, by layer: (pairs, hidden_size)."""
    both = _hidden_states(base, layers, [ids for side in zip(*batch) for ids in side], token)
    differences = {index: hidden[: len(batch)] - hidden[len(batch) :] for index, hidden in both.items()}
    for index, difference in differences.items():
        if not difference.isfinite().all():
            raise ValueError(
                f"expected finite hidden states, got NaN or infinity after layer {index} in pairs {first} to "
                f"{first + len(batch) - 1}: load the model with dtype=torch.float32"
            )
    return differences


def _hidden_states(
    base: PreTrainedModel, layers: dict[int, nn.Module], prompts: list[list[int]], token: int
) -> dict[int, torch.Tensor]:
    """What each layer returns at one token of each prompt: (prompts, hidden_size), in float32 on the CPU."""
    lengths = torch.tensor([len(ids) for ids in prompts])
    # padded on the right, whatever the tokenizer does: there causal attention does not reach, and positions count from 0
    input_ids = pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True)
    mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    positions = lengths + token if token < 0 else torch.full_like(lengths, token)
    found = {}

    def reader(index: int) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            if hidden.shape[:2] != input_ids.shape:
                raise ValueError(
                    f"expected layers that return (batch, seq, hidden_size), got {tuple(hidden.shape)} for a batch of "
                    f"{tuple(input_ids.shape)}: this model's vectors cannot be extracted"
                )
            rows, columns = torch.arange(len(prompts)), positions
            found[index] = hidden[rows.to(hidden.device), columns.to(hidden.device)].float().cpu()

        return hook

    handles = [layer.register_forward_hook(reader(index)) for index, layer in layers.items()]
    try:
        # without its head: nobody needs the logits
        base.base_model(input_ids=input_ids.to(base.device), attention_mask=mask.long().to(base.device))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _folded(rows: torch.Tensor, method: str) -> torch.Tensor:
    """
    Fewer rows that say the same as these rows `[1, d]`: their sum, or the factor R of their QR decomposition.

    R has the Gram matrix of the rows. Its first row is, up to a sign, `sqrt(n) [1, mean of d]`; so without its first
    row and column it has the Gram matrix of `d - mean of d`.
    """
    rows = rows.double()
    return rows.sum(0, keepdim=True) if method == "mean" else torch.linalg.qr(rows, mode="r").R


def _vector(rows: torch.Tensor, method: str, index: int) -> torch.Tensor:
    folded = _folded(rows, method)
    mean = folded[0, 1:] / folded[0, 0]
    if method == "mean":
        vector, size = mean, mean.norm()
    else:
        spread = folded[1:, 1:] if method == "pca_diff" else folded[:, 1:]
        _, singular, axes = torch.linalg.svd(spread, full_matrices=False)
        # what is left of equal differences is rounding
        size = singular[0] if singular[0] > 1e-6 * folded[:, 1:].norm() else 0.0
        vector = axes[0] if axes[0] @ mean >= 0 else -axes[0]
    if not size:
        raise ValueError(f"expected prompts that differ, got none after layer {index} whose {method} is not zero")
    return vector.float()


def from_merged(
    merged: PreTrainedModel, model: PeftModel | PreTrainedModel, adapter_name: str = "default"
) -> PeftModel:
    """
    Reads the vectors that were merged into a checkpoint back into an adapter of its base model.

    A vector is the difference of two biases at the place where `merge_adapter` writes, up to the rounding of the
    merged one. Layers without a difference are not steered.

    Args:
        merged (`PreTrainedModel`):
            What `merge_and_unload` returned, or a checkpoint that `export_stock_checkpoint` wrote, in the dtype of
            `model`.
        model (`PeftModel` or `PreTrainedModel`): The base model; a `PeftModel` gets one more adapter.
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the new adapter.

    Returns:
        `PeftModel`: The steered model.

    Raises:
        ValueError: If the models differ in anything else, in no bias, or have no place for one. `model` is unchanged
            then.
    """
    base = unwrap(model)
    sites, own_sites = ([merge_sites(layer)[0] for layer in find_layers(one)[1]] for one in (merged, base))
    width = residual_width(base)
    expected, got = (len(own_sites), width), (len(sites), residual_width(merged))
    if got != expected:
        raise ValueError(f"expected a merged model of (layers, width) = {expected}, got {got}: take that of this base")
    _check_equal_apart(merged, base, [site.bias for site in [*sites, *own_sites] if site.bias is not None])
    vectors = {}
    for index, (site, own) in enumerate(zip(sites, own_sites)):
        biases = [torch.zeros(width) if one.bias is None else one.bias.detach().float().cpu() for one in (site, own)]
        # one for each expert, all alike
        difference = ((biases[0] - biases[1]) / site.factor).view(-1, width).mean(0)
        if difference.any():
            vectors[index] = difference
    if not vectors:
        raise ValueError(
            "expected biases that a merge wrote, got none that differ from the base model's: from_pretrained drops them "
            "where the config does not announce them, so take what export_stock_checkpoint() wrote"
        )
    return from_vectors(vectors, model, adapter_name)


def _check_equal_apart(merged: PreTrainedModel, base: PreTrainedModel, biases: list[nn.Parameter]) -> None:
    apart = {id(bias) for bias in biases}
    own = dict(base.named_parameters())
    for name, weight in merged.named_parameters():
        if id(weight) in apart:
            continue
        # biases that a stock class adds are zero; fused weights have other names
        added = name not in own and name.endswith("bias") and weight.any()
        if added or (name in own and not torch.equal(weight, own[name].to(weight.device))):
            raise ValueError(
                f"expected a model that differs from its base in merged biases alone, got another {name}: load both in "
                "the dtype of the checkpoint, and take the base that was steered"
            )
