"""Updates that a thread makes beside what follows leave the bits of the serial order, on every tier."""

import contextlib
import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from penstock.algorithms import functional as fn
from penstock.algorithms.sft import Rows, response_logprobs
from penstock.distributed.world import World
from penstock.errors import ResourceError
from penstock.memory import prepare, sink
from penstock.memory.adamw import AdamW
from penstock.memory.strategy import DTYPES, Step, Strategy
from penstock.memory.tiers import DiskHome, Ram, _AtOnce
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor, Critic
from tests import imagined
from tests.conftest import PATIENCE
from tests.imagined import imagining
from tests.memory.test_gradients import Twins
from tests.memory.test_stream import FAMILIES, batches

CPU = torch.device("cpu")
STEPS = 3
ROWS = ["ddp", "zero1_cpu", "zero2_cpu", "gemini_cpu", "gemini_nvme", "gemini_cpu_8bit", "gemini_nvme_8bit", "auto"]


@pytest.fixture
def slow(monkeypatch):
    """Every chunk is updated by the thread, as where a GPU computes, and late enough to be missed."""
    update = AdamW.update

    def late(*args, **kwargs):
        time.sleep(0.003)
        update(*args, **kwargs)

    monkeypatch.setattr(AdamW, "update", late)
    monkeypatch.setattr(sink, "overlaps", lambda home, device: not (home.whole and home.split))


@pytest.fixture
def serial(monkeypatch):
    """Called, updates are done before anything follows them."""
    return lambda: monkeypatch.setattr(prepare, "worker", lambda name: _AtOnce())


def named(name, dtype, folder, world=None):
    on_disk = "nvme" in name or name == "auto"
    budgets = {"device_memory": "150kB", "host_memory": "256.2MB"} if name == "auto" else {}
    name = "gemini_auto" if name == "auto" else name
    if world is None:
        return Strategy.named(name, dtype=dtype, device="cpu", disk=str(folder) if on_disk else None, **budgets)
    return Strategy(name, world, DTYPES[dtype], tiers={"device": Ram("device", CPU), "host": Ram("host", CPU)})


def steps_of_two(strategy, family="gpt2", steps=STEPS):
    """Actor and critic as PPO trains them; they share the memory of gradients. All bytes that they leave."""
    decoders = [
        Decoder(FAMILIES[family], dtype=strategy.dtype, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    ]
    models = [Actor(decoders[0]), Critic(decoders[1])]
    streams = strategy.prepare_all(*models, weight_decay=0.1)
    assert {id(home.reader) for home in streams[0].sink.homes} & {id(home.reader) for home in streams[1].sink.homes}
    read = []
    for step in range(steps):
        rows = list(batches(step))
        total = sum(int(batch.trained.sum()) for batch in rows)

        def policy(hidden, batch, total=total):
            return fn.sft_loss(response_logprobs(models[0], hidden, batch), total), {}

        def value(hidden, batch, total=total):
            return models[1].read(hidden.flatten(0, 1)).square().sum() / total, {}

        stats = strategy.step_all([Step(streams[0], rows, policy, 1e-2), Step(streams[1], rows, value, 3e-2)])
        read += [(each.grad_norm, each.sums) for each in stats]
        if step == 0:
            read += strategy.evaluate(streams[1], rows, lambda hidden, batch: hidden.float().sum().item())
    homes = [home for stream in streams for home in stream.homes]
    left = [home.whole_weights(strategy.world) for home in homes]
    left += [state for home in homes for state in home.whole_states(strategy.world).values()]
    return read, [tensor.clone() for tensor in left]


def assert_same(ours, expected):
    assert ours[0] == expected[0]
    assert len(ours[1]) == len(expected[1])
    assert all(torch.equal(a, b) for a, b in zip(ours[1], expected[1], strict=True))


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ROWS)
def test_an_overlapped_update_leaves_the_bytes_of_the_serial_one(name, dtype, tmp_path, serial, monkeypatch):
    if "8bit" not in name:  # a piece begins on a page
        monkeypatch.setattr(sink, "PIECE", 2048)
    ours = steps_of_two(named(name, dtype, tmp_path))
    serial()
    assert_same(ours, steps_of_two(named(name, dtype, tmp_path)))


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("name", ["gemini_cpu", "gemini_nvme"])
def test_a_models_next_step_may_begin_while_its_update_goes_on(name, tmp_path, serial):
    """It then marks gradients as old that the update has not read yet."""

    def norms():
        _, step = line(named(name, "fp32", tmp_path))
        return [step(i).grad_norm for i in range(STEPS)]

    ours = norms()
    serial()
    assert norms() == ours


