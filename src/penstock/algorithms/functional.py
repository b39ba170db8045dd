"""The arithmetic of SFT, reward modelling and PPO: pure functions on tensors, each with its source.

Nothing here knows a model, a file or a rank. Rows are ragged: every function takes lengths or a mask made from
lengths, never `token != pad` (PPO.md 1), and whatever lies in the padding, NaN included, reaches neither a value
nor a gradient. Shapes: B = rows, T = tokens, R = response tokens, N = valid response tokens of all rows, packed
row after row, V = vocabulary, D = width of a hidden state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.models.tiling import LEAST_SHARED

Count = Tensor | float | None
"""What a token mean divides by. Default: the valid tokens that it gets."""
LOG_RATIO_LIMIT = 20.0
"""exp(20) is 5e8: beyond it a ratio says only "broken", and it must not become inf (PPO.md 8, 16)."""


# --- rows and masks -------------------------------------------------------------------------------------------------


def mask_of(lengths: Tensor, width: int) -> Tensor:
    """Valid positions as [B, width] bool, from lengths [B] alone (PPO.md 1)."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def response_mask(prompt_lengths: Tensor, response_lengths: Tensor, width: int) -> Tensor:
    """Where the response tokens stand in whole rows: [B, width] bool."""
    return mask_of(prompt_lengths + response_lengths, width) & ~mask_of(prompt_lengths, width)


def computed(tokens: Tensor, valid: Tensor, reads: Tensor) -> Tensor:
    """The tokens whose states rows need of their own, [B, T] bool: all of `valid` [B, T] but a beginning that a row has
    in common with the row before it, whose states are the same; all where that is less than LEAST_SHARED. reads: [B],
    the first position that a row's own state is asked for.

        tokens     a b c d        a b c d
                   a b x y    ->  . . x y        what a row begins with and the next row too is computed once,
                   a b x z        . . . z        as in a tree; reads = 3 in all rows

    """
    if len(tokens) == 1:
        return valid
    equal = (tokens[1:] == tokens[:-1]) & valid[:-1]
    common = F.pad(equal.int().cumprod(dim=1).sum(dim=1).minimum(reads[1:]), (1, 0))
    if common.sum() < LEAST_SHARED * valid.sum():  # sync
        return valid
    return valid & ~mask_of(common, tokens.shape[1])


def states_before(hidden: Tensor, mask: Tensor, computed: Tensor | None = None) -> Tensor:
    """The states that predict the tokens under `mask`, packed: hidden [B, T, D], mask [B, T] -> [N, D]. Where rows lie
    end to end, hidden is [1, M, D]: the states of the M tokens under `computed` [B, T].

    This is the only shift in the project (PPO.md 2): SFT, actor, reference and critic all read from here.

        position     0    1    2    3    4    5
        token       p0   p1   p2   r0   r1   pad
        mask         .    .    .    x    x    .
        hidden      h0   h1   h2   h3   h4   h5
                              |    |
                              r0   r1              h2 predicts r0, h3 predicts r1: we return (h2, h3)

    Raises ValueError when a row's very first token is asked for: nothing precedes it.
    """
    if bool(mask[:, 0].any()):
        raise ValueError("a prompt needs at least one token (a BOS): the first token of a row has no state before it")
    flat = mask.flatten().nonzero()[:, 0]
    if len(hidden) < len(mask):
        assert computed is not None, "rows end to end are found by what is computed of them"
        flat = (computed.flatten().cumsum(0) - 1)[flat]
    return hidden.flatten(0, 1).index_select(0, flat - 1)


def response_states(
    hidden: Tensor, prompt_lengths: Tensor, response_lengths: Tensor, computed: Tensor | None = None
) -> Tensor:
    """The states before each response token, packed: hidden [B, T, D], or of rows end to end [1, M, D] -> [N, D]. See
    the picture in `states_before`."""
    width = hidden.shape[1] if computed is None else computed.shape[1]
    return states_before(hidden, response_mask(prompt_lengths, response_lengths, width), computed)


