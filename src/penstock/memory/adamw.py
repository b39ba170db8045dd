"""AdamW where the state lives: one chunk's shard at a time, in place; on a CPU in one pass of C, else tile by tile.

bf16 weights have a *split master* (PPO.md 18: at lr 1e-6 most bf16 updates vanish): the fp32 master's bits are the
bf16 compute weight, rounded to nearest, plus a 16-bit remainder kept beside the moments. It costs 2 + 2 + 4 + 4 = 12
bytes per parameter instead of 16 and is exact: joining gives back every bit. fp32 weights are their own master.

[Note: moments in 8 bits] Each is a code per element and an fp32 scale per block of 256 (Dettmers et al. 2022, 8-bit
Optimizers via Block-wise Quantization). A code names a share of its block's largest magnitude. Codes lie densest near 1
and reach down seven decades, because moments of one block differ by orders of magnitude. The second moment's are the
squares of eight decades of roots: the root is what an update divides by. What has been decoded encodes to the same
values again.
"""

import ctypes
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from penstock.distributed.world import exact_beside
from penstock.kernels import compile as compiler
from penstock.memory import plan

SOURCE = Path(compiler.__file__).with_name("adamw.c")
ALIGN = 64
"""Elements: torch's kernel rounds those beyond its last vector in another way."""
SPAN = 65536
"""Gradients whose squares are one sum in adamw.c."""
TILE = plan.UPDATE_TILE
"""Elements per pass: what a tile needs in between stays in the last cache, and threads have enough to share."""
GPU_TILE = 1 << 23
"""The same on a GPU, where every pass is a dozen launches and activations have just been let go of."""
BLOCK = 256
"""Elements that share a scale."""
SIGN = 128
"""A first moment's code has 7 bits of magnitude; the eighth is the sign."""
ONE = 0x3F80
"""The bits of 1.0 in bf16: a share's code is looked up by the share's own bits."""


def states_of(dtype: torch.dtype, bits: int = 32) -> dict[str, tuple[torch.dtype, int]]:
    """plan.states_of with torch's dtypes: name -> (dtype, elements of the weight per element)."""
    states = plan.states_of(str(dtype).removeprefix("torch."), bits)
    return {name: (getattr(torch, state_dtype), per) for name, (state_dtype, per) in states.items()}


class Rule(ctypes.Structure):
    """adamw.c's struct of that name, in its order."""

    _fields_ = [
        (name, ctypes.c_float)
        for name in ("lerp", "beta2", "square", "step_size", "root", "eps", "divisor")
    ]  # fmt: skip


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2019) with the defaults of PPO.md 18, without its states."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.0

    def decay(self, weights: Tensor, states: Mapping[str, Tensor], runs: Iterable[slice], lr: float) -> None:
        """Before an update: moves these runs of elements towards 0, in place; for tensors as in `update`."""
        factor = 1 - lr * self.weight_decay
        if factor == 1:
            return
        tile = _tile_on(weights.device)
        parts = (slice(i, min(i + tile, run.stop)) for run in runs for i in range(run.start, run.stop, tile))
        for part in parts:
            if "remainder" in states:
                master = torch.empty(part.stop - part.start, device=weights.device)
                join(weights[part], states["remainder"][part], master)
                split(master.mul_(factor), weights[part], states["remainder"][part])
            else:
                weights[part].mul_(factor)

    def update(
        self, weights: Tensor, states: Mapping[str, Tensor], grads: Tensor, *, lr: float, scale: float, step: int
    ) -> None:
        """Moves weights and states, in place, by gradients times `scale` (the clip factor).

        weights: [n]; grads: [n] in their dtype or fp32; states: as `states_of` says; all on one device. step counts
        from 1. With moments in 8 bits n is a multiple of BLOCK.
        """
        narrow = "exp_avg_scale" in states
        tensors = [weights, *(states[name] for name in states_of(weights.dtype, 8 if narrow else 32)), grads]
        done = _in_one_pass(tensors, self._rule(lr, scale, step))
        count = torch.tensor(float(step), device=weights.device)
        divisor = None if scale == 1.0 else torch.tensor(1.0 / scale, device=weights.device)
        divides = weights.device.type in ("cpu", "cuda")  # Apple's kernel does not read grad_scale, and does not say so
        tile = _tile_on(weights.device)
        size = min(tile, weights.numel() - done)
        split_master = "remainder" in states
        master, wide = torch.empty(size, device=weights.device), torch.empty(size, device=weights.device)
        scratch = torch.empty(size if split_master else 0, dtype=torch.int32, device=weights.device)
        beta1, beta2 = self.betas
        starts = range(done, weights.numel(), tile)
        for start in starts if compiler.real() else starts[:2]:  # all are alike
            at = slice(start, min(start + tile, weights.numel()))
            length = at.stop - at.start
            moments = _wide(states, at) if narrow else [states[name][at] for name in ("exp_avg", "exp_avg_sq")]
            gradient = wide[:length].copy_(grads[at])  # a copy: the kernel divides it in place
            if not divides and divisor is not None:
                gradient.div_(divisor)
            whole = master[:length] if split_master else weights[at]
            if split_master:
                join(weights[at], states["remainder"][at], whole, scratch[:length])
            torch._fused_adamw_(
                [whole], [gradient], moments[:1], moments[1:], [], [count],
                lr=lr, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=self.eps,
                amsgrad=False, maximize=False, grad_scale=divisor if divides else None,
            )  # fmt: skip
            if split_master:
                split(whole, weights[at], states["remainder"][at], scratch[:length])
            if narrow:
                _keep(moments, states, at)

    def _rule(self, lr: float, scale: float, step: int) -> Rule:
        beta1, beta2 = self.betas
        return Rule(
            lerp=1 - beta1,
            beta2=beta2,
            square=1 - beta2,
            step_size=lr / (1 - beta1**step),
            root=math.sqrt(1 - beta2**step),
            eps=self.eps,
            divisor=1 / scale,
        )


