"""What `penstock ppo` reads before it trains: four models, their tokenizers, prompts, demonstrations.

It checks that they fit together, and prepares nothing.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.algorithms.reward_source import RewardSource, check_room, reward_source
from penstock.algorithms.setup import adapter_options, check_adapter_learns, encoder_of, read, read_model
from penstock.config import PPOConfig
from penstock.data.chat import Encoder, Example
from penstock.errors import UserError
from penstock.memory.strategy import Strategy
from penstock.models.adapter_files import is_adapter_directory
from penstock.models.roles import Actor, ActorCritic, Critic
from penstock.run.directory import resolve_model
from penstock.run.session import Session


@dataclass(frozen=True)
class Inputs:
    """What a run reads before it writes anything."""

    models: dict[str, Any]
    """actor, reference, critic and reward, not yet prepared; without a critic where the actor has a value head,
    without a reward model where a function gives the scores."""
    source: RewardSource
    encoder: Encoder
    """The actor's."""
    records: list[Any]
    prompts: list[list[int]]
    """Token ids of the records."""
    demonstrations: list[Example]
    """Of the ptx loss."""


def check_flags(config: PPOConfig, ranks: int) -> None:
    """Raises UserError for flags that do not fit together."""
    if (config.reward is None) == (config.reward_fn is None):
        raise UserError("ppo needs one score: give either --reward (a reward model) or --reward-fn file.py:name.")
    if config.value_head and config.critic:
        raise UserError("--value-head and --critic: the critic is a head on the actor or a model; give one of the two.")
    if bool(config.ppo.ptx_coef) != bool(config.ptx_data):
        raise UserError("--ptx-coef and --ptx-data belong together: give both or neither.")
    if config.ppo.missing_eos_score is not None and config.ppo.missing_eos_penalty not in (None, 1.0):
        raise UserError("--missing-eos-score replaces --missing-eos-penalty: give one of the two.")
    if config.ppo.temperature <= 0:
        raise UserError("--temperature 0: PPO learns from sampled answers; give a temperature above 0, 1 is usual.")
    if config.optim.batch_size < ranks:
        raise UserError(f"--batch-size {config.optim.batch_size}: fewer episodes than the {ranks} ranks; give more.")


def read_inputs(config: PPOConfig, strategy: Strategy, session: Session) -> Inputs:
    """Models, prompts and demonstrations. Raises UserError or DataError for what does not fit."""
    actor, encoder = read_model(Actor, config.actor, config, strategy, session, config.ppo.max_new_tokens)
    source = reward_source(config, encoder, strategy, config.data, config.optim.micro_batch_size, session.say)
    with strategy.init():
        reference = read_reference(config, actor, encoder)
        critic = None if config.value_head else read_critic(config, actor, encoder, source)
        if config.value_head:
            actor = ActorCritic(actor.decoder)
    models = {"actor": actor, "reference": reference, "critic": critic, "reward": source.model}
    models = {role: model for role, model in models.items() if model is not None}
    records, prompts = read(session.say, encoder, config.data.data, "prompts", config.data)
    source.check(records, session.say)
    demonstrations: list[Example] = []
    if config.ppo.ptx_coef:
        demonstrations = read(session.say, encoder, config.ptx_data, "demonstrations", config.data)[1]
    if config.ppo.top_k or config.ppo.top_p < 1:
        truncation = f"top_k={config.ppo.top_k}, top_p={config.ppo.top_p}"
        session.say(f"rollouts are truncated ({truncation}): KL may turn negative")
    return Inputs(models, source, encoder, records, prompts, demonstrations)


def read_reference(config: PPOConfig, actor: Actor, encoder: Encoder) -> Actor:
    """The frozen model that KL is measured from: --reference, or a copy of the actor's start."""
    if not config.reference:
        return actor.frozen()
    address = resolve_model(config.reference)
    pickled, base_dtype = config.data.allow_pickle, config.peft.base_dtype
    reference = Actor.from_pretrained(address, allow_pickle=pickled, base_dtype=base_dtype)
    reference.eval().requires_grad_(False)
    check_role("reference", address, reference, encoder, config)
    return reference


def read_critic(config: PPOConfig, actor: Actor, encoder: Encoder, source: RewardSource) -> Critic:
    """--critic, or the reward model where it reads the actor's tokens, or the actor with a zero head."""
    address = config.critic or (config.reward if source.reads_actor_tokens else None)
    if address is None:
        return Critic(copy.deepcopy(actor.decoder))
    address = resolve_model(address, "critic")
    options = {**adapter_options(config.peft, config.run.seed + 1), "adapter": None}
    if is_adapter_directory(Path(address)):
        options["lora"] = None  # the adapter that it has learns on
    critic = Critic.from_pretrained(address, allow_pickle=config.data.allow_pickle, **options)
    check_adapter_learns(critic, config.peft)
    check_role("critic", address, critic, encoder, config)
    return critic


def check_role(flag: str, address: str, role: Actor | Critic, encoder: Encoder, config: PPOConfig) -> None:
    """Raises UserError when a model does not read the actor's tokens, or not so many of them."""
    check_room(flag, address, role.decoder.config, encoder)
    role_encoder = encoder_of(address, role.decoder.config, config.data, task="judge")
    if role.decoder.config.vocab_size < encoder.vocab_size or not role_encoder.same_tokenizer(encoder):
        raise UserError(f"--{flag} {address}: has another tokenizer than the actor, and the two must share one.")