def last_states(hidden: Tensor, lengths: Tensor, computed: Tensor | None = None) -> Tensor:
    """The state at each row's last token: hidden [B, T, D] -> [B, D] (PPO.md 22). Where rows lie end to end, hidden is
    [1, N, D]: the states of the N tokens under `computed` [B, T]."""
    if len(hidden) < len(lengths):
        assert computed is not None, "rows end to end are found by what is computed of them"
        return hidden[0, computed.sum(dim=1).cumsum(0) - 1]
    return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


def pack(x: Tensor, lengths: Tensor) -> Tensor:
    """Valid entries of x [B, R], row after row: [N]."""
    return x[mask_of(lengths, x.shape[1])]


def unpack(packed: Tensor, lengths: Tensor, width: int | None = None) -> Tensor:
    """Inverse of `pack`: [N] -> [B, width], zero in the padding. Width defaults to the longest row."""
    mask = mask_of(lengths, int(lengths.max()) if width is None else width)
    return packed.new_zeros(mask.shape).masked_scatter(mask, packed)


def clean(x: Tensor, mask: Tensor) -> Tensor:
    """x with zeros in the padding; done before any arithmetic, so that 0 * NaN never happens in a backward."""
    return x.masked_fill(~mask, 0.0)


def masked_mean(x: Tensor, mask: Tensor, count: Count = None) -> Tensor:
    """Sum of x over valid positions / count. Give the *global* count when this is one part of a batch (PPO.md 15)."""
    return clean(x, mask).sum() / (mask.sum() if count is None else count)


# --- scores ---------------------------------------------------------------------------------------------------------


@dataclass
class Moments:
    """Mean and spread of all scores so far, whatever their batches (Chan et al. 1979), in fp64: equal on every rank."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of the squared distances from the mean."""
    first: list[float] = field(default_factory=list)
    """Mean and std after the first scores, which the scale of a critic is set by."""

    @property
    def std(self) -> float:
        """Unbiased; 0 while the scores differ by rounding alone."""
        std = math.sqrt(self.squares / max(self.count - 1, 1))
        return std if std > 1e-6 * abs(self.mean) else 0.0

    def add(self, scores: Tensor) -> None:
        """Takes more scores [B] in."""
        if not len(scores):
            return
        scores, total = scores.double(), self.count + len(scores)
        mean = float(scores.mean())
        between = (mean - self.mean) ** 2 * self.count * len(scores) / total
        self.squares += float((scores - mean).square().sum()) + between
        self.mean += (mean - self.mean) * len(scores) / total
        self.count = total

    def normalise(self, scores: Tensor) -> Tensor:
        """(scores - mean) / std in the dtype of scores; zeros where there is no spread to divide by."""
        std = self.std
        return ((scores.double() - self.mean) / std if std else scores * 0.0).to(scores.dtype)


def replace_missing_eos(scores: Tensor, has_eos: Tensor, missing_eos_score: float | None) -> Tensor:
    """Scores [B] where a response without EOS gets `missing_eos_score` *instead of* its score (PPO.md 7; N+ 4)."""
    if missing_eos_score is None:
        return scores
    return torch.where(has_eos, scores, torch.full_like(scores, missing_eos_score))


def below_ended(scores: Tensor, has_eos: Tensor, margin: float | None) -> Tensor:
    """Scores [B] where a response without EOS gets the worst of those with EOS minus `margin` instead of its own.

    So on no scale is it better not to end; where none ended, all get the same, and nothing is learned (PPO.md 7).
    """
    if margin is None:
        return scores
    worst = scores[has_eos].min() if bool(has_eos.any()) else scores.new_zeros(())
    return torch.where(has_eos, scores, worst - margin)


