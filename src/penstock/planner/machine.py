"""What this machine was measured to do: written by `penstock bench micro`, read by the planner. No torch in here.

One small JSON file per machine and kind of device in the user's cache, so that a home directory may be shared.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from penstock.errors import UserError
from penstock.kernels.machine import cache_directory, cpu_facts
from penstock.planner.traffic import Rates


def path_of(device: str) -> Path:
    """The file of this machine's ceilings with that kind of device: cpu, cuda, ..."""
    stamp = hashlib.sha256(f"{cpu_facts()} {os.cpu_count()}".encode()).hexdigest()[:12]
    return cache_directory() / f"ceilings-{device}-{stamp}.json"


def save(device: str, ceilings: dict[str, Any]) -> Path:
    """Writes the file, whole or not at all."""
    path = path_of(device)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(ceilings, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path


def known_rates(dtype: str) -> Rates:
    """The measured rates where there are any that can be read, else the planner's defaults: a run did not ask for
    them, and must not end for a damaged file in a cache."""
    try:
        return rates(dtype, Rates().network)
    except UserError:
        return Rates()


def rates(dtype: str, network: float) -> Rates:
    """The planner's rates on this machine, those of its accelerator if one was measured. `dtype`: fp32 or bf16.

    Raises UserError where nothing was measured yet, or the file is damaged.
    """
    paths = map(path_of, ("cuda", "xpu", "mps", "cpu"))
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError("--rates measured: nothing was measured on this machine yet; run penstock bench micro first.")
    try:
        ceilings = json.loads(path.read_text(encoding="utf-8"))
        flops, host = float(ceilings[f"gemm_{dtype}"]), float(ceilings["adamw"])
        link, disk_read, disk_write = (float(ceilings[name]) for name in ("link", "disk_read", "disk_write"))
        own = host if ceilings["device"] == "cpu" else float(ceilings["copy"])
        return Rates(flops, link, disk_read, disk_write, host, network, own, network)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--rates measured: {path} cannot be read ({error}); run penstock bench micro.") from error
