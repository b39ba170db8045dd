"""Every command's flags: one frozen dataclass per command, each field's docstring its --help line.

No torch in here, so that `penstock ppo --help` answers at once. A group of flags that several commands share is a
dataclass of its own; on the command line and in TOML files all names are flat (`--lr`, `lr = 1e-5`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from penstock.errors import UserError

RANGES: list[tuple[str, Callable[[Any], bool], str]] = [
    # (what it must be, the check, the flags); nan passes none of them
    ("at least 1", lambda x: x >= 1, "batch_size micro_batch_size mini_batch_size rollout_batch_size epochs "
     "steps checkpoint_every eval_every max_length max_new_tokens n seeds world prompt_length lora "
     "num_layers_unfrozen experience_batch_size train_batch_size num_episodes max_timesteps update_timesteps "
     "max_epochs iterations layers prompts repeats rows queue per_key threads"),
    ("0 or more", lambda x: 0 <= x < math.inf, "keep samples top_k kl_coef weight_decay ptx_coef vf_coef temperature "
     "margin lora_rank"),
    ("above 0", lambda x: 0 < x < math.inf, "lr critic_lr max_grad_norm kl_target kl_horizon target_kl reward_clip "
     "clip value_clip tflops lora_alpha"),
    ("a port, 0 to 65535", lambda x: 0 <= x <= 65535, "port"),
    ("from 0 to 1", lambda x: 0 <= x <= 1, "gamma lam warmup"),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, "top_p"),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, "heldout"),
    ("a finite number", math.isfinite, "missing_eos_score"),
]  # fmt: skip


class Flags:
    """A group of flags. Raises UserError, when it is made, for a number that makes no sense."""

    def __post_init__(self) -> None:
        for wanted, fits, names in RANGES:
            for name in names.split():
                value = getattr(self, name, None)
                if isinstance(value, int | float) and not fits(value):
                    raise UserError(f"--{name.replace('_', '-')} {value}: must be {wanted}.")


def recompute_of(flags: Any) -> bool | None:
    """What --recompute and --keep-activations say: always, never, or (None) where weights move. Raises UserError."""
    if flags.recompute and flags.keep_activations:
        raise UserError("--recompute and --keep-activations are opposites; give one of them.")
    return True if flags.recompute else False if flags.keep_activations else None


@dataclass(frozen=True)
class RunFlags(Flags):
    """What the run leaves, and on what it runs."""

    out: str
    """Run directory; must not exist yet or be empty."""
    seed: int = 0
    """Same seed, same data, same machine: same weights, byte for byte, on a CPU."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """What the weights compute in; the optimizer keeps an fp32 master either way."""
    strategy: str = "ddp"
    """Where weights, gradients and optimizer states live: naive, ddp, zero1, zero1_cpu, zero2, zero2_cpu, gemini,
    gemini_cpu, gemini_nvme, gemini_auto. The further down, the less device memory and the more traffic; gemini_auto
    fills the device first, then host memory, then the disk."""
    device_memory: str | None = None
    """Device memory per process, for what lives there or passes through: 6GB. All there is, when not given."""
    host_memory: str | None = None
    """Host memory per process, for what lives there: 48GB. All there is, when not given."""
    disk: str | None = None
    """Where gemini_nvme keeps weights and optimizer states: PATH or PATH:200GB, per process."""
    chunk_size: str | None = None
    """Bytes of weights that move together at most: 64MB. A block, when not given."""
    recompute: bool = False
    """Run each block again in backward instead of keeping what is inside it: less memory, a third more compute. It is
    what happens where weights move, unless --keep-activations says otherwise."""
    keep_activations: bool = False
    """Keep what is inside blocks where weights move too, one micro-batch after the other: no compute is done twice, and
    weights move once per micro-batch."""
    activation_budget: str | None = None
    """Bytes that the activations inside a block may take per micro-batch, in training and scoring: 500MB. Blocks are
    computed in slices where they would take more, and always recomputed."""
    device: str | None = None
    """cpu, cuda, ... The accelerator if there is one, when not given."""
    checkpoint_every: int = 50
    """Steps between checkpoints. SIGTERM and Ctrl-C write one too."""
    keep: int = 2
    """Checkpoints kept, beside the best one."""
    json: bool = False
    """Print one JSON object per step instead of the live line."""


@dataclass(frozen=True)
class DataFlags(Flags):
    """What is learned from."""

    data: tuple[str, ...]
    """JSON lines (.jsonl, .gz) or .parquet files."""
    keys: tuple[str, ...] = ()
    """Field names where sniffing guesses wrong, as ours=theirs: prompt=question response=answer."""
    skip_bad: bool = False
    """Train on the good lines and say how many were left out, instead of stopping at bad ones."""
    max_length: int = 1024
    """Tokens of prompt and response together; never above what the model was built for."""
    allow_pickle: bool = False
    """Also read .bin weights, through torch.load(weights_only=True)."""


@dataclass(frozen=True)
class OptimFlags(Flags):
    """How weights move."""

    lr: float
    """Peak learning rate: linear warm-up, then linear to 0."""
    batch_size: int = 32
    """Rows per optimizer step over all ranks (ppo: episodes per rollout)."""
    micro_batch_size: int = 8
    """Rows per forward pass; changes memory and speed, never the gradient."""
    epochs: int = 1
    """Passes over the data (ppo: passes over each experience)."""
    steps: int | None = None
    """Optimizer steps instead of whole epochs (ppo: rollout iterations)."""
    warmup: float = 0.05
    """Fraction of all updates spent warming up."""
    max_grad_norm: float = 1.0
    """Global 2-norm to which gradients are clipped."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""


