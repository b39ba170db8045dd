"""Losses of pairs of answers: DPO and its kin, a table of pure functions; and what a batch of rankings makes of them.

An answer's value is its log-ratio log p(y|x) - log p_ref(y|x), or log p(y|x) where a loss has no reference: summed over
the answer's tokens, or divided by their number. Names and formulas are TRL's (DPOTrainer, experimental CPOTrainer
and ORPOTrainer); see docs/align.md for the two differences.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.algorithms.config import DPOFlags
from penstock.algorithms.reward import Ranking
from penstock.errors import UserError
from penstock.memory.stream import Losses

PairLoss = Callable[[Tensor, Tensor, DPOFlags], Tensor]
"""Values [P] of the chosen and of the rejected answers, fp32 -> losses [P]."""


class Loss(NamedTuple):
    """A row of the table."""

    of: PairLoss
    reference: bool
    """Whether values are log-ratios to a reference."""
    averages: bool = False
    """Whether values are always per token."""
    smooths: bool = False
    """Whether --label-smoothing means something to it."""


def sigmoid(chosen: Tensor, rejected: Tensor, flags: DPOFlags) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7); with label smoothing cDPO (Mitchell 2023, eq. 3); without a reference CPO's
    preference term (Xu et al. 2024, eq. 3)."""
    return _smoothed(flags.beta * (chosen - rejected), flags.label_smoothing)


def robust(chosen: Tensor, rejected: Tensor, flags: DPOFlags) -> Tensor:
    """Unbiased where a share of the labels is flipped (Chowdhury et al. 2024, eq. 12)."""
    gaps, flipped = flags.beta * (chosen - rejected), flags.label_smoothing
    clean, wrong = -F.logsigmoid(gaps), -F.logsigmoid(-gaps)
    return ((1 - flipped) * clean - flipped * wrong) / (1 - 2 * flipped)


def ipo(chosen: Tensor, rejected: Tensor, flags: DPOFlags) -> Tensor:
    """The gap per token is drawn to 1 / (2 tau) and no further (Azar et al. 2023, eq. 17)."""
    return (chosen - rejected - 1 / (2 * flags.beta)).square()


def hinge(chosen: Tensor, rejected: Tensor, flags: DPOFlags) -> Tensor:
    """SLiC's calibration on log-ratios (Zhao et al. 2023, eq. 3; Liu et al. 2024, RSO, eq. 10)."""
    return F.relu(1 - flags.beta * (chosen - rejected))


def simpo(chosen: Tensor, rejected: Tensor, flags: DPOFlags) -> Tensor:
    """Mean log-probabilities with a margin, no reference (Meng et al. 2024, eq. 6)."""
    assert flags.simpo_gamma is not None
    return _smoothed(flags.beta * (chosen - rejected) - flags.simpo_gamma, flags.label_smoothing)


def orpo(chosen: Tensor, rejected: Tensor, flags: DPOFlags) -> Tensor:
    """beta times -log sigmoid of the log odds ratio (Hong et al. 2024, eq. 7); the likelihood is --sft-coef's."""
    odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    return -flags.beta * F.logsigmoid(odds)


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(sigmoid, reference=True, smooths=True),
    "robust": Loss(robust, reference=True, smooths=True),
    "ipo": Loss(ipo, reference=True, averages=True),
    "hinge": Loss(hinge, reference=True),
    "simpo": Loss(simpo, reference=False, averages=True, smooths=True),
    "orpo": Loss(orpo, reference=False, averages=True),
    "cpo": Loss(sigmoid, reference=False, smooths=True),
}


def check_loss(flags: DPOFlags, reference: Sequence[str]) -> None:
    """Raises UserError for flags that the loss would not read; `reference`: those that were given for a reference."""
    loss, name = LOSSES[flags.loss], flags.loss
    if not loss.reference and reference:
        without = ", ".join(name for name, row in LOSSES.items() if not row.reference)
        raise UserError(f"{reference[0]}: --loss {name} has no reference ({without} have none); leave it out.")
    if flags.label_smoothing and not loss.smooths:
        names = ", ".join(name for name, row in LOSSES.items() if row.smooths)
        raise UserError(f"--label-smoothing: --loss {name} has none; {names} have.")
    if flags.length_normalize and loss.averages:
        raise UserError(f"--length-normalize: --loss {name} always divides by tokens; leave the flag out.")
    if flags.simpo_gamma is not None and name != "simpo":
        raise UserError(f"--simpo-gamma: --loss {name} has no margin; it is simpo's.")


