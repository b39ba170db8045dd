"""A KV cache in host memory, a layer at a time on the device: the same answers, and every byte is counted."""

import gc

import pytest
import torch

from penstock.errors import ResourceError
from penstock.memory.tiers import Ram
from penstock.models import tiling
from penstock.models.decoder import Decoder
from penstock.planner import footprint
from penstock.rollout.engine import Engine
from penstock.rollout.sampling import Sampling
from tests.conftest import EOS, TINY
from tests.planner.test_planning import FAMILIES

PROMPTS = [[1, 3], [1, 4, 5, 6, 7], [1], [1, 9, 9], [1, 3]]
pytestmark = pytest.mark.usefixtures("both_ways")


def answers_of(decoder, swap, rows, **sampling):
    engine = Engine(decoder, eos_ids=(EOS,), rows=rows, length=40, swap=swap)
    answers = engine.generate(PROMPTS, Sampling(n=2, max_new_tokens=12, seed=3, **sampling))
    return [(one.response_ids, one.logprobs) for one in answers]


@pytest.mark.parametrize("rows", [1, 3, 10])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_swapped_cache_gives_the_same_answers(name, rows):
    """Rows leave and are refilled on the way, prompts are shared, and there are odd and even numbers of layers."""
    decoder = Decoder(FAMILIES[name], generator=torch.Generator().manual_seed(0))
    host = Ram("host", torch.device("cpu"))
    expected = answers_of(decoder, None, rows)
    for _ in range(2):  # the second time in the first one's pages
        assert answers_of(decoder, host, rows) == expected
        gc.collect()
        nbytes = footprint.cache_of(FAMILIES[name], "float32", rows, 41)  # 40 slots, and what a step adds
        assert host.used == host.peak == nbytes
    host.make_room(10**12)  # without a budget there is room
    assert host.used == nbytes


def test_a_cancelled_answer_leaves_its_neighbours_in_a_swapped_cache_alone():
    decoder = Decoder(TINY, generator=torch.Generator().manual_seed(0))
    expected = answers_of(decoder, None, 10)
    engine = Engine(decoder, eos_ids=(EOS,), rows=4, length=40, swap=Ram("host", torch.device("cpu")))
    answers = [engine.submit(prompt, Sampling(n=2, max_new_tokens=12, seed=3), episodes=[2 * i, 2 * i + 1])
               for i, prompt in enumerate(PROMPTS)]  # fmt: skip
    flat = [answer for of_prompt in answers for answer in of_prompt]
    engine.step()
    engine.step()
    engine.cancel(flat[0])
    engine.cancel(flat[5])
    engine.run()
    kept = [(answer.response_ids, ids) for answer, (ids, _) in zip(flat, expected, strict=True)]
    assert all(ids == wanted for i, (ids, wanted) in enumerate(kept) if i not in (0, 5))


def test_a_host_budget_that_is_too_small_is_said_before_anything_runs():
    engine = Engine(Decoder(TINY), rows=4, swap=Ram("host", torch.device("cpu"), budget=1000))
    engine.submit([1], Sampling(max_new_tokens=3))
    with pytest.raises(ResourceError, match="the KV cache"):
        engine.step()


def test_bytes_that_a_step_moves_are_those_of_the_plan():
    """Every decoding step reads the rows whole and writes one token of each; a prefill writes its prompts."""
    config, host = FAMILIES["gpt2"], Ram("host", torch.device("cpu"))
    engine = Engine(Decoder(config), eos_ids=(), rows=4, length=20, swap=host)
    for i in range(4):
        engine.submit([1, 2, i], Sampling(max_new_tokens=3))
    engine.step()
    assert host.bytes_read == 0
    before = host.bytes_written
    engine.step()
    assert host.bytes_read == footprint.cache_of(config, "float32", 4, 20)
    assert host.bytes_written - before == footprint.cache_of(config, "float32", 4, 1)


@pytest.mark.parametrize("most", [1, 6, 11, 1000])
def test_prompts_are_read_in_groups_of_so_many_tokens(monkeypatch, most):
    decoder = Decoder(TINY, generator=torch.Generator().manual_seed(0))
    expected = answers_of(decoder, None, 10)
    widths = []
    monkeypatch.setattr(tiling, "PREFILL_TOKENS", most)
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda t, *rest: widths.append(t.numel()) or forward(t, *rest))
    assert [ids for ids, _ in answers_of(decoder, None, 10)] == [ids for ids, _ in expected]
    assert len(widths) == {1: 4, 6: 3, 11: 2, 1000: 1}[most]
    assert all(width <= max(most, 5) for width in widths)
