"""Simulated labellers: they rank a few answers to each question by gold plus noise, and write comparisons.

What gold is, a world says (`toyland`, `filmland`); a model that learns from the comparisons never sees it.
"""

import random
from collections.abc import Sequence
from typing import Any


def comparisons(
    prompts: Sequence[Any], answers: Sequence[Sequence[tuple[str, bool]]], golds: Sequence[Sequence[float]],
    noise: float, rng: random.Random,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rankings of the answers to each prompt, as lines of the data format.

    prompts: as a line's `prompt` field holds them; answers: per prompt several (text, ended by itself); golds: theirs;
    noise: standard deviation of a judgement, in units of gold. An answer that occurs twice is judged once, a tie with
    itself; a prompt with an empty answer is left out, for nobody can judge that.
    """
    rows = []
    for prompt, several, scores in zip(prompts, answers, golds, strict=True):
        score_of = {text: score for (text, _), score in zip(several, scores, strict=True)}
        if "" in score_of:
            continue
        rank_of = dict(zip(score_of, ranks(list(score_of.values()), noise, rng), strict=True))
        texts = [text for text, _ in several]
        row = {"prompt": prompt, "responses": texts, "ranking": ranking([rank_of[text] for text in texts])}
        if not all(ended for _, ended in several):  # a cut answer has no end to learn from
            row["finish_reason"] = ["stop" if ended else "length" for _, ended in several]
        rows.append(row)
    return rows


def ranks(scores: Sequence[float], noise: float, rng: random.Random) -> list[int]:
    """A labeller's ranks, 0 the best: each answer judged by its score plus N(0, noise); exact ties stay ties."""
    judged = [score + rng.gauss(0.0, noise) for score in scores]
    levels = sorted(set(judged), reverse=True)
    return [levels.index(value) for value in judged]


def ranking(labels: Sequence[int]) -> list[list[int]]:
    """Ranks as the data format's `ranking`: indices from best to worst, ties nested."""
    return [[i for i, rank in enumerate(labels) if rank == level] for level in sorted(set(labels))]