def _smoothed(gaps: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * F.logsigmoid(gaps) - smoothing * F.logsigmoid(-gaps)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0 (Maechler 2012); a probability of 1 counts as 1 - 1e-6, whose odds are finite."""
    x = x.clamp(max=-1e-6)
    near = x > -0.6931
    # both branches are finite for every x, so that the one not taken sends no NaN backward
    return torch.where(near, (-torch.expm1(x.where(near, x.new_tensor(-0.5)))).log(), torch.log1p(-x.exp()))


# --- a batch of rankings --------------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """Of a whole batch, all ranks: what its loss is divided by. See [Note: loss over the global count] in ppo.py."""

    prompts: int
    best_tokens: int
    """Tokens of the best answers, which --sft-coef is about."""


def counts_of(rankings: Sequence[Ranking]) -> Counts:
    return Counts(len(rankings), sum(n for ranking in rankings for n in best_lengths(ranking)))


def best_lengths(ranking: Ranking) -> list[int]:
    """Tokens of each answer of a ranking's best rank, 0 for the others."""
    best = min(ranking.ranks)
    return [n if rank == best else 0 for n, rank in zip(ranking.response_lengths, ranking.ranks, strict=True)]


def preference_loss(logprobs: Tensor, rankings: Sequence[Ranking], flags: DPOFlags, counts: Counts) -> Losses:
    """A micro-batch's part of the loss: mean over a prompt's pairs, then over the batch's prompts; and --sft-coef times
    the token mean of -log p over the batch's best answers.

    logprobs: [B] fp32, of each answer, its tokens' summed. Statistics are sums over pairs, under TRL's names: rewards
    are beta times the summed log-ratio, or beta times the value where there is no reference.
    """
    row, device = LOSSES[flags.loss], logprobs.device
    of_answers = lambda values: torch.tensor(values, dtype=logprobs.dtype, device=device)  # noqa: E731
    lengths = of_answers([n for ranking in rankings for n in ranking.response_lengths])
    averages = row.averages or flags.length_normalize
    shown = ratios = logprobs
    if row.reference:
        ratios = logprobs - of_answers([value for ranking in rankings for value in ranking.ref_logprobs])
    elif averages:
        shown = logprobs / lengths
    values = ratios / lengths if averages else ratios
    chosen, rejected, weights = pairs_of(rankings, device)
    loss = (row.of(values[chosen], values[rejected], flags) * weights).sum() / counts.prompts
    rewards = flags.beta * (ratios if row.reference else values).detach()
    better, worse = rewards[chosen], rewards[rejected]
    shown = shown.detach()
    stats = {
        "pairs": weights.new_tensor(len(chosen)),
        "rewards/chosen": better.sum(),
        "rewards/rejected": worse.sum(),
        "rewards/accuracies": (better > worse).float().sum(),
        "rewards/margins": (better - worse).sum(),
        "logps/chosen": shown[chosen].sum(),
        "logps/rejected": shown[rejected].sum(),
    }
    if flags.sft_coef:
        best = of_answers([float(n > 0) for ranking in rankings for n in best_lengths(ranking)])
        nll = -(logprobs * best).sum() / counts.best_tokens
        loss, stats["nll_loss"] = loss + flags.sft_coef * nll, nll.detach()
    return loss, stats


def pairs_of(rankings: Sequence[Ranking], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the chosen and of the rejected answer of each pair, [P] int64; 1 / (pairs of its prompt), [P] fp32."""
    chosen: list[int] = []
    rejected: list[int] = []
    weights: list[float] = []
    start = 0
    for ranking in rankings:
        pairs = ranking.pairs
        chosen += [start + i for i, _ in pairs]
        rejected += [start + j for _, j in pairs]
        weights += [1 / len(pairs)] * len(pairs)
        start += len(ranking.rows)
    index: Any = {"dtype": torch.int64, "device": device}
    return torch.tensor(chosen, **index), torch.tensor(rejected, **index), torch.tensor(weights, device=device)


def summary(sums: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a batch: statistics are means over its pairs."""
    pairs = max(sums.get("pairs", 0.0), 1.0)
    return {
        name: value if name in ("loss", "nll_loss") else value / pairs
        for name, value in sums.items()
        if name != "pairs"
    }


DISPLACED = 10.0
"""Nats that chosen answers lose on average before it is a warning."""
SATURATED = 20.0
"""Margin of rewards at which the logistic loss has no gradient left (e^-20)."""


def health(metrics: Mapping[str, float], flags: DPOFlags) -> list[str]:
    """What is wrong at this step, one line each: "name: text"."""
    if "rewards/margins" not in metrics:
        return ["ties: all answers of this step are alike or score alike, and nothing is learned from them"]
    chosen, rejected = metrics["rewards/chosen"] / flags.beta, metrics["rewards/rejected"] / flags.beta
    lines = []
    if (cut := metrics.get("val/missing_eos_rate", 0.0)) > 0.3:  # as in PPO
        lines.append(
            f"missing EOS: {cut:.0%} of the answers did not end within --max-new-tokens {flags.max_new_tokens}; give "
            "more tokens, or a model that ends its answers"
        )
    if LOSSES[flags.loss].reference and chosen < -DISPLACED and rejected < -DISPLACED:
        # Razin et al. 2024, "Unintentional Unalignment": probability goes to answers that are in no comparison
        lines.append(
            f"likelihood displacement: chosen answers lost {-chosen:.0f} nats against the reference, rejected ones "
            f"{-rejected:.0f}: their probability went to answers nobody compared; lower --lr, raise --beta, or give "
            "--sft-coef 1"
        )
    logistic = LOSSES[flags.loss].smooths and not flags.length_normalize  # in the units of the metrics
    if logistic and metrics["rewards/margins"] > SATURATED:
        lines.append(
            f"margins: {metrics['rewards/margins']:.0f} on average: these pairs teach nothing more; fewer steps, a "
            "lower --lr or a lower --beta"
        )
    return lines
