"""What every training command sets up: strategy, model and encoder, records with their tokens, room for activations."""

import contextlib
import contextvars
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from penstock.algorithms import functional as fn
from penstock.config import ADAPTER_LR, DataFlags, EngineFlags, LoraFlags, OptimFlags, RunFlags, recompute_of
from penstock.data import formats
from penstock.data.chat import Encoder, Task
from penstock.data.formats import Reads, reads_none
from penstock.data.limits import TooLongError
from penstock.data.records import Kind
from penstock.distributed.world import device_types
from penstock.errors import DataError, ResourceError, UserError
from penstock.memory.placement import AUTO, PYTORCH
from penstock.memory.prepare import groups_of
from penstock.memory.strategy import DTYPES, Strategy
from penstock.memory.stream import Stream
from penstock.memory.tiers import Ram
from penstock.models import pretrained
from penstock.models.config import DecoderConfig
from penstock.models.linear import arithmetic_of
from penstock.models.lora_targets import ALL_LINEAR, LoraSpec
from penstock.models.roles import ScalarModel
from penstock.planner import cuda
from penstock.planner.from_flags import elements_of
from penstock.planner.machine import known_rates
from penstock.planner.workload import RoleSpec, Setting, Workload, forecast_of, notes
from penstock.rollout.engine import Answer
from penstock.run.directory import resolve_model
from penstock.run.session import Session
from penstock.units import show_bytes

NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
Flags = TypeVar("Flags", bound=EngineFlags)


def placed(flags: Flags) -> Flags:
    """With the strategy and the dtype that suit the device, where none is given: what config.toml holds, so that a run
    resumes on another machine as it began."""
    types = device_types()
    kind = (flags.device or types[-1]).partition(":")[0]
    accelerated = kind in types[1:]
    has_bf16 = accelerated and (kind != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False))
    return dataclasses.replace(
        flags,
        strategy=flags.strategy or (AUTO if accelerated else "ddp"),
        dtype=flags.dtype or ("bf16" if has_bf16 else "fp32"),
    )


def strategy_of(flags: EngineFlags) -> Strategy:
    """The strategy that a command's flags name. On a GPU fp32 products are TF32 from then on."""
    flags = placed(flags)
    assert flags.strategy is not None
    assert flags.dtype is not None
    if flags.dtype == "fp32" and (flags.device or device_types()[-1]).startswith("cuda"):
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    names = ("dtype", "device", "device_memory", "host_memory", "disk", "activation_budget")
    options: dict[str, Any] = {name: getattr(flags, name, None) for name in names}
    chunk_size = elements_of(flags.chunk_size, flags.dtype)
    options["padding_free"] = getattr(flags, "padding_free", False)
    return Strategy.named(flags.strategy, recompute=recompute_of(flags), chunk_size=chunk_size, **options)


def adapter_options(flags: LoraFlags, seed: int) -> dict[str, Any]:
    """Arguments of a role's `from_pretrained`: the whole model learns, a new adapter, or a saved one."""
    spec = None
    if flags.lora is not None:
        spec = LoraSpec(flags.lora, flags.lora_alpha, flags.lora_targets or ALL_LINEAR, flags.rslora)
    elif flags.lora_alpha is not None or flags.lora_targets or flags.rslora:
        raise UserError("--lora-alpha, --lora-targets and --rslora shape a new adapter: give its rank too, --lora 16.")
    adapter = None if flags.adapter is None else resolve_model(flags.adapter)
    if flags.num_layers_unfrozen is not None and (spec or adapter):
        raise UserError("--num-layers-unfrozen: under an adapter no block learns; give one of the two.")
    trained = {"lora": spec, "adapter": adapter, "unfrozen": flags.num_layers_unfrozen}
    options = {"base_dtype": flags.base_dtype, "router_aux_loss_coef": flags.router_aux_loss_coef}
    return {**trained, **options, "seed": seed}


