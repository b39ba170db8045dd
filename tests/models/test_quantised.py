"""int8 weights: what they give back, and that answering with them is one computation on every path."""

import copy

import pytest
import torch

from penstock.memory import native
from penstock.models.decoder import Decoder
from penstock.models.quantised import quantise
from penstock.rollout.engine import Engine, generate
from penstock.rollout.sampling import Sampling
from tests.models.test_decoder import KINDS, decoder  # noqa: F401  (the fixture)

GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


def restored(original: Decoder) -> Decoder:
    """A plain decoder with the values that int8 weights stand for: the oracle."""
    made, small = copy.deepcopy(original), copy.deepcopy(original)
    quantise(small)
    with torch.no_grad():
        for one, two in zip(made.modules(), small.modules(), strict=True):
            if isinstance(one, torch.nn.Linear):
                one.weight.copy_(two.weight.float() * two.scales[:, None])
        made.embed.tokens.copy_(small.embed.tokens.float() * small.embed.scales[:, None])
        if made.head is not None:
            made.head.copy_(small.head.float() * small.head_scales[:, None])
    return made


def test_every_weight_comes_back_within_half_a_level(decoder):  # noqa: F811
    made = restored(decoder)
    for (name, before), after in zip(decoder.named_parameters(), made.parameters(), strict=True):
        level = before.abs().amax(-1, keepdim=True) / 127 if before.dim() == 2 and "positions" not in name else 0.0
        assert ((before - after).abs() <= 0.51 * torch.as_tensor(level) + 1e-9).all(), name


@pytest.mark.parametrize("compiled", [True, False])
def test_answers_are_those_of_the_restored_weights(decoder, compiled, monkeypatch):  # noqa: F811
    if not compiled:
        monkeypatch.setattr(native, "compiled", lambda source: "no compiler")
    small, prompts = copy.deepcopy(decoder), [[1, 5, 6], [7], [9, 8, 7, 6, 5]]
    quantise(small)
    assert small.dtype == torch.float32
    expected = generate(restored(decoder), prompts, GREEDY, eos_ids=())
    for ours, theirs in zip(generate(small, prompts, GREEDY, eos_ids=()), expected, strict=True):
        assert ours.response_ids == theirs.response_ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_an_engine_reads_a_directory_into_int8(tiny_model):
    source = tiny_model()
    small, plain = (Engine.from_pretrained(source, dtype=dtype, device="cpu") for dtype in ("int8", "bf16"))
    assert {p.dtype for n, p in small.decoder.named_parameters() if n.endswith("qkv.weight")} == {torch.int8}
    assert small.decoder.dtype == torch.bfloat16
    one, two = (engine.generate([[1, 3, 4]], GREEDY)[0] for engine in (small, plain))
    assert one.error is None
    assert one.logprobs[0] == pytest.approx(two.logprobs[0], abs=0.1)
