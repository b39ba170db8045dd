"""What PPO and GRPO read before they train: models, their tokenizers, prompts, demonstrations.

It checks that they fit together, and prepares nothing.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.algorithms.heldout import Rows, read_sides
from penstock.algorithms.reward_source import RewardSource, check_room, reward_source, scorable
from penstock.algorithms.setup import adapter_options, check_adapter_learns, encoder_of, read, read_model
from penstock.config import PPOConfig
from penstock.data import formats
from penstock.data.chat import Encoder, Example
from penstock.data.records import Kind
from penstock.errors import DataError, UserError
from penstock.memory.placement import known, refused
from penstock.memory.strategy import Strategy
from penstock.models.adapter_files import is_adapter_directory
from penstock.models.roles import Actor, ActorCritic, Critic
from penstock.models.surgery import check_packs
from penstock.run.directory import RunDirectory, resolve_model
from penstock.run.session import Session


@dataclass(frozen=True)
class Inputs:
    """What a run reads before it writes anything."""

    models: dict[str, Any]
    """actor, reference, critic and reward, not yet prepared; without a critic where the actor has a value head or the
    algorithm none, without a reward model where a function gives the scores."""
    source: RewardSource
    encoder: Encoder
    """The actor's."""
    records: list[Any]
    prompts: list[list[int]]
    """Token ids of the records."""
    demonstrations: list[Example]
    """Of the ptx loss."""
    heldout: Rows
    """Records and token ids of the prompts that are evaluated."""


def check_flags(config: PPOConfig, ranks: int) -> None:
    """Raises UserError for flags of PPO that do not fit together."""
    check_rollout("ppo", config, ranks)
    if config.value_head and config.critic:
        raise UserError("--value-head and --critic: the critic is a head on the actor or a model; give one of the two.")
    if bool(config.ppo.ptx_coef) != bool(config.ptx_data):
        raise UserError("--ptx-coef and --ptx-data belong together: give both or neither.")
    if config.ppo.kl_target is not None and not config.ppo.kl_coef:
        raise UserError("--kl-target steers --kl-coef by factors, and 0 stays 0; give a --kl-coef above 0.")
    if config.ppo.kl_loss_coef and config.ppo.kl_estimator == "k1":
        raise UserError(K1_IN_LOSS.format(flag="--kl-loss-coef"))


K1_IN_LOSS = "{flag}: k1's gradient in a loss is 0 on average; give --kl-estimator k2 or k3."


def check_rollout(command: str, config: Any, ranks: int) -> None:
    """Raises UserError for flags of what samples and scores answers that do not fit together."""
    flags = config.rollout
    config.need_score(command)
    if flags.missing_eos_score is not None and flags.missing_eos_penalty not in (None, 1.0):
        raise UserError("--missing-eos-score replaces --missing-eos-penalty: give one of the two.")
    if flags.min_new_tokens > flags.max_new_tokens:
        raise UserError(f"--min-new-tokens {flags.min_new_tokens}: more than --max-new-tokens allows.")
    if flags.temperature <= 0:
        raise UserError("--temperature 0: it learns from sampled answers; give a temperature above 0, 1 is usual.")
    if flags.rollout_dtype is not None:
        check_copy(flags.rollout_dtype, config, ranks)
    elif getattr(flags, "importance_sampling_cap", None) is not None:
        raise UserError("--importance-sampling-cap: is for answers of a copy; give --rollout-dtype int8 too.")
    if config.optim.batch_size < ranks:
        raise UserError(f"--batch-size {config.optim.batch_size}: fewer episodes than the {ranks} ranks; give more.")


def check_copy(dtype: str, config: Any, ranks: int) -> None:
    """Raises UserError where no copy of the actor can answer."""
    if config.peft.base_dtype is not None:
        raise UserError(
            f"--rollout-dtype {dtype} with --base-dtype {config.peft.base_dtype}: the blocks are packed already; leave "
            "one of the two out."
        )
    if config.run.strategy and (reason := refused(known(config.run.strategy), ranks, copies=True)):
        raise UserError(reason)


def read_inputs(config: Any, strategy: Strategy, session: Session) -> Inputs:
    """Models, prompts and demonstrations; a critic for PPO alone. Raises UserError or DataError for what is wrong."""
    flags, value_head = config.rollout, getattr(config, "value_head", False)
    actor, encoder = read_model(Actor, config.actor, config, strategy, session, flags.max_new_tokens)
    if flags.rollout_dtype is not None:
        if actor.decoder.config.foreign:
            raise UserError(
                f"--rollout-dtype {flags.rollout_dtype}: the layers of {actor.decoder.config.family} are transformers' "
                "own, and a copy is made of ours; leave it out."
            )
        check_packs(actor.decoder, flags.rollout_dtype, strategy.world.device.type, "--rollout-dtype")
    size, base_dtype = config.optim.micro_batch_size, config.peft.base_dtype
    source = reward_source(config, encoder, strategy, config.data, size, session.say, base_dtype)
    with strategy.init():
        reference = read_reference(config, actor, encoder, session)
        critic = None
        if value_head:
            actor = ActorCritic(actor.decoder)
        elif isinstance(config, PPOConfig):
            critic = read_critic(config, actor, encoder, source, session)
    models = {"actor": actor, "reference": reference, "critic": critic, "reward": source.model}
    models = {role: model for role, model in models.items() if model is not None}
    fewest = max(FEWEST, strategy.world.size)
    sides = read_sides(session, encoder, "prompts", config, fewest=fewest, reads=source.reads_field)
    source.check([record for side, _ in sides for record in side], session.say)
    (records, prompts), heldout = (scorable(side, source, config.data, session.say) for side in sides)
    if 0 < len(heldout[1]) < strategy.world.size:
        raise UserError(f"held-out prompts: {len(heldout[1])} for {strategy.world.size} ranks; give each rank one.")
    compare_stages(records, config, session)
    demonstrations: list[Example] = []
    if ptx_data := getattr(config, "ptx_data", ()):
        demonstrations = read(session.say, encoder, ptx_data, "demonstrations", config.data)[1]
    if flags.stop and encoder.tokenizer is None:
        raise UserError(f"--stop {flags.stop[0]}: is a text, and the actor has no tokenizer to find it with.")
    given = [f"{name}={getattr(flags, name)}" for name, off in PLAIN.items() if getattr(flags, name) != off]
    if given:
        session.say(f"rollouts are truncated ({', '.join(given)}): KL may turn negative")
    return Inputs(models, source, encoder, records, prompts, demonstrations, heldout)


