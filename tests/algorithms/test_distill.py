"""Distillation: divergences against the plain formula over the whole vocabulary, and runs on tiny models."""

import json
import re
import shutil
import weakref
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.reliability.runs import outcome
from penstock.algorithms.config import DistillConfig, DistillFlags
from penstock.algorithms.distillation import distill as module
from penstock.algorithms.distillation.distill import Distillation, distill, generalized_jsd
from penstock.algorithms.distillation.inputs import Row
from penstock.config import DataFlags, LoraFlags, OptimFlags, RunFlags
from penstock.errors import ResourceError, UserError
from penstock.memory.strategy import Strategy
from penstock.models.roles import Actor
from tests.conftest import CHATML, cli, demonstrations, last_model, metrics

LOSSES = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.3}
LARGER = {"d_model": 32, "head_dim": 16, "num_layers": 3, "d_ff": 64}
"""What makes a tiny teacher larger than a tiny student."""


# --- the arithmetic, in float64, over the whole vocabulary ----------------------------------------------------------


def plain(student, teacher, beta, ids=None):
    """The divergence of logits [N, V], with probabilities and no logarithms but the ratio's. ids [N, k]: of those
    tokens and one event for all others."""
    p, q = (logits.double().softmax(-1) for logits in (student, teacher))
    if ids is not None:
        p, q = (torch.cat([x.gather(1, ids), x.scatter(1, ids, 0).sum(1, keepdim=True)], dim=1) for x in (p, q))
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    if beta in (0, 1):
        return kl(p, q) if beta else kl(q, p)
    mixture = beta * q + (1 - beta) * p
    return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_divergence_is_trls(beta):
    rng = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, 7, 12, generator=rng)
    student.requires_grad_()
    ours = generalized_jsd(student.log_softmax(-1), teacher.log_softmax(-1), beta)
    wanted = student.detach().double().requires_grad_()
    expected = plain(wanted, teacher, beta)
    assert (ours - expected).abs().max() < 1e-6
    ours.sum().backward()
    expected.sum().backward()
    assert (student.grad - wanted.grad).abs().max() < 1e-6


@given(st.integers(0, 10**6), st.sampled_from([*LOSSES.values()]), st.integers(1, 11))
def test_fewer_tokens_give_a_lower_bound(seed, beta, k):
    """The data-processing inequality; with all but one token the rest is one token, and nothing is lost."""
    rng = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, 5, 12, generator=rng, dtype=torch.float64)
    order = teacher.argsort(1, descending=True)
    coarse, finer = (plain(student, teacher, beta, order[:, :n]) for n in (k, min(k + 1, 11)))
    assert (coarse <= finer + 1e-12).all()
    assert (finer <= plain(student, teacher, beta) + 1e-12).all()
    assert torch.allclose(plain(student, teacher, beta, order[:, :11]), plain(student, teacher, beta))


ROWS = [
    Row([1, 3, 4, 5, 2], [False, False, False, True, True], 0),
    Row([1, 6, 2], [False, True, True], 1),
    Row([1, 7, 8, 2, 9, 10, 11, 2], [False, False, True, True, False, False, True, True], 2),  # two turns
    Row([1, 12], [False, True], 3),
]
COUNT = sum(sum(row.trained) for row in ROWS)


def of(tiny_model, strategy="naive", size=2, **flags):
    """A distillation of a tiny student and a larger teacher, prepared; and copies of both that nothing trains."""
    student, teacher = tiny_model("student"), tiny_model("teacher", 1, **LARGER)
    engine = Strategy.named(strategy, device="cpu")
    models = Actor.from_pretrained(student), Actor.from_pretrained(teacher).requires_grad_(False)
    streams = engine.prepare_all(*models)
    optim = OptimFlags(lr=1e-3, batch_size=4, micro_batch_size=size)
    work = Distillation(engine, *streams, optim, DistillFlags(**flags))
    return work, Actor.from_pretrained(student), Actor.from_pretrained(teacher)


def theirs(student, teacher, temperature, loss, k, sft_coef=0.0):
    """The loss by the plain formula, a row at a time: whole logits, whole softmax, no shift but this one."""
    total = torch.zeros((), dtype=torch.float64)
    for row in ROWS:
        tokens = torch.tensor([row.tokens])
        at = [i - 1 for i, trained in enumerate(row.trained) if trained]
        ours, wanted = (model.decoder.logits(model(tokens, None))[0, at] / temperature for model in (student, teacher))
        ids = None if k is None else wanted.argsort(1, descending=True)[:, :k]
        total = total + plain(ours, wanted.detach(), LOSSES[loss], ids).sum()
        answer = tokens[0, [i + 1 for i in at]][:, None]
        total = total - sft_coef * (ours * temperature).double().log_softmax(-1).gather(1, answer).sum()
    return total / COUNT


