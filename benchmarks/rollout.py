"""The engine against transformers' `generate`: the same weights, in one process, in turns; medians.

    python -m benchmarks.rollout [speed ragged samples int8 streamed] [--repeats 5]

GPT2-s shapes with random weights, bf16. `speed`: prompt 64, 128 new tokens, batch 1, 8 and 32, with the share of the
machine's floor; `ragged`: 64 prompts of 16 to 256 tokens with responses of 8 to 256, their ends forced by a fixed
table, against padded batches of 16; `samples`: 8 answers to one prompt of 256 tokens; `int8`: weight-only, batch 1.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from benchmarks.engine import in_turns
from benchmarks.facts import write
from penstock.kernels import cpu_ops
from penstock.memory.strategy import Strategy
from penstock.models import linear, presets, pretrained
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor
from penstock.models.surgery import quantise
from penstock.rollout.engine import Engine, generate
from penstock.rollout.sampling import Sampling

PROMPT, NEW = 64, 128
EOS = 50256


def both() -> tuple[Decoder, Any]:
    """Ours and transformers', the same weights in bf16."""
    torch.manual_seed(0)
    decoder = Decoder(presets.named("s"), dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as directory:
        pretrained.save(decoder, directory)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    return decoder, theirs


def clocked(call: Callable[[], object]) -> float:
    """Seconds of one run, with nothing to warm up."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def rate(seconds: list[float], tokens: int) -> float:
    """Tokens per second, by the median."""
    return tokens / statistics.median(seconds)


def speed(repeats: int) -> dict[str, Any]:
    """Greedy, no EOS: both make the same number of tokens. transformers in fp32, which on processors without bf16
    instructions is its faster way, and in bf16, whose rate does not grow with the rows there: 8 of them take it five
    minutes, 32 twenty, so there it is timed once, and elsewhere in turns.
    """
    decoder, theirs = both()
    wide = copy.deepcopy(theirs).float()
    rows, caches = {}, {1: (None, "static"), 8: (None,), 32: (None,)}
    for batch in (1, 8, 32):
        prompts = torch.randint(EOS, (batch, PROMPT))
        asked = prompts.tolist()
        greedy = Sampling(temperature=0.0, max_new_tokens=NEW)

        def hf(model: Any, cache: str | None, prompts: torch.Tensor = prompts) -> object:
            return model.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=NEW,
                min_new_tokens=NEW, pad_token_id=EOS, cache_implementation=cache,
            )  # fmt: skip

        slow: dict[str, Callable[[], object]] = {
            f"transformers bf16, {cache or 'dynamic'} cache": lambda hf=hf, cache=cache: hf(theirs, cache)
            for cache in caches[batch]
        }
        once = linear.slow_in_bf16("cpu")
        seconds = in_turns(
            {
                "ours": lambda asked=asked, greedy=greedy: generate(decoder, asked, greedy, eos_ids=()),
                "transformers fp32": lambda hf=hf: hf(wide, None),
                **({} if once else slow),
            },
            repeats,
        )
        seconds |= {name: [clocked(call)] for name, call in slow.items() if once}
        rates = {name: rate(some, batch * NEW) for name, some in seconds.items()}
        floor = floor_of(decoder, batch)
        rows[batch] = {
            "tokens_per_second": rates,
            "ratio_to_bf16": rates["ours"] / max(rates[name] for name in slow),
            "ratio_to_fp32": rates["ours"] / rates["transformers fp32"],
            "floor": floor, "share_of_floor": rates["ours"] / floor["tokens_per_second"],
            "runs": {name: len(some) for name, some in seconds.items()},
        }  # fmt: skip
        print(json.dumps({batch: rows[batch]}), flush=True)
    return {"batches": rows}


def int8(repeats: int) -> dict[str, Any]:
    """Weight-only int8 against our own bf16 and transformers' bf16, batch 1."""
    decoder, theirs = both()
    small = copy.deepcopy(decoder)
    quantise(small)
    prompts = torch.randint(EOS, (1, PROMPT))
    greedy = Sampling(temperature=0.0, max_new_tokens=NEW)
    calls: dict[str, Callable[[], object]] = {
        "int8": lambda: generate(small, prompts.tolist(), greedy, eos_ids=()),
        "bf16": lambda: generate(decoder, prompts.tolist(), greedy, eos_ids=()),
        "transformers bf16": lambda: theirs.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW,
            pad_token_id=EOS,
        ),
    }  # fmt: skip
    rates = {name: rate(some, NEW) for name, some in in_turns(calls, repeats).items()}
    return {
        "tokens_per_second": rates, "ratio": rates["int8"] / rates["transformers bf16"],
        "ratio_to_bf16": rates["int8"] / rates["bf16"],
    }  # fmt: skip


