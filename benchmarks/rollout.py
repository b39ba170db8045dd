"""The engine against transformers' `generate`: the same weights, in one process, in turns; medians.

    python -m benchmarks rollout [speed ragged samples int8 streamed] [--repeats 5]

GPT2-s shapes with random weights, bf16. `speed`: prompt 64, 128 new tokens, batch 1, 8 and 32, with the share of the
machine's floor; `ragged`: 64 prompts of 16 to 256 tokens with responses of 8 to 256, their ends forced by a fixed
table, against padded batches of 16; `samples`: 8 answers to one prompt of 256 tokens; `int8`: weight-only, batch 1.
`benchmarks gpu --only rollout` has the same on a card.
"""

import copy
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import transformers

from benchmarks import timing
from benchmarks.facts import run_measures
from benchmarks.peers.plain import gpt2
from penstock.kernels import cpu_ops
from penstock.memory.strategy import Strategy
from penstock.models import linear, presets, pretrained
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor
from penstock.models.surgery import quantise
from penstock.planner import footprint
from penstock.rollout.cache import KVCache
from penstock.rollout.engine import Engine, generate
from penstock.rollout.sampling import Sampling

PROMPT, NEW = 64, 128
EOS = 50256
GREEDY = Sampling(temperature=0.0, max_new_tokens=NEW)


def both() -> tuple[Decoder, Any]:
    """Ours and transformers', the same weights in bf16."""
    torch.manual_seed(0)
    decoder = Decoder(presets.named("s"), dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as directory:
        pretrained.save(decoder, directory)
        peer = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    return decoder, peer


def peer_answers(model: Any, prompts: torch.Tensor, new: int = NEW, cache: str | None = None) -> object:
    """transformers' greedy answers of `new` tokens each; cache: None (dynamic) or "static"."""
    return model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=new, min_new_tokens=new,
        pad_token_id=EOS, cache_implementation=cache,
    )  # fmt: skip


def speed(repeats: int = 5) -> dict[str, Any]:
    """Greedy, no EOS: both make the same number of tokens. transformers in fp32, which on processors without bf16
    instructions is its faster way, and in bf16, whose rate does not grow with the rows there: 8 of them take it five
    minutes, 32 twenty, so there it is timed once, and elsewhere in turns.
    """
    decoder, peer = both()
    wide = copy.deepcopy(peer).float()
    rows = {}
    for batch in (1, 8, 32):
        prompts = torch.randint(EOS, (batch, PROMPT))
        calls: timing.Calls = {
            "ours": lambda prompts=prompts: generate(decoder, prompts.tolist(), GREEDY, eos_ids=()),
            "transformers fp32": lambda prompts=prompts: peer_answers(wide, prompts),
        }
        narrow: timing.Calls = {
            f"transformers bf16, {cache or 'dynamic'} cache": lambda cache=cache, prompts=prompts: peer_answers(
                peer, prompts, cache=cache
            )
            for cache in ((None, "static") if batch == 1 else (None,))
        }
        if linear.slow_in_bf16("cpu"):
            seconds = timing.in_turns(calls, repeats)
            seconds |= {name: [timing.seconds_of(call)] for name, call in narrow.items()}
        else:
            seconds = timing.in_turns({**calls, **narrow}, repeats)
        rates = timing.rates(seconds, batch * NEW)
        floor = floor_of(decoder, batch)
        rows[batch] = {
            "tokens_per_second": rates,
            "ratio_to_bf16": rates["ours"] / max(rates[name] for name in narrow),
            "ratio_to_fp32": rates["ours"] / rates["transformers fp32"],
            "floor": floor, "share_of_floor": rates["ours"] / floor["tokens_per_second"],
            "runs": {name: len(times) for name, times in seconds.items()},
        }  # fmt: skip
        print(json.dumps({batch: rows[batch]}), flush=True)
    return {"batches": rows}


def on_gpu(device: str, tiny: bool) -> dict[str, Any]:
    """Greedy answers of 128 tokens to prompts of 64 against transformers' `generate`, bf16, batch 1 and 64; and the
    bytes of the KV cache against those of the plan."""
    rows: dict[str, Any] = {}
    for size in ("s",) if tiny else ("xl", "8b"):
        shape = dataclasses.replace(presets.named(size), num_layers=2) if tiny else presets.named(size)
        with torch.device(device):
            decoder = Decoder(shape, dtype=torch.bfloat16).requires_grad_(False)
            config = gpt2(torch.bfloat16, n_layer=shape.num_layers, n_embd=shape.d_model, n_head=shape.num_heads)
            peer = transformers.GPT2LMHeadModel(config).to(torch.bfloat16).eval()
        for batch in (1, 2) if tiny else (1, 64):
            rows[f"{size}, batch {batch}"] = on_gpu_row(decoder, peer, batch, device, tiny)
    return {"rows": rows}


