"""What goes wrong in PPO while every number is finite: one pure function, and a table of the checks that it makes.

A check reads the experience, the flags and the metrics of the last steps, and returns a line for people, empty where
all is well. Who says it, when it begins and when it ends, is `Session.health`. Thresholds name their source.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from penstock.algorithms import functional as fn
from penstock.algorithms.experience import Experience, keeps_own_scores, used_scores

Row = Mapping[str, float]
"""A step's metrics."""
KEPT = 20
"""Steps of metrics that the checks look back on, beside the run's first."""
WATCHED = (
    "objective/kl", "objective/scores", "objective/response_length", "objective/kl_coef", "policy/entropy_avg",
    "val/explained_variance", "heldout/scores", "heldout/scores_stderr",
)  # fmt: skip
"""The metrics that are looked back on."""


def health(experience: Experience, config: Any, history: Sequence[Row], row: Row) -> list[str]:
    """What is wrong at this step, one line each: "name: text". The part before the colon is the warning's identity.

    config: of PPO or GRPO; history: the steps before, from `remember`; row: this step's metrics.
    """
    texts = {name: check(experience, config, history, row) for name, check in CHECKS.items()}
    return [f"{name}: {text}" for name, text in texts.items() if text]


def remember(history: Sequence[Row], row: Row) -> list[Row]:
    """The history with this step in it: the run's first step and the last `KEPT`."""
    kept = [*history, {name: row[name] for name in WATCHED if name in row}]
    return kept if len(kept) <= KEPT + 1 else [kept[0], *kept[-KEPT:]]


def _missing_eos(experience: Experience, config: Any, history: Sequence[Row], row: Row) -> str:
    rate = 1.0 - float(experience.ended.float().mean())
    if rate <= 0.3 or keeps_own_scores(config.rollout):
        return ""
    return (
        f"{rate:.0%} of the answers did not end within --max-new-tokens {config.rollout.max_new_tokens}, so their "
        "scores are not the ones that are learned from; give more tokens, or a model that ends its answers"
    )


def _no_spread(experience: Experience, config: Any, history: Sequence[Row], row: Row) -> str:
    used = used_scores(experience, config.rollout)
    if fn.has_spread(used):
        return ""
    return (
        f"all {len(used)} answers have the used score {float(used[0]):.4g}: there is nothing to learn from but the KL "
        "penalty, and the policy's updates are skipped"
    )


def _same_scores(experience: Experience, config: Any, history: Sequence[Row], row: Row) -> str:
    """Of GRPO's groups."""
    rate = row.get("frac_reward_zero_std", 0.0)
    if rate <= 0.8:
        return ""
    return (
        f"in {rate:.0%} of the groups all answers score alike, and teach nothing; --dynamic-sampling draws others, or "
        "give harder or easier prompts, a larger --group-size or a higher --temperature"
    )


def _same_answers(experience: Experience, config: Any, history: Sequence[Row], row: Row) -> str:
    responses = [
        tuple(tokens[start : start + count].tolist())
        for tokens, start, count in zip(experience.tokens, experience.prompt_lengths, experience.lengths, strict=True)
    ]
    different = len(set(responses))
    if len(responses) < 16 or max(map(len, responses)) < 4 or different > len(responses) // 10:
        return ""
    return f"only {different} of {len(responses)} answers differ: the policy has collapsed; raise --kl-coef"


def _kl_jump(experience: Experience, config: Any, history: Sequence[Row], row: Row) -> str:
    before = max((past["objective/kl"] for past in history if "objective/kl" in past), default=None)
    kl = row.get("objective/kl")
    if before is None or kl is None or kl < before + 5 or kl < 2 * before:
        return ""
    return f"{kl:.1f} nats per answer after at most {before:.1f}: a step was too large; lower --lr or raise --kl-coef"


def _negative_kl(experience: Experience, config: Any, history: Sequence[Row], row: Row) -> str:
    kl = row.get("objective/kl", 0.0)
    if kl >= -1:  # TRL's threshold
        return ""
    return f"{kl:.1f} nats per answer: answers are not drawn from the policy that learns (top_k, top_p, temperature?)"


def _entropy_collapse(experience: Experience, config: Any, history: Sequence[Row], row: Row) -> str:
    first, entropy = next((past[ENTROPY] for past in history if ENTROPY in past), None), row.get(ENTROPY)
    if first is None or entropy is None or entropy > 0.2 * first:
        return ""
    return f"{entropy:.3g} nats per token, from {first:.3g}: answers are hardly sampled any more; raise --kl-coef"


ENTROPY = "policy/entropy_avg"


def _length_drift(experience: Experience, config: Any, history: Sequence[Row], row: Row) -> str:
    lengths = experience.lengths.float()
    first, now = (history[0] if history else row)["objective/response_length"], float(lengths.mean())
    if abs(now - first) < 4 or first / 2 < now < first * 2:
        return ""
    together = torch.stack([experience.scores.float(), lengths])
    varies = bool((together.std(dim=1) > 0).all())
    follows = float(torch.corrcoef(together)[0, 1]) if varies else 0.0
    # Singhal et al. 2023, "A Long Way to Go": much of what PPO gains is length
    why = f"; the score follows length (r = {follows:.2f})" if abs(follows) > 0.5 else ""
    return f"answers have {now:.0f} tokens on average, from {first:.0f}{why}"


