"""Fewer bytes: four roles on one base, the head in tiles, merged adapters, and how large an OPT can be.

    python -m benchmarks.fewer [head hydra merged opt] [--repeats 5]

`head`: log-probabilities of 4 x 1024 tokens of GPT-2's vocabulary, forward and backward, against plain PyTorch: bytes
and seconds. `hydra`: one PPO iteration of GPT2-m with LoRA, its bytes on every tier against one base, its adapters and
its activations, and what a scoring pass moves. `merged`: tokens per second of a merged adapter and of the base. `opt`:
the largest OPT that takes an AdamW step under one device budget (and, for what lives at home, a host budget), in plain
PyTorch, streamed, and with LoRA: counted byte by byte on tensors without memory.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from benchmarks.engine import in_turns
from benchmarks.facts import write
from penstock.algorithms.experience import Roles
from penstock.algorithms.ppo import PPO
from penstock.autochunk.meter import Meter
from penstock.commands.dry_run import dry_run
from penstock.config import OptimFlags, PPOFlags
from penstock.errors import ResourceError
from penstock.memory.strategy import Strategy
from penstock.models import log_probs as heads
from penstock.models import lora, presets, surgery
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.lora_targets import LoraSpec
from penstock.models.roles import Actor, Critic, RewardModel
from penstock.models.weight_shapes import count_of
from penstock.planner.workload import RoleSpec, Setting, Workload
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling

# --- the head ---------------------------------------------------------------------------------------------------------


def head(repeats: int, tokens: int = 4096, vocabulary: int = 50257, width: int = 768) -> dict[str, Any]:
    """Sum of log-probs and its gradients to states and head; peaks are of what is made on the way, gradients of the
    states included."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(vocabulary, width, generator=generator) * 0.02)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: heads.logprobs([(states, weight)], targets, entropy=False)[0],
        "plain": lambda: torch.log_softmax(F.linear(states, weight), dim=-1).gather(1, targets[:, None])[:, 0],
    }

    def run(way: str) -> tuple[torch.Tensor, ...]:
        states.grad, weight.grad = None, torch.zeros_like(weight)  # a sink keeps room for it
        found = ways[way]()
        found.sum().backward()
        return found.detach(), states.grad, weight.grad

    peaks, results = {}, {}
    for way in ways:
        weight.grad = None
        with Meter() as meter:
            results[way] = run(way)
            peaks[way] = meter.peak - weight.nbytes
    gaps = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(results["ours"], results["plain"], strict=True)]
    del results
    seconds = in_turns({way: lambda way=way: run(way) for way in ways}, repeats)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["plain"], strict=True)]
    return {
        "peak_bytes": peaks,
        "memory_ratio": peaks["ours"] / peaks["plain"],
        "largest_gaps": dict(zip(("logprobs", "states", "head"), gaps, strict=True)),
        "seconds": seconds,
        "time_ratio": statistics.median(ratios),
    }


# --- four roles on one base -------------------------------------------------------------------------------------------


def roles_of(strategy: Strategy, shape: DecoderConfig, rank: int) -> list[Any]:
    """Actor, reference, critic and reward model as recipes of one random base."""

    def decoder(seed: int | None) -> Decoder:
        made = Decoder(shape)
        made.seed = 1
        if seed is None:
            return made
        surgery.add_adapters(made, LoraSpec(rank), seed=seed)
        return made

    with strategy.init():
        actor, critic = Actor(decoder(2)), Critic(decoder(3))
        reference, reward = Actor(decoder(None)), RewardModel(decoder(4))
    for model in (reference, reward):
        model.eval().requires_grad_(False)
    return [actor, reference, critic, reward]


def hydra(
    repeats: int, size: str = "m", rank: int = 16, rows: int = 2, prompt: int = 64, new: int = 64
) -> dict[str, Any]:
    """One iteration in bf16: all resident, and streamed from the host through a third of the base's bytes."""
    shape, found = presets.named(size), {}
    for name, budget in (("naive", None), ("gemini_cpu", f"{count_of(shape, scalar=False) * 2 // 3}")):
        torch.manual_seed(0)
        strategy = Strategy.named(name, dtype="bf16", device="cpu", device_memory=budget)
        models = roles_of(strategy, shape, rank)
        base = sum(p.numel() for p in models[1].parameters()) * 2
        adapters = 0
        for model in models:
            weights = sum(p.nbytes for n, p in model.named_parameters() if lora.is_adapter(n) or n == "score")
            adapters += weights * (1 + 5 * any(p.requires_grad for p in model.parameters()))  # states: 10 bytes of 2
        adapters += (
            max(sum(p.nbytes for p in model.parameters() if p.requires_grad) for model in models) * 2
        )  # gradients
        actors, references, critics, rewards = strategy.prepare_all(*models)
        iteration = PPO(
            strategy, Roles(actors, references, critics, rewards), OptimFlags(lr=1e-5, micro_batch_size=1),
            PPOFlags(max_new_tokens=new),
        )  # fmt: skip
        prompts = torch.randint(shape.vocab_size, (rows, prompt)).tolist()
        with Meter() as meter:
            rollout = iteration.rollout(prompts, range(rows))
            before = strategy.tiers["host"].bytes_read
            experience = iteration.score(rollout, [None] * rows, 0.05)
            moved = strategy.tiers["host"].bytes_read - before
            iteration.learn(experience, torch.arange(rows))
        tiers = {tier: one.peak for tier, one in strategy.tiers.items()}
        total = sum(tiers.values()) + meter.peak
        found[name] = {
            "tier_bytes": tiers,
            "activation_bytes": meter.peak,
            "one_base_bytes": base,
            "adapter_bytes": adapters,
            "ratio": total / (base + adapters + meter.peak),
            "bytes_moved_by_scoring": moved,
            "moved_over_base": moved / base,
        }
    return found


