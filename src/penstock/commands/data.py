"""`penstock data`: what data files are, and the votes of the chat page as comparisons for `penstock reward`.

A vote on a pair is one line. Thumbs are lines where answers to one message were liked and disliked: each liked one
against each disliked one. A thumb without its opposite, two equal answers and an empty answer are left out and counted.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from penstock.config import CheckConfig, VotesConfig
from penstock.data import formats
from penstock.errors import DataError, UserError
from penstock.run.directory import refused
from penstock.serve.store import Row, open_store


def check(config: CheckConfig) -> int:
    """Prints what the files are, and returns the exit code: 4 if a line is bad."""
    report = formats.check(config.files)
    print(report.text)
    return DataError.exit_code if report.bad else 0


def export(config: VotesConfig) -> None:
    """Writes the file and prints what is in it. Raises DataError when there is nothing to write."""
    out = Path(config.out)
    if out.exists():
        raise UserError(f"--out {out}: exists already; choose another name or remove it.")
    store = open_store(config.data_dir, config.database, create=False)
    try:
        votes = store.votes()
    finally:
        store.close()
    lines = list(comparisons(votes))
    if not lines:
        raise DataError(f"{len(votes)} votes, and no comparison among them; vote on two answers to one message first.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise refused(f"--out {out}", error) from error
    print(f"wrote {out}: {len(lines)} comparisons from {len(votes)} votes")


def comparisons(votes: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """The lines: prompt, responses and ranking for `penstock reward`; and each answer's model, digest and sampling."""
    thumbs: dict[str, dict[int, list[Row]]] = defaultdict(lambda: {1: [], -1: []})
    for vote in votes:
        if vote["kind"] == "pair":
            left, right = vote["shown"]
            ranking: list[Any] = [[0, 1]]
            if vote["chosen_id"] is not None:
                ranking = [0, 1] if vote["chosen_id"] == left["message_id"] else [1, 0]
            yield from _line(vote, vote["id"], [left, right], ranking)
        else:
            thumbs[json.dumps([vote["conversation_id"], vote["prompt"]])][vote["value"]].append(vote)
    for sides in thumbs.values():
        for liked in sides[1]:
            for disliked in sides[-1]:
                name = f"{liked['id']}+{disliked['id']}"
                yield from _line(liked, name, [liked["shown"][0], disliked["shown"][0]], [0, 1])


def _line(vote: Row, name: str, shown: list[Row], ranking: list[Any]) -> Iterator[dict[str, Any]]:
    texts = [answer["content"] for answer in shown]
    if not all(text.strip() for text in texts) or texts[0] == texts[1]:
        return
    details = ("message_id", "model", "digest", "sampling", "finish_reason")
    yield {
        "id": name,
        "prompt": vote["prompt"],
        "responses": texts,
        "ranking": ranking,
        "kind": vote["kind"],
        "shown": [{key: answer[key] for key in details} for answer in shown],
        "created_at": vote["created_at"],
    }