def has_spread(scores: Tensor) -> bool:
    """Whether scores [B] differ by more than rounding and than `whiten` divides by: without it only KL is left."""
    return bool((scores.max() - scores.min()) > 1e-5 * scores.abs().max().clamp(min=1.0))


# --- KL and rewards -------------------------------------------------------------------------------------------------


def log_ratio(logprobs: Tensor, base_logprobs: Tensor) -> Tensor:
    """logprobs - base_logprobs, clamped to +-20 (PPO.md 8)."""
    return (logprobs - base_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Unbiased, high-variance estimate of KL(actor || reference) on the actor's own samples (Schulman 2020)."""
    return log_ratio(logprobs, ref_logprobs)


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Biased, low-variance, never negative (Schulman 2020)."""
    return 0.5 * log_ratio(logprobs, ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Unbiased and never negative: r - 1 - log r with r = reference / actor (Schulman 2020)."""
    reverse = log_ratio(ref_logprobs, logprobs)
    return reverse.exp() - 1 - reverse


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, lengths: Tensor, kl_coef: float, estimator: str = "k1"
) -> Tensor:
    """Per-token rewards [B, R]: -kl_coef * KL's estimate at every token, plus the score once, at the last one.

    scores: [B]; logprobs, ref_logprobs: [B, R]; lengths: [B] response lengths. (PPO.md 7, 8; Ziegler et al. 2019, 2.1)
    """
    mask = mask_of(lengths, logprobs.shape[1])
    kl = KL_ESTIMATORS[estimator](clean(logprobs.float(), mask), clean(ref_logprobs.float(), mask))
    rewards = -kl_coef * kl
    rewards[torch.arange(len(scores), device=scores.device), lengths - 1] += scores.float()
    return rewards


@dataclass
class KLController:
    """The KL coefficient beta: fixed, or steered towards `target` nats per sequence (Ziegler et al. 2019, 2.2)."""

    beta: float
    target: float | None = None
    """None keeps beta fixed."""
    horizon: float = 10_000.0
    """Episodes over which a constant error of 1 multiplies beta by e."""

    def update(self, kl_per_sequence: float, episodes: int) -> None:
        """Moves beta after a batch of `episodes` whose mean KL was `kl_per_sequence` nats (PPO.md 9)."""
        if self.target is None:
            return
        error = min(max(kl_per_sequence / self.target - 1.0, -0.2), 0.2)
        self.beta *= 1.0 + error * episodes / self.horizon


# --- advantages -----------------------------------------------------------------------------------------------------


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) over ragged rows.

    rewards, values: [B, R] right-padded; lengths: [B]. Returns advantages, returns: [B, R] fp32, zero in the padding.
    The value after the last token is 0; returns are taken before any whitening (PPO.md 13).
    """
    mask = mask_of(lengths, rewards.shape[1])
    rewards, values = clean(rewards.float(), mask), clean(values.float(), mask)
    # Zeros in the padding make every row end in "next value 0, next advantage 0" by itself.
    next_values = F.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, clean(advantages + values, mask)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """x with unit variance (and zero mean if `shift_mean`) over the valid positions, zero in the padding.

    Once over the whole batch, across ranks and micro-batches; unbiased variance (PPO.md 14).
    """
    x = clean(x.float(), mask)
    count = mask.sum()
    mean = x.sum() / count
    variance = clean((x - mean).square(), mask).sum() / (count - 1).clamp(min=1)
    whitened = (x - mean) * torch.rsqrt(variance + eps)
    return clean(whitened if shift_mean else whitened + mean, mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - var(returns - values) / var(returns) over valid positions: 1 is perfect; 0 if returns are constant."""
    values, returns = values[mask].float(), returns[mask].float()
    variance = returns.var(unbiased=False)
    return torch.where(variance > 0, 1 - (returns - values).var(unbiased=False) / variance, torch.zeros_like(variance))