class OnMain(Twins):
    """Two ranks that hold the same, and whose collectives have one order: that of the main thread."""

    def sum(self, tensor):
        assert threading.current_thread() is threading.main_thread()
        return super().sum(tensor)

    def join_shards(self, shard, out=None):
        assert threading.current_thread() is threading.main_thread()
        return super().join_shards(shard, out)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["zero1_cpu", "zero2", "zero2_cpu", "gemini", "gemini_cpu", "gemini_cpu_8bit"])
def test_on_two_ranks_as_well_and_collectives_stay_in_order(name, dtype, tmp_path, serial):
    ours = steps_of_two(named(name, dtype, tmp_path, OnMain(0, 2, CPU)))
    serial()
    assert_same(ours, steps_of_two(named(name, dtype, tmp_path, OnMain(0, 2, CPU))))


def line(strategy, family="llama"):
    """A small model's steps."""
    model = Actor(Decoder(FAMILIES[family], dtype=strategy.dtype, generator=torch.Generator().manual_seed(0)))
    stream = strategy.prepare(model)

    def loss_of(hidden, batch):
        return response_logprobs(model, hidden, batch).sum(), {}

    return stream, lambda step: strategy.step(stream, list(batches(step)), loss_of, lr=1e-2)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("name", ["gemini_cpu", "gemini_nvme"])
def test_a_forward_begins_while_later_chunks_are_updated(name, tmp_path, monkeypatch):
    """The last chunk's update waits for the first visit of what follows."""
    stream, step = line(named(name, "fp32", tmp_path))
    begun, last, update, calls = threading.Event(), stream.sink.homes[-1], AdamW.update, []

    def waiting(*args, **kwargs):
        calls.append(args)
        assert len(calls) < len(stream.sink.homes) or begun.wait(PATIENCE)
        update(*args, **kwargs)

    monkeypatch.setattr(AdamW, "update", waiting)
    step(0)
    with stream.visit("tokens"):
        assert last.update.running
        begun.set()
    stream.sink.wait()
    assert not last.update.running


@pytest.mark.parametrize("name", ["gemini_cpu", "gemini_nvme"])
def test_no_update_begins_on_what_is_not_finite(name, tmp_path):
    strategy = named(name, "fp32", tmp_path)
    stream, _ = line(strategy)
    strategy.step(stream, list(batches(0)), lambda hidden, batch: (hidden.sum() * torch.nan, {}), lr=1.0)
    assert all(home.update.future is None for home in stream.homes)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("failing", [0, 1, -1])
def test_an_update_that_fails_is_known_to_whoever_waits_for_its_chunk(failing, tmp_path, monkeypatch):
    """Whichever of a chunk's pieces is not written."""
    monkeypatch.setattr(sink, "PIECE", 1024)
    stream, step = line(named("gemini_nvme", "fp32", tmp_path))
    write = DiskHome.write

    def breaks(home, source, start=0):
        if home is stream.homes[2].weights and start == starts[failing]:
            raise ResourceError("the disk is gone")
        write(home, source, start)

    starts = range(0, stream.homes[2].share_numel, 1024)
    monkeypatch.setattr(DiskHome, "write", breaks)
    step(0)
    with stream.visit(stream.homes[0].chunk.group):
        pass  # it was updated before
    for _ in range(2):
        with pytest.raises(ResourceError, match="the disk is gone"), stream.visit(stream.homes[2].chunk.group):
            pass
    with pytest.raises(ResourceError, match="the disk is gone"):
        list(stream.sink.saved_states())
    with pytest.raises(ResourceError, match="the disk is gone"):
        step(1)


@pytest.mark.usefixtures("slow")
def test_a_checkpoint_and_its_restoring_wait_for_updates(tmp_path):
    stream, step = line(named("gemini_nvme", "fp32", tmp_path))
    step(0)
    names = [(weight.name, kind) for weight in stream.sink.weights for kind in sink.SAVED]
    saved = dict(zip(names, (state.clone() for state in stream.sink.saved_states()), strict=True))
    after = step(1).grad_norm
    stream.restore(1, lambda name, kind: saved[name, kind])
    assert all(torch.equal(a, b) for a, b in zip(saved.values(), stream.sink.saved_states(), strict=True))
    assert step(1).grad_norm == after


