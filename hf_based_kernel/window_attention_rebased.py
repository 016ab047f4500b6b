"""Softmax attention over a short window, in time and memory linear in the length: blocks of queries, each with its own keys."""

import torch
import torch.nn.functional as F


def make_window_mask(
    window: int,
    seq_len: int,
    *,
    seen_tokens: int,
    first_tokens: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """
    Which of the last `window` tokens each token sees: (batch or 1, blocks, queries of a block, keys of a block), bool.

    first_tokens: (batch, seq or 1), see `_first_tokens` of the model
    attention_mask: (batch, seen_tokens + seq), bool

    A block of queries has the keys of its own tokens and of the `window` tokens before them. Everything sees itself.
    """
    # A step has one query. No size of an exported program may be 1 at some lengths only: it has an empty block more.
    rows = 1 if seq_len == 1 else window
    blocks = (seq_len + rows - 1) // rows + int(torch.compiler.is_exporting())
    block = torch.arange(blocks, device=device)[:, None, None] * rows
    # Numbers of the tokens, counted from the first of this pass.
    query = block + torch.arange(rows, device=device)[:, None]
    key = block + torch.arange(window + rows, device=device) - window
    visible = (key <= query) & (query - key < window) & (key >= -seen_tokens)
    if first_tokens is not None:
        first = first_tokens.expand(-1, seq_len)[:, query.clamp(max=seq_len - 1)]
        visible = visible & (key + seen_tokens >= first)
    if attention_mask is not None:
        visible = visible & attention_mask[:, (key + seen_tokens).clamp(0, attention_mask.shape[1] - 1)]
    visible = visible | (key == query)
    return visible if visible.dim() == 4 else visible[None]


def window_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, *, dropout: float = 0.0
) -> torch.Tensor:
    """
    Softmax attention where `mask`, of `make_window_mask`, allows it.

    query: (batch, num_heads, seq, head_dim)
    key: (batch, num_key_value_heads, window + seq, head_dim), those of the tokens before first
    value: as key

    Returns:
        `torch.Tensor` of shape (batch, seq, num_heads, head_dim).
    """
    batch_size, num_heads, seq_len, head_dim = query.shape
    blocks, rows, keys = mask.shape[1:]
    num_groups, group = key.shape[1], num_heads // key.shape[1]
    if rows > 1:
        query, key, value = (F.pad(x, (0, 0, 0, blocks * rows - seq_len)) for x in (query, key, value))
    # (batch, blocks, heads of keys, …): the queries that share keys stand below one another.
    query = query.unflatten(1, (num_groups, group)).unfold(3, rows, rows).permute(0, 3, 1, 2, 5, 4)
    key, value = (x.unfold(2, keys, rows).permute(0, 2, 1, 4, 3) for x in (key, value))
    mask = mask[:, :, None, None].expand(batch_size, -1, 1, group, -1, -1)
    out = F.scaled_dot_product_attention(
        query.reshape(batch_size * blocks, num_groups, group * rows, head_dim),
        key.flatten(0, 1),
        value.flatten(0, 1),
        attn_mask=mask.reshape(batch_size * blocks, 1, group * rows, keys),
        dropout_p=dropout,
    )
    out = out.view(batch_size, blocks, num_groups, group, rows, value.shape[-1]).permute(0, 1, 4, 2, 3, 5)
    out = out.reshape(batch_size, blocks * rows, num_heads, value.shape[-1])
    if torch.compiler.is_exporting():
        # A slice would ask for a proof that there are so many.
        return out.index_select(1, torch.arange(seq_len, device=out.device))
    return out[:, :seq_len]
