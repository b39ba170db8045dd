"""How much of a product exists at once, and in which precision it is computed. Pure: no torch here.

The code that computes and the plan that counts its memory both read these numbers.
"""

from collections.abc import Sequence
from typing import Literal

Arithmetic = Literal["narrow", "wide sums", "wide"]
"""What 16-bit weights and states are computed in. narrow: in their own dtype, a GPU; wide sums: attention and logits in
fp32, a CPU; wide: products too, a CPU without bf16 instructions (models.linear)."""
HEAD_TILE = 1 << 22
"""Logits that exist at once: 17 MB in fp32, which a processor's last cache holds; models.log_probs."""
GPU_HEAD_TILE = 1 << 24
"""The same on a GPU: a dozen passes over 67 MB of fp32 take about 40 us each, and launching one about 8."""
HEAD_COLUMNS = 2048
"""Words that a tile of logits has at least: products with fewer would wait for memory."""
PRODUCT_TILE = 1 << 22
"""Elements of a weight that are widened or unpacked at once: models.linear."""
PACK_TILE, PACK_WIDTH = 1 << 20, {"int8": 5.1, "fp8": 5.1, "nf4": 11.7}
"""Elements of a weight that are packed at once, and bytes that each takes meanwhile in fp32; from 16 bits 4 more:
models.packed."""
SCORE_TILE = 1 << 20
"""Soft-capped attention scores that exist at once: kernels.capped_attention."""
SINK_COLUMNS = 8
"""Columns that sinks add to a head, of which they need one: kernels want a multiple; models.linear."""
PREFILL_TOKENS = 16384
"""Prompt tokens, padding included, that one forward reads at most: enough to keep a GPU busy."""


def head_tile(read: int, vocabulary: int, arithmetic: Arithmetic) -> tuple[int, int]:
    """Rows and columns of the logits of `read` states that exist at once: all rows if they can be, so that a weight is
    read, and its gradient written, once."""
    tile = GPU_HEAD_TILE if arithmetic == "narrow" else HEAD_TILE
    rows = max(min(read, tile // HEAD_COLUMNS), 1)
    return rows, max(min(vocabulary, tile // rows), 1)


def score_tile(rows: int, heads: int, length: int) -> int:
    """Queries of each head whose scores exist at once."""
    return min(max(SCORE_TILE // (rows * heads * length), 1), length)


def prefills(lengths: Sequence[int]) -> list[slice]:
    """Which of these prompts, in their order, one forward reads."""
    slices, start, longest = [], 0, 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if i > start and longest * (i + 1 - start) > PREFILL_TOKENS:
            slices.append(slice(start, i))
            start, longest = i, length
    return [*slices, slice(start, len(lengths))] if lengths else []


LEAST_SHARED = 1 / 4
"""Of a micro-batch's tokens, so many must be beginnings that rows share (algorithms.functional.computed). Attention
keeps the keys of whole rows beside those that are computed; with less to save, rows would need more memory than the
plan counts."""
