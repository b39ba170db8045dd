"""`penstock doctor`: what this machine has, what is missing, and what to do about it; or, of a model, what it is."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from penstock.commands.config import DoctorConfig
from penstock.kernels.machine import available_ram, busy, unnamed

NEEDED = ("torch", "numpy", "safetensors", "tokenizers", "transformers", "rich", "matplotlib", "tomli_w")
EXTRAS = {
    "pyarrow": "reading .parquet and .arrow data: pip install 'penstock[parquet]'",
    "datasets": "datasets on the hub by their name: pip install 'penstock[hub]'",
}


def doctor(config: DoctorConfig) -> int:
    """Prints the findings and returns the exit code: 0 when training can start, 3 when something needed is missing."""
    if config.model is not None:
        from penstock.commands.doctor_model import describe

        lines = describe(config.model)
        print(json.dumps({"model": config.model, "facts": by_name(lines)}) if config.json else "\n".join(lines))
        return 0
    lines, problems = [f"python       {platform.python_version()} on {platform.system()} {platform.machine()}"], []
    if not (3, 11) <= sys.version_info[:2] <= (3, 14):
        problems.append("penstock needs Python 3.11 to 3.14.")
    for name in NEEDED:
        try:
            lines.append(f"{name:12} {importlib.metadata.version(name.replace('_', '-'))}")
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed: run make setup.")
    for name, use in EXTRAS.items():
        if importlib.util.find_spec(name) is None:
            lines.append(f"{name:12} not installed (only for {use})")
    lines.append(f"cores        {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}")
    if note := busy():
        lines.append(f"load         {note}")
    if note := unnamed():
        lines.append(f"name         {note}")
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo", encoding="ascii") as file:
            facts = dict(line.split(":", 1) for line in file)
        total, free = int(facts["MemTotal"].split()[0]) / 2**20, available_ram() / 2**30
        lines.append(f"memory       {free:.1f} GiB free of {total:.1f} GiB")
    disk = shutil.disk_usage(".")
    lines.append(f"disk here    {disk.free / 2**30:.1f} GiB free of {disk.total / 2**30:.1f} GiB")
    if disk.free < 2**30:
        problems.append("Less than 1 GiB of disk is free here: checkpoints will not fit.")
    if importlib.util.find_spec("torch") is not None:
        lines += [*_devices(), f"C            {_compiler()}"]
    if config.json:
        print(json.dumps({"facts": by_name(lines), "problems": problems}))
        return 3 if problems else 0
    print("\n".join(lines))
    for problem in problems:
        print(f"problem: {problem}")
    print("ready to train" if not problems else f"{len(problems)} to mend")
    return 3 if problems else 0


def by_name(lines: Sequence[str]) -> dict[str, list[str]]:
    """The texts of each name, in order; a line without a name goes on with the text before it."""
    facts: dict[str, list[str]] = {}
    for line in lines:
        if name := line[:12].strip():
            texts = facts.setdefault(name, [])
            texts.append(line[13:])
        else:
            texts[-1] += "\n" + line[13:]
    return facts


def _compiler() -> str:
    from penstock.kernels import compile as compiler
    from penstock.kernels import prebuilt
    from penstock.memory import adamw

    library = compiler.compiled(adamw.SOURCE)
    if isinstance(library, str):
        return f"none ({library}): decoding and optimizer updates on this CPU take two to five times as long"
    path = Path(library._name)
    how = f"the wheel's, for {path.stem.split('-')[1]}" if path.parent == prebuilt.PLACE else "compiled for this CPU"
    return f"{how}: decoding and optimizer updates"


def _devices() -> list[str]:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        bf16 = "with" if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() else "without"
        return [f"device       cpu, {torch.get_num_threads()} threads, {bf16} bf16 instructions"]
    if accelerator.type != "cuda":
        return [f"device       {accelerator.type}"]
    lines = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        lines.append(f"device       cuda:{index} {facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    return lines
