"""`penstock doctor MODEL`: what a checkpoint is, what of a conversation it would learn, and what fits this machine."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from penstock.algorithms.setup import encoder_of, placed
from penstock.commands.drawing import LEARNED, drawn
from penstock.commands.plan import short
from penstock.config import DataFlags, RunFlags
from penstock.data.chat import Encoder
from penstock.data.records import Demonstration
from penstock.distributed.world import device_types
from penstock.errors import DataError, UserError
from penstock.kernels.machine import available_ram
from penstock.memory.placement import TierName
from penstock.models import pretrained, weight_shapes
from penstock.models.config import DecoderConfig
from penstock.models.foreign.family import path_of
from penstock.planner.config import PlanConfig
from penstock.planner.from_flags import setting_of
from penstock.planner.workload import forecast_of
from penstock.run.directory import resolve_model
from penstock.units import show_bytes

CONVERSATION = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6."},
)
STAGES = (
    ("sft, all weights", {"stage": "sft"}),
    ("sft --lora 16", {"stage": "sft", "lora": 16}),
    ("dpo --lora 16", {"stage": "dpo", "lora": 16}),
    ("grpo --lora 16", {"stage": "grpo", "lora": 16, "reward_model": False}),
    ("ppo, all weights", {"stage": "ppo"}),
    ("ppo --lora 16", {"stage": "ppo", "lora": 16}),
    ("... --base-dtype nf4", {"stage": "ppo", "lora": 16, "base_dtype": "nf4"}),
)
"""What is asked of the plan, with its own batches."""


def describe(source: str) -> list[str]:
    """The lines about a model. Raises UserError for one that cannot be read."""
    address = resolve_model(source)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decoder, extras = pretrained.load(address, device="meta")
    notes = [str(warning.message) for warning in caught]
    lines = [*facts_of(decoder), *(f"head         {name} {list(weight.shape)}" for name, weight in extras.items())]
    try:
        encoder = encoder_of(address, decoder.config, DataFlags(data=()), task="answer")
    except UserError as error:
        return [*lines, f"unusual      {error}"]
    lines += tokens_of(encoder)
    notes += encoder.take_notes()
    return [*lines, *(f"unusual      {note}" for note in dict.fromkeys(notes)), *fits(address, decoder.config)]


def facts_of(decoder: Any) -> Iterator[str]:
    """What its config and the headers of its files say."""
    c: DecoderConfig = decoder.config
    count = sum(parameter.numel() for parameter in decoder.parameters())
    dtype = str(c.hf.get("dtype") or c.hf.get("torch_dtype") or decoder.dtype).removeprefix("torch.")
    yield f"family       {c.family}, {': '.join(path_of(c.hf)) if c.hf else 'native'}"
    yield f"parameters   {count:,} ({show_bytes(count * 2)} in bf16); the file says {dtype}"
    if c.num_experts:
        active = weight_shapes.count_of(c, scalar=False, active=True)
        yield f"experts      {c.num_experts} a block, {c.experts_per_token} for a token: {active:,} parameters active"
    if c.foreign is not None:
        yield f"layers       {c.num_layers} of width {c.d_model}"
        yield f"context      {c.max_length:,} tokens"
        yield f"vocabulary   {c.vocab_size:,}"
        return
    yield f"layers       {c.num_layers} of {c.d_model}, {c.num_heads} heads of {c.head_dim} over {c.num_kv_heads}"
    yield f"context      {c.max_length:,} tokens, {positions_of(c)}"
    if c.declared_length > c.max_length:
        yield f"unusual      config.json says {c.declared_length:,} tokens; in longer rows all angles would change"
    if any(c.windows):
        narrow = [window for window in c.windows if window]
        yield f"attention    {len(narrow)} of {c.num_layers} layers see the latest {max(narrow):,} tokens"
    yield f"vocabulary   {c.vocab_size:,}, head {'tied to the embedding' if c.tied else 'of its own'}"


def positions_of(c: DecoderConfig) -> str:
    """Kind of positions in words."""
    if c.position != "rotary":
        return f"{c.position} positions"
    scaling = dict(c.rope_scaling)
    kind = scaling.pop("rope_type", "no scaling")
    numbers = "".join(f", {name} {value}" for name, value in scaling.items() if isinstance(value, int | float))
    share = "" if c.rotary_dim == c.head_dim else f", {c.rotary_dim} of {c.head_dim} dimensions"
    return f"rope theta {c.rope_theta:g}, {kind}{numbers}{share}"


def tokens_of(encoder: Encoder) -> Iterator[str]:
    """Tokenizer, template, ends, and a conversation with what is learned of it."""
    tokenizer = encoder.tokenizer
    if tokenizer is None:
        yield "tokenizer    none: data must be token ids"
        return
    yield f"tokenizer    {type(tokenizer).__name__}, {len(tokenizer):,} tokens"
    ends = [f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in encoder.eos_ids]
    yield f"ends         {', '.join(ends) or 'none: give --eos TOKEN'}"
    template = encoder.template
    whose = "the tokenizer's own" if template.own else "none; penstock's plain one stands in"
    yield f"template     {whose}, {'a' if template.takes_system else 'no'} system role"
    if not encoder.eos_ids:
        return
    yield f"learned      a conversation as sft reads it; {LEARNED.format('so')} is what is learned:"
    try:
        rows = encoder.encode_rows(Demonstration(where="the example", messages=CONVERSATION))
    except DataError as error:
        yield f"unusual      {error}"
        return
    for row in rows:
        yield from ("             " + line for line in drawn(tokenizer, row.tokens, row.trained).splitlines())


def fits(address: str, c: DecoderConfig) -> Iterator[str]:
    """What the plan says of this machine's memory, with the plan's own batches."""
    flags = placed(RunFlags(out=""))
    budgets = memory()
    prompt = min(PlanConfig.prompt_length, c.max_length // 2)
    sizes = {"prompt_length": prompt, "max_new_tokens": min(PlanConfig.max_new_tokens, c.max_length - prompt)}
    common = {"model": address, "strategy": flags.strategy, "dtype": flags.dtype, **sizes}
    common |= {f"{tier}_memory": str(nbytes) for tier, nbytes in budgets.items()}
    names = {tier: f" of {tier}" if len(budgets) > 1 else "" for tier in budgets}
    free = " and ".join(f"{show_bytes(nbytes)}{names[tier]}" for tier, nbytes in budgets.items())
    yield f"fits         within {free} memory, --strategy {flags.strategy} --dtype {flags.dtype}, by penstock plan:"
    for label, changes in STAGES:
        options: Any = common | changes
        try:
            setting = setting_of(PlanConfig(**options))
            forecast = forecast_of(setting, timed=False)
        except UserError as error:
            yield f"             no plan: {error}"
            return
        peaks = " and ".join(f"{show_bytes(forecast.peak[tier])}{names[tier]}" for tier in budgets)
        yield f"             {label:22} {'does not fit:' if short(forecast, setting) else 'fits:'} {peaks}"


def memory() -> dict[TierName, int]:
    """Free bytes by tier. On a CPU the device's memory is the host's."""
    if device_types()[-1] != "cuda":
        return {"device": available_ram()}
    return {"device": torch.cuda.mem_get_info()[0], "host": available_ram()}
