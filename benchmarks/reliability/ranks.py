"""One rank of two that is stopped for a while, stopped for good, or killed: the other names it, or waits."""

import random
import signal
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.reliability.runs import RESOURCES, subject
from penstock.distributed import heartbeat

RUNS = (("sft", "ddp"), ("ppo", "zero2"), ("dpo", "fsdp"), ("grpo", "gemini"))
PAUSE = 10
"""Seconds, far below the silence after which a rank counts as gone."""
STEPS = 16
KINDS = ("stopped for a while", "killed", "stopped for good")


def ranks(trials: int) -> Iterator[dict[str, Any]]:
    """At a random moment of the run, a random rank."""
    for place, (stage, strategy) in enumerate(RUNS[:trials]):
        rng = random.Random(stage)
        with subject(stage, strategy, steps=STEPS, checkpoint_every=3, keep=2, ranks=2) as run:
            for number in range(place, trials, len(RUNS)):
                kind, rank = KINDS[(number // len(RUNS)) % len(KINDS)], rng.randrange(2)
                processes = run.start()
                while processes[0].poll() is None and not (run.run / "config.toml").exists():
                    time.sleep(0.01)  # until they have met; before, it is said that one is missing
                time.sleep(rng.random() * run.seconds / 2)
                victim, other = processes[rank], processes[1 - rank]
                victim.signal(signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
                if kind == "stopped for a while":
                    time.sleep(PAUSE)
                    victim.signal(signal.SIGCONT)
                    victim.wait()
                ended = other.wait(3 * heartbeat.SILENCE)
                victim.signal(signal.SIGKILL)
                victim.wait()
                row = run.judged(ended)
                if ended.code == RESOURCES and row["verdict"] == "refused" and f"rank {rank} " not in ended.line:
                    row = {"verdict": "unnamed", "text": ended.line}
                yield {"name": f"{stage} {strategy}: {kind}", **row}
