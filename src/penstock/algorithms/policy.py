"""What PPO, GRPO and online preference learning share: a policy that answers, what all models make of its answers, and
what a run keeps between updates.

Numbers in comments are the lines of docs/ppo.md.

[Note: answers of a copy] A streamed actor whose weights do not fit beside the rest visits all of them for every token.
With --rollout-dtype its weights come once per rollout, and a packed copy of them answers, which is gone when the
rollout ends. The copy is another policy, though nearly the same. So the actor reads the answers, its log-probs are the
old policy's, the copy's are kept beside, and a token's part of the loss is multiplied by min(actor / copy, cap).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from penstock.algorithms.experience import Experience, Roles, in_order, keeps_own_scores, score
from penstock.algorithms.health import Row, health, remember
from penstock.algorithms.heldout import Best
from penstock.algorithms.policy_inputs import Inputs
from penstock.algorithms.policy_metrics import of_heldout
from penstock.algorithms.setup import reserve_activations, role_specs, sample_rows
from penstock.config import OptimFlags, RolloutFlags
from penstock.data.batching import Shuffle
from penstock.memory.strategy import StepStats, Strategy
from penstock.memory.stream import Stream
from penstock.memory.tiers import Ram
from penstock.models.surgery import packed_copy
from penstock.planner.workload import Workload
from penstock.rollout.engine import Answer, generate
from penstock.rollout.sampling import Sampling, stream
from penstock.run.session import Session


@dataclass
class Policy:
    """Prepared models of which the actor answers. It keeps no state."""

    strategy: Strategy
    roles: Roles
    optim: OptimFlags
    flags: Any = field(default_factory=RolloutFlags)
    """RolloutFlags, and those of the algorithm."""
    seed: int = 0
    """Of the sampled tokens."""
    eos_ids: Sequence[int] = ()
    """Tokens that end an answer."""
    swap: Ram | None = None
    """The host tier that the KV cache is swapped to."""
    tokenizer: Any = None
    """Of the actor; finds --stop in answers."""
    reread: bool = True
    """Whether the actor reads its answers before it learns from them; if not, their log-probs are the engine's."""
    between: Callable[[], object] = bool
    """Called before each token of a rollout, which ends with what it raises (`Session.give_up`)."""

    def sampling(self, **changes: Any) -> Sampling:
        flags = self.flags
        names = ("temperature", "max_new_tokens", "top_k", "top_p", "stop", "min_new_tokens")
        return Sampling(**{name: getattr(flags, name) for name in names} | {"seed": self.seed} | changes)

    def rollout(self, prompts: Sequence[list[int]], episodes: Sequence[int], **changes: Any) -> list[Answer]:
        """This rank's answers. `episodes` number their random streams; `changes` are those of the sampling: with n=8,
        prompt by prompt eight answers, which read it once."""
        decoder, sampling = self.roles.actor.model.decoder, self.sampling(**changes)
        options: Any = {"batch_size": self.flags.rollout_batch_size, "swap": self.swap, "tokenizer": self.tokenizer}
        with self.strategy.phase("rollout"):
            if self.flags.rollout_dtype is not None:  # see [Note: answers of a copy]
                decoder = packed_copy(decoder, self.flags.rollout_dtype)
            options |= {"episodes": episodes, "between": self.between}
            return generate(decoder, prompts, sampling, eos_ids=self.eos_ids, **options)

    def read(self, rollout: Sequence[Answer], records: Sequence, group: int = 1) -> Experience:
        """The answers of all ranks, as all models see them, in the order of episodes; call it in phase `score`.

        records: this rank's prompts, one per answer. group: answers side by side that are one rank's.
        """
        strategy, size = self.strategy, self.optim.micro_batch_size
        share = score(strategy, self.roles, rollout, records, self.flags.temperature, size, reread=self.reread)
        return in_order(strategy.world.gather(share), group)  # see [Note: whole experience on every rank]


def prepare_roles(
    stage: str, config: Any, strategy: Strategy, inputs: Inputs, group_size: int = 1, *, reread: bool = True
) -> tuple[Roles, Ram | None]:
    """Gives the models their homes, and leaves the device memory that their activations need.

    stage: the plan's name of the work. Returns the models, and the host tier if the KV cache must be swapped to it.
    """
    models, source, optim, flags = inputs.models, inputs.source, config.optim, config.rollout
    longest = max(map(len, [*inputs.prompts, *inputs.heldout[1]]))
    mini_batch = getattr(config, "mini_batch_size", None) or optim.batch_size
    batches = (optim.batch_size, optim.micro_batch_size, mini_batch, optim.epochs)
    lengths = (longest, flags.max_new_tokens, flags.rollout_batch_size)
    sampling: Any = {"temperature": flags.temperature, "sampled_of": flags.top_k, "top_p": flags.top_p}
    sampling["rollout_dtype"] = flags.rollout_dtype
    work = Workload(stage, role_specs(models), *batches, *lengths, group_size, reread=reread, **sampling)
    swap = reserve_activations(strategy, work)
    streams = dict(zip(models, strategy.prepare_all(*models.values(), **optim.adamw), strict=True))
    source.stream = streams.get("reward")
    reward = source.stream if source.reads_actor_tokens else None
    return Roles(streams["actor"], streams.get("reference"), streams.get("critic"), reward, source.score_parts), swap


