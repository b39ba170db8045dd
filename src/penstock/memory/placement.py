"""The table of strategies: where weights, gradients and optimizer states live, and whether ranks share them; and the
limits of these memories as a user writes them."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from penstock.errors import UserError
from penstock.units import parse_bytes

TierName = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class Placement:
    """Where one kind of bytes lives: on which tier, whole on every rank or one shard each."""

    tier: TierName
    sharded: bool


@dataclass(frozen=True)
class Row:
    """One strategy of the table, or one chunk's placement under gemini_auto."""

    params: Placement
    grads: Placement
    optimizer: Placement
    bits: int = 32
    """Of each of the optimizer's moments."""
    add_up: bool = False
    """Gradients add up at home, one micro-batch after the other. See [Note: gradients add up in fp32]."""


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
    "hsdp":        Row(SHARD, SHARD, SHARD),
    "fsdp":        Row(SHARD, SHARD, SHARD),
    "gemini":      Row(SHARD, SHARD, SHARD),
    "gemini_cpu":  Row(HOST, HOST, HOST),
    "gemini_nvme": Row(DISK, HOST, DISK),
}  # fmt: skip
PYTORCH = ("fsdp", "hsdp")
"""Rows that PyTorch's FSDP2 runs where there are several ranks (fsdp.py); hsdp shards among those of a machine."""
AUTO = "gemini_auto"
"""Each chunk has a row of its own. See [Note: gemini_auto]."""
NAMES = (*STRATEGIES, AUTO)
EIGHT_BIT = "_8bit"
"""Suffix of any name: the same row with the optimizer's moments in 8 bits, 6 bytes per weight instead of 12."""


def known(name: str) -> str:
    """The strategy's name in the table: ColossalAI's names (colossalai_gemini_cpu, ...) mean the same rows.

    Raises UserError for names that do not exist.
    """
    ours = name.removeprefix("colossalai_").replace("gemini_cuda", "gemini")
    if bits_of(ours)[0] not in NAMES:
        near = difflib.get_close_matches(ours, [*NAMES, *(f"{row}{EIGHT_BIT}" for row in NAMES)], n=3)
        hint = f"nearest: {', '.join(near)}." if near else f"there are {', '.join(NAMES)}; each with {EIGHT_BIT} too."
        raise UserError(f"--strategy {name}: no such strategy; {hint}")
    if bits_of(ours)[0] in PYTORCH and bits_of(ours)[1] == 8:
        raise UserError(f"--strategy {name}: FSDP2's moments have 32 bits; take {bits_of(ours)[0]} or gemini_8bit.")
    return ours


def refused(
    name: str, world: int, *, visits: Iterable[Sequence[Sequence[str]]] = (), packed: bool = False,
    chunk_size: int | None = None, activation_budget: int | None = None, copies: bool = False,
) -> str | None:  # fmt: skip
    """What FSDP2 does not do of these, as a user is told. None: it does it all, or does not run this. `visits`: of each
    model, as in plan.Layout."""
    if name not in PYTORCH or world == 1:
        return None
    for of_model in visits:
        groups = [group for visit in of_model[1:-1] for group in visit]
        if len(set(groups)) < len(groups):
            return f"--strategy {name}: FSDP2 does not shard weights that layers share; take --strategy gemini."
    reasons = {
        "--base-dtype": packed and "FSDP2 does not shard packed weights",
        "--chunk-size": chunk_size and "FSDP2 gathers whole blocks",
        "--rollout-dtype": copies and "a copy is made of our own engine's chunks",
        "--activation-budget": activation_budget and "FSDP2 gathers a block that is called, and slices do not call it",
    }
    flag = next((flag for flag, reason in reasons.items() if reason), None)
    if flag is None:
        return None
    return f"{flag} with --strategy {name}: {reasons[flag]}; leave {flag} out, or take --strategy gemini."


def bits_of(name: str) -> tuple[str, int]:
    """A strategy's row of the table, and the bits of its optimizer's moments."""
    return (name.removesuffix(EIGHT_BIT), 8) if name.endswith(EIGHT_BIT) else (name, 32)


def tiers_of(name: str) -> set[TierName]:
    """The memories that a strategy keeps weights, gradients and optimizer states in; gemini_auto may use all."""
    row = STRATEGIES.get(bits_of(name)[0])
    if row is None:
        return {"device", "host", "disk"}
    return {row.params.tier, row.grads.tier, row.optimizer.tier}


@dataclass(frozen=True)
class Budgets:
    """Limits of one rank's memories, as flags write them. Example: Budgets("6GB", "48GB", "/scratch:200GB")."""

    device_memory: str | None = None
    host_memory: str | None = None
    disk: str | None = None
    """PATH or PATH:200GB; a colon whose right side has a slash belongs to the path."""
    activation_budget: str | None = None
    """What a block's activations may take per micro-batch."""

    @property
    def disk_directory(self) -> str:
        """The PATH of `disk`."""
        return self._split_disk()[0]

    def nbytes(self, name: str) -> int | None:
        """A limit in bytes; None: no limit. Raises UserError for what is no number of bytes."""
        text = self._split_disk()[1] or None if name == "disk" else getattr(self, name)
        return None if text is None else parse_bytes(text, "--" + name.replace("_", "-"))

    def _split_disk(self) -> tuple[str, str]:
        directory, _, size = (self.disk or "").rpartition(":")
        return (directory, size) if directory and "/" not in size else (self.disk or "", "")
