"""A training command's iteration, run by the real engine on tensors without memory: what it takes, tier by tier.

`penstock plan --dry-run` prints it beside the forecast. The models are made from their shapes; the rollout, the
scoring and the optimizer steps are the very functions that `penstock ppo`, `sft` and `reward` call.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from penstock.algorithms import functional as fn
from penstock.algorithms.experience import Roles
from penstock.algorithms.ppo import PPO, permutation
from penstock.algorithms.reward import Ranking, Rankings, micro_batches, ranking_loss, score_states
from penstock.algorithms.sft import Rows, response_logprobs
from penstock.autochunk.meter import Meter
from penstock.commands.pretend import PretendDisk, PretendWorld, pretend
from penstock.config import OptimFlags
from penstock.memory.strategy import DTYPES, Strategy
from penstock.memory.stream import Stream
from penstock.memory.tiers import Ram
from penstock.models import linear, surgery
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor, Critic, RewardModel
from penstock.planner.workload import RoleSpec, Setting, Workload, forecast_of
from penstock.rollout.engine import Answer, Engine
from penstock.rollout.sampling import Sampling

CPU = torch.device("cpu")


def dry_run(setting: Setting) -> dict[str, Any]:
    """Runs one iteration; returns peak bytes per tier, and per phase and tier the bytes read and written.

    Raises ResourceError where a budget does not suffice.
    """
    planned = forecast_of(setting, timed=False)
    budgets, ranks = setting.budgets, PretendWorld(0, setting.world, CPU)
    tiers: dict[str, Any] = {
        "device": Ram("device", CPU, budgets.get("device")),
        "host": Ram("host", CPU, budgets.get("host")),
        "disk": PretendDisk(budgets.get("disk")),
    }
    strategy = Strategy(
        setting.strategy, ranks, DTYPES[setting.dtype], planned.recompute, setting.chunk_size,
        setting.activation_budget, reserve=planned.activations, swapped=planned.swapped, tiers=tiers,
    )  # fmt: skip
    models = models_of(setting.workload, strategy)
    with pretend(ranks), linear.computing(setting.arithmetic):
        return iterate(setting.workload, strategy, models, swap=planned.swapped > 0)


def models_of(work: Workload, strategy: Strategy) -> list[Any]:
    """The recipes of random models."""
    with strategy.init():
        return [_model(role) for role in work.roles]


def iterate(work: Workload, strategy: Strategy, models: Sequence[Any], *, swap: bool = False) -> dict[str, Any]:
    """One iteration of a workload under a strategy that nobody has used yet; see `rehearse`. `swap`: the KV cache."""
    streams = dict(zip((role.name for role in work.roles), strategy.prepare_all(*models), strict=True))
    traffic: dict[str, dict[str, int]] = {}
    peaks: Counter[str] = Counter()
    with Meter() as meter:
        for stream in streams.values():
            updates_count_at_home(stream, meter)

        @contextmanager
        def phase(name: Any) -> Iterator[None]:
            before = moved(strategy)
            with strategy.phase(name):
                yield
            for tier_name, tier in strategy.tiers.items():
                peaks[tier_name] = max(peaks[tier_name], tier.peak + meter.peaks[tier_name])
                tier.peak = tier.used
            meter.peaks = Counter(meter.used)
            traffic[name] = {key: count - before[key] for key, count in moved(strategy).items()}

        if work.stage == "ppo":
            host = strategy.tiers["host"]
            _ppo(work, strategy, streams, phase, host if swap and isinstance(host, Ram) else None)
        else:
            {"sft": _sft, "reward": _reward}[work.stage](work, strategy, streams, phase)
    return {**peaks, "traffic": traffic}


def _model(role: RoleSpec) -> Any:
    decoder = Decoder(role.config)
    if role.base is not None:
        decoder.seed = crc32(str(role.base).encode())  # equal bases are drawn alike, so they are one
    if role.base_dtype is not None:
        surgery.quantise_base(decoder, role.base_dtype)
    if role.spec is not None:
        surgery.add_adapters(decoder, role.spec, seed=crc32(role.name.encode()))
    if not role.scalar:
        model: Any = Actor(decoder)
    else:
        model = (Critic if role.name == "critic" else RewardModel)(decoder)
    return model if role.trained and role.spec else model.requires_grad_(role.trained)


def updates_count_at_home(stream: Stream, meter: Meter) -> None:
    """Where optimizer states live off the device, what an update needs in between lives there too."""
    if stream.sink is None:
        return
    homes = {home.tier.name for chunk_home in stream.sink.homes for home in chunk_home.states.values()}
    update = stream.sink.update

    def counted(lr: float, scale: float) -> None:
        with meter.on("device" if homes == {"device"} else "host"):
            update(lr, scale)

    stream.sink.update = counted  # type: ignore[method-assign]


def moved(strategy: Strategy) -> dict[str, int]:
    """Bytes through each tier so far: host_read, host_written, disk_read, disk_written."""
    tiers = strategy.tiers
    return {
        f"{name}_{way}": getattr(tiers[name], f"bytes_{way}") for name in ("host", "disk") if name in tiers
        for way in ("read", "written")
    }  # fmt: skip


def _generate(
    strategy: Strategy, decoder: Decoder, rows: int, prompt: int, sampling: Sampling, swap: Ram | None
) -> list[Answer]:
    """The prefill and the first decoding steps. The others are like the last of these: counted, and not run."""
    engine = Engine(decoder, eos_ids=(), rows=rows, length=prompt + sampling.max_new_tokens, swap=swap)
    answers = []
    for row in range(rows):  # all different: a prompt that is known is not read again
        digits = [row // 10**i % 10 for i in range(min(prompt, 9))]
        answers += engine.submit([1] * (prompt - len(digits)) + digits, sampling)
    before = after = moved(strategy)
    steps = min(STEPS, sampling.max_new_tokens)
    for _ in range(steps):
        engine.step()
        before, after = after, moved(strategy)
    rest = sampling.max_new_tokens - steps
    for key in after:
        tier, _, way = key.partition("_")
        counter, more = f"bytes_{way}", (after[key] - before[key]) * rest
        setattr(strategy.tiers[tier], counter, getattr(strategy.tiers[tier], counter) + more)
    for answer in answers:
        answer.response_ids += [1] * rest
        answer.logprobs += [1.0] * rest
    return answers


STEPS = 6
"""Tokens that a dry run generates: by the fourth, slots hold what they will hold."""

Phases = Callable[[Any], Any]


def _ppo(work: Workload, strategy: Strategy, streams: dict[str, Stream], phase: Phases, swap: Ram | None) -> None:
    """One iteration as in algorithms.ppo.ppo."""
    optim = OptimFlags(1e-6, batch_size=work.batch_size, micro_batch_size=work.micro_batch_size, epochs=work.epochs)
    roles = Roles(streams["actor"], streams["reference"], streams["critic"], streams.get("reward"), _no_scores)
    iteration, decoder = PPO(strategy, roles, optim), streams["actor"].model.decoder
    count, response = math.ceil(work.batch_size / strategy.world.size), work.length - work.prompt_length
    rollout: list[Answer] = []
    sampling, rows = Sampling(max_new_tokens=response), work.rollout_batch_size or count
    with phase("rollout"):
        for start in range(0, count, rows):
            answers = min(rows, count - start)
            rollout += _generate(strategy, decoder, answers, work.prompt_length, sampling, swap)
    with phase("score"):
        experience = iteration.score(rollout, [None] * len(rollout), 0.1)
    with phase("train"):
        for epoch in range(work.epochs):
            order = permutation(work.batch_size, 0, 1, epoch)
            for index in order.split(work.mini_batch_size):
                iteration.learn(experience, index)


def _no_scores(records: Sequence[Any], answers: Sequence[Answer]) -> list[float]:
    return [0.0] * len(answers)


def _sft(work: Workload, strategy: Strategy, streams: dict[str, Stream], phase: Phases) -> None:
    """One optimizer step as in algorithms.sft.sft, on whole rows."""
    stream = streams["model"]
    rows = [[1] * work.length] * math.ceil(work.batch_size / strategy.world.size)
    trained = [[0] + [1] * (work.length - 1)]
    batches = []
    for start in range(0, len(rows), work.micro_batch_size):
        part = rows[start : start + work.micro_batch_size]
        batches.append(Rows(torch.tensor(part), torch.tensor(trained * len(part), dtype=torch.bool)))

    def loss_of(hidden: Tensor, part: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        return fn.sft_loss(response_logprobs(stream.model, hidden, part), len(rows) * work.length), {}

    with phase("train"):
        strategy.step(stream, batches, loss_of, lr=1e-5)


def _reward(work: Workload, strategy: Strategy, streams: dict[str, Stream], phase: Phases) -> None:
    """One optimizer step as in algorithms.reward.reward, on pairs of whole rows."""
    stream, pairs = streams["model"], work.batch_size // 2
    rankings = [Ranking([[1] * work.length] * 2, (0, 1), (1, 1))] * math.ceil(pairs / strategy.world.size)

    def loss_of(hidden: Tensor, batch: Rankings) -> tuple[Tensor, dict[str, Tensor]]:
        return ranking_loss(score_states(stream.model, hidden, batch), batch, pairs, 0.0)

    with phase("train"):
        strategy.step(stream, micro_batches(rankings, work.micro_batch_size, CPU), loss_of, lr=1e-5)
