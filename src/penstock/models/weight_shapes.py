"""What a decoder weighs: its weights by name, and the bytes its parts hold while they run. Pure: no torch in here.

The engine's plan reads this instead of a model. The numbers follow `decoder.py` line by line (what autograd keeps, what
is alive at the fullest instant); tests hold them against what a Meter counts, for every family.

N = tokens of a micro-batch (rows * length), D = width, F = feed-forward, E = head_dim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from penstock.memory.chunks import ITEMSIZE, Weight
from penstock.models.config import DecoderConfig
from penstock.planner.activations import Batch, PartWork, Work

FP32 = 4
INDEX = 8
"""Bytes of a token id."""
HEAD_TILE = 1 << 22
"""Logits that exist at once: 17 MB in fp32, which a processor's last cache holds; models.log_probs."""
HEAD_COLUMNS = 2048
"""Words that a tile of logits has at least: products with fewer would wait for memory."""


PRODUCT_TILE = 1 << 22
"""Elements of a weight that are widened or unpacked at once: models.linear."""
Arithmetic = Literal["narrow", "wide sums", "wide"]
"""What 16-bit weights and states are computed in. narrow: in their own dtype, a GPU; wide sums: attention and logits in
fp32, a CPU; wide: products too, a CPU without bf16 instructions (models.linear)."""
BaseDtype = Literal["int8", "nf4"]
PACKED_BLOCK = 64
"""Inputs that share a scale in nf4."""


