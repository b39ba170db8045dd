"""The table of strategies: where weights, gradients and optimizer states live, and whether ranks share them."""

import difflib
from dataclasses import dataclass
from typing import Literal

from penstock.errors import UserError

TierName = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class Placement:
    """Where one kind of bytes lives: on which tier, whole on every rank or one shard each."""

    tier: TierName
    sharded: bool


@dataclass(frozen=True)
class Row:
    """One strategy of the table."""

    params: Placement
    grads: Placement
    optimizer: Placement
    bits: int = 32
    """Of each of the optimizer's moments."""


WHOLE, SHARD = Placement("device", sharded=False), Placement("device", sharded=True)
HOST, DISK = Placement("host", sharded=True), Placement("disk", sharded=True)

STRATEGIES: dict[str, Row] = {
    #                  params, grads, optimizer states
    "naive":       Row(WHOLE, WHOLE, WHOLE),
    "ddp":         Row(WHOLE, WHOLE, WHOLE),
    "zero1":       Row(WHOLE, WHOLE, SHARD),
    "zero1_cpu":   Row(WHOLE, WHOLE, HOST),
    "zero2":       Row(WHOLE, SHARD, SHARD),
    "zero2_cpu":   Row(WHOLE, HOST, HOST),
    "gemini":      Row(SHARD, SHARD, SHARD),
    "gemini_cpu":  Row(HOST, HOST, HOST),
    "gemini_nvme": Row(DISK, HOST, DISK),
}  # fmt: skip
AUTO = "gemini_auto"
"""Each chunk by itself: the device is filled first, then host memory, then the disk; see plan.place."""
NAMES = (*STRATEGIES, AUTO)
EIGHT_BIT = "_8bit"
"""Behind any of the names: the same row with the optimizer's moments in 8 bits, 6 bytes per weight instead of 12."""


def known(name: str) -> str:
    """The strategy's own name: the reference's names (colossalai_gemini_cpu, ...) mean the same rows.

    Raises UserError for names that do not exist.
    """
    ours = name.removeprefix("colossalai_").replace("gemini_cuda", "gemini")
    if bits_of(ours)[0] not in NAMES:
        near = difflib.get_close_matches(ours, [*NAMES, *(f"{one}{EIGHT_BIT}" for one in NAMES)], n=3)
        hint = f"nearest: {', '.join(near)}." if near else f"there are {', '.join(NAMES)}; each with {EIGHT_BIT} too."
        raise UserError(f"--strategy {name}: no such strategy; {hint}")
    return ours


def bits_of(name: str) -> tuple[str, int]:
    """A strategy's row of the table, and the bits of its optimizer's moments."""
    return (name.removesuffix(EIGHT_BIT), 8) if name.endswith(EIGHT_BIT) else (name, 32)


def tiers_of(name: str) -> set[TierName]:
    """The memories that a strategy keeps weights, gradients and optimizer states in; gemini_auto may use all."""
    row = STRATEGIES.get(bits_of(name)[0])
    if row is None:
        return {"device", "host", "disk"}
    return {row.params.tier, row.grads.tier, row.optimizer.tier}
