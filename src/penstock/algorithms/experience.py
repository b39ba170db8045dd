"""A rollout scored by all models of PPO: what it learns from. Numbers in comments are the lines of docs/ppo.md.

[Note: whole experience on every rank] After scoring, every rank gathers the whole batch (token ids and a dozen numbers
per token: a few MB). Whitening, permutations and mini-batches are then one computation that world size never changes.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.algorithms import functional as fn
from penstock.algorithms.reward_source import Scorer
from penstock.config import AnswerFlags, RolloutFlags
from penstock.data.batching import pad
from penstock.memory.strategy import Strategy, Work
from penstock.memory.stream import Stream
from penstock.models.roles import Actor, ActorCritic, Critic, RewardModel
from penstock.rollout.engine import Answer


@dataclass
class Experience:
    """Rows are episodes; [B, R] tensors are aligned with the response tokens."""

    tokens: Tensor
    """[B, T] int64, prompt and response, right-padded."""
    prompt_lengths: Tensor
    """[B] int64."""
    lengths: Tensor
    """[B] int64, response tokens, EOS included."""
    logprobs: Tensor
    """[B, R] fp32, under the actor that wrote them: from the trainer's own forward (6), or the engine's."""
    ref_logprobs: Tensor
    """[B, R] fp32, under the reference."""
    values: Tensor
    """[B, R] fp32, the critic's at the state before each token; zeros without a critic."""
    entropy: Tensor
    """[B, R] fp32, of the distribution each token was drawn from."""
    sampling_logprobs: Tensor
    """[B, R] fp32, the engine's: of the policy that the tokens were drawn from."""
    scores: Tensor
    """[B] fp32, the reward model's or the reward function's."""
    ended: Tensor
    """[B] bool, the response ended with EOS."""
    advantages: Tensor
    """[B, R] fp32, whitened; zeros until `ppo.with_advantages`."""
    returns: Tensor
    """[B, R] fp32, before whitening; zeros until `ppo.with_advantages`."""
    scaled_scores: Tensor
    """[B] fp32, `scores` in the units in which the KL penalty is weighed: normalised where their source does not."""
    part_scores: Tensor
    """[B, F] fp32, what each of F summed rewards gave, NaN where one does not apply; F = 0 without a sum."""

    @property
    def mask(self) -> Tensor:
        """Valid response tokens, [B, R] bool, from lengths alone (1)."""
        return fn.mask_of(self.lengths, self.logprobs.shape[1])

    @property
    def valid(self) -> Tensor:
        """[B, T] bool: what is no padding."""
        return fn.mask_of(self.prompt_lengths + self.lengths, self.tokens.shape[1])

    @property
    def computed(self) -> Tensor:
        """[B, T] bool: the tokens whose states are not those of the row before."""
        return fn.computed(self.tokens, self.valid, self.prompt_lengths - 1)

    def rows(self, index: Tensor) -> "Experience":
        """The episodes of `index`, trimmed to the longest of them."""
        part = Experience(*(getattr(self, name)[index] for name in COLUMNS))
        width, responses = int((part.prompt_lengths + part.lengths).max()), int(part.lengths.max())
        trimmed = {name: getattr(part, name)[:, :responses] for name in PER_TOKEN}
        return dataclasses.replace(part, tokens=part.tokens[:, :width], **trimmed)

    def to(self, device: torch.device | str) -> "Experience":
        """The same episodes on another device."""
        return Experience(*(getattr(self, name).to(device) for name in COLUMNS))


COLUMNS = tuple(field.name for field in dataclasses.fields(Experience))
PER_TOKEN = ("logprobs", "ref_logprobs", "values", "entropy", "sampling_logprobs", "advantages", "returns")


@dataclass
class Roles:
    """The models of PPO, prepared."""

    actor: Stream
    reference: Stream | None = None
    """None: KL is not measured, and `ref_logprobs` are the actor's own."""
    critic: Stream | None = None
    """None: the actor's value head is the critic, or there are no values (a plain actor)."""
    reward: Stream | None = None
    """The reward model, where it reads the actor's tokens; None: `scorer` gives the scores."""
    scorer: Scorer | None = None


