"""AutoChunk against the module that is not sliced: the same outputs and gradients, and bytes within the budget."""

import dataclasses
import re
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.autochunk.api import Chunked, autochunk
from penstock.autochunk.execute import compute, put, take
from penstock.autochunk.meter import Meter
from penstock.autochunk.recompute import recomputing
from penstock.autochunk.slice_rules import Blocked
from penstock.autochunk.trace import call, capture, filled, measured
from penstock.errors import ResourceError, UserError
from penstock.memory.strategy import Strategy
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor
from tests.planner.test_planning import BASE, FAMILIES

ROWS, LENGTH, WIDTH = 2, 61, 32


@dataclasses.dataclass
class Found:
    """What one forward (and backward) gave and took."""

    output: Tensor
    gradients: list[Tensor]
    peak: int


def run(f: Any, module: nn.Module, args: tuple[Any, ...], training: bool, places: bool = True) -> Found:
    """Calls f, which computes with the module's weights."""
    weights = list(module.parameters())
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if places and training else None
    args = tuple(x.detach().clone().requires_grad_(training) if isinstance(x, Tensor) else x for x in args)
    with torch.set_grad_enabled(training), Meter() as meter:
        result = f(*args)
        output = result[0] if isinstance(result, tuple) else result
        del result
        if training:
            with meter.on("given"):
                slopes = torch.linspace(-1, 1, output.numel()).cos().view(output.shape)
            output.backward(slopes)
    gradients = [x.grad for x in (*args, *weights) if isinstance(x, Tensor) and x.grad is not None]
    return Found(output.detach(), gradients, meter.peak)


def assert_same(found: Found, expected: Found) -> None:
    assert (found.output - expected.output).abs().max() <= 1e-5 * expected.output.abs().max()
    assert len(found.gradients) == len(expected.gradients)
    for got, wanted in zip(found.gradients, expected.gradients, strict=True):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=0.1)


def compare(module: nn.Module, args: tuple[Any, ...], training: bool, share: float) -> Chunked:
    """Under this share of the module's own peak."""
    expected = run(module, module, args, training)
    with torch.set_grad_enabled(training):
        sliced = autochunk(module, tuple(_like(x, training) for x in args), int(expected.peak * share))
    found = run(sliced, module, args, training)
    assert_same(found, expected)
    assert found.peak <= expected.peak * share
    assert sliced.report.before == pytest.approx(expected.peak, rel=0.01)
    assert 0.9 * sliced.report.after <= found.peak <= sliced.report.after
    return sliced


def _like(x: Any, training: bool) -> Any:
    return x.detach().clone().requires_grad_(training) if isinstance(x, Tensor) else x


def small(name: str) -> DecoderConfig:
    """A family's model whose weights are small beside its activations."""
    config = FAMILIES[name]
    turned = {"gpt_neox": 4}.get(name, 8) if config.rotary_dim else 0
    return dataclasses.replace(config, d_model=WIDTH, head_dim=8, d_ff=96, rotary_dim=turned)


class InBlock(nn.Module):
    """A block whose positions are there already."""

    def __init__(self, name: str, length: int) -> None:
        super().__init__()
        self.decoder = [Decoder(small(name), generator=torch.Generator().manual_seed(0))]
        self.block = self.decoder[0].blocks[0]
        self.positions = next(iter(self.decoder[0].begin(torch.zeros(1, length, dtype=torch.int64)).positions.values()))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, self.positions)


@pytest.mark.parametrize(
    ("name", "training"),
    [*((name, True) for name in FAMILIES if not FAMILIES[name].num_experts), ("llama", False), ("bloom", False)],
)
def test_every_familys_block_is_the_same_in_slices(name, training):
    x = torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    compare(InBlock(name, LENGTH), (x,), training, 0.55)