@dataclass
class ValueWarmUp:
    """Holds the actor until the critic explains returns: one lucky batch does not open it, and it ends (PPO.md 19)."""

    limit: int
    """Steps that it holds at most; 0: the actor was never held."""
    held: int = 0
    """Steps that it has held."""
    explained: float = 0.0
    """Moving average of the explained variance; a batch weighs 0.3."""
    over: bool = False

    def update(self, explained: float) -> str:
        """Takes in a batch's explained variance; returns what has changed, in words, or ""."""
        if self.over:
            return ""
        self.explained += 0.3 * (explained - self.explained)
        enough = self.explained > EXPLAINED
        self.over = enough or self.held >= self.limit
        if self.over:
            why = "" if enough else ", the most that it may be held"
            learns = f"after {self.held} steps{why}: the critic explains {self.explained:.0%} of the returns"
            return f"the actor learns from now on, {learns}" if self.held else ""
        self.held += 1
        if self.held > 1:
            return ""
        return (
            f"the actor is held until the critic explains {EXPLAINED:.0%} of the variance of returns, for at most "
            f"{self.limit} steps (--no-value-warmup does not hold it)"
        )


EXPLAINED = 0.1
"""The explained variance at which a new critic is better than none."""


# --- losses ---------------------------------------------------------------------------------------------------------


