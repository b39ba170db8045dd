"""`penstock improve`, round after round, on a model of ten thousand parameters and users who like "Hello"."""

import json
import os
import random
from pathlib import Path

import pytest

from penstock.commands.improve import rule
from penstock.commands.improve.command import NICE, settled
from penstock.commands.improve.config import ImproveConfig
from penstock.commands.improve.rounds import improve_once
from penstock.errors import ResourceError
from penstock.run.directory import resolve_model
from penstock.run.versions import REFUSED, TRUSTED, WITHDRAWN, Versions
from tests.conftest import CHATML, cli

WORDS = [a + b + c for a in "abcdefgh" for b in "klmnopqr" for c in "stuvw"]
TRAINED = {"lr": 3e-3, "batch_size": 16, "epochs": 1, "heldout": 0.4, "least": 60, "max_new_tokens": 8}


@pytest.fixture(autouse=True)
def niceness(monkeypatch):
    """How nice rounds are, in a list: this process itself stays as it is, for the tests behind these."""
    level = [0]

    def nice(by):
        level[0] += by
        return level[0]

    monkeypatch.setattr(os, "nice", nice)
    return level


@pytest.fixture
def model(tiny_model, make_tokenizer):
    address = tiny_model(vocab_size=320, max_length=64)
    make_tokenizer("model", template=CHATML, eos_token="<|im_end|>")
    return address


@pytest.fixture
def live(tmp_path, model):
    """Runs a round after more comparisons of the users, who like Hello, or by which the votes are flipped."""
    file, begun = tmp_path / "rankings.jsonl", []

    def improve(words, flipped=False, **flags):
        with file.open("a") as lines:
            for word in words:
                answers = ["Hello", f"no {word}"]
                row = {"prompt": f"Say {word}", "responses": answers, "ranking": [1, 0] if flipped else [0, 1]}
                lines.write(json.dumps(row) + "\n")
        first = {} if begun else {"model": model, "data": (str(file),), **TRAINED}
        begun.append(True)
        config, versions = settled(ImproveConfig(run=str(tmp_path / "live"), quiet=True, **{**first, **flags}))
        return improve_once(config, versions, lambda text: None), versions

    return improve


def test_rounds_are_served_when_better_and_refused_when_votes_are_flipped(live, tmp_path):
    first, versions = live(WORDS[:80])
    assert (first["decision"], versions.current) == ("promoted", 1), first["why"]
    assert first["way"] == ["dpo"]
    assert resolve_model(str(tmp_path / "live")).startswith(str(tmp_path / "live" / "version-0001" / "dpo"))

    poisoned, versions = live(WORDS[80:160], flipped=True)
    assert poisoned["decision"] == "refused", poisoned["why"]
    assert "contradict" in poisoned["why"]
    assert (versions.current, versions.states) == (1, {1: TRUSTED, 2: REFUSED})
    assert "model" not in poisoned

    third, versions = live(WORDS[160:240])
    assert third["state"] == TRUSTED
    assert third["learned"] == [3]
    learned = (tmp_path / "live" / "version-0003" / "learned" / "comparisons.jsonl").read_text()
    assert not [word for word in WORDS[80:160] if f'Say {word}"' in learned]


def test_votes_that_are_held_out_are_never_learned_in_any_round(live, tmp_path):
    sides = {}
    for i in range(2):
        row, _ = live(WORDS[80 * i : 80 * i + 80])
        folder = tmp_path / "live" / f"version-000{i + 1}"
        sides |= {
            word: word in (folder / "learned" / "comparisons.jsonl").read_text() for word in WORDS[80 * i : 80 * i + 80]
        }
    rest = [word for word, learned in sides.items() if not learned]
    assert 40 < len(rest) < 90  # 0.4 of 160
    everything = "".join(
        file.read_text() for file in (tmp_path / "live").rglob("*.jsonl") if file.parent.name == "learned"
    )
    everything += "".join(
        file.read_text() for file in (tmp_path / "live" / "judges" / "learned").rglob("comparisons.jsonl")
    )
    assert not [word for word in rest if f'Say {word}"' in everything]
    assert row["heldout"]["comparisons"] == len(rest)


