"""One rank and two give the same training curve, through the real torchrun (PPO.md 15)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from penstock.algorithms.ppo import ppo
from penstock.config import DataFlags, OptimFlags, RunFlags
from penstock.distributed.world import World
from penstock.errors import UserError
from tests.conftest import (
    PATIENCE,
    cli,
    comparisons,
    demonstrations,
    metrics,
    ppo_config,
    save_tiny,
    torchrun,
    votes,
    write_jsonl,
)

SCORE = """
def score(prompts, responses, *, response_ids=None, **_):
    return [ids.count(5) - ids.count(6) for ids in response_ids]
"""

EXPERTS = {
    "family": "qwen3_moe", "position": "rotary", "rotary_dim": 8, "norm": "rms", "activation": "silu", "gated": True,
    "qkv_bias": False, "out_bias": False, "mlp_bias": False, "tied": False, "qk_norm": True, "num_experts": 4,
    "experts_per_token": 2, "expert_ff": 12,
}  # fmt: skip


STAGES = ["sft", "experts", "reward", "ppo", "ppo fsdp", "grpo", "dpo", "kto", "distill", "distill stored"]


def command_line(stage, folder, *shared):
    """A stage on tiny data, in whose steps and rollouts ranks have different numbers of rows, of different lengths."""
    model = save_tiny(folder / "model")
    if stage.startswith(("ppo", "grpo")):
        (folder / "fn.py").write_text(SCORE)
        data = write_jsonl(folder / "prompts.jsonl", [{"prompt_ids": [1, 3 + i, *range(3, 3 + i)]} for i in range(9)])
        own = ["ppo", "--actor", model, "--no-value-warmup"] if stage.startswith("ppo") else ["grpo", "--model", model,
               "--group-size", "2"]  # fmt: skip
        return [*own, "--reward-fn", f"{folder}/fn.py:score", "--data", data, *shared, "--max-new-tokens", "6",
                "--mini-batch-size", "3"]  # fmt: skip
    rows = {"kto": votes, "reward": comparisons, "dpo": comparisons}.get(stage, demonstrations)
    data = write_jsonl(folder / f"{rows.__name__}.jsonl", rows(20))
    if stage.startswith("distill"):
        teacher = save_tiny(folder / "teacher", 1, num_layers=3)
        more = "--precompute-teacher" if stage == "distill stored" else "--on-policy 0.5 --max-new-tokens 6"
        return ["distill", "--model", model, "--teacher", teacher, "--data", data, *shared, "--teacher-top-k", "5",
                "--eval-every", "2", "--seed", "1", *more.split()]  # fmt: skip
    if stage == "experts":
        return ["sft", "--model", save_tiny(folder / "experts", **EXPERTS), "--data", data, *shared,
                "--router-aux-loss-coef", "0.3", "--recompute"]  # fmt: skip
    return [stage, "--model", model, "--data", data, *shared, "--eval-every", "2"]


SHARED = ["--max-length", "32", "--batch-size", "6", "--micro-batch-size", "2", "--steps", "4", "--lr", "1e-3"]
ONE_BY_ONE = """
import json, sys
from pathlib import Path
from penstock.cli import main
for arguments in json.loads(Path(sys.argv[1]).read_text()):
    main(arguments)
