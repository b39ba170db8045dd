"""`penstock bench`: the published command lines, what it counts, what it refuses, and two ranks under torchrun."""

import json
import shlex

import pytest
import torch

from penstock.algorithms import ppo
from penstock.commands.bench import run, work
from penstock.commands.bench.config import BenchConfig
from penstock.commands.bench.run import Beat, schedule
from penstock.errors import UserError
from penstock.flags import parse
from penstock.memory.strategy import Strategy
from tests.conftest import TINY, cli, torchrun

QUICK = [
    "--prompt_length", "4", "--max_length", "8", "--num_episodes", "2", "--max_timesteps", "2", "--update-timesteps",
    "1", "--max-epochs", "2", "--device", "cpu", "--top-k", "5",
]  # fmt: skip
PUBLISHED = [
    "--model s --strategy ddp --experience_batch_size 1 --train_batch_size 1",
    "--model xl --strategy colossalai_zero2",
    "--model 175b --strategy colossalai_gemini",
    "--model 125m --strategy ddp --experience_batch_size 1 --train_batch_size 1 --lora_rank 0",
    "--model 350m --strategy colossalai_zero2 --lora_rank 4",
]
"""Colossal-AI, applications/ChatGPT/benchmarks/README.md of February 2023, what stands behind the script's name."""


@pytest.mark.parametrize("line", PUBLISHED)
def test_a_published_line_runs_with_our_name_in_it(line, tmp_path, tiny_model, monkeypatch):
    """Only the shape is another one."""
    asked, shapes = shlex.split(line), []

    def tiny(name, flag):
        shapes.append(name)
        return TINY

    monkeypatch.setattr("penstock.planner.from_flags.config_of", tiny)
    assert cli("bench", *asked, *QUICK, "--json", tmp_path / "found.json") == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert shapes[0] in (asked[1], f"opt-{asked[1]}")
    assert found["settings"]["strategy"] == asked[3]
    assert bool(found["settings"]["lora_rank"]) == (asked[-1] == "4")
    assert found["trained_parameters"]["actor"] < found["parameters"]["actor"] or asked[-1] != "4"


def test_defaults_are_the_published_settings():
    config = parse(BenchConfig, [], "bench")
    assert (config.model, config.strategy, config.num_episodes, config.max_epochs) == ("s", "ddp", 3, 3)
    assert (config.max_timesteps, config.update_timesteps) == (8, 8)
    assert (config.train_batch_size, config.experience_batch_size) == (8, 8)
    assert (config.prompts, config.prompt_length, config.max_length, config.top_k) == (1000, 400, 512, 50)
    beats = schedule(config)
    assert [beat.kind for beat in beats].count("experience") == 24
    assert [beat.timed for beat in beats if beat.kind == "learn"] == [False, True, True]


def test_what_was_found_adds_up(tmp_path, tiny_model):
    out = tmp_path / "found.json"
    assert cli("bench", "--model", tiny_model(), *QUICK, "--json", out, "--dtype", "bf16", "--strategy", "gemini_cpu",
               "--experience-batch-size", 3, "--train-batch-size", 2) == 0  # fmt: skip
    found = json.loads(out.read_text())
    assert set(found["phases"]) == {"rollout", "score", "train"}
    for one in found["phases"].values():
        assert len(one["seconds_each"]) == 2  # the second episode alone is timed
        assert one["tflops_per_rank"] == pytest.approx(one["flops_per_rank"] / one["seconds"] / 1e12)
        assert one["share_of_gemm_peak"] > 0
    made = found["phases"]["rollout"]["seconds"] + found["phases"]["score"]["seconds"]
    assert found["seconds_per_iteration"] == pytest.approx(made + found["phases"]["train"]["seconds"])
    assert found["experience"]["samples_per_second"] == pytest.approx(3 / made)
    assert found["experience"]["tokens_per_second"] == pytest.approx(3 * 4 / made)
    learned = found["learning"]["tokens_per_second"] * found["phases"]["train"]["seconds"]
    assert learned == pytest.approx(2 * 3 * 8)  # epochs, rows, tokens
    assert found["phases"]["train"]["bytes_moved_each"]["host_written"] > 0
    assert found["recompute"]
    assert found["peak_device_bytes"] > found["device_tier_bytes"] > 0
    assert found["peak_host_bytes"] > 0
    assert found["peak_rss_bytes"] > found["peak_host_bytes"]
    assert found["planned"]["device"] > 0


def test_device_memory_is_what_the_plan_says(tmp_path, tiny_model):
    """fp32, where this processor computes as the plan thinks one does."""
    out = tmp_path / "found.json"
    model = tiny_model(num_layers=4, d_model=64, head_dim=32, d_ff=256, vocab_size=256)
    assert cli("bench", "--model", model, *QUICK, "--json", out, "--experience-batch-size", 2,
               "--train-batch-size", 2) == 0  # fmt: skip
    found = json.loads(out.read_text())
    assert 1.0 <= found["planned"]["device"] / found["peak_device_bytes"] <= 1.15


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ("--num-episodes 1", "experience"),
        ("--num-episodes 2 --max-timesteps 3 --update-timesteps 4", "learn"),
        ("--num-episodes 3 --max-timesteps 1 --update-timesteps 2", "learn"),
    ],
)
def test_a_phase_of_zero_steps_is_refused(flags, missing):
    config = parse(BenchConfig, flags.split(), "bench")
    with pytest.raises(UserError, match=f"{missing} would run zero timed steps.*--iterations 2"):
        schedule(config)


