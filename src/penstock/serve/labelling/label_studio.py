"""Tasks of Label Studio, between JSON and items: those that its templates for rankings and for pairs show and export.

Its ranker sorts a list into buckets, and has no ties: a bucket for each place holds what is equal. Pure: objects in,
objects out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.data.jsonl import FieldError
from penstock.serve.store import Row

PROMPT_FIELDS = ("prompt", "question", "query", "text", "messages")
PAIR_FIELDS = (("answer1", "answer2"), ("response1", "response2"), ("text1", "text2"))
REST = "_"
"""Label Studio's name for what is in no bucket."""


def item_of(task: Mapping[str, Any], gold: bool) -> Row:
    """A task as prompt and responses, and where it is gold the ranking of its first annotation. Raises FieldError."""
    data = task["data"]
    pair = next((names for names in PAIR_FIELDS if data.get(names[0]) and data.get(names[1])), None)
    if isinstance(listed := data.get("items"), list) and all(isinstance(entry, Mapping) for entry in listed):
        texts = {str(entry.get("id")): entry.get("body") or entry.get("title") for entry in listed}
    else:
        texts = {name: data[name] for name in pair or ()}
    prompt = next((data[name] for name in PROMPT_FIELDS if data.get(name) and name not in texts), None)
    if prompt is None:
        raise FieldError("data", f"none of {', '.join(PROMPT_FIELDS)} is there; rename the prompt's field.")
    if not texts:
        return {"prompt": prompt}
    names, item = list(texts), {"prompt": prompt, "responses": [*texts.values()]}
    rankings = (_levels(result, names) for result in _results(task)) if gold else iter(())
    if levels := next((levels for levels in rankings if levels is not None), None):
        item["ranking"] = [[names.index(name) for name in level] for level in levels]
    return item


def task_of(item: Row, slots: Sequence[Row]) -> Row:
    """An item with the judgements of it, as Label Studio imports a task with annotations."""
    names = [f"response_{i + 1}" for i in range(len(item["answers"]))]
    texts = [answer["content"] for answer in item["answers"]]
    entries = [{"id": name, "title": "", "body": text} for name, text in zip(names, texts, strict=True)]
    annotations = []
    for slot in slots:
        buckets = {str(place): [names[i] for i in level] for place, level in enumerate(slot["ranking"], 1)}
        result = {"from_name": "rank", "to_name": "answers", "type": "ranker", "value": {"ranker": buckets}}
        annotations.append({"result": [{"id": slot["id"], **result}], "lead_time": slot["seconds"]})
    return {"data": {"prompt": item["prompt"], "items": entries}, "annotations": annotations}


def _results(task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What annotations say, then what models predicted; those that were cancelled say nothing."""
    judgements = [*(task.get("annotations") or []), *(task.get("predictions") or [])]
    kept = [entry for entry in judgements if isinstance(entry, Mapping) and not entry.get("was_cancelled")]
    return [result for entry in kept for result in entry.get("result") or [] if isinstance(result, Mapping)]


def _levels(result: Mapping[str, Any], names: Sequence[str]) -> list[list[str]] | None:
    """Names of answers, best first, ties together; None where a result ranks not exactly these."""
    value = result.get("value")
    if not isinstance(value, Mapping):
        return None
    if len(names) == 2 and value.get("selected") in ("left", "right"):
        return [[name] for name in (names if value["selected"] == "left" else reversed(names))]
    ranker = value.get("ranker")
    if not isinstance(ranker, Mapping) or not all(isinstance(bucket, list) for bucket in ranker.values()):
        return None
    buckets = {name: bucket for name, bucket in ranker.items() if name != REST}
    if all(name.isdecimal() for name in buckets):
        levels = [buckets[name] for name in sorted(buckets, key=int) if buckets[name]]
    elif len(buckets) == 1:
        levels = [[name] for bucket in buckets.values() for name in bucket]  # a list that was sorted
    else:
        return None  # buckets of kinds, which are in no order
    ranked = [name for level in levels for name in level]
    return levels if sorted(map(str, ranked)) == sorted(names) else None
