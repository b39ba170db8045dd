"""What is done to a whole decoder: adapters are added, removed and merged, weights are packed.

Everything changes the decoder in place. On `meta` it changes the recipe, and no weight is read. The modules and their
arithmetic are in `lora` and `packed`.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from penstock.errors import UserError
from penstock.memory.plan import MOST_FEW
from penstock.memory.program import ALWAYS_THERE, owners
from penstock.models import recipe
from penstock.models.adapter_files import AdapterFile
from penstock.models.decoder import Decoder
from penstock.models.linear import AdaptersByRow, Linear, RowAdapters
from penstock.models.lora import Adapted, Adapter, adapters_of, is_adapter
from penstock.models.lora_targets import LoraSpec, LoraTarget, lora_targets_of
from penstock.models.packed import by_row, pack
from penstock.models.weight_shapes import BaseDtype

DEVICES_THAT_UNPACK = ("cpu", "cuda", "meta")


# --- adapters ---------------------------------------------------------------------------------------------------------


def add_adapters(
    decoder: Decoder,
    spec: LoraSpec,
    *,
    base: str = "",
    digest: str = "",
    seed: int = 0,
    saved: AdapterFile | None = None,
) -> None:
    """Adds fresh adapters, or those that were `saved`, and freezes every other weight.

    base, digest: the base's address and the hash of its weights. Raises UserError for an impossible rank, for targets
    that match no weight and for a decoder that has adapters.
    """
    if decoder.adapted is not None:
        raise UserError("this model carries an adapter already, and takes one; penstock export --merge makes it one.")
    targets = lora_targets_of(decoder.config)
    wanted = [target for target in targets if spec.wants(target)]
    _check_targets(spec, targets, wanted)
    names = {target.theirs for target in wanted}
    decoder.requires_grad_(False)
    device = decoder.head_weight.device
    with torch.device("meta"):
        for target in wanted:
            holder: Any = decoder.get_submodule(target.ours)
            if holder.lora is None:
                holder.lora = nn.ModuleList()
            holder.lora.append(Adapter(target, spec, decoder.config, decoder.dtype))
            holder.lora[-1].wrapped = target.expert is not None and target.theirs.replace("gate_up", "down") in names
    decoder.adapted = Adapted(spec, base, saved, seed, digest=digest)
    if saved is not None:
        saved.check(decoder)
    if device.type != "meta":
        for adapter in adapters_of(decoder):
            adapter.to_empty(device=device)
        recipe.fill(decoder, {name: weight for name, weight in decoder.named_parameters() if is_adapter(name)})


def add_adapters_by_row(decoder: Decoder, adapters: Sequence[tuple[LoraSpec, AdapterFile]], *, base: str = "") -> None:
    """Adds several saved adapters to a decoder that answers: each row of a batch has one of them, by its number here,
    or none; `decoder.row_adapters` says which. Raises UserError as `add_adapters`, and for those that are more than
    additions to products of whole rows."""
    decoder.row_adapters = RowAdapters()
    digest = "" if decoder.source is None else decoder.source.digest()
    by_holder: dict[Any, AdaptersByRow] = {}
    for number, (spec, file) in enumerate(adapters):
        wanted = [target for target in lora_targets_of(decoder.config) if spec.wants(target)]
        what = "weights of the model's own beside its additions" if file.holds_more(decoder.config) else ""
        what = "additions to experts" if any(target.expert is not None for target in wanted) else what
        what = "additions to the token table" if any(target.ours == "embed" for target in wanted) else what
        if decoder.config.foreign:
            what = "additions to transformers' own layers"
        if what:
            raise UserError(
                f"{file.directory}: has {what}, which cannot differ from row to row of a batch; serve it as a model of "
                "its own, or penstock export --merge it."
            )
        add_adapters(decoder, spec, base=base, digest=digest, saved=file)
        holder: Any
        for holder in list(decoder.modules()):
            if getattr(holder, "lora", None) is not None:
                by_holder.setdefault(holder, AdaptersByRow(decoder.row_adapters))[str(number)] = holder.lora
                holder.lora = None
        decoder.adapted = None
    for holder, of_rows in by_holder.items():
        holder.lora = of_rows.requires_grad_(False)


def _check_targets(spec: LoraSpec, targets: Sequence[LoraTarget], wanted: Sequence[LoraTarget]) -> None:
    if not targets:
        raise UserError("--lora: no layer of this model is a linear one that adapters go beside; train it without.")
    if not wanted:
        known = ", ".join(sorted({target.theirs.rsplit(".", 1)[-1] for target in targets}))
        shown = spec.targets if isinstance(spec.targets, str) else " ".join(spec.targets)
        raise UserError(f"--lora-targets {shown}: matches no weight of this model; there are {known}, all-linear.")
    for target in wanted:
        if spec.rank_of(target) < 1:
            raise UserError(f"--lora {spec.rank_of(target)}: is no rank of {target.theirs}; give one from 1.")


def remove_adapters(decoder: Decoder) -> None:
    """Leaves the frozen base."""
    for holder in decoder.modules():
        if getattr(holder, "lora", None) is not None:
            holder.lora = None  # type: ignore[assignment]
    decoder.adapted = None


@torch.no_grad()
def merge_adapters(decoder: Decoder, *, keep: bool = True) -> None:
    """Adds the adapters' products to the weights, so that they cost no time. For decoders that are on one device whole.

    `keep`: keeps a copy of the weights, so that `unmerge_adapters` restores them bit by bit. A tied head or token table
    that is adapted becomes a weight of its own.
    """
    adapted = decoder.adapted
    if adapted is None or adapted.merged is not None:
        return
    if decoder.base_dtype is not None:
        raise ValueError(f"an adapter does not merge into {decoder.base_dtype} weights: load the base in full")
    if decoder.head is None and (decoder.lora is not None or getattr(decoder.embed, "lora", None) is not None):
        decoder.head = nn.Parameter(decoder.embed.tokens.detach().clone(), requires_grad=False)
        decoder.config = replace(decoder.config, tied=False)
    adapted.merged = {}
    holder: Any
    for name, holder in list(decoder.named_modules()):
        if not getattr(holder, "lora", None):
            continue
        weight = _adapted_weight(holder)
        if keep:
            adapted.merged[name] = weight.detach().clone(), holder.lora
        for adapter in holder.lora:
            delta = adapter.delta()
            rows = slice(adapter.target.start, adapter.target.start + len(delta))
            weight[rows] = (weight[rows].float() + delta).to(weight.dtype)
        holder.lora = None


@torch.no_grad()
def unmerge_adapters(decoder: Decoder) -> None:
    """Undoes `merge_adapters(keep=True)`. Raises ValueError where the weights were not kept."""
    adapted = decoder.adapted
    if adapted is None or adapted.merged is None:
        return
    if not adapted.merged:
        raise ValueError("the weights from before the merge were not kept: load the base again")
    for name, (weight, adapters) in adapted.merged.items():
        holder: Any = decoder.get_submodule(name)
        _adapted_weight(holder).copy_(weight)
        holder.lora = adapters
    adapted.merged = None


def _adapted_weight(holder: Any) -> nn.Parameter:
    """The weight that a module's adapters add to: of a product, the token table or the head."""
    candidates = (getattr(holder, name, None) for name in ("weight", "tokens", "head"))
    return next(weight for weight in candidates if isinstance(weight, nn.Parameter))


