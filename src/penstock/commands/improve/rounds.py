"""One round: gather, judge the new votes, learn, measure, decide. A round that was stopped goes on where it was.

[Note: what a round learns] Votes that are trusted and that the served version has not learned: those of this round,
of rounds whose candidate was not better, and of none that was refused or withdrawn. It learns them from the served
version, which is its reference too, so a version is one step away from the one before it. A reward model is made of all
trusted comparisons, whoever learned them.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from penstock.commands.improve import measure, rule
from penstock.commands.improve.config import ImproveConfig
from penstock.commands.improve.judges import Judge, judges_of, reward_model
from penstock.commands.improve.labels import (
    ARRIVED,
    Gathered,
    Label,
    counts,
    digest_of,
    folder_of,
    gather,
    single,
    write,
)
from penstock.commands.improve.measure import Models
from penstock.commands.improve.rule import Way
from penstock.commands.improve.scores import Reading
from penstock.commands.improve.training import Say, learned
from penstock.config import EngineFlags, as_data_flags
from penstock.errors import UserError
from penstock.run.checkpoint import write_whole
from penstock.run.versions import REFUSED, TRUSTED, WAITING, Versions


def improve_once(config: ImproveConfig, versions: Versions, say: Say) -> dict[str, Any] | None:
    """Runs a round, or goes on with one; returns the version that it added, None where too few votes are new."""
    with versions.round():
        versions.read()
        round_ = Round(config, versions, say)
        if not round_.begin():
            return None
        row = round_.run()
        versions.add(**row)
        return versions.numbered[row["version"]]


class Round:
    """A round in work."""

    def __init__(self, config: ImproveConfig, versions: Versions, say: Say) -> None:
        self.config, self.versions, self.say = config, versions, say
        self.number = max(versions.numbered) + 1
        self.folder = folder_of(versions, self.number)
        self.judge: tuple[Judge, rule.Agreement] | None = None  # of new votes, and how well it knows earlier ones
        engine = EngineFlags(**{field.name: getattr(config, field.name) for field in dataclasses.fields(EngineFlags)})
        self.reading = Reading(as_data_flags(config, apply_chat_template=bool(config.apply_chat_template)), engine)

    def begin(self) -> bool:
        """Gathers labels; False where there are too few new ones."""
        config, file = self.config, self.folder / ARRIVED
        self.parent, self.began = self.versions.current, time.time()
        gathered = gather(config, self.versions, self.folder, self.number)
        if file.exists():
            state = json.loads(file.read_text(encoding="utf-8"))
            self.parent, self.began, known = state["parent"], state["began"], set(state["new"])
            new = [label for label in gathered.new if label.id in known]
            late = {label.id for label in gathered.new} - known  # they come with the next round
            gathered = Gathered([label for label in gathered.labels if label.id not in late], new)
            self.say(f"version {self.number}: goes on")
        elif len(gathered.new) < config.least:
            shutil.rmtree(self.folder)
            self.say(
                f"{self.versions.path}: {len(gathered.new)} new votes and comparisons, and a round waits for "
                f"{config.least} (--least); version {self.parent} stays"
            )
            return False
        else:
            ids = [label.id for label in gathered.new]
            write_whole(file, json.dumps({"parent": self.parent, "began": self.began, "new": ids}))
        self.labels, self.new = gathered
        newer = counts(self.new)
        self.say(f"version {self.number}: {newer['comparisons']:,} comparisons and {newer['votes']:,} votes are new")
        return True

    def run(self) -> dict[str, Any]:
        """The new version's line."""
        trusted = [label for label in self.labels if self.versions.states.get(label.version) == TRUSTED]
        state, why, examined = self.examine(judges_of(self.config, self.versions, trusted, self.say), trusted)
        changed = self.again() if state == TRUSTED else {}
        row = {
            "version": self.number, "parent": self.parent, "state": state, "changed": changed, "began": self.began,
            "new": counts(self.new) | {"sha256": digest_of(self.new)}, "examined": examined, "learned": [],
        }  # fmt: skip
        self.say(f"new votes are {state}: {why}")
        if state != TRUSTED:
            return row | self.ended("refused", why)
        allowed = {label.version for label in trusted} | {self.number}
        allowed |= {number for number, now in changed.items() if now == TRUSTED}
        usable = [label for label in self.labels if label.version in allowed]
        heldout = [label for label in usable if label.heldout]
        if (conversations := len({label.opening for label in heldout})) < rule.FEWEST:
            few = f"{conversations} conversations are held out, and {rule.FEWEST} are the fewest that can tell a gain"
            return row | self.ended("kept aside", few)
        before = self.versions.learned(self.parent)
        train = [label for label in usable if not label.heldout]
        fresh = [label for label in train if label.version not in before]
        row["learned"] = sorted({label.version for label in fresh})
        row |= self.learn_and_measure(train, fresh, heldout, rule.known_worse(examined))
        if rule.against(row["agreement"]):
            self.say("what learned the new votes moves against earlier ones: they are not learned again")
            row["state"] = REFUSED
        return row

    # --- the votes ----------------------------------------------------------------------------------------------------

    def examine(self, judges: Iterable[Judge], trusted: Sequence[Label]) -> tuple[str, str, dict[str, Any]]:
        """Whether the new votes may be learned, by the first judge that knows held-out earlier ones, or the last: the
        state, why, and the figures."""
        for judge in judges:
            self.judge = judge, judge.agreement([label for label in trusted if label.heldout], self.reading)
            if rule.knows(self.judge[1]):
                break
        if self.judge is None:
            return *rule.verdict(None, None), {}
        judge, known = self.judge
        agreed = judge.agreement(self.new, self.reading)
        figures = {"new": agreed.as_dict(), "known": known.as_dict(), "by": "reward model" if judge.reward else "model"}
        return *rule.verdict(agreed, known), figures

    def again(self) -> dict[int, str]:
        """Votes of earlier rounds that were too few to tell, judged by what is known now."""
        changed = {}
        for number, state in self.versions.states.items():
            waiting = [label for label in self.labels if label.version == number]
            if state == WAITING and self.judge is not None and waiting:
                judge, known = self.judge
                now, why = rule.verdict(judge.agreement(waiting, self.reading), known)
                if now != WAITING:
                    changed[number] = now
                    self.say(f"votes that came with version {number} are {now}: {why}")
        return changed

    # --- the model ----------------------------------------------------------------------------------------------------

    def learn_and_measure(
        self, train: Sequence[Label], fresh: Sequence[Label], heldout: Sequence[Label], known_worse: bool
    ) -> dict[str, Any]:
        """Trains a candidate, measures it, and decides. known_worse: whether no reward model knows what is answered
        now."""
        config, versions = self.config, self.versions
        possible = rule.ways(counts(fresh), counts(train), known_worse)
        if config.stages:
            possible = [Way(config.stages, "--stages says so")]
        served = versions.model(self.parent)

        def file(stages: Sequence[str]) -> Path:
            return self.file(stages, train, fresh)

        state = learned(config, served, possible, file, self.folder, self.say)
        run = f"{self.folder.name}/{state['way'][-1]}"
        models = Models(str(versions.path / run), served, versions.model(0))
        reading = self.reading._replace(data=as_data_flags(config, apply_chat_template=state["apply_chat_template"]))
        checks, votes = measure.held_out_votes(models, heldout, self.number, reading)
        judge = None if known_worse else reward_model(config, versions, "heldout", heldout, self.say)
        knows = judge.agreement(train, self.reading) if judge else None
        more, answers = measure.answers(config, models, heldout, judge, knows, self.folder, state)
        checks += measure.regressions(config, models, reading) + more
        better, reason = rule.promoted(checks)
        versions.read()
        if versions.current != self.parent:
            better, reason = False, f"version {versions.current} is served by now, and this was compared with another"
        peaks = [max(stage["peak"]["process"] for stage in state["plan"]), 0]
        peaks[1] = max(taken["peak_bytes"] for taken in state["taken"].values())
        return {
            "way": state["way"], "why_way": state["why"], "model": run,
            "votes": counts(fresh) | {"sha256": digest_of(fresh)},
            "heldout": counts(heldout) | {"sha256": digest_of(heldout)}, "agreement": votes, "answers": answers,
            "checks": [check.as_dict() for check in checks], "memory": {"planned": peaks[0], "taken": peaks[1]},
            **self.ended("promoted" if better else "kept aside", reason),
        }  # fmt: skip

    def file(self, stages: Sequence[str], train: Sequence[Label], fresh: Sequence[Label]) -> Path:
        """What the stages learn from. See [Note: what a round learns]."""
        if stages[-1] == "kto":
            return write(self.folder / "learned" / "votes.jsonl", [*single(fresh)])
        compared = train if "reward" in stages else fresh
        records = [label.record for label in compared if label.kind == "comparisons"]
        if not records:
            raise UserError(f"--stages {' '.join(stages)}: learns from comparisons, and there are none; give kto.")
        return write(self.folder / "learned" / "comparisons.jsonl", records)

    def ended(self, decision: str, why: str) -> dict[str, Any]:
        self.say(f"version {self.number}: {decision}: {why}")
        return {"decision": decision, "why": why, "seconds": time.time() - self.began}
