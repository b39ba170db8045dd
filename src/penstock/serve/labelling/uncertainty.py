"""Which items to ask about first, and which of their answers: those that the reward models cannot tell apart. Pure
arithmetic.

One reward model: the entropy of its choice (Bradley and Terry 1952), largest where margins are smallest. Several: what
they disagree on, and not what all find close: the mutual information of choice and model (Houlsby et al. 2011).
"""

import itertools
import math
from collections.abc import Sequence


def uncertainty(scores: Sequence[Sequence[float]]) -> float:
    """In nats, of an item: the mean over the pairs of its answers. scores: of each model, of each answer, unscaled."""
    pairs = list(itertools.combinations(range(len(scores[0])), 2))
    return math.fsum(_of_pair(scores, i, j) for i, j in pairs) / len(pairs)


def least_known(scores: Sequence[Sequence[float]], count: int) -> list[int]:
    """The answers of an item to ask about, `count` of them, in their order: the pair of the largest uncertainty, then
    one by one the answer that is the least certain beside those."""
    rest = list(range(len(scores[0])))
    kept = list(max(itertools.combinations(rest, 2), key=lambda pair: _of_pair(scores, *pair)))
    while len(kept) < count:
        others = [i for i in rest if i not in kept]
        kept.append(max(others, key=lambda i: math.fsum(_of_pair(scores, i, j) for j in kept)))
    return sorted(kept)


def _of_pair(scores: Sequence[Sequence[float]], i: int, j: int) -> float:
    margins = [row[i] - row[j] for row in scores]
    chances = [_sigmoid(margin) for margin in margins]
    together = _entropy(math.fsum(chances) / len(chances))
    if len(chances) == 1:
        return together
    return max(0.0, together - math.fsum(map(_entropy, chances)) / len(chances))


def _sigmoid(margin: float) -> float:
    small = math.exp(-abs(margin))
    return 1 / (1 + small) if margin >= 0 else small / (1 + small)


def _entropy(chance: float) -> float:
    return -math.fsum(share * math.log(share) for share in (chance, 1 - chance) if share > 0)
