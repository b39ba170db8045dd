"""Rows within --max-length: what does not fit is dropped, cut at an end or cut at its beginning, and counted."""

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from penstock.errors import DataError

CUT = "answers cut at --max-length: they have no end of sequence, so only how they begin is learned"


class TooLongError(DataError):
    """A record that does not fit, and that must not or cannot be cut."""


@dataclass(frozen=True)
class Example:
    """One row of SFT. Example: Example([1, 5, 6, 2], [False, False, True, True])."""

    tokens: list[int]
    trained: list[bool]
    """True where the token is an assistant's, end token included (PPO.md 24)."""


def without_end(row: Example, ends: Collection[int]) -> Example:
    """The row up to its last trained token, without that token where it is one of these ends."""
    last = max((i for i, trained in enumerate(row.trained) if trained), default=0)
    return Example(row.tokens[:last], row.trained[:last]) if row.tokens[last] in ends else row


@dataclass
class Limits:
    """How long a row may be, and what is done with a longer one.

    `drop` leaves out an answer at a time; `right` cuts an answer at its end, which then has no EOS and is not learned;
    `left` cuts a prompt at its beginning. What cannot be done so is a TooLongError.
    """

    max_length: int
    reserve: int
    """Tokens of the response that a prompt leaves room for."""
    truncate: Literal["drop", "left", "right"]
    bos: list[int] = field(default_factory=list)
    """What begins a row and stays there."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was done, in words, and how many times."""

    def note(self, text: str, count: int = 1) -> None:
        """Counts something that the user must know."""
        if count:
            self.notes[text] += count

    def cut(self, row: Example, where: str) -> Example:
        """The row, made to fit, up to its last trained token: what follows that teaches nothing."""
        ends = [i for i in range(1, len(row.trained) + 1) if row.trained[i - 1] and not any(row.trained[i : i + 1])]
        if not ends:
            raise DataError(f"{where}: response: no token of it is learned; give an answer of weight 1.")
        end, fits = ends[-1], [end for end in ends if end <= self.max_length]
        if end > self.max_length and self.truncate == "left":
            row = self._without_start(row, end, where)
            end = self.max_length
        elif end > self.max_length:
            end = max(fits, default=0)
            if self.truncate == "right" and any(row.trained[end : self.max_length]):
                end = max(i + 1 for i, flag in enumerate(row.trained[: self.max_length]) if flag)
                self.note(CUT)
            elif fits:
                self.note("conversations end at their last answer that fits --max-length")
        if not any(row.trained[1:end]):
            raise self._too_long(where, f"response: {ends[0]} tokens with the prompt")
        return Example(row.tokens[:end], row.trained[:end])

    def shortened(self, prompt: list[int], room: int, where: str) -> list[int]:
        """A prompt in `room` tokens: without its beginning, its BOS aside, if that may be cut."""
        if len(prompt) <= room:
            return prompt
        head = self.bos if prompt[:1] == self.bos else []
        if self.truncate != "left" or room <= len(head):
            raise self._too_long(where, f"prompt: {len(prompt)} tokens where there is room for {room}")
        self.note("prompts cut at their beginning to fit --max-length")
        return head + prompt[len(prompt) - room + len(head) :]

    def compared(
        self, prompt: list[int], responses: list[list[int]], ranks: Sequence[int], where: str
    ) -> tuple[list[int], list[list[int]]]:
        """A prompt and its responses, made to fit; no ids where a response is dropped."""
        least = len(self.bos) + 1 if self.truncate == "left" else len(prompt)  # tokens of the prompt that stay
        fits = [len(ids) <= self.max_length - least for ids in responses]
        if self.truncate == "right" and self.max_length > len(prompt):
            self.note(CUT, fits.count(False))
            responses = [ids[: self.max_length - len(prompt)] for ids in responses]
        elif sum(fits) < 2:
            longest = max(map(len, responses))
            raise self._too_long(where, f"responses: a prompt of {len(prompt)} tokens, answers of up to {longest}")
        else:
            self.note("answers left out of their rankings, because they do not fit --max-length", fits.count(False))
            responses = [ids if fit else [] for ids, fit in zip(responses, fits, strict=True)]
            prompt = self.shortened(prompt, self.max_length - max(map(len, responses)), where)
        kept = [(rank, ids) for rank, ids in zip(ranks, responses, strict=True) if ids]
        pairs = [
            ids == other_ids for (rank, ids), (other, other_ids) in itertools.combinations(kept, 2) if rank != other
        ]
        self.note("pairs of answers not compared: their tokens are the same", sum(pairs))
        self.note("rankings left out: no answer in them is better than another", all(pairs))
        return prompt, responses

    def _without_start(self, row: Example, end: int, where: str) -> Example:
        """The last `max_length` tokens before `end`, a BOS in front of them; half an answer at the start teaches
        nothing."""
        tokens, trained = row.tokens[:end], row.trained[:end]
        answer = len(list(itertools.takewhile(bool, reversed(trained))))
        if answer >= self.max_length:
            raise self._too_long(where, f"response: {answer} tokens without any prompt")
        self.note("rows cut at their beginning to fit --max-length")
        head = self.bos if tokens[:1] == self.bos else []
        start = end - self.max_length + len(head)
        half = len(list(itertools.takewhile(bool, trained[start:]))) if trained[start - 1] else 0
        return Example(head + tokens[start:], [False] * (len(head) + half) + trained[start + half :])

    def _too_long(self, where: str, problem: str) -> TooLongError:
        return TooLongError(
            f"{where}: {problem}, and a row has {self.max_length} with {self.reserve} at least for the response; "
            "shorten it, raise --max-length if the model allows, --truncate left, or --skip-bad."
        )
