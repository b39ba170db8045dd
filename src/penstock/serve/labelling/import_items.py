"""What comes into the room: objects in penstock's formats of comparisons and prompts, Argilla's records, or Label
Studio's tasks, as items.

An item has a prompt (a text, or turns) and 2 to 9 different answers; a prompt alone has its answers made by models. The
ranking of an object is read where it is gold, which tests labellers, and left out otherwise.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.data import field_checks
from penstock.data.jsonl import FieldError
from penstock.data.records import FORMS, Comparison, Kind, Prompt, line_of
from penstock.serve.labelling import label_studio
from penstock.serve.store import Row

ANSWER_FIELD = re.compile(r"(?:response|answer|generation|completion|reply|output)[-_ ]?(\d+)")
"""How answers are called in records of Argilla that nobody has ranked yet."""
PROMPT_FIELDS = ("prompt", "instruction", "question", "input", "text", "conversation", "messages")
ORIGIN = ("model", "digest", "sampling", "finish_reason")


def read_item(item: Mapping[str, Any], *, gold: bool, draft: Row | None) -> Row:
    """An item as `room.add_items` stores it. Raises FieldError for an object that is none.

    draft: how the answers to a prompt alone are to be made; None where none shall be.
    """
    given_id = str(item.get("id") or "")
    if isinstance(item.get("fields"), Mapping):
        item = _of_argilla(item, gold)
    elif isinstance(item.get("data"), Mapping):
        item = label_studio.item_of(item, gold)
    record = _record(item, gold)
    line = line_of(record)
    if record.tools or record.prompt_ids is not None:
        raise FieldError(
            "tools" if record.tools else "prompt_ids", "the labelling room shows texts alone; take it out."
        )
    prompt, answers, ranking = line.get("prompt", line.get("messages")), [], None
    if isinstance(record, Comparison):
        draft = None
        answers = _answers(record, item.get("shown"))
        ranking = line["ranking"] if gold else None
    elif draft is None:
        raise FieldError("responses", "are missing; give 2 to 9, or choose models that shall answer.")
    elif gold:
        raise FieldError("ranking", "is missing; a gold item has answers and their known ranking.")
    texts = [answer["content"] for answer in answers]
    digest = hashlib.sha256(json.dumps([prompt, texts, ranking, draft], sort_keys=True).encode()).hexdigest()
    return {
        "digest": digest, "source_id": given_id[:200] if given_id.isprintable() else "", "prompt": prompt,
        "answers": answers, "gold": ranking, "draft": draft,
    }  # fmt: skip


def _record(item: Mapping[str, Any], gold: bool) -> Prompt:
    """What the object says, by the first of penstock's formats that it fits."""
    if "responses" in item and "prompt" in item and not (gold and "ranking" in item):
        if gold:
            raise FieldError("ranking", "is missing; a gold item has answers and their known ranking.")
        responses = field_checks.items(item["responses"], "responses")
        item = {**item, "ranking": [list(range(len(responses)))]}
    kind: Kind = "comparisons" if "responses" in item or "rejected" in item else "prompts"
    for form in FORMS[kind]:
        if form.fits(item):
            return form.read(item, "item")
    names = ", ".join(field_checks.shown(name) for name in list(item)[:8]) or "no fields"
    raise FieldError("fields", f"found {names}; an item has prompt and responses, or a prompt alone.")


def _answers(record: Comparison, shown: Any) -> list[Row]:
    """The answers, with what made them where the object says so as penstock's own exports do."""
    texts = record.responses or ()
    if len(set(texts)) < len(texts):
        raise FieldError("responses", "are not all different; leave the same answer out.")
    sources: Sequence[Any] = shown if isinstance(shown, list) and len(shown) == len(texts) else [{}] * len(texts)
    origins = [source if isinstance(source, dict) else {} for source in sources]
    return [
        {"content": text, **{key: origin.get(key) for key in ORIGIN}}
        for text, origin in zip(texts, origins, strict=True)
    ]


def _of_argilla(record: Mapping[str, Any], gold: bool) -> Row:
    """A record of Argilla (2.x, as its Dataset.to_disk writes) as prompt, responses and ranking.

    The ranking question is the one whose values name fields; a record that nobody has answered shows by its fields'
    names which are answers: response_1, response_2 ...
    """
    fields = record["fields"]
    prompt = next((fields[name] for name in PROMPT_FIELDS if fields.get(name)), None)
    if prompt is None:
        raise FieldError("fields", f"none of {', '.join(PROMPT_FIELDS)} is there; rename the prompt's field.")
    judged = [value for values in (record.get("responses") or {}).values() for value in _levels(values, fields)]
    suggested = [value for value in (record.get("suggestions") or {}).values() for value in _levels([value], fields)]
    numbered = {name: match for name in fields if (match := ANSWER_FIELD.fullmatch(name))}
    names = sorted(numbered, key=lambda name: int(numbered[name][1]))
    levels = next(iter(judged or suggested), None)
    if levels is not None:
        names = sorted({name for level in levels for name in level}, key=list(fields).index)
    if not names:
        return {"prompt": prompt}
    item = {"prompt": prompt, "responses": [fields[name] for name in names]}
    metadata = record.get("metadata") or {}
    item["shown"] = [{"model": metadata.get(f"{name}_model")} for name in names]
    if gold and levels is not None:
        item["ranking"] = [[names.index(name) for name in level] for level in levels]
    return item


def _levels(values: Any, fields: Mapping[str, Any]) -> list[list[list[str]]]:
    """The rankings among the answers to a question: levels of names of fields, best first."""
    rankings = []
    for answer in values if isinstance(values, list) else []:
        value = answer.get("value") if isinstance(answer, dict) else None
        options = value if isinstance(value, list) else []
        pairs: list[tuple[Any, Any]] = [
            (option.get("value"), option.get("rank") or place) if isinstance(option, dict) else (option, place)
            for place, option in enumerate(options, 1)
        ]
        if pairs and all(isinstance(name, str) and name in fields and isinstance(rank, int) for name, rank in pairs):
            levels = sorted({rank for _, rank in pairs})
            rankings.append([[name for name, rank in pairs if rank == level] for level in levels])
    return rankings
