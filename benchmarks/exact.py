"""Whether every strategy and every arithmetic of the engine gives the numbers that it must, on any device."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import ours
from penstock.algorithms.sft import Rows
from penstock.commands.bench.work import Four
from penstock.memory.adamw import AdamW, states_of
from penstock.memory.placement import NAMES
from penstock.memory.strategy import Strategy
from penstock.models import log_probs, presets
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor
from penstock.models.surgery import quantise_base
from penstock.rollout.engine import Engine
from penstock.rollout.sampling import Sampling

SMALL = dataclasses.replace(
    presets.named("s"), num_layers=2, d_model=128, num_heads=4, num_kv_heads=4, head_dim=32, d_ff=512, vocab_size=500,
)  # fmt: skip


def strategies(device: str, disk: str, steps: int = 10) -> dict[str, Any]:
    """Every strategy, fp32 and bf16: the steps bit-equal to `naive` with recomputation, and close to plain PyTorch."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # else a GPU adds rows of a table up in any order
    batches = list(ragged(steps, device))
    torch.manual_seed(0)
    plain = plain_steps(Actor(Decoder(SMALL)).to(device), batches)
    rows: dict[str, Any] = {}
    for dtype in ("fp32", "bf16"):
        naive = trained("naive", dtype, device, disk, batches)
        for name in NAMES:
            weights = naive if name == "naive" else trained(name, dtype, device, disk, batches)
            rows[f"{name} {dtype}"] = {"largest_difference_to_naive": gap(weights, naive)}
        if dtype == "fp32":
            rows["naive fp32"]["largest_difference_to_plain_pytorch"] = gap(naive, plain)
    equal = all(row["largest_difference_to_naive"] == 0 for row in rows.values())
    return {"bit_equal": equal, "rows": rows}


def trained(name: str, dtype: str, device: str, disk: str, steps: list[list[Rows]]) -> dict[str, Tensor]:
    """The weights after the steps under a strategy, fp32."""
    torch.manual_seed(0)
    actor = Actor(Decoder(SMALL)).to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    strategy = Strategy.named(name, dtype=dtype, device=device, disk=disk, recompute=True)
    stream = strategy.prepare(actor)
    step = ours.sft(strategy, stream, lr=1e-3)
    for batches in steps:
        step(batches)
    return {
        weight.name: values[offset : offset + weight.numel].view(weight.shape).float()
        for home in stream.homes
        for values in [home.whole_weights(strategy.world)]
        for weight, offset in zip(home.chunk.weights, home.chunk.offsets, strict=True)
    }


