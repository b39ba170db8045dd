"""Rewards, and advantages without a critic: an answer's reward against those of others to its prompt, or of the batch.

Pure functions. B = answers, those of one prompt side by side in groups of G; R = response tokens.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from penstock.algorithms import functional as fn
from penstock.algorithms.config import GRPOFlags
from penstock.algorithms.experience import Experience, used_scores

EPS = 1e-4
"""Added to a group's standard deviation, as TRL does."""


def over_group_std(rewards: Tensor) -> Tensor:
    """(r - mean) / (std + eps), unbiased std (Shao et al. 2024, "DeepSeekMath", section 4.1.2)."""
    return less_group_mean(rewards) / (rewards.std(dim=1, keepdim=True) + EPS)


def less_group_mean(rewards: Tensor) -> Tensor:
    """r - mean: the standard deviation would weigh easy and hard prompts more (Liu et al. 2025, "Dr. GRPO")."""
    return rewards - rewards.mean(dim=1, keepdim=True)


def less_mean_of_others(rewards: Tensor) -> Tensor:
    """r - mean of the group's other answers: unbiased (Kool et al. 2019; Ahmadian et al. 2024, "Back to Basics")."""
    size = rewards.shape[1]
    return rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / (size - 1)


def unchanged(rewards: Tensor) -> Tensor:
    """r: REINFORCE++ has the whole batch for a baseline (Hu et al. 2025)."""
    return rewards


BASELINES: dict[str, Callable[[Tensor], Tensor]] = {
    "grpo": over_group_std,
    "dr_grpo": less_group_mean,
    "rloo": less_mean_of_others,
    "reinforce++": unchanged,
    "reinforce++_baseline": less_group_mean,
}
"""Of rewards [B / G, G], by the name of --advantage."""
PER_TOKEN = ("reinforce++", "reinforce++_baseline")
"""Where KL is taken off the rewards token by token, and advantages are whitened over the batch (Hu et al. 2025, eq. 5
to 7); elsewhere an answer's KL is taken off its one reward."""


def advantages(name: str, rewards: Tensor, penalties: Tensor, mask: Tensor, group: int) -> Tensor:
    """Advantages [B, R] fp32, zero in the padding.

    rewards: [B]; penalties: [B, R], KL times its weight at each token, zeros where KL is not in the reward; mask:
    [B, R] bool; group: G.
    """
    penalties = fn.clean(penalties.float(), mask)
    if name not in PER_TOKEN:
        rewards = rewards.float() - penalties.sum(dim=1)
        penalties = torch.zeros_like(penalties)
    baselined = BASELINES[name](rewards.float().view(-1, group)).view(-1, 1)
    to_come = penalties.flip(1).cumsum(1).flip(1)  # of a token and all after it
    per_token = fn.clean(baselined - to_come, mask)
    return fn.whiten(per_token, mask) if name in PER_TOKEN else per_token


def spread_of_groups(scores: Tensor, group: int) -> Tensor:
    """Which groups have scores that differ by more than rounding, [B / G] bool."""
    return torch.tensor([fn.has_spread(row) for row in scores.view(-1, group)], dtype=torch.bool)


def overlong_penalty(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """What answers [B] of these lengths lose: 0 up to limit - buffer, then in a line to 1 at the limit (Yu et al. 2025,
    "DAPO", eq. 13). buffer 0: nothing."""
    if not buffer:
        return torch.zeros_like(lengths, dtype=torch.float32)
    return ((lengths - (limit - buffer)) / buffer).clamp(0.0, 1.0)


def used_rewards(experience: Experience, flags: GRPOFlags) -> Tensor:
    """What is compared, [B]: clipped scores, with what answers lose that are too long."""
    if flags.overlong_buffer:
        flags = dataclasses.replace(flags, missing_eos_penalty=None)
    lost = overlong_penalty(experience.lengths, flags.max_new_tokens, flags.overlong_buffer)
    return used_scores(experience, flags) - lost


def informative(experience: Experience, flags: GRPOFlags) -> Tensor:
    """Which groups teach something, [B / G] bool: their rewards differ. reinforce++ compares all with all."""
    group = len(experience.tokens) if flags.advantage == "reinforce++" else flags.group_size
    return spread_of_groups(used_rewards(experience, flags), group)
