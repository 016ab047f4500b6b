"""Softmax attention of a ReBased model: over all tokens or a window, with grouped heads and rotary positions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations import use_kernel_forward_from_hub
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from .cache_rebased import RebasedCache
from .configuration_rebased import RebasedConfig


@use_kernel_forward_from_hub("RMSNorm")
class RebasedRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps), times a weight, computed in float32."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        # The name that kernels from the Hub read.
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * F.rms_norm(hidden_states, self.weight.shape, eps=self.variance_epsilon)


class RebasedProjections(nn.Module):
    """
    The projections of softmax attention, with rotary positions if the configuration has them. The names of the parameters are
    those of Llama, Mistral, Qwen2 and Qwen3.
    """

    def __init__(self, config: RebasedConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        width = config.num_attention_heads * config.head_dim
        key_value_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_out_bias)
        if config.use_softmax_qk_norm:
            self.q_norm = RebasedRMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RebasedRMSNorm(config.head_dim, config.norm_eps)

    def project(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries and keys, and values, (batch, heads, seq, head_dim) each."""
        query, key, value = (
            proj(hidden_states).unflatten(-1, (-1, self.config.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.use_softmax_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        return query, key, value


class RebasedSoftmaxAttention(RebasedProjections):
    """Softmax attention over all tokens or the last `sliding_window`."""

    def __init__(self, config: RebasedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = True
        self.scaling = config.head_dim**-0.5
        # transformers' attention functions read it.
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        is_sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if is_sliding else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: RebasedCache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.project(hidden_states, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        dropout = self.config.attention_dropout if self.training else 0.0
        if query.shape[2] == 1 and attention_mask is None and self.config._attn_implementation == "sdpa":
            # The queries that share keys stand below one another, so that each key is read once.
            rows = query.view(-1, key.shape[1], self.num_key_value_groups, query.shape[-1])
            out = F.scaled_dot_product_attention(rows, key, value, dropout_p=dropout, scale=self.scaling)
            return self.o_proj(out.reshape(*hidden_states.shape[:2], -1)), None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(out.flatten(-2)), weights
