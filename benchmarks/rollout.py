"""The engine against transformers' `generate`: the same weights, in one process, in turns; medians.

    python -m benchmarks rollout [speed ragged samples int8 families] [--repeats 5]

GPT2-s shapes with random weights, bf16. `speed`: prompt 64, 128 new tokens, batch 1, 8 and 32, with the share of the
machine's floor; `ragged`: 64 prompts of 16 to 256 tokens with responses of 8 to 256, their ends forced by a fixed
table, against padded batches of 16; `samples`: 8 answers to one prompt of 256 tokens; `int8`: weight-only, batch 1, and
what --rollout-dtype answers with;
`families`: as `speed`, a small shape of each family.
`benchmarks gpu --only rollout` has the same on a card.
"""

import copy
import dataclasses
import tempfile
from functools import partial
from typing import Any

import torch
import transformers

from benchmarks import timing
from benchmarks.facts import run_measures
from benchmarks.peers.plain import gpt2
from penstock.commands.bench.micro import copies
from penstock.kernels import cpu_ops
from penstock.models import linear, presets, pretrained
from penstock.models.decoder import Decoder
from penstock.models.surgery import packed_copy, quantise
from penstock.models.weight_shapes import BaseDtype
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
        peer = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    return decoder, peer


def answers(decoder: Decoder, prompts: torch.Tensor) -> object:
    """Our greedy answers."""
    return generate(decoder, prompts.tolist(), Sampling(temperature=0.0, max_new_tokens=NEW), eos_ids=())


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
            "ours": partial(answers, decoder, prompts), "transformers fp32": partial(peer_answers, wide, prompts)
        }  # fmt: skip
        narrow: timing.Calls = {
            f"transformers bf16, {cache or 'dynamic'} cache": partial(peer_answers, peer, prompts, cache=cache)
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
    return {"batches": rows}


SMALL = {
    "vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 1024,
    "tie_word_embeddings": True, "sliding_window": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 512, "decoder_sparse_step": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {}, "gemma2": {"query_pre_attn_scalar": 64}, "gemma3_text": {"query_pre_attn_scalar": 64},
    "granite": {"attention_multiplier": 0.125, "residual_multiplier": 0.22}, "smollm3": {}, "mistral": {},
    "ministral": {}, "qwen2": {}, "phi3": {}, "olmo2": {}, "olmo3": {}, "gpt2": {"n_inner": 3072},
    "opt": {"ffn_dim": 3072, "word_embed_proj_dim": 768}, "bloom": {}, "gpt_neox": {"intermediate_size": 3072},
    "qwen3_moe": {**EXPERTS, "num_experts": 8}, "mixtral": {"num_local_experts": 4, "intermediate_size": 1024},
    "gpt_oss": {"num_local_experts": 4, "intermediate_size": 768},
}  # fmt: skip
"""What differs from SMALL in each family's small shape."""


def families(repeats: int = 5, only: str = "") -> dict[str, Any]:
    """Each family's small shape against transformers, bf16 where the processor has instructions for it, else fp32;
    `only`: these alone, llama,qwen3."""
    dtype = torch.float32 if linear.slow_in_bf16("cpu") else torch.bfloat16
    rows: dict[str, Any] = {}
    for family, changes in FAMILIES.items():
        if only and family not in only.split(","):
            continue
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **(SMALL | changes))
        peer = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
        with tempfile.TemporaryDirectory() as directory:
            peer.save_pretrained(directory)
            decoder = pretrained.load(directory, dtype=dtype)[0].requires_grad_(False)
        rows[family] = {}
        for batch in (1, 8, 32):
            prompts = torch.randint(3, 32_000, (batch, PROMPT))
            seconds = timing.in_turns(
                {"ours": partial(answers, decoder, prompts), "transformers": partial(peer_answers, peer, prompts)},
                repeats,
            )
            rows[family][batch] = {
                "tokens_per_second": timing.rates(seconds, batch * NEW),
                "ratio": timing.ratio(seconds, "transformers", "ours"),
            }
            print(family, batch, rows[family][batch], flush=True)
    return {"dtype": str(dtype), "families": rows}


def copies_of(decoder: Decoder, *kinds: BaseDtype) -> dict[str, Decoder]:
    """What --rollout-dtype answers with."""
    return {f"blocks in {kind}": packed_copy(decoder, kind) for kind in kinds}


