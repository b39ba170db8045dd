"""What several ranks do, on a device that is not the CPU: nothing is left on the CPU by accident, and Apple's GPU gets
nothing that it has not. See tests/imagined.py. PyTorch's rows (fsdp, hsdp) need a real device's streams."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import torchgen
import yaml

from penstock.memory.placement import NAMES, PYTORCH
from penstock.run import report
from tests import imagined
from tests.algorithms.test_ranks import assert_near, command_line
from tests.conftest import PATIENCE, cli, metrics, save_tiny
from tests.zygote import zygotic

RUNS = {"sft": "gemini_cpu", "ppo": "gemini"}
CAMPAIGN = {
    "experts": "gemini", "reward": "zero2_cpu", "ppo kept": "ddp", "grpo": "gemini_nvme", "dpo": "zero1_cpu",
    "kto": "zero2", "distill": "zero1", "distill stored": "gemini_auto",
}  # fmt: skip
"""A stage each, and the strategy that it runs under. All strategies are among them."""
SHARED = ["--max-length", "32", "--batch-size", "3", "--micro-batch-size", "2", "--steps", "2", "--lr", "1e-3"]
"""Three rows for four ranks: one of them has none in any step. Rollouts have six, and a rank whose own have ended waits
for the others."""
MORE = {"sft": ["--early-stopping-patience", "1"], "reward": ["--early-stopping-patience", "1"],
        "ppo": ["--batch-size", "6"], "ppo kept": ["--batch-size", "6", "--keep-activations", "--lora", "2"],
        "grpo": ["--batch-size", "8"]}  # fmt: skip


def jobs(runs, folder, *placement, strategies=None):
    """Command lines of these runs, and of one that goes on."""
    for stage, strategy in runs.items():
        run = [*command_line(stage, folder, *SHARED), *MORE.get(stage, ()), "--out", str(folder / "runs" / stage)]
        disk = ["--disk", str(folder / "disk")] if strategy == "gemini_nvme" and strategies is None else []
        yield [*run, "--dtype", "fp32", *placement, "--strategy", strategies or strategy, *disk]
    if "sft" in runs:
        yield ["resume", str(folder / "runs" / "sft"), "--steps", "3"]


def test_every_strategy_of_ours_is_among_the_runs():
    assert {*RUNS.values(), *CAMPAIGN.values()} == set(NAMES) - set(PYTORCH) - {"naive"}


def both_ways(runs, folder):
    """These runs of one rank on the CPU, and of four ranks on the imagined device."""
    alone, together = folder / "alone", folder / "together"
    alone.mkdir()
    together.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "run_report", lambda path, _: path)  # charts take longer than such a run
        for job in jobs(runs, alone, "--device", "cpu", strategies="ddp"):
            assert cli(*job) == 0
    (together / "jobs.json").write_text(json.dumps(list(jobs(runs, together, "--device", "cuda"))))
    done = subprocess.run(
        zygotic("-m", "tests.imagined", "cuda", "4", together / "jobs.json"), capture_output=True, text=True,
        cwd=Path(__file__).parents[2], timeout=PATIENCE,
    )  # fmt: skip
    return {stage: [metrics(side / "runs" / stage) for side in (alone, together)] for stage in runs}, done.stderr


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    return both_ways(RUNS, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("stage", RUNS)
def test_four_ranks_on_a_gpu_learn_what_one_learns_on_a_cpu(stage, curves):
    alone, together = curves[0][stage]
    assert len(together) == (3 if stage == "sft" else 2), curves[1][-3000:]
    assert_near(alone, together)


@pytest.mark.slow
def test_so_they_do_in_all_stages_and_under_all_strategies(tmp_path):
    curves, errors = both_ways(CAMPAIGN, tmp_path)
    for alone, together in curves.values():
        assert len(together) == 2, errors[-3000:]
        assert_near(alone, together)


# --- Apple's GPU ------------------------------------------------------------------------------------------------------


def lacking():
    """Operations without a kernel for Apple's GPU, by torch's own list. Attention has kernels of its own there."""
    path = Path(torchgen.__file__).with_name("packaged") / "ATen" / "native" / "native_functions.yaml"
    functions = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    by_name = {function["func"].partition("(")[0]: function for function in functions}

    def has(name):
        if "structured_delegate" in by_name[name]:
            return has(by_name[name]["structured_delegate"])
        keys = ",".join(by_name[name].get("dispatch", {"CompositeImplicitAutograd": ""}))
        return "MPS" in keys or "Composite" in keys

    return {name for name in by_name if not has(name) and "scaled_dot_product" not in name and "sdp" not in name}


def test_the_list_of_what_apples_gpu_lacks_is_read():
    names = lacking()
    assert {"_int_mm", "put_", "mode"} <= names
    assert not {"mm", "add.Tensor", "sort", "cumsum", "embedding"} & names


@pytest.fixture
def apple(monkeypatch):
    monkeypatch.setattr(imagined, "LACKING", lacking())
    with imagined.imagining("mps") as device:
        yield device


def test_an_imagined_device_refuses_what_a_real_one_would(apple):
    ours, theirs = torch.ones(2, device=apple), torch.ones(2)
    assert ours.device == apple
    assert (ours + 1).sum().item() == 4
    assert (ours * torch.tensor(2.0)).cpu().tolist() == [2, 2]
    assert ours[torch.tensor([0])].device == apple
    leaf = torch.ones(3, device=apple).requires_grad_()
    leaf.split([1, 2])[1].sum().backward()  # autograd makes zeros for the other part
    assert leaf.grad.cpu().tolist() == [0, 1, 1]
    for mix in (lambda: ours + theirs, lambda: torch.cat([ours, theirs]), lambda: theirs[ours.long()]):
        with pytest.raises(imagined.MixedDevices):
            mix()
    for wide in (lambda: ours.double(), lambda: torch.zeros(2, dtype=torch.float64, device=apple)):
        with pytest.raises(TypeError, match="MPS"):
            wide()
    with pytest.raises(NotImplementedError):
        ours.mode()
    with pytest.raises(TypeError, match="not on the CPU"):
        ours.numpy()


@pytest.mark.parametrize(
    ("stage", "strategy"),
    [("sft", "naive"), ("kto", "gemini_cpu"),
     *(pytest.param(stage, "naive", marks=pytest.mark.slow) for stage in ("reward", "ppo", "dpo", "grpo", "distill"))],
)  # fmt: skip
def test_a_stage_runs_on_apples_gpu_as_on_a_cpu(stage, strategy, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "run_report", lambda path, _: path)
    # Gradients are clipped to where AdamW's epsilon shows whether they are.
    arguments = [*command_line(stage, tmp_path, *SHARED), "--dtype", "fp32", "--max-grad-norm", "1e-3"]
    assert cli(*arguments, "--device", "cpu", "--out", tmp_path / "cpu") == 0
    monkeypatch.setattr(imagined, "LACKING", lacking())
    with imagined.imagining("mps"):
        assert cli(*arguments, "--device", "mps:0", "--strategy", strategy, "--out", tmp_path / "mps") == 0
    assert_near(metrics(tmp_path / "cpu"), metrics(tmp_path / "mps"))


def test_alibi_and_bf16_run_on_apples_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "run_report", lambda path, _: path)
    arguments = command_line("sft", tmp_path, *SHARED)
    model = save_tiny(tmp_path / "bloom", family="bloom", position="alibi", embed_norm=True, d_ff=64)
    monkeypatch.setattr(imagined, "LACKING", lacking())
    with imagined.imagining("mps"):
        out = tmp_path / "out"
        assert cli(*arguments, "--model", model, "--device", "mps:0", "--dtype", "bf16", "--out", out) == 0
    assert len(metrics(out)) == 2
