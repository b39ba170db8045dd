"""What the runs of TRL share, in TRL's environments: their flags, and the line of curve.jsonl that each step writes."""

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

Logs = dict[str, Any]


def flags(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """MODEL PROMPTS OUT, and those of both trainers; defaults: what is a trainer's own, by name."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "prompts", "out"):
        parser.add_argument(name, type=Path)
    shared = {"seed": 0, "lr": 3e-4, "lora": 16, "tokens": 32, "batch": 64, "micro": 16}
    for name, default in {**shared, **defaults}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    return parser


class Curve(TrainerCallback):
    """step, seconds (from the end of the step before), reward, kl (nats per answer), peak_rss_bytes."""

    def __init__(self, path: Path, read: Callable[[Logs], tuple[float, float]]) -> None:
        """read: the reward and the KL of what a trainer logs; raises KeyError for lines of other kinds."""
        self.path, self.read, self.began = path, read, time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Steps behind the checkpoint are made again."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.path.write_text("".join(f"{line}\n" for line in lines[: state.global_step]), encoding="utf-8")
        self.began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Logs | None = None, **_: Any) -> None:
        try:
            reward, kl = self.read(logs or {})
        except KeyError:
            return
        now, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        row = {"step": state.global_step, "seconds": now - self.began, "reward": reward, "kl": kl}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "peak_rss_bytes": peak}) + "\n")
        self.began = now

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.perf_counter()
