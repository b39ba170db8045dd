"""Compiling the engine's C: once, for this machine, and never in the way of a machine without a compiler."""

import ctypes

import pytest
import torch

from penstock.memory import native

needs_a_compiler = pytest.mark.skipif(isinstance(native.library(), str), reason=str(native.library()))


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """native.library with an empty cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return native.library.__wrapped__


@needs_a_compiler
def test_it_is_compiled_once_and_nothing_else_stays_in_the_cache(anew, tmp_path, monkeypatch):
    assert isinstance(anew(), ctypes.CDLL)
    (made,) = (tmp_path / "penstock").iterdir()
    assert made.match("adam-*.so")
    monkeypatch.setattr(native.subprocess, "run", lambda *a, **k: pytest.fail("compiled twice"))
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


@needs_a_compiler
def test_it_takes_whole_cache_lines_of_cpu_tensors_only():
    rule = native.Rule(1, 0.1, 0.95, 0.05, 1e-3, 1, 1e-5, 1)
    assert native.adamw([torch.zeros(130) for _ in range(4)], rule) == 128
    assert native.adamw([torch.zeros(63) for _ in range(4)], rule) == 0
    assert native.adamw([torch.zeros(64, device="meta") for _ in range(4)], rule) == 0
