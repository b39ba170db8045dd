"""Optimizer states by name, of both kinds of file. Tests of FSDP2 and of several ranks write and read them whole."""

import warnings

import torch
import torch.distributed.checkpoint as dcp

from penstock.run.optimizer_files import saved_states


def test_what_a_directory_lists_is_read_once_for_all_of_its_tensors(tmp_path, monkeypatch):
    states = {f"{name}.{kind}": torch.randn(3, 5) for name in "abc" for kind in ("master", "exp_avg")}
    with warnings.catch_warnings(action="ignore"):
        dcp.save(states, checkpoint_id=tmp_path / "model", no_dist=True)
    real, calls = dcp.FileSystemReader.read_metadata, []
    monkeypatch.setattr(dcp.FileSystemReader, "read_metadata", lambda *args, **options: calls.append(1) or real(*args))
    with saved_states(tmp_path / "model") as read:
        for name, state in states.items():
            assert torch.equal(read(*name.split(".")), state)
    assert calls == [1]
