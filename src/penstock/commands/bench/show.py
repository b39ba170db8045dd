"""What `penstock bench` measured, on one screen."""

from typing import Any

from penstock.units import show_bytes

COLUMNS = ("compute", "link", "disk", "optimizer", "idle")


def as_text(result: dict[str, Any]) -> str:
    """The result as text: work, time, throughput, memory, and the profile if there is one."""
    settings = result["settings"]
    models = ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in result["parameters"].items())
    trained = f"LoRA rank {settings['lora_rank']}" if settings["lora_rank"] else "all weights"
    lines = [
        f"PPO of four {settings['model']} ({models}), {trained}, "
        f"{settings['dtype']}, --strategy {settings['strategy']}",
        f"{result['world']} process{'es' * (result['world'] > 1)} on {result['device']} with "
        f"{result['threads_per_rank']} threads each; {settings['prompt_length']} + "
        f"{settings['max_length'] - settings['prompt_length']} tokens, experience batch "
        f"{settings['experience_batch_size']}, train batch {settings['train_batch_size']}, "
        f"{settings['max_epochs']} epochs",
        "",
        f"{'phase':12}{'seconds':>9}{'times':>7}{'TFLOPS':>9}{'of GEMM':>9}{'host read':>12}{'written':>12}"
        f"{'disk read':>12}{'written':>12}",
    ]
    for name, phase in result["phases"].items():
        bytes_moved = phase["bytes_moved_each"]
        cells = "".join(
            f"{show_bytes(bytes_moved.get(f'{tier}_{way}', 0)):>12}"
            for tier in ("host", "disk")
            for way in ("read", "written")
        )
        lines.append(
            f"{name:12}{phase['seconds']:9.3f}{phase['times_per_iteration']:7}{phase['tflops_per_rank']:9.3f}"
            f"{phase['share_of_gemm_peak']:9.1%}{cells}"
        )
    lines += ["", f"one iteration: {result['seconds_per_iteration']:.3f} s"]
    for name in ("experience", "learning"):
        rates = result[name]
        lines.append(
            f"{name:11} {rates['samples_per_second']:.3f} samples/s "
            f"({rates['samples_per_second_per_rank']:.3f} per rank), {rates['tokens_per_second']:.1f} tokens/s, "
            f"{rates['tflops_per_rank']:.3f} TFLOPS per rank; by the published formula, which knows no KV cache, "
            f"{rates['published_formula_tflops_per_rank']:.3f}"
        )
    lines += ["", "most memory of any process:", *(f"  {line}" for line in memory_lines(result))]
    if result.get("profile"):
        lines += ["", *profile_lines(result["profile"])]
    return "\n".join(lines)


def memory_lines(result: dict[str, Any]) -> list[str]:
    reserved = result["peak_device_reserved_bytes"]
    and_reserved = f", {show_bytes(reserved)} reserved" if reserved is not None else ""
    planned = show_bytes(result["planned"]["device"])
    lines = [f"device {show_bytes(result['peak_device_bytes'])} allocated{and_reserved}; planned {planned}"]
    homes, pinned = show_bytes(result["peak_host_bytes"]), show_bytes(result["pinned_bytes"])
    lines.append(f"host   {homes} in homes, {pinned} pinned")
    if result["peak_disk_bytes"]:
        lines.append(f"disk   {show_bytes(result['peak_disk_bytes'])}")
    return [*lines, f"RSS    {show_bytes(result['peak_rss_bytes'])}"]


def profile_lines(table: dict[str, dict[str, float]]) -> list[str]:
    """Where the profiled iteration's seconds went, phase by phase."""
    lines = [f"{'seconds':12}" + "".join(f"{name:>11}" for name in COLUMNS) + f"{'together':>11}"]
    for phase, row in table.items():
        cells = "".join(f"{row[name]:11.3f}" for name in COLUMNS)
        lines.append(f"{phase:12}{cells}{sum(row[name] for name in COLUMNS):11.3f}")
    return lines
