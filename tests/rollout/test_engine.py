"""The engine: an answer depends on its prompt, seed and episode, and on nothing that happens beside it."""

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.models.decoder import Decoder
from penstock.rollout.engine import Engine, generate
from penstock.rollout.sampling import Sampling
from tests.conftest import EOS, TINY

PROMPTS = [[1, 3], [1, 4, 5, 6, 7], [1], [1, 9, 9]]
SAMPLING = Sampling(max_new_tokens=10, seed=5)
pytestmark = pytest.mark.usefixtures("both_ways")


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
    assert {a.finish_reason for a in many} == {"stop", "length"}
    for answer in many:
        ends = [token in (EOS, 9) for token in answer.response_ids]
        assert not any(ends[:-1])
        assert ends[-1] == (answer.finish_reason == "stop")
        assert len(answer.logprobs) == len(answer.response_ids) <= 12
        assert answer.finish_reason == "stop" or len(answer.response_ids) == 12


def test_no_answer_ends_at_eos_before_min_new_tokens(decoder):
    eager = Sampling(max_new_tokens=6, logit_bias={EOS: 100.0})
    for fewest, length in ((0, 1), (1, 1), (2, 2), (5, 5)):
        (answer,) = Engine(decoder, eos_ids=[EOS]).generate(
            [[1, 5, 6]], dataclasses.replace(eager, min_new_tokens=fewest)
        )
        assert len(answer.response_ids) == length
        assert answer.response_ids.index(EOS) == length - 1


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
    engine = Engine(decoder, eos_ids=(EOS,), rows=1)
    assert list(engine.stream(PROMPTS[1], SAMPLING, episode=4)) == whole
    assert next(engine.stream(PROMPTS[1], SAMPLING, episode=4)) == whole[0]
    with pytest.raises(ValueError, match="empty prompt"):
        next(engine.stream([], SAMPLING))


@pytest.mark.parametrize("prompt", [[], [1] * TINY.max_length])
def test_prompts_that_leave_no_room_are_refused(decoder, prompt):
    with pytest.raises(ValueError, match=r"BOS|room"):
        generate(decoder, [prompt], SAMPLING, eos_ids=(EOS,))


def alone(decoder, prompt, sampling, episode):
    return generate(decoder, [prompt], sampling, eos_ids=(EOS,), episodes=[episode])[0]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 5),
    requests=st.lists(
        st.tuples(st.lists(st.integers(1, 15), min_size=1, max_size=9), st.integers(1, 8), st.integers(1, 3)),
        min_size=1, max_size=8,
    ),
)  # fmt: skip
def test_requests_of_any_shape_share_any_number_of_rows(decoder, rows, requests):
    engine = Engine(decoder, eos_ids=(EOS,), rows=rows)
    submitted = []
    for i, (prompt, most, n) in enumerate(requests):
        sampling = Sampling(max_new_tokens=most, seed=i, n=n, temperature=0.5 + i % 3)
        submitted.append((prompt, sampling, engine.submit(prompt, sampling)))
        if i % 2:
            engine.step()  # others come while it runs
    engine.run()
    assert engine.free == rows
    for prompt, sampling, answers in submitted:
        for episode, answer in enumerate(answers):
            expected = alone(decoder, prompt, dataclasses.replace(sampling, n=1), episode)
            assert answer.response_ids == expected.response_ids
            assert answer.finish_reason == expected.finish_reason
            assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_a_prompt_is_read_once_for_all_its_answers(decoder):
    engine = Engine(decoder, eos_ids=(), rows=3)
    answers = engine.generate([PROMPTS[1]], dataclasses.replace(SAMPLING, n=8))
    assert engine.prompts_read == 3  # 8 answers in three waves of rows: once per wave, since all of one end together
    assert [a.response_ids for a in answers] == [
        alone(decoder, PROMPTS[1], SAMPLING, i).response_ids if EOS not in a.response_ids else a.response_ids
        for i, a in enumerate(answers)
    ]
    engine = Engine(decoder, eos_ids=(), rows=8)
    engine.generate([PROMPTS[1], PROMPTS[2], PROMPTS[1]], dataclasses.replace(SAMPLING, n=2))
    assert engine.prompts_read == 2  # the same prompt asked twice is the same prompt


