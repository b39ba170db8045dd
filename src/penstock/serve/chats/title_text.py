"""Titles as text: the beginning of a message, and what a model wrote when it was asked for a title."""

import re
import unicodedata

LENGTH = 60
"""Characters of a title."""


def beginning(content: str) -> str:
    """The beginning of a message, cut before a letter: an emoji of several characters is one."""
    title = " ".join(content.split())
    end = min(LENGTH, len(title))
    # What joins, modifies or marks the character before it (Unicode's UAX 29, without its tables).
    while 0 < end < len(title) and (_extends(title[end]) or title[end - 1] == "\u200d"):
        end -= 1
    return title[: end or LENGTH].rstrip()


def cleaned(answer: str) -> str:
    """A title out of an answer: "**Title: The River**" is The River. Empty where the answer is none."""
    answer = re.sub(r"^\s*<think>.*?(</think>|$)", "", answer, flags=re.DOTALL)
    lines = answer.strip().splitlines()
    title = re.sub(r"^[#*_>\s]*(title\s*:)?", "", lines[0], flags=re.IGNORECASE) if lines else ""
    title = " ".join(title.strip("\"'`*_\u201c\u201d\u2018\u2019\u00ab\u00bb #").split()).rstrip(".")
    return title if any(letter.isalnum() for letter in title) and len(title) <= LENGTH else ""


def _extends(letter: str) -> bool:
    return unicodedata.category(letter) in ("Mn", "Me", "Mc", "Cf") or "\U0001f3fb" <= letter <= "\U0001f3ff"
