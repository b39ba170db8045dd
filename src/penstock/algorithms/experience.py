"""A rollout seen by all four models: what PPO learns from. Numbers in comments are the lines of docs/ppo.md."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.algorithms import functional as fn
from penstock.algorithms.reward_source import Scorer
from penstock.config import PPOConfig
from penstock.data.batching import pad
from penstock.memory.strategy import Strategy, Work
from penstock.memory.stream import Stream
from penstock.models.roles import Actor, ActorCritic, Critic, RewardModel
from penstock.rollout.engine import Answer


@dataclass
class Experience:
    """A rollout scored by all four models. Rows are episodes; [B, R] tensors are aligned with the response tokens."""

    tokens: Tensor
    """[B, T] int64, prompt and response, right-padded."""
    prompt_lengths: Tensor
    """[B] int64."""
    lengths: Tensor
    """[B] int64, response tokens, EOS included."""
    logprobs: Tensor
    """[B, R] fp32, under the actor that wrote them, from the trainer's own forward (6)."""
    ref_logprobs: Tensor
    """[B, R] fp32, under the reference."""
    values: Tensor
    """[B, R] fp32, the critic's at the state before each token."""
    entropy: Tensor
    """[B, R] fp32, of the distribution each token was drawn from."""
    engine_gap: Tensor
    """[B, R] fp32, |engine's log-prob - trainer's|."""
    scores: Tensor
    """[B] fp32, the reward model's."""
    ended: Tensor
    """[B] bool, the response ended with EOS."""
    advantages: Tensor
    """[B, R] fp32, whitened; zeros until `with_advantages`."""
    returns: Tensor
    """[B, R] fp32, before whitening; zeros until `with_advantages`."""

    @property
    def mask(self) -> Tensor:
        """Valid response tokens, [B, R] bool, from lengths alone (1)."""
        return fn.mask_of(self.lengths, self.logprobs.shape[1])

    def rows(self, index: Tensor) -> "Experience":
        """The episodes of `index`, trimmed to their own longest rows."""
        part = Experience(*(getattr(self, one.name)[index] for one in dataclasses.fields(self)))
        width, responses = int((part.prompt_lengths + part.lengths).max()), int(part.lengths.max())
        trimmed = {one.name: getattr(part, one.name)[:, :responses] for one in PER_TOKEN}
        return dataclasses.replace(part, tokens=part.tokens[:, :width], **trimmed)

    def to(self, device: torch.device | str) -> "Experience":
        """The same episodes on another device."""
        return Experience(*(getattr(self, one.name).to(device) for one in dataclasses.fields(self)))


PER_TOKEN = [one for one in dataclasses.fields(Experience) if one.name in
             {"logprobs", "ref_logprobs", "values", "entropy", "engine_gap", "advantages", "returns"}]  # fmt: skip


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


def scoring_batches(rollout: Sequence[Answer], size: int, device: torch.device) -> list[Answered]:
    """The rollout in micro-batches of `size` answers."""
    batches = []
    for start in range(0, len(rollout), size):
        answers = rollout[start : start + size]
        tokens, lengths = (x.to(device) for x in pad([a.prompt_ids + a.response_ids for a in answers]))
        response_lengths = torch.tensor([len(a.response_ids) for a in answers], device=device)
        batches.append(Answered(tokens, lengths - response_lengths, response_lengths, answers))
    return batches