def show(step: int, session: Session, policy: Policy, inputs: Inputs, count: int) -> None:
    """Greedy answers to the first `count` prompts and their scores, for the report."""
    if not count:
        return  # a reward function need not know what to do with no answers
    records, prompts = inputs.records[:count], inputs.prompts[:count]
    answers = policy.rollout(prompts, range(len(prompts)), temperature=0.0)
    scores = inputs.source.score(records, answers)
    session.sample(step, sample_rows(inputs.encoder, answers, scores, kind="greedy"))


def evaluate(
    step: int, session: Session, policy: Policy, inputs: Inputs, best: Best, metrics: dict[str, float]
) -> bool:
    """Adds the held-out prompts' metrics; True if their score is the best so far. Their random streams are the same
    at every evaluation, and no other answer's."""
    share_of, (records, prompts) = policy.strategy.world.share_of, inputs.heldout
    if not prompts:
        return False
    drawn = share_of(list(enumerate(prompts)))
    rollout = policy.rollout([ids for _, ids in drawn], [i for i, _ in drawn], seed=policy.seed ^ HELDOUT_STREAMS)
    with policy.strategy.phase("score"):
        experience = policy.read(rollout, share_of(records))
    own = keeps_own_scores(policy.flags)
    metrics |= of_heldout(experience, has_kl=policy.roles.reference is not None, own=own)
    improved = best.better(metrics["heldout/scores"])
    best.end_early(session, step)
    return improved


HELDOUT_STREAMS = 0xE7A1
"""In the seed of held-out answers."""


def permutation(count: int, seed: int, step: int, epoch: int) -> Tensor:
    """The order of the episodes in one epoch over one experience, keyed, so that a resumed epoch goes on in it."""
    return stream(seed ^ 0x5EED, (step << 16) + epoch, count).argsort()


def passed_target_kl(stats: StepStats | None, target_kl: float | None) -> bool:
    """Whether the policy's mean approximate KL in this update is above 1.5 times the target (20)."""
    if not target_kl or stats is None:
        return False
    return stats.sums["approxkl"] > 1.5 * target_kl * stats.sums["tokens"]


@dataclass
class PolicyState:
    """What is kept from one update to the next. A checkpoint holds all of it."""

    shuffle: Shuffle
    step: int = 0
    """Steps that are complete."""
    update: int = 0
    """Updates on `experience` that are complete."""
    experience: Experience | None = None
    """None between two steps."""
    sums: list[tuple[str, StepStats]] = field(default_factory=list)
    """("policy" or "value", statistics) of each of those updates."""
    lr: float = 0.0
    """What the last of them multiplied the learning rate by."""
    history: list[Row] = field(default_factory=list)
    """Metrics of earlier steps that `health` looks back on."""
    best: Best = field(default_factory=Best)
    """Of the held-out score."""

    def examine(self, config: Any, metrics: dict[str, float]) -> list[str]:
        """What is wrong at this step, counted in its metrics."""
        assert self.experience is not None
        warnings = health(self.experience, config, self.history, metrics)
        metrics["health/warnings"] = float(len(warnings))
        self.history = remember(self.history, metrics)
        return warnings

    def end(self, step: int) -> None:
        """A step is complete."""
        self.step, self.update, self.experience, self.sums, self.lr = step, 0, None, [], 0.0

    def save(self) -> dict[str, Any]:
        """For a checkpoint's state.json."""
        return {
            "shuffle": self.shuffle.state_dict(),
            "step": self.step,
            "update": self.update,
            "experience": vars(self.experience) if self.experience else None,
            "sums": [(name, dataclasses.asdict(stats)) for name, stats in self.sums],
            "lr": self.lr,
            "history": self.history,
            "best": self.best.value,
            "stale": self.best.stale,
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Inverse of `save`, and of what earlier releases saved: "sums" only inside a step, fewer columns."""
        self.shuffle.load_state_dict(saved["shuffle"])
        self.step, self.update = saved["step"], saved["update"]
        experience = saved["experience"]
        if experience:
            scores, gap = experience["scores"], experience.pop("engine_gap", 0.0)
            later = {"scaled_scores": scores, "part_scores": scores.new_zeros(len(scores), 0)}
            later["sampling_logprobs"] = experience["logprobs"] + gap
            self.experience = Experience(**later | experience)
        self.sums = [(name, StepStats(**stats)) for name, stats in saved.get("sums", [])]
        self.lr, self.history = saved.get("lr", 0.0), saved.get("history", [])
        self.best.load(saved.get("best", -math.inf), saved)


def trained_streams(roles: Roles) -> dict[str, Stream]:
    """The models that are trained, under their names in checkpoints."""
    critic = {} if roles.critic is None else {"critic": roles.critic}
    return {"model": roles.actor, **critic}
