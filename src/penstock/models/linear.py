"""Matrix products of weights: gradients go to their place, and bf16 is fast on processors without bf16 instructions.

Where a weight's gradient has room already (a sink made it), the product is added there: autograd would fill a tensor of
the weight's size and then add it. Most laptop CPUs (AVX2) multiply bf16 in software, 10 to 60 times slower than fp32:
there weights are stored in bf16 and widened where they are used, a tile of rows at a time, and only for the call.

On every CPU attention and the logits are not rounded to bf16 inside: the engine decodes them in fp32 (decode.c and
products.c), and what the trainer says of the same tokens is then the same but for a rare rounding. With torch's bf16
attention, which rounds probabilities, log-probabilities differ by 0.01 in the mean; in fp32 by 0.0001.

[Note: shared heads on a GPU] Where query heads share keys, torch 2.11 to 2.13 has one kernel for them on a GPU, flash
attention: in 16 bits and without a mask. With a mask (decoding, windows) or in fp32 it would write all scores to
memory. So heads that share a key become what those kernels know: of one token, the queries of one head; of many, the
heads of a row of their own, whose one key is repeated with a stride of 0, without memory. `benchmarks gpu --only
attention` says which kernels ran.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.kernels import capped_attention, cpu_ops
from penstock.models import packed
from penstock.models.positions import RaggedRows
from penstock.models.tiling import PRODUCT_TILE, SINK_COLUMNS, Arithmetic, score_tile

FEW = 16
NORM_TILE = 1 << 18
"""Elements of the states that a norm's gradients are summed over at once."""
_ASSUMED: contextvars.ContextVar[Arithmetic | None] = contextvars.ContextVar("arithmetic", default=None)


@contextlib.contextmanager
def computing(arithmetic: Arithmetic) -> Iterator[None]:
    """Inside, everything is computed as on a machine of that kind: a dry run is of another machine than this."""
    token = _ASSUMED.set(arithmetic)
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def arithmetic_of(device_type: str) -> Arithmetic:
    """How a device of this machine computes with 16-bit weights and states."""
    if assumed := _ASSUMED.get():
        return assumed
    if device_type != "cpu":
        return "narrow"
    return "wide" if _cpu_is_slow() else "wide sums"


def slow_in_bf16(device_type: str) -> bool:
    """Whether bf16 matrix products have no instructions of their own there."""
    return arithmetic_of(device_type) == "wide"


def sums_in_fp32(device_type: str) -> bool:
    """Whether attention and logits of bf16 states are computed in fp32 there."""
    return arithmetic_of(device_type) != "narrow"


@functools.cache
def _cpu_is_slow() -> bool:
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
    """x [..., I], weight [O, I], bias [O] -> [..., O], as torch's own; `scales` where the weight is packed: it is
    given back its values a tile of rows at a time (models.packed).

    With x in fp32 and a weight in bf16 nothing is rounded on the way out.
    """
    if torch.compiler.is_exporting():  # one plain op in the graph, for which autochunk.api calls us again
        return F.linear(x, weight, bias)
    learning = torch.is_grad_enabled()
    rows = x.shape[:-1].numel()
    if rows <= cpu_ops.FEW and cpu_ops.ready(x.device, x.dtype, weight.dtype):
        return cpu_ops.product(x, weight, bias, scales)
    if not learning and cpu_ops.unrounded(x, weight):
        return cpu_ops.product(x, weight, bias)
    if scales is not None:
        if not learning and packed.multiplied_in_fp8(x, weight):
            return packed.fp8_product(x, weight, bias, scales)
        return _Product.apply(x, weight, bias, x.dtype == torch.bfloat16 and slow_in_bf16(x.device.type), scales)
    # Without a compiler: casting the weight for a token or a few would cost more than the slow product.
    many = learning or rows > FEW
    widen = x.dtype != weight.dtype or (many and x.dtype == torch.bfloat16 and slow_in_bf16(x.device.type))
    if widen or (learning and (weight.requires_grad or x.requires_grad)):  # frozen ones too: they may move meanwhile
        return _Product.apply(x, weight, bias, widen, None)
    return F.linear(x, weight, bias)


