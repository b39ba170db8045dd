"""The arithmetic of RLHF said again, slowly: one Python loop per sum, one float64 scalar per token.

Written from shared/PPO.md and the literature without looking at penstock.algorithms.functional, and never imported
by it. Loops touch valid tokens only, so whatever lies in the padding cannot reach a result here. The results are
differentiable, so that gradients can be compared too. Speed does not matter.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CLAMP = 20.0  # PPO.md 8 and 16: largest log-ratio that is ever exponentiated


def valid(lengths: Tensor) -> Iterator[tuple[int, int]]:
    """(row, column) of every valid token, row by row."""
    for row, length in enumerate(lengths.tolist()):
        for column in range(length):
            yield row, column


def chosen(mask: Tensor) -> Iterator[tuple[int, ...]]:
    """The index of every True in a mask of any shape, in row-major order."""
    for index in mask.nonzero().tolist():
        yield tuple(index)


def scalar(x: Tensor) -> Tensor:
    return x.double()


def total(terms: list[Tensor]) -> Tensor:
    result = torch.zeros((), dtype=torch.float64)
    for term in terms:
        result = result + term
    return result


def clamped(log_ratio: Tensor) -> Tensor:
    """min(max(x, -20), 20); a constant, without gradient, outside."""
    if abs(float(log_ratio)) > CLAMP:
        return torch.tensor(math.copysign(CLAMP, float(log_ratio)), dtype=torch.float64)
    return log_ratio


# --- layout -----------------------------------------------------------------------------------------------------
def mask_of(lengths: Tensor, width: int) -> Tensor:
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, column in valid(lengths):
        mask[row, column] = True
    return mask


def response_states(hidden: Tensor, prompt_lengths: Tensor, response_lengths: Tensor) -> Tensor:
    # prompt  p0 p1 p2 | response r0 r1      the state that predicts r0 is the one above p2, that of r1 the one above r0
    # hidden  h0 h1 h2             h3 h4     so h2 and h3 are taken; h4, above the last token, predicts nothing
    rows = [hidden[row, int(prompt_lengths[row]) + j - 1] for row, j in valid(response_lengths)]
    return torch.stack(rows) if rows else hidden.new_zeros(0, hidden.shape[-1])


def pack(x: Tensor, lengths: Tensor) -> Tensor:
    items = [x[row, column] for row, column in valid(lengths)]
    return torch.stack(items) if items else x.new_zeros(0)


def unpack(packed: Tensor, lengths: Tensor, width: int | None = None) -> Tensor:
    rows = [[torch.zeros((), dtype=packed.dtype)] * (width or int(lengths.max())) for _ in lengths]
    for n, (row, column) in enumerate(valid(lengths)):
        rows[row][column] = packed[n]
    return torch.stack([torch.stack(row) for row in rows])


# --- distributions ----------------------------------------------------------------------------------------------
def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    logprobs, entropies = [], []
    for n, target in enumerate(targets.tolist()):
        scaled = [scalar(logit) / temperature for logit in logits[n]]
        top = max(float(logit.detach()) for logit in scaled)
        log_normaliser = top + torch.log(total([torch.exp(logit - top) for logit in scaled]))
        logprobs.append(scaled[target] - log_normaliser)
        entropies.append(total([-torch.exp(x - log_normaliser) * (x - log_normaliser) for x in scaled]).detach())
    return torch.stack(logprobs), torch.stack(entropies)


def kl_k1(logp: Tensor, ref: Tensor) -> Tensor:
    return clamped(scalar(logp) - scalar(ref))


def kl_k2(logp: Tensor, ref: Tensor) -> Tensor:
    return kl_k1(logp, ref) ** 2 / 2


def kl_k3(logp: Tensor, ref: Tensor) -> Tensor:
    # Schulman 2020: (r - 1) - log r with r = ref / policy
    log_r = -kl_k1(logp, ref)
    return torch.exp(log_r) - 1 - log_r


# --- masked statistics ------------------------------------------------------------------------------------------
def masked_mean(x: Tensor, mask: Tensor, count: float | None = None) -> Tensor:
    terms = [scalar(x[index]) for index in chosen(mask)]
    return total(terms) / (len(terms) if count is None else count)


def mean_and_variance(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance; the variance of a single number is 0."""
    mean = total(values) / len(values)
    return mean, total([(value - mean) ** 2 for value in values]) / max(len(values) - 1, 1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    mean, variance = mean_and_variance([scalar(x[index]) for index in chosen(mask)])
    result = torch.zeros(x.shape, dtype=torch.float64)
    for index in chosen(mask):
        result[index] = (scalar(x[index]) - mean) / math.sqrt(float(variance) + eps)
        if not shift_mean:
            result[index] += mean
    return result


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    _, left = mean_and_variance([scalar(returns[i]) - scalar(values[i]) for i in chosen(mask)])
    _, whole = mean_and_variance([scalar(returns[i]) for i in chosen(mask)])
    return 0.0 if float(whole) == 0 else 1 - float(left) / float(whole)


# --- rewards and advantages -------------------------------------------------------------------------------------
def shape_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, lengths: Tensor, kl_coef: float) -> Tensor:
    rewards = torch.zeros(logprobs.shape, dtype=torch.float64)
    for row, column in valid(lengths):
        rewards[row, column] = -kl_coef * kl_k1(logprobs[row, column], ref_logprobs[row, column])
        if column == int(lengths[row]) - 1:
            rewards[row, column] += scalar(scores[row])
    return rewards


