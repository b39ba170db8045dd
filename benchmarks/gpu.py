"""Everything that only a GPU can tell, in one call under nine minutes: exactness first, then memory, then time.

    make gpu-check        or: python -m benchmarks.gpu [--only exact small ...] [--seconds 500]

Each check runs in a process of its own, forked from one that has imported everything and asked the driver nothing; what
it found is added to benchmarks/results/gpu.json (or into $OUT, where that is set) as soon as it has ended, so that
nothing is lost when time runs out. With `--device cpu --tiny` the same code runs on small shapes without a GPU: that
tests the checks, and its figures mean nothing. gpu_tables.py has the checks that are tables.
"""

import argparse
import copy
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks import gpu_tables
from benchmarks.engine import in_turns, tax
from benchmarks.facts import write
from benchmarks.gpu_tables import Place, apart
from benchmarks.peers.plain import gpt2
from penstock.algorithms import functional as fn
from penstock.algorithms.sft import Rows, response_logprobs
from penstock.commands.bench import capacity as capacity_of
from penstock.commands.bench.capacity import most_layers
from penstock.commands.bench.work import Four
from penstock.memory.adamw import AdamW, states_of
from penstock.memory.placement import NAMES
from penstock.memory.strategy import Strategy
from penstock.memory.tiers import Ram
from penstock.models import log_probs, presets, weight_shapes
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor
from penstock.models.surgery import quantise_base
from penstock.planner import footprint
from penstock.planner.workload import RoleSpec, Setting, Workload, forecast_of
from penstock.rollout.cache import KVCache
from penstock.rollout.engine import Engine
from penstock.rollout.sampling import Sampling