def layer(kind: str, attention: str) -> nn.Module:
    """A decoder layer of transformers, called with hidden states alone."""
    sizes = {"vocab_size": 64, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4}
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=64, n_embd=WIDTH, n_layer=1, n_head=4, n_positions=64, attn_implementation=attention,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return transformers.GPT2Model(config).eval().h[0]
    x = torch.zeros(ROWS, LENGTH, WIDTH)
    hidden = torch.full((LENGTH, LENGTH), -1e9).triu(1).expand(ROWS, 1, LENGTH, LENGTH)
    if kind == "bloom":
        config = transformers.BloomConfig(vocab_size=64, hidden_size=WIDTH, n_layer=1, n_head=4)
        alibi = torch.randn(ROWS * 4, 1, LENGTH)
        return Called(transformers.BloomModel(config).eval().h[0], {"alibi": alibi, "attention_mask": hidden})
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 128}
    config = transformers.LlamaConfig(**sizes, attn_implementation=attention)
    model = transformers.LlamaModel(config).eval()
    rotary = model.rotary_emb(x, torch.arange(LENGTH)[None])
    mask = {"attention_mask": hidden} if attention == "eager" else {}
    return Called(model.layers[0], {"position_embeddings": rotary, **mask})


class Called(nn.Module):
    """A layer and what it is called with beside the hidden states."""

    def __init__(self, layer: nn.Module, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.kwargs = layer, kwargs

    def forward(self, x: Tensor) -> Tensor:
        result = self.layer(x, **self.kwargs)
        return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize(
    ("kind", "attention", "training"),
    [("gpt2", "eager", True), ("gpt2", "sdpa", False), ("llama", "eager", True), ("llama", "sdpa", True),
     ("bloom", "eager", True), ("bloom", "eager", False)],
)  # fmt: skip
def test_layers_of_transformers_are_the_same_in_slices(kind, attention, training):
    torch.manual_seed(0)
    compare(layer(kind, attention), (torch.randn(ROWS, LENGTH, WIDTH),), training, 0.6)


def test_a_whole_model_of_transformers_is_sliced():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, use_cache=False, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(64, (ROWS, 60))
    with torch.no_grad():
        with Meter() as before:
            expected = model(tokens).logits
        sliced = autochunk(model, (tokens,), before.peak * 6 // 10)
        with Meter() as after:
            found = sliced(tokens).logits
    assert (found - expected).abs().max() <= 1e-5
    assert after.peak <= before.peak * 6 // 10


class Mlp(nn.Module):
    """A residual MLP behind a softmax over the tokens, which cannot be cut along them."""

    def __init__(self, width: int, mixing: bool) -> None:
        super().__init__()
        self.up, self.down, self.mixing = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), mixing

    def forward(self, x: Tensor) -> Tensor:
        if self.mixing:
            x = x + x.softmax(dim=1)
        return x + self.down(F.gelu(self.up(x)))


@settings(max_examples=6, deadline=None)
@given(
    rows=st.integers(1, 3), length=st.integers(2, 23), width=st.integers(1, 9), mixing=st.booleans(),
    training=st.booleans(), share=st.floats(0.1, 0.9), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_is_the_same_in_slices_or_the_least_is_named(rows, length, width, mixing, training, share, seed):
    torch.manual_seed(seed)
    module, x = Mlp(width, mixing), torch.randn(rows, length, width)
    expected = run(module, module, (x,), training)
    budget = int(expected.peak * share)
    try:
        with torch.set_grad_enabled(training):
            sliced = autochunk(module, (_like(x, training),), budget)
    except ResourceError as error:
        named = re.search("the least found for these shapes is [0-9.]+", str(error))
        sliced = None if named else pytest.fail(str(error))
    if sliced is None:
        return
    found = run(sliced, module, (x,), training)
    assert_same(found, expected)
    assert found.peak <= budget


class Attending(nn.Module):
    """A pre-norm block with torch's own attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@pytest.mark.parametrize("training", [False, True])
def test_heads_and_tokens_are_sliced_apart_where_one_region_is_not_enough(training):
    """Slices of tokens alone must hold all keys and values; slices of heads make their own, and tokens follow."""
    layer, x = Attending(width=16, heads=8), torch.randn(1, 512, 16)
    states = x.nbytes
    expected = run(layer, layer, (x,), training)
    with torch.set_grad_enabled(training):
        sliced = autochunk(layer, (_like(x, training),), int((8.5 if training else 3.5) * states))
    assert_same(run(sliced, layer, (x,), training), expected)
    assert len(sliced.report.regions) == 2


def test_the_least_that_works_is_named_and_works():
    module, x = Mlp(8, mixing=False), torch.randn(2, 32, 8)
    with (
        torch.no_grad(),
        pytest.raises(ResourceError, match=r"Mlp under a budget of 1\.00 kB: the least found") as error,
    ):
        autochunk(module, (x,), "1kB")
    number, unit = str(error.value).split("these shapes is ")[1].split()[:2]
    least = int(float(number) * {"kB": 1000, "MB": 10**6}[unit]) + 10  # as printed, rounded
    with torch.no_grad():
        sliced = autochunk(module, (x,), least)
    assert run(sliced, module, (x,), training=False).peak <= least


class Rolled(nn.Module):
    """An MLP behind an op that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp(8, mixing=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.roll(3, 1))


def test_an_op_that_cannot_be_sliced_is_left_whole_and_named():
    sliced = compare(Rolled(), (torch.randn(2, 32, 8),), False, 0.5)
    assert sliced.report.whole == ("roll (no rule for roll; 2.05 kB)",)
    text = str(sliced.report)
    assert "left whole: roll (no rule for roll; 2.05 kB)" in text
    assert "before |" in text
    assert "slices of" in text


def test_a_random_op_is_left_whole_and_named():
    module = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 8)).train()
    with torch.no_grad(), pytest.raises(ResourceError, match="draws random numbers"):
        autochunk(module, (torch.randn(2, 64, 8),), 4000)


