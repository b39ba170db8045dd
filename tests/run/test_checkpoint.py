"""Checkpoints: written whole or not at all, verified before they are trusted, exact when read back."""

import errno
import json
import math
import os
import random
import resource
import shutil
import subprocess

import numpy
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import ResourceError, UserError
from penstock.run import checkpoint
from penstock.run.checkpoint import DamagedError


def writer(step, numbers=64):
    """A `write` that leaves a model directory and a state, both saying which step they are of."""

    def write(directory):
        (directory / "model").mkdir()
        (directory / "model" / "weights").write_bytes(bytes([step % 256]) * numbers)
        checkpoint.write_state(directory / "state", {"step": step, "moments": torch.full((numbers,), float(step))})

    return write


def save(parent, step, **options):
    return checkpoint.save(parent, step, writer(step), {"world_size": 1}, **options)


def names(parent):
    return sorted(path.name for path in parent.iterdir() if path.is_dir())


# --- what is kept ---------------------------------------------------------------------------------------------------
def test_a_saved_checkpoint_verifies_and_tells_what_wrote_it(tmp_path):
    path = save(tmp_path, 100)
    manifest = checkpoint.verify(path)
    assert path.name == "step-000100"
    assert manifest["step"] == 100
    assert manifest["world_size"] == 1
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["files"]) == {"model/weights", "state.json", "state.safetensors"}
    assert (tmp_path / "latest").read_text() == "step-000100\n"
    assert checkpoint.read_state(path / "state")["step"] == 100


def test_the_oldest_go_first_and_only_after_the_new_one_is_there(tmp_path, monkeypatch):
    names_when_removed = []
    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda p, **kw: (names_when_removed.append(names(tmp_path)), remove(p, **kw)))
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000003", "step-000010"]
    assert all("step-000010" in names_then for names_then in names_when_removed[-1:])


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (999_999, 1_000_000, 2_000_000):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-1000000", "step-2000000"]
    assert checkpoint.newest(tmp_path, pytest.fail).name == "step-2000000"


def test_the_best_is_never_pruned_until_another_is_best(tmp_path):
    save(tmp_path, 1, keep=1, best=True)
    for step in (2, 3, 4):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["step-000001", "step-000004"]
    assert checkpoint.trusted(tmp_path, pytest.fail).name == "step-000001"
    assert checkpoint.newest(tmp_path, pytest.fail).name == "step-000004"
    save(tmp_path, 5, keep=1, best=True)
    assert names(tmp_path) == ["step-000005"]


def test_keep_0_keeps_the_one_just_written(tmp_path):
    save(tmp_path, 1, keep=0)
    save(tmp_path, 2, keep=0)
    assert names(tmp_path) == ["step-000002"]


def test_a_checkpoint_is_never_pruned_in_favour_of_a_damaged_later_one(tmp_path):
    """A run that fell back to step 1 and reaches step 2 must not keep the damaged step 3 in place of step 2."""
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    for step in (2, 3):
        (tmp_path / f"step-{step:06d}" / "state.json").unlink()
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-000002"]
    assert checkpoint.newest(tmp_path, pytest.fail).name == "step-000002"


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 7)
    assert checkpoint.read_state(checkpoint.save(tmp_path, 7, writer(8), {}) / "state")["step"] == 8
    assert names(tmp_path) == ["step-000007"]


def test_a_failing_writer_leaves_everything_as_it_was(tmp_path):
    save(tmp_path, 1)

    def write(directory):
        writer(2)(directory)
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        checkpoint.save(tmp_path, 2, write, {})
    assert names(tmp_path) == ["step-000001"]
    assert (tmp_path / "latest").read_text() == "step-000001\n"