FORKS = "PENSTOCK_GPU_CHECK_FORKS"
"""Set in the process that the checks are forked from: it computes on one thread, and the checks on all."""
SETTINGS = {FORKS: "1", "OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""The last is Hopper's own default, said aloud: torch wants to hear it where results must not vary."""
SMALL = dataclasses.replace(
    presets.named("s"), num_layers=2, d_model=128, num_heads=4, num_kv_heads=4, head_dim=32, d_ff=512, vocab_size=500,
)  # fmt: skip
CAP = 16 * 10**9
"""Bytes of device memory that the capacity check allows either side."""


def exact(place: Place) -> dict[str, Any]:
    """Every strategy, fp32 and bf16: ten steps bit-equal to `naive` with recomputation, and close to plain PyTorch."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # else a GPU adds rows of a table up in any order
    shape = SMALL
    rows: dict[str, Any] = {}
    for dtype in ("fp32", "bf16"):
        reference: dict[str, Tensor] = {}
        for name in NAMES:
            theirs = None
            if dtype == "fp32" and not reference:
                torch.manual_seed(0)
                theirs = plain_steps(Actor(Decoder(shape)).to(place.device), place)
            torch.manual_seed(0)
            actor = Actor(Decoder(shape)).to(torch.float32 if dtype == "fp32" else torch.bfloat16)
            strategy = Strategy.named(name, dtype=dtype, device=place.device, disk=place.disk, recompute=True)
            stream = strategy.prepare(actor)
            for batches in ten_steps(place):
                count = sum(int(one.trained.sum()) for one in batches)

                def loss_of(hidden: Tensor, one: Rows, count: int = count, actor: Actor = actor) -> tuple:
                    return fn.sft_loss(response_logprobs(actor, hidden, one), count), {}

                strategy.step(stream, batches, loss_of, lr=1e-3)
            found = {
                weight.name: one.whole_weights(strategy.world)[offset : offset + weight.numel]
                .view(weight.shape)
                .float()
                for one in stream.homes
                for weight, offset in zip(one.chunk.weights, one.chunk.offsets, strict=True)
            }
            reference = reference or found
            gap = max(float((found[key] - reference[key]).abs().max()) for key in found)
            rows[f"{name} {dtype}"] = {"largest_difference_to_naive": gap}
            if theirs is not None:
                away = max(float((found[key] - theirs[key]).abs().max()) for key in found)
                rows[f"{name} {dtype}"]["largest_difference_to_plain_pytorch"] = away
    equal = all(row["largest_difference_to_naive"] == 0 for row in rows.values())
    return {"bit_equal": equal, "rows": rows}


def features(place: Place) -> dict[str, Any]:
    """What else computes on the device: adapters streamed and resident, packed weights, the head's tiles, 8-bit
    moments, answers by recorded steps; each against another way to the same numbers."""
    shape = with_layers(dataclasses.replace(SMALL, max_length=128), 3)
    found: dict[str, Any] = {}
    learned = {}
    for name, budget in (("naive", None), ("gemini_cpu", "3MB"), ("gemini_auto", "4MB")):
        torch.manual_seed(0)
        strategy = Strategy.named(
            name, dtype="bf16", device=place.device, recompute=True, device_memory=budget, host_memory="1GB"
        )
        four = Four(strategy, shape, lora_rank=4)
        for seed in range(2):
            list(four.iteration(torch.randint(400, (3, 16)).tolist(), 8, seed))
        learned[name] = torch.cat([one.whole_weights(strategy.world).float() for one in four.streams["actor"].homes])
    found["hydra, largest difference to naive"] = {
        name: float((one - learned["naive"]).abs().max()) for name, one in learned.items()
    }
    tokens = torch.randint(400, (3, 24))
    for kind in ("int8", "nf4"):
        torch.manual_seed(0)
        here = Decoder(shape).requires_grad_(False)
        there = copy.deepcopy(here).to(place.device)
        for one in (here, there):
            quantise_base(one, kind)  # type: ignore[arg-type]
        gap = (here.logits(here(tokens)) - there.logits(there(tokens.to(place.device))).cpu()).abs().max()
        found[f"{kind}, logits against the CPU's"] = float(gap)
    states, weight = (torch.randn(n, 64, device=place.device, requires_grad=True) for n in (300, 5000))
    targets = torch.randint(5000, (300,), device=place.device)
    plain = (states @ weight.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    wanted = torch.autograd.grad(plain.sum(), (states, weight))
    tiled = log_probs.logprobs([(states, weight)], targets)[0]
    given = torch.autograd.grad(tiled.sum(), (states, weight))
    found["head, log-probabilities and gradients against plain"] = [
        float((a - b).abs().max()) for a, b in zip((plain, *wanted), (tiled, *given), strict=True)
    ]
    for bits in (32, 8):
        made = []
        for device in ("cpu", place.device):
            generator = torch.Generator().manual_seed(0)
            weights = torch.randn(1 << 16, generator=generator).bfloat16().to(device)
            states_here = {
                key: torch.zeros(weights.numel() // per, dtype=dtype, device=device)
                for key, (dtype, per) in states_of(torch.bfloat16, bits).items()
            }
            for count in range(3):
                grads = torch.randn(1 << 16, generator=generator).bfloat16().to(device)
                AdamW().update(weights, states_here, grads, lr=1e-3, scale=0.5, step=count + 1)
            made.append(weights.float().cpu())
        found[f"AdamW with {bits}-bit moments, weights against the CPU's"] = float((made[0] - made[1]).abs().max())
    torch.manual_seed(0)
    decoder = Decoder(shape, device=place.device).requires_grad_(False)
    prompts = [torch.randint(400, (n,)).tolist() for n in (5, 9, 17)]
    sampling = Sampling(max_new_tokens=24, seed=3)
    answers = [
        Engine(decoder, eos_ids=(), rows=4, length=64, fixed=fixed).generate(prompts, sampling)
        for fixed in (True, False)
    ]
    found["recorded steps give the same tokens"] = [
        a.response_ids == b.response_ids for a, b in zip(*answers, strict=True)
    ]
    gaps = []
    for one in answers[0]:
        row = torch.tensor([one.prompt_ids + one.response_ids], device=place.device)
        states = decoder(row)[0, len(one.prompt_ids) - 1 : -1]
        said = decoder.logprobs(states, row[0, len(one.prompt_ids) :])[0].tolist()
        gaps += [abs(a - b) for a, b in zip(said, one.logprobs, strict=True)]
    found["engine against the trainer's forward, log-probabilities"] = max(gaps)
    return found


def ten_steps(place: Place) -> list[list[Rows]]:
    """Two ragged micro-batches per step."""
    generator = torch.Generator().manual_seed(1)
    steps = []
    for _ in range(10):
        parts = []
        for length in (24, 17):
            tokens = torch.randint(500, (3, length), generator=generator).to(place.device)
            parts.append(Rows(tokens, torch.arange(length, device=place.device).expand(3, -1) >= 5))
        steps.append(parts)
    return steps


def plain_steps(actor: Actor, place: Place) -> dict[str, Tensor]:
    """The same ten steps by autograd and torch.optim.AdamW."""
    optimizer = torch.optim.AdamW(actor.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    for batches in ten_steps(place):
        optimizer.zero_grad()
        count = sum(int(one.trained.sum()) for one in batches)
        for one in batches:
            logits = actor.decoder.logits(actor.decoder(one.tokens)[:, :-1]).float()
            picked = logits.log_softmax(-1).gather(-1, one.tokens[:, 1:, None]).squeeze(-1)
            (-(picked * one.trained[:, 1:]).sum() / count).backward()
        nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
        optimizer.step()
    return {name: weight.detach().float().cpu() for name, weight in actor.named_parameters()}


def rates(place: Place) -> dict[str, Any]:
    """What the machine can do: the link both ways, pinned and not, a device copy, a bf16 product; bytes and FLOP/s."""
    nbytes, side = (1 << 20, 64) if place.tiny else (1 << 30, 8192)
    here = torch.empty(nbytes, dtype=torch.uint8, device=place.device)
    other = torch.empty_like(here)
    loose = torch.zeros(nbytes, dtype=torch.uint8)
    fixed = loose.clone().pin_memory() if place.gpu else loose.clone()
    a = torch.randn(side, side, device=place.device).bfloat16()
    calls: dict[str, tuple[float, Callable[[], object]]] = {
        "to_device_pinned": (nbytes, lambda: here.copy_(fixed, non_blocking=True)),
        "to_host_pinned": (nbytes, lambda: fixed.copy_(here, non_blocking=True)),
        "to_device_unpinned": (nbytes, lambda: here.copy_(loose)),
        "device_copy": (2 * nbytes, lambda: other.copy_(here)),
        "bf16_flops": (2 * side**3, lambda: a @ a),
    }
    seconds = in_turns({name: waited(place, call) for name, (_, call) in calls.items()}, 5)
    workspace = _blas_workspace() if place.gpu else 0
    began = time.perf_counter()
    Ram("host", torch.device("cpu"), pins=place.gpu).home(4 * nbytes, torch.uint8, "a test", travels=True)
    pinned = 4 * nbytes / (time.perf_counter() - began)
    return {
        **{name: calls[name][0] / min(some) for name, some in seconds.items()},
        "pinned": pinned,
        "blas_workspace": workspace,
    }


def _blas_workspace() -> int:
    """Bytes of the allocator that the libraries keep for products, once a product and one with a bias have been made
    on the main stream; a fresh process's first product takes them."""
    a, bias = torch.randn(64, 64, device="cuda").bfloat16(), torch.zeros(64, device="cuda").bfloat16()
    torch.addmm(bias, a, a)
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    torch.addmm(bias, a, a) @ a
    return torch.cuda.memory_allocated() - before


def waited(place: Place, call: Callable[[], object]) -> Callable[[], None]:
    """The call, until the device is done with it."""

    def run() -> None:
        call()
        place.settle()

    return run


def small(place: Place) -> dict[str, Any]:
    """124M PPO, batch 1, 400 + 112 tokens; the reference system needed 1.62 GB."""
    shape = dataclasses.replace(presets.named("s"), num_layers=2) if place.tiny else presets.named("s")
    prompt, new = (24, 8) if place.tiny else (400, 112)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)  # a small budget sets its own
    strategy = Strategy.named("gemini_cpu", dtype="bf16", device=place.device, device_memory="180MB")
    four = Four(strategy, shape)
    place.forget()
    seconds: dict[str, float] = {}
    for _ in range(2):
        began = time.perf_counter()
        for phase in four.iteration(torch.randint(50257, (1, prompt)).tolist(), new):
            seconds[phase] = time.perf_counter() - began
            began = time.perf_counter()
    return {
        "max_memory_allocated": place.peak(), "device_tier_bytes": strategy.tiers["device"].peak, "seconds": seconds,
    }  # fmt: skip


