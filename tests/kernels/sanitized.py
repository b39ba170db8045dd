"""Every C entry point on random shapes, strides and numbers: a script for processes of AddressSanitizer and UBSan.

    LD_PRELOAD=$(gcc -print-file-name=libasan.so) python -m tests.kernels.sanitized CALLS SEED MARCH

Arguments end where a page ends that nobody may read; what the functions allocate is watched by the sanitizer. Before
each call its case and seed are written to stderr, where a report follows. Prints the calls of each case as JSON.
"""

import collections
import ctypes
import json
import math
import mmap
import os
import random
import sys

import torch
from torch import Tensor

from penstock.kernels import compile as compiler
from penstock.kernels import cpu_ops
from penstock.memory.adamw import AdamW, states_of, sum_of_squares

FLAGS = ("-O0", "-g1", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC",
         "-fsanitize=address,undefined", "-fno-sanitize-recover=all")  # fmt: skip
FLOATS, BYTES = (torch.float32, torch.bfloat16), (torch.int8, torch.float8_e4m3fn)
ODD = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42, 3e38, -3e38)
PAGE = mmap.PAGESIZE


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros whose last byte is the last before a page that cannot be read."""
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes:
        return torch.zeros(shape, dtype=dtype)
    pages = -(-nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + pages * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=pages * PAGE - nbytes).view(shape)


def numbers(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers of some size; in every third tensor a few are odd."""
    values = guarded(shape, dtype)
    if dtype in BYTES:
        values.view(torch.int8).copy_(torch.randint(-128, 128, shape))
        return values
    values.copy_(torch.randn(shape) * 10 ** rng.uniform(-3, 3))
    if rng.random() < 1 / 3:
        for _ in range(3 if values.numel() else 0):
            values.view(-1)[rng.randrange(values.numel())] = rng.choice(ODD)
    return values