def packed_shapes(kind: BaseDtype, height: int, width: int) -> list[tuple[tuple[int, ...], str]]:
    """(shape, dtype) of a packed weight [height, width], and of its scales: models.packed."""
    if kind == "int8":
        return [((height, width), "int8"), ((height,), "float32")]
    return [((height, width // 2), "uint8"), ((height, width // math.gcd(width, PACKED_BLOCK)), "float32")]


def groups_of(config: DecoderConfig, dtype: str, *, trained: bool, scalar: bool) -> list[tuple[str, list[Weight]]]:
    """(group, weights) in operational order: what `roles.Role.groups` says of a real model.

    `scalar`: a critic or reward model, with a score head (fp32) in the language-model head's place.
    """
    c = config
    width, heads, kv = c.embed_dim or c.d_model, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def norm(name: str, size: int, kind: str | None = None) -> list[tuple[str, tuple[int, ...]]]:
        bias = [(f"{name}.bias", (size,))] if (kind or c.norm) == "layer" else []
        return [(f"{name}.weight", (size,)), *bias]

    def linear(name: str, inputs: int, outputs: int, bias: bool) -> list[tuple[str, tuple[int, ...]]]:
        return [(f"{name}.weight", (outputs, inputs)), *([(f"{name}.bias", (outputs,))] if bias else [])]

    embed: list[tuple[str, tuple[int, ...]]] = []
    if c.position == "learned":
        embed.append(("embed.positions", (c.max_length + c.position_offset, c.d_model)))
    if c.embed_dim:
        embed += linear("embed.project", width, c.d_model, False)
    if c.embed_norm:
        embed += norm("embed.norm", c.d_model)
    block = [
        *norm("norm1", c.d_model),
        *linear("qkv", c.d_model, heads + 2 * kv, c.qkv_bias),
        *(norm("q_norm", c.head_dim, "rms") + norm("k_norm", c.head_dim, "rms") if c.qk_norm else []),
        *linear("out", heads, c.d_model, c.out_bias),
        *norm("norm2", c.d_model),
        *linear("up", c.d_model, c.d_ff * (2 if c.gated else 1), c.mlp_bias),
        *linear("down", c.d_ff, c.d_model, c.mlp_bias),
    ]
    last = norm("norm", c.d_model) if c.final_norm else []
    if c.embed_dim:
        last += linear("unproject", c.d_model, c.embed_dim, False)
    shapes: list[tuple[str, list[tuple[str, tuple[int, ...]]]]] = []
    shapes += [("tokens", [("embed.tokens", (c.vocab_size, width))]), ("embed", embed)]
    shapes += [(f"blocks.{i}", [(f"blocks.{i}.{name}", shape) for name, shape in block]) for i in range(c.num_layers)]
    shapes.append(("last", last))
    if not (c.tied or scalar):
        shapes.append(("head", [("head", (c.vocab_size, width))]))
    found = [
        (group, [Weight(f"decoder.{name}", shape, dtype, trained) for name, shape in members])
        for group, members in shapes
        if members
    ]
    if scalar:
        found.append(("score", [Weight("score", (1, width), "float32", trained)]))
    return found


def visits_of(config: DecoderConfig, *, scalar: bool) -> list[tuple[str, ...]]:
    """Groups that are needed at once, in order: what `memory.stream.Stream.visits` says of a real model."""
    reads = "score" if scalar else "tokens" if config.tied else "head"
    blocks = [(f"blocks.{i}",) for i in range(config.num_layers)]
    return [("tokens", "embed"), *blocks, ("last", reads)]


def work_of(
    config: DecoderConfig, dtype: str, batch: Batch, *, scalar: bool, entropy: bool = True,
    arithmetic: Arithmetic = "narrow",
) -> Work:  # fmt: skip
    """What the parts of one model hold on the device for a micro-batch of whole rows.

    `entropy`: whether that of every distribution is read beside the log-probabilities.
    """
    c, s = config, ITEMSIZE[dtype]
    tokens = batch.rows * batch.length
    state = tokens * c.d_model * s
    first = PartWork(
        groups=("tokens", "embed"), output=state, saved=_embed(c, tokens, s), forward=_embed(c, tokens, s),
        # a dense gradient of the position table, and the table's rows
        backward=_embed(c, tokens, s) + (c.max_length * c.d_model * s if c.position == "learned" else 0) + state,
    )  # fmt: skip
    wide = arithmetic != "narrow" and s < FP32
    block = _block(c, tokens, batch.length, s, wide)
    if arithmetic == "wide" and s < FP32:
        forward, backward = _widened(c, tokens)
        block = (block[0], block[1] + forward, block[2] + backward)
    blocks = [PartWork((f"blocks.{i}",), state, *block) for i in range(c.num_layers)]
    return Work(
        parts=(first, *blocks),
        context=_context(c, batch.length, s) + tokens * INDEX * 2,
        forward_head=_head(c, tokens, batch.read, s, scalar, entropy, wide, grad=False),
        backward_head=_head(c, tokens, batch.read, s, scalar, entropy, wide, grad=True),
    )


@dataclass(frozen=True)
class _Kept:
    """A norm's account: what autograd keeps of it, its output included, and what it needs while it runs."""

    saved: int
    scratch: int


def _norm(kind: str, rows: int, width: int, s: int) -> _Kept:
    n = rows * width
    if kind == "layer":
        return _Kept(n * s + 2 * rows * FP32, 0)
    wide = n * FP32 if s < FP32 else 0  # rms_norm computes in fp32
    return _Kept(n * s + n * FP32 + wide + rows * FP32, n * FP32 + rows * FP32)


def _embed(c: DecoderConfig, tokens: int, s: int) -> int:
    state = tokens * c.d_model * s
    held = state
    if c.embed_dim:
        held += tokens * c.embed_dim * s
    if c.position == "learned":
        held += state
    if c.embed_norm:
        held += _norm(c.norm, tokens, c.d_model, s).saved
    return held


def _block(c: DecoderConfig, tokens: int, length: int, s: int, wide: bool) -> tuple[int, int, int]:
    """(saved, forward, backward) of one block; see PartWork."""
    state, inner = tokens * c.d_model * s, tokens * c.d_ff * s
    queries, keys = tokens * c.num_heads * c.head_dim * s, tokens * c.num_kv_heads * c.head_dim * s
    norm = _norm(c.norm, tokens, c.d_model, s)
    projected = queries + 2 * keys
    turned = mixing = 0
    if c.qk_norm:
        rows = tokens * (c.num_heads + c.num_kv_heads)
        normed = _norm("rms", rows, c.head_dim, s)
        turned += normed.saved
    if c.position == "rotary":
        turned += queries + keys
        part = c.rotary_dim / c.head_dim
        mixing = int(queries * (2.5 * part if part == 1 else 1 + 2.5 * part))
    attended = queries + tokens * c.num_heads * FP32  # and the sums that attention's backward needs
    if c.position == "rotary":
        attended += queries  # turned queries lie head by head, and what they become is put back row by row
    # of q, k, v and the bias, and what attention makes of them
    copies = (projected + queries) * FP32 // s + FP32 * _bias(c, length) if wide else 0
    attention = norm.saved + (attended + copies if wide else projected + turned + attended)
    raised = 2 * inner if c.gated else inner
    # what the activation keeps: relu its result, gelu its argument too, a gate all four
    kept = inner if c.activation == "relu" and not c.gated else raised + inner * (2 if c.gated else 1)
    mlp = norm.saved + kept
    # the sums of the residual stream: behind attention (none where both halves read x), and the output
    sums = 1 if c.parallel_residual else 2
    saved = attention + mlp + sums * state
    if not c.pre_norm:
        saved += state  # both norms read a sum and the second writes the output
    loose = 2 * state  # what attention and MLP returned: local names until the block returns
    # the gradients behind and before the activation; what it keeps goes when they are there, but relu's is down's too
    slopes = raised if c.gated else inner * (2 if c.activation == "relu" else 1)
    backward = saved + max(slopes, loose)
    before_mlp = 2 * state + norm.saved
    forward = max(
        before_mlp + (raised + 2 * inner if c.gated else 2 * inner),
        before_mlp + inner + 2 * state,
        state + projected + turned + mixing + attended + copies + state,
    )
    return saved, forward, backward


def _widened(c: DecoderConfig, tokens: int) -> tuple[int, int]:
    """fp32 copies that the down projection needs, a block's largest, forward and backward: of its rows, and of a tile
    of its weight with its share of the result; the states' gradient is summed over tiles beside the next one's part."""
    height = min(max(PRODUCT_TILE // c.d_ff, 1), c.d_model)
    tile = height * c.d_ff + tokens * height
    return FP32 * (tokens * c.d_ff + tile), FP32 * (tokens * c.d_ff * (1 if height == c.d_model else 2) + tile)


def _context(c: DecoderConfig, length: int, s: int) -> int:
    """What positions need: rotary tables, or ALiBi's and windows' biases."""
    held = length * INDEX
    if c.position == "rotary":
        held += 2 * length * c.rotary_dim * s
    kinds = {window for window in (c.windows or (0,)) if 0 < window < length or c.position == "alibi"}
    return held + len(kinds) * _bias(c, length) * s


def _bias(c: DecoderConfig, length: int) -> int:
    """Elements of what attention adds to its scores, where it adds anything."""
    if c.position != "alibi" and not any(0 < window < length for window in c.windows or ()):
        return 0
    return (c.num_heads if c.position == "alibi" else 1) * length * length


def head_tile(read: int, vocabulary: int) -> tuple[int, int]:
    """Rows and columns of the logits of `read` states that exist at once: all rows if they can be, so that a weight is
    read, and its gradient written, once."""
    rows = max(min(read, HEAD_TILE // HEAD_COLUMNS), 1)
    return rows, max(min(vocabulary, HEAD_TILE // rows), 1)


def _head(c: DecoderConfig, tokens: int, read: int, s: int, scalar: bool, entropy: bool, wide: bool, grad: bool) -> int:
    """The last norm and what is read behind it, for `read` states of the micro-batch."""
    width = c.embed_dim or c.d_model
    hidden = _norm(c.norm, tokens, c.d_model, s).saved if c.final_norm else 0
    if c.embed_dim:
        hidden += tokens * width * s
    states = read * width * s
    if scalar:
        back = 2 * tokens * width * s if grad else 0
        return hidden + states + read * width * FP32 * (2 if grad else 1) + back
    rows, columns = head_tile(read, c.vocab_size)
    logits = rows * columns
    narrow = logits * s if s < FP32 else 0  # a product's own dtype, on the way to fp32 and back
    partial = 0
    if wide:  # fp32 copies of the states, and of the weight a tile at a time with its share of the product
        height = max(min(PRODUCT_TILE // width, columns), 1)
        narrow, partial = (rows + width) * height * FP32, (2 * rows + height) * width * FP32
        states += read * width * FP32
    numbers = read * FP32 * (4 if entropy else 3)
    forward = hidden + states + numbers + logits * FP32 + max(logits * FP32 if entropy else 0, narrow)
    if not grad:
        return forward
    backs = read * width * FP32  # summed over the tiles before they are rounded
    slopes = hidden + states + backs + numbers + logits * FP32 + max(narrow + rows * width * s, partial)
    rounded = hidden + states + backs + read * width * s * (s < FP32) + numbers
    return max(forward, slopes, rounded, hidden + 2 * states + numbers + tokens * width * s)


def count_of(config: DecoderConfig, *, scalar: bool) -> int:
    """Parameters of a model."""
    return sum(one.numel for _, ws in groups_of(config, "float32", trained=True, scalar=scalar) for one in ws)


def cache_of(config: DecoderConfig, dtype: str, rows: int, slots: int) -> int:
    """Bytes of a KV cache: rollout.cache.KVCache."""
    c = config
    return 2 * c.num_layers * rows * c.num_kv_heads * slots * c.head_dim * ITEMSIZE[dtype]


PREFILL_TOKENS = 16384
"""Prompt tokens, padding included, that one forward reads: enough to keep a GPU busy, and what it holds has an end."""


def prefills(lengths: Sequence[int]) -> list[slice]:
    """Which of these prompts, in their order, are read together."""
    found, start, longest = [], 0, 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if i > start and longest * (i + 1 - start) > PREFILL_TOKENS:
            found.append(slice(start, i))
            start, longest = i, length
    return [*found, slice(start, len(lengths))] if lengths else []


def sampling_of(config: DecoderConfig, dtype: str, rows: int) -> int:
    """Bytes that choosing one token per row holds at once: rollout.sampling.pick."""
    return rows * config.vocab_size * (ITEMSIZE[dtype] + 3 * FP32)


def flops_of(config: DecoderConfig, lengths: Sequence[tuple[int, int]]) -> float:
    """Floating-point operations of a forward pass: products of weights, and of queries with the keys they see.

    `lengths`: (tokens computed, tokens seen by the last of them) per row.
    """
    c = config
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    weights = c.d_model * (heads + 2 * kv) + heads * c.d_model + c.d_model * c.d_ff * (3 if c.gated else 2)
    total = 0.0
    for computed, seen in lengths:
        pairs = computed * (seen - computed) + computed * (computed + 1) / 2
        total += c.num_layers * (2.0 * weights * computed + 4.0 * heads * pairs)
    return total


def head_flops(config: DecoderConfig, read: int) -> float:
    """Of the language-model head for so many states."""
    return 2.0 * read * (config.embed_dim or config.d_model) * config.vocab_size