def tax_xl(place: Place) -> dict[str, Any]:
    """An SFT step of XL streamed from host memory against resident, 16k tokens per step."""
    if place.tiny:
        return tax("s", 1, 2, 16, 1, repeats=1, device=place.device, dtype="bf16")
    return tax("xl", 48, 16, 1024, 4, repeats=3, device=place.device, dtype="bf16", device_memory="12GB")


def tax_6b(place: Place) -> dict[str, Any]:
    """The same for 6b: 72 GB of weights and states on either side."""
    if place.tiny:
        return tax_xl(place)
    return tax("6b", 30, 16, 1024, 2, repeats=2, device=place.device, dtype="bf16", device_memory="24GB")


def capacity(place: Place) -> dict[str, Any]:
    """Full-parameter PPO under a cap of device memory: the largest of plain PyTorch (fp32, four models, AdamW) against
    the largest that the plan says fits here, which is then run."""
    width = dataclasses.replace(presets.named("2b"), num_layers=1) if not place.tiny else presets.named("s")
    cap, prompts, new = (CAP, 2, 64) if not place.tiny else (3 * 10**9, 2, 4)
    if place.gpu:
        torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.mem_get_info()[1])
    plain = most_layers(lambda layers: runs_plainly(with_layers(width, layers), cap, prompts, new, place), 1, 64)
    host = int(0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")) if not place.tiny else 8 * 10**9
    budgets: Any = {"device": int(cap * 0.95), "host": host, "disk": 10**9 if place.tiny else 45 * 10**9}

    def planned(layers: int) -> Any:
        work = work_of(with_layers(width, layers), prompts, new)
        return forecast_of(Setting(work, "gemini_auto", "bf16", budgets=budgets))

    def fits(layers: int) -> bool:
        return all(nbytes <= budgets[tier] for tier, nbytes in planned(layers).peak.items())

    ours = most_layers(fits, 1, 400)
    place.forget()
    shape = with_layers(width, ours)
    strategy = Strategy.named(
        "gemini_auto", dtype="bf16", device=place.device, device_memory=str(budgets["device"]),
        host_memory=str(host), disk=f"{place.disk}:{budgets['disk']}",
    )  # fmt: skip
    strategy.reserve = planned(ours).activations
    began = time.perf_counter()
    four = Four(strategy, shape)
    prepared = time.perf_counter() - began
    place.forget()
    began = time.perf_counter()
    list(four.iteration(torch.randint(50257, (prompts, 64)).tolist(), new))
    place.settle()
    parameters = {name: count(with_layers(width, layers)) for name, layers in (("ours", ours), ("plain", plain))}
    return {
        "cap": cap, "host_bytes": host, "layers": {"ours": ours, "plain": plain}, "parameters_per_model": parameters,
        "ratio": parameters["ours"] / parameters["plain"], "seconds_to_prepare": prepared,
        "seconds_per_iteration": time.perf_counter() - began, "max_memory_allocated": place.peak(),
        "predicted": planned(ours).peak, "tiers": {name: tier.peak for name, tier in strategy.tiers.items()},
    }  # fmt: skip


def with_layers(shape: DecoderConfig, layers: int) -> DecoderConfig:
    """The same width, another depth."""
    return dataclasses.replace(shape, num_layers=layers)


def count(shape: DecoderConfig) -> int:
    """Parameters of one model."""
    return weight_shapes.count_of(shape, scalar=False)


def work_of(shape: DecoderConfig, prompts: int, new: int) -> Workload:
    """What `Four` does, for the plan."""
    roles = (
        RoleSpec("actor", shape, trained=True, scalar=False), RoleSpec("critic", shape, trained=True, scalar=True),
        RoleSpec("reference", shape, trained=False, scalar=False),
        RoleSpec("reward", shape, trained=False, scalar=True),
    )  # fmt: skip
    return Workload("ppo", roles, prompts, 1, prompts, 1, 64, new)


def runs_plainly(shape: DecoderConfig, cap: int, prompts: int, new: int, place: Place) -> bool:
    """Whether plain PyTorch, all in fp32 as the reference system's baseline was, completes an iteration."""
    place.forget()
    tokens = torch.randint(shape.vocab_size, (prompts, 64 if place.gpu else 4), device=place.device)
    fits = capacity_of.runs_plainly(shape, "published", cap, tokens, new, {})
    place.forget()
    return fits


def rollout(place: Place) -> dict[str, Any]:
    """Greedy answers of 128 tokens to prompts of 64 against transformers' `generate`, bf16, batch 1 and 64; and the
    bytes of the KV cache against those of the plan."""
    rows: dict[str, Any] = {}
    for size in ("s",) if place.tiny else ("xl", "8b"):
        shape = with_layers(presets.named(size), 2) if place.tiny else presets.named(size)
        with torch.device(place.device):
            decoder = Decoder(shape, dtype=torch.bfloat16).requires_grad_(False)
            theirs = transformers.GPT2LMHeadModel(
                gpt2(torch.bfloat16, n_layer=shape.num_layers, n_embd=shape.d_model, n_head=shape.num_heads)
            )
        theirs = theirs.to(torch.bfloat16).eval()
        for batch in (1, 2) if place.tiny else (1, 64):
            rows[f"{size}, batch {batch}"] = against_transformers(decoder, theirs, batch, place)
        del decoder, theirs
        place.forget()
    return {"rows": rows}


def against_transformers(decoder: Decoder, theirs: Any, batch: int, place: Place) -> dict[str, Any]:
    """One row of `rollout`."""
    prompt, new = (8, 4) if place.tiny else (64, 128)
    ids = torch.randint(10, 50000, (batch, prompt))
    there = ids.to(place.device)
    greedy = Sampling(temperature=0.0, max_new_tokens=new)

    def ours(fixed: bool) -> None:
        Engine(decoder, eos_ids=(), rows=batch, length=prompt + new, fixed=fixed).generate(ids.tolist(), greedy)

    def hf(cache: str | None) -> None:
        theirs.generate(
            there, attention_mask=torch.ones_like(there), do_sample=False, max_new_tokens=new, min_new_tokens=new,
            pad_token_id=0, cache_implementation=cache,
        )  # fmt: skip

    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: ours(True), "ours, launched one by one": lambda: ours(False),
        "transformers, dynamic cache": lambda: hf(None),
    }  # fmt: skip
    if place.left() > 120:  # transformers compiles for a static cache, which takes its time
        calls["transformers, static cache"] = lambda: hf("static")
    seconds = in_turns({name: waited(place, call) for name, call in calls.items()}, 1 if place.tiny else 2)
    rate = {name: batch * new / statistics.median(some) for name, some in seconds.items()}
    before = torch.cuda.memory_allocated() if place.gpu else None
    cache = KVCache(decoder, batch, prompt + new)
    allocated = torch.cuda.memory_allocated() - before if before is not None else None
    del cache
    weights = sum(p.nbytes for p in decoder.parameters())
    return {
        "tokens_per_second": rate,
        "ratio": rate["ours"] / max(rate[name] for name in calls if name.startswith("transformers")),
        "weights_bytes": weights, "weights_bytes_per_second": rate["ours"] / batch * weights,
        "cache_bytes": {
            "allocated": allocated, "planned": footprint.cache_of(decoder.config, "bfloat16", batch, prompt + new)
        },
    }  # fmt: skip