def _in_one_pass(tensors: list[Tensor], rule: Rule) -> int:
    """Updates in place and returns how many elements are done: 0 where there is no compiler, or no CPU tensors.

    `tensors` are in the order of adamw.c's arguments.
    """
    narrow = len(tensors) > 5
    whole = tensors[0].numel() // (BLOCK if narrow else ALIGN) * (BLOCK if narrow else ALIGN)
    if not whole or any(tensor.device.type != "cpu" for tensor in tensors) or not compiler.real():
        return 0
    compiled = compiler.compiled(SOURCE)
    if isinstance(compiled, str):
        compiler.warn_slow(compiled)
        return 0
    assert all(tensor.is_contiguous() for tensor in tensors)
    kinds = dict.fromkeys("fp32" if tensor.itemsize == 4 else "bf16" for tensor in (tensors[0], tensors[-1]))
    update = getattr(compiled, "_".join(["adamw8" if narrow else "adamw", *kinds]))
    tables = [FIRST, SECOND, CODES_FIRST, CODES_SECOND] if narrow else []
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (*tensors, *tables))
    update(*pointers, ctypes.c_int64(whole), ctypes.byref(rule), torch.get_num_threads())
    return whole


def _tile_on(device: torch.device) -> int:
    return GPU_TILE if device.type == "cuda" else TILE


