"""PPO on four distinct GPT-2 models of a size, full-parameter, bf16 with split masters, from a disk: peak memory,
bytes moved, and seconds against what the disk and the processor allow.

    python -m benchmarks capacity --size xl --disk DIR        ~45 GB of disk for XL
"""

import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.facts import flags, write
from benchmarks.timing import seconds_of
from penstock.commands.bench.work import Four
from penstock.memory.strategy import Strategy
from penstock.memory.tiers import Disk, empty_pages
from penstock.models import presets
from penstock.models.decoder import Decoder
from penstock.run.metrics import peak_rss_bytes

PROMPT, NEW = 64, 64


def main(arguments: list[str]) -> int:
    """Measures and writes the result."""
    parser = flags(__doc__)
    parser.add_argument("--size", default="xl")
    parser.add_argument("--strategy", default="gemini_nvme")
    parser.add_argument("--disk", default="/tmp/penstock-capacity")
    parser.add_argument("--device-memory", default="4.6GB")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--name", default="capacity_xl")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    strategy = Strategy.named(
        options.strategy, dtype="bf16", device="cpu", disk=options.disk, device_memory=options.device_memory
    )
    floors = [machine_floors(strategy)]
    records = phases(strategy, options.size, options.prompts, options.iterations)
    decoder = next(records)
    measured = list(records)
    peak = peak_rss_bytes()
    floors.append(machine_floors(strategy))
    work = [record for record in measured if record["phase"] != "prepare"]
    read, written = (sum(record["read_and_written_bytes"]["disk"][i] for record in work) for i in (0, 1))
    rates = {key: statistics.mean(floor[key] for floor in floors) for key in floors[0]}
    disk = read / rates["disk_read"] + written / rates["disk_write"]
    compute = options.iterations * compute_seconds(decoder, options.prompts, rates)
    seconds = sum(record["seconds"] for record in work)
    ratio = seconds / max(disk, compute)
    print(f"{seconds:.0f} s; disk floor {disk:.0f} s, compute floor {compute:.0f} s: {ratio:.2f}")
    result = {
        "peak_rss_bytes": peak,
        "seconds": seconds,
        "disk_floor_seconds": disk,
        "compute_floor_seconds": compute,
        "ratio_to_floor": ratio,
        "rates": floors,
        "phases": measured,
        "threads": torch.get_num_threads(),
    }
    write(options.name, result)
    return 0


def phases(strategy: Strategy, size: str, rows: int, iterations: int) -> Iterator[Any]:
    """The decoder of the actor, then a record of each phase: seconds, peaks, bytes moved by each tier."""
    began, before = time.perf_counter(), dict.fromkeys(strategy.tiers, (0, 0))

    def record(phase: str) -> dict[str, Any]:
        nonlocal began, before
        now = {name: (tier.bytes_read, tier.bytes_written) for name, tier in strategy.tiers.items()}
        result = {
            "phase": phase,
            "seconds": time.perf_counter() - began,
            "peak_rss_bytes": peak_rss_bytes(),
            "read_and_written_bytes": {
                name: [a - b for a, b in zip(now[name], before[name], strict=True)] for name in now
            },
            "tier_peak_bytes": {name: tier.peak for name, tier in strategy.tiers.items()},
        }
        print(json.dumps(result), flush=True)
        began, before = time.perf_counter(), now
        return result

    four = Four(strategy, presets.named(size), rows)
    yield four.streams["actor"].model.decoder
    yield record("prepare")
    for iteration in range(iterations):
        for phase in four.iteration(torch.randint(50257, (rows, PROMPT)).tolist(), NEW, seed=iteration):
            yield record(phase)


def machine_floors(strategy: Strategy) -> dict[str, float]:
    """Bytes per second of the disk through our own tier (256 MB, past the page cache) and of a copy in RAM; FLOP per
    second of an fp32 matrix product: what bf16 weights are multiplied in on processors without bf16 instructions."""
    tier = strategy.tiers["disk"]
    memory = empty_pages(1 << 28, torch.device("cpu"))
    home = Disk(tier.directory).home(len(memory), torch.uint8, "probe")
    a, b = torch.randn(512, 1600), torch.randn(1600, 6400)
    rates = {}
    for key, amount, call in (
        ("disk_write", len(memory), lambda: home.write(memory)),
        ("disk_read", len(memory), lambda: home.read(memory)),
        ("ram_read", len(memory), lambda: memory.view(torch.float32).sum()),
        ("flops", 40 * 2 * 512 * 1600 * 6400, lambda: [a @ b for _ in range(40)]),
    ):
        call()
        rates[key] = amount / seconds_of(call)
    home.tier.close()
    return rates


def compute_seconds(decoder: Decoder, rows: int, rates: dict[str, float]) -> float:
    """The least one iteration can take: 2 FLOP per weight and token forward, 6 more to learn (backward and one
    recomputation), and decoding, which reads every weight once per token. Attention is left out: it is under 2 %."""
    weights = sum(p.numel() for p in decoder.parameters())
    tokens = rows * (PROMPT + NEW)
    flops = 2 * weights * (rows * PROMPT + 4 * tokens + 2 * 4 * tokens)
    return flops / rates["flops"] + NEW * 2 * weights / rates["ram_read"]
