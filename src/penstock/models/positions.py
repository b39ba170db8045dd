"""What follows from where tokens stand: rotary tables, ALiBi, windows. Computed once per call, handed to every block.

Shapes: B rows, T tokens, H query heads, E head_dim, S cache slots.

[Note: a token's angle is its own] Two types of rope scaling turn every token of a row by angles that depend on the
row's length: `dynamic` once it is longer than max_position_embeddings, `longrope` once it is longer than
original_max_position_embeddings. transformers takes the longest row of a batch for all, and a cache keeps what was
turned before. An answer that grows past the mark would be trained on log-probabilities that nobody sampled from, so
rows end there: that is the model's max_length (families/settings.py). Where longrope's two lists are equal, none is.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from penstock.distributed.world import exact_beside
from penstock.kernels import compile as compiler
from penstock.kernels import cpu_ops
from penstock.models.config import DecoderConfig


@dataclass(frozen=True)
class RaggedRows:
    """Rows end to end, without their padding and what they share: what would be [B, T, ...] is [1, N, ...]. See
    `ragged_rows`."""

    places: Tensor
    """[N] int64: where each token stands among the B * T of padded rows."""
    position_ids: Tensor
    """[N] int64: where it stands in its own row."""
    starts: Tensor
    """[B + 1] int32: where each row begins, and the end."""
    runs: tuple[tuple[int, int, int], ...]
    """(rows, tokens of each, keys that they see) of neighbours that are equally long."""
    keys: Tensor | None = None
    """[M] int64: where each row's keys lie among the N, row after row. None: rows share nothing, and have their own."""
    key_starts: Tensor | None = None
    """[B + 1] int32: where each row's keys begin in `keys`, and the end."""

    @property
    def readers(self) -> Tensor:
        """[N] int64: how many rows each token is part of."""
        return torch.ones_like(self.places) if self.keys is None else self.keys.bincount(minlength=len(self.places))


LEAST_PADDING = 1 / 8
"""Of a micro-batch; with less, rows stay padded. End to end, a block keeps what its attention mixed twice, and what the
plan counts, whole rows without any padding, must stay the most that is needed."""


def ragged_rows(valid: Tensor, computed: Tensor | None = None) -> RaggedRows | None:
    """The rows of which `valid` [B, T] bool marks the beginnings, and `computed` [B, T] bool what a row computes of its
    own (default: all of it): what is not is that of the row before, see algorithms.functional. None: they stay padded.
    """
    computed = valid if computed is None else computed
    lengths, seen = computed.sum(dim=1), valid.sum(dim=1)
    counts = [*zip(lengths.tolist(), seen.tolist(), strict=True)]  # sync
    total = sum(count for count, _ in counts)
    if valid.numel() - total < max(LEAST_PADDING * valid.numel(), 1):
        return None
    places = computed.flatten().nonzero()[:, 0]
    runs = tuple((len(list(equal)), *count) for count, equal in itertools.groupby(counts) if count[0])
    rows = RaggedRows(places, places % valid.shape[1], starts_of(lengths), runs)
    if total == sum(count for _, count in counts):
        return rows
    order = (computed.flatten().cumsum(0) - 1).view_as(computed)
    nearest = order.masked_fill(~computed, -1).cummax(dim=0).values  # in this row or one above
    return dataclasses.replace(rows, keys=nearest[valid], key_starts=starts_of(seen))


