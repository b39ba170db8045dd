"""The flags of `penstock improve`. No torch here."""

from dataclasses import dataclass
from typing import Literal

from penstock.config import EngineFlags, TemplateFlags


@dataclass(frozen=True, kw_only=True)
class ImproveConfig(TemplateFlags, EngineFlags):
    """One round of the loop beside a server: the votes since the last round teach the served model, by KTO, DPO, or a
    reward model and PPO; what they made is measured on votes that nothing learned from, and is served only if it is
    better. Flags of the first round are kept in RUN/improve.toml; later ones need name RUN alone."""

    run: str
    """Directory of the versions, made by the first round; penstock serve RUN --follow answers from the newest good
    one."""
    model: str | None = None
    """At the first round: the model to start from, a Hugging Face directory, hub id or run directory."""
    data: tuple[str, ...] = ()
    """Files of comparisons and votes, as penstock reward and penstock kto read them, beside those of the chat page; a
    later round takes from them what is new."""
    data_dir: str = "runs/serve"
    """Directory in which penstock serve keeps the votes; none where there is no database in it."""
    database: str | None = None
    """PostgreSQL database in which penstock serve keeps the votes: postgresql://USER:PASSWORD@HOST/NAME. Default:
    PENSTOCK_DATABASE of the environment."""
    regression: tuple[str, ...] = ()
    """Comparisons or demonstrations that must not get worse, whatever users like."""
    margin: float = 0.1
    """How much worse they may be: of comparisons the share in the right order, of demonstrations nats per token."""
    least: int = 100
    """New comparisons and votes that a round waits for."""
    heldout: float = 0.2
    """Share of conversations whose votes are never learned, in any round: they decide what is better."""
    every: str | None = None
    """Run a round again and again, each so long after the last began: 24h, 90m. Ends at Ctrl-C."""
    rollback: bool = False
    """Serve the version before again; the votes that only the later one learned are withdrawn."""
    to: int | None = None
    """With --rollback: the version to serve."""
    trust: tuple[int, ...] = ()
    """Versions whose votes were refused and are to be learned all the same."""
    distrust: tuple[int, ...] = ()
    """Versions whose votes are never to be learned again."""
    stages: tuple[Literal["reward", "ppo", "grpo", "dpo", "kto"], ...] = ()
    """How to learn: kto, dpo, or reward ppo. Default: by how much of what there is."""
    learns: Literal["all", "lora", "qlora"] | None = None
    """What learns: all weights, an adapter, or an adapter on blocks packed in 4 bits. Default: the first that fits."""
    lora: int = 16
    """Rank of an adapter."""
    lr: float | None = None
    """Learning rate. Default: that of each command, more for models below 1B parameters."""
    batch_size: int | None = None
    """Rows per optimizer step. Default: by how many votes there are."""
    epochs: int | None = None
    """Passes over the votes. Default: by how many there are."""
    steps: int | None = None
    """Optimizer steps, instead of passes over the votes."""
    max_length: int = 1024
    """Tokens of prompt and response together; at most what the model was built for."""
    max_new_tokens: int | None = None
    """Tokens per sampled answer. Default: by the answers that were judged."""
    apply_chat_template: bool | None = None
    """Read plain prompts as a user's turn. Default: where the model has a chat template of its own."""
    set: tuple[str, ...] = ()
    """Flags of single stages, as STAGE.FLAG=VALUE: dpo.beta=0.3."""
    seed: int = 0
    """Draws which conversations are held out, and everything else."""
    quiet: bool = False
    """Print warnings, errors and results alone."""
    json: bool = False
    """Print the version as one JSON object."""
