"""The decoder: one transformer for every family, as an explicit program embed -> blocks -> norm -> head.

Training, prefill and single-token decoding run the same blocks. The decoder knows no file: `recipe` writes its first
weights, `surgery` adds adapters and packs weights, `pretrained` loads and saves.

Shapes: B rows, T tokens, D width, H query heads, G key/value heads, E head_dim, S cache slots, V vocabulary.

[Note: one decoder, as a program] A block holds weights and nothing else. What depends on positions (rotary tables,
attention bias) is computed once per call and passed to every block, as is the cache. So a block can be fed from any
memory, and the sampler and the trainer run the same code: their log-probabilities agree to rounding.

[Note: right padding, no masks] A valid token never sees the padding to its right, so training needs no mask tensor.
Logits are computed only for the states whose log-probabilities are read.

[Note: rows end to end] Only attention knows of rows. Where a micro-batch has padding and `begin` is told which tokens
are valid, the first part takes them out of their rows, everything runs on [1, N, D], and attention on one row after the
other (linear.attention). Tokens and masks stay [B, T]; algorithms.functional finds the states they name.
What a row begins with as the row before it, the prompt of several answers or the system message of all, is computed
once (algorithms.functional.computed): attention gathers a row's keys from the rows that computed them, and autograd
adds the gradients of all their readers.
"""

import dataclasses
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from penstock.kernels import cpu_ops
from penstock.kernels.rms_norm import rms_norm
from penstock.memory.program import ALWAYS_THERE, Part
from penstock.models import log_probs, packed
from penstock.models.config import DecoderConfig
from penstock.models.linear import Linear, RowAdapters, add_to, attention, layer_norm, linear, precise, rows_of
from penstock.models.lora import Adapted
from penstock.models.moe.balance import Balance
from penstock.models.moe.experts import ALONE, Routing, everyone, mixture
from penstock.models.moe.mlp import Mlp, mlp, mlp_weights
from penstock.models.positions import Positions, RaggedRows, positions_of, ragged_rows, rotate
from penstock.models.weight_shapes import BaseDtype, group_in_block, groups_of_block

KVCache = Sequence[tuple[Tensor, Tensor]]
"""Per layer (keys, values), each [B, G, S, E], preallocated and written in place."""


class Norm(nn.Module):
    """LayerNorm (weight and bias) or RMSNorm (weight, to which Gemma adds 1)."""

    def __init__(self, width: int, config: DecoderConfig, kind: str | None = None) -> None:
        super().__init__()
        self.eps, self.kind, self.offset = config.norm_eps, kind or config.norm, config.norm_offset
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if self.kind == "layer" else None

    def forward(self, x: Tensor, spare: bool = False) -> Tensor:
        """Normalises the last dimension; `spare`: x is not used any more."""
        if self.kind == "layer":
            return layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        if cpu_ops.ready(x.device, x.dtype, self.weight.dtype) and x.shape[-2] == 1:
            return cpu_ops.rms_norm(x, self.weight, self.eps, self.offset, spare=spare)
        return rms_norm(x, self.weight, self.eps, self.offset)


@dataclass(frozen=True)
class Context:
    """What every part of the program reads beside the hidden states: all that depends on positions."""

    position_ids: Tensor
    """[B or 1, T] int64."""
    positions: dict[tuple[int, bool], Positions]
    """By DecoderConfig.kinds."""
    cache: KVCache | None
    valid: Tensor | None = None
    """[B, T], or of ragged rows [N]: of how many rows each token's route is balanced, in training."""
    chooses: bool = False
    """Experts come when tokens have chosen them; else they are there."""
    ragged: RaggedRows | None = None
    """The rows, where they lie end to end."""


