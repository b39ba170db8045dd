"""Advantages of groups and the losses on them, against loops that say it slowly, in fp64."""

import math
import statistics

import pytest
import torch

from penstock.algorithms import functional as fn
from penstock.algorithms.advantages import BASELINES, EPS, advantages, overlong_penalty

GROUP = 4
LENGTHS = [3, 1, 5, 2, 4, 4, 1, 5]
WIDTH = max(LENGTHS)


@pytest.fixture
def batch():
    """Rewards of two groups, KL penalties, and log-probs of ragged answers, with NaN in the padding."""
    draw = torch.Generator().manual_seed(3)
    lengths = torch.tensor(LENGTHS)
    mask = fn.mask_of(lengths, WIDTH)

    def ragged(scale):
        return (scale * torch.randn(len(LENGTHS), WIDTH, generator=draw)).masked_fill(~mask, math.nan)

    return {
        "rewards": torch.randn(len(LENGTHS), generator=draw), "penalties": ragged(0.1), "mask": mask,
        "lengths": lengths, "logprobs": ragged(1.0) - 2, "old": ragged(1.0) - 2,
    }  # fmt: skip


def slow_advantages(name, rewards, penalties):
    """Lists of advantages per answer, one number per token."""
    rewards = [float(r) for r in rewards]
    per_token = name.startswith("reinforce++")
    kl = [[float(penalties[i, t]) for t in range(n)] for i, n in enumerate(LENGTHS)]
    if not per_token:
        rewards = [r - sum(row) for r, row in zip(rewards, kl, strict=True)]
    answers = []
    for i, reward in enumerate(rewards):
        start = i // GROUP * GROUP
        group = rewards[start : start + GROUP]
        others = [r for j, r in enumerate(group) if start + j != i]
        value = {
            "grpo": (reward - statistics.mean(group)) / (statistics.stdev(group) + EPS),
            "dr_grpo": reward - statistics.mean(group),
            "rloo": reward - statistics.mean(others),
            "reinforce++": reward,
            "reinforce++_baseline": reward - statistics.mean(group),
        }[name]
        later = [sum(kl[i][t:]) if per_token else 0.0 for t in range(LENGTHS[i])]
        answers.append([value - cost for cost in later])
    if per_token:
        flat = [a for row in answers for a in row]
        mean, deviation = statistics.mean(flat), statistics.stdev(flat)
        answers = [[(a - mean) / deviation for a in row] for row in answers]
    return answers


@pytest.mark.parametrize("name", BASELINES)
def test_advantages_are_those_of_a_loop(name, batch):
    ours = advantages(name, batch["rewards"], batch["penalties"], batch["mask"], GROUP)
    assert not ours[~batch["mask"]].any()
    for row, wanted in zip(ours, slow_advantages(name, batch["rewards"], batch["penalties"]), strict=True):
        assert row[: len(wanted)].tolist() == pytest.approx(wanted, abs=2e-6)


def slow_loss(kind, how, batch, values, low=0.2, high=0.3, constant=7):
    """The loss in fp64 by a loop over answers and tokens, differentiable in batch["logprobs"]."""
    loss = torch.zeros((), dtype=torch.float64)
    logprobs, old = batch["logprobs"].double(), batch["old"].double()
    for i, n in enumerate(LENGTHS):
        mean = sum(logprobs[i, t] - old[i, t] for t in range(n)) / n
        for t in range(n):
            a = values[i][t]
            ratio = torch.exp(mean if kind == "gspo" else logprobs[i, t] - old[i, t])
            clipped = torch.clamp(ratio, 1 - low, 1 + high)
            term = -clipped.detach() * a * logprobs[i, t] if kind == "cispo" else -torch.min(ratio * a, clipped * a)
            weight = {"token": sum(LENGTHS), "sequence": len(LENGTHS) * n, "constant": len(LENGTHS) * constant}[how]
            loss = loss + term / weight
    return loss


@pytest.mark.parametrize("kind", ["clip", "gspo", "cispo"])
@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_losses_and_their_gradients_are_those_of_a_loop(kind, how, batch):
    values = advantages("grpo", batch["rewards"], torch.zeros(8, WIDTH), batch["mask"], GROUP)
    leaf = batch["logprobs"].clone().requires_grad_()
    weights = fn.token_weights(batch["lengths"], how, sum(LENGTHS), len(LENGTHS), 7)
    loss, stats = fn.policy_loss(leaf, batch["old"], values, batch["mask"], (0.2, 0.3), kind=kind, weights=weights)
    loss.backward()
    exact = batch["logprobs"].clone().requires_grad_()
    slow = slow_loss(kind, how, {**batch, "logprobs": exact}, values.double().tolist())
    slow.backward()
    assert float(loss.detach()) == pytest.approx(float(slow.detach()), abs=1e-6)
    assert torch.allclose(leaf.grad[batch["mask"]], exact.grad[batch["mask"]], atol=1e-6)
    assert not leaf.grad[~batch["mask"]].any()
    assert 0 < float(stats["clipfrac"]) < sum(LENGTHS)


def test_overlong_answers():
    lengths = torch.tensor([1, 6, 7, 8, 9, 10])
    assert overlong_penalty(lengths, 10, 4).tolist() == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1.0])
    assert not overlong_penalty(lengths, 10, 0).any()
