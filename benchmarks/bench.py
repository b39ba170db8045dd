"""Runs `penstock bench` and keeps what it measured as a result, with commit, machine and versions.

    python -m benchmarks bench NAME [capacity] FLAGS ...    writes benchmarks/results/NAME.json

Several processes: python -m benchmarks bench NAME --processes 2 FLAGS ...
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.facts import write


def main(arguments: list[str]) -> int:
    """Returns the command's exit code; nothing is written unless it is 0."""
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    name, *flags = arguments
    launch = [sys.executable]
    if flags[:1] == ["--processes"]:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", flags[1]]
        flags = flags[2:]
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "result.json"
        code = subprocess.run([*launch, "-m", "penstock", "bench", *flags, "--json", str(out)]).returncode
        if code == 0:
            result = json.loads(out.read_text(encoding="utf-8"))
            result["settings"]["json"] = None
            write(name, result)
    return code