"""


def run_of(stage, folder, out):
    strategy = "fsdp" if stage.endswith("fsdp") else "ddp"
    return [*command_line(stage, folder, *SHARED), "--out", str(out), "--device", "cpu", "--strategy", strategy]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The metrics of all stages on two ranks, one after the other: launching ranks takes longer than a run."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "runs.py").write_text(ONE_BY_ONE)
    runs = [run_of(stage, folder, folder / "runs" / stage) for stage in STAGES]
    (folder / "runs.json").write_text(json.dumps(runs))
    torchrun(folder / "runs.py", folder / "runs.json")
    return {stage: metrics(folder / "runs" / stage) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_learn_what_one_learns(stage, together, tmp_path):
    assert cli(*run_of(stage, tmp_path, tmp_path / "alone")) == 0
    alone = metrics(tmp_path / "alone")
    assert len(alone) == len(together[stage]) == 4
    assert ("aux_loss" in alone[0]) == (stage == "experts")
    assert_near(alone, together[stage])


def assert_near(alone, together):
    """Of rows of metrics."""
    for a, b in zip(alone, together, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key


def test_a_rank_that_is_killed_is_named_and_the_run_goes_on_from_its_checkpoint(tmp_path, tiny_model, jsonl):
    out, data = tmp_path / "run", jsonl(demonstrations(20))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "penstock", "sft",
        "--model", tiny_model(), "--data", data, "--out", str(out), "--device", "cpu", "--batch-size", "4",
        "--max-length", "32", "--steps", "300", "--checkpoint-every", "10",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as launcher:
        while not list(out.glob("checkpoints/*/manifest.json")):
            assert launcher.poll() is None
            time.sleep(0.2)
        ranks = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
        environments = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in ranks}
        (victim,) = [pid for pid, environment in environments.items() if b"RANK=1" in environment]
        os.kill(victim, signal.SIGKILL)
        _, err = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode != 0
    assert f"process {victim}) gave no sign of life" in err
    assert "penstock resume" in err
    assert len(metrics(out)) < 300
    assert cli("resume", out) == 0
    assert [row["step"] for row in metrics(out)] == list(range(1, 301))


GRADIENT = """
import sys, torch
from penstock.algorithms.config import GRPOFlags
from penstock.algorithms.experience import Roles
from penstock.algorithms.grpo import GRPO, with_advantages
from penstock.algorithms.sft import micro_batches, response_logprobs
from penstock.algorithms.functional import sft_loss
from penstock.data.chat import Example
from penstock.memory.strategy import Strategy
from penstock.config import OptimFlags
from penstock.models.roles import Actor
from penstock.rollout.engine import Answer

model, out = sys.argv[1:]
strategy = Strategy.named("ddp", device="cpu")
actor = Actor.from_pretrained(model)
stream = strategy.prepare(actor)
lengths = [3, 9, 4, 7, 2, 8, 5, 6]
rows = [Example([1] + [3 + (i * j) % 12 for j in range(n)], [False] + [True] * n) for i, n in enumerate(lengths)]
loss = lambda hidden, batch: (sft_loss(response_logprobs(actor, hidden, batch), sum(lengths)), {})
mine = micro_batches(strategy.world.share_of(rows), 2, strategy.world.device)
strategy.step(stream, mine, loss, lr=0.0, max_grad_norm=1e9)
gradients = [p.grad.clone() for p in actor.parameters()]
answers = [Answer(row.tokens[:1], row.tokens[1:], [-2.7] * (len(row.tokens) - 1), "stop") for row in rows]
own = [answer for group in strategy.world.share_of([answers[:4], answers[4:]]) for answer in group]
roles = Roles(stream, scorer=lambda records, answers: [float(len(answer.response_ids)) for answer in answers])
optim, flags = OptimFlags(lr=1.0, micro_batch_size=2, max_grad_norm=1e9), GRPOFlags(group_size=4)
for reread in (True, False):
    policy = GRPO(strategy, roles, optim, flags, reread=reread)
    with strategy.phase("score"):
        experience = policy.read(own, [None] * len(own), 4)
    policy.learn(with_advantages(experience, flags), torch.arange(8), lr=0.0)
    gradients += [p.grad.clone() for p in actor.parameters()]
if strategy.world.first:
    torch.save(gradients, out)
strategy.world.leave()
"""


def test_two_ranks_have_the_gradient_of_one_to_1e_6(tmp_path, tiny_model):
    """Of SFT, and of GRPO with the policy's second reading of its answers and without."""
    model = tiny_model()
    (tmp_path / "gradient.py").write_text(GRADIENT)
    for ranks in (1, 2):
        torchrun(tmp_path / "gradient.py", model, tmp_path / f"{ranks}.pt", ranks=ranks)
    one, two = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))
    size = len(one) // 3
    assert all(float(sum(grad.abs().sum() for grad in one[i * size : (i + 1) * size])) > 0.1 for i in range(3))
    for a, b in zip(one, two, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_fewer_episodes_than_ranks_are_refused(tmp_path, tiny_model, jsonl, monkeypatch):
    monkeypatch.setattr(World, "join", staticmethod(lambda device: World(0, 4, torch.device("cpu"))))
    monkeypatch.setattr(World, "gather", lambda self, item: [item] * 4)
    config = ppo_config(
        actor=tiny_model(), reward_fn="f.py:score", data=DataFlags(data=(jsonl([{"prompt_ids": [1]}]),)),
        run=RunFlags(out=str(tmp_path / "run")), optim=OptimFlags(lr=1e-3, batch_size=3),
    )  # fmt: skip
    with pytest.raises(UserError, match="4 ranks"):
        ppo(config)