def starts_of(lengths: Tensor) -> Tensor:
    """[B] -> [B + 1] int32: where pieces of these lengths begin, and the end."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


@dataclass(frozen=True)
class Positions:
    """Where the tokens of a call stand and what each of them may see."""

    rotary: tuple[Tensor, Tensor] | None
    """cos, sin: [B or 1, 1, T, rotary_dim]."""
    bias: Tensor | None
    """Added to the attention scores, [B or 1, H or 1, T, S]; None: plain causal."""
    slots: Tensor | None
    """Decoding: the cache slot each row writes, [B] int64, the last one it sees. None: whole rows from slot 0."""
    seen: int = 0
    """Decoding: cache slots that any row sees."""
    window: int = 0
    slopes: Tensor | None = None
    """Without a bias, which `kernels.cpu_ops` and `kernels.capped_attention` do not need: the attention window, and
    ALiBi's slopes."""
    query_scale: Tensor | None = None
    """What queries are multiplied by, [B or 1, 1, T, 1]; None: nothing."""
    ragged: RaggedRows | None = None
    """The rows, where they lie end to end. The other fields are those of padded rows."""

    @property
    def of_tokens(self) -> "Positions":
        """With the angles and the query scale of every token of ragged rows, which each block looks up anew."""
        if self.ragged is None:
            return self
        where = self.ragged.position_ids
        rotary = None if self.rotary is None else (self.rotary[0][:, :, where], self.rotary[1][:, :, where])
        scale = None if self.query_scale is None else self.query_scale[:, :, where]
        return dataclasses.replace(self, rotary=rotary, query_scale=scale)


pytree.register_dataclass(Positions)  # so that a block can be exported with them


