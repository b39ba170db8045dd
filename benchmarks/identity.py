"""Two versions of the source, the same bytes: sha256 of metrics and weights of every stage under every strategy.

    python -m benchmarks identity OLD_CHECKOUT [NEW_CHECKOUT]

Both versions run the demo, 20 steps of each stage under every strategy (on one rank and on two), LoRA with four roles
on one base, and resume runs that the old version was stopped in, one of them inside a PPO step. The new checkout is
this one by default. Exits with 1 where a byte differs.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks import facts
from benchmarks.facts import ROOT, commit_of, write

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


def main(arguments: Sequence[str]) -> int:
    """Returns 1 where the two versions differ."""
    parser = facts.flags(__doc__)
    parser.add_argument("old", type=Path, help="a checkout of the version to compare with")
    parser.add_argument("new", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--keep", type=Path, help="directory to keep the old version's runs in, and to find them again")
    parser.add_argument("--only", default="", help="a word of the runs' names; writes no result")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        old_runs = (options.keep or Path(directory) / "old").absolute()
        new_runs = Path(directory) / "new"
        digests = {}
        if not (old_runs / "data").exists():
            shutil.rmtree(old_runs / "demo", ignore_errors=True)
            run(options.old, ["demo", "--out", str(old_runs / "demo")])
            make_inputs(old_runs)
        new_runs.mkdir()
        sides = ((options.old, old_runs), (options.new, new_runs))

        def compare(name: str, digest: Callable[[Path, Path], dict[str, str]]) -> None:
            old, new = (digest(checkout, runs) for checkout, runs in sides)
            digests[name] = {"old": old, "new": new, "equal": old == new}
            print(f"{'equal' if old == new else 'DIFFERENT':10}{name}", flush=True)

        for name, flags, processes in scenarios(old_runs):
            if options.only in name:
                compare(name, partial(digest_of, name=name, flags=flags, processes=processes))
        for name, flags, delay in stopped_runs(old_runs):
            if options.only in name:
                stopped = stop(options.old, old_runs / name.replace(" ", "_").replace(",", ""), flags, delay)
                compare(name, partial(resumed, stopped=stopped))
    equal = sum(digest["equal"] for digest in digests.values())
    print(f"{equal} of {len(digests)} runs are equal")
    if not options.only:
        write("identity", {"old": commit_of(options.old), "runs": len(digests), "equal": equal, "sha256": digests})
    return int(equal != len(digests))


def make_inputs(runs: Path) -> None:
    """The models and data of the old version's demo, a reward function, and models with smaller tables to stream."""
    shutil.copytree(runs / "demo" / "data", runs / "data")
    (runs / "slow.py").write_text(SLOW_REWARD)


def scenarios(old_runs: Path) -> list[tuple[str, list[str], int]]:
    """(name, command and flags without --out, processes) of every run; both versions read the old demo's models."""
    sft, reward = str(old_runs / "demo" / "sft"), str(old_runs / "demo" / "reward")
    data = old_runs / "demo" / "data"
    common = ["--max-length", "64", *OPTIMIZER]
    stages = {
        "sft": ["sft", "--model", sft, "--data", str(data / "demonstrations.jsonl"), "--eval-every", "10", *common],
        "reward": ["reward", "--model", sft, "--data", str(data / "comparisons.jsonl"), "--eval-every", "10", *common],
        "ppo": [
            "ppo", "--actor", sft, "--reward", reward, "--data", str(data / "prompts.jsonl"),
            "--max-new-tokens", "16", "--mini-batch-size", "8", "--epochs", "2", *common,
        ],
    }  # fmt: skip
    runs = [("demo", ["demo"], 1)]
    for stage, flags in stages.items():
        for strategy in STRATEGIES:
            placement = ["--strategy", strategy]
            if strategy.startswith("gemini_"):
                placement += MOVING
            if strategy == "gemini_nvme":
                placement += ["--disk", str(old_runs / "disk")]
            runs.append((f"{stage} {strategy}", [*flags, *placement], 1))
        for strategy in ON_TWO_RANKS:
            runs.append((f"{stage} {strategy} 2 ranks", [*flags, "--strategy", strategy], 2))
        runs.append((f"{stage} gemini_cpu bf16 8bit", [*flags, "--strategy", "gemini_cpu_8bit", "--dtype", "bf16"], 1))
    lora = [*stages["ppo"], "--lora", "8"]
    lora[lora.index("--reward") + 1] = reward
    runs.append(("ppo lora", lora, 1))
    runs.append(("ppo lora gemini_cpu nf4", [*lora, "--base-dtype", "nf4", "--strategy", "gemini_cpu", *MOVING], 1))
    hydra = [*stages["ppo"], "--lora", "8"]
    at = hydra.index("--reward")
    hydra[at : at + 2] = ["--reward-fn", f"{old_runs / 'slow.py'}:score"]
    runs.append(("ppo lora hydra", hydra, 1))
    runs.append(("ppo lora hydra gemini_cpu", [*hydra, "--strategy", "gemini_cpu", *MOVING], 1))
    runs.append(("ppo value head", [*without(hydra, "--lora"), "--value-head"], 1))
    return runs


