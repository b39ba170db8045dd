"""`penstock data`: what data files are, and the votes of the chat page for `penstock reward` and `penstock kto`.

As comparisons a vote on a pair is one line, and thumbs are lines where answers to one message were liked and disliked:
each liked one against each disliked one. As votes a thumb is one line, and a pair two: the better answer was liked, the
other disliked. What says nothing is left out: two equal answers, an empty one, and of comparisons a thumb without its
opposite, of votes a tie.
"""

import dataclasses
import functools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from penstock.commands.config import CheckConfig, ShowConfig, VotesConfig
from penstock.commands.drawing import LEARNED, MARKED, shown
from penstock.data import formats
from penstock.data.chat import Encoder
from penstock.data.records import Comparison, Demonstration, Kind, Prompt, Vote
from penstock.errors import DataError, UserError
from penstock.run.directory import refused
from penstock.serve.labelling.export import rankings
from penstock.serve.store import Row, open_store


def check(config: CheckConfig) -> int:
    """Prints what the files are, and with --model what training says; the exit code is 4 if a line is bad."""
    bad: list[str] = []
    kinds: dict[Kind, list[str]] = defaultdict(list)
    result: dict[str, Any] = {"sources": []}
    say = functools.partial(print, file=sys.stderr) if config.json else print
    for text in config.data:
        kind = config.kind or formats.kind_of(text)
        kinds[kind].append(text)
        lines = formats.read_source(text, kind, formats.parse_keys(config.keys))
        if kind == "prompts":
            lines.unread = "fields that a reward function may read"
        facts = _facts(lines.records)
        say("\n".join([f"{text}: {len(lines.records)} {kind} ({lines.how})", *_lines_of(facts)]))
        result["sources"].append({"data": text, "kind": kind, "records": len(lines.records), "how": lines.how, **facts})
        bad += lines.bad
    if config.model is None:
        say("\n".join(["The files were checked alone; --model says what training makes of them.", *bad]))
    else:
        result["model"], bad = _check_with(config.model, config, kinds, say)
    if config.json:
        print(json.dumps(result | {"bad": bad}))
    return DataError.exit_code if bad else 0


