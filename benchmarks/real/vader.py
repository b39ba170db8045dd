"""The reward of the sentiment experiments, in any environment that has vaderSentiment: ours and every peer's.

VADER (Hutto and Gilbert 2014) is a lexicon with rules for negation and emphasis; nobody here wrote it. Its compound
score lies between -1 and +1.
"""

import functools
from collections.abc import Sequence
from typing import Any


@functools.cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def compound(prompts: Sequence[Any], responses: Sequence[str], **_: Any) -> list[float]:
    """A reward function of penstock: VADER's compound score of each response."""
    return [_analyzer().polarity_scores(text)["compound"] for text in responses]