def plain_steps(actor: Actor, steps: list[list[Rows]]) -> dict[str, Tensor]:
    """The weights after the same steps by autograd and torch.optim.AdamW."""
    optimizer = torch.optim.AdamW(actor.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    for batches in steps:
        optimizer.zero_grad()
        count = sum(int(batch.trained.sum()) for batch in batches)
        for batch in batches:
            logits = actor.decoder.logits(actor.decoder(batch.tokens)[:, :-1]).float()
            chosen = logits.log_softmax(-1).gather(-1, batch.tokens[:, 1:, None]).squeeze(-1)
            (-(chosen * batch.trained[:, 1:]).sum() / count).backward()
        nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
        optimizer.step()
    return {name: weight.detach().float().cpu() for name, weight in actor.named_parameters()}


def ragged(steps: int, device: str) -> Iterator[list[Rows]]:
    """Two ragged micro-batches per step."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        parts = []
        for length in (24, 17):
            tokens = torch.randint(500, (3, length), generator=generator).to(device)
            parts.append(Rows(tokens, torch.arange(length, device=device).expand(3, -1) >= 5))
        yield parts


def gap(weights: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest difference of any weight."""
    return max(float((weights[name] - reference[name]).abs().max()) for name in weights)


def features(device: str) -> dict[str, Any]:
    """What else computes on the device: packed weights, the head's tiles and 8-bit moments against the CPU, where tests
    hold them; adapters streamed against resident; answers by recorded steps against steps launched one by one."""
    shape = dataclasses.replace(SMALL, max_length=128, num_layers=3)
    ways = {
        **{f"{kind}, logits": partial(packed_logits, shape, kind) for kind in ("int8", "fp8", "nf4")},
        "fp8, logits in bf16, whose states a GPU rounds to fp8 too,": partial(
            packed_logits, shape, "fp8", dtype=torch.bfloat16
        ),
        "head, log-probabilities and gradients": head,
        "AdamW with 32-bit moments, weights": partial(updated, 32),
        "AdamW with 8-bit moments, weights": partial(updated, 8),
    }  # fmt: skip
    gaps = {}
    for name, way in ways.items():
        on_cpu, on_device = (way(each).float().cpu() for each in ("cpu", device))
        gaps[f"{name} against the CPU's"] = float((on_cpu - on_device).abs().max())
    return {**gaps, "hydra, largest difference to naive": hydra_gaps(shape, device), **generation(shape, device)}


def hydra_gaps(shape: DecoderConfig, device: str) -> dict[str, float]:
    """Adapters after two PPO iterations with four roles on one base, against `naive`."""
    adapters = {}
    for name, budget in (("naive", None), ("gemini_cpu", "3MB"), ("gemini_auto", "4MB")):
        torch.manual_seed(0)
        strategy = Strategy.named(
            name, dtype="bf16", device=device, recompute=True, device_memory=budget, host_memory="1GB"
        )
        four = Four(strategy, shape, lora_rank=4)
        for seed in range(2):
            list(four.iteration(torch.randint(400, (3, 16)).tolist(), 8, seed))
        homes = four.streams["actor"].homes
        adapters[name] = torch.cat([home.whole_weights(strategy.world).float() for home in homes])
    return {name: float((weights - adapters["naive"]).abs().max()) for name, weights in adapters.items()}


@torch.no_grad()
def packed_logits(shape: DecoderConfig, kind: Any, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits of packed weights."""
    torch.manual_seed(0)
    tokens = torch.randint(400, (3, 24)).to(device)
    decoder = Decoder(shape).requires_grad_(False).to(device, dtype)
    quantise_base(decoder, kind)
    return decoder.logits(decoder(tokens))


def head(device: str) -> Tensor:
    """Log-probabilities by tiles, and gradients of states and head, one after the other."""
    torch.manual_seed(0)
    states, weight = (torch.randn(rows, 64).to(device).requires_grad_() for rows in (300, 5000))
    tiled = log_probs.logprobs([(states, weight)], torch.randint(5000, (300,)).to(device))[0]
    grads = torch.autograd.grad(tiled.sum(), (states, weight))
    return torch.cat([part.detach().flatten() for part in (tiled, *grads)])


def updated(bits: int, device: str) -> Tensor:
    """Weights after three updates with moments of so many bits."""
    torch.manual_seed(0)
    weights, *grads = (torch.randn(1 << 16).bfloat16().to(device) for _ in range(4))
    states = {
        key: torch.zeros(weights.numel() // per, dtype=dtype, device=device)
        for key, (dtype, per) in states_of(torch.bfloat16, bits).items()
    }
    for step, grad in enumerate(grads):
        AdamW().update(weights, states, grad, lr=1e-3, scale=0.5, step=step + 1)
    return weights


def generation(shape: DecoderConfig, device: str) -> dict[str, Any]:
    """Answers by recorded steps against steps launched op by op, and their log-probs against the trainer's forward."""
    torch.manual_seed(0)
    decoder = Decoder(shape, device=device).requires_grad_(False)
    prompts = [torch.randint(400, (length,)).tolist() for length in (5, 9, 17)]
    sampling = Sampling(max_new_tokens=24, seed=3)
    recorded, launched = (
        Engine(decoder, eos_ids=(), rows=4, length=64, fixed=fixed).generate(prompts, sampling)
        for fixed in (True, False)
    )
    gaps = []
    for answer in recorded:
        row = torch.tensor([answer.prompt_ids + answer.response_ids], device=device)
        states = decoder(row)[0, len(answer.prompt_ids) - 1 : -1]
        forward = decoder.logprobs(states, row[0, len(answer.prompt_ids) :])[0].tolist()
        gaps += [abs(a - b) for a, b in zip(forward, answer.logprobs, strict=True)]
    return {
        "recorded steps give the same tokens": [
            a.response_ids == b.response_ids for a, b in zip(recorded, launched, strict=True)
        ],
        "engine against the trainer's forward, log-probabilities": max(gaps),
    }