PLAIN = {"top_k": 0, "top_p": 1.0, "min_new_tokens": 0}
"""Of the flags that sample from less than the model: the values that do not."""
FEWEST = 4
"""Prompts whose mean score says anything; where --heldout is fewer, nothing is evaluated."""


def compare_stages(records: Sequence[Any], config: Any, session: Session) -> None:
    """Says how many prompts the actor or the reward model were trained on: their data is in their run directories."""
    keys = {record.prompt_key for record in records}
    for flag, run in (("actor", config.actor), ("reward", config.reward)):
        if run is None or not (Path(run) / "config.toml").exists():
            continue
        saved = RunDirectory.peek(run)
        kinds: dict[str, Kind] = {"reward": "comparisons", "dpo": "comparisons", "kto": "votes"}
        kind = kinds.get(saved["command"], "demonstrations")
        if saved["command"] in ("ppo", "grpo") or saved.get("online"):
            continue  # on prompts, and on these perhaps for the second time
        pairs = formats.parse_keys(tuple(saved.get("keys", ())))
        try:
            seen = {
                record.prompt_key
                for record in formats.read(saved.get("data", []), kind, keys=pairs, skip_bad=True).records
            }
        except (DataError, UserError):
            session.say(f"--{flag} {run}: its data cannot be read any more, and is not compared with these prompts")
            continue
        if shared := len(keys & seen):
            session.warn(f"duplicate prompts: {shared} of {len(keys)} were in the data of --{flag} {run} as well")


def read_reference(config: Any, actor: Actor, encoder: Encoder, session: Session) -> Actor | None:
    """The frozen model that KL is measured from: --reference, or a copy of the actor's start where KL is used."""
    if not config.reference:
        if config.rollout.kl_coef or getattr(config.rollout, "kl_loss_coef", 0.0):
            return actor.frozen()
        if config.rollout.kl_coef is None:
            return None  # a loss that knows no reference
        session.say("--kl-coef 0: no reference is loaded, KL is not measured; --reference MODEL measures it")
        return None
    return load_reference(config, encoder)


def load_reference(config: Any, encoder: Encoder) -> Actor:
    """The model that --reference names, frozen."""
    address = resolve_model(config.reference)
    pickled, base_dtype = config.data.allow_pickle, config.peft.base_dtype
    reference = Actor.from_pretrained(address, allow_pickle=pickled, base_dtype=base_dtype)
    reference.eval().requires_grad_(False)
    check_role("reference", address, reference, encoder, config)
    return reference


def read_critic(config: PPOConfig, actor: Actor, encoder: Encoder, source: RewardSource, session: Session) -> Critic:
    """--critic, or the reward model where the actor's ids mean the same to it, or the actor with a zero head."""
    address = config.critic or (config.reward if source.starts_critic else None)
    if address is None:
        why = "there is no reward model"
        if config.reward is not None:
            why = f"{config.reward} has another vocabulary or fewer positions, or is not the only reward"
        session.say(f"the critic starts as --actor with a zero head, because {why}; --critic names another")
        return Critic(copy.deepcopy(actor.decoder))
    session.say(f"the critic starts as {address}")
    address = resolve_model(address, "critic")
    options = {**adapter_options(config.peft, config.run.seed + 1), "adapter": None}
    if is_adapter_directory(Path(address)):
        options["lora"] = None  # the adapter that it has learns on
    critic = Critic.from_pretrained(address, allow_pickle=config.data.allow_pickle, **options)
    check_adapter_learns(critic, config.peft)
    check_role("critic", address, critic, encoder, config)
    return critic


def check_role(flag: str, address: str, role: Actor | Critic, encoder: Encoder, config: Any) -> None:
    """Raises UserError when a model does not read the actor's tokens, or not so many of them."""
    check_room(flag, address, role.decoder.config, encoder)
    role_encoder = encoder_of(address, role.decoder.config, config.data, task="judge")
    if role.decoder.config.vocab_size < encoder.vocab_size or not role_encoder.same_ids(encoder):
        raise UserError(
            f"--{flag} {address}: has another tokenizer than the actor, and the two must share one: it reads ids."
        )