CHECKS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "exact": exact, "features": features, "rates": rates, "small": small, "table": gpu_tables.table,
    "giants": gpu_tables.giants, "autochunk": gpu_tables.autochunk, "tax_xl": tax_xl, "rollout": rollout,
    "capacity": capacity, "tax_6b": tax_6b,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks in order; returns 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--disk", default="/tmp/penstock-gpu-check")
    parser.add_argument("--seconds", type=float, default=500, help="for all checks together")
    parser.add_argument("--rows", nargs="*", help="of the checks that are tables: these alone")
    flags = parser.parse_args(arguments)
    if FORKS not in os.environ:  # a process whose OpenMP has begun to work must not fork one that works too
        command = [sys.executable, "-m", "benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)]
        return subprocess.run(command, env={**os.environ, **SETTINGS}).returncode
    if flags.device == "cuda" and not apart(_has_gpu, 60)["found"]:
        print("this machine has no CUDA device; --device cpu --tiny tests the checks without one")
        return 2
    place = Place(flags.device, flags.tiny, flags.disk, time.monotonic() + flags.seconds, tuple(flags.rows or ()))
    found: dict[str, Any] = {}
    for name in flags.only:
        if place.left() < 5:
            print(f"{name}: no time left")
            continue
        found[name] = apart(lambda name=name: CHECKS[name](place), place.left())  # type: ignore[misc]
        print(name, json.dumps(found[name], indent=1), flush=True)
        apart(lambda: {"path": str(write("gpu", found, "transformers"))}, 60)  # it asks the driver for the GPU's name
    return int(any("error" in one for one in found.values()))


def _has_gpu() -> dict[str, Any]:
    return {"found": torch.cuda.is_available()}


if __name__ == "__main__":
    raise SystemExit(main())
