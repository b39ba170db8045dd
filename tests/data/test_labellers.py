"""Simulated labellers: noise by its distribution, ties, and lines that the data format reads as they were meant."""

import json
import random

import pytest

from penstock.data import formats
from penstock.data.labellers import comparisons, ranking, ranks

ASKED = [{"role": "user", "content": "Which one?"}]


def test_labellers_are_noisy_and_their_ties_stay_ties():
    rng = random.Random(0)
    assert ranks([1.0, 3.0, 3.0, -1.0], 0.0, rng) == [1, 0, 0, 2]
    wrong = sum(ranks([0.0, 1.0], 1.0, rng) == [0, 1] for _ in range(4000)) / 4000
    assert wrong == pytest.approx(0.24, abs=0.03)  # P(N(0, 2) > 1)
    assert ranking([1, 0, 0, 2]) == [[1, 2], [0], [3]]


def test_comparisons_are_read_back_with_ranks_ties_and_cut_answers(tmp_path):
    answers = [
        [("a", True), ("b", False), ("a", True), ("c", True)],
        [("d", True), ("e", True), ("f", True), ("", True)],
    ]
    rows = comparisons([ASKED, ASKED], answers, [[1.0, 3.0, 1.0, 2.0], [0.0] * 4], 0.0, random.Random(0))
    path = tmp_path / "comparisons.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (record,) = formats.read(str(path), "comparisons").records  # nobody can judge an empty answer
    assert record.messages == tuple(ASKED)
    assert record.responses == ("a", "b", "a", "c")
    assert record.ranks == (2, 0, 2, 1)
    assert record.cut == (1,)


def test_with_noise_an_answer_that_occurs_twice_is_a_tie_with_itself():
    answers = [[("a", True), ("b", True), ("a", True), ("b", True)]] * 50
    rows = comparisons([ASKED] * 50, answers, [[0.0] * 4] * 50, 1.0, random.Random(0))
    assert {json.dumps(row["ranking"]) for row in rows} == {"[[0, 2], [1, 3]]", "[[1, 3], [0, 2]]"}
    assert all("finish_reason" not in row for row in rows)
