"""One token per row on a CPU: products of few rows with a weight, and attention over a cache, in C.

[Note: own products for few rows] torch's products are made for many rows: with 8 rows an fp32 product runs at a fifth
of the processor's rate, and bf16 on processors without bf16 instructions at a tenth. Here a weight is read once at
memory speed, widened in registers or fed to the matrix unit as it lies, and a row's result does not depend, to the last
bit, on the other rows. Scoring and training keep torch's products, so that what PPO compares rounds alike. The C also
chooses tokens, and computes GELU for training too. Without a compiler, torch does all of it.
"""

import contextlib
import contextvars
import ctypes
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import record_function

from penstock.kernels import compile as compiler

SOURCES = [Path(__file__).with_name(name) for name in ("decode.c", "activations.c", "products.c", "vectors.h")]
FEW = 64
"""Rows up to which a product is made here: with more, torch's blocking wins."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float8_e4m3fn: 3}


def _struct(name: str, pointers: str, sizes: str, floats: str, kinds: str) -> type[ctypes.Structure]:
    """A C struct: its pointers, int64, float and int32 members, in this order."""
    types = ((pointers, ctypes.c_void_p), (sizes, ctypes.c_int64), (floats, ctypes.c_float), (kinds, ctypes.c_int32))
    return type(
        name, (ctypes.Structure,), {"_fields_": [(field, kind) for names, kind in types for field in names.split()]}
    )


_Product = _struct(
    "Product", "x weight bias scales y wide packed", "rows inputs outputs", "", "kind bias_kind x_kind threads"
)
_Attention = _struct(
    "Attention", "q k v keys values slopes sinks slots y", "rows heads groups width room x_row x_head row group window",
    "scale softcap", "kind x_kind threads",
)  # fmt: skip
_RmsNorm = _struct(
    "RmsNorm", "x weight y", "rows heads width x_row x_head y_row y_head", "eps offset", "kind x_kind threads"
)
_RmsNormBack = _struct("RmsNormBack", "x weight grad back slopes", "rows width", "eps offset", "kind x_kind threads")
_Rotation = _struct("Rotation", "x cos sin", "rows heads turned x_row x_head table_row", "", "kind threads")
_Choice = _struct("Choice", "logits uniforms tokens logprobs", "rows vocabulary", "temperature", "threads")

_ONE_TOKEN = contextvars.ContextVar("one_token", default=False)


@contextlib.contextmanager
def one_token() -> Iterator[None]:
    """Inside, rows are single tokens and nobody will ask for a gradient.

    A forward over whole rows stays outside, however few they are: scoring and training must round alike (PPO.md 6).
    """
    before = _ONE_TOKEN.set(compiler.real() and not isinstance(_library(), str))
    try:
        with record_function("compute.decode"):
            yield
    finally:
        _ONE_TOKEN.reset(before)


def warn_without(device: torch.device) -> None:
    """Says once why text will be slow, if it is made on a CPU and there is no compiler."""
    library = _library() if device.type == "cpu" and compiler.real() else None
    if isinstance(library, str):
        compiler.warn_slow(library)


def ready(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether these go through here: inside `one_token`, on a CPU with a compiler, in dtypes that the C knows."""
    return _ONE_TOKEN.get() and device.type == "cpu" and all(dtype in KINDS for dtype in dtypes)


