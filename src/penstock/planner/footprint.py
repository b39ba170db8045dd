"""What a decoder's activations take on the device in bytes, and its products in operations. Pure: no torch here.

The numbers follow `models/decoder.py` line by line (what autograd keeps, what is alive at the fullest instant); tests
compare them with what a Meter counts, for every family.

N = tokens of a micro-batch (rows * length), D = width, F = feed-forward, E = head_dim.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from penstock.memory.chunks import ITEMSIZE
from penstock.models.config import DecoderConfig
from penstock.models.lora_targets import LoraSpec, LoraTarget, adapted_targets, group_of, groups_of
from penstock.models.tiling import (
    PACK_TILE,
    PACK_WIDTH,
    PRODUCT_TILE,
    SINK_COLUMNS,
    Arithmetic,
    head_tile,
    score_tile,
)  # fmt: skip
from penstock.models.weight_shapes import BaseDtype
from penstock.planner.activations import Batch, PartWork, Work

FP32 = 4
INDEX = 8
"""Bytes of a token id."""


def work_of(
    config: DecoderConfig, dtype: str, spec: LoraSpec | None, batch: Batch, *, scalar: bool, entropy: bool = True,
    packed: BaseDtype | None = None, arithmetic: Arithmetic = "narrow",
) -> Work:  # fmt: skip
    """Bytes that the parts of one model hold on the device for a micro-batch of whole rows.

    spec: its adapters (models.lora, linear.add_to). packed: the dtype of its blocks' frozen products. scalar: a score
    head in place of the language-model head. entropy: whether that of every distribution is read too.
    """
    s = ITEMSIZE[dtype]
    work = _plain_work(config, dtype, batch, scalar=scalar, entropy=entropy, arithmetic=arithmetic)
    if spec is None and packed is None:
        return work
    tokens = batch.rows * batch.length
    adapters = {} if spec is None else _adapters(config, spec, scalar, tokens, s)
    parts = []
    for i, part in enumerate(work.parts):
        own = adapters.get(part.groups[-1], {})
        saved = sum(each.saved for each in own.values())
        most = [max((getattr(each, name) for each in own.values()), default=0) for name in ("forward", "backward")]
        if not i:  # a frozen table has no gradient
            forward, backward = part.forward + most[0], part.forward + saved + most[1]
        elif has_experts_in(config, i - 1):
            unpacking = _unpacking(config.d_model, _raised(config), tokens, s, packed)
            forward, backward = part.forward + most[0] + unpacking, part.backward + saved + most[1] + unpacking
        else:
            forward = part.forward + _beyond(config, tokens, s, part.forward, own, packed)
            slopes = part.backward - part.saved
            backward = (
                part.saved + saved + max(slopes, _before_down(config, tokens, s, slopes, own, packed, arithmetic))
            )
        parts.append(dataclasses.replace(part, saved=part.saved + saved, forward=forward, backward=backward))
    head = adapters["head"][""].saved * batch.read // tokens if "head" in adapters else 0
    return dataclasses.replace(
        work, parts=tuple(parts), forward_head=work.forward_head + head, backward_head=work.backward_head + 2 * head
    )


def copy_of(config: DecoderConfig, dtype: str, spec: LoraSpec | None, packed: BaseDtype | None) -> tuple[int, int]:
    """Bytes of models.surgery.packed_copy, where a copy answers, and those that making it takes for a moment."""
    if packed is None:
        return 0, 0
    groups = groups_of(config, dtype, spec, trained=False, scalar=False, packed=packed)
    weights = [weight for _, members in groups for weight in members]
    nbytes = sum(weight.numel * ITEMSIZE[weight.dtype] for weight in weights)
    numels = [weight.numel * (2 if weight.dtype == "uint8" else 1) for weight in weights if ITEMSIZE[weight.dtype] == 1]
    width = PACK_WIDTH[packed] + (4 if ITEMSIZE[dtype] < FP32 else 0)
    return nbytes, int(min(max(numels), PACK_TILE) * width)


@dataclass(frozen=True)
class _Adapter:
    """Bytes of a product's adapters: what autograd keeps, and what they hold for a moment beside it."""

    saved: int
    forward: int
    low: int
    """The gradient that comes back through A."""
    backward: int


