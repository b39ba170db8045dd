"""Rows of tokens drawn for people: what of them is learned, and what only read."""

from collections.abc import Iterator
from typing import Any

from penstock.data.chat import Encoder
from penstock.data.records import Kind

LEARNED = ">>{}<<"
"""How learned tokens are drawn."""
MARKED: dict[Kind, str] = {
    "demonstrations": "learned", "prompts": "learned", "comparisons": "compared", "votes": "judged",
}  # fmt: skip
"""What the marked tokens of a record are."""


def drawn(tokenizer: Any, tokens: list[int], trained: list[bool]) -> str:
    """The row as text, runs of learned tokens between marks."""
    starts = [i for i in range(len(tokens)) if i == 0 or trained[i] != trained[i - 1]]
    pieces = []
    for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
        text = _text(tokenizer, tokens[start:stop])
        pieces.append(LEARNED.format(text) if trained[start] else text)
    return "".join(pieces)


def shown(encoder: Encoder, kind: Kind, record: Any, row: Any) -> Iterator[str]:
    """The lines of a record: its tokens as `algorithms.setup.read` returns them, drawn and counted."""
    prompt: list[int]
    if kind == "prompts":
        yield from _row(encoder, kind, "prompt", row, [False] * len(row))
    elif kind == "comparisons":
        prompt, responses = row
        yield from _row(encoder, kind, "prompt", prompt, [False] * len(prompt))
        for rank, ids in zip(record.ranks, responses, strict=True):
            name = f"rank {rank}" + ("" if ids else ", left out: it does not fit --max-length")
            yield from _row(encoder, kind, name, ids, [True] * len(ids))
    else:
        name = "row" if kind == "demonstrations" else "liked" if record.label else "disliked"
        yield from _row(encoder, kind, name, row.tokens, row.trained)


def _row(encoder: Encoder, kind: Kind, name: str, tokens: list[int], trained: list[bool]) -> Iterator[str]:
    yield f"  {name}: {len(tokens)} tokens, {sum(trained)} {MARKED[kind]}"
    yield from (f"    {line}" for line in drawn(encoder.tokenizer, tokens, trained).splitlines())


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False)) if tokenizer is not None else f"{ids}"