@dataclass(frozen=True)
class LoraFlags(Flags):
    """What learns: all weights, or an adapter beside frozen ones."""

    lora: int | None = None
    """Learn through a low-rank adapter of this rank and leave the model frozen (LoRA)."""
    lora_alpha: float | None = None
    """The adapter's share is multiplied by alpha / rank; twice the rank when not given."""
    lora_targets: tuple[str, ...] = ()
    """Modules that get an adapter, by the endings of their Hugging Face names: q_proj v_proj; lm_head and the token
    table only when named. All products, when not given."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA)."""
    adapter: str | None = None
    """An adapter (peft's format, or a run) that the model is read with; it is what learns on."""
    base_dtype: Literal["int8", "nf4"] | None = None
    """Beside an adapter: keep the frozen blocks' products in 8 bits a weight, or in 4 (QLoRA's NF4)."""
    num_layers_unfrozen: int | None = None
    """Without an adapter: only so many of the last blocks learn, and models that start alike share the others."""


@dataclass(frozen=True)
class SFTConfig(Flags):
    """Supervised fine-tuning: teach a language model to answer from demonstrations."""

    model: str
    """Hugging Face directory, hub id or run directory."""
    data: DataFlags
    run: RunFlags
    peft: LoraFlags = field(default_factory=LoraFlags)
    optim: OptimFlags = field(default_factory=lambda: OptimFlags(lr=1e-5))
    heldout: float = 0.05
    """Fraction of prompts kept aside for the held-out loss; 0 trains on everything."""
    eval_every: int = 50
    """Steps between held-out losses; the best checkpoint is the one with the lowest."""
    samples: int = 8
    """Held-out prompts answered before and after training, for the report."""
    max_new_tokens: int = 128
    """Tokens per sampled answer in the report."""