def replace_missing_eos(scores: Tensor, has_eos: Tensor, missing_eos_score: float | None) -> Tensor:
    result = []
    for score, ended in zip(scores, has_eos.tolist(), strict=True):
        keep = ended or missing_eos_score is None
        result.append(scalar(score) if keep else torch.tensor(missing_eos_score, dtype=torch.float64))
    return torch.stack(result)


def below_ended(scores: Tensor, has_eos: Tensor, margin: float | None) -> Tensor:
    if margin is None:
        return scores.double()
    ended = [float(score) for score, end in zip(scores, has_eos.tolist(), strict=True) if end]
    cut = min(ended, default=0.0) - margin
    rows = [float(score) if end else cut for score, end in zip(scores, has_eos.tolist(), strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Schulman et al. 2016, eq. 16, by its definition: A_t = sum over l of (gamma * lam)^l * delta_{t+l}."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    returns = torch.zeros(rewards.shape, dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()):
        r = [float(x) for x in rewards[row, :length]]
        v = [float(x) for x in values[row, :length]] + [0.0]  # nothing is worth anything after the last token
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            advantages[row, t] = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
            returns[row, t] = advantages[row, t] + v[t]
    return advantages, returns


# --- losses -----------------------------------------------------------------------------------------------------
def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2,
    count: float | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """PPO's clipped objective (Schulman et al. 2017, eq. 7), negated: the *worse* of the two, token by token."""
    terms, stats = [], {"approxkl": 0.0, "clipfrac": 0.0, "ratio": 0.0, "ratio_sq": 0.0, "max_ratio_gap": 0.0}
    for i in chosen(mask):
        log_ratio = clamped(scalar(logprobs[i]) - scalar(old_logprobs[i]).detach())
        ratio, advantage = torch.exp(log_ratio), float(advantages[i])
        near = ratio
        if float(ratio) > 1 + clip:
            near = torch.tensor(1 + clip, dtype=torch.float64)
        if float(ratio) < 1 - clip:
            near = torch.tensor(1 - clip, dtype=torch.float64)
        objective, near_objective = advantage * ratio, advantage * near
        clipped = float(near_objective) < float(objective)
        terms.append(-near_objective if clipped else -objective)
        stats["approxkl"] += 0.5 * float(log_ratio) ** 2
        stats["clipfrac"] += float(clipped)
        stats["ratio"] += float(ratio)
        stats["ratio_sq"] += float(ratio) ** 2
        stats["max_ratio_gap"] = max(stats["max_ratio_gap"], abs(float(ratio) - 1))
    return total(terms) / (len(terms) if count is None else count), stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None = 0.2,
    count: float | None = None,
) -> tuple[Tensor, float]:  # fmt: skip
    """Half the squared error, or that of the value kept within `clip` of the old one where that is larger.

    The second result is the number of tokens where the clipped one was larger.
    """
    terms, clipped = [], 0.0
    for i in chosen(mask):
        value, old, target = scalar(values[i]), float(old_values[i]), float(returns[i])
        error = (value - target) ** 2
        if clip is not None:
            near = value
            if float(value) > old + clip:
                near = torch.tensor(old + clip, dtype=torch.float64)
            if float(value) < old - clip:
                near = torch.tensor(old - clip, dtype=torch.float64)
            near_error = (near - target) ** 2
            if float(near_error) > float(error):
                error, clipped = near_error, clipped + 1
        terms.append(0.5 * error)
    return total(terms) / (len(terms) if count is None else count), clipped


def sft_loss(logprobs: Tensor, mask: Tensor, count: float) -> Tensor:
    return -total([scalar(logprobs[i]) for i in chosen(mask)]) / count


def pairwise_loss(scores: Tensor, ranks: Tensor, margin: float = 0.0) -> tuple[Tensor, int, int]:
    """InstructGPT eq. 1: mean over the pairs of one prompt that were ranked differently (rank 0 is best)."""
    losses, correct = [], 0
    for better in range(len(ranks)):
        for worse in range(len(ranks)):
            if int(ranks[better]) < int(ranks[worse]):
                gap = scalar(scores[better]) - scalar(scores[worse])
                losses.append(torch.logaddexp(torch.zeros((), dtype=torch.float64), margin - gap))
                correct += int(float(gap) > 0)
    if not losses:
        return total([scalar(score) * 0 for score in scores]), 0, 0
    return total(losses) / len(losses), correct, len(losses)


# --- schedules --------------------------------------------------------------------------------------------------
def adaptive_kl(beta: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """Ziegler et al. 2019, section 2.2."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * episodes / horizon)