def without(flags: list[str], name: str) -> list[str]:
    """The flags without one and its value."""
    at = flags.index(name)
    return flags[:at] + flags[at + 2 :]


def stopped_runs(old_runs: Path) -> list[tuple[str, list[str], float]]:
    """(name, command and flags, seconds from the third rollout's scores to SIGTERM) of runs that are stopped midway."""
    named = {name: flags for name, flags, _ in scenarios(old_runs)}
    ppo = [*without(without(named["ppo value head"][:-1], "--epochs"), "--mini-batch-size")]
    ppo += ["--epochs", "8", "--mini-batch-size", "2"]
    return [
        ("resume of ppo inside a step", ppo, 0.5),
        ("resume of ppo inside a step, value head", [*ppo, "--value-head"], 0.5),
        ("resume of sft", [*named["sft ddp"], "--checkpoint-every", "5"], 0.0),
        ("resume of reward", [*named["reward gemini_cpu"], "--checkpoint-every", "5"], 0.0),
    ]


def run(checkout: Path, arguments: list[str], processes: int = 1, **environment: str) -> int:
    """Runs penstock of a checkout; returns its exit code. Raises RuntimeError for one that is no stop by a signal."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*launch, "-m", "penstock", *arguments], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout.absolute() / "src"), **environment},
    )  # fmt: skip
    if done.returncode not in (0, 128 + signal.SIGTERM):
        raise RuntimeError(f"{checkout}: penstock {' '.join(arguments)}\n{done.stderr[-3000:]}")
    return done.returncode


def digest_of(checkout: Path, runs: Path, name: str, flags: list[str], processes: int) -> dict[str, str]:
    """sha256 of what a run leaves; a run of the old version that is there already is not made again."""
    out = runs / name.replace(" ", "_")
    if not (out / "report.html").exists():
        shutil.rmtree(out, ignore_errors=True)  # of a run that was cut off
        run(checkout, [*flags, "--out", str(out)], processes)
    if name == "demo":
        return {
            f"{stage}/{file}": digest
            for stage in ("base", "sft", "reward", "ppo")
            for file, digest in outcome(out / stage).items()
        }
    return outcome(out)


def outcome(path: Path) -> dict[str, str]:
    """sha256 of metrics, samples, and every weight file of the last checkpoint."""
    last = last_checkpoint(path)
    files = [path / "metrics.jsonl", path / "samples.jsonl", *sorted(last.rglob("*.safetensors"))]
    return {
        "state" if file.parent == last and file.stem == "state" else str(file.relative_to(path)): sha256(file)
        for file in files
        if file.exists() and file.name != "state.safetensors"  # random state of threads that no sample depends on
    }


def stop(checkout: Path, out: Path, flags: list[str], delay: float) -> Path:
    """A run of the old version that was stopped by a signal: inside a step with a delay, else after eight steps."""
    if (out / "checkpoints" / "latest").exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    if not delay:
        stop_after(checkout, [*flags, "--out", str(out)], out, steps=8)
        return out
    assert run(checkout, [*flags, "--out", str(out)], STOP_AFTER=str(delay)) == 128 + signal.SIGTERM
    state = json.loads((last_checkpoint(out) / "state.json").read_text())
    assert state["experience"], "the signal came outside a step; change its delay"
    assert state["update"] > 0, "the signal came before the first update; change its delay"
    return out


def resumed(checkout: Path, runs: Path, stopped: Path) -> dict[str, str]:
    """sha256 of what a copy of a stopped run leaves when a version resumes it."""
    copy = runs / f"{stopped.name}-resumed"
    if not (copy / "report.html").exists():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(stopped, copy)
        assert run(checkout, ["resume", str(copy)]) == 0
    return outcome(copy)


def stop_after(checkout: Path, arguments: list[str], out: Path, steps: int) -> None:
    """Runs until so many steps are logged, then sends SIGTERM and waits."""
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout.absolute() / "src")},
    )
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= steps):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, "the run was over before it was stopped"


def last_checkpoint(run: Path) -> Path:
    """The newest checkpoint's directory."""
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


def sha256(path: Path) -> str:
    """Of a file's bytes, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
