"""Losses of pairs against scalars in fp64, one pair at a time, written from the papers and TRL's trainers."""

import math
from typing import get_args

import pytest
import torch

from penstock.algorithms.config import DPOFlags
from penstock.algorithms.preference_losses import LOSSES, counts_of, health, preference_loss, summary
from penstock.algorithms.reward import Ranking

FLAGS = [
    DPOFlags(),
    DPOFlags(beta=0.3, label_smoothing=0.1),
    DPOFlags(length_normalize=True, beta=2.0),
    DPOFlags(sft_coef=0.7),
    DPOFlags(loss="robust", label_smoothing=0.2),
    DPOFlags(loss="ipo"),
    DPOFlags(loss="hinge", beta=0.5),
    DPOFlags(loss="hinge", length_normalize=True),
    DPOFlags(loss="simpo"),
    DPOFlags(loss="simpo", beta=2.5, simpo_gamma=0.3, label_smoothing=0.1, sft_coef=0.2),
    DPOFlags(loss="orpo", beta=0.5),
    DPOFlags(loss="cpo"),
    DPOFlags(loss="cpo", sft_coef=0.0, label_smoothing=0.05),
]


def name_of(flags):
    plain = vars(DPOFlags(loss=flags.loss))
    return " ".join([flags.loss, *(f"{key}={value}" for key, value in vars(flags).items() if value != plain[key])])


def random_rankings(seed):
    """Two to four answers each, ties among them, with log-probabilities under a policy and a reference."""
    rng = torch.Generator().manual_seed(seed)
    rankings, logprobs = [], []
    for prompt in range(4):
        count = 2 + prompt % 3
        lengths = torch.randint(1, 9, (count,), generator=rng).tolist()
        ranks = [0, 1, *torch.randint(0, 2, (count - 2,), generator=rng).tolist()]
        values = -torch.rand(2, count, generator=rng, dtype=torch.float64) * 3 * torch.tensor(lengths)
        rows = [[1, 3 + prompt, 3 + i, *range(n)] for i, n in enumerate(lengths)]
        rankings.append(Ranking(rows, tuple(ranks), tuple(lengths), tuple(values[1].tolist())))
        logprobs.append(values[0])
    return rankings, logprobs


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def pair(flags, chosen, rejected, n_chosen, n_rejected, ref_chosen, ref_rejected):
    """One pair's loss: sums of log-probabilities of two answers, their tokens, the reference's sums."""
    beta, eps = flags.beta, flags.label_smoothing
    if flags.loss in ("sigmoid", "robust", "ipo", "hinge"):
        chosen, rejected = chosen - ref_chosen, rejected - ref_rejected
    if flags.length_normalize or flags.loss in ("ipo", "simpo", "orpo"):
        chosen, rejected = chosen / n_chosen, rejected / n_rejected
    gap = chosen - rejected
    if flags.loss in ("sigmoid", "cpo"):
        return (1 - eps) * softplus(-beta * gap) + eps * softplus(beta * gap)
    if flags.loss == "robust":
        return ((1 - eps) * softplus(-beta * gap) - eps * softplus(beta * gap)) / (1 - 2 * eps)
    if flags.loss == "ipo":
        return (gap - 1 / (2 * beta)) ** 2
    if flags.loss == "hinge":
        return max(0.0, 1 - beta * gap)
    if flags.loss == "simpo":
        margin = beta * gap - flags.simpo_gamma
        return (1 - eps) * softplus(-margin) + eps * softplus(margin)
    p, q = math.exp(chosen), math.exp(rejected)
    return beta * softplus(-(math.log(p / (1 - p)) - math.log(q / (1 - q))))


def whole(flags, rankings, logprobs):
    """The loss of a batch, prompt by prompt and pair by pair."""
    total, nll, tokens = 0.0, 0.0, 0
    for ranking, values in zip(rankings, logprobs, strict=True):
        losses = []
        for i, better in enumerate(ranking.ranks):
            for j, worse in enumerate(ranking.ranks):
                if better < worse:
                    sides = float(values[i]), float(values[j]), *(ranking.response_lengths[k] for k in (i, j))
                    losses.append(pair(flags, *sides, *(ranking.ref_logprobs[k] for k in (i, j))))
        total += sum(losses) / len(losses) / len(rankings)
        for i, rank in enumerate(ranking.ranks):
            if rank == min(ranking.ranks):
                nll, tokens = nll - float(values[i]), tokens + ranking.response_lengths[i]
    return total + flags.sft_coef * nll / tokens


def test_every_loss_of_the_flag_is_in_the_table():
    named = DPOFlags.__dataclass_fields__["loss"].type
    assert set(get_args(named)) == set(LOSSES) == {flags.loss for flags in FLAGS}


@pytest.mark.parametrize("flags", FLAGS, ids=name_of)
@pytest.mark.parametrize("seed", range(3))
def test_a_batch_is_a_loop_over_prompts_and_pairs(flags, seed):
    rankings, logprobs = random_rankings(seed)
    loss, _ = preference_loss(torch.cat(logprobs), rankings, flags, counts_of(rankings))
    assert float(loss) == pytest.approx(whole(flags, rankings, logprobs), abs=1e-6)
    narrow, _ = preference_loss(torch.cat(logprobs).float(), rankings, flags, counts_of(rankings))
    assert float(narrow) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("flags", FLAGS, ids=name_of)
