"""tools/setup.sh without a network: a stand-in for Python records what pip is asked for, and refuses what it must."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCH = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
PYTHON = """#!/bin/sh
case "$*" in
    --version) echo Python 3.14.0 ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *"import torch"*) exit 1 ;;
    "-m pip --version") ;;
    *) echo "$*" >>"$LOG"; case "$*" in $REFUSED) echo no matching distribution >&2; exit 1 ;; esac ;;
esac
"""
FROM_PYTORCH = "--index-url https://download.pytorch.org/whl/cpu"


def setup(tmp_path: Path, refused: str, system: str = "Linux", gpu: bool = False) -> tuple[str, list[str]]:
    """What `sh tools/setup.sh` prints, and what it asks pip to install, without the options that are always there."""
    smi = {"nvidia-smi": "#!/bin/sh\n"} if gpu else {}
    programs = {"python": PYTHON, "uname": f"#!/bin/sh\necho {system}\n"} | smi
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": str(tmp_path / "python"), "LOG": str(log), "REFUSED": refused}
    command = ["sh", "tools/setup.sh", str(tmp_path / "venv")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr == ""
    always = "-m pip install --quiet --disable-pip-version-check --constraint constraints.txt "
    return done.stdout, [line.removeprefix(always) for line in log.read_text().splitlines()]


@pytest.mark.skipif(os.path.exists("/usr/bin/nvidia-smi"), reason="the machine has an NVIDIA GPU")
@pytest.mark.parametrize(
    ("refused", "attempts", "last_message"),
    [("nothing", 1, "the CPU build: this machine"),
     ("*--no-deps torch==*", 2, "the CPU build, from https://download.pytorch.org/whl/cpu"),
     ("*+cpu", 3, "no CPU build was found (see {venv}/setup.log); installing the default build: several gigabytes")],
)  # fmt: skip
def test_without_a_gpu_the_cpu_build_comes_first_and_the_default_build_last(tmp_path, refused, attempts, last_message):
    printed, asked = setup(tmp_path, refused)
    order = [f"--no-deps {TORCH}+cpu", f"--no-deps --timeout 30 --retries 1 {FROM_PYTORCH} {TORCH}+cpu", TORCH]
    assert asked == [*order[:attempts], "--editable .[dev,serve,verify]"]
    assert last_message.format(venv=tmp_path / "venv") in printed.splitlines()[-2]
    assert "no matching distribution" not in printed
    assert ("no matching distribution" in (tmp_path / "venv" / "setup.log").read_text()) == (attempts > 1)


@pytest.mark.parametrize(("system", "gpu"), [("Linux", True), ("Darwin", False)])
def test_with_a_gpu_or_on_macos_the_default_build_comes_at_once(tmp_path, system, gpu):
    printed, asked = setup(tmp_path, "nothing", system, gpu)
    assert asked == [TORCH, "--editable .[dev,serve,verify]"]
    assert "the default build for this machine" in printed


def test_without_a_python_it_says_which_ones_will_do():
    done = subprocess.run(["sh", "tools/setup.sh", "x"], cwd=ROOT, env={"PATH": "/usr/bin:/bin"}, capture_output=True)
    assert done.returncode == 2
    assert b"Python 3.11 to 3.14" in done.stderr