def streamed(repeats: int, layers: int = 12) -> dict[str, Any]:
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
    kept = generate(plain, prompts, greedy, eos_ids=())
    assert [one.response_ids for one in generate(actor.decoder, prompts, greedy, eos_ids=())] == [
        one.response_ids for one in kept
    ]
    before = strategy.tiers["host"].bytes_read
    generate(actor.decoder, prompts, greedy, eos_ids=())
    moved = (strategy.tiers["host"].bytes_read - before) / greedy.max_new_tokens
    seconds = in_turns(
        {
            "streamed": lambda: generate(actor.decoder, prompts, greedy, eos_ids=()),
            "resident": lambda: generate(plain, prompts, greedy, eos_ids=()),
        },
        repeats,
    )
    source, target = torch.zeros(1 << 28, dtype=torch.uint8), torch.ones(1 << 28, dtype=torch.uint8)
    link = len(source) / min(in_turns({"copy": lambda: target.copy_(source)}, 9)["copy"])
    rates = {name: rate(some, 8 * greedy.max_new_tokens) for name, some in seconds.items()}
    resident = statistics.median(seconds["resident"]) / greedy.max_new_tokens
    floor = 8 / (resident + moved / link)  # copy and computation share the cores: one after the other
    return {
        "same_tokens": True, "model_bytes": nbytes, "moved_bytes_per_step": moved, "link_bytes_per_second": link,
        "tokens_per_second": rates, "link_floor": 8 / (moved / link), "floor": floor,
        "share_of_floor": rates["streamed"] / floor, "ratio_to_resident": rates["streamed"] / rates["resident"],
    }  # fmt: skip


def floor_of(decoder: Decoder, batch: int) -> dict[str, float]:
    """What no engine on this machine can pass: a step reads every weight once, at the bandwidth of a plain copy, and
    multiplies it with `batch` rows, at the best rate that torch (fp32 or bf16) or our product (bf16) reaches with so
    many."""
    weights = [p for p in decoder.parameters() if p.dim() == 2 and p is not decoder.embed.positions]
    nbytes, count = sum(p.nbytes for p in weights), sum(p.numel() for p in weights)
    source, target = torch.zeros(1 << 28, dtype=torch.uint8), torch.ones(1 << 28, dtype=torch.uint8)
    x = torch.randn(batch, 3072).bfloat16()
    broad = x.float()
    wide = [torch.randn(768, 3072) for _ in range(16)]
    narrow = [weight.bfloat16() for weight in wide]
    flops = 2 * batch * 768 * 3072 * 16

    def own() -> None:
        for weight in narrow:
            cpu_ops.product(x, weight)

    def torchs() -> None:
        for weight in wide:
            torch.nn.functional.linear(broad, weight)

    def torchs_bf16() -> None:
        for weight in narrow:
            torch.nn.functional.linear(x, weight)

    gemms = {"own": own, "torch": torchs} | ({} if linear.slow_in_bf16("cpu") else {"torch bf16": torchs_bf16})
    seconds = in_turns({"copy": lambda: target.copy_(source), **gemms}, 9)
    copy = 2 * len(source) / min(seconds["copy"])
    gemm = flops / min(min(seconds[name]) for name in gemms)
    step = max(nbytes / copy, 2 * batch * count / gemm)
    return {
        "copy_bytes_per_second": copy, "gemm_flops": gemm, "weights_bytes": nbytes, "step_seconds": step,
        "tokens_per_second": batch / step,
    }  # fmt: skip


