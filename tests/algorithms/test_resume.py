"""A killed run goes on exactly: same weights (sha256), same metrics.jsonl, for all stages (DESIGN 9)."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.reliability.runs import outcome
from penstock.algorithms.config import DistillConfig, DPOConfig, GRPOConfig, KTOConfig
from penstock.algorithms.distillation.distill import Distillation, distill
from penstock.algorithms.grpo import grpo
from penstock.algorithms.kto import kto
from penstock.algorithms.policy import Policy
from penstock.algorithms.ppo import ppo
from penstock.algorithms.preference import dpo
from penstock.algorithms.reward import reward
from penstock.algorithms.sft import sft
from penstock.config import PPOConfig, RewardConfig, SFTConfig
from penstock.flags import from_dict, to_dict
from penstock.rollout.engine import Engine
from penstock.run import checkpoint, report
from penstock.run.directory import SIGNATURE, RunDirectory
from penstock.run.session import StoppedError
from tests import conftest

STAGES = {
    "sft": (sft, SFTConfig),
    "reward": (reward, RewardConfig),
    "ppo": (ppo, PPOConfig),
    "grpo": (grpo, GRPOConfig),
    "dpo": (dpo, DPOConfig),
    "distill": (distill, DistillConfig),
    "kto": (kto, KTOConfig),
}
STEPS = 8


@pytest.fixture
def stage_config(tmp_path):
    return lambda stage, out: conftest.stage_config(tmp_path, stage, out, steps=STEPS)


def whole_and_cut(stage, stage_config):
    """Outcome of a whole run, and the configuration of another that was cut after step 3."""
    train = STAGES[stage][0]
    config = stage_config(stage, "killed")
    cut_at(Path(train(dataclasses.replace(config, run=dataclasses.replace(config.run, keep=9)))), 3)
    return outcome(train(stage_config(stage, "whole"))), config


def cut_at(run: Path, kept_step: int) -> None:
    """Puts a run back to the moment after a checkpoint, with the lines that a kill leaves behind it."""
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name.split("-")[1]) > kept_step:
            subprocess.run(["rm", "-r", str(path)], check=True)


@pytest.mark.parametrize("stage", STAGES)
def test_going_on_from_a_checkpoint_gives_the_same_bytes(stage, stage_config):
    whole, config = whole_and_cut(stage, stage_config)
    train, config_class = STAGES[stage]
    assert outcome(train(from_dict(config_class, to_dict(config)), resume=True)) == whole


@pytest.mark.parametrize("stage", STAGES)
def test_dropping_the_random_state_is_noticed(stage, stage_config, monkeypatch):
    """The negative control: without generators and permutations the resumed run must differ."""
    whole, config = whole_and_cut(stage, stage_config)
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
    assert outcome(STAGES[stage][0](config, resume=True))["metrics.jsonl"] != whole["metrics.jsonl"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_without_a_checkpoint_starts_over(stage, stage_config):
    train, _ = STAGES[stage]
    whole = outcome(train(stage_config(stage, "whole")))
    config = stage_config(stage, "killed")
    cut_at(Path(train(config)), 0)
    assert outcome(train(config, resume=True)) == whole


def test_a_run_from_before_the_flags_of_the_scores_scale_goes_on_as_it_began(stage_config):
    """Its config.toml has a missing_eos_score and neither of the two new flags, its checkpoint no scale."""
    old = {"missing_eos_score": -1.0, "missing_eos_penalty": None, "scale_rewards": "none"}
    configs = [stage_config("ppo", out) for out in ("whole", "old")]
    configs = [dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, **old)) for config in configs]
    whole = outcome(ppo(configs[0]))
    run = Path(ppo(dataclasses.replace(configs[1], run=dataclasses.replace(configs[1].run, keep=9))))
    cut_at(run, 3)
    text = (run / "config.toml").read_text().partition(SIGNATURE)[0]
    for line in ('missing_eos_penalty = "none"\n', 'scale_rewards = "none"\n'):
        assert line in text
        text = text.replace(line, "")
    assert "missing_eos_score = -1.0" in text
    (run / "config.toml").write_text(text)
    assert conftest.cli("resume", run) == 0
    assert outcome(run) == whole


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


def online(config):
    """DPO of its own answers to the prompts of PPO's run."""
    data, reward_fn = (Path(config.model).parent / name for name in ("prompts.jsonl", "fn.py"))
    changes = {"data": dataclasses.replace(config.data, data=(str(data),)), "online": True, "samples": 2}
    flags = dataclasses.replace(config.dpo, sft_coef=0.0, group_size=4, max_new_tokens=6)
    return dataclasses.replace(config, **changes, dpo=flags, reward_fn=(f"{reward_fn}:score",))