def precise(x: Tensor) -> Tensor:
    """x in fp32 where a product with a bf16 weight is wanted unrounded."""
    return x.float() if sums_in_fp32(x.device.type) else x


@contextlib.contextmanager
def rounding_to(dtype: torch.dtype) -> Iterator[None]:
    """Inside, with bf16: on a CPU with bf16 instructions fp32 products read their factors as bf16, at four times the
    speed; sums and results stay fp32. It is a setting of the whole process: not for threads that serve."""
    if dtype != torch.bfloat16 or _cpu_is_slow():
        yield
        return
    setting: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 (torch does not declare it)
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scores: cpu_ops.Scores, rows: RaggedRows | None = None
) -> Tensor:
    """softmax(scores of q k^T + bias) v: q [B, H, T, E], k and v [B, G, S, E]; causal when there is no bias, the
    queries being the last T of S.

    `rows` lie end to end in [1, H or G, N, E], and each sees its own keys alone; the bias is that of the longest, whose
    beginnings are those of the others.
    """
    dtype = q.dtype
    if dtype == torch.bfloat16 and sums_in_fp32(q.device.type):
        q, k, v, bias = q.float(), k.float(), v.float(), None if bias is None else bias.float()
    return (_mixed(q, k, v, bias, scores) if rows is None else _ragged(q, k, v, bias, scores, rows)).to(dtype)


def _mixed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scores: cpu_ops.Scores) -> Tensor:
    scale = scores.scale or None
    if scores.softcap:
        scale = scale or 1 / math.sqrt(q.shape[3])
        return capped_attention.attention(
            q, k, v, bias, scale=scale, softcap=scores.softcap, window=scores.window, tile=score_tile(*q.shape[:3])
        )
    if bias is None and q.shape[2] < k.shape[2]:
        bias = q.new_full((q.shape[2], k.shape[2]), -torch.inf).triu(1 + k.shape[2] - q.shape[2])[None, None]
    if scores.sinks is not None:
        return _with_sinks(q, k, v, bias, scores.sinks.to(q.dtype), scale or 1 / math.sqrt(q.shape[3]))
    return _plain(q, k, v, bias, scale)


