"""A killed run goes on exactly: same weights (sha256), same metrics.jsonl, for all three stages (DESIGN 9)."""

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from penstock.algorithms.ppo import ppo
from penstock.algorithms.reward import reward
from penstock.algorithms.sft import sft
from penstock.config import DataFlags, OptimFlags, PPOConfig, RewardConfig, RunFlags, SFTConfig, from_dict, to_dict
from penstock.run import checkpoint
from penstock.run.session import StoppedError
from tests.conftest import comparisons, demonstrations

REWARD_FN = """
import random
def score(prompts, responses, *, response_ids=None, **_):
    return [ids.count(5) + random.random() for ids in response_ids]  # draws from the global generator on purpose
"""
STAGES = {"sft": (sft, SFTConfig), "reward": (reward, RewardConfig), "ppo": (ppo, PPOConfig)}
STEPS = 8


@pytest.fixture
def stage_config(tmp_path, tiny_model, jsonl):
    def make(stage, out, steps=STEPS):
        optim = OptimFlags(lr=1e-2, batch_size=8, micro_batch_size=4, epochs=2 if stage == "ppo" else 1, steps=steps)
        run = RunFlags(out=str(tmp_path / out), checkpoint_every=3)
        if stage == "ppo":
            (tmp_path / "fn.py").write_text(REWARD_FN)
            data = jsonl([{"prompt_ids": [1, 3 + i]} for i in range(12)], "prompts.jsonl")
            return PPOConfig(
                actor=tiny_model(), reward_fn=f"{tmp_path}/fn.py:score", data=DataFlags(data=(data,), max_length=32),
                run=run, optim=optim, max_new_tokens=6, kl_target=2.0, mini_batch_size=4, value_warmup=False, samples=2,
            )  # fmt: skip
        if stage == "sft":
            data = jsonl(demonstrations(30), "sft.jsonl")
            return SFTConfig(
                model=tiny_model(), data=DataFlags(data=(data,), max_length=32), run=run, optim=optim,
                eval_every=2, samples=2,
            )  # fmt: skip
        data = jsonl(comparisons(30), "rankings.jsonl")
        return RewardConfig(
            model=tiny_model(), data=DataFlags(data=(data,), max_length=32), run=run, optim=optim, eval_every=4
        )

    return make


def outcome(run):
    """What must be equal: sha256 of every file of the last models, and metrics and samples byte by byte."""
    run = Path(run)
    last = run / "checkpoints" / f"step-{STEPS:06d}"
    weights = {
        str(path.relative_to(last)): hashlib.sha256(path.read_bytes()).hexdigest()
        for name in ("model", "critic")
        for path in sorted((last / name).glob("*.safetensors"))
    }
    return weights, (run / "metrics.jsonl").read_bytes(), (run / "samples.jsonl").read_bytes()


def cut_at(run: Path, kept_step: int) -> None:
    """Puts a run back to the moment after a checkpoint, with the lines that a kill leaves behind it."""
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name.split("-")[1]) > kept_step:
            subprocess.run(["rm", "-r", str(path)], check=True)


@pytest.mark.parametrize("stage", STAGES)
def test_going_on_from_a_checkpoint_gives_the_same_bytes(stage, stage_config):
    train, _ = STAGES[stage]
    whole = outcome(train(stage_config(stage, "whole")))
    config = stage_config(stage, "killed")
    run = train(dataclasses.replace(config, run=dataclasses.replace(config.run, keep=9)))
    cut_at(Path(run), 3)
    resumed = train(from_dict(STAGES[stage][1], to_dict(config)), resume=True)
    assert outcome(resumed) == whole