def on_gpu(device: str, tiny: bool) -> dict[str, Any]:
    """Greedy answers of 128 tokens to prompts of 64 against transformers' `generate`, bf16, batch 1 and 64; the 8B
    model's also by copies whose blocks are packed."""
    prompt, new = (8, 4) if tiny else (PROMPT, NEW)
    rows: dict[str, Any] = {}
    for size in ("s",) if tiny else ("xl", "8b"):
        shape = dataclasses.replace(presets.named(size), num_layers=2) if tiny else presets.named(size)
        with torch.device(device):
            decoder = Decoder(shape, dtype=torch.bfloat16).requires_grad_(False)
            config = gpt2(torch.bfloat16, n_layer=shape.num_layers, n_embd=shape.d_model, n_head=shape.num_heads)
            peer = transformers.GPT2LMHeadModel(config).to(torch.bfloat16).eval()
        copies = copies_of(decoder, "int8", "fp8") if size != "xl" else {}
        for batch in (1, 2) if tiny else (1, 64):
            prompts = torch.randint(10, 50000, (batch, prompt))

            def ours(fixed: bool, decoder: Decoder = decoder, prompts: torch.Tensor = prompts) -> None:
                engine = Engine(decoder, eos_ids=(), rows=len(prompts), length=prompt + new, fixed=fixed)
                engine.generate(prompts.tolist(), Sampling(temperature=0.0, max_new_tokens=new))

            calls: timing.Calls = {
                "ours": partial(ours, True),
                "ours, launched one by one": partial(ours, False),
                **{f"ours, {name}": partial(ours, True, each) for name, each in copies.items()},
                "transformers, dynamic cache": partial(peer_answers, peer, prompts.to(device), new),
                "transformers, static cache": partial(peer_answers, peer, prompts.to(device), new, "static"),
            }
            rates = timing.rates(timing.in_turns(calls, 2, device), batch * new)
            read = rates["ours"] / batch * sum(parameter.nbytes for parameter in decoder.parameters())
            rows[f"{size}, batch {batch}"] = {"tokens_per_second": rates, "weights_bytes_per_second": read}
    return {"rows": rows}


def int8(repeats: int = 5) -> dict[str, Any]:
    """Weight-only int8 against our own bf16 and transformers' bf16, batch 1."""
    decoder, peer = both()
    packed = copy.deepcopy(decoder)
    quantise(packed)
    prompts = torch.randint(EOS, (1, PROMPT))
    calls: timing.Calls = {
        "int8": partial(answers, packed, prompts), "bf16": partial(answers, decoder, prompts),
        **{name: partial(answers, each, prompts) for name, each in copies_of(decoder, "int8", "fp8", "nf4").items()},
        "transformers bf16": partial(peer_answers, peer, prompts),
    }  # fmt: skip
    rates = timing.rates(timing.in_turns(calls, repeats), NEW)
    ratio, ratio_to_bf16 = (rates["int8"] / rates[name] for name in ("transformers bf16", "bf16"))
    return {"tokens_per_second": rates, "ratio": ratio, "ratio_to_bf16": ratio_to_bf16}


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
    products: timing.Calls = {
        "own": lambda: [cpu_ops.product(x, weight) for weight in narrow],
        "torch": lambda: [torch.nn.functional.linear(broad, weight) for weight in wide],
    }
    if not linear.slow_in_bf16("cpu"):
        products["torch bf16"] = lambda: [torch.nn.functional.linear(x, weight) for weight in narrow]
    fastest = min(min(times) for times in timing.in_turns(products, 9).values())
    copied, gemm = copies(torch.device("cpu"), 9, False)["copy"], 2 * batch * 768 * 3072 * 16 / fastest
    step = max(nbytes / copied, 2 * batch * count / gemm)
    return {
        "copy_bytes_per_second": copied, "gemm_flops": gemm, "weights_bytes": nbytes, "step_seconds": step,
        "tokens_per_second": batch / step,
    }  # fmt: skip


class Ends(transformers.LogitsProcessor):
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


def ragged(repeats: int = 5) -> dict[str, Any]:
    """A table ends each answer of both. transformers in bf16 where the processor has instructions for
    it, else in fp32: in bf16 it would take an hour."""
    decoder, peer = both()
    dtype, peer = ("fp32", peer.float()) if linear.slow_in_bf16("cpu") else ("bf16", peer)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(16, 257, (64,), generator=generator).tolist()
    news = torch.randint(8, 257, (64,), generator=generator).tolist()
    prompts = [torch.randint(EOS, (n,), generator=generator).tolist() for n in lengths]

    def ours() -> None:
        engine = Engine(decoder, eos_ids=(), rows=16, length=512)
        order = sorted(range(64), key=lambda i: lengths[i])  # the engine does not know when an answer ends
        made = [engine.submit(prompts[i], Sampling(temperature=0.0, max_new_tokens=news[i])) for i in order]
        engine.run()
        assert [len(answer.response_ids) for (answer,) in made] == [news[i] for i in order]

    def hf() -> None:
        for start in range(0, 64, 16):  # by arrival, padded on the left
            part, ends = prompts[start : start + 16], news[start : start + 16]
            width = max(map(len, part))
            ids = torch.tensor([[EOS] * (width - len(prompt)) + prompt for prompt in part])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part])
            peer.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=max(ends), pad_token_id=EOS,
                eos_token_id=EOS, logits_processor=[Ends(ends, width)],
            )  # fmt: skip

    seconds = timing.in_turns({"ours": ours, f"transformers {dtype}": hf}, repeats)
    rates = timing.rates(seconds, sum(news))
    ratio = rates["ours"] / rates[f"transformers {dtype}"]
    return {"tokens_per_second": rates, f"ratio_to_{dtype}": ratio, "rows": 16, "seconds": seconds}


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
        calls = {"n=8": partial(run, [single], 8, new), "8 prompts": partial(run, eight, 1, new)}
        medians = timing.medians(timing.in_turns(calls, repeats))
        result[f"{new} new"] = {"seconds": medians, "ratio": medians["8 prompts"] / medians["n=8"]}
    return {**result, "prompts_read": read}


def main(arguments: list[str]) -> int:
    """Writes rollout_NAME.json."""
    transformers.logging.set_verbosity_error()
    measures = {"speed": speed, "ragged": ragged, "samples": samples, "int8": int8, "families": families}
    return run_measures(arguments, __doc__, measures, "rollout", "transformers")
