"""Two versions of the source, the same bytes: sha256 of metrics and weights of every stage under every strategy.

    python -m benchmarks identity OLD_CHECKOUT [NEW_CHECKOUT]

Both versions run the demo, 20 steps of each stage under every strategy (on one rank and on two), LoRA with four roles
on one base, and resume runs that the old version was stopped in, one of them inside a PPO step. The new checkout is
this one by default. Exits with 1 where a byte differs.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import facts
from benchmarks.facts import ROOT, commit_of, write
from benchmarks.reliability.runs import last_checkpoint, outcome

STEPS = 20
STRATEGIES = (
    "naive", "ddp", "zero1", "zero1_cpu", "zero2", "zero2_cpu", "gemini", "gemini_cpu", "gemini_nvme", "gemini_auto",
)  # fmt: skip
ON_TWO_RANKS = ("ddp", "zero2", "gemini")
MOVING = ["--device-memory", "30MB"]
"""A budget in which the demo's model cannot stay: its blocks stream."""
OPTIMIZER = ["--lr", "1e-3", "--batch-size", "16", "--micro-batch-size", "8", "--steps", str(STEPS)]

SLOW_REWARD = """
import os, signal, threading
calls = []
def score(prompts, responses, **_):
    calls.append(1)
    if len(calls) == 4 and os.environ.get("STOP_AFTER"):  # the first call scores samples for the report
        threading.Timer(float(os.environ["STOP_AFTER"]), os.kill, (os.getpid(), signal.SIGTERM)).start()
    return [float(text.count("a")) for text in responses]
"""


@dataclass(frozen=True)
class Scenario:
    """One run of either version."""

    flags: list[str]
    """Command and flags, without --out."""
    processes: int = 1
    stop: float | None = None
    """The old version is stopped by SIGTERM, so many seconds after the third rollout's scores (0: after eight steps),
    and both versions resume that run."""


