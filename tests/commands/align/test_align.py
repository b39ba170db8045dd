"""`penstock align` from data to a report, on a model of ten thousand parameters."""

import dataclasses
import importlib.util
import json
import os
import signal

import pytest
import torch
import transformers

from penstock.commands.align import command, evaluation, inventory
from penstock.commands.align.config import AlignConfig, seconds_of
from penstock.config import DataFlags, EngineFlags
from penstock.errors import DataError
from penstock.run.metrics import read_lines
from penstock.run.session import Session
from tests.conftest import CHATML, cli, last_model

WORDS = [a + b for a in "abcdefgh" for b in "klmno"]


@pytest.fixture
def model(tiny_model, make_tokenizer):
    address = tiny_model(vocab_size=320, max_length=64)
    make_tokenizer("model", template=CHATML, eos_token="<|im_end|>")
    return address


@pytest.fixture
def pairs(jsonl):
    return jsonl([{"prompt": f"Say {w}", "chosen": "Hello", "rejected": f"no no {w}"} for w in WORDS], "pairs.jsonl")


@pytest.fixture
def demonstrations(jsonl):
    return jsonl([{"prompt": f"say  {w}", "response": f"{w}!"} for w in WORDS], "demonstrations.jsonl")


@pytest.fixture
def prompts(jsonl):
    return jsonl([{"prompt": f"What is {i}", "answer": str(i)} for i in range(40)], "prompts.jsonl")