def _adapters(
    config: DecoderConfig, spec: LoraSpec, scalar: bool, tokens: int, s: int
) -> dict[str, dict[str, _Adapter]]:
    """By group and product."""
    by_product: dict[tuple[str, str], list[LoraTarget]] = {}
    for target in adapted_targets(config, spec, scalar):
        # the experts of a block are alike: together they are one product of all the tokens that they are called for
        if target.expert in (None, 0):
            name = target.ours.rpartition(".")[2] if target.expert is None else target.theirs
            by_product.setdefault((group_of(target).partition(".experts.")[0], name), []).append(target)
    adapters: dict[str, dict[str, _Adapter]] = {}
    for (group, name), targets in by_product.items():
        calls = 1 if targets[0].expert is None else config.experts_per_token
        narrow = tokens * max(map(spec.rank_of, targets)) * s  # A x, scaled: saved for B's gradient
        high = tokens * sum(target.height for target in targets) * s
        low = tokens * targets[0].width * s  # before it, B's, scaled
        adapters.setdefault(group, {})[name] = _Adapter(
            narrow * len(targets) * calls,
            high * (1 if len(targets) == 1 else 2) + 2 * narrow,
            low + 2 * narrow,
            max(high, low) + 2 * narrow,
        )
    return adapters


def _raised(c: DecoderConfig) -> int:
    """Outputs of the widest product of an MLP or an expert."""
    widest = max(c.expert_ff if has_experts_in(c, i) else c.d_ff for i in range(c.num_layers))
    return widest * (2 if c.gated else 1)


