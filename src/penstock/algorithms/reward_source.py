"""What gives a response its score: a reward model, Python functions, or the sum of several (PPO.md 11, 12)."""

import asyncio
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from penstock.algorithms.heldout import Rows
from penstock.algorithms.reward import score_rows
from penstock.algorithms.reward_functions import GIVEN, Failure, RewardFunction, Sample, Scores, Workers
from penstock.algorithms.setup import encoder_of
from penstock.config import DataFlags, RewardFlags
from penstock.data import formats
from penstock.data.chat import Encoder
from penstock.data.records import Prompt
from penstock.errors import DataError, UserError
from penstock.memory.strategy import Strategy
from penstock.memory.stream import Stream
from penstock.models.config import DecoderConfig
from penstock.models.roles import RewardModel
from penstock.models.weight_shapes import BaseDtype
from penstock.rollout.engine import Answer
from penstock.run.directory import resolve_model

Scorer = Callable[[Sequence, Sequence[Answer]], Sequence[float] | Sequence[Sequence[float]]]
"""(prompt records, answers) -> one score per answer, or a row of it and its parts, see `RewardSource.score_parts`."""
Say = Callable[[str], None]


class RewardSource:
    """Scores answers. Prepare `model`, if it has one, with the other models, and put its stream into `stream`."""

    model: RewardModel | None = None
    stream: Stream | None = None
    reads_actor_tokens = False
    """True: `model` takes the actor's own rows, and may be scored together with the other models."""
    starts_critic = False
    """True: a critic may start as `model`: the same ids mean the same to it, and it holds as many of them."""
    has_scale = False
    """True: scores have been centred and divided by their spread, as `penstock reward` does (10)."""
    step = 0
    """The loop's, for reward functions that change with it."""

    def reads_field(self, name: str) -> bool:
        """Whether it reads this field of the records, beside the prompt."""
        return False

    def check(self, records: Sequence[Prompt], say: Say) -> None:
        """Says before the first answer what it will make of these prompts. Raises UserError where it can score none."""

    def refuses(self, record: Prompt, prompt_ids: list[int]) -> str:
        """Why no answer to this prompt can be scored; empty where it can."""
        return ""

    def score(self, records: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
        """One score per answer."""
        raise NotImplementedError

    def score_parts(self, records: Sequence[Prompt], answers: Sequence[Answer]) -> list[list[float]]:
        """Per answer its score, and behind it, where that is a sum, the parts, NaN where one does not apply."""
        return [[score] for score in self.score(records, answers)]

    def metrics(self, part_scores: Tensor) -> dict[str, float]:
        """What a step's parts [B, F], see `score_parts`, are called."""
        return {}


def reward_source(
    config: RewardFlags, encoder: Encoder, strategy: Strategy, flags: DataFlags, size: int, say: Say,
    base_dtype: BaseDtype | None = None,
) -> RewardSource:  # fmt: skip
    """What `--reward` and `--reward-fn` name. `encoder`: the actor's; `size`: rows per forward pass; `base_dtype`: of
    the reward model's frozen weights."""
    functions = [RewardFunction.load(address) for address in config.reward_fn]
    judge = _model_reward(config.reward, encoder, strategy, flags, size, say, base_dtype) if config.reward else None
    if judge and not functions and not config.reward_weights:
        return judge
    workers = None
    if functions and (config.reward_workers or config.reward_timeout):
        workers = Workers(config.reward_fn, config.reward_workers or 1, config.reward_timeout)
    name, weights = config.reward or "", config.reward_weights
    return RewardSum(functions, encoder, judge=judge, judge_name=name, weights=weights, workers=workers)


def _model_reward(
    reward: str, encoder: Encoder, strategy: Strategy, flags: DataFlags, size: int, say: Say,
    base_dtype: BaseDtype | None,
) -> "ModelReward":  # fmt: skip
    source = resolve_model(reward)
    with strategy.init():
        model = RewardModel.trained(source, base_dtype=base_dtype, allow_pickle=flags.allow_pickle)
    model.eval().requires_grad_(False)
    _warn_if_weak(model, say, reward)
    unlimited = dataclasses.replace(flags, max_length=1 << 30)
    reserve = encoder.limits.reserve  # a prompt leaves room for as long an answer as the actor may give
    model_encoder = encoder_of(source, model.decoder.config, unlimited, reserve=reserve, task="judge")
    scores = ModelReward(model, strategy, encoder, model_encoder, size)
    if not scores.reads_actor_tokens and None in (encoder.tokenizer, model_encoder.tokenizer):
        raise UserError(
            f"--reward {reward}: does not read the actor's tokens, and texts cannot go between them, because one of "
            "the two has no tokenizer files; put the model's own tokenizer beside it."
        )
    if scores.reads_actor_tokens:
        check_room("reward", reward, model.decoder.config, encoder)
    else:
        say(f"{reward}: has another tokenizer or chat template than the actor: answers go to it as text, in its own")
    return scores


class ModelReward(RewardSource):
    """A reward model. It reads the tokens it was trained on (11): where its tokenizer is another, texts go between."""

    def __init__(
        self, model: RewardModel, strategy: Strategy, encoder: Encoder, model_encoder: Encoder, size: int
    ) -> None:
        self.model, self.strategy, self.encoder, self.model_encoder = model, strategy, encoder, model_encoder
        self.reads_actor_tokens, self.size = model_encoder.same_tokenizer(encoder), size
        room = model.decoder.config.max_length >= encoder.max_length
        self.starts_critic = room and model_encoder.same_ids(encoder)
        self.has_scale = "penstock_score_mean" in model.decoder.config.hf

    def check(self, records: Sequence[Prompt], say: Say) -> None:
        """Prompts of token ids are the actor's: a reward model of another tokenizer reads their text."""
        count = sum(record.prompt_ids is not None for record in records)
        if count and not self.reads_actor_tokens:
            say(f"{count} prompts are token ids; the reward model has another tokenizer and reads their text")

    def refuses(self, record: Prompt, prompt_ids: list[int]) -> str:
        if not self.reads_actor_tokens:
            try:
                self._row(record, prompt_ids, ".", ended=True)
            except DataError as error:
                return f"{error} That is how the reward model reads it."
        return ""

    def score(self, records: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
        assert self.stream is not None, "prepare the reward model first"
        if self.reads_actor_tokens:
            rows = [answer.prompt_ids + answer.response_ids for answer in answers]
        else:
            rows = []
            for record, answer in zip(records, answers, strict=True):
                text, ended = self.encoder.decode(answer.response_ids), answer.finish_reason == "stop"
                rows.append(self._row(record, answer.prompt_ids, text, ended))
        return score_rows(self.strategy, self.stream, rows, self.size)

    def _row(self, record: Prompt, prompt_ids: list[int], text: str, ended: bool) -> list[int]:
        """An answer in its own tokens."""
        if record.prompt_ids is not None:
            record = Prompt(where=record.where, prompt=self.encoder.decode(prompt_ids))
        return self.model_encoder.encode_response(record, text, ended=ended)


class RewardSum(RewardSource):
    """The weighted sum of what a reward model and functions give: what a single function gives, too.

    None from a function is left out of that answer's sum; an answer that has no score at all is an error.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        encoder: Encoder,
        *,
        judge: ModelReward | None = None,
        judge_name: str = "",
        weights: Sequence[float] = (),
        workers: Workers | None = None,
    ) -> None:
        """encoder: the actor's. weights: the judge's first; 1 each by default."""
        self.functions, self.encoder, self.judge, self.workers = functions, encoder, judge, workers
        self.model = judge.model if judge else None
        names = [Path(judge_name).name] * bool(judge) + [function.name for function in functions]
        earlier = [names[:i].count(name) for i, name in enumerate(names)]
        self.names = [f"{name}_{count + 1}" if count else name for name, count in zip(names, earlier, strict=True)]
        self.weights = [*weights] or [1.0] * len(names)
        self.runner = asyncio.Runner()

    def reads_field(self, name: str) -> bool:
        return any(function.reads(name) for function in self.functions)

    def check(self, records: Sequence[Prompt], say: Say) -> None:
        """Raises UserError when a function requires a field that no record has; says which fields are read."""
        if self.judge:
            self.judge.check(records, say)
        names = dict.fromkeys(name for record in records for name in record.fields if record.fields[name] is not None)
        for function in self.functions:
            if missing := [name for name, need in function.fields.items() if need and name not in names]:
                others = ", ".join(name for name in names if name not in GIVEN)
                raise UserError(
                    f"--reward-fn {function.address}: requires a field {missing[0]}, and no record has it; they have "
                    f"{others or 'no others'}. --keys {missing[0]}=NAME takes another for it."
                )
            if used := [name for name in function.fields if name in names]:
                say(f"--reward-fn {function.address}: reads the records' {', '.join(used)}")

    def refuses(self, record: Prompt, prompt_ids: list[int]) -> str:
        for function in self.functions:
            for name, need in function.fields.items():
                if need and record.fields.get(name) is None:
                    return f"{record.where}: {name}: is missing; --reward-fn {function.address} requires it."
        return self.judge.refuses(record, prompt_ids) if self.judge else ""

    def score(self, records: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
        return [scores[0] for scores in self.score_parts(records, answers)]

    def score_parts(self, records: Sequence[Prompt], answers: Sequence[Answer]) -> list[list[float]]:
        columns: list[Scores] = []
        if self.judge:
            self.judge.stream = self.stream
            columns.append([*self.judge.score(records, answers)])
        samples = [self._sample(record, answer) for record, answer in zip(records, answers, strict=True)]
        for i, function in enumerate(self.functions):
            try:
                if self.workers:
                    columns.append(self.workers.scores(i, samples, self.step))
                else:
                    columns.append(function.scores(samples, self.step, self.runner))
            except Failure as failure:
                place = _place(samples, failure.index)
                raise UserError(f"--reward-fn {function.address}: {failure.problem}; {place}.") from failure
        rows = []
        for sample, parts in zip(samples, zip(*columns, strict=True), strict=True):
            given = [weight * part for weight, part in zip(self.weights, parts, strict=True) if part is not None]
            if not given:
                raise UserError(
                    f"--reward-fn {' '.join(function.address for function in self.functions)}: none gives a score (all "
                    f"None); {_place([sample], 0)}. Leave the record out, or add a reward that applies to it."
                )
            rows.append([math.fsum(given), *(math.nan if part is None else part for part in parts)])
        return rows

    def metrics(self, part_scores: Tensor) -> dict[str, float]:
        """rewards/NAME/mean and rewards/NAME/std (TRL's names), over the answers that the reward applies to; none of
        answers that an earlier release scored, without their parts."""
        metrics: dict[str, float] = {}
        if not part_scores.shape[1]:
            return metrics
        for name, column in zip(self.names, part_scores.T, strict=True):
            scores = column[~column.isnan()]
            if len(scores):
                metrics[f"rewards/{name}/mean"] = float(scores.mean())
                metrics[f"rewards/{name}/std"] = float(scores.std()) if len(scores) > 1 else 0.0
        return metrics

    def _sample(self, record: Prompt, answer: Answer) -> Sample:
        decode = self.encoder.decode if self.encoder.tokenizer else lambda _: ""
        return Sample(
            record.where, decode(answer.prompt_ids), decode(answer.response_ids), record.messages, answer.prompt_ids,
            answer.response_ids, answer.finish_reason, record.fields,
        )  # fmt: skip


def _place(samples: Sequence[Sample], index: int | None) -> str:
    """Which answer an error is about, for people: the record's file and line, and how the prompt starts."""
    sample = samples[index or 0]
    start = ascii(sample.prompt or [*sample.prompt_ids])
    start = start if len(start) <= 60 else f"{start[:60]}..."
    answer = f"the answer to {sample.where} {start}"
    return answer if index is not None or len(samples) == 1 else f"{len(samples)} answers, the first is {answer}"


def scorable(side: Rows, source: RewardSource, flags: DataFlags, say: Say) -> Rows:
    """The prompts whose answers can be scored. Raises DataError for the others, unless --skip-bad leaves them out."""
    problems = [source.refuses(record, ids) for record, ids in zip(*side, strict=True)]
    bad = [text for text in problems if text]
    if not bad:
        return side
    if not flags.skip_bad:
        raise DataError(formats.list_bad(bad))
    say(f"--skip-bad left out {len(bad)} of {len(problems)} prompts, the first: {bad[0]}")
    if len(bad) == len(problems):
        raise DataError(f"no prompt is left whose answers can be scored; the first: {bad[0]}")
    records, prompts = ([row for row, text in zip(rows, problems, strict=True) if not text] for rows in side)
    return records, prompts


def check_room(flag: str, source: str, config: DecoderConfig, encoder: Encoder) -> None:
    """Raises UserError when a model cannot hold the actor's rows."""
    if config.max_length < encoder.max_length:
        raise UserError(
            f"--{flag} {source}: holds rows of {config.max_length} tokens, and the actor's may have "
            f"{encoder.max_length}; give --max-length {config.max_length}."
        )


def _warn_if_weak(model: RewardModel, say: Say, name: str) -> None:
    """PPO.md 23: says so before PPO starts on a bad reward model."""
    accuracy, length = model.facts.get("pair_accuracy"), model.facts.get("length_correlation", 0.0)
    if accuracy is None:
        say(f"{name}: this reward model carries no held-out pair accuracy; check it before trusting its scores")
    elif accuracy < 0.6:
        say(f"{name}: held-out pair accuracy is {accuracy:.2f}, near chance: its scores are noise")
    if abs(length) > 0.7:
        say(f"{name}: its score follows response length (r = {length:.2f}); expect answers to grow or shrink")