def _ragged(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scores: cpu_ops.Scores, rows: RaggedRows) -> Tensor:
    starts, key_starts = rows.starts, rows.starts
    if rows.keys is not None and rows.key_starts is not None:
        k, v = (F.embedding(rows.keys, x[0].transpose(0, 1).flatten(1)).unflatten(1, x.shape[1::2]) for x in (k, v))
        k, v, key_starts = k.transpose(0, 1)[None], v.transpose(0, 1)[None], rows.key_starts
    if _fused_when_ragged(q, k, bias, scores):
        from torch.nn.attention import varlen  # slow to import

        fused: Any = varlen.varlen_attn
        options: Any = {"scale": scores.scale or None, "window_size": (-1, 0)}  # no key behind the query
        options |= {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        _, longest, longest_keys = (max(sizes) for sizes in zip(*rows.runs, strict=True))
        parts = (x[0].transpose(0, 1) for x in (q, k, v))
        return fused(*parts, starts, key_starts, longest, longest_keys, **options).transpose(0, 1)[None]
    of_queries, of_keys = ([run[0] * run[i] for run in rows.runs] for i in (1, 2))
    pieces = []
    parts = (x[0].split(sizes, dim=1) for x, sizes in ((q, of_queries), (k, of_keys), (v, of_keys)))
    for (count, own, seen), own_q, own_k, own_v in zip(rows.runs, *parts, strict=True):
        own_q, own_k, own_v = (x.unflatten(1, (count, -1)).transpose(0, 1) for x in (own_q, own_k, own_v))
        own_bias = None if bias is None else bias[..., seen - own : seen, :seen]
        pieces.append(_mixed(own_q, own_k, own_v, own_bias, scores).transpose(1, 2).flatten(0, 1))
    return torch.cat(pieces).transpose(0, 1)[None]


def _fused_when_ragged(q: Tensor, k: Tensor, bias: Tensor | None, scores: cpu_ops.Scores) -> bool:
    """Whether torch has one kernel for all rows: flash attention (Dao et al. 2022), of plain causal scores."""
    plain = bias is None and not scores.softcap and scores.sinks is None
    if not plain or q.device.type != "cuda" or q.dtype == torch.float32 or q.shape[3] % 8 or q.shape[3] > 256:
        return False
    if q.shape[1] != k.shape[1] and torch.__version__ < "2.12":  # which does not know of groups
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def _plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    shared = q.shape[1] != k.shape[1]
    return fused_attention(q, k, v, bias, is_causal=bias is None, scale=scale, enable_gqa=shared)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """F.scaled_dot_product_attention: q [B, H, T, E], k and v [B, G, S, E] -> [B, H, T, E], in a form for which GPUs
    have a kernel. See [Note: shared heads on a GPU]."""
    plain = attn_mask is None and query.dtype != torch.float32
    if not enable_gqa or plain or torch.compiler.is_exporting() or arithmetic_of(query.device.type) != "narrow":
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    groups, mask = key.shape[1], attn_mask
    if query.shape[2] == 1 and mask is not None:
        q = query.squeeze(2).unflatten(1, (groups, -1))  # [B, G, H / G, E]
        if mask.shape[1] > 1:
            mask = mask.squeeze(2).unflatten(1, (groups, -1))
        mixed = F.scaled_dot_product_attention(q, key, value, mask, dropout_p, scale=scale)
        return mixed.flatten(1, 2).unsqueeze(2)
    q = query.unflatten(1, (groups, -1)).flatten(0, 1)  # [B * G, H / G, T, E]
    k, v = (x.flatten(0, 1).unsqueeze(1).expand(-1, q.shape[1], -1, -1) for x in (key, value))
    if mask is not None and mask.shape[:2] != (1, 1):
        heads = query.shape[1] if mask.shape[1] > 1 else groups
        mask = mask.expand(len(query), heads, -1, -1).unflatten(1, (groups, -1)).flatten(0, 1)
    mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale=scale)
    return mixed.unflatten(0, (len(query), groups)).flatten(1, 2)


def _with_sinks(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor, scale: float) -> Tensor:
    """The sink is a key before the others, of value 0: it is 1 in a column of its own, where a head's queries have the
    sink's logit. Where attention is causal, a query is put before the others too, so that all of them see the sink."""
    (rows, heads, length, width), more = q.shape, SINK_COLUMNS - 1
    column = (sinks / scale)[None, :, None, None].expand(rows, heads, length, 1)
    q = F.pad(torch.cat((q, column), dim=3), (0, more, int(bias is None), 0))
    k = F.pad(torch.cat((k.new_zeros(*k.shape[:2], 1, width), k), dim=2), (0, SINK_COLUMNS))
    k[:, :, 0, width] = 1
    v, bias = F.pad(v, (0, SINK_COLUMNS, 1, 0)), None if bias is None else F.pad(bias, (1, 0))
    return _plain(q, k, v, bias, scale)[:, :, -length:, :width]


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor, bias: Tensor | None, eps: float, cudnn: bool = True
) -> Tensor:
    """As F.layer_norm over the last dimension; on a CPU gradients of bf16 weights are summed in fp32."""
    learning = torch.is_grad_enabled() and weight.requires_grad and x.dtype == torch.bfloat16
    if learning and sums_in_fp32(x.device.type) and not torch.compiler.is_exporting():
        return _LayerNorm.apply(x, weight, bias, eps)
    return torch.layer_norm(x, shape, weight, bias, eps, cudnn)