def test_a_module_that_writes_in_place_is_left_whole_and_says_so():
    class Writing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y[:, 0].add_(1)
            return (y @ y.transpose(1, 2)).softmax(-1) @ y

    x = torch.randn(2, 32, 8)
    with pytest.raises(ResourceError, match=r"Left whole: everything \(add_ write in place\)"):
        autochunk(Writing(), (x,), 10_000)
    assert torch.equal(autochunk(Writing(), (x,), 10**9)(x), Writing()(x))


def test_a_module_that_cannot_be_exported_is_refused_with_the_reason():
    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(UserError, match="autochunk: Asking cannot be exported"):
        autochunk(Asking(), (torch.randn(3, 4),), 10)


def test_weights_that_are_replaced_are_seen():
    torch.manual_seed(0)
    module, other, x = Mlp(8, mixing=False), Mlp(8, mixing=False), torch.randn(2, 32, 8)
    sliced = autochunk(module, (_like(x, True),), 9000)
    assert sliced.report.regions
    expected = run(other, other, (x,), training=True)
    module.up, module.down = other.up, other.down
    assert_same(run(sliced, module, (x,), training=True), expected)


@pytest.mark.parametrize("place", [False, True])
def test_gradients_go_through_autograd_where_they_have_no_place(place):
    torch.manual_seed(0)
    module, x = InBlock("llama", LENGTH), torch.randn(ROWS, LENGTH, WIDTH)
    expected = run(module, module, (x,), training=True, places=False)
    sliced = autochunk(module, (_like(x, True),), int(expected.peak * 0.6), places=False)
    if place:  # where hooks wait, gradients are returned even so
        heard = []
        handles = [p.register_hook(lambda grad: heard.append(grad)) for p in module.parameters()]
        assert_same(run(sliced, module, (x,), training=True, places=True), expected)
        assert len(heard) == len(handles)
        for handle in handles:
            handle.remove()
    assert_same(run(sliced, module, (x,), training=True, places=False), expected)


def test_without_need_the_module_itself_is_called():
    module, x = Mlp(8, mixing=False), torch.randn(2, 32, 8)
    called = []
    module.register_forward_hook(lambda *_: called.append(1))
    for budget in (None, "1GB"):
        sliced = autochunk(module, (x,), budget)
        called.clear()
        sliced(x)
        assert called == [1]
    assert "left as it is" in str(sliced.report)


