"""One rank and two give the same training curve, through the real torchrun (PPO.md 15)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import comparisons, demonstrations

SCORE = """
def score(prompts, responses, *, response_ids=None, **_):
    return [ids.count(5) - ids.count(6) for ids in response_ids]
"""


def curves(arguments, out, ranks):
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0"] if ranks > 1 else []
    if ranks > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *launch, "-m", "penstock", *arguments, "--out", str(out), "--device", "cpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_two_ranks_learn_what_one_learns(stage, tmp_path, tiny_model, jsonl):
    model = tiny_model()
    shared = ["--max-length", "32", "--batch-size", "6", "--micro-batch-size", "2", "--steps", "4", "--lr", "1e-3"]
    if stage == "ppo":
        (tmp_path / "fn.py").write_text(SCORE)
        data = jsonl([{"prompt_ids": [1, 3 + i, *range(3, 3 + i)]} for i in range(9)])
        arguments = ["ppo", "--actor", model, "--reward-fn", f"{tmp_path}/fn.py:score", "--data", data, *shared,
                     "--max-new-tokens", "6", "--no-value-warmup", "--mini-batch-size", "3"]  # fmt: skip
    else:
        data = jsonl(demonstrations(20) if stage == "sft" else comparisons(20))
        arguments = [stage, "--model", model, "--data", data, *shared, "--eval-every", "2"]
    one = curves(arguments, tmp_path / "one", 1)
    two = curves(arguments, tmp_path / "two", 2)
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key
