"""Blocks within an activation budget: the operations of our models that autochunk.api needs, and the peaks that the
plan counts. Only whole rows are computed in slices (training, scoring), not decoding and prefill, which write a cache.

[Note: linear is one op while it is exported]
`models.linear` exports as a plain aten op, and the executor calls `linear` for that op again, slice by slice. So
gradients of weights are still added in place, and bf16 is still widened.
"""

import dataclasses
import functools

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from penstock.autochunk.api import Report, Slicer
from penstock.errors import UserError
from penstock.kernels.cpu_ops import gelu_tanh
from penstock.memory.program import owners
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.linear import computing, fused_attention, layer_norm, linear, slow_in_bf16


def one_layer(config: DecoderConfig) -> DecoderConfig:
    """A model of one block, whose context has the positions of every kind of layer."""
    kinds = dict.fromkeys(config.kinds)
    windows = tuple(window for window, _ in kinds) if config.windows else ()
    rotary = tuple(rotates for _, rotates in kinds) if config.rotary_layers else ()
    return dataclasses.replace(config, num_layers=1, windows=windows, rotary_layers=rotary)


def slicer_of(config: DecoderConfig, budget: int) -> Slicer:
    """Runs the blocks of a model within `budget` bytes each; gradients are computed by recomputation. It holds no
    weights: models of one shape and the plan share it. Raises UserError for experts and for transformers' layers."""
    if config.foreign:
        raise UserError(
            f"--activation-budget: the layers of {config.family} are transformers' own, which are not computed in "
            "slices; leave it out, and give --recompute or a smaller --micro-batch-size."
        )
    if config.num_experts:
        raise UserError(
            f"--activation-budget: which experts of {config.family} a token calls is known only once it is there, so "
            "its blocks are not cut into slices; leave it out, and give --recompute or a smaller --micro-batch-size."
        )
    return _slicer_of(config, budget, slow_in_bf16("cpu"))


@functools.cache
def _slicer_of(config: DecoderConfig, budget: int, slow: bool) -> Slicer:
    return Slicer(
        budget,
        ops={
            torch.ops.aten.linear.default: linear,
            torch.ops.aten.gelu.default: _gelu,
            torch.ops.aten.layer_norm.default: layer_norm,
            torch.ops.aten.scaled_dot_product_attention.default: fused_attention,
        },
        recomputing=True,
    )


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """The decoder's own GELU: the same bits in slices."""
    return gelu_tanh(x) if approximate == "tanh" else F.gelu(x)


@functools.lru_cache
def peaks(config: DecoderConfig, dtype: str, rows: int, length: int, budget: int) -> tuple[int, int, str]:
    """Most bytes alive in a block: in forward without gradients, and in forward and backward; and the reports.

    Both count what the block returns and its input's gradient, as `planner.activations.PartWork` does. `dtype`: as in
    "bfloat16". Raises ResourceError where the budget is below the least that works.
    """
    peak_bytes, reports = [0, 0], []
    torch_dtype = getattr(torch, dtype)
    decoder = Decoder(one_layer(config), dtype=torch_dtype, device="meta")
    with FakeTensorMode(), computing("narrow"):  # as the plan counts everything else
        for module, name in owners(decoder).values():
            shape = getattr(module, name).shape
            setattr(module, name, nn.Parameter(torch.empty(shape, dtype=torch_dtype)))
        slicer = slicer_of(config, budget)
        context = decoder.begin(torch.empty(rows, length, dtype=torch.int64))
        for positions in context.positions.values():
            for training in (False, True):
                x = torch.empty(rows, length, config.d_model, dtype=torch_dtype, requires_grad=training)
                with torch.set_grad_enabled(training):
                    slicer.plan_for(decoder.blocks[0], (x, positions), {})
                report: Report = slicer.reports[slicer.latest]
                peak_bytes[training] = max(peak_bytes[training], report.after)
                reports.append(str(report))
    return peak_bytes[0], peak_bytes[1], "\n".join(reports)
