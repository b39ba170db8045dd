"""Two versions of the source: how far bf16 gradients are from fp32's, by micro-batch.

    python -m benchmarks gradients OLD_CHECKOUT [NEW_CHECKOUT] [--rows 512]

The same rows as micro-batches of 1, 8, 64 and all rows, on small GPT-2 and Llama shapes whose weights are exact in
bf16, where weights stay (ddp) and where they stream (gemini_cpu). An error is |bf16 - fp32| / |fp32| of one weight's
gradient, both computed by that version; the largest one is shown. The new checkout is this one by default.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.facts import ROOT, commit_of, flags, write
from penstock.algorithms import functional as fn
from penstock.algorithms.sft import Rows, response_logprobs
from penstock.memory.strategy import DTYPES, Strategy, interleave
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor

GPT2 = DecoderConfig("gpt2", 512, d_model=128, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32, d_ff=512,
                     max_length=64)  # fmt: skip
LLAMA = dataclasses.replace(
    GPT2, family="llama", position="rotary", rotary_dim=32, norm="rms", activation="silu", gated=True, d_ff=320,
    qkv_bias=False, out_bias=False, mlp_bias=False, tied=False, num_kv_heads=2,
)  # fmt: skip
SHAPES = {"GPT-2": GPT2, "Llama": LLAMA}
LENGTH = 8


def gradients(shape: DecoderConfig, name: str, dtype: str, rows: int, micro: int) -> dict[str, torch.Tensor]:
    """By weight, fp64. Some tokens are far more frequent than others, as in text."""
    model = Actor(Decoder(shape, generator=torch.Generator().manual_seed(0)).bfloat16().to(DTYPES[dtype]))
    stream = Strategy.named(name, dtype=dtype, device="cpu").prepare(model)
    tokens = (torch.rand(rows, LENGTH, generator=torch.Generator().manual_seed(1)) ** 3 * shape.vocab_size).long()
    trained = (torch.arange(LENGTH) > 0).expand_as(tokens)
    batches = [Rows(*pair) for pair in zip(tokens.split(micro), trained.split(micro), strict=True)]
    assert stream.sink is not None
    stream.sink.clear()
    interleave([
        stream.backward(batches, lambda states, batch: (
            fn.sft_loss(response_logprobs(model, states, batch), int(trained.sum())), {}
        ))
    ])  # fmt: skip
    stream.sink.sum_over_ranks()
    return {
        weight.name: home.grads.tensor[offset : offset + weight.numel].double()  # type: ignore[union-attr]
        for home in stream.sink.homes
        for weight, offset in zip(home.chunk.weights, home.chunk.offsets, strict=True)
    }


def errors(rows: int) -> dict[str, dict]:
    """Of every shape, strategy and micro-batch: the largest error, its weight, and the median over weights."""
    result = {}
    for title, shape in SHAPES.items():
        exact = gradients(shape, "ddp", "fp32", rows, min(rows, 64))
        for name in ("ddp", "gemini_cpu"):
            for micro in (1, 8, 64, rows):
                rounded = gradients(shape, name, "bf16", rows, micro)
                error = {key: float((rounded[key] - exact[key]).norm() / exact[key].norm()) for key in exact}
                worst = max(error, key=error.__getitem__)
                median = sorted(error.values())[len(error) // 2]
                result[f"{title}, {name}, {micro}"] = {
                    "largest": error[worst], "weight": worst.removeprefix("decoder."), "median": median
                }  # fmt: skip
    return result


def main(arguments: list[str]) -> int:
    """Measures each version in a process of its own, which imports it."""
    parser = flags(__doc__)
    parser.add_argument("old", type=Path, help="a checkout of the version to compare with")
    parser.add_argument("new", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--rows", type=int, default=512)
    options = parser.parse_args(arguments)
    checkouts, sides = {"old": options.old, "new": options.new}, {}
    for name, checkout in checkouts.items():
        environment = {**os.environ, "PYTHONPATH": f"{checkout.resolve() / 'src'}:{ROOT}"}
        command = f"import json; from benchmarks.gradients import errors; print(json.dumps(errors({options.rows})))"
        printed = subprocess.run([sys.executable, "-c", command], env=environment, check=True, stdout=subprocess.PIPE)
        sides[name] = json.loads(printed.stdout)
    rows = {
        key: {"old": sides["old"][key]["largest"], "new": error["largest"], "old_weight": sides["old"][key]["weight"],
              "new_weight": error["weight"], "old_median": sides["old"][key]["median"], "new_median": error["median"]}
        for key, error in sides["new"].items()
    }  # fmt: skip
    print(json.dumps(rows, indent=1))
    commits = {name: commit_of(checkout) for name, checkout in checkouts.items()}
    write("gradients", {"commits": commits, "rows_of_tokens": options.rows, "rows": rows})
    return 0
