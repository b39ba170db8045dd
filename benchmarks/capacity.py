"""PPO on four distinct GPT-2 models of a size, full-parameter, bf16 with split masters, from a disk: peak memory,
bytes moved, and seconds against what the disk and the processor allow.

python -m benchmarks.capacity --size xl --disk DIR        ~45 GB of disk for XL
"""

import argparse
import json
import statistics
import time

import torch

from benchmarks.facts import write
from penstock.commands.bench.work import Four
from penstock.memory.strategy import Strategy
from penstock.memory.tiers import Disk, empty_pages
from penstock.models import presets
from penstock.models.decoder import Decoder
from penstock.run.metrics import peak_rss_bytes


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="xl")
    parser.add_argument("--strategy", default="gemini_nvme")
    parser.add_argument("--disk", default="/tmp/penstock-capacity")
    parser.add_argument("--device-memory", default="4.6GB")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--name", default="capacity_xl")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    strategy = Strategy.named(
        arguments.strategy, dtype="bf16", device="cpu", disk=arguments.disk, device_memory=arguments.device_memory
    )
    phases: list[dict] = []
    floors = [machine_floors(strategy)]
    began = time.perf_counter()

    before: dict[str, tuple[int, int]] = {}

    def mark(name: str) -> None:
        nonlocal began
        now = {tier: (one.bytes_read, one.bytes_written) for tier, one in strategy.tiers.items()}
        moved = {tier: [a - b for a, b in zip(now[tier], before.get(tier, (0, 0)), strict=True)] for tier in now}
        before.update(now)
        phases.append(
            {
                "phase": name,
                "seconds": time.perf_counter() - began,
                "peak_rss_bytes": peak_rss_bytes(),
                "read_and_written_bytes": moved,
                "tier_peak_bytes": {tier: one.peak for tier, one in strategy.tiers.items()},
            }
        )
        print(json.dumps(phases[-1]), flush=True)
        began = time.perf_counter()

    four = Four(strategy, presets.named(arguments.size), arguments.prompts)
    mark("prepare")
    for iteration in range(arguments.iterations):
        prompts = torch.randint(50257, (arguments.prompts, 64)).tolist()
        for phase in four.iteration(prompts, 64, seed=iteration):
            mark(phase)
    peak = peak_rss_bytes()
    floors.append(machine_floors(strategy))
    work = [one for one in phases if one["phase"] != "prepare"]
    read, written = (sum(one["read_and_written_bytes"]["disk"][i] for one in work) for i in (0, 1))
    rates = {key: statistics.mean(one[key] for one in floors) for key in floors[0]}
    disk = read / rates["disk_read"] + written / rates["disk_write"]
    compute = arguments.iterations * compute_seconds(
        four.streams["actor"].model.decoder, arguments.prompts, 64, 64, rates
    )
    seconds = sum(one["seconds"] for one in work)
    print(
        f"{seconds:.0f} s; disk floor {disk:.0f} s, compute floor {compute:.0f} s: {seconds / max(disk, compute):.2f}"
    )
    found = {
        "peak_rss_bytes": peak,
        "seconds": seconds,
        "disk_floor_seconds": disk,
        "compute_floor_seconds": compute,
        "ratio_to_floor": seconds / max(disk, compute),
        "rates": floors,
        "phases": phases,
        "threads": torch.get_num_threads(),
    }
    write(arguments.name, found)


def machine_floors(strategy: Strategy) -> dict[str, float]:
    """Bytes per second of the disk through our own tier (256 MB, past the page cache) and of a copy in RAM; FLOP per
    second of an fp32 matrix product: what bf16 weights are multiplied in on processors without bf16 instructions."""
    tier = strategy.tiers["disk"]
    memory = empty_pages(1 << 28, torch.device("cpu"))
    home = Disk(tier.directory).home(len(memory), torch.uint8, "probe")
    a, b = torch.randn(512, 1600), torch.randn(1600, 6400)
    rates = {}
    for key, amount, run in (
        ("disk_write", len(memory), lambda: home.write(memory)),
        ("disk_read", len(memory), lambda: home.read(memory)),
        ("ram_read", len(memory), lambda: memory.view(torch.float32).sum()),
        ("flops", 40 * 2 * 512 * 1600 * 6400, lambda: [a @ b for _ in range(40)]),
    ):
        run()
        began = time.perf_counter()
        run()
        rates[key] = amount / (time.perf_counter() - began)
    home.tier.close()
    return rates


def compute_seconds(decoder: Decoder, rows: int, prompt: int, new: int, rates: dict[str, float]) -> float:
    """The least one iteration can take: 2 FLOP per weight and token forward, 6 more to learn (backward and one
    recomputation), and decoding, which reads every weight once per token. Attention is left out: it is under 2 %."""
    weights = sum(p.numel() for p in decoder.parameters())
    tokens = rows * (prompt + new)
    flops = 2 * weights * (rows * prompt + 4 * tokens + 2 * 4 * tokens)
    return flops / rates["flops"] + new * 2 * weights / rates["ram_read"]


if __name__ == "__main__":
    main()
