"""What a reward function is given, what it may give back, and that one that fails, hangs or dies is named."""

import asyncio
import os
from pathlib import Path

import pytest

from penstock.algorithms.reward_functions import Failure, RewardFunction, Sample, Workers
from penstock.errors import UserError

RUNNER = asyncio.Runner()
CHAT = ({"role": "user", "content": "2 + 2?"},)


def sample(i=0, response="four", messages=None, **fields):
    return Sample(f"data.jsonl:{i + 1}", f"prompt {i}", response, messages, [1, i], [2, i], "stop", fields)


def load(tmp_path: Path, text: str, name: str = "score", file: str = "fn.py") -> RewardFunction:
    (tmp_path / file).write_text(text)
    return RewardFunction.load(f"{tmp_path / file}:{name}")


def scores(function: RewardFunction, *samples: Sample, step: int = 0):
    return function.scores(samples, step, RUNNER)


# --- what it is given -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("signature", "read", "given"),
    [
        ("prompts, responses", "[prompts, responses]", [["prompt 0", "prompt 1"], ["four", "four"]]),
        ("asked, answered, **_", "[asked, answered]", [["prompt 0", "prompt 1"], ["four", "four"]]),
        ("asked, answered, answer", "[answered, answer]", [["four", "four"], ["4", 5]]),
        ("responses", "responses", ["four", "four"]),
        ("*texts", "list(texts)", [["prompt 0", "prompt 1"], ["four", "four"]]),
        ("**all", "sorted(all)", ["answer", "completion_ids", "completions", "finish_reason", "level", "messages",
                                  "prompt_ids", "prompts", "response_ids", "responses", "step"]),
        ("prompts, responses, *, answer, level=None, **_", "[answer, level]", [["4", 5], ["easy", None]]),
        ("prompts, responses, kind='none', **_", "kind", "none"),
        ("prompt_ids, response_ids, responses", "[prompt_ids, response_ids]", [[[1, 0], [1, 1]], [[2, 0], [2, 1]]]),
        ("prompts, responses, finish_reason, step", "[finish_reason, step]", [["stop", "stop"], 7]),
        ("completions, completion_ids, **kwargs", "[completions, completion_ids]",
         [["four", "four"], [[2, 0], [2, 1]]]),
    ],
)  # fmt: skip
def test_a_function_is_given_what_it_has_parameters_for(tmp_path, signature, read, given):
    text = f"SEEN = []\ndef score({signature}):\n    SEEN.append({read})\n    return [1, 2]\n"
    function = load(tmp_path, text)
    assert scores(function, sample(0, answer="4", level="easy"), sample(1, answer=5), step=7) == [1.0, 2.0]
    assert function.function.__globals__["SEEN"] == [given]


def test_a_function_of_trl_reads_conversations_as_turns_and_plain_prompts_as_text(tmp_path):
    body = "SEEN.append([prompts, completions])\n    return [0, 0]\n"
    text = f"SEEN = []\ndef score(prompts, completions, **kwargs):\n    {body}"
    function = load(tmp_path, text)
    scores(function, sample(0, messages=CHAT), sample(1))
    assert function.function.__globals__["SEEN"] == [
        [[CHAT, "prompt 1"], [[{"role": "assistant", "content": "four"}], "four"]]
    ]


def test_conversations_reach_ours_as_text_with_the_turns_beside_it(tmp_path):
    function = load(tmp_path, "def score(prompts, responses, messages):\n    assert prompts == ['prompt 0']\n"
                              "    return [len(m) if m else None for m in messages]\n")  # fmt: skip
    assert scores(function, sample(0, messages=CHAT)) == [1.0]
    assert scores(function, sample(0)) == [None]


def test_a_field_named_like_what_is_given_does_not_replace_it(tmp_path):
    function = load(tmp_path, "def score(prompts, responses, step):\n    return [step]\n")
    assert scores(function, sample(0, step="first", responses=["a", "b"]), step=3) == [3.0]


@pytest.mark.parametrize(
    ("signature", "fields", "reads"),
    [
        ("prompts, responses, *, answer, level=None, **_", {"answer": True, "level": False}, {"answer", "level"}),
        ("prompts, responses, **kwargs", {}, {"answer", "level", "mood"}),
        ("prompts, responses, **_", {}, set()),
        ("completions, solution", {"solution": True}, {"solution"}),
    ],
)
def test_the_fields_that_it_reads_are_known_from_its_signature(tmp_path, signature, fields, reads):
    function = load(tmp_path, f"def score({signature}):\n    return []\n")
    assert function.fields == fields
    assert {name for name in ("answer", "level", "mood", "solution") if function.reads(name)} >= reads
    assert function.reads("mood") == ("mood" in reads)


def test_async_functions_keep_one_event_loop(tmp_path):
    text = (
        "import asyncio\nLOOPS = []\nasync def score(prompts, responses, **_):\n"
        "    LOOPS.append(asyncio.get_running_loop())\n"
        "    await asyncio.gather(*(asyncio.sleep(0) for _ in prompts))\n    return [1.0] * len(prompts)\n"
    )
    function = load(tmp_path, text)
    assert scores(function, sample()) == scores(function, sample()) == [1.0]
    first, second = function.function.__globals__["LOOPS"]
    assert first is second


# --- what it gives back -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("values", ["[1, None]", "(1.0, None)", "iter([True, None])", "torch.tensor([1.0])"])
def test_scores_are_numbers_or_none(tmp_path, values):
    count = 1 if "torch" in values else 2
    function = load(tmp_path, f"import torch\ndef score(prompts, responses):\n    return {values}\n")
    assert scores(function, *[sample(i) for i in range(count)]) == [1.0, None][:count]


