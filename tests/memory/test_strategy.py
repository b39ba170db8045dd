"""Strategy.step: one sum whatever the micro-batches, one clip, and no step on what is not finite."""

import contextlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from penstock.distributed.world import World
from penstock.errors import ResourceError, UserError
from penstock.memory import sink
from penstock.memory.placement import NAMES
from penstock.memory.program import ALWAYS_THERE, Part
from penstock.memory.strategy import DTYPES, Strategy
from tests.conftest import ROWS

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))


class Line(nn.Module):
    """The smallest program: one part, one group."""

    def __init__(self, dtype=None):
        super().__init__()
        self.linear = nn.Linear(4, 2, dtype=dtype)
        self.feed = ALWAYS_THERE

    def groups(self):
        return [("line", ["linear.weight", "linear.bias"])]

    def parts(self):
        return [Part(("line",), lambda x, context: self.linear(x))]

    def reads(self):
        return ()

    def learn(self, micro_batches, world):
        pass

    def turn(self, world):
        pass

    def measured(self):
        return {}

    def filling(self):
        return contextlib.nullcontext()

    def begin(self, tokens, batch=None, *, learns=False):
        return None

    def recipe(self, name):
        return None


@dataclass
class Rows:
    tokens: Tensor


def trained(parts, *, steps=3, max_grad_norm=1.0, scale=1.0):
    torch.manual_seed(1)
    net = Line()
    strategy = Strategy.named("naive", device="cpu")
    stream = strategy.prepare(net)

    def loss_of(states, rows):
        loss = scale * states.square().sum() / len(X)
        return loss, {"rows": torch.tensor(len(rows.tokens)), "max_row": rows.tokens.max()}

    batches = [Rows(part) for part in X.split(parts)]
    stats = [strategy.step(stream, batches, loss_of, lr=1e-2, max_grad_norm=max_grad_norm) for _ in range(steps)]
    return net.linear, stats


@pytest.mark.parametrize("parts", [1, 2, 4, 5])
def test_micro_batches_never_change_the_gradient(parts):
    whole, one = trained(12)
    net, many = trained(parts)
    assert torch.allclose(net.weight, whole.weight, atol=1e-6)
    for a, b in zip(one, many, strict=True):
        assert a.grad_norm == pytest.approx(b.grad_norm, abs=1e-6)
        assert a.sums["loss"] == pytest.approx(b.sums["loss"], abs=1e-6)
        assert b.sums["rows"] == 12
        assert b.sums["max_row"] == pytest.approx(float(X.max()))


@pytest.mark.parametrize("max_grad_norm", [0.01, 1.0, 1e9])
def test_clipping_is_by_the_global_norm(max_grad_norm):
    """Against torch.nn.utils.clip_grad_norm_ and torch.optim.AdamW."""
    torch.manual_seed(1)
    oracle = Line().linear
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        (5 * oracle(X).square().sum() / len(X)).backward()
        nn.utils.clip_grad_norm_(oracle.parameters(), max_grad_norm)
        optimizer.step()
    net, _ = trained(3, max_grad_norm=max_grad_norm, scale=5.0)
    assert torch.allclose(net.weight, oracle.weight, atol=1e-6)


def test_auto_on_a_gpu_has_its_free_memory_as_budget(monkeypatch):
    """Else it would take the device for endless, and nothing would go elsewhere."""
    monkeypatch.setattr(World, "join", lambda device: World(0, 1, torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**10, 2 * 10**10))
    assert Strategy.named("gemini_auto").tiers["device"].budget == 9 * 10**9
    assert Strategy.named("gemini_auto", device_memory="4GB").tiers["device"].budget == 4 * 10**9
    assert Strategy.named("ddp").tiers["device"].budget is None


class Ranks(World):
    """Four ranks on two machines, of which another one has less."""

    least = 10**9

    def gather(self, item):
        device, host = item
        return [item, (device and device - 1000, min(host, self.least))] * 2