@pytest.mark.parametrize("k", [16, 5])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_loss_and_gradient_are_those_of_the_plain_formula_in_any_micro_batch(tiny_model, loss, k, size):
    work, student, teacher = of(tiny_model, size=size, loss=loss, jsd_beta=0.3, teacher_top_k=k, temperature=0.8)
    stats = work.learn(work.teach(ROWS), COUNT, 0.0)
    expected = theirs(student, teacher, 0.8, loss, None if k == 16 else k)
    expected.backward()
    assert stats.sums["loss"] == pytest.approx(expected.item(), abs=1e-6)
    ours = dict(work.student.model.named_parameters())
    for name, weight in student.named_parameters():
        assert torch.allclose(ours[name].grad, weight.grad, rtol=0, atol=1e-6), name


def test_the_likelihood_of_given_answers_is_added_and_of_samples_is_not(tiny_model):
    work, student, teacher = of(tiny_model, teacher_top_k=5, temperature=0.8, sft_coef=0.5)
    taught = work.teach(ROWS)
    stats = work.learn(taught, COUNT, 0.0)
    expected = theirs(student, teacher, 0.8, "forward_kl", 5, 0.5)
    expected.backward()
    assert stats.sums["loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert stats.sums["loss"] == pytest.approx(stats.sums["divergence"] + 0.5 * stats.sums["sft"])
    grads = work.student.model.decoder.blocks[0].qkv.weight.grad
    assert torch.allclose(grads, student.decoder.blocks[0].qkv.weight.grad, rtol=0, atol=1e-6)
    assert work.learn(taught, COUNT, 0.0, given=False).sums["loss"] == stats.sums["divergence"]


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tiny_model):
    engine, address = Strategy.named("naive", device="cpu"), tiny_model()
    models = Actor.from_pretrained(address), Actor.from_pretrained(address).requires_grad_(False)
    for loss in LOSSES:
        flags = DistillFlags(loss=loss, teacher_top_k=5)
        work = Distillation(engine, *engine.prepare_all(*models), OptimFlags(lr=1e-3), flags)
        stats = work.learn(work.teach(ROWS), COUNT, 0.0)
        assert abs(stats.sums["loss"]) < 1e-6
        assert stats.grad_norm < 1e-6


def test_heldout_loss_is_a_mean_over_trained_tokens(tiny_model):
    work, student, teacher = of(tiny_model, loss="jsd", jsd_beta=0.3, teacher_top_k=5)
    assert work.heldout_loss(ROWS) == pytest.approx(theirs(student, teacher, 1.0, "jsd", 5).item(), abs=1e-6)


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path, tiny_model, jsonl):
    """config(out="run", **flags): a run of a tiny student and a larger teacher; flat names, as on the command line."""

    def make(out="run", rows=None, **changes):
        optim = {"lr": 1e-2, "steps": 4, "batch_size": 8, "micro_batch_size": 4}
        groups = {}
        for group, names in ((DistillFlags, {}), (OptimFlags, optim)):
            names |= {field.name: changes.pop(field.name) for field in fields(group) if field.name in changes}
            groups[group] = group(**names)
        run = RunFlags(out=str(tmp_path / out), device="cpu", **changes.pop("run", {}))
        data = DataFlags(data=(jsonl(rows or demonstrations(30)),), max_length=32)
        student = changes.pop("model", None) or tiny_model("student")
        teacher = changes.pop("teacher", None) or tiny_model("teacher", 1, **LARGER)
        return DistillConfig(
            model=student, teacher=teacher, data=data, run=run, optim=groups[OptimFlags], distill=groups[DistillFlags],
            **{"samples": 2, **changes},
        )  # fmt: skip

    return make


