"""What gives a response its score: a reward model, or any Python function of prompts and responses (PPO.md 11, 12)."""

import dataclasses
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from penstock.algorithms.reward import score_rows
from penstock.algorithms.setup import encoder_of
from penstock.config import DataFlags, GenerateConfig, PPOConfig
from penstock.data.chat import Encoder
from penstock.data.records import Prompt
from penstock.errors import DataError, UserError
from penstock.memory.strategy import Strategy
from penstock.memory.stream import Stream
from penstock.models.config import DecoderConfig
from penstock.models.roles import RewardModel
from penstock.rollout.engine import Answer
from penstock.run.directory import resolve_model

Scorer = Callable[[Sequence, Sequence[Answer]], list[float]]
"""(prompt records, answers) -> one score per answer."""
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

    def check(self, records: Sequence, say: Say) -> None:
        """Says before the first answer what it will make of these prompts."""

    def refuses(self, record: Prompt, prompt_ids: list[int]) -> str:
        """Why no answer to this prompt can be scored; empty where it can."""
        return ""

    def score(self, records: Sequence, answers: Sequence[Answer]) -> list[float]:
        """One score per answer."""
        raise NotImplementedError


def reward_source(
    config: PPOConfig | GenerateConfig, encoder: Encoder, strategy: Strategy, flags: DataFlags, size: int, say: Say
) -> RewardSource:
    """What `--reward` or `--reward-fn` names. `encoder`: the actor's; `size`: rows per forward pass."""
    reward, reward_fn = config.reward, config.reward_fn
    if reward_fn:
        return FunctionReward(load_reward_fn(reward_fn), encoder, reward_fn)
    assert reward is not None
    source, base_dtype = resolve_model(reward), config.peft.base_dtype if isinstance(config, PPOConfig) else None
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

    def check(self, records: Sequence, say: Say) -> None:
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

    def score(self, records: Sequence, answers: Sequence[Answer]) -> list[float]:
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


class FunctionReward(RewardSource):
    """A Python function score(prompts, responses, **_); `address` is its file.py:name for error messages."""

    def __init__(self, function: Callable[..., list[float]], encoder: Encoder, address: str) -> None:
        self.function, self.encoder, self.address = function, encoder, address
        parameters = inspect.signature(function).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self.takes = {name for name in ("prompt_ids", "response_ids") if takes_any or name in parameters}

    def score(self, records: Sequence, answers: Sequence[Answer]) -> list[float]:
        """The function's scores. Raises UserError when it fails, or gives too few scores or one that is not finite."""
        ids = {name: [getattr(answer, name) for answer in answers] for name in ("prompt_ids", "response_ids")}
        prompts, responses = (self._texts(rows) for rows in ids.values())
        extras = {name: rows for name, rows in ids.items() if name in self.takes}
        try:
            scores = [float(x) for x in self.function(prompts, responses, **extras)]
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"--reward-fn {self.address}: raised {type(error).__name__}: {error} ({line.filename}:{line.lineno})."
            ) from error
        if len(scores) != len(answers):
            raise UserError(f"--reward-fn {self.address}: gave {len(scores)} scores for {len(answers)} responses.")
        for value, response in zip(scores, responses, strict=True):
            if not math.isfinite(value):
                raise UserError(f"--reward-fn {self.address}: gave {value} for {response!r}; scores must be finite.")
        return scores

    def _texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return [self.encoder.decode([*ids]) if self.encoder.tokenizer else "" for ids in rows]


def check_room(flag: str, source: str, config: DecoderConfig, encoder: Encoder) -> None:
    """Raises UserError when a model cannot hold the actor's rows."""
    if config.max_length < encoder.max_length:
        raise UserError(
            f"--{flag} {source}: holds rows of {config.max_length} tokens, and the actor's may have "
            f"{encoder.max_length}; give --max-length {config.max_length}."
        )


def load_reward_fn(address: str) -> Callable[..., list[float]]:
    """The function at `file.py:name`. Raises UserError when there is no such file or function."""
    path, _, name = address.rpartition(":")
    if not path or not Path(path).is_file():
        raise UserError(f"--reward-fn {address}: no such file; give file.py:name, a path and a function in it.")
    spec = importlib.util.spec_from_file_location("penstock_reward_fn", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--reward-fn {path}: is no Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look it up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--reward-fn {path}: the file cannot be run: {type(error).__name__}: {error}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"--reward-fn {path}: has no function {name!r}; it has {', '.join(names) or 'none'}.")
    return function


def _warn_if_weak(model: RewardModel, say: Say, name: str) -> None:
    """PPO.md 23: says so before PPO starts on a bad reward model."""
    accuracy, length = model.facts.get("pair_accuracy"), model.facts.get("length_correlation", 0.0)
    if accuracy is None:
        say(f"{name}: this reward model carries no held-out pair accuracy; check it before trusting its scores")
    elif accuracy < 0.6:
        say(f"{name}: held-out pair accuracy is {accuracy:.2f}, near chance: its scores are noise")
    if abs(length) > 0.7:
        say(f"{name}: its score follows response length (r = {length:.2f}); expect answers to grow or shrink")
