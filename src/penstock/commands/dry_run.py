"""One iteration of a training command, run by the real engine on tensors without memory: peaks and traffic per tier.

`penstock plan --dry-run` prints it beside the forecast. The models are made from their shapes; the rollout, the
scoring and the optimizer steps are the functions that `penstock ppo`, `sft` and `reward` call.

[Note: a dry run is the engine on fake tensors] Weights, activations and gradients are fake (shape, dtype, device).
Whole numbers that decide what happens next (lengths, masks, permutations) stay real, so the code that trains runs as it
is, for models of any size. A number that is read from a fake tensor is 1. Every rank holds the same bytes (chunks are
padded to equal shards, and the first rank has most rows), so only the first is run. Decoding steps after the sixth are
counted and not run: they are all alike.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from penstock.algorithms import kto, preference, reward, sft
from penstock.algorithms.config import DistillFlags, DPOFlags, GRPOFlags
from penstock.algorithms.distillation.distill import Distillation
from penstock.algorithms.distillation.inputs import Row
from penstock.algorithms.distillation.teacher import TeacherStore, read_teacher
from penstock.algorithms.experience import Roles
from penstock.algorithms.grpo import GRPO, with_advantages
from penstock.algorithms.policy import permutation
from penstock.algorithms.ppo import PPO
from penstock.algorithms.reference import with_reference
from penstock.autochunk.meter import Meter
from penstock.config import OptimFlags
from penstock.data.chat import Example
from penstock.errors import UserError
from penstock.memory.homes import ChunkHome
from penstock.memory.placement import PYTORCH
from penstock.memory.strategy import DTYPES, Strategy
from penstock.memory.stream import Stream
from penstock.memory.tiers import Ram
from penstock.models import linear, surgery
from penstock.models.decoder import Decoder
from penstock.models.foreign.decoder import decoder_of
from penstock.models.roles import Actor, Critic, RewardModel
from penstock.planner.measuring.pretend import PretendDisk, PretendWorld, pretend
from penstock.planner.workload import RoleSpec, Setting, Workload, forecast_of, one_by_one
from penstock.rollout.engine import Answer, Engine
from penstock.rollout.sampling import Sampling

CPU = torch.device("cpu")


def dry_run(setting: Setting, iterations: int = 1) -> dict[str, Any]:
    """Returns peak bytes per tier, and per phase and tier the bytes read and written. Traffic is that of the last
    iteration: the first one fetches what then stays, so a forecast's is that of the second.

    Raises ResourceError where a budget does not suffice.
    """
    if setting.strategy in PYTORCH and setting.world > 1:
        raise UserError(f"--dry-run runs our own engine, and --strategy {setting.strategy} PyTorch's; leave it out.")
    if setting.workload.stored:
        parts = [dry_run(part, iterations) for part in one_by_one(setting)]
        traffic = {phase: moved for part in parts for phase, moved in part.pop("traffic").items()}
        return {**{tier: max(part[tier] for part in parts) for tier in parts[0]}, "traffic": traffic}
    planned = forecast_of(setting)
    budgets, ranks = setting.budgets, PretendWorld(0, setting.world, CPU)
    tiers: dict[str, Any] = {
        "device": Ram("device", CPU, budgets.get("device")),
        "host": Ram("host", CPU, budgets.get("host")),
        "disk": PretendDisk(budgets.get("disk")),
    }
    strategy = Strategy(
        setting.strategy, ranks, DTYPES[setting.dtype], planned.recompute, setting.chunk_size,
        setting.activation_budget, reserve=planned.activations, swapped=planned.swapped,
        offloaded=planned.offloaded, further=planned.further, tiers=tiers,
    )  # fmt: skip
    models = models_of(setting.workload, strategy)
    with pretend(ranks), linear.computing(setting.arithmetic):
        return iterate(setting.workload, strategy, models, swap=planned.swapped > 0, iterations=iterations)


def models_of(work: Workload, strategy: Strategy) -> list[Any]:
    """The recipes of random models."""
    with strategy.init():
        return [_model(role) for role in work.roles]


def iterate(
    work: Workload, strategy: Strategy, models: Sequence[Any], *, swap: bool = False, iterations: int = 1
) -> dict[str, Any]:
    """Iterations under an unused strategy, with the result of `dry_run`. `swap`: the KV cache is on the host."""
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

        if work.rolls_out or work.stage == "distill":
            host, run = strategy.tiers["host"], _distill if work.stage == "distill" else _policy
            for _ in range(iterations):
                run(work, strategy, streams, phase, host if swap and isinstance(host, Ram) else None)
        else:
            stages = {"sft": _sft, "reward": _reward, "dpo": _dpo, "kto": _kto}
            for _ in range(iterations):
                stages[work.stage](work, strategy, streams, phase)
    return {**peaks, "traffic": traffic}


def _model(role: RoleSpec) -> Any:
    decoder = decoder_of(role.config)
    if role.base is not None:
        decoder.seed = crc32(str(role.base).encode())  # equal bases are drawn alike, so they share their weights
    if role.base_dtype is not None:
        surgery.quantise_base(decoder, role.base_dtype)
    if role.spec is not None:
        surgery.add_adapters(decoder, role.spec, seed=crc32(role.name.encode()))
    if not role.scalar:
        model: Any = Actor(decoder)
    else:
        model = (Critic if role.name == "critic" else RewardModel)(decoder)
    return model if role.trained else model.requires_grad_(False)  # adapters' base and theirs of buffers stay frozen


def updates_count_at_home(stream: Stream, meter: Meter) -> None:
    """Has the meter count the scratch of updates in host memory, but that of chunks whose states are on the device."""
    if stream.sink is None:
        return
    update, update_in_ram = stream.sink.update, stream.sink._update_in_ram

    def counted(lr: float, scale: float) -> None:
        with meter.on("host"):
            update(lr, scale)

    def counted_in_ram(home: ChunkHome, graded: bool, move: dict[str, Any]) -> None:
        with meter.on(next(iter(home.states.values())).tier.name):
            update_in_ram(home, graded, move)

    stream.sink.update = counted  # type: ignore[method-assign]
    stream.sink._update_in_ram = counted_in_ram  # type: ignore[method-assign]


def moved(strategy: Strategy) -> dict[str, int]:
    """Bytes through each tier so far: host_read, host_written, disk_read, disk_written."""
    tiers = strategy.tiers
    return {
        f"{name}_{way}": getattr(tiers[name], f"bytes_{way}") for name in ("host", "disk") if name in tiers
        for way in ("read", "written")
    }  # fmt: skip


def _generate(strategy: Strategy, decoder: Decoder, rows: int, work: Workload, swap: Ram | None) -> list[Answer]:
    """The prefill and the first decoding steps. The rest are like the last of these: counted, and not run."""
    prompt, sampling = work.prompt_length, Sampling(max_new_tokens=work.length - work.prompt_length)
    engine = Engine(decoder, eos_ids=(), rows=rows, length=work.length, swap=swap)
    engine.reserve()
    answers = []
    for row in range(rows):
        number = row // work.group_size  # equal prompts share one prefill
        digits = [number // 10**i % 10 for i in range(min(prompt, 9))]
        answers += engine.submit([1] * (prompt - len(digits)) + digits, sampling)
    before = after = moved(strategy)
    steps = min(STEPS, sampling.max_new_tokens)
    for _ in range(steps):
        engine.step()
        before, after = after, moved(strategy)
    remaining = sampling.max_new_tokens - steps
    for key in after:
        tier, _, way = key.partition("_")
        counter, nbytes = f"bytes_{way}", (after[key] - before[key]) * remaining
        setattr(strategy.tiers[tier], counter, getattr(strategy.tiers[tier], counter) + nbytes)
    for answer in answers:
        answer.response_ids += [1] * remaining
        answer.logprobs += [1.0] * remaining
    return answers


STEPS = 6
"""Tokens that a dry run generates: by the fourth, slots hold what they will hold."""

Phases = Callable[[Any], Any]


def _policy(work: Workload, strategy: Strategy, streams: dict[str, Stream], phase: Phases, swap: Ram | None) -> None:
    """One iteration as in algorithms.ppo.ppo or algorithms.grpo.grpo."""
    optim = OptimFlags(1e-6, batch_size=work.batch_size, micro_batch_size=work.micro_batch_size, epochs=work.epochs)
    roles = Roles(streams["actor"], streams.get("reference"), streams.get("critic"), streams.get("reward"), _no_scores)
    decoder = streams["actor"].model.decoder
    rollout = _rollout(work, strategy, decoder, phase, swap)
    if work.stage == "ppo":
        iteration: Any = PPO(strategy, roles, optim)
        with phase("score"):
            experience = iteration.score(rollout, [None] * len(rollout), 0.1)
    else:
        flags = GRPOFlags(group_size=work.group_size, max_new_tokens=work.length - work.prompt_length)
        iteration = GRPO(strategy, roles, optim, flags, reread=work.reread)
        with phase("score"):
            experience = with_advantages(iteration.read(rollout, [None] * len(rollout), work.group_size), flags)
    with phase("train"):
        for epoch in range(work.epochs):
            order = permutation(work.batch_size, 0, 1, epoch)
            for index in order.split(work.mini_batch_size):
                iteration.learn(experience, index)


def _rollout(work: Workload, strategy: Strategy, decoder: Decoder, phase: Phases, swap: Ram | None) -> list[Answer]:
    """All answers of this rank."""
    count, rollout = math.ceil(work.batch_size / strategy.world.size), list[Answer]()
    rows = work.rollout_batch_size or count
    with phase("rollout"):
        if work.rollout_dtype is not None:
            decoder = surgery.packed_copy(decoder, work.rollout_dtype)
        for start in range(0, count, rows):
            rollout += _generate(strategy, decoder, min(rows, count - start), work, swap)
    return rollout


def _no_scores(records: Sequence[Any], answers: Sequence[Answer]) -> list[float]:
    return [0.0] * len(answers)


def _distill(work: Workload, strategy: Strategy, streams: dict[str, Stream], phase: Phases, swap: Ram | None) -> None:
    """One optimizer step as in algorithms.distillation.distill.distill; of a teacher or a student alone, its part."""
    optim = OptimFlags(1e-5, batch_size=work.batch_size, micro_batch_size=work.micro_batch_size)
    answer = work.length - work.prompt_length
    rows = [Row([1] * work.length, [False] * work.prompt_length + [True] * answer)] * work.batch_size
    flags, teacher = DistillFlags(teacher_top_k=work.top_k), streams.get("teacher")
    if "model" not in streams:
        assert teacher is not None
        with phase("score"):
            batches = sft.micro_batches(strategy.world.share_of(rows), work.micro_batch_size, CPU)
            read_teacher(strategy, teacher, batches, flags, work.roles[0].config.vocab_size)
        return
    if work.samples:
        _rollout(work, strategy, streams["model"].model.decoder, phase, swap)
    iteration = Distillation(strategy, streams["model"], teacher or _Store(answer, work.top_k), optim, flags)
    with phase("score") if teacher else nullcontext():
        taught = iteration.teach(rows)
    with phase("train"):
        iteration.learn(taught, answer * len(rows), 1e-5)


class _Store(TeacherStore):
    """What a teacher would have said of answers that all have the same length."""

    def __init__(self, answer: int, k: int) -> None:
        self.answer, self.k = answer, k

    def read(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        count = self.answer * len(numbers)
        return torch.arange(self.k).repeat(count, 1), torch.empty(count, self.k + 1)


def _sft(work: Workload, strategy: Strategy, streams: dict[str, Stream], phase: Phases) -> None:
    """One optimizer step on whole rows."""
    rows = [Example([1] * work.length, [False] + [True] * (work.length - 1))] * work.batch_size
    with phase("train"):
        sft.learn(strategy, streams["model"], rows, OptimFlags(1e-5, micro_batch_size=work.micro_batch_size), 1e-5)


def _reward(work: Workload, strategy: Strategy, streams: dict[str, Stream], phase: Phases) -> None:
    """One optimizer step on pairs of whole rows."""
    optim = OptimFlags(1e-5, micro_batch_size=work.micro_batch_size)
    with phase("train"):
        reward.learn(strategy, streams["model"], _pairs(work), optim, 1e-5, 0.0)


def _dpo(work: Workload, strategy: Strategy, streams: dict[str, Stream], phase: Phases) -> None:
    """The reference on pairs of whole rows, and one optimizer step on them."""
    pairs, flags = _pairs(work), DPOFlags(loss="sigmoid" if "reference" in streams else "cpo")
    optim = OptimFlags(1e-6, batch_size=len(pairs), micro_batch_size=work.micro_batch_size)
    if "reference" in streams:
        with phase("score"):
            pairs = with_reference(strategy, streams["reference"], pairs, optim)
    with phase("train"):
        preference.learn(strategy, streams["model"], pairs, optim, flags, 1e-6)


def _pairs(work: Workload) -> list[reward.Ranking]:
    rows = [[1] * (work.length - 1) + [last] for last in (1, 2)]  # equal rows would not be compared
    response = work.length - work.prompt_length
    return [reward.Ranking(rows, (0, 1), (response, response))] * (work.batch_size // 2)


def _kto(work: Workload, strategy: Strategy, streams: dict[str, Stream], phase: Phases) -> None:
    """One optimizer step on whole rows, half of them liked."""
    trained = [i >= work.prompt_length for i in range(work.length)]
    votes = [kto.Judged([1] * work.length, trained, liked=i % 2 == 0) for i in range(work.batch_size)]
    optim = OptimFlags(1e-6, batch_size=work.batch_size, micro_batch_size=work.micro_batch_size)
    iteration = kto.KTO(strategy, streams["model"], streams["reference"], optim)
    with phase("score"):
        batch = iteration.score(votes)
    with phase("train"):
        iteration.learn(batch, 1e-6)