def test_ranks_of_one_machine_share_its_memory_and_all_ranks_place_alike(monkeypatch):
    monkeypatch.setattr(World, "join", lambda device: Ranks(0, 4, torch.device("cpu")))
    monkeypatch.setattr("penstock.memory.strategy.available_ram", lambda: 16 * 10**9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(Ranks, "least", 10**12)
    assert Strategy.named("gemini_cpu").tiers["host"].budget == 8 * 10**9
    assert Strategy.named("gemini_cpu", host_memory="6GB").tiers["host"].budget == 6 * 10**9
    monkeypatch.setattr(Ranks, "least", 10**9)
    assert Strategy.named("gemini_cpu").tiers["host"].budget == 10**9
    monkeypatch.setattr(World, "join", lambda device: Ranks(0, 4, torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**10, 2 * 10**10))
    assert Strategy.named("gemini_auto").tiers["device"].budget == 9 * 10**9 - 1000
    monkeypatch.setattr(World, "join", lambda device: World(0, 1, torch.device("cpu")))
    assert Strategy.named("gemini_cpu").tiers["host"].budget is None


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [*ROWS, "gemini_cpu_8bit"])
def test_weight_decay_falls_on_products_and_not_on_norms_and_biases(name, dtype, chunk_size, tmp_path, monkeypatch):
    """As transformers' Trainer has it. With no gradient an update is the decay alone."""
    monkeypatch.setattr(sink, "PIECE", 2048)

    class Normed(Line):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(2)
            self.wide = nn.Linear(2, 2500)

        def groups(self):
            names = ["linear.bias", "linear.weight", "norm.weight", "norm.bias", "wide.weight", "wide.bias"]
            return [("line", names)]

        def parts(self):
            return [Part(("line",), lambda x, context: self.wide(self.norm(self.linear(x))))]

    net = Normed().to(DTYPES[dtype])
    nn.init.normal_(net.linear.bias)
    before = {key: weight.detach().clone() for key, weight in net.named_parameters()}
    disk = str(tmp_path) if name == "gemini_nvme" else None
    strategy = Strategy.named(name, dtype=dtype, device="cpu", disk=disk, chunk_size=chunk_size)
    stream = strategy.prepare(net, weight_decay=0.1)
    strategy.step(stream, [Rows(X.to(DTYPES[dtype]))], lambda states, rows: (0 * states.sum(), {}), lr=0.5)
    for home in stream.homes:
        whole = home.whole_weights(stream.world)
        for weight, offset in zip(home.chunk.weights, home.chunk.offsets, strict=True):
            expected = before[weight.name].flatten() * (0.95 if len(weight.shape) == 2 else 1)
            found = whole[offset : offset + weight.numel].float()
            assert torch.allclose(found, expected.float(), rtol=2**-7, atol=0), weight.name


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nothing_moves_when_something_is_not_finite(poison):
    net = Line()
    before = net.linear.weight.detach().clone()
    strategy = Strategy.named(device="cpu")
    stream = strategy.prepare(net)
    stats = strategy.step(stream, [Rows(X)], lambda states, rows: (states.sum() * poison, {}), lr=1.0)
    assert not stats.applied
    assert torch.equal(net.linear.weight, before)
    assert strategy.step(stream, [Rows(X)], lambda states, rows: (states.square().sum(), {}), lr=1.0).applied


@pytest.mark.parametrize("name", ["gemini_cpu", "gemini_nvme"])
def test_nothing_moves_anywhere_when_one_gradient_is_not_finite(name, tmp_path):
    """Known before the first chunk is updated: weights, moments and step count stay."""
    strategy = Strategy.named(name, device="cpu", disk=str(tmp_path) if name == "gemini_nvme" else None)
    stream = strategy.prepare(Line())
    strategy.step(stream, [Rows(X)], lambda states, rows: (states.square().sum(), {}), lr=1.0)
    before = [state.clone() for state in stream.sink.saved_states()]
    assert not strategy.step(stream, [Rows(X)], lambda states, rows: (states.sum() * torch.nan, {}), lr=1.0).applied
    assert all(torch.equal(a, b) for a, b in zip(before, stream.sink.saved_states(), strict=True))
    assert stream.sink.steps == 1


def test_the_norm_is_global_over_dtypes():
    """Two chunks, one in fp32 and one in bf16: sqrt(8 * 1 + 2 * 16)."""
    net = Line()
    net.linear.weight = nn.Parameter(net.linear.weight.detach())
    net.linear.bias = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    stream = Strategy.named(device="cpu").prepare(net)
    assert len(stream.homes) == 2
    net.linear.weight.grad.fill_(1.0)
    net.linear.bias.grad.fill_(4.0)
    assert float(stream.sink.norm()) == pytest.approx(40**0.5)


def test_a_tied_weight_is_one_weight():
    class Tied(Line):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4, bias=False)
            self.again = nn.Linear(4, 4, bias=False)
            self.again.weight = self.linear.weight

        def groups(self):
            return [("line", ["linear.weight"])]

        def parts(self):
            return [Part(("line",), lambda x, context: torch.nn.functional.linear(self.linear(x), self.linear.weight))]

    strategy = Strategy.named("gemini_cpu", device="cpu")
    stream = strategy.prepare(Tied())
    assert [weight.name for weight in stream.sink.weights] == ["linear.weight"]
    assert strategy.step(stream, [Rows(X)], lambda states, rows: (states.square().sum(), {}), lr=1e-2).grad_norm > 0


