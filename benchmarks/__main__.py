"""The one runner of everything that is measured. `python -m benchmarks` lists the benchmarks.

It knows names, functions and one line of help. What a benchmark measures is in its own file, which `--help` prints.
"""

import sys
from importlib import import_module

BENCHMARKS = {
    # name: (module:function, help)
    "bench": ("bench:main", "runs `penstock bench` and keeps its result under a name"),
    "growth": ("growth:main", "cost and memory against model size, row length and depth"),
    "engine": ("engine:main", "adamw, tax, head: the memory engine against what it can be at best"),
    "autochunk": ("autochunk:main", "blocks with and without slices: peak, seconds, longest sequence"),
    "planner": ("planner:main", "grid, 175b, one-card: the plan against the engine"),
    "experts": ("experts:main", "a mixture of experts against a dense model, and streamed"),
    "sentiment": (
        "real.sentiment:main",
        "a real model learns to praise films: reward against KL, beside TRL",
    ),
    "tiers": ("real.tiers:main", "one run of a real model resident, in host memory and on a disk: the same bytes"),
    "align": ("real.align:main", "penstock align against its own plan: time, memory, and the held-out score"),
    "overdone": ("real.overdone:main", "a real model trained far too long: where gold turns down, and the warnings"),
    "times": ("real.times:main", "the times table by a reward that checks: held-out accuracy of a real model"),
    "rollout": ("rollout:main", "speed, ragged, samples, int8: generation against transformers"),
    "peers": ("peers.run:main", "the same work against TRL, DeepSpeed, FSDP2, peft and plain PyTorch"),
    "losses": ("losses:main", "losses, advantages and gradients against TRL on the same rows"),
    "gguf": ("gguf:main", "GGUF files that penstock wrote, run by llama.cpp: the same tokens"),
    "ranks": ("ranks:main", "two ranks against two processes that do not communicate"),
    "lm_eval": ("lm_eval:main", "lm-eval through our server against its own hf model: the same scores"),
    "serve": ("serve:main", "load, security, clients, labelling: the chat service from outside"),
    "demo": ("demo:main", "what the demo takes and what it learns"),
    "improve": ("improve:main", "the loop with simulated users, and rounds of flipped votes"),
    "reward_scale": ("reward_scale:main", "PPO under offsets and scales of the reward: the same policy"),
    "reliability": ("reliability.run:main", "kills, full disks, damage and fuzz: what is lost, and what refusals say"),
    "planted_bugs": ("planted_bugs:main", "wrong lines planted in the source: the tests must fail"),
    "identity": ("identity:main", "two checkouts: the same bytes of metrics and weights"),
    "speed": ("speed:main", "two checkouts: seconds of the same steps in turns"),
    "gpu": ("gpu:main", "everything that only a GPU can tell, on small shapes without one"),
    "submit": ("one_gpu:main", "checks rows of the one-GPU benchmark, of any stack"),
    "tables": ("tables:main", "writes benchmarks/README.md, its plots and our submission from the results"),
}


def main(arguments: list[str]) -> int:
    """Runs one benchmark with its flags; returns its exit code."""
    if not arguments or arguments[0] not in BENCHMARKS:
        print("usage: python -m benchmarks NAME [flags]\n")
        print("\n".join(f"  {name:14}{text}" for name, (_, text) in BENCHMARKS.items()))
        return int(bool(arguments) and arguments[0] not in ("-h", "--help"))
    module, function = BENCHMARKS[arguments[0]][0].split(":")
    return getattr(import_module(f"benchmarks.{module}"), function)(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