def test_warming_up_ends_when_something_was_learned_and_an_episode_is_over():
    config = parse(BenchConfig, ["--num-episodes", "4", "--max-timesteps", "1", "--update-timesteps", "2"], "bench")
    warm, timed = (Beat("experience", False), Beat("learn", False)), (Beat("experience", True), Beat("learn", True))
    assert schedule(config) == [warm[0], *warm, timed[0], *timed]


@pytest.mark.parametrize(("flags", "code", "words"), [
    ("--model xll", 2, "no size 'xll'; there are xl"), ("--strategy colossalai_gemni_cpu", 2, "nearest: gemini_cpu"),
    ("--prompt-length 600", 2, "leaves no room for a response"), ("--lora-rank -1", 2, "must be 0 or more"),
    ("--num_episodes 1", 2, "zero timed steps"), ("--model 175b", 3, "does not fit"),
    ("--model s --device-memory 100MB", 3, "nearest:"),
])  # fmt: skip
def test_what_cannot_work_is_said_before_anything_is_made(flags, code, words, capsys, monkeypatch):
    monkeypatch.setattr(run, "Four", None)  # nobody gets so far
    assert cli("bench", *flags.split(), "--device", "cpu") == code
    assert words in " ".join(capsys.readouterr().err.split())


def test_four_roles_stand_on_one_base_with_adapters():
    four = work.Four(Strategy.named("gemini_cpu"), TINY, lora_rank=2)
    assert four.streams["actor"].shares(four.streams["reward"])
    assert four.streams["actor"].shares(four.streams["reference"])
    full = work.Four(Strategy.named("gemini_cpu"), TINY)
    assert not full.streams["actor"].shares(full.streams["reward"])


@pytest.mark.parametrize("base_dtype", [None, "nf4"])
@pytest.mark.parametrize("again", [False, True])
def test_roles_that_stream_one_base_learn_as_resident_ones_do(again, base_dtype):
    """Adapters after two iterations, bit by bit; without recomputation, frozen weights too move under the graph."""
    learned = []
    for name, budget in (("naive", None), ("gemini_cpu", "1MB")):
        torch.manual_seed(0)
        strategy = Strategy.named(name, dtype="bf16", device="cpu", device_memory=budget, recompute=again)
        four = work.Four(strategy, TINY, lora_rank=2, base_dtype=base_dtype)
        for seed in range(2):
            list(four.iteration([[3, 4, 5], [4, 5, 6], [5, 6, 7]], 6, seed))
        learned.append([one.whole_weights(strategy.world) for one in four.streams["actor"].homes])
    assert all(torch.equal(a, b) for a, b in zip(*learned, strict=True))


def test_a_second_iteration_learns_from_other_answers():
    four = work.Four(Strategy.named("naive", device="cpu"), TINY)
    prompts = [[3, 4, 5]] * 2
    first = [one.response_ids for one in four.rollout(prompts, 6, [0, 1])]
    assert first != [one.response_ids for one in four.rollout(prompts, 6, [2, 3])]
    assert first[0] != first[1]


RANKS = """
import json, sys
from penstock.commands.bench import run, work
from penstock.cli import main

rollout, seen = work.Four.rollout, []
def watched(self, prompts, new, episodes):
    answers = rollout(self, prompts, new, episodes)
    seen.append([(episode, one.prompt_ids, one.response_ids) for episode, one in zip(episodes, answers)])
    return answers
work.Four.rollout = watched
out, *arguments = sys.argv[1:]
main(["bench", *arguments])
import os
json.dump(seen, open(f"{out}-{os.environ['RANK']}.json", "w"))
"""


def test_every_rank_makes_different_rollouts(tmp_path, tiny_model):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    flags = [
        "--model", tiny_model(), "--strategy", "gemini", *QUICK, "--experience_batch_size", "2", "--train-batch-size",
        "1", "--json", tmp_path / "found.json",
    ]  # fmt: skip
    printed = torchrun(script, tmp_path / "seen", *flags)
    ranks = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    answers = [one for rank in ranks for each in rank for one in each]
    assert len(answers) == 2 * 4 * 2  # ranks, timesteps, prompts
    assert sorted(episode for episode, _, _ in answers) == list(range(16))
    assert len({(*prompt, *response) for _, prompt, response in answers}) == 16
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["world"] == 2
    both, one = (found["learning"][f"samples_per_second{key}"] for key in ("", "_per_rank"))
    assert both == pytest.approx(2 * one)
    assert printed.count("one iteration:") == 1


def test_a_step_that_was_not_applied_is_no_result(monkeypatch):
    four = work.Four(Strategy.named("naive", device="cpu"), TINY)
    experience = four.score(four.rollout([[3, 4]], 2, [0]))
    broken = ppo.dataclasses.replace(experience, advantages=torch.full_like(experience.advantages, float("nan")))
    with pytest.raises(AssertionError, match="not finite"):
        four.learn(broken, torch.arange(1))