class _LayerNorm(torch.autograd.Function):
    """torch's kernel sums gradients of weight and bias in bf16 on a CPU: 87 % are lost at 16,384 rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        result, mean, deviation = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, mean, deviation)
        ctx.weight, ctx.bias, ctx.eps = weight, bias, eps
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, mean, deviation = ctx.saved_tensors
        shape, wanted = x.shape[-1:], [ctx.needs_input_grad[0], False, False]
        back = torch.ops.aten.native_layer_norm_backward(grad, x, shape, mean, deviation, ctx.weight, ctx.bias, wanted)
        of_weight, of_bias = torch.zeros(2, *shape, device=x.device)
        height = max(NORM_TILE // shape[0], 1)
        for rows, slopes in zip(x.view(-1, *shape).split(height), grad.reshape(-1, *shape).split(height), strict=True):
            of_weight += (F.layer_norm(rows.float(), shape, eps=ctx.eps) * slopes).sum(0)
            of_bias += slopes.sum(0, dtype=torch.float32)
        return back[0], of_weight, of_bias, None


class Linear(nn.Linear):
    """nn.Linear through `linear`."""

    def __init__(self, width: int, height: int, *, bias: bool) -> None:
        super().__init__(width, height, bias=bias)
        self.scales: nn.Parameter | None = None
        """Where the weight is packed; see models.packed."""
        self.lora: nn.ModuleList | None = None
        """Low-rank additions to the product; see models.lora."""
        self.exact = False
        """Never packed: a router, whose smallest change sends a token elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        y = linear(x, self.weight, self.bias, self.scales)
        return y if self.lora is None else add_to(y, x, self.lora)


def add_to(y: Tensor, x: Tensor, adapters: Any) -> Tensor:
    """y [..., O], in place, with what these adapters (models.lora.Adapter) add to their rows of it, for x [..., I].

    Where rows of the batch have different adapters, `adapters` is an AdaptersByRow, and x and y are [B, ..., I or O].
    """
    if isinstance(adapters, AdaptersByRow):
        for adapter, rows in adapters.chosen():
            if rows is None:
                return add_to(y, x, adapter)
            y[rows] = add_to(y[rows], x[rows], adapter)
        return y
    if len(adapters) == 1 and adapters[0].target.height == y.shape[-1]:
        return y.add_(adapters[0](x))
    pieces, end = [], 0
    for adapter in adapters:
        if adapter.target.start > end:
            pieces.append(y.new_zeros(*y.shape[:-1], adapter.target.start - end))
        pieces.append(adapter(x))
        end = adapter.target.start + adapter.target.height
    if end < y.shape[-1]:
        pieces.append(y.new_zeros(*y.shape[:-1], y.shape[-1] - end))
    return y.add_(torch.cat(pieces, dim=-1))


class RowAdapters:
    """Which row of the batch has which of several adapters: one object for all products of a decoder, written before
    each of its forward passes by who runs it."""

    def __init__(self) -> None:
        self.groups: list[tuple[int, Tensor | None]] = []
        """(adapter, its rows); None: all rows, however many."""

    def choose(self, adapters: Sequence[int | None], device: torch.device) -> None:
        """From now on row i of a batch has the adapter adapters[i], or none."""
        kinds = set(adapters)
        if len(kinds) == 1:
            self.groups = [(kind, None) for kind in kinds if kind is not None]
            return
        places = {kind: [row for row, own in enumerate(adapters) if own == kind] for kind in kinds if kind is not None}
        self.groups = [(kind, torch.tensor(rows, device=device)) for kind, rows in places.items()]


class AdaptersByRow(nn.ModuleDict):
    """What each of several adapters adds to one product, by the adapter's number. Only for answering."""

    def __init__(self, rows: RowAdapters) -> None:
        super().__init__()
        self._rows = rows

    def chosen(self) -> Iterator[tuple[Any, Tensor | None]]:
        """The adapters that the batch's rows have here, and these rows."""
        for number, rows in self._rows.groups:
            if str(number) in self:
                yield self[str(number)], rows