# --- merged -----------------------------------------------------------------------------------------------------------


def merged(repeats: int, size: str = "s", rows: int = 8, prompt: int = 64, new: int = 64) -> dict[str, Any]:
    """Greedy generation in bf16 by the base, by an adapter beside it, and by the adapter merged into it."""
    torch.manual_seed(0)
    prompts = torch.randint(50257, (rows, prompt)).tolist()
    models = {name: Decoder(presets.named(size), dtype=torch.bfloat16) for name in ("base", "merged", "beside")}
    for name in ("merged", "beside"):
        surgery.add_adapters(models[name], LoraSpec(16))
        with torch.no_grad():
            for adapter in lora.adapters_of(models[name]):
                adapter.b.normal_(std=0.02)
    surgery.merge_adapters(models["merged"], keep=False)
    sampling = Sampling(temperature=0.0, max_new_tokens=new)
    calls = {name: lambda model=model: generate(model, prompts, sampling, eos_ids=()) for name, model in models.items()}
    seconds = in_turns(calls, repeats)
    return {
        "tokens_per_second": {name: rows * new / statistics.median(some) for name, some in seconds.items()},
        "merged_over_base": statistics.median(
            b / m for b, m in zip(seconds["base"], seconds["merged"], strict=True)
        ),
        "seconds": seconds,
    }  # fmt: skip


# --- how large an OPT -------------------------------------------------------------------------------------------------

OPTS = ["125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b"]


def opt(
    repeats: int, device: int = 16 * 10**9, host: int = 128 * 10**9, rows: int = 4, length: int = 512
) -> dict[str, Any]:
    """One step of 4 x 512 tokens. Plain: fp32 weights, gradients and AdamW, at any depth of any published width, the
    largest that fits. Ours: the largest published OPT whose dry run fits, bf16 with its exact fp32 master."""
    plain: tuple[int, str] = (0, "none")
    for name in OPTS[:4]:
        shape = presets.named(f"opt-{name}")
        low, high = 0, 4 * shape.num_layers
        while low < high:
            middle = (low + high + 1) // 2
            if plain_peak(shape, middle, rows, length) <= device:
                low = middle
            else:
                high = middle - 1
        count = count_of(dataclasses.replace(shape, num_layers=low), scalar=False) if low else 0
        plain = max(plain, (count, f"opt-{name} with {low} blocks"))
    ours: dict[str, Any] = {}
    for way, spec in (("streamed", None), ("lora", LoraSpec(16))):
        for name in reversed(OPTS):
            shape = presets.named(f"opt-{name}")
            role = RoleSpec("model", shape, True, False, spec, "base" if spec else None)
            work = Workload("sft", (role,), rows, 1, rows, 1, length - 1, 1)
            try:
                measured = dry_run(Setting(work, "gemini_cpu", "bf16", budgets={"device": device, "host": host}))
            except ResourceError as refused:
                ours.setdefault(f"{way}, refused", []).append(f"opt-{name}: {refused}")
                continue
            measured.pop("traffic")
            assert measured["device"] <= device
            assert measured["host"] <= host
            count = count_of(shape, scalar=False)
            ours[way] = {"model": f"opt-{name}", "parameters": count, "bytes": measured, "ratio": count / plain[0]}
            break
    return {
        "device_budget": device,
        "host_budget": host,
        "plain": {"model": plain[1], "parameters": plain[0]},
        **ours,
    }


def plain_peak(shape: DecoderConfig, layers: int, rows: int, length: int) -> int:
    """Bytes of a second AdamW step of transformers' OPT, everything counted, on fake tensors."""
    config = transformers.OPTConfig(
        num_hidden_layers=layers, hidden_size=shape.d_model, ffn_dim=shape.d_ff, num_attention_heads=shape.num_heads,
        word_embed_proj_dim=shape.embed_dim or shape.d_model, do_layer_norm_before=shape.pre_norm, dropout=0.0,
    )  # fmt: skip
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        model = transformers.OPTForCausalLM(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=False)
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        for _ in range(2):
            model(tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return meter.peak


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes one result each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures = {"head": head, "hydra": hydra, "merged": merged, "opt": opt}
    parser.add_argument("what", nargs="*", default=list(measures))
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(arguments)
    for what in given.what:
        found = measures[what](given.repeats)
        print(what, {key: value for key, value in found.items() if key != "seconds"})
        write(f"fewer_{what}", {"threads": torch.get_num_threads(), **found}, "transformers")


if __name__ == "__main__":
    main()