def optional(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    return numbers(rng, shape, dtype) if rng.random() < 0.5 else None


def product(rng: random.Random) -> None:
    rows, inputs, outputs = rng.choice((0, 1, 2, 3, 5, 17, 64, 70)), rng.randrange(1, 300), rng.randrange(0, 80)
    kind = rng.choice((*FLOATS, *BYTES))
    x, weight = numbers(rng, (rows, inputs), rng.choice(FLOATS)), numbers(rng, (outputs, inputs), kind)
    scales = numbers(rng, (outputs,), torch.float32) if kind in BYTES else None
    x = x[:, :: rng.choice((1, 2))]
    cpu_ops.product(x, weight[:, : x.shape[1]], optional(rng, (outputs,), rng.choice(FLOATS)), scales)


def attention(rng: random.Random) -> None:
    rows, groups, shared, room = rng.randrange(0, 5), rng.randrange(1, 4), rng.randrange(1, 4), rng.randrange(1, 200)
    width = rng.choice((1, 7, 8, 64, 80, 511, 512, 513, 1280, rng.randrange(1, 513)))
    heads, kind, x_kind = groups * shared, rng.choice(FLOATS), rng.choice(FLOATS)
    keys, values = (numbers(rng, (rows + 1, groups, room, width), kind)[:rows] for _ in range(2))
    qkv = numbers(rng, (rows, heads + 2 * groups, 1, width), x_kind).split((heads, groups, groups), dim=1)
    if rng.random() < 0.5:
        qkv = tuple(tensor.clone() for tensor in qkv)
    slots = guarded((rows,), torch.int64).copy_(torch.randint(0, room, (rows,)))
    wrong = width > 512
    if rows and rng.random() < 0.2:
        slots[rng.randrange(rows)], wrong = rng.choice((-1, room, 1 << 62, -(1 << 62))), True
    scores = cpu_ops.Scores(
        optional(rng, (heads,), torch.float32), rng.choice((0, 1, 5, 64, 1 << 62)), rng.choice((0.0, 0.3)),
        rng.choice((0.0, 0.0, 3.0)), optional(rng, (heads,), x_kind),
    )  # fmt: skip
    try:
        cpu_ops.attention(*qkv, (keys, values), slots, scores)
    except IndexError:
        assert wrong
    else:
        assert not wrong


def rms_norm(rng: random.Random) -> None:
    rows, heads, width = rng.randrange(0, 9), rng.randrange(1, 5), rng.randrange(1, 600)
    dtype, weight = rng.choice(FLOATS), numbers(rng, (width,), rng.choice(FLOATS))
    if rng.random() < 0.5:
        cpu_ops.rms_norm(numbers(rng, (rows, 1, width), dtype), weight, 1e-5, rng.choice((0.0, 1.0)))
    else:
        x = numbers(rng, (rows, 1, heads + 2, width), dtype).transpose(1, 2)[:, 1 : 1 + heads]
        cpu_ops.rms_norm(x, weight, 1e-5, spare=rng.random() < 0.5)


def rms_norm_back(rng: random.Random) -> None:
    rows, width, dtype = rng.randrange(0, 40), rng.randrange(1, 600), rng.choice(FLOATS)
    x, grad, weight = numbers(rng, (rows, width), dtype), numbers(rng, (rows, width), dtype), rng.choice(FLOATS)
    offset, learns = rng.choice((0.0, 1.0)), rng.random() < 0.5
    cpu_ops.rms_norm_back(x, numbers(rng, (width,), weight), grad, 1e-5, offset, learns)


def rotate(rng: random.Random) -> None:
    rows, heads, width, dtype = rng.randrange(1, 6), rng.randrange(1, 5), rng.randrange(2, 300), rng.choice(FLOATS)
    turned = rng.randrange(2, width + 1) // 2 * 2
    tables = numbers(rng, (2, rng.choice((1, rows)), 1, 1, turned), dtype)
    cpu_ops.rotate(numbers(rng, (rows, 1, heads + 1, width), dtype).transpose(1, 2)[:, 1:], *tables)


def gated(rng: random.Random) -> None:
    shape = rng.randrange(0, 5), 1, 2 * rng.choice((1, 9, 64, 515, 4097))
    cpu_ops.gated(numbers(rng, shape, rng.choice(FLOATS)), rng.choice(cpu_ops.GATES))


def gelu_tanh(rng: random.Random) -> None:
    x = numbers(rng, (rng.choice((0, 1, 15, 17, 4096, 9999)),), rng.choice(FLOATS)).requires_grad_()
    cpu_ops.gelu_tanh(x).backward(numbers(rng, tuple(x.shape), x.dtype))


def add(rng: random.Random) -> None:
    count = rng.choice((0, 1, 15, 17, 4096, 9999))
    cpu_ops.add(numbers(rng, (count,), torch.float32), numbers(rng, (count,), torch.bfloat16))


def choose(rng: random.Random) -> None:
    rows, vocabulary = rng.randrange(0, 5), rng.choice((1, 7, 16, 1023, 1024, 1025, 16385, rng.randrange(1, 30_000)))
    uniforms = guarded((rows,), torch.float32).copy_(torch.rand(rows))
    logits = numbers(rng, (rows, vocabulary), torch.float32)
    chosen = cpu_ops.choose(logits, uniforms, rng.choice((0.0, 1e-38, 0.5, 1.0, 1e38)))
    assert chosen is not None
    assert ((chosen[0] >= 0) & (chosen[0] < vocabulary)).all()


def adamw(rng: random.Random) -> None:
    bits, dtype = rng.choice((8, 32)), rng.choice(FLOATS)
    count = 256 * rng.randrange(1, 9) if bits == 8 else rng.randrange(1, 3000)
    states = {}
    for name, (kind, per) in states_of(dtype, bits).items():
        states[name] = guarded((count // per,), kind)
        if kind == torch.float32:
            states[name].copy_(numbers(rng, (count // per,), kind).abs())
    grads = numbers(rng, (count,), rng.choice((dtype, torch.float32)))
    weights = numbers(rng, (count,), dtype)
    for step in (1, 2):
        AdamW().update(weights, states, grads, lr=1e-3, scale=rng.choice((1.0, 0.1)), step=step)


def squares(rng: random.Random) -> None:
    sum_of_squares(numbers(rng, (rng.choice((1, 17, 1025, 65_536, 65_537)),), rng.choice(FLOATS)))


CASES = (product, attention, rms_norm, rms_norm_back, rotate, gated, gelu_tanh, add, choose, adamw, squares)


def main(calls: int, seed: int, march: str) -> None:
    """`calls` calls of each case."""
    compiler.FLAGS, compiler.SECONDS = (*FLAGS, f"-march={march}"), 600
    os.environ.pop("LD_PRELOAD", None)  # the compiler needs no watching
    done: collections.Counter[str] = collections.Counter()
    for i in range(calls):
        for case in CASES:
            print(case.__name__, seed + i, march, file=sys.stderr)
            torch.manual_seed(seed + i)
            torch.set_num_threads(1 + i % 2)
            case(random.Random(seed + i))
            done[case.__name__] += 1
    print(json.dumps(done))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
