"""AdamW where the state lives: one chunk's shard at a time, in place; on a CPU in one pass of C, else tile by tile.

bf16 weights have a *split master* (PPO.md 18: at lr 1e-6 most bf16 updates vanish): the fp32 master's bits are the
bf16 compute weight, rounded to nearest, plus a 16-bit remainder kept beside the moments. It costs 2 + 2 + 4 + 4 = 12
bytes per parameter instead of 16 and is exact: joining gives back every bit. fp32 weights are their own master.
"""

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from penstock.memory import native

SOURCE = Path(__file__).with_name("adam.c")
ALIGN = 64
"""Elements: torch's kernel rounds the few beyond its last vector another way."""
TILE = 1 << 20
"""Elements per pass: what a tile needs in between stays in the last cache, and threads have enough to share."""


def states_of(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What AdamW keeps per element beside the weight, by name: torch's own names, and `remainder` of the master."""
    moments = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    return moments if dtype == torch.float32 else {"remainder": torch.int16, **moments}


class Rule(ctypes.Structure):
    """What adam.c calls Rule, in its order."""

    _fields_ = [
        (name, ctypes.c_float)
        for name in ("decay", "lerp", "beta2", "square", "step_size", "root", "eps", "divisor")
    ]  # fmt: skip


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2019) with the defaults of PPO.md 18: the rule, without any state."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.0

    def update(
        self, weights: Tensor, states: Mapping[str, Tensor], grads: Tensor, *, lr: float, scale: float, step: int
    ) -> None:
        """Moves weights and states, in place, by gradients times `scale` (the clip factor).

        weights, grads: [n] in one dtype; states: [n] each, as `states_of` says; all on one device. step counts from 1.
        """
        tensors = [weights, *(states[name] for name in states_of(weights.dtype)), grads]
        done = _in_one_pass(tensors, self._rule(lr, scale, step))
        count = torch.tensor(float(step), device=weights.device)
        divisor = None if scale == 1.0 else torch.tensor(1.0 / scale, device=weights.device)
        size = min(TILE, weights.numel() - done)
        split_master = "remainder" in states
        master, wide = torch.empty(size, device=weights.device), torch.empty(size, device=weights.device)
        scratch = torch.empty(size if split_master else 0, dtype=torch.int32, device=weights.device)
        beta1, beta2 = self.betas
        for start in range(done, weights.numel(), TILE):
            here = slice(start, min(start + TILE, weights.numel()))
            count_here = here.stop - here.start
            moments = [[states[name][here]] for name in ("exp_avg", "exp_avg_sq")]
            gradient = wide[:count_here].copy_(grads[here])  # a copy: the kernel divides it in place
            whole = master[:count_here] if split_master else weights[here]
            if split_master:
                join(weights[here], states["remainder"][here], whole, scratch[:count_here])
            torch._fused_adamw_(
                [whole], [gradient], moments[0], moments[1], [], [count],
                lr=lr, beta1=beta1, beta2=beta2, weight_decay=self.weight_decay, eps=self.eps,
                amsgrad=False, maximize=False, grad_scale=divisor,
            )  # fmt: skip
            if split_master:
                split(whole, weights[here], states["remainder"][here], scratch[:count_here])

    def _rule(self, lr: float, scale: float, step: int) -> Rule:
        beta1, beta2 = self.betas
        return Rule(
            decay=1 - lr * self.weight_decay,
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

    `tensors` are [n] each, in the order of adam.c's arguments: five for a split master, four for fp32.
    """
    whole = tensors[0].numel() // ALIGN * ALIGN
    if not whole or any(one.device.type != "cpu" for one in tensors) or not native.real():
        return 0
    compiled = native.compiled(SOURCE)
    if isinstance(compiled, str):
        return 0
    assert all(one.is_contiguous() and one.numel() >= whole for one in tensors)
    update = compiled.adamw_bf16 if len(tensors) == 5 else compiled.adamw_fp32
    places = (ctypes.c_void_p(one.data_ptr()) for one in tensors)
    update(*places, ctypes.c_int64(whole), ctypes.byref(rule), torch.get_num_threads())
    return whole


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
