"""One answer's text while its tokens come: what may be shown now, and what must wait for the next token.

A character whose bytes are not all there waits, and so does whatever may be the beginning of a stop string, so that
neither is ever shown in pieces. Knows tokens and text, nothing of requests.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from penstock.data.chat import Encoder

HALF = "\ufffd"
"""What a decoder writes for bytes that are no character, or not yet one."""
WINDOW = 16
"""Tokens decoded together at most while characters are whole; decoding starts behind the last that was."""
LONGEST_WAIT = 64
"""Tokens after which bytes that make no character are shown as they are."""


class TextStream:
    """Tokens in, text out. `stops` end it; `ended` says that one has come."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        # NUL is no text: PostgreSQL does not store it, and as part of a later prompt it would be refused.
        self._decode = lambda ids: decode(ids).replace("\0", "")
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._told = 0
        """Characters of the window's text that have left it."""
        self._waiting = ""
        """Whole characters that may be the beginning of a stop string."""
        self.length = 0
        """Characters shown so far."""
        self.ended = False

    @property
    def position(self) -> int:
        """Where the next character will stand: shown ones and waiting ones."""
        return self.length + len(self._waiting)

    def push(self, token: int) -> str:
        """What may be shown after this token; nothing more once a stop string has come."""
        if self.ended:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = text.rstrip(HALF) if text.endswith(HALF) and len(self._ids) < LONGEST_WAIT else text
        # Up to three bytes can belong to a character on its way; what stands before them is none.
        whole = text[: max(len(whole), len(text) - 3)]
        new = whole[self._told :]
        self._told = max(self._told, len(whole))
        if len(whole) == len(text) and len(self._ids) >= WINDOW:
            # Half of the window stays in front, because decoders look at what precedes (spaces, runs of bytes).
            del self._ids[: WINDOW // 2]
            self._told = len(self._decode(self._ids))
        return self._show(new)

    def finish(self) -> str:
        """What was still waiting, when no more tokens come."""
        if self.ended:
            return ""
        shown = self._show(self._decode(self._ids)[self._told :] if self._ids else "")
        if not self.ended:
            shown += self._waiting
            self.length += len(self._waiting)
        self._ids, self._told, self._waiting = [], 0, ""
        return shown

    def _show(self, new: str) -> str:
        text = self._waiting + new
        if not self._stops:
            self.length += len(text)
            return text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.ended, self._waiting = True, ""
            text = text[: min(found)]
        else:
            held = max(_beginning_of(stop, text) for stop in self._stops)
            self._waiting = text[len(text) - held :]
            text = text[: len(text) - held]
        self.length += len(text)
        return text


def _beginning_of(stop: str, text: str) -> int:
    """How many of the last characters of the text are a beginning of the stop string."""
    for count in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0


def decoder_of(encoder: Encoder) -> Callable[[Sequence[int]], str]:
    """The encoder's `decode`, without what transformers does around it (30 us a call) where it can be left out."""
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return encoder.decode
    return functools.partial(backend.decode, skip_special_tokens=True)


class Vocabulary:
    """Each token's bytes, as an answer would spell them."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._bytewise = backend is not None and '"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"])

    def bytes_of(self, token: int) -> bytes:
        """The token's bytes; those of a part of a character are no text by themselves."""
        word = self._tokenizer.convert_ids_to_tokens(token)
        if word is None:  # a row of the embedding that no word has
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
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = _bytes_of_letters()
