"""Reward modelling: a score learned from rankings of K responses to one prompt (Ouyang et al. 2022, stage 2).

All pairs of one prompt are in one batch element and each response is encoded once; the loss is the mean over the
prompt's pairs, then over prompts (PPO.md 22). The split is by prompt (PPO.md 23). After training the score is shifted
and scaled on held-out responses, and that normalisation is saved with the model (PPO.md 10).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.algorithms import functional as fn
from penstock.algorithms.heldout import Best, interval, read_sides
from penstock.algorithms.setup import placed, prepare, read, read_model, say_length, strategy_of
from penstock.config import OptimFlags, RewardConfig
from penstock.data.batching import Shuffle, pad
from penstock.data.chat import Example
from penstock.errors import DataError
from penstock.memory.strategy import StepStats, Strategy
from penstock.memory.stream import Losses, Stream
from penstock.models.roles import RewardModel
from penstock.rollout.engine import Answer
from penstock.run import intervals
from penstock.run.session import Session


@dataclass(frozen=True)
class Ranking:
    """One prompt's responses, whole rows, and their ranks. Example: Ranking([[1, 5, 2], [1, 6, 2]], (0, 1), (2, 2))."""

    rows: list[list[int]]
    """Prompt and response tokens of each of the K responses."""
    ranks: tuple[int, ...]
    """0 is the best; equal ranks are ties."""
    response_lengths: tuple[int, ...]
    ref_logprobs: tuple[float, ...] = ()
    """What preference learning compares with: each response's log-probability under a reference, once it is known."""

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The better and the worse response of each pair of different rank; equal rows are not compared."""
        ranks, rows = self.ranks, self.rows
        indices = range(len(ranks))
        return [(i, j) for i in indices for j in indices if ranks[i] < ranks[j] and rows[i] != rows[j]]

    def best_and_worst(self) -> "Ranking":
        """The first of the best responses and the last of the worst, which are not equal."""
        pair = max(self.pairs, key=lambda pair: (self.ranks[pair[1]] - self.ranks[pair[0]], pair[1]))
        return Ranking([self.rows[i] for i in pair], (0, 1), tuple(self.response_lengths[i] for i in pair))


def ranked(answers: Sequence[Answer], scores: Sequence[float]) -> Ranking:
    """Answers to one prompt in the order of their scores; equal scores are ties."""
    levels = sorted(set(scores), reverse=True)
    rows = [answer.prompt_ids + answer.response_ids for answer in answers]
    return Ranking(rows, tuple(map(levels.index, scores)), tuple(len(answer.response_ids) for answer in answers))


def reward(config: RewardConfig, *, resume: bool = False) -> Path:
    """Trains as `config` says and returns the run directory. With `resume`, goes on from its newest checkpoint."""
    config = dataclasses.replace(config, run=placed(config.run))
    optim, strategy = config.optim, strategy_of(config.run)
    session = Session("reward", config, strategy.world, resume=resume)
    model, train, heldout, normalize = read_inputs(session.config, strategy, session)
    total = optim.steps or math.ceil(optim.epochs * len(train) / optim.batch_size)
    say_length(config, total, session, rows=len(train))
    every = interval(config, total, len(heldout), optim.batch_size, session)

    with session:
        longest = max(len(row) for ranking in [*train, *heldout] for row in ranking.rows)
        rows = optim.batch_size * max(len(ranking.rows) for ranking in train)
        stream = prepare("reward", model, strategy, optim, rows, longest)
        shuffle, start, best = Shuffle(len(train), config.run.seed), 0, Best(config.early_stopping_patience)
        session.restore({"model": stream})
        if session.state:
            shuffle.load_state_dict(session.state["shuffle"])
            start = session.state["step"]
            best.load(session.state.get("best", -math.inf), session.state)
            if start == total:  # else the run goes on, and learns in the scale that it began with
                model.mean, model.std, model.facts = (session.state[key] for key in ("mean", "std", "facts"))

        def state() -> dict[str, Any]:
            scale = {"mean": model.mean, "std": model.std, "facts": model.facts}
            return {"shuffle": shuffle.state_dict(), "step": step, "best": best.value, "stale": best.stale, **scale}

        for step in session.steps(start, total):
            rankings = [train[i] for i in shuffle.next(optim.batch_size)]
            lr = optim.lr * fn.lr_schedule(step - 1, total, optim.warmup, optim.lr_schedule)
            stats = learn(strategy, stream, rankings, optim, lr, config.margin)
            session.check(stats)
            metrics = {"loss": stats.sums["loss"], "accuracy": stats.sums["correct"] / stats.sums["pairs"]}
            metrics |= {**stats.metrics, "lr": lr, "epoch": shuffle.epochs}
            if heldout and (step % every == 0 or step == total):
                with strategy.phase("score"):
                    scores = score_rankings(strategy, stream, heldout, optim.micro_batch_size)
                facts = evaluate(heldout, scores)
                metrics |= {f"heldout/{name}": value for name, value in facts.items()}
                best.better(facts["accuracy"])
                best.end_early(session, step)
            if step == session.total:
                with strategy.phase("score"):
                    scaled_on = enough_for_a_scale(heldout, train, session.say)
                    normalize_score(strategy, stream, scaled_on, normalize, optim.micro_batch_size)
                if model.std <= SMALL:
                    session.warn(f"no spread: all scores are {model.mean:.4g}: it tells no answers apart")
                if any(ranking.pairs for ranking in heldout):
                    accuracy, correlation = facts["accuracy"], facts["length_correlation"]
                    model.facts = {"pair_accuracy": accuracy, "length_correlation": correlation}
            tokens = sum(len(row) for ranking in rankings for row in ranking.rows)
            session.log(step, metrics, tokens=tokens, perf=strategy.take_perf())
            session.checkpoint(step, {"model": stream}, state)
        return session.finish()


def read_inputs(
    config: RewardConfig, strategy: Strategy, session: Session
) -> tuple[RewardModel, list[Ranking], list[Ranking], list[Example]]:
    """The model, the rankings to train on and those held out, and the demonstrations that normalise the score."""
    torch.manual_seed(config.run.seed)  # the head's random start
    model, encoder = read_model(RewardModel, config.model, config, strategy, session)
    train, heldout = (
        [ranking_of(tokens, record.ranks) for record, tokens in zip(*side, strict=True)]
        for side in read_sides(session, encoder, "comparisons", config)
    )
    normalize: list[Example] = []
    if config.normalize:
        normalize = read(session.say, encoder, config.normalize, "demonstrations", config.data)[1]
    train = [ranking for ranking in train if ranking.pairs]
    if not train:
        raise DataError(f"{', '.join(config.data.data)}: every ranking is a tie; nothing can be learned from ties.")
    return model, train, heldout, normalize


def learn(
    strategy: Strategy, stream: Stream, rankings: Sequence[Ranking], optim: OptimFlags, lr: float, margin: float
) -> StepStats:
    """One optimizer step on a batch that every rank holds: each takes its share."""
    world = strategy.world

    def loss_of(hidden: Tensor, batch: Rankings) -> Losses:
        return ranking_loss(score_states(stream.model, hidden, batch), batch, len(rankings), margin)

    batches = micro_batches(world.share_of(list(rankings)), optim.micro_batch_size, world.device)
    with strategy.phase("train"):
        return strategy.step(stream, batches, loss_of, lr=lr, max_grad_norm=optim.max_grad_norm)


@dataclass(frozen=True)
class Rankings:
    """A micro-batch: whole rankings, their responses below each other."""

    tokens: Tensor
    """[B, T] int64, right-padded."""
    lengths: Tensor
    """[B] int64."""
    rankings: Sequence[Ranking] = ()

    @property
    def valid(self) -> Tensor:
        """[B, T] bool: what is no padding."""
        return fn.mask_of(self.lengths, self.tokens.shape[1])

    @property
    def computed(self) -> Tensor:
        """[B, T] bool: the tokens whose states are not those of the row before."""
        answered = [n for ranking in self.rankings for n in ranking.response_lengths] or 0
        return fn.computed(self.tokens, self.valid, self.lengths - torch.tensor(answered).to(self.lengths) - 1)


def rows_of(rows: Sequence[Sequence[int]], device: torch.device, rankings: Sequence[Ranking] = ()) -> Rankings:
    tokens, lengths = pad([list(row) for row in rows])
    return Rankings(tokens.to(device), lengths.to(device), rankings)


def ranking_loss(scores: Tensor, batch: Rankings, count: int, margin: float) -> Losses:
    """This micro-batch's part of the mean loss over `count` prompts; sums of ordered pairs and of pairs."""
    loss = scores.sum() * 0.0
    correct = pairs = start = 0
    for ranking in batch.rankings:
        ranking_scores = scores[start : start + len(ranking.rows)]
        part, right, compared = fn.pairwise_loss(ranking_scores, ranking.pairs, margin)
        loss, correct, pairs, start = loss + part, correct + right, pairs + compared, start + len(ranking.rows)
    return loss / count, {"correct": torch.tensor(correct), "pairs": torch.tensor(pairs)}


