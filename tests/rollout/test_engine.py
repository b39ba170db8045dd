"""The engine: an answer depends on its prompt, seed and episode, and on nothing that happens beside it."""

import dataclasses

import pytest
import torch

from penstock.models.decoder import Decoder
from penstock.rollout.engine import generate, stream_tokens
from penstock.rollout.sampling import Sampling
from tests.conftest import EOS, TINY

PROMPTS = [[1, 3], [1, 4, 5, 6, 7], [1], [1, 9, 9]]
SAMPLING = Sampling(max_new_tokens=10, seed=5)


@pytest.fixture(scope="module")
def decoder():
    return Decoder(TINY, generator=torch.Generator().manual_seed(0))


def slow(decoder, prompt, count):
    """Greedy text by running the whole row again for each token: no cache, no batch, no padding."""
    row = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            hidden = decoder(torch.tensor([row]), torch.tensor([len(row)]))
            row.append(int(decoder.logits(hidden[:, -1]).argmax()))
            if row[-1] == EOS:
                break
    return row[len(prompt) :]


def test_greedy_is_what_a_loop_without_cache_writes(decoder):
    answers = generate(decoder, PROMPTS, Sampling(temperature=0.0, max_new_tokens=10), eos_ids=(EOS,))
    assert [a.response_ids for a in answers] == [slow(decoder, prompt, 10) for prompt in PROMPTS]


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_an_answer_is_the_same_alone_and_among_others(decoder, batch_size):
    together = generate(decoder, PROMPTS, SAMPLING, eos_ids=(EOS,), batch_size=batch_size)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(decoder, [prompt], SAMPLING, eos_ids=(EOS,), episodes=[i])[0]
        assert alone.response_ids == together[i].response_ids
        assert alone.logprobs == pytest.approx(together[i].logprobs, abs=1e-5)


def test_logprobs_are_those_of_a_forward_over_the_whole_row(decoder):
    sampling = dataclasses.replace(SAMPLING, temperature=0.7)
    for answer in generate(decoder, PROMPTS, sampling, eos_ids=(EOS,)):
        row = torch.tensor([answer.prompt_ids + answer.response_ids])
        with torch.no_grad():
            logits = decoder.logits(decoder(row, torch.tensor([row.shape[1]]))[0]) / 0.7
        n = len(answer.prompt_ids)
        expected = torch.log_softmax(logits[n - 1 : -1], -1).gather(1, row[0, n:, None])[:, 0]
        assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_an_answer_ends_at_its_first_eos_which_belongs_to_it(decoder):
    many = generate(decoder, [[1, 3]] * 60, Sampling(max_new_tokens=12, seed=1), eos_ids=(EOS, 9))
    reasons = {a.finish_reason for a in many}
    assert reasons == {"stop", "length"}
    for answer in many:
        ends = [token in (EOS, 9) for token in answer.response_ids]
        assert not any(ends[:-1])
        assert ends[-1] == (answer.finish_reason == "stop")
        assert len(answer.logprobs) == len(answer.response_ids) <= 12
        assert answer.finish_reason == "stop" or len(answer.response_ids) == 12


def test_rows_that_leave_do_not_disturb_those_that_stay(decoder):
    """60 rows end at different steps, so the batch is halved several times on the way."""
    many = generate(decoder, [[1, 3]] * 60, Sampling(max_new_tokens=12, seed=1), eos_ids=(EOS,))
    alone = [
        generate(decoder, [[1, 3]], Sampling(max_new_tokens=12, seed=1), eos_ids=(EOS,), episodes=[i])[0]
        for i in range(60)
    ]
    assert [a.response_ids for a in many] == [a.response_ids for a in alone]


def test_n_answers_stand_side_by_side_and_differ(decoder):
    answers = generate(decoder, PROMPTS[:2], dataclasses.replace(SAMPLING, n=3), eos_ids=())
    assert [a.prompt_ids for a in answers] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert len({tuple(a.response_ids) for a in answers[:3]}) == 3


def test_the_models_last_position_ends_an_answer(decoder):
    prompt = [1] * (TINY.max_length - 3)
    answer = generate(decoder, [prompt, [1]], Sampling(max_new_tokens=50, temperature=0.0), eos_ids=())[0]
    assert len(answer.response_ids) == 3
    assert answer.finish_reason == "length"


def test_streaming_gives_the_same_tokens_one_by_one(decoder):
    whole = generate(decoder, [PROMPTS[1]], SAMPLING, eos_ids=(EOS,), episodes=[4])[0].response_ids
    assert list(stream_tokens(decoder, PROMPTS[1], SAMPLING, eos_ids=(EOS,), episode=4)) == whole
    first = next(stream_tokens(decoder, PROMPTS[1], SAMPLING, eos_ids=(EOS,), episode=4))
    assert first == whole[0]


@pytest.mark.parametrize("prompt", [[], [1] * TINY.max_length])
def test_prompts_that_leave_no_room_are_refused(decoder, prompt):
    with pytest.raises(ValueError, match=r"BOS|room"):
        generate(decoder, [prompt], SAMPLING, eos_ids=(EOS,))
