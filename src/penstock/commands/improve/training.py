"""The training of a round: the stages, placements and batches of `penstock align`, on labels that are chosen here.

Memory is what the planner says is free beside the server, or --device-memory and --host-memory; what does not fit is
refused. A round that was stopped goes on from its checkpoints.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from penstock.commands.align.choice import Route
from penstock.commands.align.command import STATE, check_disk, save, train, with_data
from penstock.commands.align.config import AlignConfig
from penstock.commands.align.inventory import look
from penstock.commands.align.planning import Machine, Plan, Planner
from penstock.commands.improve.config import ImproveConfig
from penstock.commands.improve.rule import Way
from penstock.errors import ResourceError
from penstock.flags import flags_of, to_dict

Say = Callable[[str], None]
SETTINGS = ("reward.batch_size=8", "reward.micro_batch_size=8", "reward.epochs=2")
"""Of a thousand comparisons of two answers, one pass of large batches leaves a reward model near chance."""


def learned(
    config: ImproveConfig, model: str, ways: Sequence[Way], file: Callable[[Sequence[str]], Path], out: Path, say: Say
) -> dict[str, Any]:
    """Learns from a model in the first way that fits, each stage a run in `out`, and returns what align.json keeps.

    file: writes the labels that stages learn. Raises ResourceError where no way fits beside what is there.
    """
    if (out / STATE).exists():
        state = json.loads((out / STATE).read_text(encoding="utf-8"))
    else:
        state = begun(config, model, ways, file, out, say)
    train(state, out, say)
    return state


def align_config(config: ImproveConfig, model: str, file: Path, stages: Sequence[str], out: Path) -> AlignConfig:
    """The flags of a round as `penstock align` has them; nothing is held out of what is to be learned."""
    given = {text.partition("=")[0] for text in config.set}
    settings = [*config.set, *(text for text in SETTINGS if text.partition("=")[0] not in given)]
    known = {flag.name for flag in flags_of(AlignConfig)} - {"stages", "data", "out", "model", "heldout", "set"}
    flags = {name: value for name, value in to_dict(config).items() if name in known and value != "none"}
    flags["set"] = tuple(text for text in settings if text.split(".")[0] in stages)
    return AlignConfig.of(**flags, model=model, data=(str(file),), out=str(out), heldout=0.0)


def begun(
    config: ImproveConfig, model: str, ways: Sequence[Way], file: Callable[[Sequence[str]], Path], out: Path, say: Say
) -> dict[str, Any]:
    """Looks at model and labels, plans, and writes what the stages read."""
    for way in ways:
        aligning = align_config(config, model, file(way.stages), way.stages, out)
        inventory = look(aligning, say)
        planner = Planner(aligning, inventory, Machine.of(aligning))
        plan: Plan | None = next(iter(planner.fitting(Route(way.stages, (way.why,)))), None)
        if plan is not None:
            break
        say(f"{' + '.join(way.stages)} does not fit beside what runs here")
    else:
        raise ResourceError(
            f"{' + '.join(ways[-1].stages)} does not fit beside what runs here; with {planner.lacking} it would. Wait "
            "until memory is free, give a smaller --max-length, or --learns lora."
        )
    check_disk(plan, out)
    inventory.write(out / "data")
    plan = with_data(plan, out)
    state = {
        "stages": [dataclasses.asdict(stage.stage) | {"steps": stage.duration.steps} for stage in plan.stages],
        "plan": [stage.as_dict() for stage in plan.stages], "learns": plan.learns, "taken": {},
        "way": [*way.stages], "why": way.why, "max_new_tokens": inventory.max_new_tokens,
        "apply_chat_template": inventory.flags.apply_chat_template,
    }  # fmt: skip
    save(out, state)
    return state