def score_states(model: RewardModel, hidden: Tensor, batch: Rankings) -> Tensor:
    """Scores [B] fp32 of whole rows, each read at its last token: hidden [B, T, D]."""
    return model.read(fn.last_states(hidden, batch.lengths, batch.computed))


def score_rows(strategy: Strategy, stream: Stream, rows: Sequence[Sequence[int]], size: int) -> list[float]:
    """Scores of whole rows, `size` of them at a time."""
    batches = [rows_of(rows[i : i + size], strategy.world.device) for i in range(0, len(rows), size)]
    read = lambda hidden, batch: score_states(stream.model, hidden, batch).tolist()  # noqa: E731
    scored = strategy.evaluate(stream, batches, read)
    return [score for scores in scored for score in scores]


def score_rankings(strategy: Strategy, stream: Stream, rankings: Sequence[Ranking], size: int) -> list[list[float]]:
    """Every ranking's scores, in order, on every rank."""
    world = strategy.world
    share = world.share_of(list(enumerate(rankings)))
    rows = [row for _, ranking in share for row in ranking.rows]
    scores = score_rows(strategy, stream, rows, size)
    scored: list[tuple[int, list[float]]] = []
    for index, ranking in share:
        scored.append((index, scores[: len(ranking.rows)]))
        scores = scores[len(ranking.rows) :]
    of_all_ranks = sorted((pair for part in world.gather(scored) for pair in part), key=lambda pair: pair[0])
    return [scores for _, scores in of_all_ranks]