@dataclass(frozen=True)
class RewardConfig(Flags):
    """Reward modelling: learn a score from rankings of K answers to one prompt."""

    model: str
    """The SFT model to start from: Hugging Face directory, hub id or run directory."""
    data: DataFlags
    run: RunFlags
    peft: LoraFlags = field(default_factory=LoraFlags)
    optim: OptimFlags = field(default_factory=lambda: OptimFlags(lr=1e-5))
    heldout: float = 0.1
    """Fraction of prompts kept aside for the pair accuracy; split by prompt, never by pair."""
    eval_every: int = 50
    """Steps between held-out accuracies."""
    margin: float = 0.0
    """Score gap asked for between a better and a worse response."""
    normalize: tuple[str, ...] = ()
    """Demonstrations whose mean score becomes 0; all held-out responses when not given."""


@dataclass(frozen=True)
class PPOConfig(Flags):
    """PPO: improve the actor against a score, staying near the reference."""

    actor: str
    """The SFT model: Hugging Face directory, hub id or run directory."""
    data: DataFlags
    run: RunFlags
    peft: LoraFlags = field(default_factory=LoraFlags)
    reward: str | None = None
    """Reward model: a directory or run made by `penstock reward`."""
    reward_fn: str | None = None
    """Instead of a reward model: file.py:name, a function score(prompts, responses, **_) -> list[float]."""
    critic: str | None = None
    """Where the critic starts; the reward model when not given, a zero head on the actor without one."""
    reference: str | None = None
    """The frozen model that KL is measured from; the actor's start when not given."""
    optim: OptimFlags = field(default_factory=lambda: OptimFlags(lr=3e-6, batch_size=64, epochs=4, steps=200))
    value_head: bool = False
    """No model as critic: a value head on the actor's own states, which one loss teaches both."""
    vf_coef: float = 0.1
    """With --value-head: weight of the value loss beside the policy's."""
    critic_lr: float | None = None
    """Critic's learning rate; 5 times --lr when not given."""
    mini_batch_size: int | None = None
    """Episodes per optimizer step; the whole batch when not given."""
    rollout_batch_size: int | None = None
    """Answers that one process generates together; all of its own, when not given. Fewer need a smaller KV cache."""
    max_new_tokens: int = 128
    """Tokens per response."""
    temperature: float = 1.0
    """Divides the logits in rollout, reference and training alike."""
    top_k: int = 0
    """Truncated sampling in rollouts; 0 is off, and off is what PPO assumes."""
    top_p: float = 1.0
    """Nucleus sampling in rollouts; 1 is off, and off is what PPO assumes."""
    kl_coef: float = 0.05
    """Weight of the per-token KL penalty in the reward."""
    kl_target: float | None = None
    """Nats per sequence the adaptive controller steers to (6 is common); fixed --kl-coef when not given."""
    kl_horizon: float = 10_000.0
    """Episodes over which the adaptive controller moves."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip: float = 0.2
    """PPO's clip of the probability ratio."""
    value_clip: float | None = 0.2
    """Clip of the value around the old one; none turns it off."""
    target_kl: float | None = 0.1
    """An epoch stops when a mini-batch's approximate KL passes 1.5 times this; none turns it off."""
    missing_eos_score: float | None = -1.0
    """Replaces the score of a response that did not end by itself; none turns it off."""
    whiten_rewards: bool = False
    """Divide per-token rewards by their standard deviation."""
    reward_clip: float | None = None
    """Clip scores to +- this; the clipped fraction is logged."""
    value_warmup: bool = True
    """With a zero-head critic: hold the actor still until the critic explains some variance."""
    ptx_coef: float = 0.0
    """Weight of the language-modelling loss on --ptx-data (PPO-ptx)."""
    ptx_data: tuple[str, ...] = ()
    """Demonstrations mixed into the actor's updates when --ptx-coef is above 0."""
    samples: int = 8
    """Prompts answered before and after training, for the report."""