class Block(nn.Module):
    """One transformer layer: weights, and a forward that takes everything else as arguments."""

    def __init__(self, config: DecoderConfig, experts: int = 0) -> None:
        super().__init__()
        self.config = config
        width, heads = config.d_model, config.num_heads * config.head_dim
        kv = config.num_kv_heads * config.head_dim
        first = config.pre_norm or not config.out_norms
        self.norm1 = Norm(width, config) if first else None
        self.qkv = Linear(width, heads + 2 * kv, bias=config.qkv_bias)  # q, then k, then v
        wide = config.qk_norm_wide
        self.q_norm = Norm(heads if wide else config.head_dim, config, "rms") if config.qk_norm else None
        self.k_norm = Norm(kv if wide else config.head_dim, config, "rms") if config.qk_norm else None
        self.out = Linear(heads, width, bias=config.out_bias)
        self.sinks = nn.Parameter(torch.empty(config.num_heads)) if config.sinks else None
        self.out_norm = Norm(width, config) if config.out_norms else None
        self.norm2 = Norm(width, config) if first else None
        self.router: Linear | None = None
        if experts:
            self.router = Linear(width, experts, bias=config.router_bias)
            self.router.exact = True
            self.experts = nn.ModuleList(Mlp(config, config.expert_ff) for _ in range(experts))
        else:
            self.up, self.down = mlp_weights(config, config.d_ff)
        self.down_norm = Norm(width, config) if config.out_norms else None

    def forward(
        self,
        x: Tensor,
        positions: Positions,
        cache: tuple[Tensor, Tensor] | None = None,
        routing: Routing = ALONE,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]; writes its keys and values into `cache` if there is one."""
        c = self.config
        if not (c.pre_norm or c.out_norms):
            x = normed(self.norm1, x + self.attention(x, positions, cache))
            return normed(self.norm2, x + self.mlp(x, routing))
        attended = normed(self.out_norm, self.attention(normed(self.norm1, x), positions, cache))
        if c.parallel_residual:
            return x + attended + self.mlp(normed(self.norm2, x), routing)
        x = add_scaled(x, attended, c.residual_scale)
        return add_scaled(x, normed(self.down_norm, self.mlp(normed(self.norm2, x), routing)), c.residual_scale)

    def attention(self, x: Tensor, positions: Positions, cache: tuple[Tensor, Tensor] | None) -> Tensor:
        """Causal self-attention over the row, or over the cache when decoding."""
        c = self.config
        rows, length, _ = x.shape
        q, k, v = self.heads(x)
        positions = positions.of_tokens
        if positions.rotary is not None:
            q, k = rotate(q, positions.rotary), rotate(k, positions.rotary)
        if positions.query_scale is not None:
            q = q * positions.query_scale
        if cache is not None and positions.slots is not None and positions.bias is None:
            scores = cpu_ops.Scores(
                positions.slopes, positions.window, c.attention_scale, c.attention_softcap, self.sinks
            )
            return self.out(cpu_ops.attention(q, k, v, cache, positions.slots, scores))
        if cache is not None:
            k, v = write(cache, k, v, positions)
        scores = cpu_ops.Scores(None, positions.window, c.attention_scale, c.attention_softcap, self.sinks)
        mixed = attention(q, k, v, positions.bias, scores, positions.ragged)
        return self.out(mixed.transpose(1, 2).reshape(rows, length, -1))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, E], keys and values [B, G, T, E], normed if the model does so."""
        c = self.config
        rows, length, _ = x.shape
        counts, qkv = (c.num_heads, c.num_kv_heads, c.num_kv_heads), self.qkv(x)
        if c.qk_norm_wide and self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split([count * c.head_dim for count in counts], dim=-1)
            parts = self.q_norm(q), self.k_norm(k), v
            q, k, v = (part.view(rows, length, -1, c.head_dim).transpose(1, 2) for part in parts)
            return q, k, v
        q, k, v = qkv.view(rows, length, sum(counts), c.head_dim).transpose(1, 2).split(counts, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, spare=True), self.k_norm(k, spare=True)
        return q, k, v

    def mlp(self, x: Tensor, routing: Routing) -> Tensor:
        """down(activation(up(x))), gated or not, or the experts that each token's router chooses: [B, T, D]."""
        if self.router is None:
            return mlp(x, self.up, self.down, self.config)
        c, rows, experts = self.config, x.flatten(0, 1), cast(Any, self.experts)
        logits = self.router(rows.float())
        return mixture(rows, logits, experts, c.experts_per_token, c.norm_topk, routing).view_as(x)


def normed(norm: Norm | None, x: Tensor) -> Tensor:
    """norm(x), where there is a norm."""
    return x if norm is None else norm(x)