def test_every_byte_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """A power cut may forget what was not synced: files and directories first, then the rename, then the parent."""
    order = []
    sync, rename = checkpoint._sync, type(tmp_path).rename
    monkeypatch.setattr(checkpoint, "_sync", lambda path: (order.append(("sync", path.name)), sync(path)))
    noted = lambda self, to: (order.append(("rename", to.name)), rename(self, to))[1]  # noqa: E731
    monkeypatch.setattr(type(tmp_path), "rename", noted)
    save(tmp_path / "checkpoints", 1)
    named = order.index(("rename", "step-000001"))
    before = {name for verb, name in order[:named] if verb == "sync"}
    assert before >= {"model", "weights", "state.json", "state.safetensors", checkpoint.MANIFEST}
    assert any(name.startswith("step-000001.tmp-") for name in before)
    assert order[named + 1] == ("sync", "checkpoints")
    assert order.index(("rename", "latest")) > named + 1


# --- damage ---------------------------------------------------------------------------------------------------------
def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def make_directory_of(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "flipped byte in the state": (lambda p: flip(p / "state.safetensors"), "bytes have changed"),
    "flipped byte in a model": (lambda p: flip(p / "model" / "weights"), "bytes have changed"),
    "truncated file": (lambda p: cut(p / "state.safetensors"), "bytes instead of"),
    "emptied file": (lambda p: os.truncate(p / "model" / "weights", 0), "has 0 bytes instead of 64"),
    "missing file": (lambda p: (p / "state.json").unlink(), "state.json: is missing"),
    "missing directory": (lambda p: shutil.rmtree(p / "model"), "model/weights: is missing"),
    "extra file": (lambda p: (p / "model" / "more").write_text("x"), "model/more: does not belong there"),
    "link to nowhere": (lambda p: (p / "gone").symlink_to(p / "nothing"), "gone: does not belong there"),
    "directory in place of a file": (lambda p: make_directory_of(p / "state.json"), "state.json: is missing"),
    "missing manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json: is missing"),
    "truncated manifest": (lambda p: cut(p / "manifest.json") or cut(p / "manifest.json"), "is no manifest"),
    "empty manifest": (lambda p: os.truncate(p / "manifest.json", 0), "is no manifest"),
    "manifest of zeros": (lambda p: (p / "manifest.json").write_bytes(bytes(99)), "is no manifest"),
    "manifest not UTF-8": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe{}"), "is no manifest"),
    "manifest of another shape": (lambda p: (p / "manifest.json").write_text('{"files": [1]}'), "is no manifest"),
    "manifest that is a list": (lambda p: (p / "manifest.json").write_text("[]"), "is no manifest"),
    "manifest is a directory": (lambda p: make_directory_of(p / "manifest.json"), "cannot be read"),
    "a file where the checkpoint was": (lambda p: (shutil.rmtree(p), p.write_text("x")), "cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_one_loud_line(name, tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    harm, message = DAMAGE[name]
    harm(tmp_path / "step-000002")
    lines = []
    assert checkpoint.newest(tmp_path, lines.append).name == "step-000001"
    assert len(lines) == 1
    assert "WARNING" in lines[0]
    assert "step-000002" in lines[0]
    assert message in lines[0]
    assert "\n" not in lines[0]


def test_a_damaged_best_falls_back_to_the_newest(tmp_path):
    save(tmp_path, 1, best=True)
    save(tmp_path, 2)
    flip(tmp_path / "step-000001" / "state.json")
    lines = []
    assert checkpoint.trusted(tmp_path, lines.append).name == "step-000002"
    assert len(lines) == 1


@pytest.mark.parametrize("text", [b"", b"step-000009\n", b"../../etc\n", b"\xff\n"])
def test_a_best_file_that_names_nothing_good_is_no_obstacle(tmp_path, text):
    save(tmp_path, 1)
    (tmp_path / "best").write_bytes(text)
    assert checkpoint.trusted(tmp_path, lambda line: None).name == "step-000001"
    save(tmp_path, 2, keep=1, best=True)
    assert names(tmp_path) == ["step-000002"]


def test_a_best_file_that_names_another_checkpoint_than_was_written_is_said_and_nothing_is_removed(tmp_path):
    save(tmp_path, 1, best=True)
    save(tmp_path, 2)
    text = (tmp_path / "best").read_text()
    (tmp_path / "best").write_text(text.replace("step-000001", "step-000003"))
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003"]
    lines = []
    assert checkpoint.trusted(tmp_path, lines.append).name == "step-000003"
    assert len(lines) == 1
    assert "best: names no checkpoint, or has changed" in lines[0]
    (tmp_path / "best").write_text("step-000001\n")  # as older runs have it
    assert checkpoint.trusted(tmp_path, pytest.fail).name == "step-000001"


def test_when_all_are_damaged_the_error_lists_what_was_tried(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (tmp_path / "step-000001" / "manifest.json").unlink()
    cut(tmp_path / "step-000002" / "model" / "weights")
    flip(tmp_path / "step-000003" / "model" / "weights")
    with pytest.raises(UserError) as caught:
        checkpoint.newest(tmp_path, lambda line: None)
    text = str(caught.value)
    assert "\n" not in text
    for part in ("step-000001/manifest.json: is missing", "step-000002/model/weights: has 63 bytes", "step-000003"):
        assert part in text


def test_no_checkpoint_at_all_is_none_and_leftovers_do_not_count(tmp_path):
    assert checkpoint.newest(tmp_path / "nothing", pytest.fail) is None
    (tmp_path / "step-000001.tmp-77").mkdir()
    (tmp_path / "notes.txt").touch()
    assert checkpoint.newest(tmp_path, pytest.fail) is None


def test_no_flipped_bit_anywhere_goes_unnoticed(tmp_path):
    """300 random flips over all files: found out, or (white space in the manifest) without any effect."""
    path, rng = save(tmp_path, 1), random.Random(0)
    clean = checkpoint.verify(path)
    files = [file for file in path.rglob("*") if file.is_file()]
    for _ in range(300):
        file = rng.choice(files)
        whole = file.read_bytes()
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        try:
            assert checkpoint.verify(path) == clean
            assert file.name == checkpoint.MANIFEST
        except DamagedError:
            pass
        file.write_bytes(whole)
    assert checkpoint.verify(path) == clean


# --- no room --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_paragraph_and_the_last_good_checkpoint_stays(tmp_path, number):
    save(tmp_path / "checkpoints", 1)

    def write(directory):
        writer(2)(directory)
        raise OSError(number, os.strerror(number), str(directory))

    with pytest.raises(ResourceError) as caught:
        checkpoint.save(tmp_path / "checkpoints", 2, write, {})
    assert f"step-000001 is intact. Free some space (with --keep 1 a run needs room for two), then: penstock resume {tmp_path}" in str(caught.value)  # fmt: skip  # noqa: E501
    assert names(tmp_path / "checkpoints") == ["step-000001"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ESTALE])
@pytest.mark.parametrize("named", [OSError, lambda number, text: safetensors.SafetensorError(f"I/O error: {text} (os error {number})")])  # fmt: skip  # noqa: E501
def test_a_disk_that_fails_is_one_paragraph_and_the_last_good_checkpoint_stays(tmp_path, number, named):
    save(tmp_path / "checkpoints", 1)

    def write(directory):
        writer(2)(directory)
        raise named(number, os.strerror(number))

    with pytest.raises(ResourceError, match=rf"step-000001 is intact\. .*, then: penstock resume {tmp_path}"):
        checkpoint.save(tmp_path / "checkpoints", 2, write, {})
    assert names(tmp_path / "checkpoints") == ["step-000001"]


def test_other_errors_of_the_system_are_not_called_a_full_disk(tmp_path):
    def write(directory):
        raise FileNotFoundError(errno.ENOENT, "a bug", "x")

    with pytest.raises(FileNotFoundError):
        checkpoint.save(tmp_path, 2, write, {})


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte, where the machine lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip("not allowed to mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("part", ["tensors", "bytes"])
def test_a_really_full_disk(small_disk, part):
    """Tensors are written by safetensors, which has an error type of its own; everything else by Python."""

    def write(directory):
        if part == "tensors":
            checkpoint.write_state(directory / "state", {"x": torch.zeros(100_000)})
        else:
            (directory / "weights").write_bytes(bytes(400_000))

    parent = small_disk / "run" / "checkpoints"
    for step in (1, 2):
        checkpoint.save(parent, step, write, {})
    with pytest.raises(ResourceError, match=r"the disk is full, so the checkpoint of step 3 .*step-000002 is intact"):
        checkpoint.save(parent, 3, write, {})
    assert names(parent) == ["step-000001", "step-000002"]
    assert not list(parent.glob("*.tmp-*"))
    assert checkpoint.newest(parent, pytest.fail).name == "step-000002"
    shutil.rmtree(parent / "step-000001")  # the user makes room, and the run goes on
    checkpoint.save(parent, 3, write, {})
    assert checkpoint.newest(parent, pytest.fail).name == "step-000003"


def test_a_limit_on_file_size(tmp_path):
    """The same without the right to mount: `ulimit -f` refuses the write in the kernel (in a child: for good)."""
    save(tmp_path, 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            checkpoint.save(tmp_path, 2, writer(2, numbers=10_000), {})
        except ResourceError:
            code = 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert names(tmp_path) == ["step-000001"]


# --- state ----------------------------------------------------------------------------------------------------------
def test_state_comes_back_exactly(tmp_path):
    flat = torch.arange(12.0)
    state = {
        "floats": [0.1, 1e-308, 5e-324, math.inf, -math.inf, -0.0, 1 / 3],
        "ints": [2**200, -(2**63), 0],
        "plain": {"none": None, "yes": True, "text": "\u00e4 \u2028 \ud800 \n"},
        "empty": [{}, [], ""],
        "bf16": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(3),
        "none at all": torch.zeros(0, 4),
        "bool": torch.tensor([True, False]),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "nan": torch.tensor([math.nan, -math.nan]),
        "column": flat.view(3, 4)[:, 1],
        "twice": [flat, flat, flat[:5], flat[5:]],
        "a.b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
        "trained": torch.nn.Parameter(torch.ones(2)),
    }
    checkpoint.write_state(tmp_path / "state", state)
    same(state, checkpoint.read_state(tmp_path / "state"))


def same(a, b):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        bits = a.detach().contiguous().view(-1).view(torch.uint8) if a.numel() else a
        assert torch.equal(bits, b.view(-1).view(torch.uint8) if a.numel() else b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert repr(a) == repr(b)


def test_tuples_become_lists_and_odd_keys_are_refused(tmp_path):
    checkpoint.write_state(tmp_path / "state", {"x": (1, (2.5, "y"))})
    assert checkpoint.read_state(tmp_path / "state") == {"x": [1, [2.5, "y"]]}
    for odd in ({1: "x"}, {"deep": {"__tensor__": 1}}):
        with pytest.raises(TypeError, match="would not come back as it is"):
            checkpoint.write_state(tmp_path / "state", odd)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text().filter(lambda k: k != "__tensor__"), inner),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(state=st.dictionaries(st.text().filter(lambda k: k != "__tensor__"), JSON))
def test_any_plain_state_comes_back(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("state") / "state"
    checkpoint.write_state(path, state)
    same(state, checkpoint.read_state(path))


def test_random_streams_go_on_where_they_were(tmp_path):
    def draw():
        return [random.random(), random.gauss(0, 1), numpy.random.rand(), numpy.random.randn(), float(torch.rand(()))]

    checkpoint.seed_everything(5)
    draw()
    checkpoint.write_state(tmp_path / "state", {"rng": checkpoint.rng_state()})
    expected = [draw() for _ in range(3)]
    checkpoint.seed_everything(6)
    assert draw() != expected[0]  # the negative control
    checkpoint.set_rng_state(checkpoint.read_state(tmp_path / "state")["rng"])
    assert [draw() for _ in range(3)] == expected


def test_the_manifest_is_plain_json_that_lists_sizes(tmp_path):
    weights = json.loads((save(tmp_path, 3) / "manifest.json").read_text())["files"]["model/weights"]
    assert (weights["bytes"], len(weights["sha256"])) == (64, 64)