def test_parts_of_a_batch_add_up_to_it(flags):
    """Loss, statistics and gradients, divided by the whole batch's counts."""
    rankings, logprobs = random_rankings(5)
    together = torch.cat(logprobs).requires_grad_()
    loss, stats = preference_loss(together, rankings, flags, counts_of(rankings))
    loss.backward()
    parts = [values.clone().requires_grad_() for values in logprobs]
    sums = {"loss": 0.0, **dict.fromkeys(stats, 0.0)}
    for ranking, values in zip(rankings, parts, strict=True):
        part, own = preference_loss(values, [ranking], flags, counts_of(rankings))
        part.backward()
        sums = {name: sums[name] + float({"loss": part.detach(), **own}[name]) for name in sums}
    assert torch.allclose(together.grad, torch.cat([values.grad for values in parts]), atol=1e-9)
    assert sums == pytest.approx(
        {name: float(value) for name, value in {"loss": loss.detach(), **stats}.items()}, abs=1e-6
    )


@pytest.mark.parametrize("flags", FLAGS, ids=name_of)
def test_a_gradient_is_the_slope_of_the_slow_loss(flags):
    rankings, logprobs = random_rankings(7)
    values = torch.cat(logprobs).requires_grad_()
    preference_loss(values, rankings, flags, counts_of(rankings))[0].backward()
    step = 1e-6
    for index in range(len(values)):
        ends = []
        for sign in (1, -1):
            moved = values.detach().clone()
            moved[index] += sign * step
            ends.append(whole(flags, rankings, moved.split([len(r.rows) for r in rankings])))
        assert float(values.grad[index]) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-5)


def test_metrics_are_means_over_pairs_in_trls_units():
    ranking = Ranking([[1, 3, 2], [1, 4, 4, 2], [1, 5, 2]], (0, 1, 1), (2, 3, 2), (-4.0, -6.0, -5.0))
    logprobs = torch.tensor([-3.0, -9.0, -3.0])
    loss, stats = preference_loss(logprobs, [ranking], DPOFlags(beta=0.5, length_normalize=True), counts_of([ranking]))
    metrics = summary({"loss": float(loss), **{name: float(value) for name, value in stats.items()}})
    assert metrics["rewards/chosen"] == pytest.approx(0.5)  # of the sums, as TRL has it
    assert metrics["rewards/rejected"] == pytest.approx((0.5 * -3 + 0.5 * 2) / 2)
    assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"])
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["logps/chosen"] == -3.0
    assert metrics["logps/rejected"] == -6.0
    assert "nll_loss" not in metrics
    _, stats = preference_loss(logprobs, [ranking], DPOFlags(loss="simpo"), counts_of([ranking]))
    assert float(stats["rewards/chosen"]) / 2 == pytest.approx(2.0 * -3 / 2)  # mean log-probabilities
    assert float(stats["logps/rejected"]) == pytest.approx(-3 - 1.5)
    _, stats = preference_loss(logprobs, [ranking], DPOFlags(sft_coef=0.5), counts_of([ranking]))
    assert float(stats["nll_loss"]) == pytest.approx(1.5)


def test_a_certain_answer_has_finite_odds():
    ranking = Ranking([[1, 3, 2], [1, 4, 2]], (0, 1), (1, 1))
    logprobs = torch.tensor([0.0, -200.0], requires_grad=True)
    loss, _ = preference_loss(logprobs, [ranking], DPOFlags(loss="orpo"), counts_of([ranking]))
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(logprobs.grad).all())


def test_defaults_follow_the_loss():
    assert (DPOFlags().beta, DPOFlags().sft_coef, DPOFlags().simpo_gamma) == (0.1, 0.0, None)
    assert (DPOFlags(loss="simpo").beta, DPOFlags(loss="simpo").simpo_gamma) == (2.0, 1.0)
    assert DPOFlags(loss="orpo").sft_coef == DPOFlags(loss="cpo").sft_coef == 1.0
    assert DPOFlags(loss="cpo", sft_coef=0.0).sft_coef == 0.0


def test_what_goes_wrong_is_named():
    fine = {"rewards/chosen": 0.5, "rewards/rejected": -0.5, "rewards/margins": 1.0}
    assert health(fine, DPOFlags()) == []
    falling = {"rewards/chosen": -1.5, "rewards/rejected": -4.0, "rewards/margins": 2.5}
    (line,) = health(falling, DPOFlags())
    assert line.startswith("likelihood displacement: chosen answers lost 15 nats")
    assert health(falling, DPOFlags(loss="cpo")) == []  # it knows no reference
    assert health({**falling, "rewards/chosen": 0.1}, DPOFlags()) == []
    (line,) = health({"rewards/chosen": 15.0, "rewards/rejected": -15.0, "rewards/margins": 30.0}, DPOFlags())
    assert line.startswith("margins: 30")
    far = {"rewards/chosen": 15.0, "rewards/rejected": -15.0, "rewards/margins": 30.0}
    assert health(far, DPOFlags(loss="ipo")) == []  # its own target, times an answer's tokens
    (line,) = health({"objective/scores": 1.0}, DPOFlags())
    assert line.startswith("ties: ")
    (line,) = health({**fine, "val/missing_eos_rate": 0.5}, DPOFlags())
    assert line.startswith("missing EOS: 50%")