def log_of(run):
    return (Path(run) / "log.txt").read_text()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_a_student_comes_to_say_what_its_teacher_says(config, tiny_model, loss, on_policy):
    """A world of five prompts and one token after each: total variation from the teacher falls from 0.3 below 0.03."""
    torch.manual_seed(0)
    teacher = tiny_model("teacher", 1, **LARGER)
    model = Actor.from_pretrained(teacher)
    with torch.no_grad():
        model.decoder.embed.tokens.mul_(12)  # so that it is sure of something
        model.save_pretrained(Path(teacher))
    prompts = [[1, 3 + i] for i in range(5)]
    rows = [{"prompt_ids": prompt, "response_ids": [4 + i]} for i, prompt in enumerate(prompts)] * 2
    flags = {
        "heldout": 0.0,
        "samples": 0,
        "max_new_tokens": 1,
        "teacher_top_k": 6,
        "loss": loss,
        "on_policy": on_policy,
    }
    run = distill(config(rows=rows, teacher=teacher, lr=3e-2, steps=150, batch_size=10, micro_batch_size=10, **flags))
    student = Actor.from_pretrained(str(last_model(run)))
    last = [model.decoder.logits(model(torch.tensor(prompts), None))[:, 1].softmax(-1) for model in (student, model)]
    assert (last[0] - last[1]).abs().sum(1).max() / 2 < 0.03
    first = Actor.from_pretrained(tiny_model("student"))
    start = first.decoder.logits(first(torch.tensor(prompts), None))[:, 1].softmax(-1)
    assert (start - last[1]).abs().sum(1).max() / 2 > 0.2


def test_what_was_stored_teaches_as_the_teacher_does_bit_by_bit(config, capsys):
    rows = demonstrations(30)
    for row in rows:  # equal lengths: products of the same shapes, whatever rows are beside each other
        row |= {"prompt_ids": row["prompt_ids"][:3], "response_ids": (row["response_ids"] * 5)[:5]}
    live, stored = (distill(config(name, rows, precompute_teacher=name == "stored")) for name in ("live", "stored"))
    assert metrics(stored) == metrics(live)
    assert (stored / "teacher.safetensors").exists()
    assert f"the teacher reads 30 answers of {30 * 6} tokens" in log_of(stored)


def test_once_it_is_stored_the_teacher_is_not_in_memory(config, monkeypatch):
    teachers, left = [], []
    real = module.read_inputs

    def spying(*arguments):
        inputs = real(*arguments)
        teachers.append(weakref.ref(inputs.teacher))
        return inputs

    monkeypatch.setattr(module, "read_inputs", spying)
    prepare = module.prepare
    monkeypatch.setattr(module, "prepare", lambda *more: left.append(teachers[0]()) or prepare(*more))
    distill(config(precompute_teacher=True))
    assert left == [None]


@pytest.mark.parametrize("change", ["teacher", "data", "damage"])
def test_a_store_of_another_teacher_or_other_rows_is_refused(config, tiny_model, jsonl, change):
    run = distill(flags := config(precompute_teacher=True))
    if change == "teacher":
        tiny_model("teacher", 2, **LARGER)
        wanted = "was made from another teacher; put that back, or delete the file"
    elif change == "data":
        shutil.rmtree(run / "checkpoints")
        jsonl(demonstrations(30, seed=5))
        wanted = "was made from another data; put that back"
    else:
        path = run / "teacher.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
        wanted = "is damaged"
    with pytest.raises(UserError, match=wanted):
        distill(flags, resume=True)


