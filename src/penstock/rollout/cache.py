"""The KV cache: one pair of preallocated tensors per layer, rows are answers, written in place."""

import torch
from torch import Tensor

from penstock.models.decoder import Decoder

KVCache = list[tuple[Tensor, Tensor]]


def allocate(decoder: Decoder, rows: int, slots: int) -> KVCache:
    """A cache of `slots` positions for `rows` answers: per layer (keys, values), each [rows, H_kv, slots, head_dim]."""
    config, dtype, device = decoder.config, decoder.embed.tokens.dtype, decoder.device
    shape = (2, rows, config.num_kv_heads, slots, config.head_dim)
    both = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers))
    return [(keys, values) for keys, values in both]


def keep_rows(cache: KVCache, rows: Tensor) -> KVCache:
    """The cache of the rows that still write (rows [K] int64): finished answers give their memory back."""
    return [(keys[rows], values[rows]) for keys, values in cache]