# --- packing ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantise(decoder: Decoder) -> None:
    """Replaces all products' weights, the token table and the head by int8, one after the other. Only for answering."""
    for module in decoder.modules():
        if isinstance(module, Linear) and not module.exact:
            module.weight, module.scales = _frozen(*by_row(module.weight, "int8"))
    decoder.embed.tokens, decoder.embed.scales = _frozen(*by_row(decoder.embed.tokens, "int8"))
    decoder.head_scales = decoder.embed.scales
    if decoder.head is not None:
        decoder.head, decoder.head_scales = _frozen(*by_row(decoder.head, "int8"))


@torch.no_grad()
def quantise_base(decoder: Decoder, dtype: BaseDtype) -> None:
    """Packs the weights of all blocks: the frozen base of adapters. Raises UserError as `check_packs`."""
    check_packs(decoder, dtype, decoder.head_weight.device.type, "--base-dtype")
    for module in decoder.blocks.modules():
        if isinstance(module, Linear) and not module.exact:
            module.weight, module.scales = _frozen(*pack(module.weight, dtype))
    decoder.base_dtype = dtype


def check_packs(decoder: Decoder, dtype: BaseDtype, device: str, flag: str) -> None:
    """Raises UserError for devices that cannot unpack a block's products, and for widths that do not pack."""
    if device not in DEVICES_THAT_UNPACK:
        raise UserError(f"{flag} {dtype}: not on {device}; it works on cpu and cuda. Leave it out.")
    for name, module in decoder.blocks.named_modules():
        odd = isinstance(module, Linear) and not module.exact and module.weight.shape[1] % 2
        if dtype == "nf4" and odd:
            raise UserError(f"{flag} nf4: {name} has {module.weight.shape[1]} inputs, which must be even.")


@torch.no_grad()
def packed_copy(decoder: Decoder, dtype: BaseDtype) -> Decoder:
    """A copy for answering, all of it on the device: the products of its blocks packed, all other weights as they are.

    The decoder's weights may move: each of them comes once, and no more are there at once than a visit needs.
    """
    stays = (decoder.source, decoder.adapted, decoder.slicer, *decoder.parameters())  # which are replaced below
    memo: dict[int, Any] = {id(each): each for each in stays}
    packed = copy.deepcopy(decoder, memo | {id(decoder.feed): ALWAYS_THERE})
    packed.base_dtype = dtype
    sources, targets, members = owners(decoder), owners(packed), dict(decoder.groups())
    parts = decoder.parts()
    decoder.feed.start(MOST_FEW + 1)  # so many tokens that every expert comes
    for groups in (*(part.groups for part in parts), decoder.reads()):
        with decoder.feed.visit(*groups):
            for name in (name for group in groups for name in members.pop(group, ())):
                weight, (module, own) = getattr(*sources[name]), targets[name]
                if name.startswith("blocks.") and isinstance(module, Linear) and own == "weight" and not module.exact:
                    module.weight, module.scales = _frozen(*pack(weight, dtype))
                else:
                    setattr(module, own, *_frozen(weight.detach().clone()))
    return packed


def _frozen(*tensors: torch.Tensor) -> tuple[nn.Parameter, ...]:
    return tuple(nn.Parameter(tensor, requires_grad=False) for tensor in tensors)