@dataclass(frozen=True)
class ResumeConfig(Flags):
    """Go on with a run that was stopped or killed. Its config.toml says how; only where things live may change."""

    run: str
    """Run directory."""
    strategy: str | None = None
    """Another placement of weights, gradients and optimizer states than before."""
    device_memory: str | None = None
    """Device memory per process."""
    host_memory: str | None = None
    """Host memory per process."""
    disk: str | None = None
    """Where gemini_nvme keeps weights and optimizer states."""
    device: str | None = None
    """cpu, cuda, ..."""


@dataclass(frozen=True)
class PlanConfig(Flags):
    """What a run will need and move, before it runs. Budgets are per process and may be those of another machine."""

    model: str
    """A size (s, xl, 8b, 175b, opt-6.7b, bloom-7b1, llama-3-8b, ...) or a directory with a config.json."""
    critic_model: str | None = None
    """Size of critic and reward model; --model's when not given."""
    stage: Literal["ppo", "sft", "reward"] = "ppo"
    """Which command is planned."""
    strategy: str = "gemini_auto"
    """Where weights, gradients and optimizer states live; see penstock ppo --help."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """What the weights compute in."""
    device_memory: str | None = None
    """Device memory per process: 24GB. Without end, when not given."""
    host_memory: str | None = None
    """Host memory per process: 128GB. Without end, when not given."""
    disk: str | None = None
    """Disk per process: 200GB, or PATH:200GB. Without end, when not given."""
    world: int = 1
    """Processes."""
    lora: int | None = None
    """Everything learns through adapters of this rank, and all models of one size stand on one frozen base."""
    lora_targets: tuple[str, ...] = ()
    """Modules that get an adapter: q_proj v_proj. All products, when not given."""
    base_dtype: Literal["int8", "nf4"] | None = None
    """Beside --lora: what the frozen blocks' products are kept in."""
    batch_size: int = 64
    """Rows per optimizer step over all ranks (ppo: episodes per rollout; reward: pairs)."""
    micro_batch_size: int = 8
    """Rows per forward pass."""
    mini_batch_size: int | None = None
    """ppo: episodes per optimizer step; the whole batch when not given."""
    epochs: int = 1
    """ppo: passes over each experience."""
    rollout_batch_size: int | None = None
    """ppo: answers that one process generates together; all of its own, when not given."""
    prompt_length: int = 384
    """Tokens per prompt."""
    max_new_tokens: int = 128
    """Tokens per response."""
    recompute: bool = False
    """Run each block again in backward also where weights stay."""
    keep_activations: bool = False
    """Keep what is inside blocks also where weights move."""
    activation_budget: str | None = None
    """Bytes that the activations inside a block may take per micro-batch; the slices are printed."""
    chunk_size: str | None = None
    """Bytes of weights that move together at most: 64MB. A block, when not given."""
    rates: Literal["given", "measured"] = "given"
    """measured: what penstock bench micro found on this machine, instead of the flags that follow (not --network)."""
    tflops: float = 200.0
    """What one device computes, in 10^12 operations per second."""
    link: str = "25GB"
    """Bytes per second between host and device, each way."""
    disk_read: str = "3GB"
    """Bytes per second that the disk reads."""
    disk_write: str = "2GB"
    """Bytes per second that the disk writes."""
    host_bandwidth: str = "38GB"
    """Bytes per second of host memory, reads and writes together."""
    network: str = "25GB"
    """Bytes per second between processes, each way."""
    dry_run: bool = False
    """Also run the engine on tensors without memory, and print what it took beside what was planned."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class GenerateConfig(Flags):
    """Answer prompts from a file, or one prompt from the command line."""

    model: str
    """Hugging Face directory, hub id or run directory."""
    adapter: str | None = None
    """An adapter for that model: peft's format, or a run."""
    prompt: str | None = None
    """One prompt; the answer is printed."""
    data: str | None = None
    """Prompts, JSON lines: {"prompt"}, {"messages"} or {"prompt_ids"}."""
    out: str | None = None
    """Answers, JSON lines: prompt, response, prompt_ids, response_ids, logprobs, finish_reason, and score."""
    n: int = 1
    """Answers per prompt."""
    max_new_tokens: int = 128
    """Tokens per answer."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Keep only the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Keep only the likeliest tokens that hold this much probability; 1 is off."""
    min_p: float = 0.0
    """Keep only tokens at least this many times as likely as the likeliest; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that were said become less likely; 1 is off."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer and are no part of it."""
    top_logprobs: int = 0
    """With each token, so many of the likeliest and their log-probabilities."""
    best_of: int = 0
    """Sample so many answers per prompt, score them, and keep the best --n."""
    reward: str | None = None
    """The reward model that scores answers: a run of penstock reward."""
    reward_fn: str | None = None
    """Or a function that does: file.py:name."""
    batch_size: int = 32
    """Answers decoded together."""
    seed: int = 0
    """Same seed, same answers, whatever the batch size."""
    dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """What the weights compute in; int8: weights only, beside bf16, for speed."""
    device: str | None = None
    """cpu, cuda, ... The accelerator if there is one, when not given."""
    skip_bad: bool = False
    """Leave out malformed prompts instead of stopping at them."""
    json: bool = False
    """Print answers as JSON lines."""


