"""`penstock bench`: PPO on random prompts in the published order, timed phase by phase.

    for episode: for timestep: rollout, score; every --update-timesteps: learn --max-epochs times over what was kept

The first episode warms up, as in the published benchmark, and so do the steps before the first learning phase.
"""

import contextlib
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any, Literal

import torch

from penstock.algorithms.experience import Experience, concatenate
from penstock.algorithms.policy import permutation
from penstock.algorithms.setup import strategy_of
from penstock.commands.bench import count
from penstock.commands.bench.clock import Clock, largest
from penstock.commands.bench.config import BenchConfig
from penstock.commands.bench.fit import check, shape_of, sizes_of
from penstock.commands.bench.micro import gemm_peak
from penstock.commands.bench.profile import Recorder
from penstock.commands.bench.show import as_text
from penstock.commands.bench.work import Four, Sizes
from penstock.distributed.world import naming_lost_ranks
from penstock.errors import UserError
from penstock.models import weight_shapes
from penstock.models.config import DecoderConfig
from penstock.rollout.sampling import stream

PHASES = ("rollout", "score", "train")


@dataclasses.dataclass(frozen=True)
class Beat:
    """One entry of the schedule. Example: Beat("learn", timed=True)."""

    kind: Literal["experience", "learn"]
    timed: bool


def schedule(config: BenchConfig) -> list[Beat]:
    """What is done, in order. Raises UserError where a phase would run zero timed steps."""
    episodes, timesteps = config.num_episodes, config.max_timesteps
    if config.iterations is not None:
        episodes, timesteps = config.iterations + 1, config.update_timesteps
    beats: list[Beat] = []
    warm = False
    for step in range(episodes * timesteps):
        warm = warm or (step >= timesteps and any(beat.kind == "learn" for beat in beats))
        beats.append(Beat("experience", warm))
        if (step + 1) % config.update_timesteps == 0:
            beats.append(Beat("learn", warm))
    for kind in ("experience", "learn"):
        if not any(beat.timed and beat.kind == kind for beat in beats):
            raise UserError(
                f"--num-episodes {episodes} --max-timesteps {timesteps} --update-timesteps {config.update_timesteps}: "
                f"{kind} would run zero timed steps, as the first episode only warms up; give more of the first two, "
                "or --iterations 2."
            )
    return beats


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measures, prints, writes `--json`; returns the result, the same on every rank.

    Raises UserError for flags that cannot work and ResourceError, before anything is made, for what cannot fit.
    """
    beats, shape, sizes = schedule(config), shape_of(config), sizes_of(config)
    strategy = strategy_of(config)
    world, completed = strategy.world, False
    try:
        planned = check(config, shape, strategy)
        torch.manual_seed(config.seed)
        four = Four(
            strategy, shape, sizes.micro, lora_rank=config.lora_rank, base_dtype=config.base_dtype, top_k=config.top_k,
            seed=config.seed, sizes=sizes,
        )  # fmt: skip
        clock = Clock(strategy)
        with naming_lost_ranks():
            table = play(beats, four, clock, config, shape)
        gemm = gemm_peak(world.device, config.dtype)
        ranks = world.gather({"seconds": clock.seconds, "moved": clock.moved, "peaks": clock.peaks(), "gemm": gemm})
        measured = result(config, shape, sizes, four, ranks) | {"planned": planned, "profile": table}
        if world.first:
            print(as_text(measured))
            if config.json:
                Path(config.json).write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        completed = True
    finally:
        world.leave(completed)
    return measured


def play(
    beats: list[Beat], four: Four, clock: Clock, config: BenchConfig, shape: DecoderConfig
) -> dict[str, dict[str, float]] | None:
    """Runs the schedule; returns the table of the profiled iteration, if --profile asks for it."""
    world, size = four.strategy.world, config.experience_batch_size
    generator = torch.Generator().manual_seed(config.seed)
    prompts = torch.randint(shape.vocab_size, (config.prompts, config.prompt_length), generator=generator).tolist()
    new = config.max_length - config.prompt_length
    kept: list[Experience] = []
    episode = learned = 0
    recorder = Recorder(config.profile if world.first else None, world.device)
    with contextlib.ExitStack() as warming, recorder:
        warming.enter_context(clock.metered(four.streams))
        for beat in beats:
            if beat.timed:
                warming.close()
                recorder.start()
            if beat.kind == "experience":
                every = range(episode, episode + size * world.size)
                episode = every.stop
                picks = (stream(config.seed ^ 0xBE7C, every.start, len(every)) * len(prompts)).long().tolist()
                share = slice(world.rank, None, world.size)
                with clock.phase("rollout", beat.timed):
                    rollout = four.rollout([prompts[i] for i in picks[share]], new, list(every[share]))
                with clock.phase("score", beat.timed):
                    kept.append(four.score(rollout))
            else:
                with clock.phase("train", beat.timed):
                    experience = concatenate(kept)
                    for epoch in range(config.max_epochs):
                        order = permutation(len(experience.tokens), config.seed, learned, epoch)
                        for index in order.split(config.train_batch_size * world.size):
                            four.learn(experience, index)
                kept, learned = [], learned + 1
                if beat.timed:
                    recorder.stop()
    return recorder.table


def result(
    config: BenchConfig, shape: DecoderConfig, sizes: Sizes, four: Four, ranks: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the ranks measured, put together: see docs/benchmark.md for every key."""
    world, streams = four.strategy.world, four.streams
    parameters = {
        name: weight_shapes.count_of(shape, scalar=name in ("critic", "reward"))
        for name in ("actor", "critic", "reference", "reward")
    }
    updates = config.update_timesteps
    rows = count.Rows(sizes.experience, sizes.prompt, sizes.new)
    kept = count.Rows(sizes.experience * updates * sizes.epochs, sizes.prompt, sizes.new)
    recompute = streams["actor"].recompute
    flops = {
        "rollout": count.rollout_flops(shape, rows),
        "score": count.score_flops(shape, rows, config.lora_rank),
        "train": count.train_flops(shape, kept, recompute=recompute, lora_rank=config.lora_rank),
    }
    published = {
        "experience": count.published_experience_flops(parameters, rows),
        "learning": count.published_train_flops(parameters, kept),
    }
    gemm = min(rank["gemm"] for rank in ranks)
    phases = {name: phase_of(name, ranks, flops[name], gemm, updates) for name in PHASES}
    experience, learning = phases["rollout"]["seconds"] + phases["score"]["seconds"], phases["train"]["seconds"]
    return {
        "settings": dataclasses.asdict(config),
        "world": world.size,
        "device": str(world.device),
        "threads_per_rank": torch.get_num_threads(),
        "layers": shape.num_layers,
        "parameters": parameters,
        "trained_parameters": {
            name: sum(weight.numel for weight in stream.sink.weights) for name, stream in streams.items() if stream.sink
        },
        "recompute": recompute,
        "seconds_per_iteration": updates * experience + learning,
        "phases": phases,
        "experience": rates(
            experience, world.size, rows.count, rows.count * rows.new, flops["rollout"] + flops["score"],
            published["experience"],
        ),
        "learning": rates(
            learning, world.size, kept.count, kept.count * kept.length, flops["train"], published["learning"]
        ),
        "gemm_flops_per_rank": gemm,
        **largest([rank["peaks"] for rank in ranks]),
        "device_peak_by": "allocator" if world.device.type == "cuda" else "meter",
    }  # fmt: skip