SAMPLED = [(stage, part) for stage in ("ppo", "grpo", "online dpo") for part in ("rollout", "evaluation")]


@pytest.mark.parametrize(("stage", "part"), [*SAMPLED, ("distill", "rollout")])
def test_sigterm_between_two_tokens_gives_up_what_is_sampled_and_nothing_else(stage, part, stage_config, monkeypatch):
    """No token follows, and the checkpoint is of the moment before the first of them."""
    prompts = stage_config("ppo", "prompts").data.data
    command = stage.split()[-1]
    train = STAGES[command][0]

    def evaluated(out):
        config = stage_config(command, out)
        if stage == "distill":
            return config
        config = dataclasses.replace(config, eval_data=prompts, eval_every=2)
        return online(config) if stage == "online dpo" else config

    whole, config = outcome(train(evaluated("whole"))), evaluated("stopped")
    calls, after, step = {"rollout": 0, "evaluation": 0, "shown": 0}, [], Engine.step

    def counted(real):
        def sampled(policy, *arguments, **changes):
            kind = "evaluation" if "seed" in changes else "shown" if "temperature" in changes else "rollout"
            calls[kind] += 1
            return real(policy, *arguments, **changes)

        return sampled

    def stepped(engine):
        if calls[part] == 2:
            after.append(engine)
            if len(after) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return step(engine)

    monkeypatch.setattr(Policy, "rollout", counted(Policy.rollout))
    monkeypatch.setattr(Distillation, "answer", counted(Distillation.answer))
    monkeypatch.setattr(Engine, "step", stepped)
    with pytest.raises(StoppedError, match="penstock resume") as stopped:
        train(config)
    assert stopped.value.exit_code == 143
    if (stage, part) != ("online dpo", "evaluation"):  # its step is complete by then, but for what is measured
        assert len(after) == 2
    assert outcome(train(config, resume=True)) == whole


def test_a_thread_trains_as_the_main_one_does(stage_config):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with ThreadPoolExecutor(1) as pool:
        threaded = outcome(pool.submit(sft, stage_config("sft", "thread")).result(conftest.PATIENCE))
    assert threaded == outcome(sft(stage_config("sft", "run")))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


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


@pytest.mark.parametrize("change", [("lr = 0.01", "lr = 0.03"), ("steps = ", "steps = 1")])
def test_a_changed_flag_in_config_toml_is_refused_until_its_signature_is_removed(stage_config, change, capsys):
    run = Path(sft(stage_config("sft", "run")))
    file = run / "config.toml"
    text = file.read_text()
    file.write_text(text.replace(*change))
    assert conftest.cli("resume", run) == 2
    assert re.search(
        r"config.toml: has changed since penstock wrote it .* remove its last line", capsys.readouterr().err
    )
    file.write_text(text)
    assert conftest.cli("resume", run) == 0
    flags, signature, _ = text.replace(*change).partition(SIGNATURE)
    assert signature
    file.write_text(flags)
    assert RunDirectory.peek(run)["command"] == "sft"


@pytest.mark.parametrize("name", ["metrics", "perf", "samples", "health"])
def test_a_changed_byte_in_the_record_of_a_run_is_said(stage_config, name, capsys):
    config = stage_config("sft", "run")
    run = Path(sft(config))
    file = run / f"{name}.jsonl"
    changed = bytearray(file.read_bytes())
    if not changed:
        pytest.skip("this run has no line there")
    changed[len(changed) // 2] ^= 1
    file.write_bytes(changed)
    longer = dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=STEPS + 1))
    capsys.readouterr()
    sft(longer, resume=True)
    assert f"WARNING: {file}: has changed since its checkpoint was written" in capsys.readouterr().err
    sft(dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=STEPS + 2)), resume=True)
    assert "has changed since" not in capsys.readouterr().err


@pytest.mark.parametrize(("name", "old", "new"), [
    ("metrics", '"step": 5', '"step#: 5'), ("metrics", '"step": 5', '"stop": 5'), ("samples", '"response', '"rasponse'),
    ("perf", '"step": 5', "\xff"),
])  # fmt: skip
def test_a_damaged_line_is_left_out_of_the_report_with_a_warning(stage_config, name, old, new, capsys):
    run = Path(sft(stage_config("sft", "run")))
    file = run / f"{name}.jsonl"
    file.write_text(file.read_text().replace(old, new, 1), encoding="latin-1")
    report.run_report(run, "sft")
    assert re.search(rf"WARNING: {file}:\d+: is damaged, and left out", capsys.readouterr().err)


def test_metrics_hold_no_times(stage_config):
    """They could not be byte-equal otherwise."""
    run = sft(stage_config("sft", "run"))
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    assert not any(key.startswith(("timing/", "perf/")) for row in rows for key in row)