@dataclass(frozen=True)
class ChatConfig(Flags):
    """Talk with a model in the terminal; the conversation is kept until /reset."""

    model: str
    """Hugging Face directory, hub id or run directory."""
    adapter: str | None = None
    """An adapter for that model: peft's format, or a run."""
    system: str | None = None
    """A system message that opens the conversation."""
    max_new_tokens: int = 256
    """Tokens per answer."""
    temperature: float = 0.7
    """0 takes the likeliest token."""
    top_k: int = 0
    """Keep only the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Keep only the likeliest tokens that hold this much probability; 1 is off."""
    seed: int = 0
    """Same seed, same talk."""
    dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """What the weights compute in; int8: weights only, beside bf16, for speed."""
    device: str | None = None
    """cpu, cuda, ... The accelerator if there is one, when not given."""
    json: bool = False
    """Print each answer as one JSON object, for programs that talk through a pipe."""


@dataclass(frozen=True)
class CheckConfig(Flags):
    """Say what data files are: kind and format, counts, lengths, and each bad line; exit code 4 if there is one."""

    files: tuple[str, ...]
    """Files of demonstrations, comparisons or prompts."""


@dataclass(frozen=True)
class VotesConfig(Flags):
    """Write the votes of the chat page as comparisons, which penstock reward reads."""

    votes: bool
    """Votes are all that can be exported so far."""
    out: str
    """JSON-lines file to write; must not exist yet."""
    data_dir: str = "runs/serve"
    """Directory in which penstock serve kept the votes."""
    database: str | None = None
    """PostgreSQL database in which penstock serve kept the votes: postgresql://USER:PASSWORD@HOST/NAME."""


@dataclass(frozen=True)
class DoctorConfig(Flags):
    """List what this machine has, what is missing, and what to do about it."""


@dataclass(frozen=True)
class ExportConfig(Flags):
    """Write a run's model (its best or newest checkpoint) as a directory that transformers loads."""

    run: str
    """Run directory."""
    out: str
    """Directory to write; must not exist yet or be empty."""
    which: Literal["model", "critic"] = "model"
    """A PPO run has a critic too."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Round or widen the weights; as trained when not given."""
    merge: bool = False
    """Of a run that trained an adapter: write the whole model with the adapter in it, instead of the adapter."""


@dataclass(frozen=True)
class DemoConfig(Flags):
    """The whole way on a small world of its own: base model, SFT, labellers, reward model, PPO, and a report."""

    out: str = "runs/demo"
    """Where the runs and the report go; replaced if an earlier demo made it."""
    seeds: int = 1
    """Independent repetitions, one after the other."""
    seed: int = 0
    """The first seed."""
    json: bool = False
    """Print report.json at the end."""
