"""Wheels and source archives are whole, and a wheel can bring the C, compiled for several sets of instructions."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from penstock.errors import UserError
from penstock.kernels import cpu_ops, prebuilt
from penstock.memory import adamw
from tests.conftest import PATIENCE

ROOT = Path(__file__).parents[2]
PYTHON = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(*command, cwd=ROOT, **environment):
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=PYTHON | environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def tracked(*folders):
    """What git has in these folders."""
    return set(run("git", "ls-files", *folders).split())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source archive, built from a copy: a build leaves files in the folder that it is made from."""
    copy, out = tmp_path_factory.mktemp("copy") / "penstock", tmp_path_factory.mktemp("sdist")
    for name in tracked("."):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", script, out, cwd=copy)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def level():
    """The best of this machine's for which there is a library."""
    levels = prebuilt.levels_of(platform.machine())
    if shutil.which("cc") is None:
        pytest.skip("no compiler")
    return next(name for name in levels if prebuilt.LEVELS[name][1] <= set(prebuilt.cpu_facts().split()))


@pytest.fixture(scope="module")
def wheels(source, level, tmp_path_factory):
    """From the source archive: the plain wheel, and one with libraries."""
    built = []
    for kernels in ("", level):
        out = tmp_path_factory.mktemp("wheel")
        options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", out)
        run(sys.executable, "-m", "pip", "wheel", source, *options, PENSTOCK_KERNELS=kernels)
        built += out.iterdir()
    return built


def test_archive_and_wheel_have_every_file_of_the_package(source, wheels):
    package = tracked("src/penstock", "src/chatgpt")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    plain, ready = wheels
    assert plain.name.endswith("-py3-none-any.whl")
    assert plain.stat().st_size <= 2_000_000
    assert platform.machine() in ready.name
    with zipfile.ZipFile(plain) as wheel:
        assert {name.removeprefix("src/") for name in package} <= set(wheel.namelist())
        assert not any(name.endswith(".so") for name in wheel.namelist())


def test_without_a_compiler_the_wheels_code_computes_as_torch_does(wheels, level, tmp_path):
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", tmp_path / "site", wheels[1])
    script = """
import torch, penstock
from penstock.kernels import cpu_ops

assert penstock.__file__.startswith(SITE), penstock.__file__
x, weight = torch.randn(3, 40), torch.randn(24, 40)
with cpu_ops.one_token():
    assert cpu_ops.ready(x.device, x.dtype), "torch computes"
    assert (cpu_ops.product(x, weight) - x @ weight.t()).abs().max() < 1e-5
"""
    empty = tmp_path / "empty"
    empty.mkdir()
    where = {"PYTHONPATH": str(tmp_path / "site"), "CC": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    run(sys.executable, "-c", f"SITE = {str(tmp_path)!r}{script}", cwd=empty, **where)
    assert f"the wheel's, for {level}" in run(sys.executable, "-m", "penstock", "doctor", cwd=empty, **where)
    assert not [*empty.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [False, True])
def test_a_wheel_trains_the_demo_in_an_empty_folder(kernels, wheels, tmp_path):
    """Without a file of the checkout; with libraries inside also without a compiler."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", site, wheels[kernels])
    empty.mkdir()
    where = {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    compiler = {"CC": "no-such-compiler"} if kernels else {}
    printed = run(sys.executable, site / "bin" / "penstock", "demo", cwd=empty, **where, **compiler)
    assert printed.endswith(f"wrote {Path('runs', 'demo', 'report.html')}\n")
    assert [path.name for path in empty.iterdir()] == ["runs"]
    assert bool([*(tmp_path / "cache").rglob("*.so")]) != kernels


def test_the_libraries_are_those_that_are_asked_for():
    asked = {files[0].stem: files for files in (cpu_ops.SOURCES, [adamw.SOURCE])}
    assert asked.keys() == prebuilt.LIBRARIES.keys()
    for name, sources in prebuilt.LIBRARIES.items():
        assert sources == tuple(file.name for file in asked[name] if file.suffix == ".c")


@pytest.mark.parametrize(
    ("instructions", "choice"),
    [("sse4_2 ssse3 popcnt", "x86"), ("ssse3", None), (" ".join(sorted(prebuilt.AVX2)), "avx2"),
     (" ".join(sorted({*prebuilt.AVX512, "avx512_bf16", "sse4_2"})), "avx512bf16")],
)  # fmt: skip
def test_the_best_library_that_the_processor_can_run(instructions, choice, tmp_path, monkeypatch):
    monkeypatch.setattr(prebuilt, "PLACE", tmp_path)
    monkeypatch.setattr(prebuilt, "cpu_facts", lambda: f"flags : {instructions}")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for level in prebuilt.LEVELS:
        (tmp_path / f"adamw-{level}.so").touch()
    library = prebuilt.best("adamw")
    assert (library and library.stem) == (choice and f"adamw-{choice}")


def test_levels_are_wanted_by_name(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert prebuilt.wanted("") == []
    assert prebuilt.wanted("all") == ["amx", "avx512bf16", "avx512", "avx2", "x86"]
    assert prebuilt.wanted("avx2 arm") == ["avx2", "arm"]  # by a compiler for another machine
    with pytest.raises(UserError, match="no level avx3; give all, or some of amx, avx512bf16, avx512, avx2, x86"):
        prebuilt.wanted("avx2 avx3")


def test_a_wheel_of_an_unknown_level_is_refused():
    """Where it is built: setup.py asks."""
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=PYTHON | {"PENSTOCK_KERNELS": "sse9"}, capture_output=True, text=True)
    assert done.returncode
    assert "UserError: PENSTOCK_KERNELS=sse9: there is no level sse9" in done.stderr


SPELLED = {"BMI": "bmi1", "LZCNT": "abm", "AVX512BF16": "avx512_bf16"}
"""/proc/cpuinfo's names of what compilers call otherwise."""
IMPLIED = {"SSE", "SSE2", "SSE3", "SSE4_1", "AVX"}
"""Every processor that has what is asked for has these too."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of another processor")
@pytest.mark.parametrize("level", prebuilt.levels_of("x86_64"))
def test_a_processor_is_asked_for_all_that_the_compiler_may_use(level):
    options, asked = prebuilt.LEVELS[level]
    macros = run(shutil.which("cc") or pytest.skip("no compiler"), *options, "-dM", "-E", "-x", "c", "/dev/null")
    names = set(re.findall(r"#define __((?:SSE|SSSE|AVX|AMX|BMI|F16C|FMA|LZCNT|MOVBE|POPCNT)\w*?)__ 1", macros))
    used = {SPELLED.get(name, name.lower()) for name in names - IMPLIED if not name.endswith("MATH")}
    assert "popcnt" in used
    assert used - asked <= (set() if level == "x86" else prebuilt.LEVELS["x86"][1])
