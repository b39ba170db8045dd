"""What the activations of a model take on the device whose layers are transformers' own: measured on fake tensors.

No formula follows each architecture of transformers, so its parts are run by themselves, as stream.Stream runs them,
on tensors without memory, and what a Meter counts is the plan's. Layers that are alike are run once. A model that does
not run on fake tensors (what it computes depends on numbers) is planned by the formula of a decoder of ours, and the
plan says so.

[Note: what is measured is a CPU's] The operations are those that transformers chooses on a CPU. Kernels that exist on a
GPU alone (mamba_ssm, flash-linear-attention) take less.
"""

import copy
import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from penstock.autochunk.meter import Meter
from penstock.autochunk.recompute import recomputing
from penstock.memory.homes import SUMS
from penstock.memory.program import Part
from penstock.models import linear, surgery
from penstock.models.config import DecoderConfig
from penstock.models.foreign.decoder import CHECKS, Calls, ForeignDecoder, Past
from penstock.models.lora_targets import LoraSpec
from penstock.models.tiling import Arithmetic, head_tile
from penstock.models.weight_shapes import BaseDtype
from penstock.planner.activations import Batch, PartWork, Work
from penstock.planner.footprint import FP32, INDEX
from penstock.planner.measuring.pretend import PretendWorld, pretend

CPU = torch.device("cpu")
NUMBERS = ("layer_idx", "layer_id", "layer_number")
"""Attributes in which layers that are alike differ."""


@dataclass(frozen=True)
class Model:
    """What is measured. Example: Model(config, "float32", None, None, trained=True)."""

    config: DecoderConfig
    dtype: str
    spec: LoraSpec | None
    packed: BaseDtype | None
    trained: bool
    arithmetic: Arithmetic = "narrow"


@dataclass(frozen=True)
class Generation:
    """Bytes of text that is made in step (rollout.in_step)."""

    cache: int
    """Of transformers' cache at its longest."""
    passing: int
    """The most beside it."""


def measured(model: Model, batch: Batch, formula: Work) -> Work:
    """The bytes of a pass over a micro-batch. `formula`: what reads the last states, whose norm is not counted;
    and all of it, with a note, where the model cannot be run."""
    rows, length, read = dataclasses.astuple(batch)
    result = _of_length(_parts, model, rows, length)
    if isinstance(result, str):
        return dataclasses.replace(formula, note=_note(model, result))
    (*parts, behind), context = result
    assert model.config.foreign is not None
    names = {weight.name for _, weights in model.config.foreign.groups for weight in weights}
    more = ("head_bias" in names) + bool(model.config.logit_softcap)  # tiles of logits: log_probs
    tile = math.prod(head_tile(read, model.config.vocab_size, model.arithmetic)) * FP32 * more
    return Work(
        tuple(parts),
        context + 2 * rows * length * INDEX,
        max(behind.forward, behind.output + formula.forward_head + tile),
        max(behind.saved + formula.backward_head + tile, behind.backward + behind.output),
    )


def generation(model: Model, rows: int, prompt: int, length: int) -> Generation | str:
    """The bytes of so many rows of text of `length` tokens, of which `prompt` are given. A note where the model cannot
    be run."""
    result = _of_length(_generation, model, rows, prompt, length)
    return _note(model, result) if isinstance(result, str) else result


def _note(model: Model, reason: str) -> str:
    return (
        f"{model.config.family}: its layers are transformers' own and do not run on tensors without memory ({reason}), "
        "so its activations are planned by the formula of our own decoder, and may take more"
    )