def test_other_shapes_are_planned_when_they_come():
    module = Mlp(8, mixing=False)
    with torch.no_grad():
        sliced = autochunk(module, (torch.randn(2, 16, 8),), 12000)
        for length in (16, 40, 41, 16):
            x = torch.randn(2, length, 8)
            assert torch.allclose(sliced(x), module(x), atol=1e-6)
        assert len(sliced.slicer.reports) == 3


def test_causal_slices_hold_no_square_mask():
    length = 1024
    config = dataclasses.replace(BASE, d_model=16, num_heads=1, num_kv_heads=1, head_dim=16, d_ff=16, max_length=length)
    decoder = Decoder(config, generator=torch.Generator().manual_seed(0))
    positions = decoder.begin(torch.zeros(1, length, dtype=torch.int64)).positions[0, False]
    x = torch.randn(1, length, 16)
    with torch.no_grad():
        expected = decoder.blocks[0](x, positions)
        sliced = autochunk(decoder.blocks[0], (x, positions), 320_000)
        with Meter() as meter:
            found = sliced(x, positions)
    assert (found - expected).abs().max() <= 1e-5
    assert meter.peak <= 320_000 < length * length


def test_where_only_gradients_are_asked_for_the_output_holds_nothing():
    torch.manual_seed(0)
    module, x = Mlp(8, mixing=False), torch.randn(2, 32, 8)
    expected = run(module, module, (x,), training=True)
    sliced = autochunk(module, (_like(x, True),), 9000)
    with recomputing():
        found = run(sliced, module, (x,), training=True)
        assert sliced(x.requires_grad_()).untyped_storage().nbytes() < 8
    for got, wanted in zip(found.gradients, expected.gradients, strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)


def test_the_engine_trains_the_same_within_an_activation_budget():
    tokens = torch.randint(512, (4, 48), generator=torch.Generator().manual_seed(2))

    class Batch:
        def __init__(self, tokens: Tensor) -> None:
            self.tokens = tokens

    def trained(budget: str | None) -> list[Tensor]:
        strategy = Strategy.named("gemini_cpu", device="cpu", recompute=True, activation_budget=budget)
        actor = Actor(Decoder(BASE, generator=torch.Generator().manual_seed(0)))
        stream = strategy.prepare(actor)
        for _ in range(2):
            batches = [Batch(tokens[:3]), Batch(tokens[3:])]
            strategy.step(stream, batches, lambda hidden, one: (hidden.square().sum() / 100, {}), lr=1e-4)
        slicer = actor.decoder.slicer
        assert (slicer is None) == (budget is None)
        assert slicer is None or any(report.regions for report in slicer.reports.values())
        with torch.no_grad():
            return [actor.decoder(tokens)]

    (expected,), (found,) = trained(None), trained("800kB")
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_plan_counts_what_the_engine_holds_in_slices():
    from penstock.commands.dry_run import dry_run
    from penstock.planner.workload import Setting, forecast_of
    from tests.planner.test_planning import one_model

    config = dataclasses.replace(FAMILIES["llama"], max_length=256)
    of = dataclasses.replace(one_model("reward", config, scalar=True), prompt_length=200, max_new_tokens=56)
    plain = forecast_of(Setting(of, "gemini_cpu", "fp32", recompute=True))
    sliced = Setting(of, "gemini_cpu", "fp32", activation_budget=6_000_000)
    planned, measured = forecast_of(sliced), dry_run(sliced)
    assert planned.peak["device"] < 0.7 * plain.peak["device"]
    assert 1.0 <= planned.peak["device"] / measured["device"] <= 1.15


