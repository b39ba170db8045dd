"""What a command's flags leave to the device: strategy, dtype and the precision of fp32 products."""

import tomllib
from typing import Any

import pytest
import torch

from penstock.algorithms import setup
from penstock.algorithms.setup import placed, strategy_of
from penstock.algorithms.sft import sft
from penstock.cli import main
from penstock.config import DataFlags, OptimFlags, RunFlags, SFTConfig
from penstock.memory.strategy import Strategy


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have one; strategies are made on the CPU."""
    monkeypatch.setattr(setup, "device_types", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    products: Any = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "none"
    named = Strategy.named
    monkeypatch.setattr(Strategy, "named", staticmethod(lambda *a, **options: named(*a, **options | {"device": "cpu"})))
    yield monkeypatch
    products.fp32_precision = before


def chosen(**flags):
    run = placed(RunFlags(out="-", **flags))
    return run.strategy, run.dtype


def test_a_gpu_trains_in_bf16_under_auto_and_a_cpu_in_fp32_under_ddp_unless_told_otherwise(gpu):
    assert chosen() == chosen(device="cuda:1") == ("gemini_auto", "bf16")
    assert chosen(device="cpu") == ("ddp", "fp32")
    assert chosen(strategy="zero2", dtype="fp32") == ("zero2", "fp32")
    gpu.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert chosen() == ("gemini_auto", "fp32")
    gpu.setattr(setup, "device_types", lambda: ["cpu"])
    assert chosen() == ("ddp", "fp32")


@pytest.mark.parametrize(
    ("flags", "precision"),
    [({"dtype": "fp32"}, "tf32"), ({}, "none"), ({"dtype": "fp32", "device": "cpu"}, "none")],
)  # fmt: skip
def test_fp32_products_are_tf32_on_a_gpu(gpu, flags, precision):
    strategy_of(RunFlags(out="-", **flags))
    assert torch.backends.cuda.matmul.fp32_precision == precision


def test_the_choice_is_written_down_and_resumes_the_same_on_another_machine(gpu, tmp_path, tiny_model, jsonl):
    data = jsonl([{"prompt_ids": [1, 5], "response_ids": [6, 2]}] * 8)
    config = SFTConfig(
        model=tiny_model(), data=DataFlags(data=(data,)), run=RunFlags(out=str(tmp_path / "run"), checkpoint_every=1),
        optim=OptimFlags(lr=1e-3, batch_size=4, steps=1), heldout=0.0, samples=0,
    )  # fmt: skip
    sft(config)
    written = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert (written["strategy"], written["dtype"]) == ("gemini_auto", "bf16")
    gpu.setattr(setup, "device_types", lambda: ["cpu"])
    made = []
    gpu.setattr("penstock.algorithms.sft.strategy_of", lambda flags: made.append(flags) or strategy_of(flags))
    main(["resume", str(tmp_path / "run")])
    assert [(flags.strategy, flags.dtype) for flags in made] == [("gemini_auto", "bf16")]
