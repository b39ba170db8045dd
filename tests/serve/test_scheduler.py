"""Requests to the process that owns the engines, without a web server: who gets rows, what frees them, what breaks."""

import asyncio
import contextlib
import threading

import pytest

from penstock.data.chat import Encoder
from penstock.errors import ResourceError
from penstock.models.tokenizer_files import load_tokenizer
from penstock.rollout.sampling import Sampling
from penstock.serve import scheduler as schedulers
from penstock.serve.errors import ApiError
from penstock.serve.models.catalogue import ServedModel, named_sources
from penstock.serve.models.worker import NUMBERS
from penstock.serve.scheduler import BusyError, Generation, Piece, Scheduler
from tests.conftest import PATIENCE
from tests.serve.conftest import engine_of, eventually, paused, save_chatty, worker_of

pytestmark = pytest.mark.anyio  # the plugin of anyio, which the server needs anyway, runs async tests
NO_EOS = ((2, -100.0),)
PROMPT = [1, 40, 41]


@pytest.fixture
def load(tmp_path_factory, scheduler):
    """Makes a served model: await load(seed, rows)."""

    async def make(seed=0, rows=2, name="tiny"):
        path, number = save_chatty(tmp_path_factory.mktemp("model"), seed), next(NUMBERS)
        loading = asyncio.wrap_future(scheduler.call("load", number, path, "fp32", "cpu", rows, 10_000))
        loaded = await loading
        encoder = Encoder(load_tokenizer(path), eos_ids=[2], vocab_size=400, max_length=2**31)
        return ServedModel(name, f"digest of {seed}", 0, encoder, number, 400, rows, loaded.max_length)

    return make


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
async def scheduler(request):
    """A scheduler in the test's loop; its parameter is the length of the queue. Default: 4."""
    scheduler = Scheduler(queue_length=getattr(request, "param", 4))
    yield scheduler
    scheduler.close(ApiError(503, "the test is over"))


@contextlib.contextmanager
def no_steps(scheduler):
    """Between here and the end of the block the worker takes no order and no step."""
    go_on, worker = threading.Event(), scheduler._process.worker
    worker.wait = lambda: go_on.wait(PATIENCE)
    scheduler._send("wait")
    yield
    go_on.set()


def submit_all(scheduler, generations):
    for generation in generations:
        scheduler.submit(generation)


async def all_of(generation):
    """Every answer's text and why it ended."""
    texts, reasons = [""] * generation.count, [None] * generation.count
    while None in reasons:
        for piece in await generation.pieces():
            texts[piece.index] += piece.text
            reasons[piece.index] = piece.finish_reason or reasons[piece.index]
    return texts, reasons


def ask(model, seed=0, tokens=20):
    return Generation(model, [PROMPT], Sampling(max_new_tokens=tokens, seed=seed, logit_bias=NO_EOS))


async def test_requests_join_what_runs_and_each_answer_is_as_if_it_were_alone(load, scheduler):
    model = await load(rows=3)
    alone = []
    for seed in range(5):
        scheduler.submit(generation := ask(model, seed))
        alone.append((await all_of(generation))[0][0])
    steps = scheduler.steps
    generations = [ask(model, seed) for seed in range(5)]
    with no_steps(scheduler):
        submit_all(scheduler, generations)
    together = [(await all_of(generation))[0][0] for generation in generations]
    quick = scheduler.steps - steps
    assert together == alone
    assert steps == 100
    assert quick < 60  # three at a time


@pytest.mark.parametrize("scheduler", [2], indirect=True)
async def test_what_finds_no_room_is_refused_and_room_comes_back(load, scheduler):
    model = await load(rows=1)
    first = [ask(model, seed) for seed in range(3)]
    with no_steps(scheduler):
        submit_all(scheduler, first)
        with pytest.raises(BusyError, match="has 3 answers running or waiting, and room for 3 with 1 at once"):
            scheduler.submit(ask(model))
    for generation in first:
        await all_of(generation)
    assert scheduler.outstanding == 0
    scheduler.submit(last := ask(model))
    await all_of(last)


