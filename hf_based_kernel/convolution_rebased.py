"""Short convolutions of a ReBased model, which keep their last tokens in the cache."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cache_rebased import RebasedCache, without_the_rest
from .configuration_rebased import RebasedConfig


class RebasedCausalConv(nn.Module):
    """y_i = Σ_t weight_t x_(i + t - kernel_size + 1) per channel, over the tokens of the same segment."""

    def __init__(self, channels: int, config: RebasedConfig, layer_idx: int, bias: bool):
        super().__init__()
        self.layer_idx = layer_idx
        self.weight = nn.Parameter(torch.empty(config.conv_kernel_size, channels))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(
        self,
        x: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        past_key_values: RebasedCache | None = None,
    ) -> torch.Tensor:
        """x: (batch, seq, channels) -> same"""
        if attention_mask is not None:
            x = x.masked_fill(~attention_mask[..., None].bool(), 0)
        seq_len, past_len = x.shape[1], self.weight.shape[0] - 1
        past = None if past_key_values is None else past_key_values.get_conv_state(self.layer_idx)
        extended = F.pad(x, (0, 0, past_len, 0)) if past is None else torch.cat([past.mT, x], dim=1)
        if segment_ids is not None:
            # What was cached belongs to the segment of the first token.
            extended_ids = torch.cat([segment_ids[:, :1].expand(-1, past_len), segment_ids], dim=1)
        if past_key_values is not None:
            kept = extended[:, seq_len:]
            if segment_ids is not None:
                kept = kept.masked_fill((extended_ids[:, seq_len:] != segment_ids[:, -1:])[..., None], 0)
            past_key_values.update_conv_state(without_the_rest(kept, extended).mT, self.layer_idx)
        out: Any = self.bias
        for tap in range(past_len + 1):
            window = extended[:, tap : tap + seq_len]
            if segment_ids is not None:
                # Selected, not multiplied: another sequence's NaN must stay there.
                window = window.masked_fill((extended_ids[:, tap : tap + seq_len] != segment_ids)[..., None], 0)
            out = window * self.weight[tap] if out is None else torch.addcmul(out, window, self.weight[tap])
        return out


class RebasedGatedConv(nn.Module):
    """Short convolution of one half of a widened stream, gated by the other: out(conv(a) · silu(b))."""

    def __init__(self, config: RebasedConfig, layer_idx: int):
        super().__init__()
        width = 2 * config.hidden_size
        self.in_proj = nn.Linear(config.hidden_size, 2 * width)
        self.conv = RebasedCausalConv(width, config, layer_idx, bias=False)
        self.out_proj = nn.Linear(width, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        past_key_values: RebasedCache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        x, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        # The mask comes after the projection, whose bias would otherwise leak from the padding.
        x = self.conv(x, attention_mask=attention_mask, segment_ids=segment_ids, past_key_values=past_key_values)
        return self.out_proj(x * F.silu(gate))


class RebasedBaseConv(nn.Module):
    """Short convolution of the stream times a projection of it, as in the paper's recall models."""

    def __init__(self, config: RebasedConfig, layer_idx: int):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.conv = RebasedCausalConv(config.hidden_size, config, layer_idx, bias=True)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        past_key_values: RebasedCache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        convolved = self.conv(
            hidden_states, attention_mask=attention_mask, segment_ids=segment_ids, past_key_values=past_key_values
        )
        return convolved * self.proj(hidden_states)
