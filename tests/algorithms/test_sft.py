"""SFT: the loss and its gradient against transformers' own, and which tokens they are about."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock.algorithms import functional as fn
from penstock.algorithms.sft import heldout_loss, micro_batches, prompt_of, response_logprobs, sft
from penstock.config import DataFlags, OptimFlags, RunFlags, SFTConfig
from penstock.data.chat import Example
from penstock.memory.strategy import Strategy
from penstock.models.roles import Actor
from tests.conftest import demonstrations

CPU = torch.device("cpu")
EXAMPLES = [
    Example([1, 3, 4, 5, 2], [False, False, False, True, True]),
    Example([1, 6, 2], [False, True, True]),
    Example([1, 7, 8, 2, 9, 10, 11, 2], [False, False, True, True, False, False, True, True]),  # two turns
    Example([1, 12], [False, True]),  # cut before its EOS
]
COUNT = sum(sum(example.trained) for example in EXAMPLES)


def theirs(address):
    """transformers' loss and gradients: labels of -100 wherever a token is not trained, one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(address)
    loss = torch.zeros(())
    for example in EXAMPLES:
        labels = [token if flag else -100 for token, flag in zip(example.tokens, example.trained, strict=True)]
        output = model(torch.tensor([example.tokens]), labels=torch.tensor([labels]))
        loss = loss + output.loss * sum(example.trained) / COUNT
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_loss_and_gradient_are_those_of_transformers_in_any_micro_batch(tiny_model, size):
    address = tiny_model()
    loss, grads = theirs(address)
    actor, total = Actor.from_pretrained(address), 0.0
    for batch in micro_batches(EXAMPLES, size, CPU):
        part = fn.sft_loss(response_logprobs(actor, actor(batch.tokens, None), batch), COUNT)
        part.backward()
        total += float(part.detach())
    assert total == pytest.approx(loss, abs=1e-6)
    assert torch.allclose(actor.decoder.embed.tokens.grad, grads["transformer.wte.weight"], atol=1e-6)
    assert torch.allclose(actor.decoder.embed.positions.grad, grads["transformer.wpe.weight"], atol=1e-6)
    ours = actor.decoder.blocks[0].qkv.weight.grad
    assert torch.allclose(ours, grads["transformer.h.0.attn.c_attn.weight"].T, atol=1e-6)


def test_heldout_loss_is_a_mean_over_trained_tokens(tiny_model):
    address = tiny_model()
    strategy, actor = Strategy.named("naive", device="cpu"), Actor.from_pretrained(address)
    found = heldout_loss(strategy, strategy.prepare(actor), EXAMPLES, 2)
    assert found == pytest.approx(theirs(address)[0], abs=1e-6)


def test_micro_batches_hold_every_row_once_and_neighbours_in_length():
    batches = micro_batches(EXAMPLES, 3, CPU)
    rows = [[token for token in row if token] for batch in batches for row in batch.tokens.tolist()]  # 0 pads
    assert sorted(rows) == sorted(example.tokens for example in EXAMPLES)
    assert sum(int(batch.trained.sum()) for batch in batches) == COUNT
    assert [len(batch.tokens) for batch in batches] == [3, 1]
    assert batches[1].tokens.shape[1] == 8


def test_a_probe_is_everything_before_the_last_answer():
    assert prompt_of(EXAMPLES[0]) == [1, 3, 4]
    assert prompt_of(EXAMPLES[2]) == [1, 7, 8, 2, 9, 10]


def test_the_best_checkpoint_has_the_lowest_heldout_loss(tmp_path, tiny_model, jsonl):
    """Noise learned by heart: the held-out loss rises again, and `best` is not `latest` (PPO.md 24)."""
    run = sft(
        SFTConfig(
            model=tiny_model(), data=DataFlags(data=(jsonl(demonstrations(12)),), max_length=32),
            run=RunFlags(out=str(tmp_path / "run"), checkpoint_every=1, keep=99),
            optim=OptimFlags(lr=2e-2, batch_size=4, micro_batch_size=4, steps=24), heldout=0.5, eval_every=1,
        )
    )  # fmt: skip
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["heldout/loss"] for row in rows}
    best = min(losses, key=losses.get)
    assert (Path(run) / "checkpoints" / "best").read_text().strip() == f"step-{best:06d}"
    assert best < 24


def test_it_learns_what_it_is_shown(tmp_path, tiny_model, jsonl):
    rows = [{"prompt_ids": [1, 3 + i], "response_ids": [15 - i, 15 - i]} for i in range(5)] * 4
    run = sft(
        SFTConfig(
            model=tiny_model(), data=DataFlags(data=(jsonl(rows),), max_length=32),
            run=RunFlags(out=str(tmp_path / "r")), heldout=0.0,
            optim=OptimFlags(lr=2e-2, batch_size=10, micro_batch_size=5, steps=60),
        )
    )  # fmt: skip
    samples = [json.loads(line) for line in (Path(run) / "samples.jsonl").read_text().splitlines()]
    after = {row["prompt"]: row["response"] for row in samples if row["step"] == 60}
    assert after["[1, 3]"] == "[15, 15, 2]"
    assert all(after[f"[1, {3 + i}]"] == f"[{15 - i}, {15 - i}, 2]" for i in range(5) if f"[1, {3 + i}]" in after)