async def test_a_cancelled_request_frees_its_row_before_the_next_step(load, scheduler):
    model = await load(rows=1)
    with paused(model, lambda: False, after=20):
        scheduler.submit(long := ask(model, tokens=200))
        scheduler.submit(waits := ask(model, seed=1, tokens=1))
        await long.pieces()
        scheduler.cancel(long)
    await all_of(waits)
    assert await long.pieces() == []
    assert scheduler.tokens_made <= 20 + 1
    assert (scheduler.outstanding, scheduler.rows_used) == (0, 0)


async def test_a_request_that_still_waits_can_be_cancelled(load, scheduler):
    model = await load(rows=1)
    with no_steps(scheduler):
        scheduler.submit(long := ask(model, tokens=50))
        scheduler.submit(waits := ask(model, seed=1))
        scheduler.cancel(waits)
    await all_of(long)
    scheduler.submit(last := ask(model, tokens=1))
    await all_of(last)
    assert waits.tokens_made == 0
    assert scheduler.tokens_made == 50 + 1
    assert scheduler.outstanding == 0


async def test_a_step_that_fails_is_an_error_for_all_and_a_fresh_engine_goes_on(load, capsys, scheduler):
    model, other = await load(rows=2), await load(seed=1, name="other")
    scheduler.submit(good := ask(model))
    wanted = await all_of(good)
    old = engine_of(model)

    def breaks():
        raise RuntimeError("on fire")

    old.step = breaks
    generations = [ask(model, seed) for seed in range(4)]
    with no_steps(scheduler):
        scheduler.submit(healthy := ask(other))
        submit_all(scheduler, generations)
    for generation in generations:
        (piece,) = await generation.pieces()
        assert piece.error.status == 500
        assert "RuntimeError" in piece.error.message
    assert (await all_of(healthy))[1] == ["length"]
    assert engine_of(model) is not old
    scheduler.submit(again := ask(model))
    assert await all_of(again) == wanted
    assert scheduler.outstanding == 0
    assert "on fire" in capsys.readouterr().err


async def test_answers_that_run_keep_the_weights_they_began_with(load, scheduler):
    old, new = await load(seed=0, rows=2), await load(seed=5, rows=2)
    expected = []
    for model in (old, new):
        scheduler.submit(generation := ask(model, tokens=100))
        expected.append(await all_of(generation))
    scheduler.submit(begun := ask(old, tokens=100))
    await begun.pieces()
    scheduler.submit(later := ask(new, tokens=100))  # what the catalogue hands out after a swap
    assert (await all_of(later)) == expected[1]
    tail = await all_of(begun)
    assert tail[1] == ["length"]
    assert expected[0][0][0].endswith(tail[0][0])
    assert scheduler.rows_used == 0


async def test_pieces_between_the_first_and_the_last_come_together(load, scheduler, monkeypatch):
    monkeypatch.setattr(schedulers, "PIECES_SECONDS", 1e6)  # only the last piece ends the wait
    model = await load(rows=2)
    for seed, limit in enumerate((200, 1)):
        generation = ask(model, seed, tokens=limit)
        scheduler.submit(generation)
        first = await generation.pieces()
        rest = [] if first[-1].finish_reason else await generation.pieces()
        assert (first + rest)[-1].finish_reason == "length"
        assert generation.tokens_made == limit
        assert len(first) + len(rest) <= limit


async def test_pieces_that_wait_come_when_a_timer_rings(load):
    generation = ask(await load())
    generation.due = asyncio.get_running_loop().time() + 0.05
    for text in "ab":
        generation.inbox.append(Piece(0, text))
        generation.tell()
    assert not generation.wake.is_set()
    assert [piece.text for piece in await generation.pieces()] == ["a", "b"]


async def test_a_stop_string_frees_the_row(load, scheduler):
    model = await load(rows=1)
    scheduler.submit(whole := ask(model, tokens=200))
    (text,), _ = await all_of(whole)
    stop = text[30:33]
    stopped = Generation(model, [PROMPT], whole.sampling, stops=(stop,))
    with paused(model, lambda: False, after=100):  # the worker would hold its row there
        scheduler.submit(stopped)
        (short,), reasons = await all_of(stopped)
        assert (short, reasons) == (text[: text.index(stop)], ["stop"])
        assert scheduler.outstanding == 0
        assert await asyncio.to_thread(eventually, lambda: not scheduler.rows_used)


