"""The flags of `penstock plan`. No torch here."""

from dataclasses import dataclass
from typing import Literal

from penstock.config import PlacementFlags
from penstock.errors import UserError

ROWS, EPOCHS = {"ppo": 64, "grpo": 64}, {"ppo": 4}
"""Of the commands' own --batch-size and --epochs, where they are not 32 and 1."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PlacementFlags):
    """What a run needs and moves, before it runs. Budgets are per process, unlimited by default."""

    model: str
    """A size (s, xl, 8b, 175b, opt-6.7b, bloom-7b1, llama-3-8b, ...) or a directory with a config.json."""
    critic_model: str | None = None
    """Size of critic and reward model. Default: --model."""
    teacher_model: str | None = None
    """distill: size of the teacher. Default: --model."""
    stage: Literal["ppo", "grpo", "sft", "reward", "dpo", "kto", "distill"] = "ppo"
    """The command to plan."""
    strategy: str = "gemini_auto"
    dtype: Literal["fp32", "bf16"] = "bf16"
    arithmetic: Literal["gpu", "cpu", "cpu_without_bf16"] = "gpu"
    """What the machine computes bf16 with: a GPU, whose libraries take memory of their own (one of NVIDIA's); a CPU,
    which adds up in fp32; or a CPU without instructions for bf16, which widens weights too. Speeds are other flags."""
    world: int = 1
    """Processes."""
    nodes: int = 1
    """Machines that they are on: hsdp shards a model inside each."""
    lora: int | None = None
    """Train adapters of this rank; all models of one size share one frozen base."""
    lora_targets: tuple[str, ...] = ()
    """Modules that get an adapter: q_proj v_proj. Default: all linear layers of the blocks."""
    base_dtype: Literal["int8", "nf4"] | None = None
    """With --lora: what the weights of the frozen blocks are kept in."""
    batch_size: int | None = None
    """Rows per optimizer step over all ranks (ppo: episodes per rollout; reward, dpo: pairs). Default: the command's,
    64 (ppo, grpo) or 32."""
    micro_batch_size: int = 8
    """Rows per forward pass."""
    mini_batch_size: int | None = None
    """ppo: episodes per optimizer step. Default: the whole batch."""
    epochs: int | None = None
    """ppo: passes over each experience. Default: the command's, 4; other stages: 1."""
    rollout_batch_size: int | None = None
    """ppo: answers that one process generates together. Default: all of its answers."""
    rollout_dtype: Literal["int8", "fp8", "nf4"] | None = None
    """ppo, grpo: what the blocks of a copy that answers are kept in. Default: the actor itself answers."""
    group_size: int = 8
    """grpo: answers per prompt."""
    temperature: float = 1.0
    """Of sampled answers: other than 1 it takes one more number per logit while a token is chosen."""
    top_k: int = 0
    """Of sampled answers, as in ppo."""
    top_p: float = 1.0
    """Of sampled answers, as in ppo: below 1 logits are sorted, which takes 20 bytes more for each."""
    kl_coef: float = 0.05
    """ppo, grpo: at 0 there is no reference."""
    reward_model: bool = True
    """ppo, grpo: a reward model scores; with --no-reward-model a function does."""
    precompute_reference: bool = False
    """dpo: no reference beside the model that learns: with this flag of the command, or a loss that has none."""
    teacher_top_k: int = 64
    """distill: the teacher's likeliest tokens that are compared one by one."""
    teacher_dtype: Literal["int8", "nf4"] | None = None
    """distill: what the weights of the teacher's blocks are kept in."""
    on_policy: float = 0.0
    """distill: above 0 the student's own samples are learned too."""
    precompute_teacher: bool = False
    """distill: the teacher reads all answers before the student is in memory."""
    prompt_length: int = 384
    """Tokens per prompt."""
    max_new_tokens: int = 128
    """Tokens per response."""
    activation_budget: str | None = None
    """Activations inside a block per micro-batch, at most: 500MB; the slices are printed."""
    rates: Literal["given", "measured"] = "given"
    """measured: rates that penstock bench micro measured here replace all flags below but --network."""
    tflops: float = 200.0
    """Speed of one device, in 10^12 operations per second."""
    link: str = "25GB"
    """Bytes per second between host and device, each way."""
    disk_read: str = "3GB"
    """Bytes per second that the disk reads."""
    disk_write: str = "2GB"
    """Bytes per second that the disk writes."""
    host_bandwidth: str = "38GB"
    """Bytes per second of host memory, reads and writes together."""
    network: str = "25GB"
    """Bytes per second between processes of different machines, each way."""
    network_inside: str | None = None
    """The same inside a machine: 300GB. Default: --network."""
    device_bandwidth: str = "1500GB"
    """Bytes per second of device memory, reads and writes together."""
    dry_run: bool = False
    """Also run the engine on tensors without memory, and print what it takes next to what is planned."""
    json: bool = False
    """Print one JSON object."""

    @property
    def rows(self) -> int:
        """Of a batch."""
        return self.batch_size or ROWS.get(self.stage, 32)

    @property
    def passes(self) -> int:
        """Over each experience."""
        return self.epochs or EPOCHS.get(self.stage, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = f"--rollout-dtype {self.rollout_dtype}"
        if self.rollout_dtype is None:
            return
        if self.stage not in ("ppo", "grpo"):
            raise UserError(f"{given}: --stage {self.stage} answers with no copy; leave it out.")
        if self.base_dtype is not None:
            raise UserError(
                f"{given} with --base-dtype {self.base_dtype}: the blocks are packed already; leave one out."
            )
