"""`penstock generate` and `penstock chat`: a trained model answers, from a file or in the terminal."""

import contextlib
import functools
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from penstock.algorithms.inputs import encoder_of, read
from penstock.config import ChatConfig, DataFlags, GenerateConfig
from penstock.data.chat import Encoder
from penstock.data.formats import Prompt
from penstock.errors import DataError, UserError
from penstock.memory.strategy import Strategy
from penstock.models.roles import Actor
from penstock.rollout import engine
from penstock.rollout.sampling import Sampling
from penstock.run.directory import refused, resolve_model


def generate(config: GenerateConfig) -> None:
    """Answers every prompt and writes one JSON object per answer, to --out or the terminal."""
    if (config.data is None) == (config.prompt is None):
        raise UserError("generate needs prompts: give either --prompt TEXT or --data FILE.")
    if config.out and Path(config.out).exists():
        raise UserError(f"--out {config.out}: exists already; choose another name or remove it.")
    sampling = _sampling(config, n=config.n)
    actor, encoder = load(config)
    if config.prompt is not None:
        prompts = [encoder.encode_prompt(Prompt(prompt=config.prompt, where="--prompt"))]
    else:
        assert config.data is not None
        flags = DataFlags(data=(config.data,), skip_bad=config.skip_bad)
        prompts = read(functools.partial(print, file=sys.stderr), encoder, flags.data, "prompts", flags)[1]
    lines = _answers(config, actor, encoder, prompts, sampling)
    if config.out is None:
        for line in lines:
            as_text = line["response"] if encoder.tokenizer else " ".join(map(str, line["response_ids"]))
            print(json.dumps(line, ensure_ascii=False) if config.json else as_text)
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


def _answers(
    config: GenerateConfig, actor: Actor, encoder: Encoder, prompts: list[list[int]], sampling: Sampling
) -> Iterator[dict[str, Any]]:
    for start in range(0, len(prompts), config.batch_size):
        batch = prompts[start : start + config.batch_size]
        episodes = range(start * config.n, (start + len(batch)) * config.n)
        for answer in engine.generate(actor.decoder, batch, sampling, eos_ids=encoder.eos_ids, episodes=episodes):
            yield {
                "prompt": encoder.decode(answer.prompt_ids),
                "response": encoder.decode(answer.response_ids),
                "prompt_ids": answer.prompt_ids,
                "response_ids": answer.response_ids,
                "logprobs": answer.logprobs,
                "finish_reason": answer.finish_reason,
            }


def chat(config: ChatConfig) -> None:
    """A conversation on stdin and stdout: answers stream as they are made; /reset forgets, /quit or Ctrl-D ends."""
    actor, encoder = load(config)
    if encoder.tokenizer is None:
        raise UserError(
            f"--model {config.model}: has no tokenizer, so it cannot chat; use penstock generate with prompt_ids."
        )
    sampling = _sampling(config)
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    opening = [{"role": "system", "content": config.system}] if config.system else []
    messages, turn = list(opening), 0
    if interactive:
        print(f"{config.model}: type a message; /reset forgets the conversation, /quit ends.")
    while True:
        try:
            text = input("you> " if interactive else "")
        except EOFError:
            return
        if text.strip() in ("/quit", "/exit"):
            return
        if text.strip() == "/reset":
            messages = list(opening)
            continue
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        try:
            messages, prompt = _fit(encoder, messages, opening)
        except DataError:
            messages.pop()
            print("(that message is too long for the model's context and was not sent)", file=sys.stderr)
            continue
        reply = _say(config, actor, encoder, prompt, sampling, turn)
        messages.append({"role": "assistant", "content": reply})
        turn += 1


def _fit(
    encoder: Encoder, messages: list[dict[str, str]], opening: list[dict[str, str]]
) -> tuple[list[dict[str, str]], list[int]]:
    """The conversation and its tokens; the oldest turns are forgotten, with a word, when they no longer fit."""
    while True:
        try:
            prompt = encoder.encode_prompt(Prompt(messages=tuple(messages), where="chat:1"))
            return messages, prompt
        except DataError:
            rest = messages[len(opening) :]
            if len(rest) <= 1:
                raise
            messages = [*opening, *rest[2:]]
            print("(the oldest turn no longer fits the context and is forgotten)", file=sys.stderr)


def _say(config: ChatConfig, actor: Actor, encoder: Encoder, prompt: list[int], sampling: Sampling, turn: int) -> str:
    """Streams one answer to stdout and returns it."""
    ids: list[int] = []
    shown = ""
    try:
        for token in engine.stream_tokens(actor.decoder, prompt, sampling, eos_ids=encoder.eos_ids, episode=turn):
            ids.append(token)
            text = encoder.decode(ids)
            if text.endswith("\ufffd"):  # half a character: the rest of its bytes comes with the next token
                continue
            if not config.json:
                print(text[len(shown) :], end="", flush=True)
            shown = text
    except KeyboardInterrupt:
        print(" (stopped)", file=sys.stderr)
    print(json.dumps({"response": shown}, ensure_ascii=False) if config.json else "", flush=True)
    return shown


def load(config: GenerateConfig | ChatConfig) -> tuple[Actor, Encoder]:
    """The model that --model names and its encoder."""
    strategy = Strategy.named("naive", dtype=config.dtype, device=config.device)
    source = resolve_model(config.model)
    with strategy.init():
        actor = Actor.from_pretrained(source).requires_grad_(False)
    strategy.prepare(actor)
    return actor, encoder_of(
        source, actor.decoder.config, DataFlags(data=(), max_length=actor.decoder.config.max_length)
    )


def _sampling(config: GenerateConfig | ChatConfig, n: int = 1) -> Sampling:
    try:
        return Sampling(
            temperature=config.temperature, max_new_tokens=config.max_new_tokens, n=n,
            top_k=config.top_k, top_p=config.top_p, seed=config.seed,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"{error}.") from error