def result_of(capsys, *arguments):
    capsys.readouterr()
    assert cli("align", *arguments, "--json", "--quiet") == 0
    return json.loads(capsys.readouterr().out)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_demonstrations_and_comparisons_become_an_aligned_model(tmp_path, model, pairs, demonstrations, capsys):
    out = tmp_path / "out"
    flags = ("--model", model, "--data", pairs, demonstrations, "--out", out, "--steps", 6)
    result = result_of(capsys, *flags, "--set", "sft.lr=1e-3", "dpo.beta=0.3")
    assert [row["stage"] for row in result["plan"]] == ["sft", "dpo"]
    assert [row["steps"] for row in result["plan"]] == [6, 6]
    assert set(result["taken"]) == {"sft", "dpo"}
    assert not (out / "trial").exists()
    assert len(read_lines(out / "dpo" / "metrics.jsonl")) == 6
    saved = (out / "dpo" / "config.toml").read_text()
    assert "beta = 0.3" in saved
    assert f'model = "{out / "sft"}"' in saved
    assert "apply_chat_template = true" in saved
    evaluated = result["evaluation"]
    assert evaluated["records"] == len(lines(out / "data" / "heldout-comparisons.jsonl"))
    assert evaluated["gain"] == pytest.approx(evaluated["end"] - evaluated["start"])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "nats per token" in page
    assert "first (sft)" in page
    assert f"penstock serve {out / 'dpo'}" in page
    assert "saved and resumed" in page
    assert "Answers to held-out prompts, start and end" in page
    assert 0 < len(result["answers"]) <= evaluation.SHOWN
    assert f"penstock eval {out / 'dpo'} --against {model} --data {out / 'data' / 'heldout-prompts.jsonl'}" in page
    assert "nats per token" in (out / "dpo" / "report.html").read_text(encoding="utf-8")
    assert cli("export", out / "dpo", "--out", tmp_path / "exported") == 0
    assert "nats per token" in (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")

    # A second start finds all of it done, and another command line is refused.
    capsys.readouterr()
    assert result_of(capsys, *flags, "--set", "sft.lr=1e-3", "dpo.beta=0.3")["taken"] == result["taken"]
    assert cli("align", *flags) == 2
    assert f"--set: {out} was begun with" in capsys.readouterr().err


def test_stages_send_their_metrics_to_loggers_and_trials_do_not(tmp_path, model, pairs, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(Session, "__init__", spied(Session.__init__, lambda session: asked.append(session)))
    out = tmp_path / "out"
    assert cli("align", "--model", model, "--data", pairs, "--out", out, "--steps", 2, "--log", "tensorboard") == 0
    assert [session.config.run.log for session in asked] == [(), (), ("tensorboard",)]
    assert [*(out / "dpo" / "tensorboard").glob("events*")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli("align", "--model", model, "--data", pairs, "--out", tmp_path / "other", "--log", "wandb") == 2
    assert "wandb is not installed" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def spied(method, look):
    def method_and_look(self, *arguments, **flags):
        method(self, *arguments, **flags)
        look(self)

    return method_and_look


def test_no_stage_sees_a_prompt_that_is_held_out(tmp_path, model, pairs, demonstrations):
    """Prompts of both files differ in blanks and capitals alone."""
    config = AlignConfig(model=model, data=(pairs, demonstrations), out="-", heldout=0.2)
    seen = inventory.look(config, lambda _: None)
    assert {kind: len(side) for kind, side in seen.heldout.items()} == {
        "comparisons": 8, "demonstrations": 8, "prompts": 8,
    }  # fmt: skip
    keys = [{inventory.same(r) for of in side.values() for r in of} for side in (seen.train, seen.heldout)]
    assert keys[0].isdisjoint(keys[1])
    assert len(keys[0] | keys[1]) == len(WORDS)


def test_answers_that_can_be_checked_are_a_score(tmp_path, model, prompts, demonstrations, capsys):
    out = tmp_path / "out"
    (tmp_path / "score.py").write_text(
        "def score(prompts, responses, **_):\n    return [len(r) / 10 for r in responses]\n"
    )
    plain = result_of(capsys, "--model", model, "--data", prompts, "--out", out, "--dry-run")
    assert (plain["plan"][0]["stage"], plain["verifier"]) == ("grpo", "number")
    assert plain["plan"][0]["flags"]["reward_fn"] == ["number"]
    assert not out.exists()
    function = ("--reward-fn", f"{tmp_path / 'score.py'}:score", "--steps", 2, "--batch-size", 16)
    result = result_of(capsys, "--model", model, "--data", prompts, "--out", out, *function)
    assert result["evaluation"]["prompts"] == 4
    assert any("their scores by" in line for line in result["checked"])
    assert (out / "grpo" / "evaluations.jsonl").exists()


def test_a_long_prompt_is_left_out_and_leaves_the_answers_their_length(model, jsonl):
    """One prompt of 60 tokens in rows of 64 made every sampled answer four tokens long."""
    rows = [{"prompt": f"Say {w}", "response": "yes " * 8} for w in WORDS]
    config = AlignConfig(model=model, data=(jsonl(rows, "short.jsonl"),), out="-", reward_fn=("length:9",))
    said = []
    wanted = inventory.look(config, said.append).max_new_tokens
    asked = jsonl([*({"prompt": row["prompt"]} for row in rows), {"prompt": "word " * 9}], "asked.jsonl")
    seen = inventory.look(dataclasses.replace(config, data=(*config.data, asked)), said.append)
    assert seen.max_new_tokens == wanted > 16
    assert len(seen.train["prompts"]) + len(seen.heldout["prompts"]) == len(rows)
    lacks = f"left out: 1 of 41 prompts leave no room for {wanted} new tokens in rows of 64"
    assert f"{lacks}, the first: {asked}:41" in said, said
    with pytest.raises(DataError, match="41 of 41 prompts leave no room for 63 new tokens"):
        inventory.look(dataclasses.replace(config, data=(*config.data, asked), max_new_tokens=63), said.append)


def test_a_plan_names_a_stage_that_is_too_short(model, demonstrations, capsys):
    flags = ("--model", model, "--data", demonstrations, "--out", "none", "--dry-run", "--lr", "1e-5")
    assert any("sft: " in line and "Give --epochs" in line for line in result_of(capsys, *flags)["better"]) is False
    assert any("sft: 2 updates at --lr 1e-05" in line for line in result_of(capsys, *flags, "--steps", 2)["better"])


def test_comparisons_enough_make_a_reward_model_and_ppo(tmp_path, model, jsonl, capsys, monkeypatch):
    monkeypatch.setattr("penstock.commands.align.choice.ENOUGH", 30)
    rows = [{"prompt": f"Say {w}", "responses": ["Hello", w, "no no no"], "ranking": [0, 1, 2]} for w in WORDS]
    flags = ("--model", model, "--data", jsonl(rows), "--out", tmp_path / "out", "--steps", 2, "--batch-size", 8)
    result = result_of(capsys, *flags, "--max-new-tokens", 8, "--learns", "lora", "--lora", 2)
    assert "lora = 2" in (tmp_path / "out" / "ppo" / "config.toml").read_text()
    assert [row["stage"] for row in result["plan"]] == ["reward", "ppo"]
    assert result["evaluation"]["own"] is True


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, model, pairs, monkeypatch, capsys):
    def flags(name):
        return ("--model", model, "--data", pairs, "--out", tmp_path / name, "--steps", 6, "--lr", "1e-3", "--no-check")

    result_of(capsys, *flags("whole"))
    log = Session.log

    def stopped(self, step, *arguments, **keywords):
        log(self, step, *arguments, **keywords)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Session, "log", stopped)
        assert cli("align", *flags("cut")) == 143
    assert "the same penstock align command" in capsys.readouterr().err
    assert len(read_lines(tmp_path / "cut" / "dpo" / "metrics.jsonl")) == 3
    result_of(capsys, *flags("cut"))
    whole, cut = (last_model(tmp_path / name / "dpo") / "model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_a_start_that_was_killed_while_it_tried_begins_again(tmp_path, model, pairs, monkeypatch, capsys):
    def killed(*_):
        raise KeyboardInterrupt

    flags = ("--model", model, "--data", pairs, "--out", tmp_path / "out", "--steps", 2)
    with monkeypatch.context() as patched:
        patched.setattr(command, "try_stages", killed)
        assert cli("align", *flags) == 130
    assert set(result_of(capsys, *flags)["taken"]) == {"dpo"}


def test_a_stop_while_it_tries_names_the_way_to_begin_again(tmp_path, model, pairs, monkeypatch, capsys):
    log = Session.log

    def stopped(self, step, *arguments, **keywords):
        log(self, step, *arguments, **keywords)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Session, "log", stopped)
        assert cli("align", "--model", model, "--data", pairs, "--out", tmp_path / "out", "--steps", 2) == 143
    error = capsys.readouterr().err
    assert "stopped in the pre-flight; the same penstock align command" in error
    assert "penstock resume" not in error


def test_an_impossible_budget_names_the_nearest(tmp_path, model, pairs, capsys):
    flags = ("--model", model, "--data", pairs, "--out", tmp_path / "out", "--dry-run")
    assert cli("align", *flags, "--budget", "1s") == 3
    error = capsys.readouterr().err
    nearest = error.partition("the nearest possible is --budget ")[2].split(",")[0]
    assert seconds_of(nearest) > 1
    assert cli("align", *flags, "--budget", nearest) == 0


def test_another_machine_is_planned_for_by_flags(tmp_path, model, pairs, capsys):
    flags = ("--model", model, "--data", pairs, "--out", tmp_path / "out", "--dry-run", "--learns", "all")
    whole = result_of(capsys, *flags)["plan"][0]
    small = f"{int(whole['peak']['device'] * 0.7)}"
    less = result_of(capsys, *flags, "--device-memory", small)["plan"][0]
    assert less["peak"]["device"] <= int(small)
    assert less["flags"]["strategy"] != "ddp" or less["flags"]["micro_batch_size"] < whole["flags"]["micro_batch_size"]
    assert cli("align", *flags, "--device-memory", "20KB") == 3
    assert "the nearest is dpo with --strategy" in capsys.readouterr().err


REFUSED = [
    (("--stages", "kto"), "--data has none"),
    (("--set", "dpo.betta=1"), "dpo has no such flag"),
    (("--set", "sft.lr=1"), "sft is no stage of this plan"),
    (("--max-length", "6"), "too many to leave out"),
    (("--lr", "-1"), "must be above 0"),
]


@pytest.mark.parametrize(("flags", "problem"), REFUSED)
def test_mistakes_are_refused_before_anything_is_written(tmp_path, model, pairs, capsys, flags, problem):
    assert cli("align", "--model", model, "--data", pairs, "--out", tmp_path / "out", *flags) in (2, 4)
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_score_that_tells_nothing_apart_stops_the_pre_flight(tmp_path, model, prompts, capsys):
    (tmp_path / "score.py").write_text("def score(prompts, responses, **_):\n    return [1.0] * len(responses)\n")
    flags = ("--model", model, "--data", prompts, "--out", tmp_path / "out", "--max-new-tokens", 4)
    assert cli("align", *flags, "--reward-fn", f"{tmp_path / 'score.py'}:score") == 2
    assert "nothing can be learned from it" in capsys.readouterr().err
    assert not (tmp_path / "out" / "grpo").exists()


def test_likelihoods_are_those_of_transformers(tmp_path, model, jsonl):
    file = jsonl([
        {"prompt_ids": [5, 6, 7], "response_ids": [[8, 9, 3], [10, 3], [11, 12, 3]], "ranking": [0, [1, 2]]},
        {"prompt_ids": [5, 9], "response_ids": [[20, 3], [30, 31, 3]], "ranking": [1, 0]},
    ])  # fmt: skip
    flags = DataFlags(data=()), EngineFlags()
    values = evaluation._values("comparisons", tmp_path / "data.jsonl", model, *flags)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def mean(prompt, answer):
        logits = theirs(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        return sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer)) / len(answer)

    first = [mean([5, 6, 7], answer) for answer in ([8, 9, 3], [10, 3], [11, 12, 3])]
    second = [mean([5, 9], answer) for answer in ([20, 3], [30, 31, 3])]
    expected = [first[0] - (first[1] + first[2]) / 2, second[1] - second[0]]
    assert values.tolist() == pytest.approx(expected, abs=1e-4)
    single = jsonl([{"prompt_ids": [5, 6, 7], "response_ids": [8, 9, 3]}], "single.jsonl")
    (value,) = evaluation._values("demonstrations", tmp_path / "single.jsonl", model, *flags)
    assert value == pytest.approx(first[0], abs=1e-4), single
    assert file


@pytest.mark.parametrize("state", [{}, {"resident": True, "answering": {}, "run": "no model"}])
def test_answers_that_cannot_be_made_cost_no_run(tmp_path, jsonl, state):
    """A state of an older version too: it does not say whether a model fits."""
    (tmp_path / "data").mkdir()
    jsonl([{"prompt": "Q"}], "data/heldout-prompts.jsonl")
    said, state = [], {"evaluation": {}, **state}
    config = AlignConfig.of(model="no model", data="d", out=str(tmp_path))
    command.measure(config, state, tmp_path, said.append)
    assert state["answers"] == []
    assert said[0].startswith("answers of start and end are not shown: ")