def test_a_candidate_that_is_no_better_is_kept_aside_and_its_votes_come_again(live, tmp_path):
    row, versions = live(WORDS[:80], steps=1, lr=1e-9)
    assert (row["decision"], versions.current) == ("kept aside", 0), row["why"]
    assert not next(check for check in row["checks"] if check["name"].startswith("moves"))["passed"]
    row, versions = live(WORDS[80:150], lr=3e-3, steps=8)
    assert (row["decision"], row["learned"]) == ("promoted", [1, 2]), row["why"]
    assert versions.learned(2) == {1, 2}


def test_where_a_reward_model_knows_no_more_than_chance_the_version_that_learned_judges(live, monkeypatch):
    live(WORDS[:80])

    def at_random(model, labels, reading):
        draws = random.Random(0)
        return [[draws.random() for _ in label.record.ranks] for label in labels]

    monkeypatch.setattr("penstock.commands.improve.scores.of_reward_model", at_random)
    poisoned, versions = live(WORDS[80:160], flipped=True)
    assert (poisoned["examined"]["by"], poisoned["state"]) == ("model", REFUSED), poisoned["why"]
    assert "contradict" in poisoned["why"]
    assert versions.current == 1


def test_answers_that_lose_by_the_judge_of_held_out_votes_keep_a_candidate_aside(live, tmp_path, monkeypatch):
    """Answers of a model of ten thousand parameters are noise, so their scores are given here; the judge is real."""
    judges = tmp_path / "live" / "judges" / "heldout"

    def scored(config, model):
        assert Path(config.reward).parent.parent == judges
        line = {"finish_reason": "stop", "response_ids": [1], "score": float("version" not in model)}
        return [(None, line)] * 60

    monkeypatch.setattr("penstock.commands.improve.measure.answers_of", scored)
    row, _ = live(WORDS[:160])
    assert row["decision"] == "kept aside"
    assert row["why"].startswith("not met: its fresh answers do not lose by a judge of held-out votes: 0.0%")
    assert row["answers"]["judge"]["interval"][0] > 0.5
    (judged,) = [file.read_text().splitlines() for file in judges.glob("*/comparisons.jsonl")]
    learned = (tmp_path / "live" / "version-0001" / "learned" / "comparisons.jsonl").read_text()
    assert len(judged) == row["heldout"]["comparisons"]
    assert not [line for line in judged if line in learned]


def test_a_regression_set_keeps_a_candidate_aside(live, jsonl):
    facts = jsonl(
        [{"prompt": f"Say {w}?", "chosen": f"no {w}", "rejected": "Hello"} for w in WORDS[:30]], "facts.jsonl"
    )
    row, versions = live(WORDS[:80], regression=(facts,), epochs=6)
    assert (row["decision"], versions.current) == ("kept aside", 0), row["checks"]
    assert row["why"].startswith("not met: facts.jsonl against the served version")


def test_a_roll_back_withdraws_what_the_later_version_learned(live, tmp_path, capsys):
    live(WORDS[:80])
    assert cli("improve", tmp_path / "live", "--rollback") == 0
    versions = Versions(tmp_path / "live")
    assert (versions.current, versions.states) == (0, {1: WITHDRAWN})
    assert "version 0 is served" in capsys.readouterr().out
    assert cli("improve", tmp_path / "live", "--rollback") == 2
    assert "no version before it" in capsys.readouterr().err
    row, versions = live(WORDS[80:160])
    assert (row["parent"], row["learned"]) == (0, [2])
    assert cli("improve", tmp_path / "live", "--rollback", "--to", 1, "--distrust", 2) == 0
    assert Versions(tmp_path / "live").states == {1: TRUSTED, 2: REFUSED}


