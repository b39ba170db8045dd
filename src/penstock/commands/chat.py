"""`penstock chat`: a conversation with a trained model in the terminal."""

import contextlib
import io
import sys
import termios
from collections.abc import Iterator

from penstock.commands.config import ChatConfig
from penstock.commands.generate import as_json, load, print_notes, sampling_of
from penstock.data.chat import Encoder
from penstock.data.records import Prompt
from penstock.errors import DataError, UserError
from penstock.rollout.engine import Engine
from penstock.rollout.sampling import Sampling

PASTE_BEGINS, PASTE_ENDS = "\x1b[200~", "\x1b[201~"


def chat(config: ChatConfig) -> None:
    """A conversation on stdin and stdout: answers stream; /reset forgets the conversation, /quit or Ctrl-D ends it."""
    _, actor, encoder = load(config)
    if encoder.tokenizer is None:
        raise UserError(
            f"--model {config.model}: has no tokenizer, so it cannot chat; use penstock generate with prompt_ids."
        )
    sampling, engine = sampling_of(config), Engine(actor.decoder, eos_ids=encoder.eos_ids, rows=1)
    print_notes(encoder)
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    with _marked_pastes() if interactive and sys.stdout.isatty() else contextlib.nullcontext():
        _talk(config, encoder, engine, sampling, interactive)


def _talk(config: ChatConfig, encoder: Encoder, engine: Engine, sampling: Sampling, interactive: bool) -> None:
    """Messages and answers, until /quit or the end of stdin."""
    opening = [{"role": "system", "content": config.system}] if config.system else []
    messages, turn = list(opening), 0
    if interactive:
        print(f"{config.model}: type a message; /reset forgets the conversation, /quit ends.")
    while True:
        text = _message("you> " if interactive else "")
        if text is None:
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
        reply = _say(config, engine, encoder, prompt, sampling, turn)
        if reply:
            messages.append({"role": "assistant", "content": reply})
        else:  # the next message takes the place of one that was not answered, as on the page
            messages.pop()
        turn += 1


@contextlib.contextmanager
def _marked_pastes() -> Iterator[None]:
    """Inside, the terminal puts marks around what is pasted, and does not show them (xterm's bracketed paste)."""
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    quiet = [*before]
    quiet[3] &= ~termios.ECHOCTL  # else it shows a mark as ^[[200~
    termios.tcsetattr(terminal, termios.TCSADRAIN, quiet)
    print("\x1b[?2004h", end="", flush=True)
    try:
        yield
    finally:
        print("\x1b[?2004l", end="", flush=True)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _message(prompt: str) -> str | None:
    """A line, with all lines that were pasted with it; None at the end of stdin."""
    print(prompt, end="", flush=True)
    text = line = sys.stdin.readline()
    while line and text.count(PASTE_BEGINS) > text.count(PASTE_ENDS):
        line = sys.stdin.readline()
        text += line
    return text.replace(PASTE_BEGINS, "").replace(PASTE_ENDS, "").rstrip("\n") if text else None


def _fit(
    encoder: Encoder, messages: list[dict[str, str]], opening: list[dict[str, str]]
) -> tuple[list[dict[str, str]], list[int]]:
    """The conversation and its tokens; the oldest turns are dropped, with a message, when they no longer fit."""
    while True:
        try:
            prompt = encoder.encode_prompt(Prompt(messages=tuple(messages), where="chat:1"))
            return messages, prompt
        except DataError:
            turns = messages[len(opening) :]
            if len(turns) <= 1:
                raise
            messages = [*opening, *turns[2:]]
            print("(the oldest turn no longer fits the context and is forgotten)", file=sys.stderr)


def _say(config: ChatConfig, engine: Engine, encoder: Encoder, prompt: list[int], sampling: Sampling, turn: int) -> str:
    """Streams one answer to stdout and returns it."""
    ids: list[int] = []
    shown = ""
    try:
        for token in engine.stream(prompt, sampling, episode=turn):
            ids.append(token)
            text = encoder.decode(ids)
            if text.endswith("\ufffd"):  # half a character: the rest of its bytes comes with the next token
                continue
            if not config.json:
                print(text[len(shown) :], end="", flush=True)
            shown = text
    except KeyboardInterrupt:
        print(" (stopped)", file=sys.stderr)
    print(as_json({"response": shown}) if config.json else "", flush=True)
    return shown