@pytest.mark.parametrize("stage", STAGES)
def test_dropping_the_random_state_is_noticed(stage, stage_config, monkeypatch):
    """The negative control: without generators and permutations the resumed run must differ."""
    train, _ = STAGES[stage]
    whole = outcome(train(stage_config(stage, "whole")))
    config = stage_config(stage, "killed")
    run = train(dataclasses.replace(config, run=dataclasses.replace(config.run, keep=9)))
    cut_at(Path(run), 3)
    read = checkpoint.read_state

    def forgetful(path):
        state = read(path)
        fresh = checkpoint.rng_state()
        state["rng"] = [fresh for _ in state["rng"]]
        state["episode"] = 0
        state["shuffle"] = {**state["shuffle"], "order": [], "cursor": 0}
        return state

    monkeypatch.setattr(checkpoint, "read_state", forgetful)
    random.seed(12345)
    assert outcome(train(config, resume=True))[:2] != whole[:2]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_without_a_checkpoint_starts_over(stage, stage_config):
    train, _ = STAGES[stage]
    whole = outcome(train(stage_config(stage, "whole")))
    config = stage_config(stage, "killed")
    run = Path(train(config))
    cut_at(run, 0)
    assert outcome(train(config, resume=True)) == whole


def test_sigterm_in_the_middle_of_a_ppo_step_keeps_the_experience_in_flight(stage_config, monkeypatch):
    """The signal arrives between two updates of one experience; nothing of the rollout is lost or done again."""
    import penstock.algorithms.ppo as module

    whole = outcome(ppo(stage_config("ppo", "whole")))
    config = stage_config("ppo", "stopped")
    seen = 0
    real = module.critic_loss

    def counting(*arguments):
        nonlocal seen
        seen += 1
        if seen == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(module, "critic_loss", counting)
    with pytest.raises(StoppedError, match="penstock resume") as stopped:
        ppo(config)
    assert stopped.value.exit_code == 143
    newest = checkpoint.newest(Path(config.run.out) / "checkpoints", print)
    state = checkpoint.read_state(newest / "state")
    assert state["experience"] is not None
    assert 0 < state["update"] < 4
    assert outcome(ppo(config, resume=True)) == whole


def test_a_flipped_byte_falls_back_to_the_older_checkpoint(stage_config, capsys):
    config = stage_config("sft", "run")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, keep=9))
    whole = outcome(sft(config))
    newest = Path(config.run.out) / "checkpoints" / f"step-{STEPS:06d}" / "model" / "model.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 1
    newest.write_bytes(bytes(damaged))
    assert outcome(sft(config, resume=True)) == whole
    assert "step-000008" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_once_in_a_process_of_its_own(stage, stage_config, tmp_path):
    kill_campaign(stage, stage_config, tmp_path, kills=1, steps=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_at_ten_random_times(stage, stage_config, tmp_path):
    kill_campaign(stage, stage_config, tmp_path, kills=10, steps=STEPS)


def kill_campaign(stage, stage_config, tmp_path, kills, steps):
    """Starts the real command, kills it at a random moment, resumes, `kills` times; then lets it finish."""
    configs = {name: stage_config(stage, name, steps) for name in ("whole", "killed")}
    assert command(stage, configs["whole"]).wait(timeout=300) == 0
    rng = random.Random(f"{stage} {kills}")
    run = Path(configs["killed"].run.out)
    done = 0
    process = command(stage, configs["killed"])
    while done < kills:
        # Anywhere from the first written byte to a few steps later, so that some kills hit a checkpoint's writing.
        wait_for(lambda: (run / "config.toml").exists() and (run / "metrics.jsonl").exists(), process)
        time.sleep(rng.random() * 0.6)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        done += 1
        process = subprocess.Popen([*PENSTOCK, "resume", str(run)], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    assert process.wait(timeout=300) == 0
    assert done >= min(kills, 1), "the run was over before it could be killed"
    assert outcome(run)[:2] == outcome(configs["whole"].run.out)[:2]


PENSTOCK = [sys.executable, "-m", "penstock"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(stage, config):
    """The stage as a process, its flags in a TOML file."""
    import tomli_w

    path = Path(config.run.out + ".toml")
    path.write_text(tomli_w.dumps(to_dict(config)))
    return subprocess.Popen([*PENSTOCK, stage, "--config", str(path)], env=ENVIRONMENT, stderr=subprocess.DEVNULL)


def wait_for(ready, process, seconds=60):
    """Until `ready` or the process ends."""
    end = time.monotonic() + seconds
    while not ready() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)


def test_metrics_hold_no_times(stage_config):
    """They could not be byte-equal otherwise."""
    run = sft(stage_config("sft", "run"))
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    assert not any(key.startswith(("timing/", "perf/")) for row in rows for key in row)
