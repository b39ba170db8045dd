"""DPO as a whole: a step against plain transformers and torch, its closed form, invariance, the reference, refusals."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from penstock.algorithms.config import DPOConfig, DPOFlags
from penstock.algorithms.preference import dpo, learn
from penstock.algorithms.reference import with_reference
from penstock.algorithms.reward import Ranking
from penstock.config import DataFlags, LoraFlags, OptimFlags, RunFlags
from penstock.errors import DataError
from penstock.memory.strategy import Strategy
from penstock.models.roles import Actor
from penstock.run.session import StoppedError
from tests.conftest import cli, comparisons, last_model, metrics, torchrun

CPU = torch.device("cpu")
RANKINGS = [
    Ranking([[1, 3, 5, 2], [1, 3, 6, 7, 2], [1, 3, 2]], (0, 1, 2), (2, 3, 1)),
    Ranking([[1, 4, 8, 2], [1, 4, 9, 2]], (1, 0), (2, 2)),
    Ranking([[1, 5, 3, 2], [1, 5, 4, 2], [1, 5, 5, 5, 5, 2], [1, 5, 2]], (0, 1, 1, 0), (2, 2, 4, 1)),
    Ranking([[1, 6, 7, 8, 9, 2], [1, 6, 3, 2]], (0, 1), (4, 2)),
]


def config(tmp_path, model, data, out="run", **changes):
    optim = {"lr": 1e-2, "batch_size": 8, "micro_batch_size": 4, "steps": 6} | changes.pop("optim", {})
    run = {"checkpoint_every": 1000} | changes.pop("run", {})
    dpo_flags = DPOFlags(**changes.pop("dpo", {}))
    return DPOConfig(
        model=model, data=DataFlags(data=(data,), max_length=32, **changes.pop("data_flags", {})), dpo=dpo_flags,
        run=RunFlags(out=str(tmp_path / out), **run), optim=OptimFlags(**optim), **changes,
    )  # fmt: skip


def pairs(count, seed=0):
    """Chosen and rejected answers, of ids: those that begin with 5 are better."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        lengths = torch.randint(1, 6, (2,), generator=rng).tolist()
        answers = [
            [first, *torch.randint(3, 8, (n,), generator=rng).tolist()]
            for first, n in zip((5, 6), lengths, strict=True)
        ]
        rows.append({"prompt_ids": [1, 3 + i % 13, 3 + i // 13], "response_ids": answers, "ranking": [[0], [1]]})
    return rows


# --- against plain torch ----------------------------------------------------------------------------------------------


def plain_logprob(model, row, response):
    """The sum over the response's tokens, from whole logits."""
    logprobs = model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(row[1:])[:, None])[:, 0]
    return chosen[-response:].sum()


def test_a_step_is_that_of_plain_transformers_and_torch(tmp_path, tiny_model, jsonl):
    """Loss, metrics and every weight after one step of AdamW, and after three."""
    model, data = tiny_model(), pairs(6)
    optim = {"batch_size": 6, "micro_batch_size": 4, "steps": 3, "lr_schedule": "constant", "warmup": 0.0, "lr": 1e-3}
    run = dpo(config(tmp_path, model, jsonl(data), heldout=0.0, optim=optim))
    theirs = AutoModelForCausalLM.from_pretrained(model).eval()
    reference = AutoModelForCausalLM.from_pretrained(model).eval()
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(3):
        losses, margins = [], []
        for row in data:
            ratios = []
            for ids in row["response_ids"]:
                whole = [*row["prompt_ids"], *ids, 2]
                with torch.no_grad():
                    base = plain_logprob(reference, whole, len(ids) + 1)
                ratios.append(plain_logprob(theirs, whole, len(ids) + 1) - base)
            margins.append(0.1 * (ratios[0] - ratios[1]))
            losses.append(-F.logsigmoid(margins[-1]))
        loss = torch.stack(losses).mean()
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        found = metrics(run)[step]
        assert found["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
        assert found["rewards/margins"] == pytest.approx(float(torch.stack(margins).mean().detach()), abs=2e-6)
        assert found["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    ours = AutoModelForCausalLM.from_pretrained(last_model(run)).state_dict()
    for name, weight in theirs.state_dict().items():
        assert torch.allclose(ours[name], weight, atol=2e-6), name


# --- closed form ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_two_answers_end_at_the_reference_times_exp_of_the_reward(seed, tmp_path, tiny_model, jsonl):
    """Comparisons drawn by Bradley-Terry from rewards r: the optimum is ref * exp(r / beta) / Z among the answers
    (Rafailov et al. 2023, eq. 4 and 7), here 12 : 4 and 5 : 11 and so r_a - r_b = log 3 and log (5 / 11)."""
    beta, wins = 0.8, {3: 12, 4: 5}
    rows = [
        {"prompt_ids": [1, prompt], "response_ids": [[5], [6, 7]], "ranking": [[0], [1]] if i < won else [[1], [0]]}
        for prompt, won in wins.items() for i in range(16)
    ]  # fmt: skip
    model, optim = tiny_model(seed=seed), {"batch_size": 32, "micro_batch_size": 64, "steps": 60, "lr": 5e-3}
    changes = {"heldout": 0.0, "dpo": {"beta": beta}, "optim": optim, "run": {"seed": seed}}
    run = dpo(config(tmp_path, model, jsonl(rows), **changes))
    start, end = (AutoModelForCausalLM.from_pretrained(path) for path in (model, last_model(run)))
    for prompt, won in wins.items():
        with torch.no_grad():
            before, after = (
                torch.stack([plain_logprob(m, [1, prompt, 5, 2], 2), plain_logprob(m, [1, prompt, 6, 7, 2], 3)])
                for m in (start, end)
            )
        reward = torch.tensor([math.log(won / (16 - won)), 0.0])
        optimum = torch.softmax(before + reward / beta, dim=0)
        assert 0.5 * (torch.softmax(after, dim=0) - optimum).abs().sum() <= 0.03
        assert 0.5 * (torch.softmax(before, dim=0) - optimum).abs().sum() > 0.01


def test_it_learns_a_preference_and_keeps_the_best(tmp_path, tiny_model, jsonl):
    optim = {"batch_size": 16, "steps": 40, "lr": 5e-3}
    run = dpo(config(tmp_path, tiny_model(), jsonl(comparisons(160)), heldout=0.2, optim=optim))
    rows = metrics(run)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["heldout/rewards/accuracies"] > 0.85
    assert rows[-1]["rewards/margins"] > 0.3
    evaluated = {row["step"]: row["heldout/loss"] for row in rows if "heldout/loss" in row}
    best = (Path(run) / "checkpoints" / "best").read_text().split()[0]
    assert int(best.rpartition("-")[2]) == min(evaluated, key=evaluated.get)
    page = (Path(run) / "report.html").read_text()
    assert "Comparisons" in page
    assert "held-out pairs ordered right" in page


# --- invariance -------------------------------------------------------------------------------------------------------


def gradients(model, micro, flags=None):
    """Of one step on RANKINGS, with references that differ from the model."""
    strategy = Strategy.named("naive", device="cpu")
    actor, other = Actor.from_pretrained(model), Actor.from_pretrained(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    stream, reference = strategy.prepare_all(actor, other.eval().requires_grad_(False))
    optim = OptimFlags(lr=1.0, batch_size=4, micro_batch_size=micro)
    rankings = with_reference(strategy, reference, RANKINGS, optim)
    learn(strategy, stream, rankings, dataclasses.replace(optim, max_grad_norm=1e9), flags or DPOFlags(), 0.0)
    return [parameter.grad.clone() for parameter in actor.parameters()]


@pytest.mark.parametrize("flags", [DPOFlags(beta=0.5, sft_coef=0.3), DPOFlags(loss="ipo"), DPOFlags(loss="orpo")])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_never_change_the_gradient(micro, flags, tiny_model):
    together, apart = (gradients(tiny_model(), size, flags) for size in (64, micro))
    assert sum(float(grad.abs().sum()) for grad in together) > 1
    for a, b in zip(together, apart, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


GRADIENT = """
import sys, torch
from penstock.algorithms.config import DPOFlags
from penstock.algorithms.preference import learn
from penstock.algorithms.reference import with_reference
from penstock.algorithms.reward import Ranking
from penstock.config import OptimFlags
from penstock.memory.strategy import Strategy
from penstock.models.roles import Actor

model, other, out = sys.argv[1:]
strategy = Strategy.named("ddp", device="cpu")
actor = Actor.from_pretrained(model)
streams = strategy.prepare_all(actor, Actor.from_pretrained(other).eval().requires_grad_(False))
rankings = [
    Ranking([[1, 3 + i] + [3 + (i * j) % 12 for j in range(n)] + [2] for n in range(1, 3 + i % 3)],
            tuple(range(2 + i % 3)), tuple(range(2, 4 + i % 3)))
    for i in range(7)
]
optim = OptimFlags(lr=1.0, batch_size=7, micro_batch_size=3, max_grad_norm=1e9)
rankings = with_reference(strategy, streams[1], rankings, optim)
stats = learn(strategy, streams[0], rankings, optim, DPOFlags(beta=0.5, sft_coef=0.2), 0.0)
if strategy.world.first:
    torch.save([stats.sums, [r.ref_logprobs for r in rankings], [p.grad.clone() for p in actor.parameters()]], out)
strategy.world.leave()
"""


def test_two_ranks_have_the_gradient_of_one(tmp_path, tiny_model):
    model, other = tiny_model(), tiny_model("other", seed=4)
    (tmp_path / "gradient.py").write_text(GRADIENT)
    for ranks in (1, 2):
        torchrun(tmp_path / "gradient.py", model, other, tmp_path / f"{ranks}.pt", ranks=ranks)
    one, two = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))
    assert one[0] == pytest.approx(two[0], rel=1e-5)
    for a, b in zip(one[1], two[1], strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    assert sum(float(grad.abs().sum()) for grad in one[2]) > 1
    for a, b in zip(one[2], two[2], strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("base_dtype", ["int8", "nf4"])
def test_a_packed_base_learns_too(base_dtype, tmp_path, tiny_model, jsonl):
    model = tiny_model(d_model=64, num_heads=2, num_kv_heads=2, head_dim=32, d_ff=64)
    changes = {"peft": LoraFlags(lora=4, base_dtype=base_dtype), "optim": {"steps": 12}}
    rows = metrics(dpo(config(tmp_path, model, jsonl(pairs(24)), **changes)))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["loss"] < 0.6


def test_a_signal_stops_after_a_checkpoint(tmp_path, tiny_model, jsonl, monkeypatch):
    from penstock.run.session import Session

    monkeypatch.setattr(Session, "_stopping", lambda self: 15)
    with pytest.raises(StoppedError):
        dpo(config(tmp_path, tiny_model(), jsonl(pairs(20))))


# --- what is read, said and refused -----------------------------------------------------------------------------------


def test_best_and_worst_are_never_equal_answers():
    ranking = Ranking([[1, 5], [1, 6], [1, 7], [1, 5]], (0, 1, 2, 2), (1, 1, 1, 1))
    pair = ranking.best_and_worst()
    assert pair.rows == [[1, 5], [1, 7]]
    assert pair.pairs == [(0, 1)]
    assert Ranking([[1, 5], [1, 6], [1, 7]], (1, 0, 1), (1, 1, 1)).best_and_worst().rows == [[1, 6], [1, 7]]


def test_best_and_worst_alone_are_read(tmp_path, tiny_model, jsonl):
    run = Path(dpo(config(tmp_path, tiny_model(), jsonl(comparisons(30)), dpo={"pairs": "best-worst"})))
    log = (run / "log.txt").read_text()
    assert " answers between are not read" in log
    assert metrics(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_comparisons_that_are_all_ties_are_refused(tmp_path, tiny_model, jsonl):
    ties = [{**row, "ranking": [list(range(len(row["response_ids"])))]} for row in comparisons(8)]
    with pytest.raises(DataError, match="every ranking is a tie"):
        dpo(config(tmp_path, tiny_model(), jsonl(ties)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flags", "words"), [
    (["--loss", "simpo", "--reference", "MODEL"], "--loss simpo has no reference (simpo, orpo, cpo have none)"),
    (["--loss", "cpo", "--precompute-reference"], "--loss cpo has no reference"),
    (["--loss", "ipo", "--label-smoothing", "0.1"], "sigmoid, robust, simpo, cpo have"),
    (["--loss", "ipo", "--length-normalize"], "always divides by tokens"),
    (["--simpo-gamma", "1"], "it is simpo's"),
    (["--label-smoothing", "0.5"], "must be at least 0 and below 0.5"),
    (["--beta", "0"], "must be above 0"),
    (["--loss", "dpo"], "there are sigmoid, robust"),
])  # fmt: skip
def test_flags_that_cannot_take_effect_are_refused(flags, words, tmp_path, tiny_model, jsonl, capsys):
    model = tiny_model()
    flags = [model if flag == "MODEL" else flag for flag in flags]
    data = jsonl(pairs(8))
    assert cli("dpo", "--model", model, "--data", data, "--out", tmp_path / "run", *flags) == 2
    assert words in capsys.readouterr().err


def test_many_cut_answers_are_a_warning(tmp_path, tiny_model, jsonl):
    changes = {"data_flags": {"truncate": "right"}}
    setting = config(tmp_path, tiny_model(), jsonl(pairs(20)), **changes)
    setting = dataclasses.replace(setting, data=dataclasses.replace(setting.data, max_length=7))
    run = Path(dpo(setting))
    assert "WARNING: cut answers: " in (run / "log.txt").read_text()


def test_displacement_is_said(tmp_path, tiny_model, jsonl):
    """Both answers share all but one token and a high learning rate pulls all of them down."""
    rows = [
        {"prompt_ids": [1, 3 + i], "response_ids": [[5] * 12 + [6], [5] * 12 + [7]], "ranking": [[0], [1]]}
        for i in range(8)
    ]
    run = Path(dpo(config(tmp_path, tiny_model(), jsonl(rows), heldout=0.0, optim={"lr": 0.3, "steps": 12})))
    texts = [json.loads(line).get("text", "") for line in (run / "health.jsonl").read_text().splitlines()]
    assert any(text.startswith(("likelihood displacement", "margins")) for text in texts), texts