def read_model(role: Any, source: str, config: Any, strategy: Strategy, session: Session, reserve: int = 1) -> Any:
    """The model that a command trains, of this role's class, and its encoder; the session keeps the tokenizer."""
    address, options = resolve_model(source), adapter_options(config.peft, config.run.seed)
    with strategy.init():
        model = role.from_pretrained(address, allow_pickle=config.data.allow_pickle, **options)
    if strategy.world.device.type != "cpu":
        narrows = strategy.world.device.type == "cuda" and strategy.dtype == torch.float32
        products = ", products in TF32" if narrows else ""
        session.say(f"{strategy.world.device}: --strategy {strategy.name} --dtype {NAME_OF[strategy.dtype]}{products}")
    check_adapter_learns(model, config.peft)
    encoder = encoder_of(address, model.decoder.config, config.data, reserve=reserve)
    session.finishing = functools.partial(
        pretrained.copy_tokenizer, address, eos_ids=encoder.eos_ids, template=encoder.template
    )
    say_lr(model.decoder.adapted is not None, config, session)
    say_padding(model.decoder.config, config.run, session)
    say_placement(strategy, config.run, session)
    return model, encoder


def say_placement(strategy: Strategy, run: RunFlags, session: Session) -> None:
    """Says which flags the strategy has no use for."""
    if run.disk and "disk" not in strategy.tiers:
        session.say(f"--disk {run.disk}: --strategy {strategy.name} keeps nothing on a disk, and does not use it")
    if strategy.name == "hsdp" and 1 < strategy.world.size == strategy.world.local_size:
        session.say("--strategy hsdp: all ranks are on one machine (LOCAL_WORLD_SIZE), so it is what fsdp is")


def say_padding(config: DecoderConfig, run: RunFlags, session: Session) -> None:
    """Says where --padding-free changes nothing."""
    if run.padding_free and (config.foreign or run.activation_budget):
        what = (
            f"the layers of {config.family} are transformers' own" if config.foreign else "blocks are cut into slices"
        )
        session.say(f"rows of a micro-batch are padded: {what}, and --padding-free does not reach them")


def say_lr(adapts: bool, config: Any, session: Session) -> None:
    """Says when the default learning rate is an adapter's, or when it should be."""
    lr, full = config.optim.lr, type(config).LR
    if not adapts:
        return
    if math.isclose(lr, ADAPTER_LR * full):
        session.say(f"--lr {lr:g}: the default for an adapter, {ADAPTER_LR} times that of a whole model")
    elif lr <= full:
        session.warn(f"learning rate: an adapter learns little at --lr {lr:g}; {ADAPTER_LR * full:g} is usual")


LEAST_UPDATES = 10
"""At a command's own learning rate; runs that are known to learn make hundreds."""
_TRIAL = contextvars.ContextVar("trial", default=False)


@contextlib.contextmanager
def trial() -> Iterator[None]:
    """Inside, runs are short on purpose, and none is warned of."""
    token = _TRIAL.set(True)
    try:
        yield
    finally:
        _TRIAL.reset(token)


def say_length(config: Any, updates: int, session: Session, *, rows: int | None = None, per_step: int = 1) -> None:
    """Warns of a run whose updates together move the weights little. `rows`: of the data, where --epochs are passes
    over it; `per_step`: updates in one of --steps."""
    if not _TRIAL.get() and (text := too_short(config, updates, rows, per_step)):
        session.warn(f"short run: {text}")


def too_short(config: Any, updates: int, rows: int | None = None, per_step: int = 1) -> str:
    """What a run lacks whose weights hardly move, with the nearest ways to mend it; empty for any other. `rows` and
    `per_step` as in `say_length`.

    In an update AdamW moves a weight by about its learning rate at most (Kingma & Ba 2015, section 2.1), so in a run by
    the sum of the rates, which is compared with that of LEAST_UPDATES at the command's own rate.
    """
    optim: OptimFlags = config.optim
    adapts = config.peft.lora is not None or config.peft.adapter is not None
    own = config.LR * (ADAPTER_LR if adapts else 1)

    def reach_of(rate: float, count: int) -> float:
        return rate * fn.lr_sum(count, optim.warmup, optim.lr_schedule)

    least, reach = reach_of(own, LEAST_UPDATES), reach_of(optim.lr, updates)
    if reach >= least * (1 - 1e-9):
        return ""
    wanted = math.ceil(1.01 * least / reach_of(optim.lr, 1000) * 1000)  # the ends of a schedule are less than that
    while wanted <= 1000 and reach_of(optim.lr, wanted - 1) >= least * (1 - 1e-9):
        wanted -= 1
    ways = [f"--steps {math.ceil(wanted / per_step)}"]
    if rows is not None and optim.steps is None:
        ways = [f"--epochs {math.ceil(wanted * optim.batch_size / rows)}"]
        if batch_size := optim.epochs * rows // wanted:
            ways.append(f"--batch-size {batch_size}")
    digits = -math.floor(math.log10(optim.lr * least / reach))
    ways.append(f"--lr {math.ceil(optim.lr * least / reach * 10**digits) / 10**digits:g}")
    return (
        f"{updates} updates at --lr {optim.lr:g} move no weight by more than about {reach:.1g} together, which "
        f"teaches little: {LEAST_UPDATES} at {own:g} would do. Give {' or '.join(ways)}, or more data"
    )