def _check_with(
    model: str, config: CheckConfig, kinds: dict[Kind, list[str]], say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Says what training says when it reads the files, by kind; returns that and the bad lines."""
    bad, read = list[str](), []
    for kind, texts in kinds.items():
        _, records, rows, problems = _read_as(model, config, kind, texts, say)
        whole = kind in ("demonstrations", "votes")
        lengths = [len(row.tokens) if whole else len(row) for row in rows if kind != "comparisons"]
        lengths += [len(row[0]) + len(ids) for row in rows if kind == "comparisons" for ids in row[1] if ids]
        spread = _spread(lengths) if lengths else None
        tokens = f"; tokens of a row: {_text_of(spread)}" if spread else ""
        say("\n".join([f"{model}: {len(records)} {kind}{tokens}", *problems]))
        read.append({"model": model, "kind": kind, "records": len(records), "row_tokens": spread})
        bad += problems
    return read, bad


def _read_as(
    model: str, config: Any, kind: Kind, texts: Sequence[str], say: Callable[[str], None] = print
) -> tuple[Encoder, list[Any], list[Any], list[str]]:
    """What training that model reads from sources, its lines said: the encoder, records, their tokens, bad lines."""
    from penstock.algorithms.setup import encoder_of, read_all
    from penstock.models import pretrained
    from penstock.run.directory import resolve_model

    address = resolve_model(model)
    decoder, _ = pretrained.load(address, device="meta", allow_pickle=config.allow_pickle)
    reserve = config.max_new_tokens if kind == "prompts" else 1
    encoder = encoder_of(address, decoder.config, config, reserve=reserve)
    return encoder, *read_all(say, encoder, texts, kind, dataclasses.replace(config, skip_bad=True))


def show(config: ShowConfig) -> int:
    """Prints what the data is and three of its records as tokens; the exit code is 4 if a line is bad."""
    kind = config.kind or formats.kind_of(config.data[0])
    encoder, records, rows, bad = _read_as(config.model, config, kind, config.data)
    print(f"{config.model}: {len(records)} {kind}; {LEARNED.format('so')} is what is {MARKED[kind]}:")
    for i in sorted({0, len(rows) // 2, len(rows) - 1} & {*range(len(rows))}):
        print("\n".join(["", records[i].where, *shown(encoder, kind, records[i], rows[i])]))
    print("\n".join(bad), end="\n" if bad else "")
    return DataError.exit_code if bad else 0


def _facts(records: Sequence[Prompt]) -> dict[str, Any]:
    """Distinct prompts, labels and lengths, as --json has them."""
    if not records:
        return {}
    prompts = Counter(record.prompt_key for record in records)
    facts: dict[str, Any] = {"distinct_prompts": len(prompts), "most_frequent": prompts.most_common(1)[0][1]}
    labels = Counter(record.label for record in records if isinstance(record, Vote))
    if labels:
        facts |= {"liked": labels[True], "disliked": labels[False]}
    return facts | {"lengths": {name: _spread(lengths) for name, lengths in _lengths(records).items()}}


def _lines_of(facts: dict[str, Any]) -> Iterator[str]:
    if not facts:
        return
    yield f"  distinct prompts: {facts['distinct_prompts']}; most frequent: {facts['most_frequent']} times"
    if "liked" in facts:
        yield f"  liked: {facts['liked']}; disliked: {facts['disliked']}"
    for name, spread in facts["lengths"].items():
        yield f"  {name}: {_text_of(spread)}"


def _spread(lengths: Sequence[int]) -> dict[str, int]:
    ordered = sorted(lengths)
    high = ordered[min(int(len(ordered) * 0.95), len(ordered) - 1)]
    return {"median": ordered[len(ordered) // 2], "p95": high, "longest": ordered[-1]}


def _text_of(spread: dict[str, int]) -> str:
    return f"median {spread['median']}, 95 % below {spread['p95']}, longest {spread['longest']}"


def _lengths(records: Sequence[Prompt]) -> dict[str, list[int]]:
    """Lengths by part: characters of texts, tokens of ids."""
    lengths: dict[str, list[int]] = {}
    for record in records:
        parts: list[tuple[str, Any]] = [("prompt characters", record.prompt), ("prompt tokens", record.prompt_ids)]
        if record.messages is not None:
            parts += [(f"{message['role']} characters", message["content"]) for message in record.messages]
        if isinstance(record, Demonstration | Vote):
            parts += [("response characters", record.response), ("response tokens", record.response_ids)]
        elif isinstance(record, Comparison):
            parts += [("response characters", text) for text in record.responses or ()]
            parts += [("response tokens", row) for row in record.response_ids or ()]
        for name, value in parts:
            if value is not None:
                lengths.setdefault(name, []).append(len(value))
    return lengths


def export(config: VotesConfig) -> None:
    """Writes the file and prints what is in it. Raises DataError when there is nothing to write."""
    out = Path(config.out)
    if out.exists():
        raise UserError(f"--out {out}: exists already; choose another name or remove it.")
    if not (config.votes or config.rankings):
        raise UserError("penstock data export: say what to write: --votes, --rankings or both.")
    if config.rankings and config.kind == "votes":
        raise UserError("--rankings: are comparisons, and no votes on single answers; leave out one of the two flags.")
    write, needs = EXPORTS[config.kind]
    store = open_store(config.data_dir, config.database, create=False)
    try:
        votes = store.votes() if config.votes else []
        ranked = list(rankings(store)) if config.rankings else []
    finally:
        store.close()
    lines = [*write(votes), *ranked]
    if not lines:
        needs = needs if config.votes else "rankings are made in the labelling room, at /label."
        raise DataError(f"{len(votes)} votes and {len(ranked)} rankings, and nothing to write from them; {needs}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise refused(f"--out {out}", error) from error
    liked = sum(line.get("label", False) for line in lines)
    how = f" ({liked} liked, {len(lines) - liked} disliked)" if config.kind == "votes" else ""
    sources = [f"{len(votes)} votes of the page"] if config.votes else []
    sources += ["the labelling room"] if config.rankings else []
    print(f"wrote {out}: {len(lines)} {config.kind}{how} from {' and '.join(sources)}")


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


def single_votes(votes: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """The lines: prompt, response and label for `penstock kto`, and the answer's model, digest and sampling."""
    for vote in votes:
        texts = [answer["content"] for answer in vote["shown"]]
        is_thumb = vote["kind"] == "thumb"
        if not is_thumb and (vote["chosen_id"] is None or texts[0] == texts[1]):
            continue
        for answer in vote["shown"]:
            if answer["content"].strip():
                liked = vote["value"] > 0 if is_thumb else answer["message_id"] == vote["chosen_id"]
                name = vote["id"] if is_thumb else f"{vote['id']}+{answer['message_id']}"
                judged = {"prompt": vote["prompt"], "response": answer["content"], "label": liked}
                yield {"id": name, **judged, "finish_reason": answer["finish_reason"], **_origin(vote, [answer])}


EXPORTS = {
    "comparisons": (comparisons, "a comparison needs votes on two answers to one message."),
    "votes": (single_votes, "a vote needs an answer that was liked or disliked."),
}
"""Of each --kind: what makes the lines, and what it takes."""


def _line(vote: Row, name: str, shown: list[Row], ranking: list[Any]) -> Iterator[dict[str, Any]]:
    texts = [answer["content"] for answer in shown]
    if not all(text.strip() for text in texts) or texts[0] == texts[1]:
        return
    reasons = [answer["finish_reason"] for answer in shown]
    judged = {"prompt": vote["prompt"], "responses": texts, "ranking": ranking, "finish_reason": reasons}
    yield {"id": name, **judged, **_origin(vote, shown)}


def _origin(vote: Row, shown: Sequence[Row]) -> dict[str, Any]:
    """Where a line comes from: the kind of vote, each answer's model and sampling, and when it was."""
    details = ("message_id", "model", "digest", "sampling")
    answers = [{key: answer[key] for key in details} for answer in shown]
    return {"kind": vote["kind"], "shown": answers, "created_at": vote["created_at"]}