def _of_length(measure: Callable[..., Any], model: Model, rows: int, *lengths: int) -> Any:
    """As `_attempt`. Layers that go from token to token (a selective scan in plain PyTorch) would take minutes: their
    bytes grow with the tokens, so rows of LONG tokens and of half as many say what longer ones hold."""
    longest = max(lengths)
    operations = (
        [_attempt(_operations, model, 1, tokens) for tokens in (LONG // 8, LONG // 4)] if longest > LONG else []
    )
    if len(set(operations)) < 2:
        return _attempt(measure, model, rows, *lengths)
    half = _attempt(measure, model, rows, *(max(length * LONG // 2 // longest, 1) for length in lengths))
    whole = _attempt(measure, model, rows, *(-(-length * LONG // longest) for length in lengths))
    return whole if isinstance(whole, str) else _on_a_line(half, whole, 2 * longest / LONG - 2)


LONG = 64
"""Tokens of a row."""


def _on_a_line(half: Any, whole: Any, times: float) -> Any:
    """`whole` and `times` its difference from `half`, number by number."""
    if isinstance(whole, int):
        return math.ceil(whole + (whole - half) * times)
    if isinstance(whole, tuple | list):
        return type(whole)(_on_a_line(x, y, times) for x, y in zip(half, whole, strict=True))
    if isinstance(whole, PartWork | Generation):
        values = {name: _on_a_line(getattr(half, name), y, times) for name, y in vars(whole).items()}
        return type(whole)(**values)
    return whole


@functools.lru_cache(maxsize=256)
def _attempt(measure: Callable[..., Any], model: Model, *sizes: int) -> Any:
    decoder, log = copy.deepcopy(_decoder(model)), logging.getLogger("torch._subclasses.fake_tensor")
    try:
        log.disabled = True  # it prints the trace of what does not run
        with pretend(PretendWorld(0, 1, CPU)), linear.computing(model.arithmetic), torch.device("cpu"):
            _fill(decoder)
            return measure(decoder, *sizes)
    except Exception as error:  # of transformers' own code, given tensors without numbers
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    finally:
        log.disabled = False


@functools.lru_cache(maxsize=4)
def _decoder(model: Model) -> ForeignDecoder:
    """The model on `meta`."""
    decoder = ForeignDecoder(model.config, dtype=getattr(torch, model.dtype), device="meta")
    if model.packed is not None:
        surgery.quantise_base(decoder, model.packed)
    if model.spec is not None:
        surgery.add_adapters(decoder, model.spec)
    return decoder if model.trained else decoder.requires_grad_(False)


def _fill(decoder: ForeignDecoder) -> None:
    """Gives weights memory that is fake, and gradients their place, as in the engine."""
    for module in decoder.modules():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            filled = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad)
            if weight.requires_grad:
                filled.grad_dtype = SUMS
                filled.grad = torch.empty(weight.shape, dtype=SUMS)
            module._parameters[name] = filled


# --- passes -----------------------------------------------------------------------------------------------------------


def _parts(decoder: ForeignDecoder, rows: int, length: int) -> tuple[list[PartWork], int]:
    """Each part's bytes, those of the last one too, and those of the context."""
    tokens = torch.ones(rows, length, dtype=torch.int64)
    parts, context = decoder.parts(), decoder.begin(tokens)
    learning = {name for name, weight in decoder.named_parameters() if weight.requires_grad}
    groups = {group for group, names in decoder.groups() if learning.intersection(names)}
    first = next((i for i, part in enumerate(parts) if groups.intersection(part.groups)), len(parts))
    works: list[PartWork] = []
    with Meter() as meter:
        with torch.no_grad():
            x = parts[0].run(tokens, context)
        kept = meter.used["device"] - x.untyped_storage().nbytes()
        works.append(_part(meter, parts[0], tokens, context, first == 0))
        kinds: dict[Any, tuple[PartWork, int]] = {}
        for i, part in enumerate(parts[1:], 1):
            leaf, before = x.detach().requires_grad_(i > first), meter.used["device"]
            kind = _kind(decoder, i - 1, context) if i <= len(decoder.blocks) else part.groups
            if kind not in kinds:
                work = _part(meter, part, leaf, context, i >= first)
                kinds[kind] = work, meter.used["device"] - before
            works.append(dataclasses.replace(kinds[kind][0], groups=part.groups))
            kept += kinds[kind][1]  # RecurrentGemma's modules keep tensors of the rows that they have read
    return works, kept


def _part(meter: Meter, part: Part, x: Tensor, context: Calls, learns: bool) -> PartWork:
    """One part on one micro-batch, whose context exists: without gradients, and then forward and backward."""
    before = _begin(meter)
    with torch.no_grad():
        y = part.run(x, context)
    forward, output = meter.peak - before, y.untyped_storage().nbytes()
    if not learns:
        return PartWork(part.groups, output, output, forward, forward)
    slope = torch.empty_like(y)
    del y
    before = _begin(meter)
    with torch.enable_grad(), recomputing():
        y = part.run(x, context)
    saved = meter.used["device"] - before
    y.backward(slope)
    x.grad = None
    return PartWork(part.groups, output, saved, forward, meter.peak - before)


def _begin(meter: Meter) -> int:
    """Bytes that are there; a peak is measured from here on."""
    meter.peaks["device"] = meter.used["device"]
    return meter.used["device"]


def _kind(decoder: ForeignDecoder, i: int, context: Calls) -> Any:
    """Equal for layers that are alike and are called with alike arguments."""
    block = decoder.blocks[i]
    plain = [
        (name, type(module), *((key, value) for key, value in vars(module).items() if _plain(key, value)))
        for name, module in block.named_modules()
    ]
    weights = [(name, x.shape, x.dtype, x.requires_grad) for name, x in block.named_parameters()]
    arguments = [
        (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf if _plain("", leaf) else type(leaf)
        for leaf in pytree.tree_leaves(context.layers[i])
    ]
    return tuple(plain), tuple(weights), tuple(arguments), tuple(context.carried[i].items())


def _plain(name: str, value: Any) -> bool:
    return name not in NUMBERS and isinstance(value, int | float | str | None)


class _Counter(Meter):
    """Counts operations too."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def _operations(decoder: ForeignDecoder, rows: int, length: int) -> int:
    """Of one forward, layers that are alike counted once."""
    with _Counter() as counter, torch.no_grad():
        _forward(counter, decoder, rows, length, None)
    return counter.operations


# --- generating -------------------------------------------------------------------------------------------------------


def _generation(decoder: ForeignDecoder, rows: int, prompt: int, length: int) -> Generation:
    """As RowsInStep reads: the prompts, whole rows to check the first steps, and the last token of full rows."""
    with Meter() as meter, torch.no_grad():
        past, steps = decoder.past(), length - prompt - 1
        fullest, cache = _forward(meter, decoder, rows, prompt, past)
        if past is None or past.cache is None:  # whole rows for every token
            return Generation(0, _forward(meter, decoder, rows, length - 1, None)[0])
        if steps > 0:
            checked = min(prompt + CHECKS, length - 1)
            fullest = max(fullest, cache * checked // prompt + _forward(meter, decoder, rows, checked, None)[0])
            past = Past()
            cache = _forward(meter, decoder, rows, length - 2, past)[1] if length - 2 > prompt else cache
            passing, grown = _forward(meter, decoder, rows, 1, past)
            fullest, cache = max(fullest, cache + passing), cache + grown
    return Generation(cache, max(fullest - cache, 0))


def _forward(meter: Meter, decoder: ForeignDecoder, rows: int, length: int, past: Past | None) -> tuple[int, int]:
    """One forward: bytes at its fullest instant, without the cache as it was before, and by how much the cache grew."""
    tokens, context = torch.ones(rows, length, dtype=torch.int64), Calls(past)
    start = _begin(meter)
    x = decoder.parts()[0].run(tokens, context)
    fullest, opened = meter.peak - start, meter.used["device"] - start
    kinds: dict[Any, tuple[int, int]] = {}
    grown = again = 0  # by all layers so far; by those of them that were not run
    for i, part in enumerate(decoder.parts()[1:]):
        kind = _kind(decoder, i, context) if i < len(decoder.blocks) else part.groups
        if kind in kinds:
            again += kinds[kind][1]
        else:
            before = _begin(meter)
            y = part.run(x, context)
            kinds[kind] = meter.peak - before, meter.used["device"] - before - y.untyped_storage().nbytes()
            del y
        fullest = max(fullest, opened + grown + kinds[kind][0])
        grown += kinds[kind][1]
    del x, context
    return fullest, meter.used["device"] - start + again
