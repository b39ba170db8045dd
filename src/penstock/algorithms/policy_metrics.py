"""A step of PPO or GRPO as numbers, in the names that dashboards know, over valid tokens of the whole batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.algorithms import functional as fn
from penstock.algorithms.experience import Experience, importance, used_scores
from penstock.config import RolloutFlags
from penstock.memory.strategy import StepStats


def summary(
    experience: Experience,
    sums: Sequence[tuple[str, StepStats]],
    beta: float,
    flags: RolloutFlags,
    *,
    has_kl: bool = True,
) -> dict[str, float]:
    """Metrics of the experience, and of the updates in `sums`, ("policy" or "value", statistics) each.

    has_kl: False without a reference; then nothing that KL is in is a metric.
    """
    policy = [stats for name, stats in sums if name == "policy"]
    value = [stats.sums for name, stats in sums if name == "value"]
    metrics = _of_experience(experience, beta, flags)
    if not has_kl:
        metrics = {name: value for name, value in metrics.items() if name not in OF_KL}
    if policy:
        metrics |= _of_policy([stats.sums for stats in policy])
        metrics |= {
            f"policy/{name}": sum(stats.metrics[name] for stats in policy) / len(policy) for name in policy[0].metrics
        }
    if value:
        metrics["val/clipfrac_avg"] = _total(value, "clipfrac") / _total(value, "tokens")
        metrics["loss/value_avg"] = _total(value, "loss") / len(value)
    return metrics


OF_KL = ("objective/kl", "objective/kl_k3", "objective/non_score_reward", "objective/kl_coef")


def of_heldout(experience: Experience, *, has_kl: bool, own: bool = False) -> dict[str, float]:
    """Metrics of an evaluation. An answer that did not end counts for no more than the worst that did, on any scale
    (7); with `own` it keeps its score (`keeps_own_scores`)."""
    scores, ended, rows = experience.scores, experience.ended, len(experience.tokens)
    if not own and ended.any():  # the worst may be good where few end: what is cut is not raised to it
        scores = torch.minimum(scores, fn.below_ended(scores, ended, 0.0))
    metrics = {
        "heldout/scores": float(scores.mean()),
        "heldout/scores_stderr": float(scores.std()) / rows**0.5 if rows > 1 else 0.0,
        "heldout/response_length": float(experience.lengths.float().mean()),
        "heldout/missing_eos_rate": 1.0 - float(experience.ended.float().mean()),
    }
    if has_kl:
        metrics["heldout/kl"] = _per_answer(fn.kl_k1(experience.logprobs, experience.ref_logprobs), experience)
    return metrics


def _of_experience(experience: Experience, beta: float, flags: RolloutFlags) -> dict[str, float]:
    mask, rows = experience.mask, len(experience.tokens)
    logprobs, ref_logprobs = experience.logprobs, experience.ref_logprobs
    kl = _per_answer(fn.kl_k1(logprobs, ref_logprobs), experience)
    used, gap = used_scores(experience, flags), (experience.sampling_logprobs - logprobs).abs()
    metrics = {
        "objective/kl": kl,
        "objective/kl_k3": _per_answer(fn.kl_k3(logprobs, ref_logprobs), experience),
        "objective/entropy": _per_answer(-logprobs, experience),
        "objective/scores": float(experience.scores.mean()),
        "objective/scores_std": float(experience.scores.std()) if rows > 1 else 0.0,
        "objective/used_scores": float(used.mean()),
        "objective/used_scores_std": float(used.std()) if rows > 1 else 0.0,
        "objective/non_score_reward": -beta * kl,
        "objective/rlhf_reward": float(used.mean()) - beta * kl,
        "objective/kl_coef": beta,
        "objective/response_length": float(experience.lengths.float().mean()),
        "val/num_eos_tokens": float(experience.ended.sum()),
        "val/missing_eos_rate": 1.0 - float(experience.ended.float().mean()),
        "val/explained_variance": float(fn.explained_variance(experience.values, experience.returns, mask)),
        "val/engine_logprob_gap": float(fn.clean(gap, mask).max()),
    }
    if flags.rollout_dtype is not None:
        metrics |= _of_sampling(gap[mask], importance(experience, flags)[mask])
    if flags.reward_clip is not None:
        clipped = experience.scaled_scores.abs() > flags.reward_clip
        metrics["objective/scores_clipfrac"] = float(clipped.float().mean())
    return metrics


def _of_sampling(gap: Tensor, weights: Tensor) -> dict[str, float]:
    """How far a copy that answers is from the actor, under TRL's names; gap and weights [N], of valid tokens."""
    measured = {
        "sampling_logp_difference": {"mean": gap.mean(), "max": gap.max()},
        "importance_sampling_ratio": {"min": weights.min(), "mean": weights.mean(), "max": weights.max()},
    }
    return {f"sampling/{name}/{key}": float(x) for name, values in measured.items() for key, x in values.items()}


def _per_answer(x: Tensor, experience: Experience) -> float:
    """The sum of x [B, R] over an answer's tokens, mean over answers."""
    return float(fn.clean(x, experience.mask).sum()) / len(experience.tokens)


def _of_policy(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    tokens = _total(updates, "tokens")
    ratio = _total(updates, "ratio") / tokens
    metrics = {
        "policy/approxkl_avg": _total(updates, "approxkl") / tokens,
        "policy/clipfrac_avg": _total(updates, "clipfrac") / tokens,
        "policy/entropy_avg": _total(updates, "entropy") / tokens,
        "loss/policy_avg": _total(updates, "policy") / len(updates),
        "val/ratio": ratio,
        "val/ratio_var": max(_total(updates, "ratio_sq") / tokens - ratio**2, 0.0),
        "val/first_ratio_gap": updates[0]["max_ratio_gap"],
        "policy/updates": float(len(updates)),
    }
    if "kl_loss" in updates[0]:
        metrics["loss/kl_avg"] = _total(updates, "kl_loss") / len(updates)
    if "ptx" in updates[0]:
        metrics["loss/ptx_avg"] = _total(updates, "ptx") / len(updates)
    return metrics


def _total(updates: Sequence[dict[str, float]], name: str) -> float:
    return sum(sums[name] for sums in updates)