def prepare(stage: str, model: Any, strategy: Strategy, optim: OptimFlags, rows: int, longest: int) -> Stream:
    """Gives the one model of a stage its homes: `rows` of at most `longest` tokens per optimizer step."""
    specs = role_specs({"model": model})
    reserve_activations(strategy, Workload(stage, specs, rows, optim.micro_batch_size, rows, 1, longest, 0))
    return strategy.prepare(model, **optim.adamw)


def check_adapter_learns(model: Any, flags: LoraFlags) -> None:
    """Raises UserError for packed weights without an adapter that learns in their place."""
    if flags.base_dtype is not None and model.decoder.adapted is None:
        raise UserError(
            f"--base-dtype {flags.base_dtype}: packed weights cannot learn; give an adapter that does: --lora 16."
        )


def reserve_activations(strategy: Strategy, work: Workload) -> Ram | None:
    """Makes the strategy leave as much of a device budget to activations as the plan says this work needs.

    Call it before the models are prepared. Returns the host tier if the KV cache must be swapped to it.
    """
    budget = strategy.tiers["device"].budget
    if budget is None:
        return None
    setting = setting_of(strategy, work)
    # The first rank's: others may have measured other rates, and ranks must cut slots alike to gather in one order.
    planned = strategy.world.broadcast(forecast_of(setting))
    for note in notes(setting):
        warnings.warn(note, stacklevel=2)
    most = max(phase["device"] for phase in planned.phases.values())
    if strategy.name in PYTORCH and strategy.world.size > 1 and most > budget:  # FSDP2 knows no budgets
        raise ResourceError(
            f"--device-memory {show_bytes(budget)}: under --strategy {strategy.name} each rank needs "
            f"{show_bytes(most)}; give that, more ranks, a smaller --micro-batch-size, or --strategy gemini_cpu."
        )
    strategy.reserve, strategy.recompute, strategy.swapped = planned.activations, planned.recompute, planned.swapped
    strategy.few_tokens, strategy.gathers_once = planned.few_tokens, planned.gathers_once
    strategy.offloaded, strategy.further = planned.offloaded, planned.further
    host = strategy.tiers["host"]
    return host if planned.swapped and isinstance(host, Ram) else None


