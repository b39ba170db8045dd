"""The flags of what trains, plans and answers: one frozen dataclass per command; the docstring of a field is its --help
line. No torch here. Other commands' flags are in `algorithms/config.py`, `commands/config.py`, `serve/config.py`.

Flags that several commands share are a group: a dataclass that a config inherits, with other defaults where it declares
a field again, or holds as a field. On the command line and in TOML files all names are flat (`--lr`, `lr = 1e-5`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self

from penstock.errors import UserError

RANGES: list[tuple[str, Callable[[Any], bool], str]] = [
    # (what it must be, the check, the flags); nan passes none of them
    ("at least 1", lambda x: x >= 1, "least batch_size micro_batch_size mini_batch_size rollout_batch_size epochs "
     "steps checkpoint_every eval_every max_length max_new_tokens n seeds scale world prompt_length lora "
     "num_layers_unfrozen experience_batch_size train_batch_size num_episodes max_timesteps update_timesteps "
     "max_epochs iterations layers prompts repeats rows queue per_key threads max_eval_samples "
     "early_stopping_patience reward_workers teacher_top_k nodes"),
    ("at least 2: answers are compared within their group", lambda x: x >= 2, "group_size"),
    ("0 or more", lambda x: 0 <= x < math.inf, "keep samples top_k kl_coef kl_loss_coef weight_decay ptx_coef vf_coef "
     "temperature margin lora_rank min_new_tokens missing_eos_penalty sft_coef simpo_gamma max_resamples "
     "overlong_buffer"),
    ("above 0", lambda x: 0 < x < math.inf, "lr critic_lr max_grad_norm kl_target kl_horizon target_kl reward_clip "
     "clip clip_high value_clip tflops lora_alpha adam_epsilon beta reward_timeout desirable_weight "
     "undesirable_weight importance_sampling_cap"),
    ("a port, 0 to 65535", lambda x: 0 <= x <= 65535, "port"),
    ("from 0 to 1", lambda x: 0 <= x <= 1, "gamma lam warmup jsd_beta on_policy"),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, "top_p"),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, "heldout adam_beta1 adam_beta2"),
    ("at least 0 and below 0.5", lambda x: 0 <= x < 0.5, "label_smoothing"),
    ("a finite number", math.isfinite, "missing_eos_score"),
]  # fmt: skip


class Flags:
    """A group of flags. Raises UserError for a number that is out of range."""

    def __post_init__(self) -> None:
        for wanted, fits, names in RANGES:
            for name in names.split():
                value = getattr(self, name, None)
                if isinstance(value, int | float) and not fits(value):
                    raise UserError(f"--{name.replace('_', '-')} {value}: must be {wanted}.")

    @classmethod
    def of(cls, **flags: Any) -> Self:
        """With these flags, flat, whatever their groups: SFTConfig.of(model="gpt2", data="talks.jsonl", out="runs/a").

        Raises UserError for a name that is no flag, with the nearest, for a flag that is missing, and for a value that
        it cannot take.
        """
        from penstock.flags import from_keywords

        return from_keywords(cls, flags)


def recompute_of(flags: "PlacementFlags") -> bool | None:
    """Recompute blocks always (True), never (False) or where weights move (None). Raises UserError for both flags."""
    if flags.recompute and flags.keep_activations:
        raise UserError("--recompute and --keep-activations are opposites; give one of them.")
    if flags.recompute or flags.keep_activations:
        return flags.recompute
    return None


@dataclass(frozen=True, kw_only=True)
class DeviceFlags(Flags):
    """The device."""

    device: str | None = None
    """Where the model computes: cpu, cuda, ... Default: the accelerator if there is one."""


@dataclass(frozen=True, kw_only=True)
class BudgetFlags(Flags):
    """Memory."""

    device_memory: str | None = None
    """Device memory per process for all that is kept there or passes through: 6GB. Default: all there is."""
    host_memory: str | None = None
    """Host memory per process for what is kept there: 48GB. Default: all there is; an equal share of what is free
    where a machine has several."""
    disk: str | None = None
    """Directory in which gemini_nvme keeps weights and optimizer states, with a limit per process: PATH:200GB."""


@dataclass(frozen=True, kw_only=True)
class PlacementFlags(BudgetFlags):
    """Placement of weights, gradients and optimizer states."""

    strategy: str | None = None
    """Where weights, gradients and optimizer states are kept: naive, ddp, zero1, zero1_cpu, zero2, zero2_cpu, gemini,
    gemini_cpu, gemini_nvme, gemini_auto. Each next one needs less device memory and moves more bytes; gemini_auto
    fills the device first, then host memory, then the disk. fsdp and hsdp are PyTorch's FSDP2: shards on the devices
    of all ranks, or of each machine. Default: ddp on a CPU, gemini_auto on a GPU."""
    dtype: Literal["fp32", "bf16"] | None = None
    """What the weights compute in; the optimizer keeps an fp32 master in both cases. Default: fp32 on a CPU, bf16 on a
    GPU that has it; products of fp32 weights are TF32 on a GPU."""
    chunk_size: str | None = None
    """Weights that move together at most: 64MB. Default: one block."""
    recompute: bool = False
    """Run each block again in backward instead of keeping its activations: less memory, a third more compute. This is
    the default where weights move."""
    keep_activations: bool = False
    """Keep the activations of blocks where weights move too, one micro-batch after the other: nothing is computed
    twice, and weights move once per micro-batch."""


@dataclass(frozen=True, kw_only=True)
class InferenceFlags(DeviceFlags):
    """The model that answers."""

    dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """What the weights compute in; int8 keeps weights in 8 bits and computes in bf16, for speed."""


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(Flags):
    """Sampling."""

    max_new_tokens: int = 128
    """Tokens per answer."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Keep only the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Keep only the likeliest tokens that together have this probability; 1 is off."""
    seed: int = 0
    """The same seed gives the same answers, whatever the batch size."""


