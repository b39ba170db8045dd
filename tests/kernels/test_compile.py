"""Compiling the engine's C: once, for this machine, and never in the way of a machine without a compiler."""

import ctypes

import pytest

from penstock.kernels import compile as compiler
from penstock.memory.adamw import SOURCE


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