def _over_optimisation(experience: Experience, config: Any, history: Sequence[Row], row: Row) -> str:
    """Gao et al. 2023: the proxy's score rises while the true score falls; here, that of prompts never trained on."""
    evaluated = [past for past in [*history, row] if "heldout/scores" in past]
    if len(evaluated) < 2:
        return ""
    best, last = max(evaluated[:-1], key=lambda past: past["heldout/scores"]), evaluated[-1]
    error = (best.get("heldout/scores_stderr", 0.0) ** 2 + last.get("heldout/scores_stderr", 0.0) ** 2) ** 0.5
    fell = best["heldout/scores"] - last["heldout/scores"]
    if fell <= 2 * error or last["objective/scores"] <= best["objective/scores"]:
        return ""
    return (
        f"the score of held-out prompts fell from {best['heldout/scores']:.3g} to {last['heldout/scores']:.3g} while "
        f"that of training prompts rose to {last['objective/scores']:.3g}; the best checkpoint is kept"
    )


def _clipping(experience: Experience, config: Any, history: Sequence[Row], row: Row) -> str:
    clipped = row.get("policy/clipfrac_avg", 0.0)
    if clipped <= 0.3:
        return ""
    return f"{clipped:.0%} of the ratios are clipped: updates are too large; lower --lr or --epochs"


def _critic(experience: Experience, config: Any, history: Sequence[Row], row: Row) -> str:
    explained = [past.get("val/explained_variance", 0.0) for past in [*history, row]][-KEPT // 2 :]
    if len(explained) < KEPT // 2 or max(explained) >= 0:
        return ""
    middle = statistics.median(explained)
    return f"for {len(explained)} steps it predicts worse than a constant ({middle:.2f} of the variance explained)"


def _position(experience: Experience, config: Any, history: Sequence[Row], row: Row) -> str:
    """The share of the advantages' variance that lies between token positions, where 8 answers or more reach."""
    mask, advantages = experience.mask, experience.advantages
    reached = mask.sum(0) >= 8
    if int(reached.sum()) < 4:
        return ""
    mask, advantages = mask[:, reached], advantages[:, reached].masked_fill(~mask[:, reached], 0.0)
    count, values = mask.sum(0), advantages[mask]
    between = float((count * (advantages.sum(0) / count - values.mean()).square()).sum())
    share = between / max(float((values - values.mean()).square().sum()), 1e-12)
    if share <= 0.8:
        return ""
    return f"{share:.0%} of the advantage is the position in the answer, and not what was answered"


def _first_ratio(experience: Experience, config: Any, history: Sequence[Row], row: Row) -> str:
    gap = row.get("val/first_ratio_gap", 0.0)
    if config.run.dtype != "fp32" or gap <= 1e-3:
        return ""
    return f"is off by {gap:.2g}; it should be 1"


def _engine_gap(experience: Experience, config: Any, history: Sequence[Row], row: Row) -> str:
    gap = row.get("val/engine_logprob_gap", 0.0)
    if gap <= (0.05 if config.run.dtype == "fp32" else 1.0) or config.rollout.rollout_dtype:  # whose gap is weighed
        return ""
    return f"the sampler's log-probability of a token is off by {gap:.2g} nats from the trainer's"


def _reward_clip(experience: Experience, config: Any, history: Sequence[Row], row: Row) -> str:
    clipped = row.get("objective/scores_clipfrac", 0.0)
    if clipped <= 0.3:
        return ""
    return f"{clipped:.0%} of the scores are cut by --reward-clip {config.rollout.reward_clip:g}"


def _kl_controller(experience: Experience, config: Any, history: Sequence[Row], row: Row) -> str:
    target, start = getattr(config.rollout, "kl_target", None), config.rollout.kl_coef
    beta = row.get("objective/kl_coef", 0.0)
    if target is None or start / 20 < beta < start * 20:
        return ""
    return f"the coefficient is {beta:.2g} after {start:g} and KL still not at --kl-target {target:g}"


CHECKS: dict[str, Callable[[Experience, Any, Sequence[Row], Row], str]] = {
    "missing EOS": _missing_eos,
    "no spread": _no_spread,
    "same scores": _same_scores,
    "same answers": _same_answers,
    "KL jump": _kl_jump,
    "negative KL": _negative_kl,
    "entropy collapse": _entropy_collapse,
    "length drift": _length_drift,
    "over-optimisation": _over_optimisation,
    "clipping": _clipping,
    "critic": _critic,
    "advantage": _position,
    "first ratio": _first_ratio,
    "sampler": _engine_gap,
    "reward clip": _reward_clip,
    "KL controller": _kl_controller,
}
