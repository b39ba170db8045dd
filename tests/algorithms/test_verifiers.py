"""Each verifier against answers that are right, wrong, and written in another way."""

import json

import pytest

from penstock.algorithms.reward_functions import RewardFunction
from penstock.algorithms.verifiers import value_of
from tests.algorithms.test_reward_functions import sample, scores


def score(address, response, ids=(), **fields):
    """One response's score."""
    text = sample(0, response, **fields)
    object.__setattr__(text, "response_ids", list(ids))
    return scores(RewardFunction.load(address), text)[0]


@pytest.mark.parametrize(("response", "answer", "expected"), [
    ("Paris", "Paris", 1.0), (" Paris\n", "Paris", 1.0), ("paris", "Paris", 0.0), ("Paris.", "Paris", 0.0),
    ("<think>Rome?</think>\nParis", "Paris", 1.0), ("<answer>Rome</answer><answer> Paris </answer>!", "Paris", 1.0),
    ("42", 42, 1.0), ("4", ["four", 4], 1.0), ("five", ["four", 4], 0.0), ("true", True, 1.0),
])  # fmt: skip
def test_exact_match(response, answer, expected):
    assert score("exact_match", response, answer=answer) == expected


@pytest.mark.parametrize(("text", "value"), [
    ("The answer is 42.", 42), ("#### 1,234", 1234), ("3 - 4 = -1", -1), ("5-3", 3), ("f(2)-3", 3), ("-$5.50", -5.5),
    ("it costs $18", 18), (".5", 0.5), ("3/4", 0.75), ("1e3 m", 1000), ("x = \N{MINUS SIGN}7", -7), ("1, 2, 3", 3),
    ("#### 72 apples, of 80", 72), ("#### Step 2\nso it is 6", 6), (r"\boxed{7}, not 9", 7), ("50%", 50),
    ("1,000.50", 1000.5), ("H2O", None), ("none", None), ("1/0", None), ("9" * 5000, None), ("", None),
])  # fmt: skip
def test_the_number_that_a_text_ends_in(text, value):
    assert value_of(text) == value


@pytest.mark.parametrize(("response", "answer", "expected"), [
    ("So she has 9 + 9 = 18.", "She sold 16 - 3 = 13 eggs. #### 18", 1.0), ("It is 18.0", 18, 1.0),
    ("I do not know", "#### 18", 0.0), ("It is 19", "#### 18", 0.0), ("18", "no number", None),
    ("<think>It is 18.</think> It is 19.", 18, 0.0),
])  # fmt: skip
def test_number(response, answer, expected):
    assert score("number", response, answer=answer) == expected


@pytest.mark.parametrize(("response", "answer", "expected"), [
    (r"Thus \boxed{\frac{1}{2}}.", "0.5", 1.0), (r"\boxed{2}", r"\frac{1}{2}", 0.0), ("The answer is 42", 42, 1.0),
    (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", 1.0), (r"\boxed{x^2 + 2x}", "(x+1)^2", 0.0), (r"\boxed{3}", r"$3$", 1.0),
    (r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1.0), (r"\boxed{4}, from 3 + 1", "4", 1.0), ("I do not know", "4", 0.0),
    (r"<think>\boxed{4}</think> \boxed{5}", "4", 0.0), (r"\boxed{4}", "", None),
])  # fmt: skip
def test_math(response, answer, expected):
    pytest.importorskip("math_verify")
    assert score("math", response, answer=answer) == expected


@pytest.mark.parametrize(("address", "response", "fields", "expected"), [
    (r"regex:yes|no", "well, yes", {}, 1.0), (r"regex:^yes", "well, yes", {}, 0.0), ("regex:a.b", "a\nb", {}, 1.0),
    ("regex", "blue", {"pattern": "^b"}, 1.0), ("regex", "red", {"pattern": "^b"}, 0.0),
    ("regex:r", "red", {"pattern": "^b"}, 1.0),  # the address wins over the field
    ("format", "<think>a\nb</think>\n<answer>4</answer>", {}, 1.0), ("format", "<answer>4</answer>", {}, 0.0),
    ("format", "<think>a<think>b</think><answer>4</answer>", {}, 0.0),
    ("format", "<think>a</think><answer>4</answer> and <answer>5</answer>", {}, 0.0),
    (r"format:\d+", "42", {}, 1.0), (r"format:\d+", "42 or so", {}, 0.0),
])  # fmt: skip
def test_patterns(address, response, fields, expected):
    assert score(address, response, **fields) == expected


SCHEMA = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}


@pytest.mark.parametrize(("response", "expected"), [
    ('{"name": "Ada"}', 1.0), ('{"name": 3}', 0.0), ("{}", 0.0), ("name: Ada", 0.0), ('{"name": "Ada"', 0.0),
    ('Sure:\n```json\n{"name": "Ada"}\n```\nDone.', 1.0), ('<think>{}</think>{"name": "Ada"}', 1.0), ("", 0.0),
])  # fmt: skip
def test_json_schema(tmp_path, response, expected):
    pytest.importorskip("jsonschema")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    assert score(f"json_schema:{tmp_path / 'schema.json'}", response) == expected
    assert score("json_schema", response, schema=SCHEMA) == expected
    assert score("json_schema", response, schema=json.dumps(SCHEMA)) == expected


@pytest.mark.parametrize(("length", "count", "expected"), [
    ("20", 0, 1.0), ("20", 20, 1.0), ("20", 30, 0.5), ("20", 40, 0.0), ("20", 90, 0.0),
    ("10-20", 10, 1.0), ("10-20", 5, 0.75), ("10-20", 0, 0.5), ("20-20", 10, 0.5),
])  # fmt: skip
def test_length(length, count, expected):
    assert score(f"length:{length}", "x", ids=range(count)) == pytest.approx(expected)
    assert score("length", "x", ids=range(count), length=length) == pytest.approx(expected)


def test_a_length_of_a_record_may_be_a_number_or_a_pair():
    assert score("length", "x", ids=range(30), length=20) == score("length", "x", ids=range(0), length=[10, 20]) == 0.5
