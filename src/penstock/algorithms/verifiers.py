"""Rewards that can be verified: by the record's own answer, a pattern, a schema, a length. No torch here.

Each is a reward function like a user's: lists in, a score from 0 to 1 per response out, None where the record has
nothing to verify by. `--reward-fn NAME` or `--reward-fn NAME:PARAMETER`; a parameter that is not given there is a field
of the records. What a response answers is its last <answer>...</answer>, else what follows its last </think>.
"""

import json
import re
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

Parameter = str | Sequence[Any]
"""The same for all samples, or a field of theirs."""
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
NUMBER = re.compile(
    r"(?<![\w.])(?:(?<!\))[-+])?\$?"  # a sign, but the minus of 5-3
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+/\d+|\d+(?:\.\d+)?(?:[eE][-+]?\d{1,3})?|\.\d+)",
    re.ASCII,
)
THINK_ANSWER = r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*"
"""DeepSeek-R1's format: each tag stands once."""


def exact_match(prompts: Any, responses: Sequence[str], *, answer: Sequence[Any], **_: Any) -> list[float]:
    """1 where what is answered is the record's `answer`, or one of several; blanks around it do not count."""
    accepted = [[_text(a).strip() for a in (right if isinstance(right, list) else [right])] for right in answer]
    return [float(final(text).strip() in texts) for text, texts in zip(responses, accepted, strict=True)]


def number(prompts: Any, responses: Sequence[str], *, answer: Sequence[Any], **_: Any) -> list[float | None]:
    """1 where the response's number equals that of the record's `answer`: the one behind "####" (GSM8K's form), else
    in the last box, else the last one. 1,000 is 1000.0, and 1/2 is 0.5. None where `answer` has no number."""
    pairs = [(value_of(final(text)), value_of(_text(right))) for text, right in zip(responses, answer, strict=True)]
    return [None if right is None else float(value == right) for value, right in pairs]


def math_equal(prompts: Any, responses: Sequence[str], *, answer: Sequence[Any], **_: Any) -> list[float | None]:
    r"""1 where the response's last expression, that in \boxed{} first, equals the record's `answer` as mathematics
    (math-verify). None where it makes nothing of `answer`."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # Its own time-outs are signals, which only the main thread gets.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    configs = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    def equal(text: str, right: str) -> float | None:
        marked = any(mark in right for mark in ("$", "\\boxed", "\\(", "\\["))
        right = right if marked else f"${right}$"
        gold, response = (parse(part, configs, parsing_timeout=seconds) for part in (right, final(text)))
        return float(verify(gold, response, timeout_seconds=seconds)) if gold else None

    return [equal(text, _text(right)) for text, right in zip(responses, answer, strict=True)]


def regex(prompts: Any, responses: Sequence[str], *, pattern: Parameter, **_: Any) -> list[float]:
    """1 where the pattern occurs in the response; . takes line ends too."""
    pairs = zip(responses, _each(pattern, len(responses)), strict=True)
    return [float(re.search(wanted, text, re.DOTALL) is not None) for text, wanted in pairs]


def has_format(prompts: Any, responses: Sequence[str], *, pattern: Parameter = THINK_ANSWER, **_: Any) -> list[float]:
    """1 where the whole response has this form. Default: <think>...</think><answer>...</answer>, each tag once."""
    pairs = zip(responses, _each(pattern, len(responses)), strict=True)
    return [float(re.fullmatch(wanted, text, re.DOTALL) is not None) for text, wanted in pairs]


def json_schema(prompts: Any, responses: Sequence[str], *, schema: Parameter, **_: Any) -> list[float]:
    """1 where what is answered, or its last fenced block, is JSON that fits the schema: a file, an object, its text."""
    from jsonschema.validators import validator_for
    from referencing import Registry

    validators: dict[str, Any] = {}

    def fits(text: str, wanted: Any) -> float:
        key = _text(wanted)
        if key not in validators:
            rules = json.loads(key if key.lstrip().startswith("{") else Path(key).read_text(encoding="utf-8"))
            validator_for(rules).check_schema(rules)
            validators[key] = validator_for(rules)(rules, registry=Registry())  # nothing is fetched
        text = final(text)
        try:
            return float(validators[key].is_valid(json.loads((FENCED.findall(text) or [text])[-1])))
        except (ValueError, RecursionError):
            return 0.0

    return [fits(text, wanted) for text, wanted in zip(responses, _each(schema, len(responses)), strict=True)]


def length_within(
    prompts: Any, responses: Sequence[str], *, length: Parameter, response_ids: Sequence[Sequence[int]], **_: Any
) -> list[float]:
    """1 where the response has so many tokens: at most 200 (`200`), from 100 to 200 (`100-200`); outside it falls in a
    line, to 0 where as many are missing or too many as are allowed."""
    bounds = [_bounds(wanted) for wanted in _each(length, len(responses))]
    pairs = [(len(ids), low, high) for ids, (low, high) in zip(response_ids, bounds, strict=True)]
    return [max(1.0 - max(low - count, count - high, 0) / high, 0.0) for count, low, high in pairs]


VERIFIERS: dict[str, Callable[..., list[Any]]] = {
    "exact_match": exact_match, "number": number, "math": math_equal, "regex": regex, "format": has_format,
    "json_schema": json_schema, "length": length_within,
}  # fmt: skip
NEEDS = {"math": "math_verify", "json_schema": "jsonschema"}
"""Packages of penstock[verify]."""


def final(text: str) -> str:
    """What a response answers, without its reasoning."""
    answers = ANSWER.findall(text)
    return answers[-1] if answers else text.rpartition("</think>")[2]


def value_of(text: str) -> Fraction | None:
    """The number that a text ends in; see `number`."""
    text = text.replace("\N{MINUS SIGN}", "-")
    behind = NUMBER.match(text.rpartition("####")[2].lstrip()) if "####" in text else None
    numbers = [behind[0]] if behind else NUMBER.findall((BOXED.findall(text) or [text])[-1])
    try:
        return Fraction(numbers[-1].replace(",", "").replace("$", "")) if numbers else None
    except (ValueError, ZeroDivisionError):  # too many digits, or 1/0
        return None


def _each(parameter: Parameter, count: int) -> Sequence[Any]:
    return [parameter] * count if isinstance(parameter, str) else parameter


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _bounds(wanted: Any) -> tuple[float, float]:
    """200, "200", "100-200" or [100, 200] as the least and the most tokens."""
    parts = wanted if isinstance(wanted, list) else _text(wanted).split("-")
    low, high = [0.0, *map(float, parts)][-2:]
    if len(parts) > 2 or not 0 <= low <= high or high == 0:
        raise ValueError(f"length {_text(wanted)}: give the most tokens, 200, or the least and the most, 100-200")
    return low, high