@pytest.mark.parametrize("world", [World(0, 1, CPU), Twins(0, 2, CPU)], ids=["one rank", "two ranks"])
@pytest.mark.parametrize("recompute", [None, False])
@pytest.mark.parametrize("name", ["zero2_cpu", "gemini", "gemini_cpu"])
def test_squares_taken_as_gradients_leave_make_the_norm_of_those_at_home(name, recompute, world, monkeypatch):
    tiers = {"device": Ram("device", CPU), "host": Ram("host", CPU)}
    strategy = Strategy(name, world, torch.bfloat16, recompute, tiers=tiers)
    model = Actor(Decoder(FAMILIES["gpt2"], dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)))
    stream, norms, norm = strategy.prepare(model), [], sink.Sink.norm

    def both(self):
        norms.append([(len(self._squares), norm(self)), (self._squares.clear(), norm(self))])
        return norms[-1][0][1]

    monkeypatch.setattr(sink.Sink, "norm", both)

    def loss_of(hidden, batch):
        return response_logprobs(model, hidden, batch).sum(), {}

    for step in range(2):
        strategy.step(stream, list(batches(step)), loss_of, lr=1e-2)
    passing = [home for home in stream.homes if not home.in_place]
    for (taken, ours), (_, at_home) in norms:
        assert taken == len(passing)
        assert torch.equal(ours, at_home)


def test_the_next_models_gradients_are_written_in_the_order_in_which_updates_free_them():
    """Backward goes from the last chunk to the first one, an update from the first to the last."""
    strategy = Strategy.named("gemini_cpu", device="cpu")
    config = dataclasses.replace(FAMILIES["gpt2"], num_layers=4)
    first, second = (strategy.prepare(Actor(Decoder(config, device="cpu"))) for _ in range(2))
    blocks = [
        [home.reader for home in stream.homes if home.chunk.group.startswith("blocks.")] for stream in (first, second)
    ]
    assert [id(reader) for reader in blocks[1]] == [id(reader) for reader in reversed(blocks[0])]


def test_one_thread_makes_the_updates_of_all_models(tmp_path):
    strategy = named("gemini_nvme", "fp32", tmp_path)
    streams = [line(strategy)[0] for _ in range(2)]
    assert streams[0].sink._memory.updates is streams[1].sink._memory.updates
    assert isinstance(streams[0].sink._memory.updates, ThreadPoolExecutor)


def test_all_updates_beside_a_gpu_go_through_one_stream_of_it(monkeypatch):
    """torch gives the streams of CUDA graphs again when 32 were made."""
    made = []
    with imagining("cuda") as device:
        monkeypatch.setattr(torch, "Stream", lambda device: made.append(device) or imagined._Stream())
        strategy = Strategy.named("zero1_cpu", device=str(device))
        model = Actor(Decoder(FAMILIES["gpt2"], generator=torch.Generator().manual_seed(0)))
        stream = strategy.prepare(model)
        counts = []
        for step in range(3):
            rows = [Rows(batch.tokens.to(device), batch.trained.to(device)) for batch in batches(step)]
            loss_of = lambda hidden, batch: (response_logprobs(model, hidden, batch).sum(), {})  # noqa: E731
            strategy.step(stream, rows, loss_of, lr=1e-3)
            stream.sink.wait()
            counts.append(len(made))
    assert counts[0] == counts[2] > 0


def test_gradients_pass_through_one_memory_to_the_thread_and_to_updates_beside_it(tmp_path, monkeypatch, serial):
    """On a CPU states in host memory are updated at once, those on a disk by the thread."""
    bring_home, both = sink.bring_home, threading.Barrier(2)

    def late(*copy):
        bring_home(*copy)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)  # for a second copy, which must not come

    def weights():
        budgets = {"device_memory": "300kB", "host_memory": "255.95MB", "disk": str(tmp_path)}
        stream, step = line(Strategy.named("gemini_auto", device="cpu", **budgets), "gpt2")
        tiers = {(home.grads.tier.name, home.states["exp_avg"].tier.name) for home in stream.homes}
        assert tiers == {("device", name) for name in ("device", "host", "disk")}
        step(0)
        return [home.whole_weights(stream.world).clone() for home in stream.homes]

    with monkeypatch.context() as patched:
        patched.setattr(sink, "bring_home", late)
        ours = weights()
    serial()
    assert all(torch.equal(a, b) for a, b in zip(ours, weights(), strict=True))