async def test_prompts_that_cannot_be_read_are_an_error_to_their_request_alone(load, scheduler, monkeypatch):
    model = await load(rows=2)
    read = {"echo": True, "wants_tokens": True}
    with paused(model, lambda: False, after=5):
        scheduler.submit(runs := ask(model, tokens=50))
        await runs.pieces()
        with monkeypatch.context() as broken:
            broken.setattr(worker_of(model).models[model.number].decoder, "forward", None)
            for answers in (True, False):
                scheduler.submit(asked := Generation(model, [PROMPT], Sampling(n=2), answers=answers, **read))
                pieces = await asked.pieces()
                assert [piece.error.code for piece in pieces] == ["model_failed"] * 2
    assert (await all_of(runs))[1] == ["length"]
    assert scheduler.outstanding == 0


async def test_long_prompts_are_spelled_beside_the_loop_and_come_before_their_answers(load, scheduler, monkeypatch):
    model, threads, echoed = await load(rows=2), [], schedulers._echoed
    monkeypatch.setattr(
        schedulers, "_echoed", lambda *given: threads.append(threading.current_thread()) or echoed(*given)
    )
    for wants_tokens in (True, False):
        sampling = Sampling(max_new_tokens=5, logit_bias=NO_EOS, n=2)
        scheduler.submit(asked := Generation(model, [PROMPT], sampling, wants_tokens=wants_tokens, echo=True))
        texts, reasons = await all_of(asked)
        assert reasons == ["length"] * 2
        assert all(text.startswith(model.decode(PROMPT)) for text in texts)
    assert len(threads) == 2
    assert threading.main_thread() not in threads


async def test_a_prompt_that_cannot_be_spelled_is_an_error_and_frees_its_row(load, scheduler, monkeypatch):
    def spell(*given):
        raise RuntimeError("no such letter")

    monkeypatch.setattr(schedulers, "_echoed", spell)
    model = await load(rows=1)
    with paused(model, lambda: False, after=100):
        scheduler.submit(asked := Generation(model, [PROMPT], Sampling(max_new_tokens=200), echo=True))
        (piece,) = await asked.pieces()
        assert (piece.error.code, scheduler.outstanding) == ("model_failed", 0)
        assert await asyncio.to_thread(eventually, lambda: not scheduler.rows_used)


async def test_what_is_asked_of_a_closed_scheduler_fails_at_once(load, scheduler):
    scheduler.close(ApiError(503, "going down"))
    with pytest.raises(ResourceError, match="has ended"):
        await asyncio.wrap_future(scheduler.call("load", 0))


async def test_an_error_of_the_workers_says_where_it_was_raised(load, scheduler):
    model = await load()
    with pytest.raises(AssertionError) as raised:
        await asyncio.wrap_future(scheduler.call("score", model.number, [PROMPT]))
    assert "worker.py" in raised.value.__notes__[0]


async def test_closing_tells_everybody_why(load, scheduler):
    model = await load(rows=1)
    generations = [ask(model, seed, tokens=200) for seed in range(3)]
    with paused(model, lambda: False, after=20):
        submit_all(scheduler, generations)
        await generations[0].pieces()
        scheduler.close(ApiError(503, "going down", code="shutting_down"))
    for generation in generations:
        pieces = await generation.pieces()
        while not pieces[-1].error:
            pieces = await generation.pieces()
        assert pieces[-1].error.code == "shutting_down"
    assert scheduler.outstanding == 0


def test_models_are_named_by_their_paths(tmp_path):
    for name in ("a/run", "b/run", "c"):
        (tmp_path / name).mkdir(parents=True)
    arguments = [str(tmp_path / "a/run"), str(tmp_path / "b/run"), f"mine={tmp_path / 'c'}", "hub/name"]
    assert list(named_sources(arguments)) == ["run", "b/run", "mine", "hub/name"]
    from penstock.errors import UserError

    with pytest.raises(UserError, match="there is a model named mine already"):
        named_sources([*arguments, f"mine={tmp_path / 'c'}"])