@dataclass(frozen=True)
class EngineFlags(PlacementFlags, DeviceFlags):
    """The device, and what is kept where."""


@dataclass(frozen=True)
class RunFlags(EngineFlags):
    """The run directory."""

    out: str
    """Run directory; must not exist yet or be empty (but for --resume-if-present)."""
    seed: int = 0
    """The same seed, data and machine give the same weights, byte for byte, on a CPU."""
    activation_budget: str | None = None
    """Activations inside a block per micro-batch, in training and scoring, at most: 500MB. Blocks that need more are
    computed in slices, and always recomputed."""
    padding_free: bool = True
    """Lay rows end to end and compute no padding; what is learned stays the same but for rounding."""
    checkpoint_every: int = 50
    """Steps between checkpoints. SIGTERM and Ctrl-C write one too."""
    keep: int = 2
    """Newest checkpoints that are kept; the best one is kept as well."""
    resume_if_present: bool = False
    """Go on with the run in --out if there is one, else begin it: for launchers that start a command line again."""
    json: bool = False
    """Print one JSON object per step instead of the live line."""
    quiet: bool = False
    """Print warnings and errors alone; log.txt has everything."""
    log: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Send metrics, flags and samples to these loggers too: TensorBoard (OUT/tensorboard), W&B, MLflow, trackio. Keys,
    servers and offline modes are their own environment variables."""


@dataclass(frozen=True, kw_only=True)
class TemplateFlags(Flags):
    """Conversations."""

    system: str | None = None
    """A system message for conversations that have none."""
    template_args: tuple[str, ...] = ()
    """Arguments of the chat template, as key=value: enable_thinking=false."""
    eos: str | None = None
    """The token that ends an answer, where the model names none (or an id, where it has no tokenizer)."""


@dataclass(frozen=True)
class DataFlags(TemplateFlags):
    """Data."""

    data: tuple[str, ...]
    """Files (.jsonl, .json, .csv and .tsv, also as .gz or .zst; .parquet, .arrow), folders of them, patterns
    ('part-*.csv'), - for standard input, datasets on the hub (USER/NAME, USER/NAME:CONFIG:SPLIT[:1000],
    hf://datasets/USER/NAME/FILE). Behind a source, *0.3 uses 30 % of its records, drawn, and *2 each twice."""
    keys: tuple[str, ...] = ()
    """Names of fields that are not recognised, as ours=theirs: prompt=question response=answer."""
    skip_bad: bool = False
    """Leave bad lines out and print how many, instead of stopping at them."""
    max_length: int = 1024
    """Tokens of prompt and response together; at most what the model was built for."""
    truncate: Literal["drop", "left", "right"] = "drop"
    """What does not fit --max-length: drop leaves answers out that do not fit whole, left cuts the prompt's beginning,
    right cuts the answer's end, which is then not learned. How many is printed."""
    apply_chat_template: bool = False
    """Read plain prompts as a user's turn, and their responses as the assistant's, through the chat template."""
    train_on: Literal["all", "last"] = "all"
    """The answers of a demonstration that are learned: all, or the last."""
    date: str | None = None
    """The day that a chat template takes for today: 2026-01-31. Default: the day the run began."""
    allow_pickle: bool = False
    """Also read .bin weights, through torch.load(weights_only=True)."""


def as_data_flags(config: TemplateFlags, **changes: Any) -> DataFlags:
    """How a command that does not train reads texts, as the flags of those that do."""
    names = [field.name for field in fields(DataFlags) if field.name != "data" and hasattr(config, field.name)]
    return DataFlags(**{"data": (), **{name: getattr(config, name) for name in names}, **changes})


@dataclass(frozen=True)
class OptimFlags(Flags):
    """Optimizer."""

    lr: float = None  # type: ignore[assignment]  # `settle_lr` gives it its value
    """Peak learning rate, after a linear warm-up. Default: 1e-5 (grpo: 5e-6; dpo, kto: 1e-6), and ten times that for an
    adapter; for ppo from 1B parameters up 3e-6 is usual."""
    lr_schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """After the warm-up: to 0 in a line or a half cosine, constant, or constant and to 0 in the last fifth (wsd)."""
    batch_size: int = 32
    """Rows per optimizer step over all ranks (ppo: episodes per rollout)."""
    micro_batch_size: int = 8
    """Rows per forward pass; it changes memory and speed, never the gradient."""
    epochs: int = 1
    """Passes over the data (ppo: passes over each experience)."""
    steps: int | None = None
    """Optimizer steps (ppo: rollout iterations); none makes --epochs passes over the data instead."""
    warmup: float = 0.05
    """Fraction of all updates spent warming up."""
    max_grad_norm: float = 1.0
    """Global 2-norm to which gradients are clipped."""
    weight_decay: float = 0.0
    """Decoupled weight decay, of all weights but norms and biases."""
    adam_beta1: float = 0.9
    """AdamW's decay of the mean of gradients."""
    adam_beta2: float = 0.95
    """AdamW's decay of the mean of their squares."""
    adam_epsilon: float = 1e-8
    """AdamW's term beside the root of that mean. Of ppo 1e-5, which slows weights whose gradients are small."""

    @property
    def adamw(self) -> dict[str, Any]:
        """The fields of memory.adamw.AdamW."""
        betas = (self.adam_beta1, self.adam_beta2)
        return {"betas": betas, "eps": self.adam_epsilon, "weight_decay": self.weight_decay}


@dataclass(frozen=True)
class LoraFlags(Flags):
    """Adapters: what is trained."""

    lora: int | None = None
    """Train a low-rank adapter of this rank and leave the model frozen (LoRA)."""
    lora_alpha: float | None = None
    """The adapter's output is multiplied by alpha / rank. Default: twice the rank."""
    lora_targets: tuple[str, ...] = ()
    """Modules that get an adapter, by the endings of their Hugging Face names: q_proj v_proj. Default: all linear
    layers of the blocks, without lm_head and the token table."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA)."""
    adapter: str | None = None
    """An adapter to read with the model and to train further: a run, or a directory in peft's format."""
    base_dtype: Literal["int8", "nf4"] | None = None
    """With an adapter: keep the weights of the frozen blocks in 8 bits, or in 4 (QLoRA's NF4)."""
    num_layers_unfrozen: int | None = None
    """Without an adapter: train only this many of the last blocks; models that start alike share the others."""
    router_aux_loss_coef: float | None = None
    """Of a mixture of experts: weight of the loss that balances their loads. Default: what its config.json says."""


@dataclass(frozen=True, kw_only=True)
class EvalFlags(Flags):
    """Held-out evaluation."""

    heldout: float = 0.05
    """Fraction of prompts held out; 0 trains on everything."""
    eval_data: tuple[str, ...] = ()
    """Files to evaluate on, in the format of --data; then nothing is held out of --data."""
    max_eval_samples: int | None = 512
    """Rows that are held out or read from --eval-data at most; none is no limit."""
    eval_every: int | None = None
    """Steps between evaluations. Default: about 20 evaluations in the whole run, fewer in a short run."""
    early_stopping_patience: int | None = None
    """End the run after this many evaluations in a row that are not better than the best. Default: off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settle_lr(self)  # every command that trains has these flags


@dataclass(frozen=True, kw_only=True)
class RewardFlags(Flags):
    """Rewards."""

    reward: str | None = None
    """A reward model: a run of penstock reward, or any AutoModelForSequenceClassification with one label."""
    reward_fn: tuple[str, ...] = ()
    """Functions score(prompts, responses, **_) -> list[float], as file.py:name, or built-in verifiers: exact_match,
    number, math, regex, format, json_schema, length. The sum of all rewards is the score."""
    reward_weights: tuple[float, ...] = ()
    """A weight per reward, that of --reward first. Default: 1 each."""
    reward_timeout: float | None = None
    """Seconds that a reward function may take for a batch; it then runs in a process of its own. Default: no limit."""
    reward_workers: int | None = None
    """Processes that reward functions run in, each on its part of a batch. Default: none but the command's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_fn is None or isinstance(self.reward_fn, str):  # from Python
            object.__setattr__(self, "reward_fn", (self.reward_fn,) if self.reward_fn else ())
        count = bool(self.reward) + len(self.reward_fn)
        if self.reward_weights and len(self.reward_weights) != count:
            raise UserError(f"--reward-weights: {len(self.reward_weights)} for {count} rewards; give one each.")
        if not all(map(math.isfinite, self.reward_weights)):
            raise UserError("--reward-weights: must be finite numbers.")
        if (self.reward_timeout or self.reward_workers) and not self.reward_fn:
            raise UserError("--reward-timeout and --reward-workers are for functions, and there is no --reward-fn.")

    def need_score(self, command: str) -> None:
        """Raises UserError where nothing gives a score."""
        if not (self.reward or self.reward_fn):
            raise UserError(
                f"{command} needs a score: give --reward MODEL, --reward-fn file.py:name or a verifier's name, or both."
            )


ADAPTER_LR = 10
"""How much larger the default learning rate is where only an adapter learns (Schulman et al. 2025, "LoRA Without
Regret": 10 times, whatever the model and task)."""


def settle_lr(config: Any) -> None:
    """Gives a new config its default learning rate: LR, which is for a whole model, or an adapter's."""
    if config.optim.lr is None:
        adapts = config.peft.lora is not None or config.peft.adapter is not None
        lr = float(f"{config.LR * ADAPTER_LR:g}") if adapts else config.LR
        object.__setattr__(config, "optim", replace(config.optim, lr=lr))


@dataclass(frozen=True, kw_only=True)
class SFTConfig(EvalFlags):
    """Supervised fine-tuning: teach a language model to answer from demonstrations."""

    LR: ClassVar[float] = 1e-5
    model: str
    """Hugging Face directory, hub id or run directory."""
    data: DataFlags
    run: RunFlags
    peft: LoraFlags = field(default_factory=LoraFlags)
    optim: OptimFlags = field(default_factory=OptimFlags)
    samples: int = 8
    """Held-out prompts answered before and after training, for the report."""
    max_new_tokens: int = 128
    """Tokens per sampled answer in the report."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(EvalFlags):
    """Reward modelling: learn a score from rankings of K answers to one prompt."""

    LR: ClassVar[float] = 1e-5
    model: str
    """The SFT model to start from: Hugging Face directory, hub id or run directory."""
    data: DataFlags
    run: RunFlags
    peft: LoraFlags = field(default_factory=LoraFlags)
    optim: OptimFlags = field(default_factory=OptimFlags)
    heldout: float = 0.1
    """Fraction of prompts held out for the pair accuracy; the split is by prompt, never by pair."""
    margin: float = 0.0
    """Score gap that the loss asks for between a better and a worse response."""
    normalize: tuple[str, ...] = ()
    """Demonstrations whose mean score becomes 0. Default: all held-out responses."""


@dataclass(frozen=True, kw_only=True)
class AnswerFlags(Flags):
    """Sampled answers."""

    max_new_tokens: int = 128
    """Tokens per response."""
    temperature: float = 1.0
    """Divides the logits in rollout, reference and training alike."""
    top_k: int = 0
    """Truncated sampling in rollouts; 0 is off, and off is what the losses assume."""
    top_p: float = 1.0
    """Nucleus sampling in rollouts; 1 is off, and off is what the losses assume."""
    stop: tuple[str, ...] = ()
    """Texts that end a response as EOS does; they stay in it."""
    min_new_tokens: int = 0
    """No response ends by EOS before so many tokens. The losses assume 0."""
    rollout_batch_size: int | None = None
    """Answers that one process generates together. Fewer need a smaller KV cache. Default: all of its answers."""
    missing_eos_penalty: float | None = 1.0
    """A response that did not end by itself gets this much less than the worst of the batch that did, on the used
    scores' scale; none leaves it its own score."""
    missing_eos_score: float | None = None
    """Instead of --missing-eos-penalty: the used score of every response that did not end by itself."""


@dataclass(frozen=True, kw_only=True)
class RolloutFlags(AnswerFlags):
    """Rollouts and what is learned from them."""

    reward_clip: float | None = None
    """Clip scores, once normalised, to +- this; the clipped fraction is logged."""
    clip: float = 0.2
    """Clip of the probability ratio."""
    rollout_dtype: Literal["int8", "fp8", "nf4"] | None = None
    """Answer with a copy of the actor whose blocks are kept in 8 bits, or in 4, on the device: made anew for each
    rollout, it is for an actor whose weights stream and do not fit. fp8 is for GPUs that multiply it (Ada, Hopper, the
    Blackwell of data centres); elsewhere int8 is nearer to the actor. The loss weighs each token by the importance of
    the copy's choice. Default: the actor itself answers."""
    importance_sampling_cap: float | None = None
    """With --rollout-dtype: the most that a token's importance weight, its probability under the actor over that under
    the copy, may be. Default: 2."""
    target_kl: float | None = 0.1
    """A step's updates stop, the critic's too and in all epochs left, when a mini-batch's approximate KL passes 1.5
    times this; none turns it off."""


@dataclass(frozen=True, kw_only=True)
class PPOFlags(RolloutFlags):
    """PPO: KL, values and losses."""

    kl_coef: float = 0.05
    """Weight of the per-token KL penalty in the reward. At 0 no reference is loaded and KL is not measured, unless
    --reference names one."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """How KL is estimated from one token (Schulman 2020), in the penalty and in --kl-loss-coef."""
    kl_loss_coef: float = 0.0
    """Weight of KL as a term of the policy's loss (GRPO's place for it); needs --kl-estimator k2 or k3."""
    kl_target: float | None = None
    """Nats per sequence that the adaptive controller steers to; 6 is common. Default: --kl-coef stays fixed."""
    kl_horizon: float = 10_000.0
    """Episodes over which the adaptive controller moves."""
    scale_rewards: Literal["auto", "running", "none"] = "auto"
    """running: scores are normalised by mean and standard deviation of all scores so far; none: they are used as they
    are; auto: running for a reward function, and for a reward model that brings no mean of its own."""
    whiten_rewards: bool = False
    """Divide per-token rewards by their standard deviation."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation."""
    value_clip: float | None = 0.2
    """Clip of the value around the old value; none turns it off."""
    vf_coef: float = 0.1
    """With --value-head: weight of the value loss beside the policy's."""
    critic_lr: float | None = None
    """The critic's learning rate. Default: 5 times --lr."""
    ptx_coef: float = 0.0
    """Weight of the language-modelling loss on --ptx-data (PPO-ptx)."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig(EvalFlags, RewardFlags):
    """PPO: improve the actor against a score, staying near the reference."""

    LR: ClassVar[float] = 1e-5
    actor: str
    """The SFT model: Hugging Face directory, hub id or run directory."""
    data: DataFlags
    run: RunFlags
    peft: LoraFlags = field(default_factory=LoraFlags)
    critic: str | None = None
    """Where the critic starts. Default: the reward model; without one, the actor with a zero head."""
    reference: str | None = None
    """The frozen model that KL is measured from. Default: the actor's start; none at --kl-coef 0."""
    optim: OptimFlags = field(default_factory=lambda: OptimFlags(batch_size=64, epochs=4, steps=500, adam_epsilon=1e-5))
    ppo: PPOFlags = field(default_factory=PPOFlags)
    mini_batch_size: int | None = None
    """Episodes per optimizer step. Default: the whole batch."""
    value_head: bool = False
    """No model as critic: a value head on the actor's own states, and one loss trains both."""
    value_warmup: bool = True
    """With a zero-head critic: the actor does not move until the critic explains a tenth of the variance of returns,
    or for a tenth of the steps."""
    ptx_data: tuple[str, ...] = ()
    """Demonstrations mixed into the actor's updates when --ptx-coef is above 0."""
    max_eval_samples: int | None = 64
    """Prompts that are held out or read from --eval-data at most; none is no limit."""
    samples: int = 8
    """Prompts answered before and after training, for the report."""

    @property
    def rollout(self) -> PPOFlags:
        """What algorithms share: each config names its own flags."""
        return self.ppo
