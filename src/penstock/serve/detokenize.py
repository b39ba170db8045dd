"""The text of one answer while its tokens come: what may be shown now, and what waits for the next token.

An incomplete character waits, and so does text that may begin a stop string: neither is shown in pieces. Knows tokens
and text, and nothing of requests. Thoughts in <think> are told from the answer.

[Note: stop strings are found in the text] The server finds them, not the engine: streamed and whole answers are made
of the same pieces, and the engine does not have to decode its tokens.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from penstock.data.chat import Encoder

INCOMPLETE = "\ufffd"
"""The decoder's character for bytes that are no character, or an incomplete one."""
WINDOW = 16
"""Tokens decoded together while characters are whole; a full window drops its first half."""
LONGEST_WAIT = 64
"""Tokens after which bytes that make no character are shown as INCOMPLETE."""


class TextStream:
    """Tokens in, text out. `stops` end the text; `ended` is true after one of them."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        # No NUL: PostgreSQL does not store it, and a later prompt that holds it is refused.
        self._decode = lambda ids: decode(ids).replace("\0", "")
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._released = 0
        """Characters of the window's text that are shown or waiting."""
        self._waiting = ""
        """Whole characters that may be the beginning of a stop string."""
        self.length = 0
        """Characters shown so far."""
        self.ended = False

    @property
    def position(self) -> int:
        """Index of the next character: behind those shown and those waiting."""
        return self.length + len(self._waiting)

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """The text to show after this token; empty after a stop string. `may_stop`: whether stop strings count yet."""
        if self.ended:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = text.rstrip(INCOMPLETE) if text.endswith(INCOMPLETE) and len(self._ids) < LONGEST_WAIT else text
        # An incomplete character has three bytes at most; INCOMPLETE before them is no character at all.
        whole = text[: max(len(whole), len(text) - 3)]
        new = whole[self._released :]
        self._released = max(self._released, len(whole))
        if len(whole) == len(text) and len(self._ids) >= WINDOW:
            # Half of the window stays, because decoders look at what precedes (spaces, runs of bytes).
            del self._ids[: WINDOW // 2]
            self._released = len(self._decode(self._ids))
        return self._show(new, may_stop)

    def finish(self) -> str:
        """The text that still waits, after the last token."""
        if self.ended:
            return ""
        shown = self._show(self._decode(self._ids)[self._released :] if self._ids else "")
        if not self.ended:
            shown += self._waiting
            self.length += len(self._waiting)
        self._ids, self._released, self._waiting = [], 0, ""
        return shown

    def _show(self, new: str, may_stop: bool = True) -> str:
        text = self._waiting + new
        if not (self._stops and may_stop):
            self.length += len(text)
            return text
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.ended, self._waiting = True, ""
            text = text[: min(starts)]
        else:
            end = len(text) - max(overlap(stop, text) for stop in self._stops)
            text, self._waiting = text[:end], text[end:]
        self.length += len(text)
        return text


def overlap(stop: str, text: str) -> int:
    """How many of the last characters of the text begin the stop string."""
    for count in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0


def decoder_of(encoder: Encoder) -> Callable[[Sequence[int]], str]:
    """The encoder's `decode`, where possible without the overhead of transformers (30 us a call)."""
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return encoder.decode
    hidden = encoder.hidden
    return lambda ids: backend.decode([token for token in ids if token not in hidden], skip_special_tokens=False)


class Vocabulary:
    """Each token's bytes, as an answer would spell them."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._bytewise = backend is not None and '"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"])

    def bytes_of(self, token: int) -> bytes:
        """The token's bytes, which may be a part of a character."""
        word = self._tokenizer.convert_ids_to_tokens(token)
        if word is None:  # a row of the embedding without a word
            return b""
        if token in self._special:
            return word.encode()
        if self._bytewise and all(letter in BYTES for letter in word):
            return bytes(BYTES[letter] for letter in word)
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", word):
            return bytes([int(byte[1], 16)])
        return word.replace("\u2581", " ").encode()


def _bytes_of_letters() -> dict[str, int]:
    """GPT-2's letters for bytes (Radford et al. 2019): printable ones are themselves, the others come from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(shifted)}


BYTES = _bytes_of_letters()


# --- thoughts ---------------------------------------------------------------------------------------------------------
# A thought begins in the model's own text, or in the prompt where the chat template opens it (DeepSeek-R1, Qwen3's
# thinking models). Elsewhere the tags are text. reasoning_content is DeepSeek's and vLLM's name.

OPEN, CLOSE = "<think>", "</think>"
LAST_TOKENS = 16
"""Of a prompt: enough to spell OPEN and the line end behind it."""


def opens_thought(decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> bool:
    """Whether a prompt ends with an opened thought."""
    return decode(prompt[-LAST_TOKENS:]).rstrip().endswith(OPEN)


class ThoughtSplitter:
    """Text in, thoughts and answer out, without the tags and the white space around them."""

    def __init__(self, opened: bool) -> None:
        self._state: Literal["begin", "thought", "between", "answer"] = "thought" if opened else "begin"
        self._waiting = ""
        """What may be a part of a tag, or white space before one."""
        self._thinks = False
        """Whether the thought has a first letter."""

    def push(self, text: str, last: bool) -> tuple[str, str]:
        """What this text adds to the thought and to the answer; with `last` nothing waits any longer."""
        if self._state == "answer":
            return "", text
        text, self._waiting = self._waiting + text, ""
        if self._state == "begin":
            start = text.lstrip()
            if not start.startswith(OPEN):
                if not last and OPEN.startswith(start):
                    self._waiting = text
                    return "", ""
                self._state = "answer"
                return "", text
            self._state, text = "thought", start[len(OPEN) :]
        thought = ""
        if self._state == "thought":
            thought, text = self._push_thought(text, last)
        if self._state == "between":
            text = text.lstrip()
            self._state = "answer" if text else "between"
        return thought, text

    def _push_thought(self, text: str, last: bool) -> tuple[str, str]:
        """The thought's text, and what is behind its end."""
        if not self._thinks:
            text = text.lstrip()
            self._thinks = bool(text) and not CLOSE.startswith(text)
        thought, close, rest = text.partition(CLOSE)
        if close:
            self._state = "between"
            return thought.rstrip(), rest
        if last:
            return text.rstrip(), ""
        shown = text[: len(text) - overlap(CLOSE, text)].rstrip()
        self._waiting = text[len(shown) :]
        return shown, ""
