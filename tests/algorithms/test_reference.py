"""The reference: log-probabilities against whole logits, read beside training or once before, on the base of LoRA."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from penstock.algorithms.config import DPOFlags
from penstock.algorithms.preference import dpo, learn
from penstock.algorithms.reference import FILE, answer_logprobs, with_reference
from penstock.algorithms.reward import Ranking, micro_batches
from penstock.config import LoraFlags, OptimFlags
from penstock.errors import UserError
from penstock.memory.strategy import Strategy
from penstock.models.roles import Actor
from tests.algorithms.test_preference import CPU, RANKINGS, config, plain_logprob
from tests.conftest import comparisons


def test_padding_of_other_widths_changes_no_log_probability(tiny_model):
    actor = Actor.from_pretrained(tiny_model())
    wide = Ranking([[1, 3, *[4] * 20, 2], [1, 3, 2]], (0, 1), (21, 1))
    with torch.no_grad():
        for ranking in RANKINGS:
            alone, beside = (micro_batches(rows, 99, CPU)[0] for rows in ([ranking], [ranking, wide]))
            values = [
                answer_logprobs(actor, actor(b.tokens, b.lengths), b)[: len(ranking.rows)] for b in (alone, beside)
            ]
            assert torch.allclose(*values, atol=1e-6)
            plain = [
                plain_logprob(lambda ids: type("Out", (), {"logits": actor.decoder.logits(actor(ids, None))}), row, n)
                for row, n in zip(ranking.rows, ranking.response_lengths, strict=True)
            ]
            assert torch.allclose(values[0], torch.stack(plain), atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"peft": LoraFlags(lora=4)}, {"reference": "other"}], ids=["full", "lora", "other"]
)
def test_a_reference_read_once_is_the_same_run_to_the_bit(changes, tmp_path, tiny_model, jsonl):
    model, data = tiny_model(), jsonl(comparisons(30))
    if "reference" in changes:
        changes = {"reference": tiny_model("other", seed=4)}
    runs = [
        Path(dpo(config(tmp_path, model, data, f"{once}", precompute_reference=once, heldout=0.2, **changes)))
        for once in (False, True)
    ]
    assert (runs[0] / "metrics.jsonl").read_bytes() == (runs[1] / "metrics.jsonl").read_bytes()
    assert (runs[1] / FILE).exists()
    assert not (runs[0] / FILE).exists()


def test_a_resumed_run_reads_what_its_reference_said_and_refuses_another(tmp_path, tiny_model, jsonl, monkeypatch):
    from penstock.algorithms import reference

    model, data, changes = tiny_model(), jsonl(comparisons(30)), {"run": {"checkpoint_every": 2, "keep": 9}}
    whole, cut, foreign = (
        Path(dpo(config(tmp_path, model, rows, out, precompute_reference=True, **changes)))
        for out, rows in (("whole", data), ("cut", data), ("foreign", jsonl(comparisons(30, seed=1), "other.jsonl")))
    )
    for step in (4, 6):
        shutil.rmtree(cut / "checkpoints" / f"step-00000{step}")
    with monkeypatch.context() as patch:
        patch.setattr(reference, "with_reference", None)  # nothing is read a second time
        dpo(config(tmp_path, model, data, "cut", precompute_reference=True, **changes), resume=True)
    assert (whole / "metrics.jsonl").read_bytes() == (cut / "metrics.jsonl").read_bytes()
    shutil.copy(foreign / FILE, cut / FILE)
    with pytest.raises(UserError, match="of another reference or of other data"):
        dpo(config(tmp_path, model, data, "cut", precompute_reference=True, optim={"steps": 8}), resume=True)


def test_under_an_adapter_the_reference_is_the_same_base(tiny_model):
    strategy, model = Strategy.named("gemini_cpu", device_memory="1MB"), tiny_model()
    with strategy.init():
        actor = Actor.from_pretrained(model, lora=4)
        frozen = actor.frozen()
    stream, reference = strategy.prepare_all(actor, frozen)
    assert stream.shares(reference)
    optim = OptimFlags(lr=1e-2, batch_size=4, micro_batch_size=4)
    rankings = with_reference(strategy, reference, RANKINGS, optim)
    first = learn(strategy, stream, rankings, optim, DPOFlags(), 1e-2)
    assert first.sums["loss"] == pytest.approx(math.log(2), abs=1e-6)
    again = with_reference(strategy, reference, RANKINGS, optim)  # the actor has moved, its base has not
    assert [ranking.ref_logprobs for ranking in again] == [ranking.ref_logprobs for ranking in rankings]
    assert learn(strategy, stream, rankings, optim, DPOFlags(), 1e-2).sums["loss"] < math.log(2) - 1e-4