def ragged(repeats: int) -> dict[str, Any]:
    """Both are told, by a table, when each answer ends. transformers in bf16 where the processor has instructions for
    it, else in fp32: in bf16 it would take an hour."""
    decoder, theirs = both()
    slow = linear.slow_in_bf16("cpu")
    dtype, theirs = ("fp32", theirs.float()) if slow else ("bf16", theirs)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(16, 257, (64,), generator=generator).tolist()
    news = torch.randint(8, 257, (64,), generator=generator).tolist()
    prompts = [torch.randint(EOS, (n,), generator=generator).tolist() for n in lengths]

    def ours() -> None:
        engine = Engine(decoder, eos_ids=(), rows=16, length=512)
        order = sorted(range(64), key=lambda i: lengths[i])  # when an answer will end nobody knows
        answers = [engine.submit(prompts[i], Sampling(temperature=0.0, max_new_tokens=news[i])) for i in order]
        engine.run()
        assert [len(one.response_ids) for (one,) in answers] == [news[i] for i in order]

    class Table(transformers.LogitsProcessor):
        """Nothing but EOS once a row's time has come, never EOS before."""

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
            theirs.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=max(ends), pad_token_id=EOS,
                eos_token_id=EOS, logits_processor=[Table(ends, width)],
            )  # fmt: skip

    seconds = in_turns({"ours": ours, f"transformers {dtype}": hf}, repeats)
    rates = {name: rate(some, sum(news)) for name, some in seconds.items()}
    return {
        "tokens_per_second": rates, f"ratio_to_{dtype}": rates["ours"] / rates[f"transformers {dtype}"], "rows": 16,
        "seconds": seconds,
    }  # fmt: skip


def samples(repeats: int) -> dict[str, Any]:
    """8 answers to one prompt of 256 tokens against 8 prompts of 256, 16 new tokens each, and both with 128."""
    decoder, _ = both()
    one = torch.randint(EOS, (256,)).tolist()
    eight = torch.randint(EOS, (8, 256)).tolist()
    read = {}

    def run(prompts: list[list[int]], n: int, new: int) -> None:
        engine = Engine(decoder, eos_ids=(), rows=8, length=256 + new)
        engine.generate(prompts, Sampling(n=n, max_new_tokens=new))
        read[n] = engine.prompts_read

    found: dict[str, Any] = {}
    for new in (16, 64, 128):
        calls = {"n=8": lambda new=new: run([one], 8, new), "8 prompts": lambda new=new: run(eight, 1, new)}
        seconds = in_turns(calls, repeats)
        medians = {name: statistics.median(some) for name, some in seconds.items()}
        found[f"{new} new"] = {"seconds": medians, "ratio": medians["8 prompts"] / medians["n=8"]}
    return {**found, "prompts_read": read}


CHECKS: dict[str, Callable[[int], dict[str, Any]]] = {
    "speed": speed, "ragged": ragged, "samples": samples,
    "int8": int8, "streamed": streamed,
}  # fmt: skip


def main() -> None:
    """Measures and writes rollout_NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(CHECKS))
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    transformers.logging.set_verbosity_error()
    for name in flags.what:
        found = CHECKS[name](flags.repeats)
        print(name, json.dumps(found, indent=1), flush=True)
        write(f"rollout_{name}", {"threads": torch.get_num_threads(), **found}, "transformers")


if __name__ == "__main__":
    main()