def add_scaled(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """x + scale * y."""
    return x + y if scale == 1.0 else torch.add(x, y, alpha=scale)


def write(cache: tuple[Tensor, Tensor], k: Tensor, v: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
    """Writes k and v [B, G, T, E] to their slots, in place. Returns the keys and values that attention reads."""
    keys, values = cache  # [B, G, S, E]
    if positions.slots is None:
        keys[:, :, : k.shape[2]], values[:, :, : v.shape[2]] = k, v
        return k, v
    row, seen = torch.arange(k.shape[0], device=k.device), positions.seen
    keys[row, :, positions.slots], values[row, :, positions.slots] = k[:, :, 0], v[:, :, 0]
    return keys[:, :, :seen], values[:, :, :seen]


class Embedding(nn.Module):
    """From tokens (and learned positions) to the first hidden state."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dim or config.d_model
        self.tokens = nn.Parameter(torch.empty(config.vocab_size, width))
        self.scales: nn.Parameter | None = None
        """[V], where tokens are int8; see models.packed."""
        self.lora: nn.ModuleList | None = None
        """A low-rank addition to the token table; see models.lora."""
        rows = config.max_length + config.position_offset
        learned = config.position == "learned"
        self.positions = nn.Parameter(torch.empty(rows, config.d_model)) if learned else None
        self.project = Linear(width, config.d_model, bias=False) if config.embed_dim else None
        self.norm = Norm(config.d_model, config) if config.embed_norm else None

    def forward(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """tokens [B, T], position_ids [B or 1, T] -> [B, T, D]."""
        if self.scales is not None:
            x = packed.rows(self.tokens, self.scales, tokens)
        else:
            x = rows_of(self.tokens, tokens)
        if self.lora is not None:
            x = x + self.lora[0].rows(tokens)  # type: ignore[operator]
        if self.config.embed_scale != 1.0:
            x = x.mul_(rounded(self.config.embed_scale, x.dtype))
        if self.project is not None:
            x = self.project(x)
        if self.positions is not None:
            x = x + rows_of(self.positions, position_ids + self.config.position_offset)
        return x if self.norm is None else self.norm(x)


def rounded(number: float, dtype: torch.dtype) -> float:
    """The nearest number of a dtype."""
    mantissa, exponent = math.frexp(number)
    steps = 2 / torch.finfo(dtype).eps
    return math.ldexp(round(mantissa * steps) / steps, exponent)


class Source(Protocol):
    """A checkpoint (models.pretrained.Checkpoint). Equal sources hold the same weights."""

    packed: bool
    """Whether its files hold packed weights."""

    def opened(self) -> AbstractContextManager[None]:
        """Inside, files stay open from one `fill` to the next."""

    def fill(self, parameters: dict[str, Tensor]) -> None:
        """Reads these weights, by our names."""

    def digest(self) -> str:
        """A hash that differs between different weights."""


class Decoder(nn.Module):
    """The program. `blocks[i]` is layer i; there are no hooks."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Random weights: N(0, 0.02), residual projections / sqrt(2L), biases 0, norms 1 (Radford et al. 2019, 2.3).

        dtype, device: torch's defaults. On `meta` nothing is allocated: the decoder is a recipe, see models.recipe.
        """
        super().__init__()
        with torch.device("meta"):  # so that no weight is drawn twice
            self.config = config
            self.embed = Embedding(config)
            self._groups = [groups_of_block(config, i) for i in range(config.num_layers)]
            self.blocks = nn.ModuleList(Block(config, len(groups) - 1) for groups in self._groups)
            self.norm = Norm(config.d_model, config) if config.final_norm else None
            self.unproject = Linear(config.d_model, config.embed_dim, bias=False) if config.embed_dim else None
            width = config.embed_dim or config.d_model
            self.head = None if config.tied else nn.Parameter(torch.empty(config.vocab_size, width))
        self.to(dtype or torch.get_default_dtype())
        self.balance = self.new_balance()
        self._complete(device, generator)

    def _complete(self, device: torch.device | str | None, generator: torch.Generator | None) -> None:
        """What a decoder has beside its layers, and first values for its weights."""
        self.head_scales: nn.Parameter | None = None
        """[V], where the head is int8."""
        self.base_dtype: BaseDtype | None = None
        """The dtype that the weights of all blocks are packed in, if they are; see models.packed."""
        self.lora: nn.ModuleList | None = None
        """A low-rank addition to the head; see models.lora."""
        self.adapted: Adapted | None = None
        """Describes its adapters, if it has any."""
        self.row_adapters: RowAdapters | None = None
        """Where rows of a batch have different adapters: which; see surgery.add_adapters_by_row."""
        self.feed: Any = ALWAYS_THERE
        """Brings the weights to the device: a memory.stream.Stream once a strategy has prepared the model."""
        self.slicer: Any = None
        """An autochunk.api.Slicer that runs its blocks, where activations have a budget; see models.sliced_blocks."""
        self.source: Source | None = None
        """The checkpoint that its weights are read from. None: they are drawn, from `seed` and their names."""
        self.seed = 0
        device = torch.device(device) if device is not None else torch.get_default_device()
        if device.type == "meta":
            self.seed = int(torch.randint(1 << 62, (), device="cpu"))
            return
        self.to_empty(device=device)
        for name, parameter in self.named_parameters():
            self.draw(name, parameter, generator)

    @torch.no_grad()
    def draw(self, name: str, weight: Tensor, generator: torch.Generator | None) -> None:
        """Writes the value that a fresh model's weight of this name has, in place."""
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        elif "norm" in name:
            nn.init.constant_(weight, 1.0 - self.config.norm_offset)
        else:
            residual = name.endswith(("out.weight", "down.weight"))
            std = 0.02 / math.sqrt(2 * self.config.num_layers) if residual else 0.02
            nn.init.normal_(weight, std=std, generator=generator)

    def new_balance(self) -> Balance | None:
        """The account of what its routers choose in training; None where nothing depends on it."""
        routers, coef = sum(len(of_block) > 1 for of_block in self._groups), self.config.router_aux_loss_coef
        return Balance(coef, routers, self.config.num_experts) if routers and coef else None

    @property
    def device(self) -> torch.device:
        """The device it computes on."""
        return self.feed.device or self.embed.tokens.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in: its weights' own, or that of the weights that int8 ones were made from."""
        own = self.embed.tokens if self.embed.scales is None else self.embed.scales
        return self.feed.dtype or own.dtype

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the token embedding when tied."""
        return self.embed.tokens if self.head is None else self.head

    def forward(self, tokens: Tensor, lengths: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Whole rows: tokens [B, T] int64, right-padded -> hidden [B, T, D], causal, positions 0 .. T-1.

        `lengths` only documents the contract: see [Note: right padding, no masks]. With `cache`, keys and values of all
        positions are also written to its slots 0 .. T-1.
        """
        return self._run(tokens, self.begin(tokens, cache))

    def decode(self, tokens: Tensor, cache: KVCache, positions: Tensor, seen: int | None = None) -> Tensor:
        """One token per row: tokens [B], positions [B] -> hidden [B, D].

        Row b writes slot positions[b] and sees the slots up to it: the slots behind may hold any finite numbers. `seen`
        is the largest position plus one. Default: read from the device.
        """
        seen = int(positions.max()) + 1 if seen is None else seen  # sync
        return self._run(tokens[:, None], self._context(positions[:, None], seen, positions, cache))[:, 0]

    def idle(self) -> Tensor:
        """[0, D]. Visits every part and computes nothing: ranks that share the weights must visit parts together."""
        self.feed.start(0)
        for part in self.parts():
            with self.feed.visit(*part.groups):
                pass
        return torch.empty(0, self.config.embed_dim or self.config.d_model, dtype=self.dtype, device=self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], in the weights' dtype, or in fp32 where that costs nothing: a bf16 logit of 5 has an
        error of up to 0.016, and the engine's and the trainer's errors would differ."""
        with self.feed.visit(*self.reads()):
            hidden = precise(hidden)
            logits = linear(hidden, self.head_weight, scales=self.head_scales)
            logits = logits if self.lora is None else add_to(logits, hidden, self.lora)
            return log_probs.bend(logits, self.config.logit_divisor, self.config.logit_softcap)

    def logprobs(
        self, states: Tensor, targets: Tensor, temperature: float = 1.0, *, entropy: bool = True, others: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of tokens `targets`, [N] or [N, k], after states [N, D], and entropies [N]; see
        `log_probs.logprobs`."""
        with self.feed.visit(*self.reads()):
            products, bend = self._products(states), temperature * self.config.logit_divisor
            return log_probs.logprobs(
                products, targets, bend, entropy=entropy, others=others, softcap=self.config.logit_softcap
            )

    def top_logprobs(
        self, states: Tensor, k: int, temperature: float = 1.0, *, vocabulary: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k likeliest tokens after states [N, D] and their log-probabilities; see `log_probs.top_logprobs`."""
        with self.feed.visit(*self.reads()):
            products, bend = self._products(states), temperature * self.config.logit_divisor
            return log_probs.top_logprobs(products, k, bend, vocabulary=vocabulary, softcap=self.config.logit_softcap)

    def _products(self, states: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The pairs (x, weight) whose products are the logits' summands. A head in int8 is only for answering."""
        assert self.head_scales is None, "log-probabilities of a packed head: take them from logits()"
        states = precise(states)
        products = [(states, self.head_weight)]
        adapter: Any
        for adapter in self.lora or ():
            products.append((linear(states, adapter.a) * adapter.scale, adapter.b))
        return products

    def _run(self, tokens: Tensor, context: Context) -> Tensor:
        chooses = self.feed.start(tokens.numel())
        if chooses:
            context = dataclasses.replace(context, chooses=True)
        x = tokens
        for part in self.parts():
            with self.feed.visit(*(part.needed if chooses else part.groups)):
                x = part.run(x, context)
        return x

    # --- the program, as memory.stream reads it -----------------------------------------------------------------------

    def groups(self) -> list[tuple[str, list[str]]]:
        """(group, names) of weights that move together, in operational order. The token table is a group of its own:
        a tied head reads it too."""
        names = [name for name, _ in self.named_parameters()]
        groups = [
            ("tokens", ["embed.tokens"]),
            ("embed", [name for name in names if name.startswith("embed.") and name != "embed.tokens"]),
        ]
        blocks: dict[str, list[str]] = {group: [] for of_block in self._groups for group in of_block}
        for name in names:
            if name.startswith("blocks."):
                blocks[group_in_block(name)].append(name)
        groups += blocks.items()
        groups.append(("last", [name for name in names if name.startswith(("norm.", "unproject."))]))
        groups.append(("head", [name for name in names if name == "head" or name.startswith("lora.")]))
        return [(group, members) for group, members in groups if members]

    def parts(self) -> list[Part]:
        """embed -> blocks -> norm. A micro-batch's first x is its tokens, the last one its hidden states."""
        return [
            Part(("tokens", "embed"), self._first),
            *(Part(groups, partial(self._block, i), groups[1:]) for i, groups in enumerate(self._groups)),
            Part(("last",), self._last),
        ]

    def reads(self) -> tuple[str, ...]:
        """The groups of weights that logits are computed with."""
        if self.head is not None:
            return ("head",)
        return ("tokens",) if self.lora is None else ("tokens", "head")

    def begin(
        self, tokens: Tensor, cache: KVCache | None = None, valid: Tensor | None = None, computed: Tensor | None = None
    ) -> Context:
        """The context of whole rows, tokens [B, T]. `valid`: [B, T] bool, the beginnings of rows that are needed, and
        `computed` those of them that the row before does not have; see [Note: rows end to end]."""
        length = tokens.shape[1]
        context = self._context(torch.arange(length, device=tokens.device)[None], length, None, cache)
        biased = any(each.bias is not None for each in context.positions.values())
        if valid is None or (biased and valid.device.type != "cpu"):  # a GPU's kernels keep an aligned copy per row
            return context
        rows = ragged_rows(valid, computed)
        if rows is None:
            return context
        positions = {kind: dataclasses.replace(each, ragged=rows) for kind, each in context.positions.items()}
        return dataclasses.replace(context, position_ids=rows.position_ids[None], positions=positions, ragged=rows)

    def _context(self, position_ids: Tensor, seen: int, slots: Tensor | None, cache: KVCache | None) -> Context:
        """Of tokens at position_ids [B or 1, T], which see key positions 0 .. seen-1."""
        c = self.config
        if seen > c.max_length and (c.position == "learned" or c.declared_length):
            raise ValueError(f"a row of {seen} tokens does not fit the model's {c.max_length} positions")
        in_c = slots is not None and cpu_ops.attends(self.device, self.dtype, c.head_dim)
        return Context(position_ids, positions_of(c, position_ids, seen, slots, self.dtype, in_c), cache)

    def _first(self, tokens: Tensor, context: Context) -> Tensor:
        if context.ragged is not None:
            tokens = tokens.flatten()[context.ragged.places][None]
        return self.embed(tokens, context.position_ids)

    def _block(self, i: int, x: Tensor, context: Context) -> Tensor:
        positions = context.positions[self.config.kinds[i]]
        if self.slicer is not None and context.cache is None:
            return self.slicer.run(self.blocks[i], x, positions)
        cache = None if context.cache is None else context.cache[i]
        if context.chooses:
            return self.blocks[i](x, positions, cache, Routing(partial(self._visit_experts, i)))
        if context.valid is None:
            return self.blocks[i](x, positions, cache)
        return self.blocks[i](x, positions, cache, Routing(everyone, self.balance, context.valid.flatten()))

    def _visit_experts(self, i: int, experts: Sequence[int]) -> AbstractContextManager[None]:
        return self.feed.visit(*(self._groups[i][1 + expert] for expert in experts))

    def _last(self, x: Tensor, context: Context) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        return x if self.unproject is None else self.unproject(x)
