"""No C entry point reads or writes beyond its arguments, whatever their shapes and numbers."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PATIENCE
from tests.kernels.sanitized import CASES

COMPILER = shutil.which(os.environ.get("CC", "cc"))
ASAN = "detect_leaks=0:detect_stack_use_after_return=0"
"""Frames that are kept to find uses after a return are not aligned as gcc's own AVX-512 stores need it (its bug 110027;
14.2 has it still): they would be reported as ours."""


def library(name: str) -> str:
    """The compiler's own copy of a sanitizer. Skips the test where it has none."""
    if COMPILER is None or sys.platform != "linux":
        pytest.skip("no C compiler, or not Linux")
    command = [COMPILER, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return path if Path(path).is_absolute() else pytest.skip(f"the compiler has no {name}")


def campaign(calls: int, seed: int, march: str, cache: Path) -> None:
    settings = {
        "LD_PRELOAD": f"{library('libasan.so')}:{library('libubsan.so')}", "XDG_CACHE_HOME": str(cache),
        "ASAN_OPTIONS": ASAN, "UBSAN_OPTIONS": "print_stacktrace=1", "OMP_NUM_THREADS": "2",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.kernels.sanitized", str(calls), str(seed), march]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, **settings})
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == {case.__name__: calls for case in CASES}
    assert len(list((cache / "penstock").glob("*.so"))) == 2  # compiled, and not left to torch


def test_sanitizers_find_nothing_in_a_few_calls(tmp_path):
    campaign(6, 0, "native", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("march", ["native", "x86-64-v3", "x86-64"])
def test_sanitizers_find_nothing_in_many_calls(march, tmp_path):
    if platform.machine() != "x86_64" and march != "native":
        pytest.skip("names of x86")
    campaign(1000, 1000, march, tmp_path)