@pytest.mark.parametrize(
    ("values", "index", "problem"),
    [
        ("[1.0]", None, "gave 1 scores for 3 responses"),
        ("[1.0, 2.0, float('nan')]", 2, "gave nan; scores must be finite"),
        ("[1.0, float('inf'), 0.0]", 1, "gave inf"),
        ("None", 0, "raised TypeError: gave a NoneType and no list of scores"),
        ("0.5", 0, "gave a float and no list"),
        ("['good'] * 3", 0, "could not convert string to float: 'good'"),
        ("[1 / (p != 'prompt 1') for p in prompts]", 1, r"raised ZeroDivisionError: .* \(.*fn.py:2\)"),
        ("[1.0] * 3 if len(prompts) < 3 else 1 / 0", None, "raised ZeroDivisionError"),
    ],
)
def test_what_is_no_score_is_a_failure_of_the_sample_that_shows_it(tmp_path, values, index, problem):
    function = load(tmp_path, f"def score(prompts, responses):\n    return {values}\n")
    with pytest.raises(Failure, match=problem) as failure:
        scores(function, *[sample(i) for i in range(3)])
    assert failure.value.index == index


@pytest.mark.parametrize(("address", "why"), [
    ("accuracy", "no such file; give file.py:name, .* or one of exact_match, number, math"),
    ("number:4", "takes no parameter; it reads the records' field answer"), ("regex:(", "pattern '\\(' is refused"),
    ("length:none", "length 'none' is refused"), ("json_schema:gone.json", "schema 'gone.json' is refused"),
    ("length:", "length '' is refused"),
])  # fmt: skip
def test_addresses_that_name_nothing_are_refused(address, why):
    with pytest.raises(UserError, match=why):
        RewardFunction.load(address)


def test_a_package_that_is_missing_is_named_with_its_installation(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs math_verify; pip install 'penstock\[verify\]' brings it"):
        RewardFunction.load("math")


@pytest.mark.parametrize(("address", "name"), [
    ("number", "number"), ("regex:a:b", "regex"), ("{}:score", "score"),
])  # fmt: skip
def test_metrics_have_the_name_of_the_function(tmp_path, address, name):
    load(tmp_path, "def score(prompts, responses):\n    return []\n")
    assert RewardFunction.load(address.format(tmp_path / "fn.py")).name == name


# --- processes --------------------------------------------------------------------------------------------------------
@pytest.fixture
def workers(tmp_path):
    """workers(text, count, timeout): processes with the function `score` of this text; they end with the test."""
    started = []

    def start(text, count=1, timeout=None):
        (tmp_path / "fn.py").write_text(text)
        started.append(Workers([f"{tmp_path / 'fn.py'}:score"], count, timeout))
        return started[-1]

    yield start
    for pool in started:
        pool.close()


BY_FIELD = "import os\ndef score(prompts, responses, *, x, **_):\n    return [{} for v in x]\n"


@pytest.mark.parametrize(("count", "samples"), [(1, 5), (2, 5), (3, 2)])
def test_scores_come_back_in_order_whatever_the_number_of_processes(workers, count, samples):
    pool = workers(BY_FIELD.format("v * 10"), count)
    for _ in range(2):
        assert pool.scores(0, [sample(i, x=i) for i in range(samples)], 0) == [10.0 * i for i in range(samples)]
    processes = workers(BY_FIELD.format("os.getpid()"), count).scores(0, [sample(i, x=i) for i in range(samples)], 0)
    assert len(set(processes)) == min(count, samples)
    assert os.getpid() not in processes
    has_torch = BY_FIELD.format("'torch' in __import__('sys').modules")
    assert workers(has_torch).scores(0, [sample(x=0)], 0) == [0.0]  # a process is there at once, and small


def test_what_a_function_draws_in_a_process_depends_on_the_step_and_the_samples_alone(workers):
    text = "import random\ndef score(prompts, responses):\n    return [random.random() for _ in prompts]\n"
    first, second = (workers(text, 2) for _ in range(2))
    samples = [sample(i) for i in range(4)]
    drawn = first.scores(0, samples, 1)
    assert second.scores(0, samples, 1) == first.scores(0, samples, 1) == drawn
    assert first.scores(0, samples, 2) != drawn


@pytest.mark.parametrize(
    ("values", "index", "problem"),
    [
        ("__import__('time').sleep(600)", None, "gave no scores within 0.5 seconds"),
        ("os._exit(3)", None, r"its process died \(exit code 3\)"),
        ("os.kill(os.getpid(), 9)", None, r"its process died \(exit code -9\)"),
        ("1 / (v != 3)", 3, "raised ZeroDivisionError"),
        ("float('nan') if v == 2 else 0.0", 2, "gave nan"),
    ],
)
def test_a_function_that_hangs_dies_or_fails_in_a_process_is_a_failure(workers, values, index, problem):
    pool = workers(BY_FIELD.format(values), 2, timeout=0.5 if "sleep" in values else None)
    with pytest.raises(Failure, match=problem) as failure:
        pool.scores(0, [sample(i, x=i) for i in range(4)], 0)
    assert failure.value.index == index
    assert all(process.returncode is not None for process in pool.processes)  # nothing is left behind


def test_async_functions_run_in_processes_too(workers):
    pool = workers("async def score(prompts, responses):\n    return [2.0 for _ in prompts]\n", 1, timeout=60)
    assert pool.scores(0, [sample()], 0) == [2.0]
