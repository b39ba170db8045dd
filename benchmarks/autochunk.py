"""AutoChunk on one block: activation peak, seconds, the longest sequence and the largest difference, with and without.

    python -m benchmarks autochunk                            GPT2-XL, BLOOM-7b1 and Llama-7b blocks, as benchmarks say
    python -m benchmarks autochunk --quick                    the same on a thousand tokens, to see that it runs
    python -m benchmarks autochunk --frozen                   training through weights that do not learn, timed alone

Blocks are transformers' own, fp32, on one row of hidden states. Two ways of use: forward without gradients, and a
block that is recomputed (forward without gradients; then forward and backward), which is how penstock trains. The peak
is counted by autochunk.meter, on a GPU by its allocator: every tensor made inside, the output and the input's gradient
among them: each is as large as one state, `state_bytes`. Times are A B A B, medians. Sequences that this machine
cannot hold are counted on fake tensors.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import facts, timing
from penstock.autochunk.api import Slicer
from penstock.autochunk.execute import in_brief
from penstock.autochunk.meter import Meter
from penstock.autochunk.recompute import recomputing
from penstock.errors import ResourceError

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-xl": {"kind": "gpt2", "width": 1600, "heads": 25},
    "bloom-7b1": {"kind": "bloom", "width": 4096, "heads": 32},
    "llama-7b": {"kind": "llama", "width": 4096, "heads": 32, "inner": 11008},
}
Results = TypeVar("Results")
CUT = 0.8
"""The cut of the peak that is asked for first; where no plan reaches it, the least that one does is taken."""


def attentions(shape: dict[str, Any]) -> tuple[str, ...]:
    """The attentions that transformers has for this kind of block."""
    return ("eager",) if shape["kind"] == "bloom" else ("eager", "sdpa")


class Layer(nn.Module):
    """One layer of transformers, called with hidden states [1, T, D] alone."""

    def __init__(self, kind: str, width: int, heads: int, attention: str, inner: int = 0) -> None:
        super().__init__()
        self.kind, self.heads = kind, heads
        config: Any
        if kind == "gpt2":
            config = transformers.GPT2Config(
                n_embd=width, n_head=heads, n_layer=1, n_positions=64, bos_token_id=None, eos_token_id=None
            )
        elif kind == "bloom":
            config = transformers.BloomConfig(hidden_size=width, n_head=heads, n_layer=1)
        else:
            config = transformers.LlamaConfig(
                hidden_size=width, num_attention_heads=heads, num_hidden_layers=1, intermediate_size=inner
            )
        config.vocab_size = 8
        model: Any = transformers.AutoModel.from_config(config, attn_implementation=attention)
        self.layer = (model.layers if kind == "llama" else model.h)[0]
        self.rotary = model.rotary_emb if kind == "llama" else None
        self.eager = attention == "eager"
        self.eval()

    def inputs(self, length: int) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """What a layer is called with except the states: made once, and no activation of the layer's own."""
        if self.kind == "gpt2" and not self.eager:
            return {}
        # [1, 1, 1 or T, T]: transformers' eager attention is causal by a mask alone
        mask = torch.full((length, length), -1e9).triu_(1)[None, None] if self.eager else None
        if self.kind == "bloom":
            return {"alibi": torch.randn(self.heads, 1, length), "attention_mask": mask}  # type: ignore[dict-item]
        kwargs: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
        if self.kind == "llama":
            kwargs["position_embeddings"] = self.rotary(torch.zeros(1, 1, 1), torch.arange(length)[None])
        return kwargs

    def forward(self, x: Tensor, inputs: dict[str, Any]) -> Tensor:
        """x [1, T, D] -> [1, T, D]."""
        result = self.layer(x, **inputs)
        return result[0] if isinstance(result, tuple) else result


def step(call: Callable[[Tensor], Tensor], x: Tensor, slope: Tensor, training: bool) -> list[Tensor]:
    """One forward; in training a recomputed block: forward without gradients, then forward and backward."""
    with torch.no_grad():
        y = call(x)
    if not training:
        return [y]
    kept = y.sum()  # what follows a block has read its output; in the engine it is the next block's input
    del y
    leaf = x.detach().requires_grad_()
    with recomputing():
        again = call(leaf)
    again.backward(slope)
    assert leaf.grad is not None
    return [kept, leaf.grad]


