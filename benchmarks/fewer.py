"""Fewer bytes: four roles on one base, the head in tiles, merged adapters, and how large an OPT can be.

    python -m benchmarks fewer [head hydra merged opt] [--repeats 5]

`head`: log-probabilities of 4 x 1024 tokens of GPT-2's vocabulary, forward and backward, against plain PyTorch: bytes
and seconds. `hydra`: one PPO iteration of GPT2-m with LoRA, its bytes on every tier against one base, its adapters and
its activations, and what a scoring pass moves. `merged`: tokens per second of a merged adapter and of the base. `opt`:
the largest OPT that takes an AdamW step under one device budget (and, for what lives at home, a host budget), in plain
PyTorch, streamed, and with LoRA: counted byte by byte on tensors without memory.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from benchmarks import timing
from benchmarks.facts import run_measures
from penstock.autochunk.meter import Meter
from penstock.commands.bench.capacity import most_layers
from penstock.commands.bench.work import Four
from penstock.commands.dry_run import dry_run
from penstock.errors import ResourceError
from penstock.memory.strategy import Strategy
from penstock.models import log_probs as heads
from penstock.models import lora, presets, surgery
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.lora_targets import LoraSpec
from penstock.models.weight_shapes import count_of
from penstock.planner.workload import RoleSpec, Setting, Workload
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling

# --- the head ---------------------------------------------------------------------------------------------------------


def head(repeats: int = 5, tokens: int = 4096, vocabulary: int = 50257, width: int = 768) -> dict[str, Any]:
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
        log_probs = ways[way]()
        log_probs.sum().backward()
        return log_probs.detach(), states.grad, weight.grad

    peaks, results = {}, {}
    for way in ways:
        weight.grad = None
        with Meter() as meter:
            results[way] = run(way)
            peaks[way] = meter.peak - weight.nbytes
    gaps = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(results["ours"], results["plain"], strict=True)]
    del results
    seconds = timing.in_turns({way: lambda way=way: run(way) for way in ways}, repeats)
    return {
        "peak_bytes": peaks,
        "memory_ratio": peaks["ours"] / peaks["plain"],
        "largest_gaps": dict(zip(("logprobs", "states", "head"), gaps, strict=True)),
        "seconds": seconds,
        "time_ratio": timing.ratio(seconds, "ours", "plain"),
    }


# --- four roles on one base -------------------------------------------------------------------------------------------


def hydra(size: str = "m", rank: int = 16, rows: int = 2, prompt: int = 64, new: int = 64) -> dict[str, Any]:
    """One iteration in bf16: all resident, and streamed from the host through a third of the base's bytes, or through
    one and a half token tables where that is more: a small model is mostly its table."""
    shape = presets.named(size)
    budget = max(count_of(shape, scalar=False) * 2 // 3, 3 * shape.vocab_size * shape.d_model)
    return {
        strategy: hydra_under(strategy, shape, rank, rows, prompt, new, device_memory)
        for strategy, device_memory in (("naive", None), ("gemini_cpu", str(budget)))
    }


def hydra_under(
    name: str, shape: DecoderConfig, rank: int, rows: int, prompt: int, new: int, device_memory: str | None
) -> dict[str, Any]:
    """Bytes of one iteration under a strategy."""
    torch.manual_seed(0)
    strategy = Strategy.named(name, dtype="bf16", device="cpu", device_memory=device_memory)
    four = Four(strategy, shape, lora_rank=rank)
    models = [stream.model for stream in four.streams.values()]
    base = sum(parameter.numel() for parameter in four.streams["reference"].model.parameters()) * 2
    trained = [sum(p.nbytes for p in model.parameters() if p.requires_grad) for model in models]
    adapters = max(trained) * 2  # gradients
    for model, trained_bytes in zip(models, trained, strict=True):
        weights = sum(p.nbytes for key, p in model.named_parameters() if lora.is_adapter(key) or key == "score")
        adapters += weights * (6 if trained_bytes else 1)  # states: 10 bytes for every 2
    moved = {}
    prompts = torch.randint(shape.vocab_size, (rows, prompt)).tolist()
    with Meter() as meter:
        before = 0
        for phase in four.iteration(prompts, new):
            moved[phase] = strategy.tiers["host"].bytes_read - before
            before += moved[phase]
    tiers = {tier: home.peak for tier, home in strategy.tiers.items()}
    return {
        "tier_bytes": tiers,
        "activation_bytes": meter.peak,
        "one_base_bytes": base,
        "adapter_bytes": adapters,
        "ratio": (sum(tiers.values()) + meter.peak) / (base + adapters + meter.peak),
        "bytes_moved_by_scoring": moved["score"],
        "moved_over_base": moved["score"] / base,
    }


# --- merged -----------------------------------------------------------------------------------------------------------


def merged(repeats: int = 5, size: str = "s", rows: int = 8, prompt: int = 64, new: int = 64) -> dict[str, Any]:
    """Greedy generation in bf16 by the base, by a separate adapter ("beside"), and by the adapter merged into it."""
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
    seconds = timing.in_turns(calls, repeats)
    return {
        "tokens_per_second": timing.rates(seconds, rows * new),
        "merged_over_base": timing.ratio(seconds, "base", "merged"),
        "seconds": seconds,
    }


# --- how large an OPT -------------------------------------------------------------------------------------------------

OPTS = ["125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b"]


def opt(device: int = 16 * 10**9, host: int = 128 * 10**9, rows: int = 4, length: int = 512) -> dict[str, Any]:
    """One step of 4 x 512 tokens. Plain: fp32 weights, gradients and AdamW, at any depth of any published width, the
    largest that fits. Ours: the largest published OPT whose dry run fits, bf16 with its exact fp32 master."""
    plain: tuple[int, str] = (0, "none")
    for name in OPTS[:4]:
        shape = presets.named(f"opt-{name}")
        try:
            layers = most_layers(lambda n, s=shape: plain_peak(s, n, rows, length) <= device, 1, 4 * shape.num_layers)
        except ResourceError:
            continue
        count = count_of(dataclasses.replace(shape, num_layers=layers), scalar=False)
        plain = max(plain, (count, f"opt-{name} with {layers} blocks"))
    ours: dict[str, Any] = {}
    budgets: Any = {"device": device, "host": host}
    for way, spec in (("streamed", None), ("lora", LoraSpec(16))):
        for name in reversed(OPTS):
            shape = presets.named(f"opt-{name}")
            role = RoleSpec("model", shape, True, False, spec, "base" if spec else None)
            work = Workload("sft", (role,), rows, 1, rows, 1, length - 1, 1)
            try:
                peaks = dry_run(Setting(work, "gemini_cpu", "bf16", budgets=budgets))
            except ResourceError as error:
                ours.setdefault(f"{way}, refused", []).append(f"opt-{name}: {error}")
                continue
            peaks.pop("traffic")
            assert peaks["device"] <= device
            assert peaks["host"] <= host
            count = count_of(shape, scalar=False)
            ours[way] = {"model": f"opt-{name}", "parameters": count, "bytes": peaks, "ratio": count / plain[0]}
            break
    return {"device_budget": device, "host_budget": host, "plain": {"model": plain[1], "parameters": plain[0]}, **ours}


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


def main(arguments: list[str]) -> int:
    """Writes fewer_NAME.json."""
    measures = {"head": head, "hydra": hydra, "merged": merged, "opt": opt}
    return run_measures(arguments, __doc__, measures, "fewer", "transformers")
