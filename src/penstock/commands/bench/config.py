"""The flags of `penstock bench`: the docstring of a field is its --help line. No torch here."""

from dataclasses import dataclass, field
from typing import Literal

from penstock.config import DeviceFlags, EngineFlags, Flags


@dataclass(frozen=True)
class BenchConfig(EngineFlags):
    """PPO on random prompts: memory, throughput and where the time goes. Defaults are those of the published tables.

    Batch sizes are per process. The first episode warms up and is not timed. See also penstock bench micro --help and
    penstock bench capacity --help.
    """

    strategy: str = field(default="ddp", kw_only=True)
    dtype: Literal["fp32", "bf16"] = field(default="fp32", kw_only=True)
    model: str = "s"
    """A size (s, xl, 8b, 175b, opt-6.7b, bloom-7b1, llama-3-8b, ...) or a directory with a config.json; all four models
    have its shape and random weights."""
    experience_batch_size: int = 8
    """Prompts that each process answers and scores per timestep."""
    train_batch_size: int = 8
    """Episodes per optimizer step and process."""
    num_episodes: int = 3
    """Rounds of --max-timesteps; the first one warms up."""
    max_timesteps: int = 8
    """Batches of experience per episode."""
    update_timesteps: int = 8
    """Batches of experience between two learning phases."""
    max_epochs: int = 3
    """Passes over the experience in a learning phase."""
    lora_rank: int = 0
    """Learn through adapters of this rank, four roles on one base; 0 trains all weights."""
    base_dtype: Literal["int8", "nf4"] | None = None
    """Pack the frozen base of a LoRA run: 1.03 or 0.56 bytes a weight."""
    top_k: int = 50
    """Sample among this many likeliest tokens; 0 samples among all."""
    prompt_length: int = 400
    """Tokens per prompt."""
    max_length: int = 512
    """Tokens of prompt and response together; no response ends earlier."""
    prompts: int = 1000
    """Random prompts to draw from."""
    iterations: int | None = None
    """Timed iterations (--update-timesteps batches of experience, one learning phase). Default: --num-episodes."""
    micro_batch_size: int | None = None
    """Rows per forward pass. Default: the train batch."""
    layers: int | None = None
    """Blocks. Default: those of the size."""
    seed: int = 0
    """Seed of weights, prompts and answers."""
    json: str | None = None
    """Also write the result to this file, as one JSON object."""
    profile: str | None = None
    """Record the first timed iteration: a Chrome trace in this file, and a table of the time per part."""


@dataclass(frozen=True)
class MicroConfig(DeviceFlags):
    """Measure products, copies, link, disk, optimizer and decoding on this machine, for penstock plan and bench."""

    disk: str | None = None
    """Directory on the disk to measure. Default: the cache's."""
    repeats: int = 5
    """Runs of each measurement; the best one counts."""
    quick: bool = False
    """Small sizes: seconds instead of a minute, and less exact."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class CapacityConfig(Flags):
    """Search the deepest model that completes a PPO iteration in a device budget, here and in plain PyTorch."""

    device_memory: str
    """Device memory, for both: 2GB."""
    model: str = "s"
    """The size whose blocks are stacked."""
    strategy: str = "gemini_cpu"
    """Where penstock keeps weights, gradients and optimizer states."""
    host_memory: str | None = None
    """Host memory for penstock: 16GB. Default: nine tenths of what is free."""
    disk: str | None = None
    """Disk for penstock: PATH:60GB. Default: none."""
    experience_batch_size: int = 2
    """Prompts per iteration."""
    prompt_length: int = 64
    """Tokens per prompt."""
    max_length: int = 128
    """Tokens of prompt and response together."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """What penstock computes in; plain PyTorch computes in fp32, as published."""
    micro_batch_size: int = 1
    """Rows per forward pass of penstock."""
    layers: int = 400
    """The most blocks to try."""
    json: str | None = None
    """Also write the result to this file, as one JSON object."""