def test_a_thousand_cancels_leave_no_row_behind_and_disturb_nobody(decoder):
    """Answers come, go and are cancelled at random, waiting or running; those that stay say what they say alone."""
    rng, engine = random.Random(0), Engine(decoder, eos_ids=(EOS,), rows=6)
    kept, cancelled, alive = [], 0, []
    while cancelled < 1000:
        while len(alive) < 10:
            prompt = [rng.randrange(3, 15) for _ in range(rng.randrange(1, 8))]
            sampling = Sampling(max_new_tokens=rng.randrange(1, 12), seed=rng.randrange(5))
            alive.append((prompt, sampling, engine.submit(prompt, sampling)[0]))
        engine.step()
        alive = [one for one in alive if engine._knows(one[2]) or kept.append(one)]
        for one in rng.sample(alive, min(len(alive), rng.randrange(5))):
            engine.cancel(one[2])
            alive.remove(one)
            cancelled += 1
            assert one[2].finish_reason == "cancelled"
    for *_, answer in alive:
        engine.cancel(answer)
    assert engine.free == 6
    assert not engine.busy
    for prompt, sampling, answer in rng.sample(kept, min(len(kept), 60)):
        assert answer.response_ids == alone(decoder, prompt, sampling, 0).response_ids


def test_a_stream_that_nobody_reads_any_more_frees_its_row(decoder):
    engine = Engine(decoder, eos_ids=(EOS,), rows=2)
    stream = engine.stream(PROMPTS[0], Sampling(max_new_tokens=10, seed=5))
    next(stream)
    assert engine.free == 1
    stream.close()
    assert engine.free == 2


@pytest.mark.parametrize(("prompt", "sampling", "why"), [
    ([], SAMPLING, "an empty prompt"), ([1] * TINY.max_length, SAMPLING, "leaves no room"),
    ([1, 10**6], SAMPLING, "outside 0"), ([1, -1], SAMPLING, "outside 0"), ("a text", SAMPLING, "needs a tokenizer"),
    ([1], Sampling(stop="x"), "stop strings need a tokenizer"), ([1], Sampling(n=5000), "4096 at most"),
])  # fmt: skip
def test_a_faulty_request_carries_its_error_and_the_others_go_on(decoder, prompt, sampling, why):
    engine = Engine(decoder, eos_ids=(EOS,))
    good = engine.submit(PROMPTS[0], SAMPLING)[0]
    bad = engine.submit(prompt, sampling)
    assert all(why in answer.error and answer.finish_reason == "error" for answer in bad)
    engine.run()
    assert good.response_ids == alone(decoder, PROMPTS[0], SAMPLING, 0).response_ids
    assert good.error is None


def test_logits_that_are_not_finite_fail_their_own_request(decoder):
    """A NaN in one token's embedding: only the answer whose prompt holds it meets it."""
    import copy

    broken = copy.deepcopy(decoder)
    with torch.no_grad():
        broken.embed.tokens[13] = torch.nan
        broken.head = torch.nn.Parameter(decoder.head_weight.clone())
    engine = Engine(broken, eos_ids=(), rows=3)
    never = Sampling(max_new_tokens=6, seed=5, logit_bias={13: -100.0})
    good, bad = engine.submit([1, 3], never)[0], engine.submit([1, 13], never)[0]
    engine.run()
    assert bad.finish_reason == "error"
    assert "not finite after 0 tokens" in bad.error
    assert good.error is None
    assert len(good.response_ids) == 6


def test_the_likeliest_tokens_are_told_on_request(decoder):
    sampling = dataclasses.replace(SAMPLING, top_logprobs=3, temperature=0.8)
    plain = alone(decoder, PROMPTS[1], dataclasses.replace(sampling, top_logprobs=0), 0)
    answer = alone(decoder, PROMPTS[1], sampling, 0)
    assert answer.response_ids == plain.response_ids
    assert plain.top_logprobs == []
    for token, logprob, likely in zip(answer.response_ids, answer.logprobs, answer.top_logprobs, strict=True):
        assert [value for _, value in likely] == sorted((value for _, value in likely), reverse=True)
        assert len(likely) == 3
        assert dict(likely).get(token, logprob) == pytest.approx(logprob, abs=1e-5)


