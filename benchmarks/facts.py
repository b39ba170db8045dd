"""What every measured figure carries with it: when, on which machine, from which commit, by which command.

`run_measures` is the command line of benchmarks that are a few functions: the flags are the functions' parameters.
"""

import argparse
import inspect
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def flags(doc: str | None) -> argparse.ArgumentParser:
    """A benchmark's parser; its help is the module's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_measures(
    arguments: Sequence[str], doc: str | None, measures: dict[str, Callable[..., dict]], prefix: str, *packages: str
) -> int:
    """Runs the named measures, by default all, and writes PREFIX_NAME.json for each. Each flag is a parameter of one
    of them, with its default."""
    parser = flags(doc)
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help=f"{', '.join(measures)}; default: all")
    takes = {name: inspect.signature(measure).parameters for name, measure in measures.items()}
    defaults = {name: p.default for parameters in takes.values() for name, p in parameters.items()}
    for name, default in defaults.items():
        kind = str if default is None else type(default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS)
    options = vars(parser.parse_args(arguments))
    names = options.pop("measures") or list(measures)
    if unknown := set(names) - set(measures):
        parser.error(f"no measure {', '.join(sorted(unknown))}; there are {', '.join(measures)}")
    if unused := {name for name in options if not any(name in takes[measure] for measure in names)}:
        parser.error(f"{', '.join(names)} does not take --{', --'.join(sorted(unused)).replace('_', '-')}")
    import torch

    for name in names:
        torch.manual_seed(0)
        result = measures[name](**{key: value for key, value in options.items() if key in takes[name]})
        print(name, json.dumps({key: value for key, value in result.items() if key != "seconds"}, indent=1), flush=True)
        write(f"{prefix}_{name}", {"threads": torch.get_num_threads(), **result}, *packages)
    return 0


def result_path(name: str) -> Path:
    """benchmarks/results/NAME.json, or $OUT/NAME.json where OUT is set."""
    return Path(os.environ.get("OUT", RESULTS)) / f"{name}.json"


def write(name: str, measured: dict[str, Any], *packages: str) -> Path:
    """Writes a result: the facts, then the figures."""
    # A path of this machine helps nobody: its last part stands for it.
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    dirty = " with uncommitted changes" if _git("status", "--porcelain", "src") else ""
    facts = {
        "command": f"python -m benchmarks {shlex.join(words)}".strip(),
        "commit": os.environ.get("COMMIT") or commit_of(ROOT) + dirty,  # a machine may have the files alone
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {"cpu": cpu_kind(), "cores": os.cpu_count(), "ram_gb": round(_ram_bytes() / 2**30), **_gpu()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", *packages)}},
    }
    path = result_path(name)
    path.write_text(json.dumps({**facts, **measured}, indent=1) + "\n", encoding="utf-8")
    return path


def commit_of(checkout: Path) -> str:
    """The commit that is checked out in a directory."""
    return _git("rev-parse", "HEAD", checkout=checkout)


def _git(*arguments: str, checkout: Path = ROOT) -> str:
    return subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True).stdout.strip()


def cpu_kind() -> str:
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability() + (" with AMX" if torch.cpu._is_amx_tile_supported() else "")
    return f"{names[0] if names else platform.machine()}, torch's capability {capability}"


def _ram_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"gpu": None}
    return {"gpu": torch.cuda.get_device_name(), "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory}