def main(arguments: list[str]) -> int:
    """Returns 1 where the two versions differ."""
    parser = facts.flags(__doc__)
    parser.add_argument("old", type=Path, help="a checkout of the version to compare with")
    parser.add_argument("new", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--keep", type=Path, help="directory to keep the old version's runs in, and to find them again")
    parser.add_argument("--only", default="", help="a word of the runs' names; writes no result")
    options = parser.parse_args(arguments)
    digests = {}
    with tempfile.TemporaryDirectory() as directory:
        old_runs, new_runs = (options.keep or Path(directory) / "old").absolute(), Path(directory) / "new"
        demo = Scenario(["demo"])
        digest_of(options.old, old_runs / "demo", demo, old_runs)  # its models and data are the inputs of the others
        (old_runs / "slow.py").write_text(SLOW_REWARD)
        for name, scenario in {"demo": demo, **scenarios(old_runs), **stopped_runs(old_runs)}.items():
            if options.only not in name:
                continue
            folder = name.replace(" ", "_").replace(",", "")
            if scenario.stop is not None:
                stop(options.old, old_runs / folder, scenario)
            sides = ((options.old, old_runs), (options.new, new_runs))
            old, new = (digest_of(checkout, runs / folder, scenario, old_runs) for checkout, runs in sides)
            digests[name] = {"old": old, "new": new, "equal": old == new}
            print(f"{'equal' if old == new else 'DIFFERENT':10}{name}", flush=True)
    equal = sum(digest["equal"] for digest in digests.values())
    print(f"{equal} of {len(digests)} runs are equal")
    if not options.only:
        write("identity", {"old": commit_of(options.old), "runs": len(digests), "equal": equal, "sha256": digests})
    return int(equal != len(digests))


def stages_of(old_runs: Path) -> dict[str, list[str]]:
    """Command and flags of every stage on the old demo's models and data; those of PPO without a reward."""
    sft, data = str(old_runs / "demo" / "sft"), old_runs / "demo" / "data"
    common = ["--max-length", "64", *OPTIMIZER]
    return {
        "sft": ["sft", "--model", sft, "--data", str(data / "demonstrations.jsonl"), "--eval-every", "10", *common],
        "reward": ["reward", "--model", sft, "--data", str(data / "comparisons.jsonl"), "--eval-every", "10", *common],
        "ppo": ["ppo", "--actor", sft, "--data", str(data / "prompts.jsonl"), "--max-new-tokens", "16", *common],
    }


def scenarios(old_runs: Path) -> dict[str, Scenario]:
    """Every run that goes on to its end."""
    stages = stages_of(old_runs)
    ppo = [*stages["ppo"], "--mini-batch-size", "8", "--epochs", "2"]
    stages["ppo"] = [*ppo, "--reward", str(old_runs / "demo" / "reward")]
    runs = {}
    for stage, flags in stages.items():
        for strategy in STRATEGIES:
            moving = MOVING if strategy.startswith("gemini_") else []
            disk = ["--disk", str(old_runs / "disk")] if strategy == "gemini_nvme" else []
            runs[f"{stage} {strategy}"] = Scenario([*flags, "--strategy", strategy, *moving, *disk])
        for strategy in ON_TWO_RANKS:
            runs[f"{stage} {strategy} 2 ranks"] = Scenario([*flags, "--strategy", strategy], processes=2)
        eight_bit = ["--strategy", "gemini_cpu_8bit", "--dtype", "bf16"]
        runs[f"{stage} gemini_cpu bf16 8bit"] = Scenario([*flags, *eight_bit])
    lora, streamed = ["--lora", "8"], ["--strategy", "gemini_cpu", *MOVING]
    function = [*ppo, "--reward-fn", f"{old_runs / 'slow.py'}:score"]
    return runs | {
        "ppo lora": Scenario([*stages["ppo"], *lora]),
        "ppo lora gemini_cpu nf4": Scenario([*stages["ppo"], *lora, "--base-dtype", "nf4", *streamed]),
        "ppo lora hydra": Scenario([*function, *lora]),
        "ppo lora hydra gemini_cpu": Scenario([*function, *lora, *streamed]),
        "ppo value head": Scenario([*function, "--value-head"]),
    }


def stopped_runs(old_runs: Path) -> dict[str, Scenario]:
    """Every run that is stopped midway and resumed."""
    stages = stages_of(old_runs)
    ppo = [*stages["ppo"], "--reward-fn", f"{old_runs / 'slow.py'}:score", "--epochs", "8", "--mini-batch-size", "2"]
    often = ["--checkpoint-every", "5"]
    streamed = ["--strategy", "gemini_cpu", *MOVING]
    return {
        "resume of ppo inside a step": Scenario(ppo, stop=0.5),
        "resume of ppo inside a step, value head": Scenario([*ppo, "--value-head"], stop=0.5),
        "resume of sft": Scenario([*stages["sft"], "--strategy", "ddp", *often], stop=0.0),
        "resume of reward": Scenario([*stages["reward"], *streamed, *often], stop=0.0),
    }


def digest_of(checkout: Path, out: Path, scenario: Scenario, old_runs: Path) -> dict[str, str]:
    """sha256 of what a run leaves; a run that is there already is not made again."""
    arguments = [*scenario.flags, "--out", str(out)]
    if scenario.stop is not None:
        stopped, out = old_runs / out.name, out.with_name(f"{out.name}-resumed")
        arguments = ["resume", str(out)]
    if not (out / "report.html").exists():
        shutil.rmtree(out, ignore_errors=True)  # of a run that was cut off
        if scenario.stop is not None:
            shutil.copytree(stopped, out)
        process = start(checkout, arguments, scenario.processes)
        _, words = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{checkout}: penstock {' '.join(arguments)}\n{words[-3000:]}")
    if scenario.flags != ["demo"]:
        return outcome(out)
    stages = ("base", "sft", "reward", "ppo")
    return {f"{stage}/{file}": sha for stage in stages for file, sha in outcome(out / stage).items()}


def start(checkout: Path, arguments: list[str], processes: int = 1, **environment: str) -> subprocess.Popen:
    """penstock of a checkout."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [sys.executable, *(launch if processes > 1 else []), "-m", "penstock", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout.absolute() / "src"), **environment},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def stop(checkout: Path, out: Path, scenario: Scenario) -> None:
    """A run of the old version that was stopped by a signal, if it is not there already."""
    if (out / "checkpoints" / "latest").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    process = start(checkout, [*scenario.flags, "--out", str(out)], STOP_AFTER=str(scenario.stop))
    if not scenario.stop:
        metrics = out / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 8):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, "the run was over before it was stopped"
    if scenario.stop:
        state = json.loads((last_checkpoint(out) / "state.json").read_text())
        assert state["experience"], "the signal came outside a step; change its delay"
        assert state["update"] > 0, "the signal came before the first update; change its delay"
