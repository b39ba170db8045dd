"""The KV cache: one pair of preallocated tensors per layer, rows are answers, written in place."""

from torch import Tensor

from penstock.models.decoder import Decoder

KVCache = list[tuple[Tensor, Tensor]]


def allocate(decoder: Decoder, rows: int, slots: int) -> KVCache:
    """A cache of `slots` positions for `rows` answers: per layer (keys, values), each [rows, H_kv, slots, head_dim]."""
    config, like = decoder.config, decoder.head_weight
    shape = (rows, config.num_kv_heads, slots, config.head_dim)
    return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.num_layers)]


def keep_rows(cache: KVCache, rows: Tensor) -> KVCache:
    """The cache of the rows that still write (rows [K] int64): finished answers give their memory back."""
    return [(keys[rows], values[rows]) for keys, values in cache]
