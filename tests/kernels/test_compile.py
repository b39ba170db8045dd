"""Compiling the engine's C: once, for this machine, and never in the way of a machine without a compiler."""

import ctypes
import os
import shutil
import subprocess
import warnings

import pytest
import torch

from penstock.kernels import compile as compiler
from penstock.kernels import cpu_ops
from penstock.memory.adamw import SOURCE, AdamW, states_of
from penstock.models.decoder import Decoder
from penstock.rollout.engine import Engine
from tests.conftest import TINY


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """compiler.compiled with an empty cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return lambda: compiler.compiled.__wrapped__(SOURCE)


@pytest.mark.skipif(isinstance(compiler.compiled(SOURCE), str), reason=str(compiler.compiled(SOURCE)))
def test_it_is_compiled_once_and_nothing_else_stays_in_the_cache(anew, tmp_path, monkeypatch):
    assert isinstance(anew(), ctypes.CDLL)
    (made,) = (tmp_path / "penstock").iterdir()
    assert made.match("adamw-*.so")
    monkeypatch.setattr(compiler.subprocess, "run", lambda *a, **k: pytest.fail("compiled twice"))
    assert isinstance(anew(), ctypes.CDLL)


@pytest.mark.parametrize(
    ("compiler", "why"), [("no-such-compiler", "no C compiler"), ("false", "false"), ("true", "No such file")]
)
def test_what_does_not_compile_is_named_and_left_alone(anew, tmp_path, monkeypatch, compiler, why):
    monkeypatch.setenv("CC", compiler)
    assert why in anew()
    assert not list(tmp_path.glob("penstock/*"))


def test_a_cache_that_cannot_be_written_is_named(anew, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert isinstance(anew(), str)


COMPILES = not isinstance(compiler.compiled(SOURCE), str)


@pytest.mark.skipif(not COMPILES, reason="no C compiler")
@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_cache_that_others_can_write_to_is_not_used(anew, tmp_path, mode):
    assert isinstance(anew(), ctypes.CDLL)
    (tmp_path / "penstock").chmod(mode)
    assert "can write" in anew()


@pytest.mark.skipif(not COMPILES, reason="no C compiler")
def test_a_cache_of_another_user_is_not_used(anew, monkeypatch):
    assert isinstance(anew(), ctypes.CDLL)
    owner = os.geteuid()
    for user, usable in ((owner, True), (owner + 1, owner == 0), (0, owner == 0)):  # root could put code anywhere
        monkeypatch.setattr(compiler.os, "geteuid", lambda user=user: user)
        assert isinstance(anew(), ctypes.CDLL) == usable


@pytest.mark.skipif(not COMPILES, reason="no C compiler")
def test_a_library_that_others_can_write_to_is_made_anew(anew, tmp_path):
    anew()
    (library,) = (tmp_path / "penstock").iterdir()
    library.unlink()  # what this process has loaded must stay whole: its last functions run when it ends
    library.write_bytes(b"theirs")
    library.chmod(0o770)
    assert isinstance(anew(), ctypes.CDLL)
    assert library.stat().st_mode & 0o777 == 0o700
    assert library.read_bytes() != b"theirs"


def test_where_c_would_help_a_missing_compiler_is_said_once(no_compiler):
    """By an engine on a CPU and by an update; not by an engine on another device."""
    weights, states = torch.zeros(64), {name: torch.zeros(64) for name in states_of(torch.float32)}
    decoder = Decoder(TINY)
    for call in (
        lambda: Engine(decoder),
        lambda: AdamW().update(weights, states, torch.ones(64), lr=1e-3, scale=1.0, step=1),
    ):
        compiler.warn_slow.cache_clear()
        with pytest.warns(UserWarning, match="no compiler.*two to five times as long"):
            call()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call()
    compiler.warn_slow.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cpu_ops.warn_without(torch.device("cuda"))


FLAGS = [flag for flag in compiler.FLAGS if "native" not in flag]
SOURCES = [str(source) for source in (*cpu_ops.SOURCES, SOURCE) if source.suffix == ".c"]


@pytest.mark.parametrize(
    "command",
    [
        ("cc", "-march=x86-64"),
        ("cc", "-march=x86-64-v3"),
        ("aarch64-linux-gnu-gcc", "-march=armv8-a"),
        ("musl-gcc", "-march=x86-64", "-c"),
    ],
    ids=" ".join,
)
def test_other_processors_and_c_libraries_take_the_sources(command, tmp_path):
    """Compiled for them, not run. gcc's OpenMP is made for glibc: with musl nothing is linked."""
    if shutil.which(command[0]) is None or (command[0] == "cc" and os.uname().machine != "x86_64"):
        pytest.skip(f"{command[0]} is not installed, or not one for x86")
    flags = [flag for flag in FLAGS if "-c" not in command or flag != "-shared"]
    done = subprocess.run(
        [*command, *flags, "-O1", "-Wno-psabi", *SOURCES], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