def test_a_resumed_run_reads_the_store_and_goes_on_exactly(config, monkeypatch):
    whole = distill(config("whole", precompute_teacher=True, steps=6))
    run = distill(flags := config(precompute_teacher=True, steps=6, run={"checkpoint_every": 2, "keep": 9}))
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    written = (run / "teacher.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(Strategy, "prepare", lambda *_: pytest.fail("the teacher was loaded"))
    distill(flags, resume=True)
    assert outcome(run)["metrics.jsonl"] == outcome(whole)["metrics.jsonl"]
    assert (last_model(run) / "model.safetensors").read_bytes() == (
        last_model(whole) / "model.safetensors"
    ).read_bytes()
    assert (run / "teacher.safetensors").stat().st_mtime_ns == written


def test_steps_on_samples_learn_what_the_student_wrote(config, monkeypatch):
    """Which steps those are is keyed by their number; the prompts are the data's and the answers are not."""
    learned = []
    real = Distillation.teach
    monkeypatch.setattr(Distillation, "teach", lambda self, rows: learned.append(rows) or real(self, rows))
    run = distill(config(on_policy=0.5, max_new_tokens=6, steps=12, heldout=0.0))
    sampled = [row["on_policy"] for row in metrics(run)]
    assert 2 <= sum(sampled) <= 10
    assert [float(rows[0].number < 0) for rows in learned] == sampled
    given = {tuple(row["prompt_ids"]): [*row["response_ids"], 2] for row in demonstrations(30)}
    for rows in (rows for rows in learned if rows[0].number < 0):
        answers = {tuple(row.tokens[: row.trained.index(True)]): row.tokens[row.trained.index(True) :] for row in rows}
        assert answers.keys() <= given.keys()
        assert all(0 < len(answer) <= 6 for answer in answers.values())
        assert sum(given[prompt] == answer for prompt, answer in answers.items()) < len(answers) / 2
    episodes = [row["episode"] for row in metrics(run)]
    assert episodes == [8 * int(sum(sampled[: i + 1])) for i in range(12)]


def test_prompts_alone_suffice_where_all_answers_are_samples(config, monkeypatch):
    seeds = []
    real = Distillation.answer
    monkeypatch.setattr(
        Distillation, "answer", lambda self, *more, **changes: seeds.append(changes) or real(self, *more, **changes)
    )
    rows = [{"prompt_ids": [1, 3 + i % 13, 3 + i // 13]} for i in range(30)]
    run = distill(config(rows=rows, on_policy=1.0, max_new_tokens=4, loss="reverse_kl", eval_every=2))
    losses = [row["heldout/loss"] for row in metrics(run) if "heldout/loss" in row]
    assert len(losses) == 2
    greedy, trained, heldout = {"temperature": 0.0}, {}, {"seed": 0 ^ module.HELDOUT_STREAMS}
    assert seeds == [greedy, trained, trained, heldout, trained, trained, heldout, greedy]
    still = distill(config("still", rows=rows, on_policy=1.0, max_new_tokens=4, eval_every=1, lr=1e-12))
    assert len({round(row["heldout/loss"], 9) for row in metrics(still)}) == 1  # the same streams at every evaluation


@pytest.mark.parametrize("strategy", ["gemini_cpu", "gemini_nvme"])
def test_a_teacher_larger_than_the_device_gives_the_same_losses_bit_by_bit(config, tiny_model, tmp_path, strategy):
    teacher = tiny_model("teacher", 1, d_model=128, num_layers=12, num_heads=4, num_kv_heads=4, head_dim=32, d_ff=512)
    nbytes = sum(file.stat().st_size for file in Path(teacher).glob("*.safetensors"))
    budget = 3_000_000
    assert nbytes > 3 * budget
    flags = {"teacher": teacher, "teacher_top_k": 5}
    resident = distill(config("resident", **flags, run={"recompute": True}))
    disk = {"disk": str(tmp_path / "disk")} if strategy == "gemini_nvme" else {}
    run = {"strategy": strategy, "device_memory": f"{budget}", "recompute": True, **disk}
    assert metrics(distill(config("streamed", **flags, run=run))) == metrics(resident)


@pytest.mark.parametrize("strategy", ["ddp", "gemini_cpu"])
def test_a_teacher_that_does_not_fit_is_refused_with_what_would_do(config, strategy):
    """Where weights stay, when they get their homes; where they move, when they are first needed."""
    with pytest.raises(ResourceError, match=r"--device-memory .*give "):
        distill(flags := config(run={"strategy": strategy, "device_memory": "100KB"}))
    log = log_of(flags.run.out)
    assert re.search(r"together need .* of device by the plan. Less: --precompute-teacher", log)


@pytest.mark.parametrize("on_policy", [0.0, 0.5])
def test_the_run_is_planned_as_what_it_is(config, monkeypatch, on_policy):
    planned = []
    real = module.reserve_activations
    monkeypatch.setattr(module, "reserve_activations", lambda s, work: planned.append(work) or real(s, work))
    distill(config(teacher_top_k=5, on_policy=on_policy, max_new_tokens=12, rollout_batch_size=3))
    (work,) = planned
    assert (work.stage, work.batch_size, work.micro_batch_size, work.mini_batch_size) == ("distill", 8, 4, 8)
    assert (work.top_k, work.samples, work.group_size, work.rollout_batch_size) == (5, on_policy > 0, 1, 3)
    rows = demonstrations(30)
    answer, prompt = (max(len(row[name]) for row in rows) for name in ("response_ids", "prompt_ids"))
    assert (work.prompt_length, work.max_new_tokens) == (prompt, 12 if on_policy else answer + 1)
    assert [(role.name, role.trained) for role in work.roles] == [("model", True), ("teacher", False)]


def test_an_adapter_learns_from_a_packed_teacher(config):
    run = distill(config(peft=LoraFlags(lora=2), teacher_dtype="nf4", steps=8))
    rows = metrics(run)
    assert rows[-1]["heldout/loss"] < rows[0]["heldout/loss"]
    assert (last_model(run) / "adapter_model.safetensors").exists()


def test_little_mass_among_the_likeliest_is_warned_of(config):
    run = distill(config(teacher_top_k=2, steps=1))
    assert metrics(run)[0]["teacher/top_k_mass"] < 0.5
    assert "WARNING: top k: the teacher's 2 likeliest tokens hold" in log_of(run)
    whole = distill(config("whole", teacher_top_k=64, steps=1))
    assert metrics(whole)[0]["teacher/top_k_mass"] == 1.0
    assert "--teacher-top-k 64: the vocabulary has 16 tokens, and all are compared" in log_of(whole)
    assert "top k: the" not in log_of(whole)


def test_the_best_checkpoint_has_the_lowest_divergence(config):
    run = distill(config(eval_every=1, steps=6, run={"checkpoint_every": 1, "keep": 9}))
    losses = {row["step"]: row["heldout/loss"] for row in metrics(run)}
    assert (run / "checkpoints" / "best").read_text().split()[0] == f"step-{min(losses, key=losses.get):06d}"
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {0, 6}


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"vocab_size": 20}, "has 20 token ids and the student 16"),
        ({"max_length": 24}, r"holds rows of 24 tokens, and the student's may have 32; give --max-length 24"),
    ],
)
def test_a_teacher_that_cannot_read_the_students_rows_is_refused(config, tiny_model, changes, wanted):
    with pytest.raises(UserError, match=wanted):
        distill(config(teacher=tiny_model("teacher", 1, **changes)))


