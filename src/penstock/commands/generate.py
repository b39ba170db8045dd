"""`penstock generate`: a trained model answers prompts from a file."""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from penstock.algorithms.reward_source import RewardSource, reward_source, scorable
from penstock.algorithms.setup import encoder_of, read
from penstock.commands.config import ChatConfig, GenerateConfig
from penstock.config import DataFlags, as_data_flags
from penstock.data.chat import Encoder
from penstock.data.formats import reads_none
from penstock.data.records import Prompt
from penstock.errors import UserError
from penstock.memory.strategy import Strategy
from penstock.models.roles import Actor
from penstock.rollout import engine
from penstock.rollout.engine import Answer, Engine
from penstock.rollout.sampling import Sampling
from penstock.run.directory import refused, resolve_model


def generate(config: GenerateConfig) -> None:
    """Answers every prompt and writes one JSON object per answer, to --out or the terminal."""
    if (config.data is None) == (config.prompt is None):
        raise UserError("generate needs prompts: give either --prompt TEXT or --data FILE.")
    if config.out and Path(config.out).exists():
        raise UserError(f"--out {config.out}: exists already; choose another name or remove it.")
    if config.best_of and not (config.reward or config.reward_fn):
        raise UserError("--best-of needs a judge: give --reward RUN or --reward-fn file.py:name.")
    if config.best_of and config.best_of < config.n:
        raise UserError(f"--best-of {config.best_of} keeps the best --n {config.n} answers; give at least as many.")
    encoder, answers = answered(config, functools.partial(print, file=sys.stderr))
    lines = (line for _, line in answers)
    if config.out is None:
        for line in lines:
            as_text = line["response"] if encoder.tokenizer else " ".join(map(str, line["response_ids"]))
            print(as_json(line) if config.json else as_text)
        return
    unfinished = Path(config.out + ".tmp")
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        unfinished.rename(config.out)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise refused(f"--out {config.out}", error) from error
    print(f"wrote {config.out}", file=sys.stderr)


def as_json(line: dict[str, Any]) -> str:
    """One line of JSON for stdout: letters as they are where it takes all of Unicode, else escaped, so that none is
    lost."""
    return json.dumps(line, ensure_ascii=not (sys.stdout.encoding or "").lower().startswith("utf"))


def answered(
    config: GenerateConfig, say: Callable[[str], None]
) -> tuple[Encoder, Iterator[tuple[Prompt, dict[str, Any]]]]:
    """The model's encoder, and each prompt with its answers as lines of --out, in order, as they are made; `say` gets
    what was read and left out."""
    sampling = sampling_of(config, n=max(config.n, config.best_of))
    strategy, actor, encoder = load(config)
    flags = as_data_flags(config, data=(config.data or "",), truncate="right")  # a long prompt is an error
    source = _source(config, strategy, encoder, flags, say) if config.reward or config.reward_fn else None
    if config.prompt is not None:
        records: list[Any] = [Prompt(prompt=config.prompt, where="--prompt")]
        prompts = [encoder.encode_prompt(records[0])]
        print_notes(encoder)
    else:
        reads = source.reads_field if source else reads_none
        records, prompts = read(say, encoder, flags.data, "prompts", flags, reads)
    if source is not None:
        source.check(records, say)
        records, prompts = scorable((records, prompts), source, flags, say)
    return encoder, _answers(config, actor, encoder, records, prompts, sampling, source)


WINDOW = 16
"""Batches of answers in work at once: long prompts stand together within them, and answers are written in order."""


def _answers(
    config: GenerateConfig, actor: Actor, encoder: Encoder, records: list[Any], prompts: list[list[int]],
    sampling: Sampling, source: RewardSource | None,
) -> Iterator[tuple[Prompt, dict[str, Any]]]:  # fmt: skip
    words: Any = {"tokenizer": encoder.tokenizer, "hidden": encoder.hidden}
    engine = Engine(actor.decoder, eos_ids=encoder.eos_ids, rows=config.batch_size, **words)
    n = sampling.n
    window = max(WINDOW * config.batch_size // n, 1)
    for start in range(0, len(prompts), window):
        answers = engine.generate(prompts[start : start + window], sampling, first_episode=start * n)
        scores: list[float | None] = [None] * len(answers)
        if source is not None:
            scores = [*source.score([records[start + i // n] for i in range(len(answers))], answers)]
        for i in range(0, len(answers), n):
            scored = list(zip(answers[i : i + n], scores[i : i + n], strict=True))
            if config.best_of:
                scored = sorted(scored, key=lambda pair: -pair[1] if pair[1] is not None else 0)[: config.n]
            for answer, score in scored:
                yield records[start + i // n], _line(encoder, answer, score)


def _line(encoder: Encoder, answer: Answer, score: float | None) -> dict[str, Any]:
    response = encoder.decode(answer.response_ids) if answer.text is None else answer.text
    line = {
        "prompt": encoder.decode(answer.prompt_ids),
        "response": response,
        "prompt_ids": answer.prompt_ids,
        "response_ids": answer.response_ids,
        "logprobs": answer.logprobs,
        "finish_reason": answer.finish_reason,
    }
    extra = {"top_logprobs": answer.top_logprobs, "score": score, "error": answer.error}
    return line | {key: value for key, value in extra.items() if value not in (None, [])}


def _source(
    config: GenerateConfig, strategy: Strategy, encoder: Encoder, flags: DataFlags, say: Callable[[str], None]
) -> RewardSource:
    source = reward_source(config, encoder, strategy, flags, config.batch_size, say)
    source.stream = None if source.model is None else strategy.prepare(source.model)
    return source


def load(config: GenerateConfig | ChatConfig) -> tuple[Strategy, Actor, Encoder]:
    """The strategy, the model that --model names, and its encoder."""
    source = resolve_model(config.model)
    adapter = None if config.adapter is None else resolve_model(config.adapter)
    strategy, actor = engine.load(source, config.dtype, config.device, adapter)
    flags = as_data_flags(config, max_length=actor.decoder.config.max_length)
    return strategy, actor, encoder_of(source, actor.decoder.config, flags, task="answer")


def print_notes(encoder: Encoder) -> None:
    """What the user should know of the model's tokenizer and of what was encoded, on stderr."""
    for line in encoder.take_notes():
        print(line, file=sys.stderr)


def sampling_of(config: GenerateConfig | ChatConfig, n: int = 1) -> Sampling:
    """How tokens are drawn. Raises UserError for flags that the sampler refuses."""
    names = ["temperature", "max_new_tokens", "top_k", "top_p", "seed"]
    if isinstance(config, GenerateConfig):
        names += ["min_p", "repetition_penalty", "stop", "top_logprobs"]
    try:
        return Sampling(n=n, **{name: getattr(config, name) for name in names})
    except ValueError as error:
        raise UserError(f"{error}.") from error