def evaluate(rankings: Sequence[Ranking], scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """How well the scores order held-out rankings (PPO.md 23).

    accuracy over pairs of different rank, its 95 % interval (prompts as clusters would be wider), accuracy_distance_d
    per rank distance d, and length_correlation, Pearson's r of score with response length.
    """
    right: dict[int, list[bool]] = {}
    for ranking, values in zip(rankings, scores, strict=True):
        levels = sorted(set(ranking.ranks))
        for i, j in ranking.pairs:
            distance = levels.index(ranking.ranks[j]) - levels.index(ranking.ranks[i])
            right.setdefault(distance, []).append(values[i] > values[j])
    every = [is_right for pairs in right.values() for is_right in pairs]
    low, high = intervals.of_share(every) if every else (0.0, 1.0)
    facts = {"accuracy": sum(every) / max(len(every), 1), "accuracy_low": low, "accuracy_high": high}
    facts |= {f"accuracy_distance_{d}": sum(pairs) / len(pairs) for d, pairs in sorted(right.items())}
    flat = torch.tensor([value for values in scores for value in values], dtype=torch.float64)
    lengths = torch.tensor([float(n) for ranking in rankings for n in ranking.response_lengths], dtype=torch.float64)
    varied = bool(flat.std() > 0) and bool(lengths.std() > 0) if len(flat) > 1 else False
    facts["length_correlation"] = float(torch.corrcoef(torch.stack([flat, lengths]))[0, 1]) if varied else 0.0
    return facts


def micro_batches(rankings: Sequence[Ranking], rows: int, device: torch.device) -> list[Rankings]:
    """Whole rankings in groups of about `rows` responses: a prompt's responses stay together."""
    ordered = sorted(rankings, key=longest_row)
    groups: list[list[Ranking]] = []
    filled = rows
    for ranking in ordered:
        if filled + len(ranking.rows) > rows:
            groups.append([])
            filled = 0
        groups[-1].append(ranking)
        filled += len(ranking.rows)
    return [rows_of([row for ranking in group for row in ranking.rows], device, group) for group in groups]


def longest_row(ranking: Ranking) -> int:
    return max(map(len, ranking.rows))


def ranking_of(encoded: tuple[list[int], list[list[int]]], ranks: tuple[int, ...]) -> Ranking:
    """A comparison's tokens, from the encoder, and its ranks; without the answers that did not fit."""
    prompt, responses = encoded
    kept = [i for i, response in enumerate(responses) if response]  # the others were too long
    rows, ranks = [prompt + responses[i] for i in kept], tuple(ranks[i] for i in kept)
    return Ranking(rows, ranks, tuple(len(responses[i]) for i in kept))


FEWEST = 32
"""Answers that a spread is measured on at least: of 32, its standard error is an eighth of it."""
SMALL = 1e-6
"""The least spread that scores are divided by."""


def enough_for_a_scale(heldout: list[Ranking], train: list[Ranking], say: Callable[[str], None]) -> list[Ranking]:
    """The rankings whose answers set the scale of scores: held-out ones, and as many others as are needed."""
    count = sum(len(ranking.rows) for ranking in heldout)
    if count >= FEWEST:
        return heldout
    added = train[: FEWEST - count]
    total = count + sum(len(ranking.rows) for ranking in added)
    say(f"{count} answers are held out, too few for the spread of scores: it is measured on {total}, training ones too")
    return [*heldout, *added]


def normalize_score(
    strategy: Strategy, stream: Stream, rankings: Sequence[Ranking], demonstrations: Sequence[Example], size: int
) -> None:
    """Mean 0 on demonstrations (on all held-out responses without any), spread 1 on held-out responses (PPO.md 10)."""
    model = stream.model
    model.mean, model.std = 0.0, 1.0
    scored = score_rankings(strategy, stream, rankings, size)
    flat = torch.tensor([value for values in scored for value in values])
    mean = flat.mean()
    if demonstrations:
        rows = [example.tokens for example in demonstrations]
        mean = torch.tensor(score_rows(strategy, stream, rows, size)).mean()
    model.mean = float(mean)
    model.std = max(float(flat.std()), SMALL) if len(flat) > 1 else 1.0
