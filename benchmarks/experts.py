"""A mixture of experts against a dense model in which a token meets as many weights; and what comes where it streams.

    python -m benchmarks experts [dense streamed] [--repeats 5]

Random weights, 8 blocks of width 512, bf16 where the processor has instructions for it. `dense`: 32 experts of which a
token calls 4, against one MLP as wide as these 4: bytes, seconds of an optimizer step on 16 rows of 256 tokens, and
tokens/s of generation. `streamed`: the mixture in a device budget of 0.9 of its experts' bytes, equal to resident:
bytes and seconds per step of decoding where the chosen experts come and where all of a block's come, and the plan's.
"""

import dataclasses
from functools import partial
from typing import Any

import torch

from benchmarks import timing
from benchmarks.facts import run_measures
from penstock.algorithms import functional as fn
from penstock.algorithms.setup import reserve_activations, role_specs, setting_of
from penstock.algorithms.sft import Rows, response_logprobs
from penstock.memory.strategy import Strategy
from penstock.models import linear, weight_shapes
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor
from penstock.planner.workload import Workload, forecast_of
from penstock.rollout.engine import Engine
from penstock.rollout.sampling import Sampling

ACTIVE = 4
MIXTURE = DecoderConfig(
    "qwen3_moe", 8192, d_model=512, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64, d_ff=1024, max_length=512,
    position="rotary", rotary_dim=64, norm="rms", activation="silu", gated=True, qkv_bias=False, out_bias=False,
    mlp_bias=False, tied=False, qk_norm=True, num_experts=32, experts_per_token=ACTIVE, expert_ff=256,
)  # fmt: skip
DENSE = dataclasses.replace(
    MIXTURE, family="qwen3", num_experts=0, experts_per_token=0, expert_ff=0, d_ff=ACTIVE * MIXTURE.expert_ff
)
ROWS, LENGTH, PROMPT, NEW = 16, 256, 16, 32


def dtype() -> str:
    """The faster one on this processor."""
    return "fp32" if linear.slow_in_bf16("cpu") else "bf16"


def actor_of(config: DecoderConfig, strategy: Strategy) -> Actor:
    """A recipe: drawn the same whatever the strategy."""
    with strategy.init():
        decoder = Decoder(config)
    decoder.seed = 0
    return Actor(decoder)


def dense(repeats: int = 5) -> dict[str, Any]:
    """Both resident."""
    steps: timing.Calls = {}
    generations: timing.Calls = {}
    facts = {}
    for name, config in (("mixture", MIXTURE), ("dense", DENSE)):
        strategy = Strategy.named("naive", device="cpu", dtype=dtype())
        actor = actor_of(config, strategy)
        stream = strategy.prepare(actor)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, config.vocab_size, (ROWS, LENGTH), generator=generator)
        trained = torch.ones_like(tokens, dtype=torch.bool)
        trained[:, 0] = False
        batches = [Rows(*pair) for pair in zip(tokens.split(4), trained.split(4), strict=True)]

        def loss_of(hidden: torch.Tensor, batch: Rows, actor: Actor = actor, count: int = int(trained.sum())) -> Any:
            return fn.sft_loss(response_logprobs(actor, hidden, batch), count), {}

        steps[name] = partial(strategy.step, stream, batches, loss_of, lr=1e-5)
        generations[name] = partial(generated, actor, 8)
        facts[name] = {
            "parameters": weight_shapes.count_of(config, scalar=False),
            "active": weight_shapes.count_of(config, scalar=False, active=True),
            "bytes": sum(home.chunk.nbytes for home in stream.homes),
        }
    learned, made = timing.in_turns(steps, repeats), timing.in_turns(generations, repeats)
    return {
        "models": facts,
        "step_seconds": timing.medians(learned),
        "step_ratio": timing.ratio(learned, "mixture", "dense"),
        "tokens_per_second": timing.rates(made, 8 * NEW),
        "generation_ratio": timing.ratio(made, "mixture", "dense"),
    }


def generated(actor: Actor, rows: int) -> list[list[int]]:
    """Sampled answers."""
    engine = Engine(actor.decoder, eos_ids=(), rows=rows, length=PROMPT + NEW)
    prompts = torch.randint(3, 8192, (rows, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
    return [answer.response_ids for answer in engine.generate(prompts, Sampling(max_new_tokens=NEW))]


def streamed(repeats: int = 5) -> dict[str, Any]:
    """By how many answers generate together. Raises AssertionError where answers differ from those of a model that
    stays."""
    groups = weight_shapes.groups_of(MIXTURE, "float32", trained=False, scalar=False)
    width = 4 if dtype() == "fp32" else 2
    experts = width * sum(w.numel for group, weights in groups if ".experts." in group for w in weights)
    strategy = Strategy.named("naive", device="cpu", dtype=dtype())
    resident = actor_of(MIXTURE, strategy).requires_grad_(False)
    strategy.prepare(resident)
    batches: dict[int, Any] = {}
    for rows in (1, 4, 16, 64):
        ways = {name: Streamed(rows, name == "chosen", experts * 9 // 10) for name in ("chosen", "all")}
        answers = generated(resident, rows)
        moved = {name: way.bytes_of(answers) for name, way in ways.items()}
        seconds = timing.in_turns({name: partial(generated, way.actor, rows) for name, way in ways.items()}, repeats)
        few = ways["all"].few
        planned = "chosen" if rows <= few else "all"
        batches[rows] = {
            "bytes_per_token": {name: count // NEW for name, count in moved.items()},
            "bytes_ratio": moved["chosen"] / moved["all"],
            "seconds_per_token": {name: median / NEW for name, median in timing.medians(seconds).items()},
            "seconds_ratio": timing.ratio(seconds, "chosen", "all"),
            "the_plan_says": planned,
            "planned_bytes_ratio": ways[planned].planned / moved[planned],
        }
    return {"experts_bytes": experts, "device_budget": experts * 9 // 10, "few_tokens": few, "answers": batches}


class Streamed:
    """The mixture on the host, and what its plan says."""

    def __init__(self, rows: int, chosen: bool, budget: int) -> None:
        """`chosen`: whatever the plan says, the chosen experts come, or all."""
        self.rows, self.strategy = rows, Strategy.named("gemini_cpu", dtype=dtype(), device_memory=str(budget))
        self.actor = actor_of(MIXTURE, self.strategy).requires_grad_(False)
        work = Workload("ppo", role_specs({"actor": self.actor}), rows, rows, rows, 1, PROMPT, NEW)
        reserve_activations(self.strategy, work)
        self.few = self.strategy.few_tokens
        self.planned = forecast_of(setting_of(self.strategy, work)).traffic["rollout"]["host_read"]
        self.strategy.few_tokens = 10**6 if chosen else 0
        self.strategy.prepare(self.actor)

    def bytes_of(self, answers: list[list[int]]) -> int:
        """Bytes that one more generation fetches."""
        host = self.strategy.tiers["host"]
        assert generated(self.actor, self.rows) == answers
        before = host.bytes_read
        assert generated(self.actor, self.rows) == answers
        return host.bytes_read - before


def main(arguments: list[str]) -> int:
    """Runs the named measures, by default all."""
    return run_measures(arguments, __doc__, {"dense": dense, "streamed": streamed}, "experts")