def positions_of(
    c: DecoderConfig, where: Tensor, seen: int, slots: Tensor | None, dtype: torch.dtype, in_c: bool
) -> dict[tuple[int, bool], Positions]:
    """Of tokens at `where` [B or 1, T], which see key positions 0 .. seen-1, by DecoderConfig.kinds. in_c: decoding by
    kernels.cpu_ops, which needs no bias."""
    scale = query_scale(c, where, seen, dtype)
    tables: dict[bool, tuple[Tensor, Tensor]] = {}
    positions = {}
    for window, rotates in dict.fromkeys(c.kinds):
        rotary = None
        if rotates:
            narrow = window > 0 and c.window_rope != ()
            rotary = tables[narrow] = tables.get(narrow) or rotary_tables(c, narrow, where, dtype)
        within = window if window < seen else 0
        if in_c:
            slopes = alibi_slopes(c.num_heads, where.device) if c.position == "alibi" else None
            positions[window, rotates] = Positions(rotary, None, slots, seen, within, slopes, scale)
        elif slots is None and c.attention_softcap:
            positions[window, rotates] = Positions(rotary, None, None, window=within, query_scale=scale)
        else:
            bias = attention_bias(c, window, where, seen, dtype, slots is not None)
            positions[window, rotates] = Positions(rotary, bias, slots, seen, query_scale=scale)
    return positions


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions in the half-split layout (Su et al. 2021, as Hugging Face stores weights): x [B, H, T, E]. x is
    not to be used any more: decoding turns it in place."""
    cos, sin = rotary
    if x.shape[2] == 1 and x.stride(3) == 1 and cpu_ops.ready(x.device, x.dtype):
        return cpu_ops.rotate(x, cos, sin)
    part, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = part.chunk(2, dim=-1)
    turned = part * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, still), dim=-1) if still.shape[-1] else turned


def attention_bias(
    config: DecoderConfig, window: int, where: Tensor, seen: int, dtype: torch.dtype, decoding: bool
) -> Tensor | None:
    """What attention adds to its scores, [B or 1, H or 1, T, S]: queries at `where` [B or 1, T], keys 0 .. seen-1.

    None where plain causal says it all: whole rows without ALiBi whose window, if any, they do not exceed.
    """
    narrow = 0 < window < seen
    if not (decoding or narrow or config.position == "alibi"):
        return None
    distance = where[:, None, :, None] - torch.arange(seen, device=where.device)  # [B or 1, 1, T, S]
    hidden = (distance < 0) | (distance >= window) if narrow else distance < 0
    bias = torch.zeros((), device=where.device)
    if config.position == "alibi":
        bias = -alibi_slopes(config.num_heads, where.device)[:, None, None] * distance
    return bias.masked_fill(hidden, -torch.inf).to(dtype)


def rotary_tables(config: DecoderConfig, narrow: bool, where: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, [B or 1, 1, T, rotary_dim], for positions `where` [B or 1, T]; narrow: of layers with a window,
    which turn by other angles."""
    scaling = dict(config.window_rope if narrow else config.rope_scaling)
    theta = scaling.pop("rope_theta", config.rope_theta)
    compute = rope_frequencies if compiler.real() else rope_frequencies.__wrapped__  # a dry run's tensors do not stay
    frequencies = compute(theta, config.rotary_dim, tuple(scaling.items()), where.device)
    angles = where[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos(), angles.sin()
    if (factor := attention_factor(scaling)) != 1:
        cos, sin = cos * factor, sin * factor
    return cos.to(dtype), sin.to(dtype)


@functools.lru_cache
def rope_frequencies(theta: float, width: int, scaling: tuple[tuple[str, Any], ...], device: torch.device) -> Tensor:
    """Inverse frequencies, [width / 2] fp32, with the scaling of one of these types:

    linear: all positions are divided (Chen et al. 2023). llama3: low frequencies are (Dubey et al. 2024).
    yarn: those below a ramp are (Peng et al. 2023, eq. 13 to 16). longrope: each has its divisor (Ding et al. 2024).
    dynamic: none up to max_position_embeddings, and rows are no longer.
    """
    exponent = torch.arange(0, width, 2, device=device).float() / width
    frequencies, numbers = 1.0 / theta**exponent, dict(scaling)
    kind = numbers.get("rope_type")
    if kind == "linear":
        return frequencies / numbers["factor"]
    if kind == "llama3":
        return _llama3(frequencies, numbers)
    if kind == "yarn":
        return _yarn(theta, exponent, numbers)
    if kind == "longrope":
        return 1.0 / (torch.tensor(numbers["short_factor"], device=device).float() * theta**exponent)
    return frequencies


def _llama3(frequencies: Tensor, numbers: Mapping[str, Any]) -> Tensor:
    old = numbers["original_max_position_embeddings"]
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    wavelength = 2 * math.pi / frequencies
    smooth = (old / wavelength - low) / (high - low)
    between = (1 - smooth) * frequencies / numbers["factor"] + smooth * frequencies
    scaled = torch.where(wavelength > old / low, frequencies / numbers["factor"], frequencies)
    return torch.where((wavelength <= old / low) & (wavelength >= old / high), between, scaled)


def _yarn(theta: float, exponent: Tensor, numbers: Mapping[str, Any]) -> Tensor:
    width, powers = 2 * len(exponent), theta**exponent

    def dimension(turns: float) -> float:
        """The pair of dimensions that turns so often within the original context."""
        return (
            width
            * math.log(numbers["original_max_position_embeddings"] / (turns * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low, high = dimension(numbers.get("beta_fast") or 32), dimension(numbers.get("beta_slow") or 1)
    if numbers.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 * (low == high)  # no division by zero
    ramp = ((torch.arange(len(exponent), device=exponent.device).float() - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (numbers["factor"] * powers) * (1 - kept) + 1.0 / powers * kept


def attention_factor(scaling: Mapping[str, Any]) -> float:
    """What cos and sin are multiplied by: yarn's and longrope's correction of the scores' temperature."""
    kind, factor, given = scaling.get("rope_type"), scaling.get("factor", 1.0), scaling.get("attention_factor")
    if kind not in ("yarn", "longrope"):
        return 1.0
    if given is not None:
        return given
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(scaling["original_max_position_embeddings"]))
    scale, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if scale and all_dims:
        return (0.1 * scale * math.log(factor) + 1) / (0.1 * all_dims * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def query_scale(config: DecoderConfig, where: Tensor, seen: int, dtype: torch.dtype) -> Tensor | None:
    """Ministral 3: queries grow with the logarithm of their position, [B or 1, 1, T, 1]; None where none does yet."""
    if not config.scales_queries(seen):
        return None
    numbers = dict(config.rope_scaling)
    beta, original = numbers["llama_4_scaling_beta"], numbers["original_max_position_embeddings"]
    return (1 + beta * torch.log(1 + torch.floor(where / original)))[:, None, :, None].to(dtype)


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """One slope per head, [H] fp32 (Press et al. 2022; for head counts that are no power of two, as BLOOM does)."""
    power = 2 ** math.floor(math.log2(heads))
    exact = exact_beside(device)
    steps = torch.arange(1, power + 1, device=exact).double() / power
    more = (2 * torch.arange(heads - power, device=exact) + 1).double() / power
    return torch.cat((-8 * steps, -4 * more)).exp2().float().to(device)