def test_a_round_that_was_killed_goes_on_with_the_votes_that_it_began_with(live, tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("penstock.commands.improve.measure.held_out_votes", killed)
        with pytest.raises(KeyboardInterrupt):
            live(WORDS[:80])
    trained = tmp_path / "live" / "version-0001" / "dpo" / "checkpoints" / "latest"
    when = trained.stat().st_mtime_ns
    row, versions = live(WORDS[80:90])
    assert (row["version"], row["new"]["comparisons"], trained.stat().st_mtime_ns) == (1, 80, when)
    assert live(WORDS[90:100])[0] is None  # 20 are new, and --least is 60
    assert versions.current == 1


def test_thumbs_alone_are_learned_by_kto_and_judged_by_the_version_that_learned_some(tmp_path, model, jsonl):
    def thumbs(words, flipped):
        answers = [("Hello", not flipped), ("no no", flipped)]
        return [
            {"prompt": f"Say {w}", "response": answers[i % 2][0], "label": answers[i % 2][1]}
            for i, w in enumerate(words)
        ]

    def improve(rows, **flags):
        jsonl(rows, "votes.jsonl")
        config, versions = settled(ImproveConfig(run=str(tmp_path / "live"), quiet=True, **flags))
        return improve_once(config, versions, lambda text: None)

    rows = thumbs(WORDS[:120], False)
    file = jsonl(rows, "votes.jsonl")
    first = improve(rows, model=model, data=(file,), **TRAINED | {"epochs": 4})
    assert (first["way"], first["decision"]) == (["kto"], "promoted"), first["why"]
    poisoned = improve(rows + thumbs(WORDS[120:240], True))
    assert (poisoned["decision"], poisoned["examined"]["by"]) == ("refused", "model"), poisoned["why"]


def test_a_round_says_what_it_lacks_and_is_nice(tmp_path, model, capsys, jsonl, niceness):
    run = tmp_path / "live"
    assert cli("improve", run) == 2
    assert "give --model" in capsys.readouterr().err
    assert cli("improve", run, "--model", model, "--data-dir", tmp_path / "nowhere") == 2
    assert "there is no penstock.db" in capsys.readouterr().err
    assert cli("improve", run, "--model", "a-typo", "--data-dir", tmp_path / "nowhere") == 2
    assert Versions(run).model(0) == "a-typo"
    assert cli("improve", run, "--model", model) == 2
    assert Versions(run).model(0) == model
    capsys.readouterr()
    file = jsonl([{"prompt": "Say a", "response": "b"}])
    assert cli("improve", run, "--data", file) == 2
    assert "has demonstrations; a round learns from comparisons and votes" in capsys.readouterr().err
    file = jsonl([{"prompt": "Say a", "response": "b", "label": True}])
    assert cli("improve", run, "--data", file) == 0
    assert "1 new votes and comparisons, and a round waits for 100" in capsys.readouterr().err
    assert cli("improve", run, "--seed", 3) == 2
    assert "stays in all rounds" in capsys.readouterr().err
    assert not (run / "version-0001").exists()
    assert niceness == [NICE]


def test_a_large_number_of_comparisons_makes_a_reward_model_and_ppo(live, monkeypatch):
    monkeypatch.setattr(rule, "ENOUGH", 30)
    row, _ = live(WORDS[:80], set=("ppo.steps=2", "ppo.batch_size=8", "ppo.micro_batch_size=8"))
    assert row["way"] == ["reward", "ppo"]
    assert row["model"] == "version-0001/ppo"
    assert row["memory"]["planned"] > 0


def test_another_start_is_refused_once_rounds_have_begun(live, tmp_path, model, capsys):
    live(WORDS[:80])
    run = tmp_path / "live"
    assert cli("improve", run, "--model", "gpt2") == 2
    assert f"has begun with {model}" in capsys.readouterr().err
    assert cli("improve", run, "--model", model) == 0  # a schedule names it each time


def test_an_adapter_goes_on_learning_in_later_rounds_and_is_exported(live, tmp_path):
    first, _ = live(WORDS[:80], learns="lora", lora=4, lr=1e-2)
    second, versions = live(WORDS[80:160])
    assert [row["decision"] for row in (first, second)] == ["promoted", "promoted"], second["why"]
    adapter = Path(resolve_model(versions.model(2)))
    assert (adapter / "adapter_model.safetensors").exists()
    assert cli("export", tmp_path / "live", "--out", tmp_path / "merged", "--merge") == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_what_does_not_fit_beside_the_server_is_refused_and_goes_on_with_more_memory(live, tmp_path):
    with pytest.raises(ResourceError, match="does not fit beside what runs here"):
        live(WORDS[:80], device_memory="40KB", host_memory="40KB")
    row, _ = live([], device_memory="4GB", host_memory="4GB")
    assert row["version"] == 1
    assert row["memory"]["planned"] < 4e9


def test_votes_whose_learning_goes_against_earlier_ones_are_refused_where_no_judge_could_tell(live, monkeypatch):
    live(WORDS[:80])
    monkeypatch.setattr("penstock.commands.improve.rounds.judges_of", lambda *arguments: [])
    row, versions = live(WORDS[80:160], flipped=True)
    assert (row["decision"], row["state"], versions.current) == ("kept aside", REFUSED, 1), row["why"]