def measure(
    name: str, attention: str, length: int, training: bool, repeats: int, device: str = "cpu", *, frozen: bool = False
) -> dict[str, Any]:
    """One row: peaks, seconds, difference. Without repeats the peaks alone. `frozen`: the layer's weights do not learn,
    and gradients pass through them alone."""
    torch.manual_seed(0)
    with torch.device(device):
        layer = Layer(**{**SHAPES[name], "attention": attention})
        for weight in layer.requires_grad_(not frozen).parameters():
            weight.grad = None if frozen else torch.zeros_like(weight)
        x, inputs = torch.randn(1, length, SHAPES[name]["width"]), layer.inputs(length)
        slope = torch.randn_like(x)

    def counted(call: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], int]:
        layer.zero_grad(set_to_none=frozen)
        results, peak = peak_of(lambda: step(call, x, slope, training), x.device)
        grads = [weight.grad.clone() for weight in layer.parameters() if weight.grad is not None]
        return [*results, *(grads if training else [])], peak

    plain, before = counted(lambda x: layer(x, inputs))
    began = time.perf_counter()
    slicer = slicer_for(layer, x, inputs, training, int(before * (1 - CUT)))
    planned = time.perf_counter() - began
    with contextlib.nullcontext() if repeats else in_brief():  # every slice holds what the first or last whole one does
        sliced, after = counted(lambda x: slicer.run(layer, x, inputs))
    row: dict[str, Any] = {"block": name, "attention": attention, "tokens": length, "training": training}
    row |= {"peak_before": before, "peak_after": after, "cut": 1 - after / before}
    row |= {"report": [str(report) for report in slicer.reports.values()], **({"frozen": True} if frozen else {})}
    if not repeats:
        return row
    errors = [float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in zip(plain, sliced, strict=True)]
    del plain, sliced
    calls = {
        "plain": lambda: step(lambda x: layer(x, inputs), x, slope, training),
        "sliced": lambda: step(lambda x: slicer.run(layer, x, inputs), x, slope, training),
    }
    seconds = timing.in_turns(calls, repeats, x.device, warm_ups=0)  # both have run already
    medians = timing.medians(seconds)
    return row | {
        "seconds": medians, "extra_time": medians["sliced"] / medians["plain"] - 1,
        "ratios": timing.ratios(seconds, "sliced", "plain"), "state_bytes": x.nbytes,
        "difference": max(errors), "seconds_to_plan": planned,
    }  # fmt: skip


def peak_of(call: Callable[[], Results], device: torch.device) -> tuple[Results, int]:
    """What it returns, and the most bytes that it added: by the allocator on a GPU."""
    if device.type == "cpu":
        with Meter() as meter:
            results = call()
        return results, meter.peak
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    return results, torch.cuda.max_memory_allocated() - before


def slicer_for(layer: Layer, x: Tensor, inputs: Any, training: bool, budget: int) -> Slicer:
    """Planned for the budget, or for the least that works."""
    for _ in range(3):
        slicer = Slicer(budget, recomputing=True)
        try:
            for grad in (False, True)[: 1 + training]:
                with torch.set_grad_enabled(grad):
                    slicer.plan_for(layer, (x.detach().requires_grad_(grad), inputs), {})
            return slicer
        except ResourceError:
            # 5 % above the least: the very least slices one token at a time, at twenty times the seconds
            budget = int(1.05 * max(report.after for report in slicer.reports.values()))
    raise AssertionError("the least that works does not")


def longest(name: str, attention: str, training: bool, budget: int) -> dict[str, Any]:
    """Tokens that fit the budget with and without, by doubling, on fake tensors."""
    reached = {}
    with FakeTensorMode():
        layer = Layer(**{**SHAPES[name], "attention": attention})
        for way in ("plain", "sliced"):
            length = fits = 256
            while length <= 1 << 18:
                inputs = layer.inputs(length)
                x = torch.empty(1, length, SHAPES[name]["width"], requires_grad=training)
                slicer = Slicer(budget if way == "sliced" else 1 << 60, recomputing=True)
                try:
                    with torch.set_grad_enabled(training):
                        slicer.plan_for(layer, (x, inputs), {})
                except ResourceError:
                    break
                if slicer.reports[slicer.latest].after > budget:
                    break
                fits, length = length, length * 2
            reached[way] = fits
    return {"block": name, "attention": attention, "training": training, "budget": budget, "tokens": reached,
            "times": reached["sliced"] / reached["plain"]}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Writes autochunk_BLOCK.json, row by row: planning for the longest sequences takes minutes."""
    parser = facts.flags(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*", default=list(SHAPES))
    parser.add_argument("--sdpa-tokens", type=int, default=8192)
    parser.add_argument("--eager-tokens", type=int, default=2048, help="what 5 GB hold of the square scores")
    parser.add_argument("--counted-tokens", type=int, nargs="*", default=[8192, 32768], help="without memory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timed", nargs="+", default=["forward", "training"], help="what is run on real tensors too")
    parser.add_argument("--frozen", action="store_true", help="weights that do not learn, as under adapters")
    parser.add_argument("--budget", type=int, default=1_000_000_000, help="bytes, for the longest sequence")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    for name in options.only:
        result: dict[str, list[dict[str, Any]]] = {"rows": [], "counted": [], "longest": []}
        for table, row in rows_of(name, options):
            result[table].append(row)
            if not options.quick:
                facts.write(f"autochunk_{name}{'_frozen' if options.frozen else ''}", result, "transformers")
            print(table, {key: value for key, value in row.items() if key not in ("report", "ratios")}, flush=True)
    return 0


def rows_of(name: str, options: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(table, row) of one block, as the flags ask for them."""
    for attention in attentions(SHAPES[name]):
        tokens = options.sdpa_tokens if attention == "sdpa" else options.eager_tokens
        if options.frozen:
            yield "rows", measure(name, attention, tokens, True, options.repeats, frozen=True)
            continue
        for training in (False, True):
            if ("training" if training else "forward") in options.timed:
                yield "rows", measure(name, attention, 512 if options.quick else tokens, training, options.repeats)
            yield "longest", longest(name, attention, training, options.budget)
            for length in options.counted_tokens:
                with FakeTensorMode(allow_non_fake_inputs=True):  # what this machine cannot hold
                    row = measure(name, attention, 1024 if options.quick else length, training, 0)
                yield "counted", row
