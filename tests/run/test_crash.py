"""Killed while saving: at every single file operation in turn, and with kill -9 at random times.

The first is exhaustive: a child process counts what it is about to do to files and dies (or is told that the disk is
full) at the n-th, for n = 1, 2, 3 ... until it lives.
"""

import errno
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch

from penstock.errors import ResourceError
from penstock.run import checkpoint
from tests.conftest import TINY  # noqa: F401  (one torch thread: these processes fork)

OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


def save(parent, step, tick=lambda: None, **options):
    """A checkpoint whose files say which step they are of; one file is written in two halves."""

    def write(directory):
        with (directory / "weights").open("wb", buffering=0) as file:
            file.write(bytes([step]) * 500)
            tick()
            file.write(bytes([step]) * 500)
        checkpoint.write_state(directory / "state", {"step": step, "x": torch.full((50,), float(step))})

    return checkpoint.save(parent, step, write, {}, **options)


def act_at(number, act, root):
    """Has `act` called before the n-th file operation of this process from now on. Returns the tick of its counter."""

    def tick():
        tick.count += 1
        if tick.count == number:
            act()

    tick.count = 0

    def hook(event, arguments):
        if event in OPERATIONS and (event != "open" or str(arguments[0]).startswith(str(root))):
            tick()

    sys.addaudithook(hook)  # cannot be taken away again: only ever in a child
    return tick


UNHARMED, BUG, OUT_OF_SPACE, SHRUGGED_OFF = 0, 5, 3, 6


def in_child(work):
    """Runs `work` in a forked process; its exit code, negative for a signal; work returns whether it was hit."""
    child = os.fork()
    if child == 0:
        code = BUG
        try:
            code = SHRUGGED_OFF if work() else UNHARMED
        except ResourceError:
            code = OUT_OF_SPACE
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


SCENES = {
    # name: (steps there before, the save under test, steps that may be the newest afterwards)
    "a new one, the old ones go": ([1, 2], {"step": 3, "keep": 1}, {2, 3}),
    "a new best, the old best goes": ([1, 2], {"step": 3, "keep": 1, "best": True}, {2, 3}),
    "the best is protected": ([1, 2, 3], {"step": 4, "keep": 1}, {3, 4}),
    "the first ever": ([], {"step": 1}, {None, 1}),
    "the same step again": ([1, 2], {"step": 2}, {1, 2}),
    "the only step again": ([2], {"step": 2, "keep": 1}, {None, 2}),
}


def every_point(tmp_path, scene, act):
    """Yields (exit code, checkpoints directory) for each point at which `act` can strike."""
    before, options, _ = SCENES[scene]
    template = tmp_path / "template"
    template.mkdir()
    for step in before:
        save(template, step, keep=9, best=step == 1)
    for number in range(1, 200):
        parent = tmp_path / f"at-{number}"
        shutil.copytree(template, parent)

        def work(number=number, parent=parent):
            tick = act_at(number, act, parent)
            save(parent, tick=tick, **options)
            return tick.count >= number

        code = in_child(work)
        yield code, parent
        if code == UNHARMED:
            assert number > 10
            return
        shutil.rmtree(parent)
    pytest.fail("never lived")


def step_of(path):
    return None if path is None else checkpoint.read_state(path / "state")["step"]


def assert_promise_kept(parent, scene):
    """Whoever reads now finds a whole one without a warning; whoever resumes also finds a clean directory."""
    before, options, allowed = SCENES[scene]
    assert step_of(checkpoint.newest(parent, pytest.fail)) in allowed
    assert step_of(checkpoint.trusted(parent, pytest.fail)) in {1, options["step"], *allowed}
    checkpoint.sweep(parent)
    assert not list(parent.glob("*.tmp-*"))
    newest_step = step_of(checkpoint.newest(parent, pytest.fail))
    assert newest_step in allowed
    assert not before or (newest_step is not None and newest_step >= max(before))
    if newest_step is not None:
        assert (parent / "latest").read_text() == f"step-{newest_step:06d}\n"
    if options.get("best") and newest_step == options["step"]:
        assert step_of(checkpoint.trusted(parent, pytest.fail)) == newest_step
    save(parent, 9)
    assert step_of(checkpoint.newest(parent, pytest.fail)) == 9


@pytest.mark.parametrize("scene", SCENES)
def test_killed_at_every_file_operation(scene, tmp_path):
    for code, parent in every_point(tmp_path, scene, die):
        assert code in (-signal.SIGKILL, UNHARMED)
        assert_promise_kept(parent, scene)


@pytest.mark.parametrize("scene", SCENES)
def test_disk_full_at_every_file_operation(scene, tmp_path):
    for code, parent in every_point(tmp_path, scene, no_space):
        assert code in (OUT_OF_SPACE, SHRUGGED_OFF, UNHARMED)  # mkdir of a directory that is there shrugs
        unfinished = [path.name for path in parent.glob("*.tmp-*")]
        assert all(".tmp-old-" in name or ".tmp-gone-" in name for name in unfinished)  # the new one's are cleaned
        assert_promise_kept(parent, scene)


def in_place(unfinished, final, step, meta):
    """The mistake that the tests above are for: files one by one under the final name."""
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    for path in unfinished.iterdir():
        path.rename(final / path.name)


def old_first(unfinished, final, step, meta):
    """Another one: making room before the new one is there."""
    for path in checkpoint._all(final.parent):
        shutil.rmtree(path)
    real(unfinished, final, step, meta)


real = checkpoint._publish


@pytest.mark.parametrize("mistake", [in_place, old_first])
def test_these_tests_notice_a_save_that_is_not_atomic(mistake, tmp_path, monkeypatch):
    scene, caught = "a new one, the old ones go", 0
    monkeypatch.setattr(checkpoint, "_publish", mistake)
    for _, parent in every_point(tmp_path, scene, die):
        try:
            assert_promise_kept(parent, scene)
        except (AssertionError, pytest.fail.Exception, checkpoint.UserError, FileNotFoundError):
            caught += 1
    assert caught >= 3


def test_kill_9_at_random_times(tmp_path):
    """A child saves without a pause and reports each step that is done; nothing reported may be lost."""
    parent, rng, last = tmp_path / "checkpoints", random.Random(0), 0
    for _ in range(25):
        inlet, outlet = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                for step in range(last + 1, 250):
                    save(parent, step, best=step % 3 == 0)
                    os.write(outlet, bytes([step]))
            finally:
                os._exit(1)
        os.close(outlet)
        last = max([last, *os.read(inlet, 1)])  # it is at work
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        last = max([last, *os.read(inlet, 1000)])
        os.close(inlet)
        newest_step = step_of(checkpoint.newest(parent, pytest.fail))
        assert newest_step in (last, last + 1)
        checkpoint.trusted(parent, pytest.fail)
        checkpoint.sweep(parent)
        assert len(list(parent.glob("step-*"))) <= 3 + 1
        last = newest_step
    assert last >= 25
