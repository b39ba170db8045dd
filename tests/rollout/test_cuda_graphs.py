"""Steps at fixed addresses give the same answers, and nothing in them would break a recording on a GPU."""

import contextlib
import copy
import gc

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from penstock.memory.strategy import Strategy
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor
from penstock.models.surgery import quantise
from penstock.rollout import cuda_graphs
from penstock.rollout import engine as engines
from penstock.rollout.cache import KVCache
from penstock.rollout.cuda_graphs import Steps
from penstock.rollout.engine import Engine
from penstock.rollout.sampling import Sampling
from tests.conftest import EOS, TINY
from tests.planner.test_planning import FAMILIES

DENSE = [name for name, config in FAMILIES.items() if not config.num_experts]  # experts are chosen on the host

PROMPTS = [[1, 3], [1, 4, 5, 6, 7], [1], [1, 9, 9], [1, 3]]


def answers_of(decoder, rows, fixed):
    engine = Engine(decoder, eos_ids=(EOS,), rows=rows, length=40, fixed=fixed)
    return engine.generate(PROMPTS, Sampling(n=3, max_new_tokens=20, seed=3))


def assert_alike(some, others):
    assert [one.response_ids for one in some] == [one.response_ids for one in others]
    for one, other in zip(some, others, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


class Recorded(Steps):
    """Operations written down at the first call, with the addresses they met, and replayed after that."""

    made = 0

    def _record(self, rows, seen):
        Recorded.made += 1
        return torch.no_grad()(make_fx(lambda: self._step(rows, seen))())


@pytest.mark.parametrize("rows", [1, 3, 15])
@pytest.mark.parametrize("name", DENSE)
def test_recorded_steps_give_the_same_answers(name, rows, no_compiler, monkeypatch):
    """Rows leave and are refilled on the way, so the numbers of rows go up and down past those recorded."""
    decoder = Decoder(FAMILIES[name], generator=torch.Generator().manual_seed(0))
    expected = answers_of(decoder, rows, fixed=False)
    monkeypatch.setattr(engines, "Steps", Recorded)
    monkeypatch.setattr(Recorded, "made", 0)
    assert_alike(answers_of(decoder, rows, fixed=True), expected)
    assert 1 <= Recorded.made <= 6


@pytest.mark.parametrize("rows", [1, 3, 15])
def test_steps_as_they_are_give_the_same_answers(rows):
    """By `decode.c`, where there is a compiler."""
    decoder = Decoder(TINY, generator=torch.Generator().manual_seed(0))
    assert_alike(answers_of(decoder, rows, fixed=True), answers_of(decoder, rows, fixed=False))


def test_a_replay_sees_weights_that_were_updated_in_place(no_compiler, monkeypatch):
    decoder = Decoder(TINY, generator=torch.Generator().manual_seed(0))
    other = Decoder(TINY, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(engines, "Steps", Recorded)
    engine = Engine(decoder, eos_ids=(), rows=1, length=40, fixed=True)
    greedy = Sampling(temperature=0.0, max_new_tokens=20)
    engine.generate([[1, 3]], greedy)
    with torch.no_grad():
        for mine, theirs in zip(decoder.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    fresh = Engine(other, eos_ids=(), rows=1, length=40, fixed=False)
    assert_alike(engine.generate([[1, 3]], greedy), fresh.generate([[1, 3]], greedy))


class FromHost(TorchDispatchMode):
    """Finds operations that a recording cannot hold: those that wait for the device, or fetch from host memory."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        from_host = any(one.device.type == "cpu" and one.dim() for one in tensors)  # a number is handed over as it is
        if from_host or func is torch.ops.aten._local_scalar_dense.default:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_a_step_never_waits_for_the_device_nor_reads_host_memory(name, int8):
    """On a device that is only imagined."""
    decoder = Decoder(FAMILIES[name], device="meta")
    if int8:
        quantise(decoder)
    steps = Steps(decoder, KVCache(decoder, 8, 64))
    with FromHost() as watch, torch.no_grad():
        states = steps._step(4, 64)
    assert states.shape[0] == 4
    assert watch.found == []


def test_the_watch_finds_what_it_looks_for():
    with FromHost() as watch:
        there = torch.empty(3, device="meta")
        there + there.clone() * 2
        assert watch.found == []
        there.copy_(torch.empty(3))
    assert watch.found != []


def test_sizes_are_few():
    steps = Steps(Decoder(TINY), KVCache(Decoder(TINY), 60, 1000))
    assert [steps.size_of(rows, 5)[0] for rows in (1, 2, 3, 5, 8, 9, 17, 57, 60)] == [1, 2, 4, 8, 8, 16, 24, 60, 60]
    assert [steps.size_of(1, seen)[1] for seen in (1, 128, 129, 512, 513, 1000)] == [128, 128, 256, 512, 1000, 1000]


def test_weights_that_move_are_not_recorded():
    """By default, even on a GPU: their addresses change."""
    decoder = Decoder(TINY, generator=torch.Generator().manual_seed(0))
    assert decoder.feed.fixed
    moving = Actor(copy.deepcopy(decoder)).requires_grad_(False)
    Strategy.named("gemini_cpu", device="cpu").prepare(moving)
    assert not moving.decoder.feed.fixed
    staying = Actor(decoder)
    Strategy.named("zero2_cpu", device="cpu").prepare(staying)
    assert staying.decoder.feed.fixed


class Streams:
    """torch.cuda's streams and graphs, as far as a recording needs them: who ran where is written down."""

    def __init__(self):
        self.made, self.warmed, self.captured, self.pools = [], [], [], []

    def stream(self, device=None):
        self.made.append(Stand())
        return self.made[-1]

    @contextlib.contextmanager
    def within(self, stream):
        self.warmed.append(stream)
        yield

    @contextlib.contextmanager
    def graph(self, graph, *, pool=None, stream=None, capture_error_mode="global"):
        self.captured.append(stream)
        self.pools.append(pool or graph)
        graph.pool = lambda: pool or graph
        yield


class Stand:
    """A stream that has nothing to wait for; a graph that replays nothing."""

    def wait_stream(self, other):
        pass

    def replay(self):
        pass


@pytest.fixture
def streams(monkeypatch):
    """torch.cuda of a GPU that is only imagined."""
    streams = Streams()
    monkeypatch.setattr(cuda_graphs, "_FREE", {})
    for name, stand in {
        "Stream": streams.stream, "stream": streams.within, "graph": streams.graph, "CUDAGraph": Stand,
        "current_stream": lambda device=None: Stand(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand)
    return streams


class OnGpu:
    """A recorder's inputs, which say that they lie on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, inputs):
        self._inputs = inputs

    def __getitem__(self, at):
        return self._inputs[at]


@torch.no_grad()
def recorder(sizes=(1, 2, 4)):
    decoder = Decoder(TINY, device="meta")
    steps = Steps(decoder, KVCache(decoder, 8, 32))
    steps._inputs = OnGpu(steps._inputs)
    for rows in sizes:
        steps._record(rows, 32)
    return steps


def test_a_recorder_warms_up_and_records_on_one_stream_of_its_own(streams):
    """Else each recording would keep a workspace of its own, and two engines' graphs would share one."""
    first = recorder()
    assert len(streams.made) == 1
    assert streams.captured == streams.warmed == streams.made * 3
    second = recorder()
    assert len(streams.made) == 2
    assert streams.captured == streams.warmed == [streams.made[0]] * 3 + [streams.made[1]] * 3
    assert streams.pools[:3] == [streams.pools[0]] * 3
    assert streams.pools[3:] == [streams.pools[3]] * 3
    assert streams.pools[0] is not streams.pools[3]
    assert first is not second


def test_a_stream_passes_to_the_next_recorder_only_when_its_own_is_gone(streams):
    first, second = recorder(), recorder()
    del first
    gc.collect()
    third = recorder(sizes=(1, 4))
    assert len(streams.made) == 2
    assert streams.captured[6:] == [streams.made[0]] * 2
    fourth = recorder(sizes=(1,))
    assert len(streams.made) == 3
    assert len({id(steps._stream) for steps in (second, third, fourth)}) == 3
