"""The cache of a ReBased model: states of constant size beside the keys and values of softmax layers."""

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from .configuration_rebased import RebasedConfig


# What generate and outputs call a cache: `cache` from transformers 5.24 on.
CACHE_NAME = next(
    field.name for field in fields(BaseModelOutputWithPast) if "cache" in field.name or "past" in field.name
)


class RebasedStateLayer(LinearAttentionLayer):
    """The cached state of a convolution or linear attention layer, of constant size."""

    is_croppable = False

    # A state is a new tensor at each call: keeping it costs nothing, copying it into a fixed one would.
    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        self.is_recurrent_states_initialized[state_idx] = True
        return self._keep(self.recurrent_states, recurrent_states, state_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> torch.Tensor:
        self.is_conv_states_initialized[state_idx] = True
        return self._keep(self.conv_states, conv_states, state_idx)

    def _keep(self, states: dict[int, torch.Tensor | None], new: torch.Tensor, state_idx: int) -> torch.Tensor:
        states[state_idx] = new
        self.has_previous_state[state_idx] = True
        self.dtype, self.device = new.dtype, new.device
        return new

    def fork(self) -> "RebasedStateLayer":
        """A layer with the same tensors, which goes on by itself."""
        other = copy.copy(self)
        other.__dict__.update({name: dict(x) for name, x in self.__dict__.items() if isinstance(x, dict)})
        return other

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_states(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_states(lambda state: state[indices])

    def forget_rows(self, rows: torch.Tensor) -> None:
        """rows: (batch), `True` where the state is that of no token."""
        self._map_states(lambda state: state.masked_fill(rows.view(-1, *[1] * (state.dim() - 1)), 0))

    def detach(self) -> None:
        self._map_states(torch.Tensor.detach)

    def tensors(self) -> list[torch.Tensor]:
        """What the layer holds, with one row a sequence."""
        return [x for states in (self.conv_states, self.recurrent_states) for x in states.values() if x is not None]

    def _map_states(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = function(state)


class _Room:
    """Memory for the keys and values of more tokens than there are yet: (batch, heads, tokens, head_dim) each."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, tokens: int):
        # What was given last: of a fork that is not the one to write, no longer its own.
        self.latest = keys, values
        self.tensors = tuple(x.new_empty(*x.shape[:-2], tokens, x.shape[-1]) for x in (keys, values))
        for tensor, given in zip(self.tensors, self.latest):
            tensor[..., : keys.shape[-2], :] = given

    def fits(self, keys: torch.Tensor, new: torch.Tensor) -> bool:
        """Whether `new` can be written after `keys`: there is memory, and no fork wrote there before."""
        memory = self.tensors[0]
        return (
            keys is self.latest[0]
            and keys.shape[-2] + new.shape[-2] <= memory.shape[-2]
            # A tensor of inference mode is written in inference mode only.
            and memory.is_inference() <= torch.is_inference_mode_enabled()
        )

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, with the new ones at their end."""
        before = self.latest[0].shape[-2]
        after = before + keys.shape[-2]
        for tensor, new in zip(self.tensors, (keys, values)):
            tensor[..., before:after, :] = new
        keys, values = (x[..., :after, :] for x in self.tensors)
        self.latest = keys, values
        return self.latest


class RebasedKeyValueLayer(DynamicLayer):
    """
    The cached keys and values of softmax attention over all tokens: they grow with each. Without gradients they grow where
    they are, into memory for an eighth more tokens, in the place of a copy of them all at every token.
    """

    is_croppable = False
    _room: _Room | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen = self.get_seq_length()
        # What a graph or a program has read stays as it was.
        if not seen or torch.is_grad_enabled() or torch.compiler.is_compiling() or key_states.dtype != self.keys.dtype:
            return super().update(key_states, value_states, *args, **kwargs)
        if self._room is None or not self._room.fits(self.keys, key_states):
            tokens = seen + key_states.shape[-2]
            self._room = _Room(self.keys, self.values, tokens + tokens // 8 + 64)
        self.keys, self.values = self._room.append(key_states, value_states)
        return self.keys, self.values

    def fork(self) -> "RebasedKeyValueLayer":
        """A layer with the same tensors, which goes on by itself."""
        return copy.copy(self)

    def tensors(self) -> list[torch.Tensor]:
        """What the layer holds, with one row a sequence."""
        return [x for x in (self.keys, self.values) if x is not None]

    def forget_rows(self, rows: torch.Tensor) -> None:
        """Nothing: the mask of a row hides what came before its sequence."""

    def detach(self) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys.detach(), self.values.detach()


class RebasedWindowLayer(RebasedKeyValueLayer, DynamicSlidingWindowLayer):
    """The cached keys and values of softmax attention over a window."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        whole = DynamicSlidingWindowLayer.update(self, key_states, value_states, *args, **kwargs)
        self.keys, self.values = (without_the_rest(*pair) for pair in zip((self.keys, self.values), whole))
        return whole


class RebasedCache(Cache):
    """
    The state of a [`RebasedModel`] after some tokens, which cannot go back to fewer tokens. It is constant in size, but for
    the keys and values of `"full_attention"` layers.

    Args:
        config (`RebasedConfig`): The model's configuration.
    """

    is_compileable = False
    layers: list[Any]

    def __init__(self, config: RebasedConfig):
        super().__init__(layers=_make_layers(config))
        self.config = config
        self.seen_tokens = 0
        # Of the sequence that each row is in, the number of its first token, and of the tokens seen, which are padding:
        # (batch) and (batch, tokens), or None where all is one sequence and no padding.
        self.first_tokens = None
        self.attention_mask = None

    @property
    def num_sequences(self) -> int | None:
        """Rows of the tokens seen, or `None` before the first."""
        return next((x.shape[0] for layer in self.layers for x in layer.tensors()), None)

    def fork(self) -> "RebasedCache":
        """A cache after the same tokens that goes on by itself; tensors are shared, as none is written in place."""
        other = copy.copy(self)
        other.layers = [layer.fork() for layer in self.layers]
        return other

    def detach(self) -> "RebasedCache":
        """Cut the graph here, for truncated backpropagation through time; returns the cache itself."""
        for layer in self.layers:
            layer.detach()
        return self

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select_rows(lambda x: x.repeat_interleave(repeats, dim=0))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select_rows(lambda x: x[indices])
        super().batch_select_indices(indices)

    def _select_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.first_tokens = None if self.first_tokens is None else select(self.first_tokens)
        self.attention_mask = None if self.attention_mask is None else select(self.attention_mask)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens seen, padding included."""
        return self.seen_tokens

    # transformers' own from 5.23 on; with these two, older ones serve as well.
    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The state of a convolution, or `None` before the first token."""
        layer = self.layers[layer_idx]
        return layer.conv_states[state_idx] if layer.has_previous_state[state_idx] else None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The state of a linear attention layer, or `None` before the first token."""
        layer = self.layers[layer_idx]
        return layer.recurrent_states[state_idx] if layer.has_previous_state[state_idx] else None

    def reset(self) -> None:
        """Forget every token."""
        # New layers: the library's own reset writes into tensors, which a fork may share.
        self.layers = _make_layers(self.config)
        self.seen_tokens, self.first_tokens, self.attention_mask = 0, None, None

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "A RebasedCache holds a state that cannot forget single tokens; copy the cache before the tokens that you may "
            "want to take back"
        )

    def activate_past_recording(self) -> None:
        self.crop(0)


def without_the_rest(kept: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A part of `whole` for a cache: in memory of its own, unless that of the whole is not twice as much."""
    return kept.clone() if whole.numel() > 2 * kept.numel() else kept


def given_cache(past_key_values: RebasedCache | None, cache: RebasedCache | None) -> RebasedCache | None:
    """The cache, which transformers 5.24 and newer call `cache`, and older ones `past_key_values`."""
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one thing; leave one of them out")
    return past_key_values if cache is None else cache


def _make_layers(config: RebasedConfig) -> list[Any]:
    makers = {
        "full_attention": RebasedKeyValueLayer,
        "sliding_attention": lambda: RebasedWindowLayer(config.sliding_window),
    }
    return [makers.get(layer_type, RebasedStateLayer)() for layer_type in config.layer_types]