def test_another_vocabulary_is_refused_and_a_token_named(config, make_tokenizer, tiny_model, jsonl):
    for name in ("student", "teacher"):
        directory = make_tokenizer(name, template=CHATML)
        tiny_model(name, vocab_size=320, hf={"eos_token_id": 1})
    path = directory / "tokenizer.json"
    table = json.loads(path.read_text())
    vocabulary = table["model"]["vocab"]
    (a, i), (b, j) = [(word, i) for word, i in vocabulary.items() if i in (100, 101)]
    vocabulary[a], vocabulary[b] = j, i
    rows = [{"prompt": f"Hello {i}", "response": "fine"} for i in range(8)]
    flags = {"rows": rows, "model": str(directory.with_name("student")), "teacher": str(directory), "steps": 1}
    distill(config("same", **flags))
    path.write_text(json.dumps(table))
    with pytest.raises(
        UserError, match=rf"2 of 310 tokens have other ids than the student's, the first: '.+' is {j} to it"
    ):
        distill(config(**flags))


def test_a_table_that_is_padded_further_is_the_same_vocabulary(config, make_tokenizer, tiny_model, monkeypatch):
    """Qwen2.5-7B has 152,064 rows of embeddings and 0.5B 151,936: no token's name is in between."""
    addresses = {}
    for name, words in (("student", 320), ("teacher", 352)):
        addresses[name] = str(make_tokenizer(name, template=CHATML))
        tiny_model(name, vocab_size=words, hf={"eos_token_id": 1})
    rows = [{"prompt": f"Hello {i}", "response": "fine"} for i in range(8)]
    flags = {"rows": rows, "model": addresses["student"], "teacher": addresses["teacher"], "steps": 1}
    ids = []
    real = Distillation.learn
    monkeypatch.setattr(
        Distillation,
        "learn",
        lambda self, taught, *more, **flags: ids.append(taught[0].ids) or real(self, taught, *more, **flags),
    )
    (row,) = metrics(distill(config(**flags, teacher_top_k=1000)))
    assert ids[0].max() == 319  # its other 32 rows count among the rest
    assert 0.85 < row["teacher/top_k_mass"] < 0.95  # 320 of 352
    with pytest.raises(UserError, match="knows 320 token ids, and the student 352"):
        distill(config("other", **flags | {"model": addresses["teacher"], "teacher": addresses["student"]}))


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"temperature": 0.0}, "give a temperature above 0"),
        ({"jsd_beta": 0.1}, "--jsd-beta belongs to --loss jsd"),
        ({"sft_coef": 1.0, "on_policy": 1.0}, "--sft-coef needs given answers"),
        ({"precompute_teacher": True, "on_policy": 0.1}, "cannot know what the student will sample"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(config, flags, wanted):
    with pytest.raises(UserError, match=wanted):
        distill(config(**flags))


@pytest.mark.parametrize("flag", ["--jsd-beta 1.5", "--on-policy -1", "--teacher-top-k 0", "--sft-coef -1"])
def test_numbers_out_of_range_are_refused(flag, capsys):
    assert cli("distill", "--model", "m", "--teacher", "t", "--data", "d", "--out", "o", *flag.split()) == 2
    assert flag.split()[0] in capsys.readouterr().err