def test_a_frozen_model_has_weights_and_nothing_else():
    strategy = Strategy.named("gemini_cpu", device="cpu")
    stream = strategy.prepare(Line().requires_grad_(False))
    assert stream.sink is None
    assert strategy.tiers["host"].used == sum(one.chunk.nbytes for one in stream.homes)


def test_a_host_budget_that_is_too_small_says_how_much_would_do():
    strategy = Strategy.named("gemini_cpu", device="cpu", host_memory="10kB")
    with pytest.raises(ResourceError, match=r"--host-memory 10\.00 kB: Line under --strategy gemini_cpu .* 32\.77 kB"):
        strategy.prepare(Line())
    assert strategy.tiers["host"].used == 0  # nothing was made
    strategy = Strategy.named("gemini_cpu", device="cpu", host_memory="32768B")
    strategy.prepare(Line())


def test_a_device_budget_that_is_too_small_says_how_much_would_do():
    strategy = Strategy.named("gemini_cpu", device="cpu", device_memory="10kB")
    stream = strategy.prepare(Line())
    with pytest.raises(ResourceError, match=r"--device-memory 10\.00 kB: .* at least 16\.38 kB"):
        strategy.evaluate(stream, [Rows(X)], lambda states, rows: None)


def test_models_share_one_buffer_of_gradients():
    strategy = Strategy.named("gemini_cpu", device="cpu")
    one = strategy.prepare(Line())
    used = strategy.tiers["host"].used
    strategy.prepare(Line())
    assert strategy.tiers["host"].used == 2 * used - sum(stored.chunk.nbytes for stored in one.homes)


def test_phases_switch_gradients_and_keep_time():
    strategy = Strategy.named(device="cpu")
    for phase, wanted in (("rollout", False), ("score", False), ("train", True)):
        with strategy.phase(phase):
            assert torch.is_grad_enabled() == wanted
    assert set(strategy.take_perf()) == {"timing/rollout_seconds", "timing/score_seconds", "timing/train_seconds"}
    assert strategy.take_perf() == {}


def test_what_tiers_have_held_is_told():
    strategy = Strategy.named("gemini_cpu", device="cpu")
    strategy.prepare(Line())
    told = strategy.take_perf()
    assert told == {f"perf/{name}_tier_bytes": tier.peak for name, tier in strategy.tiers.items() if tier.peak}
    assert told["perf/host_tier_bytes"] >= 4 * sum(p.numel() for p in Line().parameters())


def test_models_are_born_in_the_strategys_dtype():
    strategy = Strategy.named(dtype="bf16", device="cpu")
    with strategy.init():
        assert nn.Linear(2, 2).weight.dtype == torch.bfloat16
        assert nn.Linear(2, 2).weight.is_meta  # a recipe, until it is prepared
    assert nn.Linear(2, 2).weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("colossalai_zero2", "zero2"), ("colossalai_zero2_cpu", "zero2_cpu"), ("colossalai_gemini", "gemini"),
     ("colossalai_gemini_cuda", "gemini"), ("colossalai_gemini_cpu", "gemini_cpu"), ("ddp", "ddp")],
)  # fmt: skip
def test_the_references_names_mean_the_same_rows(theirs, ours):
    assert Strategy.named(theirs, device="cpu").name == ours


def test_a_disk_strategy_asks_for_a_disk(tmp_path):
    with pytest.raises(UserError, match="--disk PATH"):
        Strategy.named("gemini_nvme", device="cpu")
    assert Strategy.named("gemini_nvme", device="cpu", disk=f"{tmp_path}:1GB").tiers["disk"].budget == 10**9
    assert Strategy.named("gemini_nvme", device="cpu", disk=str(tmp_path)).tiers["disk"].budget is None


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(UserError, match="nearest: zero2"):
        Strategy.named("zero9")
    with pytest.raises(UserError, match=", ".join(NAMES)):
        Strategy.named("fastest")
    with pytest.raises(UserError, match="fp32 or bf16"):
        Strategy.named(dtype="fp8")


def test_naive_is_one_process(monkeypatch):
    monkeypatch.setattr(World, "join", staticmethod(lambda device: World(0, 2, torch.device("cpu"))))
    with pytest.raises(UserError, match="ddp"):
        Strategy.named("naive")


def test_shares_of_ranks_are_disjoint_and_cover_everything():
    items = list(range(11))
    shares = [World(rank, 3, torch.device("cpu")).share_of(items) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_a_collective_returns_at_once():
    world, x = World(0, 1, torch.device("cpu")), torch.ones(2)
    assert world.sum(x) is x
    assert world.max(x) is x
    assert world.gather("a") == ["a"]
    assert world.broadcast("a") == "a"
