"""What `penstock bench` found, on one screen."""

from typing import Any

from penstock.units import show_bytes

COLUMNS = ("compute", "link", "disk", "optimizer", "idle")


def as_text(found: dict[str, Any]) -> str:
    """The result of one run for people: work, time, throughput, memory, and the profile if there is one."""
    settings = found["settings"]
    million = {name: f"{one / 1e6:.1f}M" for name, one in found["parameters"].items()}
    what = f"LoRA rank {settings['lora_rank']}" if settings["lora_rank"] else "all weights"
    lines = [
        f"PPO of four {settings['model']} ({', '.join(f'{name} {one}' for name, one in million.items())}), {what}, "
        f"{settings['dtype']}, --strategy {settings['strategy']}",
        f"{found['world']} process{'es' * (found['world'] > 1)} on {found['device']} with "
        f"{found['threads_per_rank']} threads each; {settings['prompt_length']} + "
        f"{settings['max_length'] - settings['prompt_length']} tokens, experience batch "
        f"{settings['experience_batch_size']}, train batch {settings['train_batch_size']}, "
        f"{settings['max_epochs']} epochs",
        "",
        f"{'phase':12}{'seconds':>9}{'times':>7}{'TFLOPS':>9}{'of GEMM':>9}{'host read':>12}{'written':>12}"
        f"{'disk read':>12}{'written':>12}",
    ]
    for name, one in found["phases"].items():
        bytes_moved = one["bytes_moved_each"]
        cells = "".join(
            f"{show_bytes(bytes_moved.get(f'{tier}_{way}', 0)):>12}"
            for tier in ("host", "disk")
            for way in ("read", "written")
        )
        lines.append(
            f"{name:12}{one['seconds']:9.3f}{one['times_per_iteration']:7}{one['tflops_per_rank']:9.3f}"
            f"{one['share_of_gemm_peak']:9.1%}{cells}"
        )
    lines += ["", f"one iteration: {found['seconds_per_iteration']:.3f} s"]
    for name in ("experience", "learning"):
        one = found[name]
        lines.append(
            f"{name:11} {one['samples_per_second']:.3f} samples/s ({one['samples_per_second_per_rank']:.3f} per rank), "
            f"{one['tokens_per_second']:.1f} tokens/s, {one['tflops_per_rank']:.3f} TFLOPS per rank; by the published "
            f"formula, which knows no KV cache, {one['published_formula_tflops_per_rank']:.3f}"
        )
    lines += ["", "most memory of any process:", *(f"  {line}" for line in memory_lines(found))]
    if found.get("profile"):
        lines += ["", *profile_lines(found["profile"])]
    return "\n".join(lines)


def memory_lines(found: dict[str, Any]) -> list[str]:
    """Peak bytes per tier."""
    reserved = found["peak_device_reserved_bytes"]
    beside = f", {show_bytes(reserved)} reserved" if reserved is not None else ""
    planned = show_bytes(found["planned"]["device"])
    lines = [f"device {show_bytes(found['peak_device_bytes'])} allocated{beside}; planned {planned}"]
    lines.append(f"host   {show_bytes(found['peak_host_bytes'])} in homes, {show_bytes(found['pinned_bytes'])} pinned")
    if found["peak_disk_bytes"]:
        lines.append(f"disk   {show_bytes(found['peak_disk_bytes'])}")
    return [*lines, f"RSS    {show_bytes(found['peak_rss_bytes'])}"]


def profile_lines(table: dict[str, dict[str, float]]) -> list[str]:
    """Where the profiled iteration's seconds went, phase by phase."""
    lines = [f"{'seconds':12}" + "".join(f"{name:>11}" for name in COLUMNS) + f"{'together':>11}"]
    for phase, row in table.items():
        cells = "".join(f"{row[name]:11.3f}" for name in COLUMNS)
        lines.append(f"{phase:12}{cells}{sum(row[name] for name in COLUMNS):11.3f}")
    return lines