def computes(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether the C can read and write tensors of these dtypes there, in training too."""
    if device.type != "cpu" or not compiler.real() or isinstance(_library(), str):
        return False
    return all(dtype in (torch.float32, torch.bfloat16) for dtype in dtypes)


def attends(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether `attention` goes through here, for heads of this width: what it sums lies on threads' stacks."""
    library = _library() if ready(device, dtype) else ""
    return isinstance(library, ctypes.CDLL) and width <= ctypes.c_int64.in_dll(library, "widest").value


def unrounded(x: Tensor, weight: Tensor) -> bool:
    """Whether fp32 states that bf16 can hold meet a bf16 weight here at bf16's speed, and the result is not rounded."""
    if x.dtype != torch.float32 or weight.dtype != torch.bfloat16 or x.device.type != "cpu" or not compiler.real():
        return False
    library = _library()
    return not isinstance(library, str) and bool(library.has_bf16())


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
    """x [..., I] fp32 or bf16, weight [O, I], bias [O] -> [..., O] in x's dtype, summed in fp32.

    The weight is fp32, bf16, or int8 or fp8 (e4m3) with `scales` [O]. All on the CPU, weights without gaps.
    """
    x, weight = x.contiguous(), weight.contiguous()
    assert x.shape[-1] == weight.shape[1]
    assert weight.dtype.itemsize > 1 or scales is not None
    scales = scales if scales is None else scales.float()
    y = x.new_empty(*x.shape[:-1], len(weight))
    wide = x if x.dtype == torch.float32 else torch.empty(x.shape)
    rows = x.shape[:-1].numel()
    few = -(-rows // 16) * 16 if weight.dtype == torch.bfloat16 else 0
    packed = torch.empty(few, x.shape[-1], dtype=torch.bfloat16)
    call = _Product(
        x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(),
        0 if scales is None else scales.data_ptr(), y.data_ptr(), wide.data_ptr(), packed.data_ptr(), rows, x.shape[-1],
        len(weight), KINDS[weight.dtype], 0 if bias is None else KINDS[bias.dtype], KINDS[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    _library().product(ctypes.byref(call))  # type: ignore[union-attr]
    return y


class Scores(NamedTuple):
    """What becomes of the products of queries and keys."""

    slopes: Tensor | None = None
    """[H] fp32: ALiBi's."""
    window: int = 0
    """How many of the latest tokens are seen; 0 is all."""
    scale: float = 0.0
    """Their factor. 0: 1 / sqrt(E)."""
    softcap: float = 0.0
    """Scores become softcap * tanh(scores / softcap); 0: they stay."""
    sinks: Tensor | None = None
    """[H]: a logit per head that takes part in its softmax and has no value."""


PLAIN = Scores()


def attention(
    q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor], slots: Tensor, scores: Scores = PLAIN
) -> Tensor:
    """One token per row: q [B, H, 1, E], k and v [B, G, 1, E], cache [B, G, S, E] twice -> [B, 1, H * E].

    Row b's k and v are written to slot `slots[b]` (int64), and its query sees the slots up to it. q, k and v lie alike,
    and so do both halves of the cache, each [S, E] without gaps. E is no wider than `attends` says.
    Raises IndexError, and writes nothing, where a slot is not in the cache.
    """
    (rows, heads, _, width), (keys, values) = q.shape, cache
    if len({tensor.stride()[:2] for tensor in (q, k, v)}) > 1 or q.stride(3) != 1:  # rotated, or normed
        q, k, v = torch.cat((q, k, v), dim=1).split((heads, k.shape[1], v.shape[1]), dim=1)
    assert keys.stride() == values.stride()
    assert keys.stride()[2:] == (width, 1)
    y = q.new_empty(rows, 1, heads * width)
    sinks = None if scores.sinks is None else scores.sinks.float()
    call = _Attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), keys.data_ptr(), values.data_ptr(),
        0 if scores.slopes is None else scores.slopes.data_ptr(), 0 if sinks is None else sinks.data_ptr(),
        slots.data_ptr(), y.data_ptr(), rows, heads,
        keys.shape[1], width, keys.shape[2], q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), scores.window,
        scores.scale or 1 / math.sqrt(width), scores.softcap, KINDS[keys.dtype], KINDS[q.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    if _library().attention(ctypes.byref(call)):  # type: ignore[union-attr]
        raise IndexError(f"heads of {width}, or slots {slots.tolist()} in a cache of {keys.shape[2]}, are too much")
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, *, spare: bool = False) -> Tensor:
    """x / rms(x) * (weight + offset) over the last dimension, x [B, ..., E] without gaps, or [B, H, 1, E] with gaps
    between rows and heads; in place where x is `spare`. Computed in fp32 and rounded once."""
    assert weight.shape == x.shape[-1:]
    y = x if spare else torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.dim() == 4:
        rows, heads, x_row, x_head, y_row, y_head = *x.shape[:2], *x.stride()[:2], *y.stride()[:2]
    else:
        x = x.contiguous()
        rows, heads, x_row, x_head, y_row, y_head = x.shape[:-1].numel(), 1, x.shape[-1], 0, x.shape[-1], 0
    call = _RmsNorm(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, heads, x.shape[-1], x_row, x_head, y_row, y_head,
        eps, offset, KINDS[weight.dtype], KINDS[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    _library().rms_norm(ctypes.byref(call))  # type: ignore[union-attr]
    return y


def rms_norm_back(
    x: Tensor, weight: Tensor, grad: Tensor, eps: float, offset: float, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `rms_norm`'s x and weight, grad being that of its result: x's in its dtype, rounded once; the
    weight's in fp32, summed over rows in fp32, if it `learns`."""
    x, grad, threads = x.contiguous(), grad.contiguous(), torch.get_num_threads()
    assert x.shape[-1:] == weight.shape
    assert (x.shape, x.dtype) == (grad.shape, grad.dtype)
    back, slopes = torch.empty_like(grad), torch.zeros(threads, len(weight)) if learns else None
    call = _RmsNormBack(
        x.data_ptr(), weight.data_ptr(), grad.data_ptr(), back.data_ptr(), 0 if slopes is None else slopes.data_ptr(),
        x.shape[:-1].numel(), len(weight), eps, offset, KINDS[weight.dtype], KINDS[x.dtype], threads,
    )  # fmt: skip
    _library().rms_norm_back(ctypes.byref(call))  # type: ignore[union-attr]
    return back, None if slopes is None else slopes.sum(0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns x [B, H, 1, E] in place by cos and sin [B or 1, 1, 1, R] of its dtype, R <= E; see positions.rotate."""
    assert (cos.shape, cos.dtype) == (sin.shape, x.dtype)
    assert cos.shape[-1] <= x.shape[3]
    table = 0 if len(cos) == 1 else cos.shape[-1]
    call = _Rotation(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), *x.shape[:2], cos.shape[-1], *x.stride()[:2], table,
        KINDS[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    _library().rotate(ctypes.byref(call))  # type: ignore[union-attr]
    return x


def gated(x: Tensor, activation: str) -> Tensor:
    """x [..., 2F], the gate first -> [..., F]: silu(gate) * up, or gelu_tanh's."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _library().gated(  # type: ignore[union-attr]
        ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(y.shape[:-1].numel()),
        ctypes.c_int64(y.shape[-1]), GATES.index(activation), KINDS[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y


GATES = ("silu", "gelu_tanh")
"""Activations of gates that `gated` knows."""


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by tanh, in half the time that torch takes on a CPU; inside `one_token` in place."""
    library = _library() if x.device.type == "cpu" and compiler.real() and not torch.compiler.is_exporting() else ""
    if isinstance(library, str) or x.dtype not in (torch.float32, torch.bfloat16) or not x.is_contiguous():
        return F.gelu(x, approximate="tanh")
    if torch.is_grad_enabled() and x.requires_grad:
        return _Gelu.apply(x)
    return _gelu(x, None, x if _ONE_TOKEN.get() else torch.empty_like(x))


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gelu(x, None, torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _gelu(x, grad.contiguous(), torch.empty_like(x))


def _gelu(x: Tensor, grad: Tensor | None, y: Tensor) -> Tensor:
    library = _library()
    assert isinstance(library, ctypes.CDLL)
    pointers = (ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in (x, grad, y))
    library.gelu_tanh(*pointers, ctypes.c_int64(x.numel()), KINDS[x.dtype], torch.get_num_threads())
    return y


def add(sums: Tensor, terms: Tensor) -> None:
    """sums += terms, in place, on tensors of one shape; bf16 terms of fp32 sums are widened on the way, on a CPU in one
    pass: torch makes a copy of them first."""
    library = _library() if sums.device.type == "cpu" and compiler.real() else ""
    plain = (sums.dtype, terms.dtype) == (torch.float32, torch.bfloat16) and terms.is_contiguous()
    if isinstance(library, str) or not plain or not sums.is_contiguous() or sums.shape != terms.shape:
        sums.add_(terms)
        return
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (sums, terms))
    library.add_bf16(*pointers, ctypes.c_int64(terms.numel()), torch.get_num_threads())


def choose(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor] | None:
    """A token per row by its softmax, as `rollout.sampling.pick` says: logits [B, V], uniforms [B] -> tokens, logprobs
    [B]. None where there is no compiler, or logits are not fp32 on a CPU.

    The logits are read twice and nothing of their size is made: no distribution, no running sum of it.
    """
    library = _library()
    if isinstance(library, str) or logits.device.type != "cpu" or logits.dtype != torch.float32 or not compiler.real():
        return None
    logits, uniforms = logits.contiguous(), uniforms.float().contiguous()
    assert len(uniforms) == len(logits)
    tokens, logprobs = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits))
    call = _Choice(
        logits.data_ptr(), uniforms.data_ptr(), tokens.data_ptr(), logprobs.data_ptr(), *logits.shape, temperature,
        torch.get_num_threads(),
    )  # fmt: skip
    library.choose(ctypes.byref(call))
    return tokens, logprobs


def _library() -> ctypes.CDLL | str:
    return compiler.compiled(*SOURCES)