def phase_of(name: str, ranks: list[dict[str, Any]], flops: float, gemm: float, updates: int) -> dict[str, Any]:
    """What the slowest rank took for a phase, and its share of the best product's speed."""
    seconds_of_ranks = [rank["seconds"].get(name, []) for rank in ranks]
    if not all(seconds_of_ranks):
        raise AssertionError(f"the phase {name} ran zero timed steps")
    slowest = [max(step) for step in zip(*seconds_of_ranks, strict=True)]
    seconds = statistics.median(slowest)
    moved = largest([rank["moved"][name] for rank in ranks])
    return {
        "seconds": seconds,
        "seconds_each": slowest,
        "times_per_iteration": 1 if name == "train" else updates,
        "flops_per_rank": flops,
        "tflops_per_rank": flops / seconds / 1e12,
        "share_of_gemm_peak": flops / seconds / gemm,
        "bytes_moved_each": {key: nbytes // len(slowest) for key, nbytes in moved.items()},
    }


def rates(
    seconds: float, world: int, samples: int, tokens: int, flops: float, published_flops: float
) -> dict[str, float]:
    """Throughput of one rank's samples, tokens and operations in so many seconds, and of all ranks'.

    Tokens of experience are those that were generated; of learning, all of every row in every pass.
    """
    return {
        "samples_per_second": world * samples / seconds,
        "samples_per_second_per_rank": samples / seconds,
        "tokens_per_second": world * tokens / seconds,
        "tokens_per_second_per_rank": tokens / seconds,
        "tflops_per_rank": flops / seconds / 1e12,
        "published_formula_tflops_per_rank": published_flops / seconds / 1e12,
    }