def setting_of(strategy: Strategy, work: Workload) -> Setting:
    """The work under a strategy that exists: its budgets, its ranks, its kind of device."""
    dtype, world = NAME_OF[strategy.dtype], strategy.world
    budgets: Any = {name: tier.budget for name, tier in strategy.tiers.items()}
    limits: Any = {"chunk_size": strategy.chunk_size, "activation_budget": strategy.activation_budget}
    limits |= {"arithmetic": arithmetic_of(world.device.type), "rates": known_rates(dtype)}
    limits |= {"nodes": max(world.size // world.local_size, 1)}
    if world.device.type == "cuda":
        limits["blas_workspace"] = cuda.workspace_of(budgets["device"])
    return Setting(work, strategy.name, dtype, world.size, budgets, strategy.recompute, **limits)


def role_specs(models: Mapping[str, Any]) -> tuple[RoleSpec, ...]:
    """The models by role, before they are prepared, as the plan sees them."""
    specs = []
    for name, model in models.items():
        decoder, scalar = model.decoder, isinstance(model, ScalarModel)
        trained = any(parameter.requires_grad for parameter in model.parameters())
        adapter = decoder.adapted.spec if decoder.adapted else None
        groups = tuple((group, tuple(weights)) for group, weights in groups_of(model))
        base_dtype = decoder.base_dtype
        specs.append(RoleSpec(name, decoder.config, trained, scalar, adapter, base_dtype=base_dtype, groups=groups))
    return tuple(specs)


def encoder_of(
    source: str, config: DecoderConfig, flags: DataFlags, *, reserve: int = 1, task: Task = "train"
) -> Encoder:
    """The model's own tokenizer and template; rows never longer than the model's positions.

    `reserve` tokens are kept free behind a prompt for the response. `task` as in `Encoder.for_model`.
    """
    limits: Any = {"max_length": min(flags.max_length, config.max_length), "reserve": reserve}
    facts: Any = {"eos_ids": config.eos_ids, "vocab_size": config.vocab_size}
    return Encoder.for_model(source, **facts, **limits, flags=flags, task=task)


def read(
    say: Callable[[str], None], encoder: Encoder, files: Sequence[str], kind: Kind, flags: DataFlags,
    reads: Reads = reads_none,
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    """The records of the files and the tokens of each; `say` gets which format was detected, what was left out, what
    was cut and what was not read. `reads`: which other fields of prompts are read, by a reward function.

    The tokens of a record are an Example (demonstrations, votes), a prompt's ids, or a prompt's and its responses' ids,
    by `kind`; a record of several rows stands there several times.
    Raises DataError for records that do not fit the model, unless `--skip-bad` leaves them out.
    """
    records, encoded, bad = read_all(say, encoder, files, kind, flags, reads)
    if bad and not flags.skip_bad:
        raise DataError(formats.list_bad(bad))
    if not records:
        raise DataError(f"{', '.join(files)}: no record is left; see above." + "".join(f" {line}" for line in bad[:1]))
    if bad:
        whole = len(bad) + len({record.where for record in records})
        say(f"--skip-bad left out {len(bad)} of {whole} records, the first: {bad[0]}")
    return records, encoded


def read_all(
    say: Callable[[str], None], encoder: Encoder, files: Sequence[str], kind: Kind, flags: DataFlags,
    reads: Reads = reads_none,
) -> tuple[list[Any], list[Any], list[str]]:  # fmt: skip
    """As `read`; and each bad line, whether it is one of the file or does not fit the model."""
    keys = formats.parse_keys(flags.keys)
    dataset = formats.read(files, kind, keys=keys, skip_bad=flags.skip_bad, reads=reads)
    say(dataset.decision)
    records, encoded, bad, long = encode_all(encoder, dataset.records, kind)
    if long:
        say(f"--truncate drop left out {len(long)} of {len(dataset.records)} {kind}, the first: {long[0]}")
    for line in encoder.take_notes():
        say(line)
    return records, encoded, [*dataset.bad, *bad]


def encode_all(
    encoder: Encoder, records: Sequence[Any], kind: Kind
) -> tuple[list[Any], list[Any], list[str], list[str]]:
    """The records and the tokens of each, as `read` returns them; a line for each that does not fit the model, and for
    each that is only too long and may be left out."""
    encoders: dict[Kind, Callable[[Any], list[Any]]] = {
        "demonstrations": encoder.encode_rows,
        "comparisons": lambda record: [encoder.encode_comparison(record)],
        "votes": lambda record: [encoder.encode_vote(record)],
        "prompts": lambda record: [encoder.encode_prompt(record)],
    }
    kept, encoded, bad, long = [], [], list[str](), list[str]()
    for record in records:
        try:
            rows = encoders[kind](record)
            encoded += rows
            kept += [record] * len(rows)
        except DataError as error:
            drops = isinstance(error, TooLongError) and encoder.flags.truncate == "drop"
            (long if drops else bad).append(str(error))
    return kept, encoded, bad, long


def sample_rows(
    encoder: Encoder, answers: Sequence[Answer], scores: Sequence[float] | None = None, *, kind: str
) -> list[dict[str, Any]]:
    """Answers as samples.jsonl holds them: text where there is a tokenizer, ids where there is none.

    `kind` is greedy (the same prompts before and after training) or rollout (what PPO sampled to learn from).
    """
    rows: list[dict[str, Any]] = []
    for i, answer in enumerate(answers):
        prompt, response = encoder.decode(answer.prompt_ids), encoder.decode(answer.response_ids)
        if encoder.tokenizer is None:
            prompt, response = str(answer.prompt_ids), str(answer.response_ids)
        row = {"kind": kind, "prompt": prompt, "response": response, "finish_reason": answer.finish_reason}
        rows.append(row if scores is None else {**row, "score": scores[i]})
    return rows