class Letters:
    """Token i is the i-th letter: enough of a tokenizer for stop strings."""

    def decode(self, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        return "".join(chr(97 + i) for i in ids if not (skip_special_tokens and i == EOS))

    def __call__(self, text, add_special_tokens=True):
        return type("Encoded", (), {"input_ids": [ord(c) - 97 for c in text]})


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_stop_string_ends_an_answer_and_is_no_part_of_its_text(decoder, length):
    engine = Engine(decoder, eos_ids=(), tokenizer=Letters())
    sampling = Sampling(max_new_tokens=10, seed=3, logit_bias={EOS: -100.0})  # each token is a letter then
    free = engine.generate(["bdf"], sampling)[0]
    assert free.text == engine.tokenizer.decode(free.response_ids)
    stop = free.text[4 : 4 + length]
    first = free.text.index(stop)
    answer = engine.generate(["bdf"], dataclasses.replace(sampling, stop=(stop, "never said")))[0]
    assert answer.finish_reason == "stop"
    assert answer.text == free.text[:first]
    assert answer.response_ids == free.response_ids[: first + length]


class Closing(Letters):
    """Puts an end behind every text, as T5's and ByT5's tokenizers do."""

    def __call__(self, text, add_special_tokens=True):
        return type("Encoded", (), {"input_ids": [ord(c) - 97 for c in text] + [EOS] * add_special_tokens})


def test_a_prompt_does_not_end_with_the_end_that_its_tokenizer_puts_behind_every_text(decoder):
    engine = Engine(decoder, eos_ids=(EOS,), tokenizer=Closing())
    assert engine.generate(["bd"], Sampling(max_new_tokens=1))[0].prompt_ids == [1, 3]


@pytest.mark.parametrize(
    "changes", [{"head_dim": 1280, "num_heads": 1, "num_kv_heads": 1}, {"windows": ((1 << 64) + 2, 3)}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shape_that_no_published_model_has_decodes_as_whole_rows_do(changes, dtype):
    """Heads wider than decode.c's buffers; a window that no 64 bits hold. Once the first ended in a bus error, and the
    second was read as a window of 2."""
    config = dataclasses.replace(TINY, **changes)
    decoder = Decoder(config, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for answer in generate(decoder, PROMPTS, Sampling(max_new_tokens=10, temperature=0.7), eos_ids=()):
        row = torch.tensor([answer.prompt_ids + answer.response_ids])
        with torch.no_grad():
            logits = decoder.logits(decoder(row)[0]).float() / 0.7
        n = len(answer.prompt_ids)
        expected = torch.log_softmax(logits[n - 1 : -1], -1).gather(1, row[0, n:, None])[:, 0]
        assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("fixed", [False, True])
def test_the_cache_is_made_for_what_runs_and_grows_with_it(fixed):
    """Late rows and long answers among running ones: each is what it is in a cache made whole, to the bit."""
    decoder = Decoder(dataclasses.replace(TINY, max_length=1024), generator=torch.Generator().manual_seed(0))
    sampling = Sampling(max_new_tokens=200, seed=5, ignore_eos=True)
    prompts = [[1, 3], [1] * 120, [1, 7, 8], [1, 5] * 140, [1, 9]]
    rooms, all_answers = [], []
    for whole in (False, True):
        engine = Engine(decoder, eos_ids=(EOS,), rows=64, fixed=fixed)
        if whole:
            engine.reserve()
        answers = engine.submit(prompts[0], sampling)
        engine.step()
        rooms.append([(engine._cache.rows, engine._cache.slots)])
        for episode, prompt in enumerate(prompts[1:], 1):
            answers += engine.submit(prompt, sampling, episodes=[episode])
            engine.step()
            rooms[-1].append((engine._cache.rows, engine._cache.slots))
        engine.run()
        rooms[-1].append((engine._cache.rows, engine._cache.slots))
        all_answers.append([(answer.response_ids, answer.logprobs) for answer in answers])
    assert rooms[0] == [(1, 128), (2, 128), (4, 128), (4, 512), (8, 512), (8, 512)]
    assert rooms[1] == [(64, 1024)] * 6
    if fixed:  # sums of the attention of as many slots as a recording sees differ in their order
        assert [ids for ids, _ in all_answers[0]] == [ids for ids, _ in all_answers[1]]
    else:
        assert all_answers[0] == all_answers[1]