def score(
    strategy: Strategy,
    rollout: Sequence[Answer],
    records: Sequence,
    actors: Stream,
    references: Stream,
    critics: Stream | None,
    scorer: Scorer,
    config: PPOConfig,
    micro_batch_size: int,
    rewards: Stream | None = None,
) -> Experience:
    """The rollout seen by all four models, on the CPU; the models on one base side by side, others in turn.

    `critics`: None where the actor's own value head is the critic. `rewards`: the reward model, where it reads the
    actor's tokens; else `scorer` gives the scores.
    """
    batches = scoring_batches(rollout, micro_batch_size, strategy.world.device)

    def logprobs(stream: Stream) -> Work:
        def read(hidden: Tensor, rows: Answered) -> tuple[Tensor, ...]:
            found = logprobs_of(stream.model, hidden, rows, config.temperature)
            return (*found, values_of(stream.model, hidden, rows)) if isinstance(stream.model, ActorCritic) else found

        return stream, batches, read

    # The actor first: if it streams, what fits of it is still on the device from the rollout.
    works = [logprobs(actors), logprobs(references)]
    if critics is not None:
        works.append((critics, batches, lambda hidden, rows: values_of(critics.model, hidden, rows)))
    if rewards is not None:
        works.append((rewards, batches, lambda hidden, rows: score_of(rewards.model, hidden, rows)))
    of_actor, of_reference, *given = strategy.evaluate_all(works)
    values = given.pop(0) if critics is not None else [values for _, _, values in of_actor]
    seen = zip(batches, of_actor, of_reference, values, strict=True)
    parts: list[Experience] = []
    for batch, (own, entropy, *_), (ref_logprobs, *_), state_values in seen:
        engine = fn.unpack(
            torch.tensor([p for a in batch.answers for p in a.logprobs], device=own.device), batch.lengths
        )
        zeros = torch.zeros_like(own)
        part = Experience(
            tokens=batch.tokens,
            prompt_lengths=batch.prompt_lengths,
            lengths=batch.lengths,
            logprobs=own,
            ref_logprobs=ref_logprobs,
            values=state_values,
            entropy=entropy,
            engine_gap=(engine - own).abs(),
            scores=torch.zeros(len(batch.answers)),
            ended=torch.tensor([a.finish_reason == "stop" for a in batch.answers]),
            advantages=zeros,
            returns=zeros,
        )
        parts.append(part.to("cpu"))
    if given:
        scores = torch.cat(given[0]).float().cpu()
    else:
        scores = torch.tensor(scorer(records, rollout), dtype=torch.float32)
    return dataclasses.replace(concatenate(parts), scores=scores)


def logprobs_of(actor: Actor, hidden: Tensor, rows: Answered | Experience, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the response tokens, [B, R] fp32: the one path for actor, reference and training."""
    mask = fn.response_mask(rows.prompt_lengths, rows.lengths, rows.tokens.shape[1])
    states = fn.states_before(hidden, mask)
    logprobs, entropy = actor.decoder.logprobs(states, rows.tokens[mask], temperature)
    assert entropy is not None
    return fn.unpack(logprobs, rows.lengths), fn.unpack(entropy, rows.lengths)


def score_of(reward: RewardModel, hidden: Tensor, rows: Answered) -> Tensor:
    """Scores [B] fp32 of whole rows, read at the last token."""
    return reward.read(fn.last_states(hidden, rows.prompt_lengths + rows.lengths))


def values_of(critic: Critic | ActorCritic, hidden: Tensor, rows: Answered | Experience) -> Tensor:
    """Values of the states before each response token, [B, R] fp32 (2)."""
    states = fn.response_states(hidden, rows.prompt_lengths, rows.lengths)
    return fn.unpack(critic.read(states), rows.lengths)


def concatenate(parts: Sequence[Experience]) -> Experience:
    """Parts below each other, padded to the widest."""
    columns = {}
    for one in dataclasses.fields(Experience):
        tensors = [getattr(part, one.name) for part in parts]
        if tensors[0].dim() == 2:
            width = max(t.shape[1] for t in tensors)
            tensors = [torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in tensors]
        columns[one.name] = torch.cat(tensors)
    return Experience(**columns)


def in_order(shares: Sequence[Experience]) -> Experience:
    """Undoes `World.mine`: episode i came from rank i mod world. Every rank then holds the whole batch, a few MB."""
    whole = concatenate(shares)
    origin = [row * len(shares) + rank for rank, part in enumerate(shares) for row in range(len(part.tokens))]
    return whole.rows(torch.tensor(origin).argsort())