class _Product(torch.autograd.Function):
    """F.linear, whose backward adds to weight.grad and bias.grad where they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, widen: bool, scales: Tensor | None) -> Tensor:
        # the parameters themselves: their .grad is the place
        ctx.weight, ctx.bias, ctx.widen, ctx.scales = weight, bias, widen, scales
        ctx.save_for_backward(*[x] * ctx.needs_input_grad[1])
        result = x.new_empty(*x.shape[:-1], len(weight))  # no view of anything: an adapter adds to it in place
        if not widen and scales is None:
            flat, rows = result.view(-1, len(weight)), x.reshape(-1, x.shape[-1])
            if bias is None:
                torch.mm(rows, weight.t(), out=flat)
            else:
                torch.addmm(bias, rows, weight.t(), out=flat)
            return result
        dtype = torch.float32 if widen else x.dtype
        wide = x.to(dtype)
        for part in _tiles(weight):
            shift = None if bias is None else bias[part].to(dtype)
            result[..., part] = F.linear(wide, _values(weight, scales, dtype, part), shift)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        weight, bias = ctx.weight, ctx.bias
        wanted_x, wanted_weight, wanted_bias, _, _ = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        back = backward_to_x(grad, weight, ctx.widen, ctx.scales) if wanted_x else None
        of_weight = of_bias = None
        if wanted_weight:
            place = weight.grad
            if place is None:
                place = of_weight = torch.zeros_like(weight)
            add_product(place, flat, ctx.saved_tensors[0].flatten(0, -2), ctx.widen)
        if wanted_bias:
            summed = flat.sum(0, dtype=torch.float32)
            if bias.grad is None:
                of_bias = summed.to(bias.dtype)
            else:
                bias.grad.add_(summed)
        return back, of_weight, of_bias, None, None


def backward_to_x(grad: Tensor, weight: Tensor, widen: bool, scales: Tensor | None = None) -> Tensor:
    """grad [..., O] and weight [O, I] -> [..., I], in fp32 on the way if `widen`."""
    if not widen and scales is None:
        return grad @ weight
    dtype = torch.float32 if widen else grad.dtype
    summed: Tensor | None = None
    for rows in _tiles(weight):
        part = grad[..., rows].to(dtype) @ _values(weight, scales, dtype, rows)
        summed = part if summed is None else summed.add_(part)
        del part  # the next one is made without it
    assert summed is not None
    return summed.to(grad.dtype)


def _values(weight: Tensor, scales: Tensor | None, dtype: torch.dtype, rows: slice) -> Tensor:
    return weight[rows].to(dtype) if scales is None else packed.dense(weight, scales, rows, dtype)


def add_product(place: Tensor, grad: Tensor, x: Tensor, widen: bool) -> None:
    """place [O, I] += grad [N, O]^T x [N, I]; in fp32 on the way if `widen`. A place in fp32 adds up in fp32."""
    kind = place.device.type
    if not widen and place.dtype == grad.dtype:
        place.addmm_(grad.t(), x)
    elif not widen and arithmetic_of(kind) == "narrow" and kind != "mps":  # Apple's GPU has no such product
        torch.addmm(place, grad.t(), x, out_dtype=place.dtype, out=place)
    else:
        x = x.float() if widen else x
        for rows in _tiles(place):
            cpu_ops.add(place[rows], grad[:, rows].to(x.dtype).t() @ x)


def _tiles(weight: Tensor) -> Iterator[slice]:
    height = max(PRODUCT_TILE // weight.shape[1], 1)
    return (slice(start, start + height) for start in range(0, len(weight), height))


def rows_of(table: Tensor, ids: Tensor) -> Tensor:
    """table [V, D], ids [...] -> [..., D], as F.embedding."""
    if torch.is_grad_enabled() and table.requires_grad and not torch.compiler.is_exporting():
        return _Rows.apply(table, ids)
    return F.embedding(ids, table)


class _Rows(torch.autograd.Function):
    """F.embedding, whose backward adds rows to the table's gradient in place, if the table has one by then.

    autograd would fill a table of zeros for a few hundred rows, and a second one to add a tied head's gradient. Equal
    ids add up in fp32, in order: on a GPU sorted by torch, for atomic additions would give other bits each time.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, tokens: Tensor) -> Tensor:
        ctx.table = table
        ctx.save_for_backward(tokens)
        return F.embedding(tokens, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        (tokens,) = ctx.saved_tensors
        place = ctx.table.grad
        sums = torch.zeros_like(ctx.table, dtype=torch.float32) if place is None else place
        ids, rows = tokens.flatten(), grad.flatten(0, -2).to(sums.dtype)
        if sums.device.type == "cpu":
            sums.index_add_(0, ids, rows)
        else:
            sums.index_put_((ids,), rows, accumulate=True)
        return (sums.to(ctx.table.dtype) if place is None else None), None
