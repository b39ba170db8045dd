"""The commands under strategies that move weights: the same run as resident, and checkpoints that any of them reads."""

import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from penstock.cli import main
from penstock.memory.strategy import Strategy
from penstock.models.roles import Actor
from penstock.run.optimizer_files import read_optimizer, write_optimizer
from tests.conftest import ROWS, comparisons, demonstrations, last_model, metrics, save_tiny, torchrun, votes

SHARED = ["--max-length", "32", "--batch-size", "6", "--micro-batch-size", "2", "--steps", "4", "--lr", "1e-3"]
SCORE = """
def score(prompts, responses, *, response_ids=None, **_):
    return [ids.count(5) - ids.count(6) for ids in response_ids]
"""


def place(name, folder):
    disk = ["--disk", str(folder / "disk")] if name == "gemini_nvme" else []
    return ["--strategy", name, "--device", "cpu", *disk]


def command(stage, folder, model, jsonl):
    if stage == "ppo":
        (folder / "fn.py").write_text(SCORE)
        data = jsonl([{"prompt_ids": [1, 3 + i, *range(3, 3 + i)]} for i in range(9)])
        more = ["--actor", model, "--reward-fn", f"{folder / 'fn.py'}:score", "--max-new-tokens", "6"]
    elif stage == "distill":
        data, teacher = jsonl(demonstrations(12)), save_tiny(folder / "teacher", 1, num_layers=3)
        more = ["--model", model, "--teacher", teacher, "--teacher-top-k", "5", "--on-policy", "0.5"]
        more += ["--max-new-tokens", "6", "--samples", "2"]
    else:
        data = jsonl({"sft": demonstrations, "kto": votes}.get(stage, comparisons)(12))
        more = ["--model", model]
    return [stage, *more, "--data", data, *SHARED]


@pytest.mark.parametrize("name", ["zero2_cpu", "gemini", "gemini_cpu", "gemini_nvme"])
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo", "kto", "distill"])
def test_a_stage_is_the_same_run_wherever_its_weights_live(stage, name, tmp_path, tiny_model, jsonl):
    arguments = command(stage, tmp_path, tiny_model(), jsonl)
    for other in ("naive", name):
        main([*arguments, "--out", str(tmp_path / other), *place(other, tmp_path)])
    for a, b in zip(metrics(tmp_path / "naive"), metrics(tmp_path / name), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], abs=1e-4), key


def test_a_checkpoint_of_two_ranks_on_disk_goes_on_resident_and_back(tmp_path, tiny_model, jsonl):
    """2 ranks gemini_nvme -> 1 rank naive -> 2 ranks gemini_nvme: not a bit of weights or states is lost on the way."""
    arguments = [*command("sft", tmp_path, tiny_model(), jsonl), "--checkpoint-every", "2", "--keep", "9"]
    run, seen = tmp_path / "run", []

    torchrun("-m", "penstock", *arguments, "--out", str(run), *place("gemini_nvme", tmp_path))
    whole = run / "checkpoints" / "step-000004"
    for resume in (
        lambda: main(["resume", str(run), *place("naive", tmp_path)]),
        lambda: torchrun("-m", "penstock", "resume", str(run), *place("gemini_nvme", tmp_path)),
    ):
        before = {name: load_file(whole / name) for name in ("model/model.safetensors", "model.optimizer.safetensors")}
        seen.append(before)
        for old in (whole, *(run / "checkpoints").glob("step-000003*")):
            if old.exists():
                os.rename(old, tmp_path / f"{len(seen)}-{old.name}")
        resume()
        for name, tensors in before.items():
            for key, tensor in load_file(whole / name).items():
                assert torch.allclose(tensor, tensors[key], atol=1e-5), key
    theirs = AutoModelForCausalLM.from_pretrained(whole / "model").state_dict()
    for key, tensor in load_file(whole / "model" / "model.safetensors").items():
        assert torch.equal(theirs[key], tensor)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_a_checkpoint_holds_comes_back_bit_by_bit_under_any_strategy(name, dtype, tmp_path, tiny_model, jsonl):
    arguments = command("sft", tmp_path, tiny_model(), jsonl)
    run = tmp_path / "run"
    main([*arguments, "--out", str(run), "--dtype", dtype, *place("gemini_cpu", tmp_path)])
    before = load_file(last_model(run).parent / "model.optimizer.safetensors")

    disk = str(tmp_path / "disk") if name == "gemini_nvme" else None
    strategy = Strategy.named(name, dtype=dtype, device="cpu", disk=disk)
    with strategy.init():
        actor = Actor.from_pretrained(str(last_model(run)))
    stream = strategy.prepare(actor)
    read_optimizer(last_model(run).parent / "model.optimizer", 4, stream)
    write_optimizer(tmp_path / "again", stream)
    assert (tmp_path / "again.safetensors").read_bytes() == (
        last_model(run).parent / "model.optimizer.safetensors"
    ).read_bytes()
    actor.save_pretrained(tmp_path / "again")
    for key, tensor in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(last_model(run) / "model.safetensors")[key])
    assert any(bool((one != 0).any()) for key, one in before.items() if key.endswith("exp_avg"))