def sum_of_squares(grads: Tensor) -> Tensor:
    """Of gradients [n], summed in fp32 in parts and in fp64 over them: fp64 scalar. No copy of them is made."""
    compiled = compiler.compiled(SOURCE) if grads.device.type == "cpu" and compiler.real() else "another device"
    name = {torch.bfloat16: "squares_bf16", torch.float32: "squares_fp32"}.get(grads.dtype)
    if isinstance(compiled, str) or name is None or not grads.is_contiguous():
        norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in grads.split(_tile_on(grads.device))]
        return torch.stack(norms).to(exact_beside(grads.device)).double().square().sum()
    sums = torch.empty(-(-grads.numel() // SPAN), dtype=torch.float64)
    arguments = (ctypes.c_void_p(grads.data_ptr()), ctypes.c_int64(grads.numel()), ctypes.c_void_p(sums.data_ptr()))
    getattr(compiled, name)(*arguments, torch.get_num_threads())
    return sums.sum()


def widen(states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The states with moments in fp32, whatever their bits."""
    if "exp_avg_scale" not in states:
        return dict(states)
    others = {name: tensor for name, tensor in states.items() if not name.startswith("exp_avg")}
    first, second = _wide(states, slice(0, states["exp_avg"].numel()))
    return {**others, "exp_avg": first, "exp_avg_sq": second}


def narrow(states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `widen` for moments in 8 bits: [n], n a multiple of BLOCK."""
    count = states["exp_avg"].numel()
    codes = {name: torch.empty(count, dtype=torch.uint8) for name in ("exp_avg", "exp_avg_sq")}
    codes |= {f"{name}_scale": torch.empty(count // BLOCK) for name in ("exp_avg", "exp_avg_sq")}
    _keep([states["exp_avg"], states["exp_avg_sq"]], codes, slice(0, count))
    return {**states, **codes}


def _wide(states: Mapping[str, Tensor], at: slice) -> list[Tensor]:
    """Both moments, fp32."""
    blocks = slice(at.start // BLOCK, at.stop // BLOCK)
    first = decode(states["exp_avg"][at], states["exp_avg_scale"][blocks], signed=True)
    return [first, decode(states["exp_avg_sq"][at], states["exp_avg_sq_scale"][blocks], signed=False)]


def _keep(moments: list[Tensor], states: Mapping[str, Tensor], at: slice) -> None:
    """Back into 8 bits."""
    blocks = slice(at.start // BLOCK, at.stop // BLOCK)
    for name, moment, signed in (("exp_avg", moments[0], True), ("exp_avg_sq", moments[1], False)):
        code, scales = encode(moment, signed)
        states[name][at].copy_(code)
        states[f"{name}_scale"][blocks].copy_(scales)


def join(weights: Tensor, remainder: Tensor, master: Tensor, scratch: Tensor | None = None) -> None:
    """master [n] fp32 <- weights [n] bf16 and remainder [n] int16: bits = bf16 bits * 65536 + remainder.

    `scratch` is [n] int32. Conversions are passes of their own: mixed dtypes in one operation take twice as long.
    """
    bits = master.view(torch.int32)
    high = torch.empty_like(bits) if scratch is None else scratch
    high.copy_(weights.view(torch.int16))
    bits.copy_(remainder).add_(high, alpha=65536)


def split(master: Tensor, weights: Tensor, remainder: Tensor, scratch: Tensor | None = None) -> None:
    """weights [n] bf16, remainder [n] int16 <- master [n] fp32, which it overwrites; `scratch` is [n] int32.

    Rounds to nearest, ties away from zero: a tie to even would need a remainder of +32768, which int16 has not.
    """
    bits = master.view(torch.int32)
    high = torch.empty_like(bits) if scratch is None else scratch
    torch.add(bits, 0x8000, out=high).bitwise_right_shift_(16)
    weights.view(torch.int16).copy_(high)
    remainder.copy_(bits.sub_(high, alpha=65536))


# --- moments in 8 bits: see [Note: moments in 8 bits] -----------------------------------------------------------------


def _levels(bits: int) -> Tensor:
    """[2**bits] fp64 from 0 to 1: decade i from below has 2**i levels, the middles of as many equal parts."""
    decades = [torch.zeros(1, dtype=torch.float64)]
    for i in range(bits):
        ends = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float64)
        decades.append((ends[:-1] + ends[1:]) / 2 * 10.0 ** (i - bits + 1))
    decades[-1][-1] = 1.0
    return torch.cat(decades)


def _codes(bits: int, rooted: bool) -> Tensor:
    """[ONE + 1] uint8: the nearest code of every bf16 share from 0 to 1, by the share's bits; `rooted`: of its root."""
    shares = torch.arange(ONE + 1, dtype=torch.int16).view(torch.bfloat16).double()
    levels = _levels(bits)
    return torch.bucketize(shares.sqrt() if rooted else shares, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


with torch.device("cpu"):
    FIRST, SECOND = _levels(7).float(), _levels(8).square().float()
    """The share of the largest magnitude that each code stands for: [128] of a first moment without its sign, [256] of
    a second one. Code 0 stands for 0, the last one for 1."""
    CODES_FIRST, CODES_SECOND = _codes(7, rooted=False), _codes(8, rooted=True)


def encode(moment: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """moment [n] fp32, n a multiple of BLOCK -> codes [n] uint8, scales [n / BLOCK] fp32."""
    blocks = moment.view(-1, BLOCK)
    sizes = blocks.abs() if signed else blocks
    scales = sizes.amax(dim=1)
    share = (sizes / torch.where(scales > 0, scales, 1.0)[:, None]).to(torch.bfloat16)
    places = share.view(torch.int16).int().clamp_(0, ONE)  # a NaN has no code: it stays in its block's scale
    codes = (CODES_FIRST if signed else CODES_SECOND).to(moment.device)[places]
    if signed:
        codes += (blocks < 0).to(torch.uint8) * SIGN
    return codes.view(-1), scales


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The inverse of `encode`, up to rounding: [n] fp32."""
    table = torch.cat([FIRST, -FIRST]) if signed else SECOND
    return (table.to(codes.device)[codes.int()].view(-1, BLOCK) * scales[:, None]).view(-1)
