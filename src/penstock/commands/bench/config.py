"""The flags of `penstock bench`, as in penstock/config.py: each docstring is a --help line. No torch in here."""

from dataclasses import dataclass
from typing import Literal

from penstock.config import Flags


@dataclass(frozen=True)
class BenchConfig(Flags):
    """PPO on random prompts: memory, throughput and where the time goes. Defaults are those of the published tables.

    Batch sizes are per process. The first episode warms up and is not timed. See also penstock bench micro --help and
    penstock bench capacity --help.
    """

    model: str = "s"
    """A size (s, xl, 8b, 175b, opt-6.7b, bloom-7b1, llama-3-8b, ...) or a directory with a config.json; all four models
    have its shape and random weights."""
    strategy: str = "ddp"
    """Where weights, gradients and optimizer states live: see penstock ppo --help; colossalai_zero2 is zero2."""
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
    """Sample among so many tokens; 0 among all."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """What the weights compute in; the optimizer keeps an fp32 master either way."""
    prompt_length: int = 400
    """Tokens per prompt."""
    max_length: int = 512
    """Tokens of prompt and response together; no response ends earlier."""
    prompts: int = 1000
    """Random prompts to draw from."""
    iterations: int | None = None
    """Timed iterations (--update-timesteps batches of experience, one learning phase) instead of --num-episodes."""
    micro_batch_size: int | None = None
    """Rows per forward pass; the train batch when not given."""
    layers: int | None = None
    """Blocks instead of the size's own."""
    device_memory: str | None = None
    """Device memory per process: 6GB. All there is, when not given."""
    host_memory: str | None = None
    """Host memory per process: 48GB. All there is, when not given."""
    disk: str | None = None
    """Where gemini_nvme keeps weights and optimizer states: PATH or PATH:200GB, per process."""
    chunk_size: str | None = None
    """Bytes of weights that move together at most: 64MB. A block, when not given."""
    recompute: bool = False
    """Run each block again in backward instead of keeping what is inside it."""
    keep_activations: bool = False
    """Keep it where weights move too, one micro-batch after the other."""
    device: str | None = None
    """cpu, cuda, ... The accelerator if there is one, when not given."""
    seed: int = 0
    """Of weights, prompts and answers."""
    json: str | None = None
    """Also write what was found to this file, as one JSON object."""
    profile: str | None = None
    """Record the first timed iteration: a Chrome trace in this file, and a table of where the time went."""


@dataclass(frozen=True)
class MicroConfig(Flags):
    """What this machine can do: products, copies, link, disk, optimizer, decoding. Kept for penstock plan and bench."""

    device: str | None = None
    """cpu, cuda, ... The accelerator if there is one, when not given."""
    disk: str | None = None
    """Directory on the disk to measure; the cache's own when not given."""
    repeats: int = 5
    """Runs of each measurement; the best of them counts."""
    quick: bool = False
    """Small sizes: seconds instead of a minute, and less sure."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class CapacityConfig(Flags):
    """The deepest model that completes a PPO iteration in a device budget: ours, and plain PyTorch's."""

    device_memory: str
    """The budget, for both: 2GB."""
    model: str = "s"
    """The size whose blocks are stacked."""
    strategy: str = "gemini_cpu"
    """Where ours keeps weights, gradients and optimizer states."""
    host_memory: str | None = None
    """Host memory for ours: 16GB. Nine tenths of what is free, when not given."""
    disk: str | None = None
    """Disk for ours: PATH:60GB. None, when not given."""
    experience_batch_size: int = 2
    """Prompts per iteration."""
    prompt_length: int = 64
    """Tokens per prompt."""
    max_length: int = 128
    """Tokens of prompt and response together."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """What ours computes in; plain PyTorch is in fp32, as published."""
    micro_batch_size: int = 1
    """Rows per forward pass of ours."""
    layers: int = 400
    """The deepest to try."""
    json: str | None = None
    """Also write what was found to this file, as one JSON object."""