def on_gpu_row(decoder: Decoder, peer: Any, batch: int, device: str, tiny: bool) -> dict[str, Any]:
    """One size and batch: tokens per second of every way, bytes of weights and cache."""
    prompt, new, repeats = (8, 4, 1) if tiny else (PROMPT, NEW, 2)
    prompts = torch.randint(10, 50000, (batch, prompt))
    on_device = prompts.to(device)

    def ours(fixed: bool) -> None:
        engine = Engine(decoder, eos_ids=(), rows=batch, length=prompt + new, fixed=fixed)
        engine.generate(prompts.tolist(), Sampling(temperature=0.0, max_new_tokens=new))

    calls: timing.Calls = {
        "ours": lambda: ours(True),
        "ours, launched one by one": lambda: ours(False),
        "transformers, dynamic cache": lambda: peer_answers(peer, on_device, new),
        "transformers, static cache": lambda: peer_answers(peer, on_device, new, "static"),
    }
    rates = timing.rates(timing.in_turns(calls, repeats, device), batch * new)
    before = torch.cuda.memory_allocated() if device != "cpu" else None
    cache = KVCache(decoder, batch, prompt + new)
    allocated = torch.cuda.memory_allocated() - before if before is not None else None
    del cache
    weights = sum(parameter.nbytes for parameter in decoder.parameters())
    planned = footprint.cache_of(decoder.config, "bfloat16", batch, prompt + new)
    return {
        "tokens_per_second": rates,
        "weights_bytes": weights,
        "weights_bytes_per_second": rates["ours"] / batch * weights,
        "cache_bytes": {"allocated": allocated, "planned": planned},
    }


def int8(repeats: int = 5) -> dict[str, Any]:
    """Weight-only int8 against our own bf16 and transformers' bf16, batch 1."""
    decoder, peer = both()
    packed = copy.deepcopy(decoder)
    quantise(packed)
    prompts = torch.randint(EOS, (1, PROMPT))
    calls: timing.Calls = {
        "int8": lambda: generate(packed, prompts.tolist(), GREEDY, eos_ids=()),
        "bf16": lambda: generate(decoder, prompts.tolist(), GREEDY, eos_ids=()),
        "transformers bf16": lambda: peer_answers(peer, prompts),
    }
    rates = timing.rates(timing.in_turns(calls, repeats), NEW)
    return {
        "tokens_per_second": rates,
        "ratio": rates["int8"] / rates["transformers bf16"],
        "ratio_to_bf16": rates["int8"] / rates["bf16"],
    }


