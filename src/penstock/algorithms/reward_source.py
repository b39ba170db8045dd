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
from penstock.config import DataFlags
from penstock.data.chat import Encoder
from penstock.errors import UserError
from penstock.memory.strategy import Strategy
from penstock.memory.stream import Stream
from penstock.models.config import DecoderConfig
from penstock.models.roles import RewardModel
from penstock.models.weight_shapes import BaseDtype
from penstock.rollout.engine import Answer
from penstock.run.directory import resolve_model

Scorer = Callable[[Sequence, Sequence[Answer]], list[float]]
"""(prompt records, answers) -> one score per answer."""


def scorer_of(
    reward: str | None, reward_fn: str | None, encoder: Encoder, strategy: Strategy, flags: DataFlags, size: int,
    say: Callable[[str], None], base_dtype: BaseDtype | None = None,
) -> tuple[RewardModel | None, Callable[..., Scorer], bool]:  # fmt: skip
    """What `--reward` or `--reward-fn` names: the reward model, if it is one, for the strategy to prepare; what makes
    a scorer of its stream, `size` rows at a time; and whether it reads the actor's tokens."""
    if reward_fn:
        scorer = _from_function(load_reward_fn(reward_fn), encoder, reward_fn)
        return None, lambda: scorer, False
    assert reward is not None
    source = resolve_model(reward)
    with strategy.init():
        model = RewardModel.trained(source, base_dtype=base_dtype, allow_pickle=flags.allow_pickle)
    model.eval().requires_grad_(False)
    _warn_if_weak(model, say, reward)
    own = encoder_of(source, model.decoder.config, dataclasses.replace(flags, max_length=1 << 30))
    # The reward model must see what it was trained on (11): its own tokens, where its tokenizer is another one.
    same_tokens = own.same_tokenizer(encoder)
    if same_tokens:
        check_room("reward", reward, model.decoder.config, encoder)

    def scorer_from(stream: Stream) -> Scorer:
        def score(records: Sequence, answers: Sequence[Answer]) -> list[float]:
            if same_tokens:
                rows = [answer.prompt_ids + answer.response_ids for answer in answers]
            else:
                ended = [answer.finish_reason == "stop" for answer in answers]
                texts = [encoder.decode(answer.response_ids) for answer in answers]
                rows = [
                    own.encode_response(record, text, ended=end)
                    for record, text, end in zip(records, texts, ended, strict=True)
                ]
            return score_rows(strategy, stream, stream.model, rows, size)

        return score

    return model, scorer_from, same_tokens


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
    sys.modules[spec.name] = module  # dataclasses and pickling look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--reward-fn {path}: the file cannot be run: {type(error).__name__}: {error}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"--reward-fn {path}: has no function {name!r}; it has {', '.join(there) or 'none'}.")
    return function


def _from_function(function: Callable[..., list[float]], encoder: Encoder, address: str) -> Scorer:
    parameters = inspect.signature(function).parameters
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())

    def score(records: Sequence, answers: Sequence[Answer]) -> list[float]:
        prompt_ids, response_ids = [a.prompt_ids for a in answers], [a.response_ids for a in answers]
        prompts, responses = (
            [encoder.decode(ids) for ids in many] if encoder.tokenizer else [""] * len(answers)
            for many in (prompt_ids, response_ids)
        )
        extras = {"prompt_ids": prompt_ids, "response_ids": response_ids}
        extras = {name: ids for name, ids in extras.items() if takes_any or name in parameters}
        try:
            scores = [float(x) for x in function(prompts, responses, **extras)]
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{line.filename}:{line.lineno}"
            raise UserError(f"--reward-fn {address}: raised {type(error).__name__}: {error} ({where}).") from error
        if len(scores) != len(answers):
            raise UserError(f"--reward-fn {address}: gave {len(scores)} scores for {len(answers)} responses.")
        bad = next((i for i, x in enumerate(scores) if not math.isfinite(x)), None)
        if bad is not None:
            raise UserError(f"--reward-fn {address}: gave {scores[bad]} for {responses[bad]!r}; scores must be finite.")
        return scores

    return score


def _warn_if_weak(model: RewardModel, say: Callable[[str], None], name: str) -> None:
    """PPO.md 23: nobody starts PPO on a bad reward model without being told."""
    accuracy, length = model.facts.get("pair_accuracy"), model.facts.get("length_correlation", 0.0)
    if accuracy is None:
        say(f"{name}: this reward model carries no held-out pair accuracy; check it before trusting its scores")
    elif accuracy < 0.6:
        say(f"{name}: held-out pair accuracy is {accuracy:.2f}, near chance: its scores are noise")
    if abs(length) > 0.7:
        say(f"{name}: its score follows response length (r = {length:.2f}); expect answers to grow or shrink")
