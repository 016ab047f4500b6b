"""Linear attention layers of a ReBased model: with projections of their own, or with a map of softmax attention's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations import use_kernel_forward_from_hub

from .cache_rebased import RebasedCache, without_the_rest
from .configuration_rebased import RebasedConfig
from .rebased_attention_forms import RebasedAttention
from .softmax_attention_rebased import RebasedProjections
from .window_attention_rebased import window_attention


# The kernels library may replace the operation of a model; without the library nothing happens.
use_kernel_forward_from_hub("RebasedAttention")(RebasedAttention)


class RebasedFeatureNorm(nn.Module):
    """gamma · norm(x) + beta for queries or keys, each part only if the configuration asks for it (equation 6)."""

    def __init__(self, config: RebasedConfig, num_heads: int):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        size = num_heads * config.feature_dim
        self.gamma = nn.Parameter(torch.ones(size)) if config.use_gamma else None
        self.beta = nn.Parameter(torch.zeros(size)) if config.use_beta else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, seq, num_heads * feature_dim) -> (batch, seq, num_heads, feature_dim)"""
        heads = (self.num_heads, self.config.feature_dim)
        if self.config.use_qk_norm and not self.config.qk_norm_per_head:
            return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta, self.config.norm_eps).unflatten(-1, heads)
        if self.config.use_qk_norm:
            x = F.layer_norm(x.unflatten(-1, heads), heads[1:], eps=self.config.norm_eps).flatten(-2)
        if self.gamma is not None:
            x = x * self.gamma
        if self.beta is not None:
            x = x + self.beta
        return x.unflatten(-1, heads)


class RebasedFeatureMap(nn.Module):
    """A learned map of each head's queries or keys to `feature_dim` numbers, and their norm."""

    def __init__(self, config: RebasedConfig, num_heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, config.head_dim, config.feature_dim))
        self.norm = RebasedFeatureNorm(config, num_heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, num_heads, seq, head_dim) -> (batch, seq, num_heads, feature_dim)"""
        return self.norm((x @ self.weight).transpose(1, 2).flatten(-2))


def _attend(
    layer: "RebasedLinearAttention | RebasedMappedAttention",
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    attention_mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    past_key_values: RebasedCache | None,
) -> torch.Tensor:
    """Queries, keys and values (batch, seq, heads, dim) -> (batch, seq, num_attention_heads, head_dim); keeps the state."""
    out: Any = layer.attention(
        *inputs,
        kernel=layer.config.kernel,
        eps=layer.config.attention_eps,
        initial_state=None if past_key_values is None else past_key_values.get_recurrent_state(layer.layer_idx),
        return_state=past_key_values is not None,
        attention_mask=attention_mask,
        segment_ids=segment_ids,
    )
    if past_key_values is not None:
        out, state = out
        past_key_values.update_recurrent_state(state, layer.layer_idx)
    return out


class RebasedLinearAttention(nn.Module):
    """Linear attention with the kernel (q·k)² or its Taylor form, whose cached state has a constant size."""

    def __init__(self, config: RebasedConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * config.feature_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, groups * config.feature_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, groups * config.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * config.head_dim, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm = RebasedFeatureNorm(config, heads)
        self.k_norm = RebasedFeatureNorm(config, groups)
        self.attention = RebasedAttention()

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        past_key_values: RebasedCache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        v = self.v_proj(hidden_states).unflatten(-1, (-1, self.config.head_dim))
        # Autocast keeps norms in float32; the operation wants one dtype and sums in float32 by itself.
        q = self.q_norm(self.q_proj(hidden_states)).to(v.dtype)
        k = self.k_norm(self.k_proj(hidden_states)).to(v.dtype)
        out = _attend(
            self,
            (q, k, v),
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            past_key_values=past_key_values,
        )
        return self.o_proj(out.flatten(-2))


class RebasedMappedAttention(RebasedProjections):
    """
    Linear attention over a learned map of softmax attention's queries and keys, and beside it, if the configuration says so,
    softmax over the last `linear_attention_window` tokens: a gate for each token and head mixes the two.
    """

    def __init__(self, config: RebasedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.q_map = RebasedFeatureMap(config, config.num_attention_heads)
        self.k_map = RebasedFeatureMap(config, config.num_key_value_heads)
        self.attention = RebasedAttention()
        if config.linear_attention_window:
            self.window_gate = nn.Linear(config.hidden_size, config.num_attention_heads)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        window_mask: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: RebasedCache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        query, key, value = self.project(hidden_states, position_embeddings)
        beside = None
        if window_mask is not None:
            seen_keys = self._last_tokens(key, value, attention_mask, past_key_values)
            dropout = self.config.attention_dropout if self.training else 0.0
            beside = window_attention(query, *seen_keys, window_mask, dropout=dropout)
        v = value.transpose(1, 2)
        out = _attend(
            self,
            (self.q_map(query).to(v.dtype), self.k_map(key).to(v.dtype), v),
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            past_key_values=past_key_values,
        )
        if beside is not None:
            # Under autocast each may have a dtype of its own.
            gate = self.window_gate(hidden_states).sigmoid()[..., None]
            out = torch.lerp(out, beside.to(out.dtype), gate.to(out.dtype))
        return self.o_proj(out.flatten(-2))

    def _last_tokens(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: RebasedCache | None,
    ) -> tuple[torch.Tensor, ...]:
        """Keys and values with those of the window before them, (batch, heads, window + seq, head_dim); keeps the last."""
        window = self.config.linear_attention_window
        if attention_mask is not None:
            # Selected, not masked: a weight of zero does not undo a NaN of the padding.
            key, value = (x.masked_fill(~attention_mask[:, None, :, None], 0) for x in (key, value))
        past = None if past_key_values is None else past_key_values.get_conv_state(self.layer_idx)
        both = torch.cat([key, value], dim=-1)
        # Before the first token are zeros, which the mask hides: what is kept has one size.
        both = F.pad(both, (0, 0, window, 0)) if past is None else torch.cat([past, both], dim=2)
        if past_key_values is not None:
            past_key_values.update_conv_state(without_the_rest(both[:, :, -window:], both), self.layer_idx)
        return both.chunk(2, dim=-1)