class Ops(nn.Module):
    """One of most kinds of ops that the table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.table = nn.LayerNorm(12), nn.Linear(12, 24), nn.Embedding(7, 12)

    def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, ...]:  # x [2, 6, 12], index [2, 6]
        y = self.norm(x) + self.table(index)
        a, b = self.linear(y).mul(2).chunk(2, dim=-1)  # [2, 6, 12]
        heads = a.view(2, 6, 3, 4).transpose(1, 2)  # [2, 3, 6, 4]
        keys, values = b.unflatten(-1, (3, -1)).permute(0, 2, 1, 3), heads.flip(0).contiguous()
        scores = (heads @ keys.transpose(-1, -2) * 0.3).masked_fill(index[:, None, None] > 5, -1e9)
        mixed = scores.softmax(-1) @ values + F.scaled_dot_product_attention(heads, keys, values, is_causal=True)
        merged = mixed.transpose(1, 2).reshape(2, 6, 12).view(-1, 12)  # [12, 12]
        summed = torch.addmm(merged[0], merged, merged.t().contiguous()).view(2, 6, 12)
        flat = torch.baddbmm(summed[:, :1, :6], summed.reshape(2, 6, 12), y.transpose(1, 2)[:, :, :6])
        pieces = torch.cat([flat[..., 2:], flat[..., :2].neg()], dim=-1)
        stacked = torch.stack([pieces, pieces.relu()], dim=1).unbind(1)
        other = stacked[0].unsqueeze(1).expand(2, 5, 6, 6).mean(dim=1) + stacked[1].amax(-1, keepdim=True)
        return other.squeeze(), x.sum(dim=(0, 2)), F.rms_norm(x, (12,)).log_softmax(-1), x.select(1, 2).cumsum(-1)


def test_every_rule_says_what_a_slice_reads():
    """Each op of a graph, along each dimension that its rule allows: computed in slices it gives the whole result."""
    torch.manual_seed(0)
    module, args = Ops(), (torch.randn(2, 6, 12), torch.randint(7, (2, 6)))
    captured = capture(module, args, {})
    values: list[Any] = []
    for node in captured.nodes:
        leaf = captured.leaves.get(node.index)
        if leaf is None:
            values.append(call(node, filled(node.args, lambda ref: values[ref.index]), {}))
        elif leaf.kind == "argument":
            values.append(args[leaf.at])
        else:
            weight = module.get_parameter(leaf.at) if leaf.kind == "weight" else leaf.at
            values.append(weight.narrow(*leaf.part) if leaf.part else weight)
    graph, _ = measured(captured, [values[i] for i in captured.leaves], {}, training=False)
    tried, blocked = set(), set()
    from penstock.autochunk.slice_rules import Cut

    for node in graph.nodes:
        whole = values[node.index]
        if node.index in captured.leaves or not isinstance(whole, Tensor):
            continue
        for dim, extent in enumerate(whole.shape):
            if extent == 1:
                continue
            try:
                keys = graph.reads(node.index, Cut(dim, extent))
            except Blocked:
                blocked.add(node.op_name)
                continue
            if any(isinstance(values[index], tuple | list) for index, _ in keys):
                continue  # a piece of a list: the list is what is sliced
            out = torch.full_like(whole, -7)
            for start in range(0, extent, 4):
                length = min(4, extent - start)
                found = iter([values[i] if cut is None else take(values[i], cut, start, length) for i, cut in keys])
                arguments = filled(node.args, lambda ref, found=found: next(found))
                put(out, Cut(dim, extent), start, compute(node, arguments, Cut(dim, extent), start, length, {}))
            assert torch.allclose(out.double(), whole.double(), atol=1e-5), (node.name, dim)
            tried.add(node.op_name)
    assert len(tried) >= 25, tried
    assert {"softmax", "layer_norm", "flip", "roll"} - blocked == {"roll"}


def test_the_package_can_be_called_under_its_published_name():
    import penstock.autochunk.api  # importing a file of the folder must not hide the function

    module, x = Mlp(8, mixing=False), torch.randn(2, 32, 8)
    with torch.no_grad():
        sliced = penstock.autochunk(module, (x,), "6kB")
        assert isinstance(sliced, Chunked)
        assert torch.allclose(sliced(x), module(x), atol=1e-6)
