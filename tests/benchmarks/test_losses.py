"""Ours against another trainer's losses, with one of plain PyTorch in the place of TRL."""

import json

import pytest
import torch
import transformers
from torch.nn import functional as F

from benchmarks import losses

ROWS = [([4, 5, 6], [7, 8, 1]), ([5, 5], [9, 1]), ([4, 5, 6], [10, 1]), ([5, 5], [11, 12, 13])]


@pytest.fixture
def directory(tmp_path):
    """Three tiny models, and a case of pairs and one of groups as TRL's side writes them."""
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.3, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    models = {name: transformers.LlamaForCausalLM(config) for name in ("policy", "behaviour", "reference")}
    for name, model in models.items():
        model.save_pretrained(tmp_path / "tiny" / name)
    logps = {name: [logprobs(model, *row) for row in ROWS] for name, model in models.items()}
    sums = {name: torch.stack([row.sum() for row in rows]) for name, rows in logps.items()}
    ratios = sums["policy"] - sums["reference"].detach()
    each = -F.logsigmoid(0.3 * (ratios[:2] - ratios[2:]))
    advantages = torch.tensor([-1.0, 1.0, 0.0, 0.0]) * 2**-0.5
    clipped = [
        torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
        for row, old, a in zip(logps["policy"], logps["behaviour"], advantages, strict=True)
        for ratio in [(row - old.detach()).exp()]
    ]
    shared = {"rows": ROWS, "logps": [row.tolist() for row in sums.values()]}
    cases = {
        "dpo": {**shared, **learned(models["policy"], each.mean()), "each": each.tolist()},
        "dapo": {
            **shared, **learned(models["policy"], -torch.cat(clipped).mean()), "behaviour": "behaviour", "group": 2,
            "rewards": [0.0, 1.0, 3.0, 3.0], "advantages": advantages.tolist(),
        },
    }  # fmt: skip
    (tmp_path / "trl.json").write_text(json.dumps({"tiny": cases}))
    return tmp_path


def logprobs(model, prompt, answer):
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(answer)), answer]


def learned(model, loss):
    gradients = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
    return {"loss": loss.item(), "grad_norm": torch.nn.utils.get_total_norm(gradients).item()}


def test_steps_of_ours_are_those_of_plain_losses(directory):
    rows = losses.compare(directory)
    assert set(rows) == {"dpo", "dapo"}
    for row in rows.values():
        assert max(row.values()) < 2e-4  # the group's deviation has 1e-4 added


def test_a_difference_is_seen_and_one_that_is_meant_has_its_note(directory, monkeypatch):
    file = directory / "trl.json"
    cases = json.loads(file.read_text())
    cases["tiny"]["dpo"]["loss"] += 0.01
    file.write_text(json.dumps(cases))
    monkeypatch.setitem(losses.NOTES, "dapo", "another word")
    rows = losses.compare(directory)
    assert rows["dpo"]["loss"] == pytest.approx(0.01, abs=1e-5)
    assert rows["dapo"]["note"] == "another word"
    assert losses.unexplained(rows) == ["dpo"]