@dataclass(frozen=True)
class Answered:
    """A micro-batch of answers, as the models see it."""

    tokens: Tensor
    """[B, T] int64, prompt and response, right-padded."""
    prompt_lengths: Tensor
    """[B] int64."""
    lengths: Tensor
    """[B] int64, response tokens, EOS included."""
    answers: Sequence[Answer]

    @property
    def valid(self) -> Tensor:
        """[B, T] bool: what is no padding."""
        return fn.mask_of(self.prompt_lengths + self.lengths, self.tokens.shape[1])

    @property
    def computed(self) -> Tensor:
        """[B, T] bool: the tokens whose states are not those of the row before."""
        return fn.computed(self.tokens, self.valid, self.prompt_lengths - 1)


def score(
    strategy: Strategy, roles: Roles, rollout: Sequence[Answer], records: Sequence, temperature: float, size: int,
    *, reread: bool = True,
) -> Experience:  # fmt: skip
    """This rank's rollout as all models see it, on the CPU: models on one base side by side, the others in turn.

    records: the prompts, for the scorer. size: rows per forward pass. reread: whether the actor reads its own answers;
    if not, their log-probs are the engine's.
    """
    batches = scoring_batches(rollout, size, strategy.world.device)

    def of_actor(hidden: Tensor, rows: Answered) -> tuple[Tensor, Tensor, Tensor | None]:
        model = roles.actor.model
        values = values_of(model, hidden, rows) if isinstance(model, ActorCritic) else None
        return *logprobs_of(model, hidden, rows, temperature), values

    critic, reward = roles.critic, roles.reward
    # The actor first: if it streams, what fits of it is still on the device from the rollout.
    works: dict[str, Work] = {"actor": (roles.actor, batches, of_actor)} if reread else {}
    if roles.reference is not None:
        model = roles.reference.model
        of_reference = lambda hidden, rows: logprobs_of(model, hidden, rows, temperature, entropy=False)[0]  # noqa: E731
        works["reference"] = roles.reference, batches, of_reference
    if critic is not None:
        works["critic"] = critic, batches, lambda hidden, rows: values_of(critic.model, hidden, rows)
    if reward is not None:
        works["reward"] = reward, batches, lambda hidden, rows: score_of(reward.model, hidden, rows)
    results = dict(zip(works, strategy.evaluate_all([*works.values()]), strict=True))
    sampled = [sampled_logprobs(batch) for batch in batches]
    actor = results["actor"] if reread else [(logprobs, torch.zeros_like(logprobs), None) for logprobs in sampled]
    values = results["critic"] if critic is not None else [values for _, _, values in actor]
    reference = results.get("reference") or [logprobs for logprobs, _, _ in actor]
    read = [*zip(batches, sampled, actor, reference, values, strict=True)]
    experience = concatenate([_part(*columns).to("cpu") for columns in read])
    if reward is not None:
        rows = torch.cat(results["reward"]).float().cpu()[:, None]
    else:
        assert roles.scorer is not None
        rows = torch.tensor(roles.scorer(records, rollout), dtype=torch.float32).view(len(rollout), -1)
    scores, part_scores = rows[:, 0], rows[:, 1:]
    return dataclasses.replace(experience, scores=scores, scaled_scores=scores, part_scores=part_scores)


def _part(
    batch: Answered, sampled: Tensor, actor: tuple[Tensor, Tensor, Any], reference: Tensor, values: Tensor | None
) -> Experience:
    """A micro-batch as the models see it, without scores."""
    (logprobs, entropy, _), scores = actor, torch.zeros(len(batch.answers))
    zeros = torch.zeros_like(logprobs)
    return Experience(
        tokens=batch.tokens,
        prompt_lengths=batch.prompt_lengths,
        lengths=batch.lengths,
        logprobs=logprobs,
        ref_logprobs=reference,
        values=zeros if values is None else values,
        entropy=entropy,
        sampling_logprobs=sampled,
        scores=scores,
        ended=torch.tensor([answer.finish_reason == "stop" for answer in batch.answers]),
        advantages=zeros,
        returns=zeros,
        scaled_scores=scores,
        part_scores=scores.new_zeros(len(scores), 0),
    )


def used_scores(experience: Experience, flags: RolloutFlags) -> Tensor:
    """What rewards are made of, [B]: scaled and clipped scores, and the rule for answers that did not end (7, 10)."""
    scores, ended = experience.scaled_scores, experience.ended
    if flags.reward_clip is not None:
        scores = scores.clamp(-flags.reward_clip, flags.reward_clip)
    return with_ends(scores, ended, flags)