def streamed(repeats: int = 5, layers: int = 12) -> dict[str, Any]:
    """gemini_cpu with a device budget of half the model against resident, batch 8: the same tokens, and the speed that
    the link (here a copy in memory by the same cores that compute) leaves."""
    shape = dataclasses.replace(presets.named("s"), num_layers=layers)
    prompts = torch.randint(EOS, (8, PROMPT)).tolist()
    greedy = Sampling(temperature=0.0, max_new_tokens=32)
    plain = Decoder(shape, dtype=torch.bfloat16)
    nbytes = sum(p.nbytes for p in plain.parameters())
    actor = Actor(copy.deepcopy(plain)).requires_grad_(False)
    strategy = Strategy.named("gemini_cpu", dtype="bf16", device="cpu", device_memory=str(nbytes // 2))
    strategy.reserve = 0
    strategy.prepare(actor)
    tokens = [
        [answer.response_ids for answer in generate(decoder, prompts, greedy, eos_ids=())]
        for decoder in (plain, actor.decoder)
    ]
    assert tokens[0] == tokens[1]
    before = strategy.tiers["host"].bytes_read
    generate(actor.decoder, prompts, greedy, eos_ids=())
    moved = (strategy.tiers["host"].bytes_read - before) / greedy.max_new_tokens
    seconds = timing.in_turns(
        {
            "streamed": lambda: generate(actor.decoder, prompts, greedy, eos_ids=()),
            "resident": lambda: generate(plain, prompts, greedy, eos_ids=()),
        },
        repeats,
    )
    link = copy_rate()
    rates = timing.rates(seconds, 8 * greedy.max_new_tokens)
    resident = statistics.median(seconds["resident"]) / greedy.max_new_tokens
    floor = 8 / (resident + moved / link)  # copy and computation share the cores: one after the other
    return {
        "same_tokens": True, "model_bytes": nbytes, "moved_bytes_per_step": moved, "link_bytes_per_second": link,
        "tokens_per_second": rates, "link_floor": 8 / (moved / link), "floor": floor,
        "share_of_floor": rates["streamed"] / floor, "ratio_to_resident": rates["streamed"] / rates["resident"],
    }  # fmt: skip


def copy_rate() -> float:
    """Bytes per second that a plain copy in memory reads."""
    source, target = torch.zeros(1 << 28, dtype=torch.uint8), torch.ones(1 << 28, dtype=torch.uint8)
    return len(source) / min(timing.in_turns({"copy": lambda: target.copy_(source)}, 9)["copy"])


def floor_of(decoder: Decoder, batch: int) -> dict[str, float]:
    """What no engine on this machine can pass: a step reads every weight once, at the bandwidth of a plain copy, and
    multiplies it with `batch` rows, at the best rate that torch (fp32 or bf16) or our product (bf16) reaches with so
    many."""
    weights = [p for p in decoder.parameters() if p.dim() == 2 and p is not decoder.embed.positions]
    nbytes, count = sum(p.nbytes for p in weights), sum(p.numel() for p in weights)
    x = torch.randn(batch, 3072).bfloat16()
    broad = x.float()
    wide = [torch.randn(768, 3072) for _ in range(16)]
    narrow = [weight.bfloat16() for weight in wide]
    flops = 2 * batch * 768 * 3072 * 16
    products: timing.Calls = {
        "own": lambda: [cpu_ops.product(x, weight) for weight in narrow],
        "torch": lambda: [torch.nn.functional.linear(broad, weight) for weight in wide],
    }
    if not linear.slow_in_bf16("cpu"):
        products["torch bf16"] = lambda: [torch.nn.functional.linear(x, weight) for weight in narrow]
    copied = 2 * copy_rate()
    gemm = flops / min(min(times) for times in timing.in_turns(products, 9).values())
    step = max(nbytes / copied, 2 * batch * count / gemm)
    return {
        "copy_bytes_per_second": copied, "gemm_flops": gemm, "weights_bytes": nbytes, "step_seconds": step,
        "tokens_per_second": batch / step,
    }  # fmt: skip


def ragged(repeats: int = 5) -> dict[str, Any]:
    """A table ends each answer of both. transformers in bf16 where the processor has instructions for
    it, else in fp32: in bf16 it would take an hour."""
    decoder, peer = both()
    slow = linear.slow_in_bf16("cpu")
    dtype, peer = ("fp32", peer.float()) if slow else ("bf16", peer)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(16, 257, (64,), generator=generator).tolist()
    news = torch.randint(8, 257, (64,), generator=generator).tolist()
    prompts = [torch.randint(EOS, (n,), generator=generator).tolist() for n in lengths]

    def ours() -> None:
        engine = Engine(decoder, eos_ids=(), rows=16, length=512)
        order = sorted(range(64), key=lambda i: lengths[i])  # the engine does not know when an answer ends
        answers = [engine.submit(prompts[i], Sampling(temperature=0.0, max_new_tokens=news[i])) for i in order]
        engine.run()
        assert [len(answer.response_ids) for (answer,) in answers] == [news[i] for i in order]

    class Table(transformers.LogitsProcessor):
        """EOS alone from the step that ends a row, never EOS before it."""

        def __init__(self, ends: list[int], width: int) -> None:
            self.ends, self.width = torch.tensor(ends), width

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            """scores [B, V]."""
            over = input_ids.shape[1] - self.width >= self.ends - 1
            scores[~over, EOS] = -torch.inf
            scores[over] = -torch.inf
            scores[over, EOS] = 0.0
            return scores

    def hf() -> None:
        for start in range(0, 64, 16):  # by arrival, padded on the left
            part, ends = prompts[start : start + 16], news[start : start + 16]
            width = max(map(len, part))
            ids = torch.full((16, width), EOS)
            mask = torch.zeros(16, width, dtype=torch.int64)
            for row, prompt in enumerate(part):
                ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
            peer.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=max(ends), pad_token_id=EOS,
                eos_token_id=EOS, logits_processor=[Table(ends, width)],
            )  # fmt: skip

    seconds = timing.in_turns({"ours": ours, f"transformers {dtype}": hf}, repeats)
    rates = timing.rates(seconds, sum(news))
    return {
        "tokens_per_second": rates, f"ratio_to_{dtype}": rates["ours"] / rates[f"transformers {dtype}"], "rows": 16,
        "seconds": seconds,
    }  # fmt: skip


def samples(repeats: int = 5) -> dict[str, Any]:
    """8 answers to one prompt of 256 tokens against 8 prompts of 256, 16 new tokens each, and both with 128."""
    decoder, _ = both()
    single = torch.randint(EOS, (256,)).tolist()
    eight = torch.randint(EOS, (8, 256)).tolist()
    read = {}

    def run(prompts: list[list[int]], n: int, new: int) -> None:
        engine = Engine(decoder, eos_ids=(), rows=8, length=256 + new)
        engine.generate(prompts, Sampling(n=n, max_new_tokens=new))
        read[n] = engine.prompts_read

    result: dict[str, Any] = {}
    for new in (16, 64, 128):
        calls = {"n=8": lambda new=new: run([single], 8, new), "8 prompts": lambda new=new: run(eight, 1, new)}
        medians = timing.medians(timing.in_turns(calls, repeats))
        result[f"{new} new"] = {"seconds": medians, "ratio": medians["8 prompts"] / medians["n=8"]}
    return {**result, "prompts_read": read}


def main(arguments: list[str]) -> int:
    """Writes rollout_NAME.json."""
    transformers.logging.set_verbosity_error()
    measures: dict[str, Callable[..., dict]] = {
        "speed": speed, "ragged": ragged, "samples": samples, "int8": int8, "streamed": streamed
    }  # fmt: skip
    return run_measures(arguments, __doc__, measures, "rollout", "transformers")
