"""The flags of `penstock align`. No torch here."""

import re
from dataclasses import dataclass
from typing import Literal

from penstock.config import EngineFlags, RewardFlags, TemplateFlags
from penstock.errors import UserError

DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


@dataclass(frozen=True, kw_only=True)
class AlignConfig(RewardFlags, TemplateFlags, EngineFlags):
    """From a model and data to an aligned model: look at the data, choose stages, algorithm, placement and batch for
    this machine, check all of it in a small trial, train, and measure the end against the start on data that was held
    out. The same command line goes on where it was stopped."""

    model: str
    """Hugging Face directory, hub id or run directory to start from."""
    data: tuple[str, ...]
    """Demonstrations, comparisons, votes and prompts, as the commands read them; each source's kind is told from it."""
    out: str
    """Directory of the runs (OUT/sft, OUT/dpo, ...), the data they were given, and one report."""
    stages: tuple[Literal["sft", "reward", "ppo", "grpo", "dpo", "kto"], ...] = ()
    """Stages to run, in this order. Default: chosen from data, score, memory and time."""
    budget: str | None = None
    """Time for everything: 2h, 1h30m, 45m. Steps are left out, or a cheaper algorithm is taken, until it fits."""
    dry_run: bool = False
    """Show the plan and end; nothing is trained or written."""
    learns: Literal["all", "lora", "qlora"] | None = None
    """What learns: all weights, an adapter, or an adapter on blocks packed in 4 bits. Default: the first that fits."""
    lora: int = 16
    """Rank of an adapter."""
    lr: float | None = None
    """Learning rate of every stage. Default: that of each command, more for models below 1B parameters."""
    batch_size: int | None = None
    """Rows per optimizer step (ppo, grpo: answers per step). Default: by how many records there are."""
    micro_batch_size: int | None = None
    """Rows per forward pass. Default: about 4,096 tokens, or what fits."""
    epochs: int | None = None
    """Passes over the data of stages that learn from given answers. Default: by how many records there are."""
    steps: int | None = None
    """Steps of every stage, instead of passes over its data."""
    max_length: int = 1024
    """Tokens of prompt and response together; at most what the model was built for."""
    max_new_tokens: int | None = None
    """Tokens per sampled answer. Default: by the answers in the data, else 128."""
    heldout: float = 0.1
    """Fraction of the prompts of each kind of data that no stage sees, to measure on."""
    apply_chat_template: bool | None = None
    """Read plain prompts as a user's turn. Default: where the model has a chat template of its own."""
    keys: tuple[str, ...] = ()
    """Names of fields that are not recognised, as ours=theirs: prompt=question response=answer."""
    skip_bad: bool = False
    """Leave bad lines out and print how many, instead of stopping at them."""
    set: tuple[str, ...] = ()
    """Flags of single stages, as STAGE.FLAG=VALUE: sft.lr=2e-5 ppo.kl_coef=0.1."""
    check: bool = True
    """Run a few steps of every stage before the first; they also correct the plan's time."""
    seed: int = 0
    """The same seed, data and machine give the same models, byte for byte, on a CPU."""
    quiet: bool = False
    """Print warnings, errors and results alone."""
    json: bool = False
    """Print the plan or the result as one JSON object."""
    log: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Send metrics, flags and samples of every stage to these loggers too, as the commands do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.set:
            stage, flag, value = split_setting(text)
            if not (stage and flag and value):
                raise UserError(f"--set {text}: give STAGE.FLAG=VALUE, as in --set sft.lr=2e-5.")
        if self.budget is not None:
            seconds_of(self.budget)

    @property
    def seconds(self) -> float | None:
        """--budget."""
        return None if self.budget is None else seconds_of(self.budget)


def split_setting(text: str) -> tuple[str, str, str]:
    """Stage, flag and value of one --set; what is missing is empty."""
    address, _, value = text.partition("=")
    stage, _, flag = address.partition(".")
    return stage, flag.replace("-", "_"), value


def seconds_of(text: str) -> float:
    """Seconds of "2h", "1h30m", "90s". Raises UserError for another text."""
    match = DURATION.fullmatch(text.strip().lower())
    if not text.strip() or match is None:
        raise UserError(f"--budget {text}: is no time; write 2h, 1h30m, 45m or 90s.")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    total = hours * 3600 + minutes * 60 + seconds
    if not total:
        raise UserError(f"--budget {text}: must be above 0.")
    return total


def show_seconds(seconds: float) -> str:
    """5400 -> "1h30m"; rounded up, so that it is enough as a budget too."""
    minutes = -int(-seconds // 60)
    if seconds < 100:
        return f"{max(-int(-seconds // 1), 1)}s"
    hours, rest = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{rest}m" if rest else "")