def importance(experience: Experience, flags: RolloutFlags) -> Tensor:
    """What a copy's choices weigh in the policy's loss, [B, R] fp32: see [Note: answers of a copy] in policy.py."""
    cap = CAP if flags.importance_sampling_cap is None else flags.importance_sampling_cap
    return fn.truncated_weights(experience.logprobs, experience.sampling_logprobs, cap)


CAP = 2.0
"""Of importance weights; TRL's and verl's."""


def weighted(x: Tensor, part: Experience, flags: RolloutFlags) -> Tensor:
    """x [B, R], each token's part of an expectation, times `importance` where a copy answered."""
    return x if flags.rollout_dtype is None else x * importance(part, flags)


def keeps_own_scores(flags: AnswerFlags) -> bool:
    """Whether answers that did not end are learned from by their own scores (GRPO's soft punishment is beside them)."""
    soft = getattr(flags, "overlong_buffer", 0) > 0
    return flags.missing_eos_score is None and (flags.missing_eos_penalty is None or soft)


def with_ends(scores: Tensor, ended: Tensor, flags: AnswerFlags) -> Tensor:
    """Scores [B] after the rule for answers that did not end, ended [B] bool (7)."""
    if flags.missing_eos_score is not None:
        return fn.replace_missing_eos(scores, ended, flags.missing_eos_score)
    return fn.below_ended(scores, ended, flags.missing_eos_penalty)


def scoring_batches(rollout: Sequence[Answer], size: int, device: torch.device) -> list[Answered]:
    """The rollout in micro-batches of `size` answers."""
    batches = []
    for start in range(0, len(rollout), size):
        answers = rollout[start : start + size]
        tokens, lengths = (x.to(device) for x in pad([answer.prompt_ids + answer.response_ids for answer in answers]))
        response_lengths = torch.tensor([len(answer.response_ids) for answer in answers], device=device)
        batches.append(Answered(tokens, lengths - response_lengths, response_lengths, answers))
    return batches


def sampled_logprobs(batch: Answered) -> Tensor:
    """The engine's log-probs of the response tokens, [B, R] fp32."""
    packed = [logprob for answer in batch.answers for logprob in answer.logprobs]
    return fn.unpack(torch.tensor(packed, device=batch.lengths.device), batch.lengths)


def logprobs_of(
    actor: Actor, hidden: Tensor, rows: Answered | Experience, temperature: float, *, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (zeros if nobody asks) of the response tokens, [B, R] fp32: the one path for actor,
    reference and training."""
    mask = fn.response_mask(rows.prompt_lengths, rows.lengths, rows.tokens.shape[1])
    states = fn.states_before(hidden, mask, rows.computed)
    logprobs, spread = actor.decoder.logprobs(states, rows.tokens[mask], temperature, entropy=entropy)
    spread = torch.zeros_like(logprobs) if spread is None else spread
    return fn.unpack(logprobs, rows.lengths), fn.unpack(spread, rows.lengths)


def score_of(reward: RewardModel, hidden: Tensor, rows: Answered) -> Tensor:
    """Scores [B] fp32 of whole rows, read at the last token."""
    return reward.read(fn.last_states(hidden, rows.prompt_lengths + rows.lengths, rows.computed))


def values_of(critic: Critic | ActorCritic, hidden: Tensor, rows: Answered | Experience) -> Tensor:
    """Values of the states before each response token, [B, R] fp32 (2)."""
    states = fn.response_states(hidden, rows.prompt_lengths, rows.lengths, rows.computed)
    return fn.unpack(critic.read(states), rows.lengths)


def concatenate(parts: Sequence[Experience]) -> Experience:
    """The rows of all parts, padded to the widest."""
    columns = {}
    for name in COLUMNS:
        tensors = [getattr(part, name) for part in parts]
        if tensors[0].dim() == 2:
            width = max(t.shape[1] for t in tensors)
            tensors = [torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in tensors]
        columns[name] = torch.cat(tensors)
    return Experience(**columns)


def in_order(shares: Sequence[Experience], group: int = 1) -> Experience:
    """The ranks' shares as one batch, in the order of episodes: inverse of `World.share_of`, rank by rank.

    group: how many answers side by side, those of one prompt, went to one rank.
    """
    whole, ranks = concatenate(shares), len(shares)
    origin = [
        (row // group * ranks + rank) * group + row % group
        for rank, part in enumerate(shares)
        for row in range(len(part.tokens))
    ]
    return whole.rows(torch.tensor(origin).argsort())
