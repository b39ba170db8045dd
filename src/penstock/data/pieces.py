"""Pieces of a text into token ids, each as it stands behind the text that precedes it. Knows no roles and no records.

[Note: pieces in their context] A conversation is tokenized piece by piece, question and answer in turn, because an
answer is sampled behind ids that are fixed by then. Some tokenizers put a space in front of every text: tokenized
alone, each answer would begin with one that no sampled answer has.

[Note: quoted tokens] A message may spell a token of the template (<|im_end|>). `quote` writes such words as private
characters, which pass through the template and become the ordinary tokens that spell them.
"""

import re
from collections.abc import Collection
from typing import Any

from penstock.models.chat_template import word_of

PRIVATE = 0x10F000
"""The first of the characters of Unicode's last private area that stand for quoted words."""


class Pieces:
    """A tokenizer and the words that are tokens of the template: those of the ids `structure` that it added."""

    def __init__(self, tokenizer: Any, structure: Collection[int]) -> None:
        self.tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers written in Python have none
        if self._backend is not None:
            self._backend.no_truncation()  # the limit is --max-length
            self._backend.no_padding()
        added = {
            word_of(tokenizer, token): token for token in sorted(set(tokenizer.added_tokens_decoder) & set(structure))
        }
        self.words = {word: token for word, token in added.items() if self._whole(word) == [token]}
        """Tokens of the template and ends, by how they are spelled."""
        self._private = {word: chr(PRIVATE + i) for i, word in enumerate(self.words)}
        self._spelled = {letter: word for word, letter in self._private.items()}

    def spells(self, text: str, words: Collection[str] | None = None) -> int:
        """How many of the words are in the text; by default all that are tokens of the template."""
        return len(_any_of(self.words if words is None else words).findall(text))

    def quote(self, text: str, words: Collection[str] | None = None) -> str:
        """The text with those words as private characters: see [Note: quoted tokens]."""
        return _any_of(self.words if words is None else words).sub(lambda word: self._private[word[0]], text)

    def is_quoted(self, text: Any) -> bool:
        """Whether `quote` has changed the text."""
        return isinstance(text, str) and any(letter in text for letter in self._spelled)

    def ids(self, text: str, behind: str = "") -> list[int]:
        """The ids of a text behind another, as the two together have them: see [Note: pieces in their context].

        Where a token would reach across the boundary, the text is tokenized by itself, without a space in front.
        """
        if not text:
            return []
        start = behind.rfind("\n", 0, -1) + 1
        for context in (behind[start:], "\n"):
            if context:
                before, both = self._unquoted(context), self._unquoted(context + text)
                if both[: len(before)] == before:
                    return both[len(before) :]
            elif not behind:
                break
        return self._unquoted(text)

    def _unquoted(self, text: str) -> list[int]:
        """The ids of a text, private characters as the ordinary tokens that spell their words."""
        if not self.is_quoted(text):
            return self._whole(text)
        letters = _any_of(self._spelled)
        quoted = iter([word[0] in self._spelled for word in _any_of([*self.words, *self._spelled]).finditer(text)])
        ids: list[int] = []
        for token in self._whole(letters.sub(lambda letter: self._spelled[letter[0]], text)):
            if token in self.words.values() and next(quoted, False):
                word = word_of(self.tokenizer, token)
                ids += self.ids(word[:1], behind="\n") + self.ids(word[1:], behind="\n")  # in two parts it is no token
            else:
                ids.append(token)
        return ids

    def _whole(self, text: str) -> list[int]:
        if self._backend is not None:  # a fifth of the time that transformers takes
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _any_of(words: Collection[str]) -> re.Pattern[str]:
    """Matches the longest of the words; nothing where there are none."""
    return re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or r"(?!)")
