"""A strategy is a named placement: where params, gradients and optimizer states live, and whether ranks share them.

Algorithms see four verbs: `init()` to make models, `prepare()` to train one, `phase()` to say what comes next,
`step()` for one optimizer step. The rows below are the ones whose weights stay on the device; a streaming row is
one more line here and an executor behind the same four verbs.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from penstock.errors import UserError
from penstock.memory.adam import AdamW
from penstock.memory.shard import World

Phase = Literal["rollout", "score", "train"]


@dataclass(frozen=True)
class Placement:
    """Where one kind of bytes lives: on which tier, whole on every rank or one shard each."""

    tier: Literal["device"]
    sharded: bool


WHOLE = Placement("device", sharded=False)

STRATEGIES: dict[str, tuple[Placement, Placement, Placement]] = {
    # name    params, grads, optimizer states
    "naive": (WHOLE, WHOLE, WHOLE),
    "ddp": (WHOLE, WHOLE, WHOLE),
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Strategy:
    """One row of the table at work on one rank. Make it with `Strategy.named`."""

    name: str
    world: World
    dtype: torch.dtype
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds spent in each phase since `take_seconds`."""

    @staticmethod
    def named(name: str = "ddp", *, dtype: str = "fp32", device: str | None = None) -> "Strategy":
        """The strategy of that name, after joining torchrun's ranks. Raises UserError for names that do not exist."""
        if name not in STRATEGIES:
            raise UserError(f"--strategy {name}: no such strategy; there are {', '.join(STRATEGIES)}.")
        if dtype not in DTYPES:
            raise UserError(f"--dtype {dtype}: weights compute in {' or '.join(DTYPES)}.")
        world = World.join(device)
        if name == "naive" and world.size > 1:
            raise UserError(f"--strategy naive is one process and torchrun started {world.size}; use --strategy ddp.")
        return Strategy(name, world, DTYPES[dtype])

    @contextlib.contextmanager
    def init(self) -> Iterator[None]:
        """Models made inside are born on the strategy's device in its dtype (torch's own defaults carry both)."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.world.device:
                yield
        finally:
            torch.set_default_dtype(before)

    def prepare(self, model: nn.Module, **adamw: Any) -> AdamW:
        """Gives the model's trainable weights their sink. Every rank must hold the same weights already."""
        model.train()
        return AdamW(model.parameters(), **adamw)

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Says which phase runs now; without gradients unless it is `train`. Its wall time is kept for timing/*."""
        started = time.perf_counter()
        with record_function(f"phase.{name}"), torch.set_grad_enabled(name == "train"):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def take_seconds(self) -> dict[str, float]:
        """Seconds per phase since the last call, as timing/* metrics."""
        taken = {f"timing/{name}_seconds": seconds for name, seconds in self.seconds.items()}
        self.seconds.clear()
        return taken

    def step(
        self,
        sink: AdamW,
        micro_batches: Sequence[Any],
        loss_of: Callable[[Any], tuple[Tensor, dict[str, Tensor]]],
        *,
        lr: float,
        max_grad_norm: float = 1.0,
    ) -> "StepStats":
        """One optimizer step: backward through every micro-batch, one sum over ranks, one clip, one update.

        `loss_of` returns this micro-batch's part of the loss, already divided by the *global* token count, so that
        the gradient is a sum whatever the micro-batch size or world (PPO.md 15), and statistics to be summed (or,
        named max_*, maximised). Gradients add up in the weights' dtype: with bf16 weights, hundreds of micro-batches
        lose the smallest parts. A non-finite loss or gradient leaves the weights alone on all ranks (PPO.md 20).
        """
        sink.zero_grad()
        sums: dict[str, Tensor] = {}
        for micro_batch in micro_batches:
            with record_function("forward"):
                loss, stats = loss_of(micro_batch)
            with record_function("backward"):
                loss.backward()
            for key, value in {"loss": loss.detach(), **stats}.items():
                value = value.detach().to(self.world.device, torch.float32)
                if key not in sums:
                    sums[key] = value
                else:
                    sums[key] = torch.maximum(sums[key], value) if key.startswith("max_") else sums[key] + value
        sums = self._over_ranks(sums)
        for flat in sink.flats:
            self.world.sum(flat.grads)
        norm = sink.grad_norm()
        finite = bool(torch.isfinite(norm) & torch.isfinite(sums["loss"]))  # sync: the only one of a step
        if finite:
            with record_function("optimizer"):
                sink.update(lr, torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0))
        return StepStats(finite, float(norm), {key: float(value) for key, value in sums.items()})

    def _over_ranks(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds up (max_*: maximises) statistics; a rank whose share was empty still takes part."""
        if self.world.size == 1:
            return sums
        keys = sorted({key for keys in self.world.gather(sorted(sums)) for key in keys})
        zero = torch.zeros((), device=self.world.device)
        summed = self.world.sum(torch.stack([zero if k.startswith("max_") else sums.get(k, zero) for k in keys]))
        highest = self.world.max(torch.stack([sums.get(k, zero) for k in keys]))
        return {k: (highest if k.startswith("max_") else summed)[i] for i, k in enumerate(keys)}


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step learned. `applied` False: something was not finite and the weights did not move."""

    applied: bool
    grad_norm: float
    sums: dict[str, float]
    """Statistics of all micro-batches and ranks; `loss` is the global mini-batch's."""