def _unpacking(inputs: int, outputs: int, result: int, s: int, packed: BaseDtype | None) -> int:
    """Bytes that a packed product holds for a moment: what a tile of its weight is unpacked from and into, or the tile
    and its part of the result, of which there are `result` numbers for each output."""
    if packed is None:
        return 0
    tile = PRODUCT_TILE * (2 if packed == "nf4" else 1)  # linear._tiles: of nf4, two weights a byte
    outputs = min(max(tile // inputs, 1), outputs)
    return outputs * s * (inputs + max(inputs, result))


def _beyond(
    c: DecoderConfig, tokens: int, s: int, fullest: int, own: Mapping[str, _Adapter], packed: BaseDtype | None
) -> int:
    """Bytes by which unpacking and adapters pass the fullest instant of a block's forward: each where its product is,
    whose result is there and what comes later is not."""
    state, inner = tokens * c.d_model * s, tokens * c.d_ff * s
    queries, keys = tokens * c.num_heads * c.head_dim * s, tokens * c.num_kv_heads * c.head_dim * s
    projected, raised = queries + 2 * keys, c.d_ff * (2 if c.gated else 1)
    rooms = {  # of each product: inputs, outputs, bytes between its instant and the fullest one
        "qkv": (c.d_model, projected // (tokens * s), fullest - state - projected),
        "out": (
            queries // (tokens * s), c.d_model,
            fullest - 2 * (state + projected + queries) - tokens * c.num_heads * FP32,
        ),
        "up": (c.d_model, raised, inner * (2 if c.gated else 1)),
        "down": (c.d_ff, c.d_model, inner - state),
    }  # fmt: skip
    return max(
        0,
        *(
            max(_unpacking(inputs, outputs, tokens, s, packed), own[name].forward if name in own else 0) - max(room, 0)
            for name, (inputs, outputs, room) in rooms.items()
        ),
    )


def _before_down(
    c: DecoderConfig, tokens: int, s: int, slopes: int, own: Mapping[str, _Adapter], packed: BaseDtype | None,
    arithmetic: Arithmetic,
) -> int:  # fmt: skip
    """Bytes of a block's backward beside what is saved, where the gradient of what its last product reads is made: that
    of the frozen weight, and before it the adapters', and their sum. slopes: without all that."""
    inner = tokens * c.d_ff * s
    plain = inner if arithmetic == "narrow" else slopes
    if packed:  # each tile's part is added to the sum
        rows = min(max(PRODUCT_TILE * (2 if packed == "nf4" else 1) // c.d_ff, 1), c.d_model)
        tile = rows * c.d_ff * s
        plain = max(plain, tile + max(tile, inner) + (inner if rows < c.d_model else 0))
    return max(plain, 2 * inner) + own["down"].low if "down" in own else plain


def _plain_work(
    config: DecoderConfig, dtype: str, batch: Batch, *, scalar: bool, entropy: bool = True,
    arithmetic: Arithmetic = "narrow",
) -> Work:  # fmt: skip
    c, s = config, ITEMSIZE[dtype]
    tokens = batch.rows * batch.length
    state = tokens * c.d_model * s
    first = PartWork(
        groups=("tokens", "embed"), output=state, saved=_embed(c, tokens, s), forward=_embed(c, tokens, s),
        # the gradients of the table's rows, which add up in fp32
        backward=_embed(c, tokens, s) + state + (tokens * (c.embed_dim or c.d_model) * FP32 if s < FP32 else 0),
    )  # fmt: skip
    masked = [c.position == "alibi" or 0 < window < batch.length for window, _ in c.kinds]
    kinds = [(rotates, has_experts_in(c, i), masked[i]) for i, (_, rotates) in enumerate(c.kinds)]
    work = {}
    for rotates, experts, mask in set(kinds):
        # see [Note: shared heads on a GPU] in models.linear
        apart = arithmetic == "narrow" and c.num_kv_heads < c.num_heads and (mask or s == FP32)
        work[rotates, experts, mask] = _block(c, tokens, batch.length, s, rotates, experts, arithmetic, apart)
    blocks = [PartWork((f"blocks.{i}",), state, *work[kind]) for i, kind in enumerate(kinds)]
    return Work(
        parts=(first, *blocks),
        context=_context(c, batch.length, s) + tokens * INDEX * 2,
        forward_head=_head(c, tokens, batch.read, s, scalar, entropy, arithmetic, grad=False),
        backward_head=_head(c, tokens, batch.read, s, scalar, entropy, arithmetic, grad=True),
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
    return _Kept(n * s, n * FP32 + rows * FP32)


def _norm_backward(c: DecoderConfig, tokens: int, s: int) -> int:
    """Bytes that the backward of an RMSNorm holds beside what was kept: fp32 states, a gradient, and a part of it; on a
    GPU under an offset those of torch's own too."""
    n = tokens * c.d_model * FP32
    return 0 if c.norm != "rms" else 6 * n if c.norm_offset else (3 if s < FP32 else 2) * n


def _embed(c: DecoderConfig, tokens: int, s: int) -> int:
    state = tokens * c.d_model * s
    saved = state
    if c.embed_dim:
        saved += tokens * c.embed_dim * s
    if c.position == "learned":
        saved += state
    if c.embed_norm:
        saved += _norm(c.norm, tokens, c.d_model, s).saved
    return saved


def has_experts_in(c: DecoderConfig, i: int) -> bool:
    """Whether block i has experts in the place of an MLP."""
    return c.num_experts > 0 and i not in c.dense_layers


def _mlp(c: DecoderConfig, tokens: int, s: int) -> tuple[int, int, int]:
    """Of an MLP: what autograd keeps, what a forward holds at most, the gradients behind and before the activation."""
    inner = tokens * c.d_ff * s
    raised = 2 * inner if c.gated else inner
    # what the activation keeps: relu its result, gelu its argument too, a gate all four
    kept = inner if c.activation == "relu" and not c.gated else raised + inner * (2 if c.gated else 1)
    # what the activation keeps goes when its gradients are there, but relu's is down's too
    slopes = raised if c.gated else inner * (2 if c.activation == "relu" else 1)
    return kept, raised + 2 * inner if c.gated else 2 * inner, slopes


def _experts(c: DecoderConfig, tokens: int, s: int) -> tuple[int, int, int]:
    """The same of a mixture of experts (models.moe.experts). One expert has all tokens at worst."""
    pairs = tokens * c.experts_per_token
    sorted_states, inner = pairs * c.d_model * s, pairs * c.expert_ff * s
    routed = pairs * (3 * INDEX + FP32) + (tokens * c.d_model * FP32 if s < FP32 else 0)  # and the router's states
    routed += 0 if c.norm_topk else tokens * c.num_experts * FP32
    routed += tokens * c.num_experts * FP32 if c.router_aux_loss_coef else 0
    per = 7 if c.clamp else 4 if c.gated else 2  # tensors of an expert's width: clamped_glu keeps seven
    kept = routed + 2 * sorted_states + inner * per
    largest = tokens * c.expert_ff * s * per
    sorting = tokens * c.num_experts * (2 * FP32 + 2 * INDEX)
    forward = routed + max(sorting, 2 * sorted_states + max(largest, sorted_states))
    return kept, forward, 2 * sorted_states


def _block(
    c: DecoderConfig, tokens: int, length: int, s: int, rotates: bool, experts: bool, arithmetic: Arithmetic,
    apart: bool,
) -> tuple[int, int, int]:  # fmt: skip
    """(saved, forward, backward) of one block; see PartWork. apart: heads that share keys are attended to apart."""
    wide = arithmetic != "narrow" and s < FP32
    state = tokens * c.d_model * s
    queries, keys = tokens * c.num_heads * c.head_dim * s, tokens * c.num_kv_heads * c.head_dim * s
    norm = _norm(c.norm, tokens, c.d_model, s)
    projected = queries + 2 * keys
    turned, mixing = _turned(c, tokens, s, rotates)
    normed = projected if c.qk_norm else 0  # by norms that read them
    attended = queries + tokens * c.num_heads * FP32  # and the sums that attention's backward needs
    apart = apart and not c.attention_softcap
    if rotates or apart:
        attended += queries  # turned queries lie head by head, and what they become is put back row by row
    if c.sinks:  # copies with columns of their own, and of what attention makes of them
        attended += (projected + queries) * SINK_COLUMNS // c.head_dim + projected
    # of q, k, v and the bias, and what attention makes of them
    copies = (projected + queries) * FP32 // s + FP32 * _bias(c, length) if wide else 0
    copies += queries if apart else 0  # what attention makes of them, head by head; keys are repeated by a stride of 0
    # values have a copy of their own where heads are apart; without norms the product that they come of is then let go
    turned += keys if apart and c.qk_norm else 0
    attention = norm.saved + attended + (normed + copies if wide else projected + turned)
    if c.sinks and not wide:  # which keeps the copies alone
        attention -= projected + turned
    kept, rising, slopes = (_experts if experts else _mlp)(c, tokens, s)
    mlp = norm.saved + kept
    # the sums of the residual stream: behind attention (none where both halves read x), and the output
    sums = 1 if c.parallel_residual else 2
    saved = attention + mlp + sums * state
    if c.out_norms:  # they keep what they read, and not what they write; without others before, x is read by products
        saved += 2 * norm.saved - (0 if c.pre_norm else 2 * norm.saved)
    elif not c.pre_norm:
        saved += state  # both norms read a sum and the second writes the output
    loose = 2 * state  # what attention and MLP returned: local names until the block returns
    widening, adding = _widened(c, tokens, c.expert_ff if experts else c.d_ff, s, arithmetic)
    inner = tokens * c.d_ff * s
    at_down = rising if experts else 3 * inner if c.gated else inner  # what the last product finds
    backward = saved + max(slopes, loose, (slopes if experts else 0) + adding)
    backward = max(backward, saved - (0 if c.out_norms else norm.saved) + _norm_backward(c, tokens, s))
    before_mlp = 2 * state + norm.saved
    capped = 0
    if c.attention_softcap:
        rows = tokens // length
        tile = rows * c.num_heads * score_tile(rows, c.num_heads, length) * length
        capped = tile * (2 * FP32 + 1)
        # scores, their tanh, their gradient; gradients of q, k and v in fp32
        backward = max(backward, saved - mlp + 2 * state + 3 * tile * FP32 + projected * FP32 // s * 2)
    forward = max(
        before_mlp + rising,
        before_mlp + at_down + widening + (0 if experts else state),
        before_mlp + (0 if experts else inner) + 2 * state,
        state + projected + turned + mixing + attended + copies + state,
        state + projected + turned + attended + copies + capped,
        (2 * state + 2 * tokens * c.d_model * FP32 + norm.scratch) if c.out_norms else 0,
    )
    return saved, forward, backward


def _turned(c: DecoderConfig, tokens: int, s: int, rotates: bool) -> tuple[int, int]:
    """Queries and keys that are normed or turned, and what turning takes for a moment."""
    queries, keys = (tokens * heads * c.head_dim * s for heads in (c.num_heads, c.num_kv_heads))
    turned = queries + keys if c.qk_norm or rotates else 0
    part = c.rotary_dim / c.head_dim
    return turned, int(queries * (2.5 * part if part == 1 else 1 + 2.5 * part)) if rotates else 0


def _widened(c: DecoderConfig, tokens: int, d_ff: int, s: int, arithmetic: Arithmetic) -> tuple[int, int]:
    """What the down projection, a block's largest, takes besides where it is widened: forward, and backward with the
    gradient of its input. fp32 copies of its rows, and of a tile of its weight with its share of the result; the
    states' gradient is summed over tiles beside the next one's part. A CPU's gradients of weights come in tiles too."""
    inner = tokens * d_ff * s
    if arithmetic == "narrow" or s == FP32:
        return 0, 0
    if arithmetic == "wide sums":
        return 0, inner + s * min(PRODUCT_TILE, c.d_model * d_ff * (2 if c.gated else 1))
    height = min(max(PRODUCT_TILE // d_ff, 1), c.d_model)
    rows, tile = FP32 * tokens * d_ff, FP32 * (height * d_ff + tokens * height)
    return rows + tile, tile + (rows + inner if height == c.d_model else 2 * rows)


def _context(c: DecoderConfig, length: int, s: int) -> int:
    """What positions need: rotary tables, or ALiBi's and windows' biases."""
    nbytes = length * INDEX
    if c.position == "rotary":
        tables = {window > 0 and c.window_rope != () for window, rotates in c.kinds if rotates}
        nbytes += 2 * length * c.rotary_dim * s * len(tables)
        nbytes += length * s if c.scales_queries(length) else 0
    kinds = {kind for kind in c.kinds if 0 < kind[0] < length or c.position == "alibi"}
    return nbytes + len(kinds) * _bias(c, length) * s


def _bias(c: DecoderConfig, length: int) -> int:
    """Elements of what attention adds to its scores, where it adds anything."""
    if c.attention_softcap:
        return 0
    if c.position != "alibi" and not any(0 < window < length for window in c.windows or ()):
        return 0
    return (c.num_heads if c.position == "alibi" else 1) * length * length


def _head(
    c: DecoderConfig, tokens: int, read: int, s: int, scalar: bool, entropy: bool, arithmetic: Arithmetic, grad: bool
) -> int:
    """The last norm and what is read behind it, for `read` states of the micro-batch."""
    width = c.embed_dim or c.d_model
    hidden = _norm(c.norm, tokens, c.d_model, s).saved if c.final_norm else 0
    if c.embed_dim:
        hidden += tokens * width * s
    states = read * width * s
    norm_backward = _norm_backward(c, tokens, s) if grad else 0
    if scalar:
        back = 2 * tokens * width * s if grad else 0
        return max(hidden + states + read * width * FP32 * (2 if grad else 1) + back, norm_backward)
    rows, columns = head_tile(read, c.vocab_size, arithmetic)
    logits = rows * columns
    narrow = logits * s if s < FP32 else 0  # a product's own dtype, on the way to fp32 and back
    partial = 0
    if arithmetic != "narrow" and s < FP32:
        # fp32 copies of the states, and of the weight a tile at a time with its share of the product
        height = max(min(PRODUCT_TILE // width, columns), 1)
        narrow, partial = (rows + width) * height * FP32, (2 * rows + height) * width * FP32
        states += read * width * FP32
    numbers = read * FP32 * (4 if entropy else 3)
    forward = hidden + states + numbers + logits * FP32 + max(logits * FP32 if entropy else 0, narrow)
    if not grad:
        return forward
    backs = read * width * FP32  # summed over the tiles before they are rounded
    bent = logits * FP32 if c.logit_softcap else 0  # how steep its tanh is
    slopes = hidden + states + backs + numbers + logits * FP32 + bent + max(narrow + rows * width * s, partial)
    rounded = hidden + states + backs + read * width * s * (s < FP32) + numbers
    return max(forward, slopes, rounded, hidden + 2 * states + numbers + tokens * width * s, norm_backward)


def with_top_k(work: Work, config: DecoderConfig, read: int, k: int, arithmetic: Arithmetic) -> Work:
    """The same where k tokens are read of each state, or sought (models.log_probs), and compared."""
    rows, _ = head_tile(read, config.vocab_size, arithmetic)
    column, indices = read * (k + 1) * FP32, rows * k * (2 * INDEX + 1)
    sought = top_k_bytes(read, k) + 3 * rows * k * 2 * INDEX
    return dataclasses.replace(
        work,
        forward_head=work.forward_head + max(sought, 2 * column + indices),
        # the last: of --sft-coef, which reads the states once more
        backward_head=work.backward_head + DIVERGENCE * column + indices + read * config.d_model * FP32,
    )


DIVERGENCE = 11
"""Tensors of k + 1 numbers per state: five of log_probs' backward, and what the graph of the JSD keeps."""


def top_k_bytes(read: int, k: int) -> int:
    """What a teacher says of `read` states: k ids, and log-probabilities of these and the rest."""
    return read * (k * INDEX + (k + 1) * FP32) if k else 0


def cache_of(config: DecoderConfig, dtype: str, rows: int, slots: int) -> int:
    """Bytes of a KV cache: rollout.cache.KVCache."""
    c = config
    return 2 * c.num_layers * rows * c.num_kv_heads * slots * c.head_dim * ITEMSIZE[dtype]


def sampling_of(
    config: DecoderConfig, dtype: str, rows: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> int:
    """Bytes that choosing one token per row holds at once: rollout.sampling.pick, line by line. Of a logit 12 to 34."""
    logits = (ITEMSIZE[dtype] if ITEMSIZE[dtype] < FP32 else 0) + FP32 * (1 + (temperature not in (0.0, 1.0)))
    kept = FP32 if 0 < top_k < config.vocab_size else 0  # log-probabilities of those that are
    most = logits + FP32 + max(kept + FP32, kept and kept + 1)  # and the sums of probabilities, or who is kept
    if top_p < 1.0:  # ordered, with their places; then sums, and sums without their own
        most = max(most, logits + FP32 + kept + (FP32 + INDEX) + 2 * FP32)
    return rows * config.vocab_size * most


def recorded_of(config: DecoderConfig, dtype: str, rows: int, prompt: int, length: int) -> int:
    """Bytes of all decoding steps that rollout.cuda_graphs records while so many answers grow to `length` tokens, and
    fewer of them run: a step's own, which all share, and the states that each returns. 0: it records none."""
    c = config
    if c.foreign or c.num_experts:
        return 0
    batch = Batch(rows, 1, rows)
    step = max(part.forward for part in _plain_work(c, dtype, batch, scalar=False).parts)
    sizes = [count for count in (1, 2, 4, *range(8, rows, 8)) if count < rows]
    longer = max(length - 1, 1).bit_length() - max(prompt, 1).bit_length() + 1
    return step + (sum(sizes) + longer * rows) * c.d_model * ITEMSIZE[dtype]


def flops_of(config: DecoderConfig, lengths: Sequence[tuple[int, int]]) -> float:
    """Floating-point operations of a forward pass: products of weights, and of queries with the keys they see.

    `lengths`: (tokens computed, tokens seen by the last of them) per row.
    """
    c = config
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    weights = c.num_layers * (c.d_model * (heads + 2 * kv) + heads * c.d_model)
    for i in range(c.num_layers):  # of experts, those that one token calls
        has_experts = has_experts_in(c, i)
        inner = c.experts_per_token * c.expert_ff if has_experts else c.d_ff
        weights += c.d_model * (inner * (3 if c.gated else 2) + (c.num_experts if has_experts else 0))
    total = 0.0
    for computed, seen in lengths:
        pairs = computed * (seen - computed) + computed * (computed + 1) / 2
        total += 2.0 * weights * computed + c.num_layers * 4.0 * heads * pairs
    return total


def head_flops(config: DecoderConfig, read: int) -> float:
    """Of the language-model head for so many states."""
    return 2.0 * read * (config.embed_dim or config.d_model) * config.vocab_size