def clip_tokens(logprobs: Tensor, ratios: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """PPO's surrogate of each token (Schulman et al. 2017, eq. 7); low and high apart as in DAPO (Yu et al. 2025)."""
    unclipped = -advantages * ratios
    clipped = -advantages * ratios.clamp(1 - low, 1 + high)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def clip_weights(
    logprobs: Tensor, ratios: Tensor, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """REINFORCE with clipped importance weights: every token keeps a gradient (MiniMax 2025, "CISPO", eq. 4)."""
    weights = ratios.detach().clamp(1 - low, 1 + high)
    return -weights * advantages * logprobs, weights != ratios


def truncated_weights(logprobs: Tensor, sampling_logprobs: Tensor, cap: float) -> Tensor:
    """min(exp(logprobs - sampling_logprobs), cap) per token, detached: what an expectation under the policy of
    `logprobs` takes from tokens that another one sampled (Ionides 2008, truncated importance sampling; Yao et al. 2025,
    "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training")."""
    return log_ratio(logprobs, sampling_logprobs).detach().exp().clamp(max=cap)


def sequence_log_ratios(log_ratios: Tensor, mask: Tensor) -> Tensor:
    """Of an answer's tokens the mean log ratio, for each of them, [B, R] (Zheng et al. 2025, "GSPO", eq. 7)."""
    means = log_ratios.sum(dim=1) / mask.sum(dim=1)
    return means[:, None].expand_as(log_ratios)


def token_weights(lengths: Tensor, how: str, tokens: int, rows: int, constant: int) -> Tensor:
    """What a token of each answer weighs in the loss, [B, 1], from the *global* counts of tokens and rows.

    token: 1 / tokens (Yu et al. 2025); sequence: 1 / (rows * its answer's length) (Shao et al. 2024); constant: 1 /
    (rows * constant) (Liu et al. 2025).
    """
    per_row = {"token": lengths.new_full(lengths.shape, tokens), "sequence": rows * lengths}
    return 1.0 / per_row.get(how, lengths.new_full(lengths.shape, rows * constant))[:, None].float()


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float | tuple[float, float] = 0.2,
    count: Count = None,
    *,
    kind: str = "clip",
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """PPO's clipped surrogate, or another `kind` of --loss: a token mean over `count`, or a sum by `weights` [B, 1]
    (PPO.md 15, 16).

    All other inputs [B, R]; clip: of ratios below and above 1, or of both. Returns the loss and sums over valid tokens,
    detached: approxkl (k2 of old against new), clipfrac, ratio, ratio_sq; and max_ratio_gap = max|ratio - 1|.
    """
    logprobs, old_logprobs = clean(logprobs.float(), mask), clean(old_logprobs.float().detach(), mask)
    advantages = clean(advantages.detach(), mask)
    log_ratios = log_ratio(logprobs, old_logprobs)
    ratio = (sequence_log_ratios(log_ratios, mask) if kind == "gspo" else log_ratios).exp()
    surrogate = clip_weights if kind == "cispo" else clip_tokens
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    per_token, clipped = surrogate(logprobs, ratio, advantages, low, high)
    loss = masked_mean(per_token, mask, count) if weights is None else (clean(per_token, mask) * weights).sum()
    with torch.no_grad():
        stats = {
            "approxkl": clean(kl_k2(logprobs, old_logprobs), mask).sum(),
            "clipfrac": (clipped & mask).sum().float(),
            "ratio": clean(ratio, mask).sum(),
            "ratio_sq": clean(ratio.square(), mask).sum(),
            "max_ratio_gap": clean((ratio - 1).abs(), mask).max(),
        }
    return loss, stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None = 0.2, count: Count = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """0.5 * max(squared error, squared error of the value clipped around the old one), a token mean (PPO.md 16).

    All inputs [B, R]; `clip=None` is the plain squared error. Stats are sums over valid tokens: clipfrac.
    """
    values = clean(values.float(), mask)
    old_values, returns = clean(old_values.float().detach(), mask), clean(returns.float().detach(), mask)
    squared = (values - returns).square()
    if clip is None:
        return 0.5 * masked_mean(squared, mask, count), {"clipfrac": torch.zeros((), device=values.device)}
    near = torch.clamp(values, old_values - clip, old_values + clip)
    squared_clipped = (near - returns).square()
    loss = 0.5 * masked_mean(torch.maximum(squared, squared_clipped), mask, count)
    return loss, {"clipfrac": ((squared_clipped > squared) & mask).sum().float().detach()}


def sft_loss(logprobs: Tensor, count: Count = None) -> Tensor:
    """Negative log-likelihood of packed logprobs [N], a token mean over `count` (PPO.md 15, 24)."""
    return -logprobs.sum() / (max(len(logprobs), 1) if count is None else count)


def pairwise_loss(scores: Tensor, pairs: Sequence[tuple[int, int]], margin: float = 0.0) -> tuple[Tensor, int, int]:
    """The ranking loss of one prompt: scores [K], pairs of a better and a worse response (Ouyang et al. 2022, eq. 1;
    PPO.md 22).

    The mean over the pairs of -logsigmoid(better - worse - margin); ties are no pairs.
    Returns the loss, the number of pairs ordered as ranked, and the number of pairs.
    """
    if not pairs:
        return scores.float().sum() * 0.0, 0, 0
    better, worse = (torch.tensor(side, device=scores.device) for side in zip(*pairs, strict=True))
    gaps = scores.float()[better] - scores.float()[worse]
    return -F.logsigmoid(gaps - margin).mean(), int((gaps > 0).sum()), len(pairs)


def lr_sum(total: int, warmup_fraction: float, kind: str = "linear") -> float:
    """The factors of all updates together."""
    return sum(lr_schedule(step, total, warmup_fraction, kind) for step in range(total))


def lr_schedule(step: int, total: int, warmup_fraction: float, kind: str = "linear") -> float:
    """Factor of the learning rate at update `step` of `total`: linear warm-up, then as `kind` says (PPO.md 18).

    The first update already moves ((step + 1) / warmup) and the last one is the last above zero. wsd (warm-up, stable,
    decay) is constant until the last fifth (Hu et al. 2024, MiniCPM; Hagele et al. 2024 find 20 % enough).
    """
    warmup = math.ceil(total * warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    left = max(total - step, 0) / max(total - warmup, 1)
    if kind == "cosine":
        return 0.5 - 0.5 * math.cos(math.pi * left)
    if kind == "constant":
        return 1.0
    return min(left / 0.2, 1.0) if kind == "wsd" else left
