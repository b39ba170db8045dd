"""Layouts: every weight once, in order, aligned, even."""

import hypothesis.strategies as st
from hypothesis import given

from penstock.memory.chunks import ALIGN, ITEMSIZE, Weight, even_runs, layout

WEIGHT = st.tuples(st.integers(1, 5000), st.sampled_from(["float32", "bfloat16"]), st.booleans())
WEIGHTS = st.lists(WEIGHT, min_size=1, max_size=12)
GROUPS = st.lists(WEIGHTS, min_size=1, max_size=5)


def named(groups):
    return [
        (f"g{i}", [Weight(f"g{i}.{j}", (numel,), dtype, trained) for j, (numel, dtype, trained) in enumerate(weights)])
        for i, weights in enumerate(groups)
    ]


@given(groups=GROUPS, world=st.integers(1, 5), max_numel=st.none() | st.integers(1, 9000))
def test_every_weight_lies_in_one_chunk_of_its_kind_without_overlap(groups, world, max_numel):
    groups = named(groups)
    chunks = layout(groups, world=world, max_numel=max_numel)
    found = [weight for chunk in chunks for weight in chunk.weights]
    assert sorted(weight.name for weight in found) == sorted(weight.name for _, weights in groups for weight in weights)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.group for chunk in chunks] == sorted(chunk.group for chunk in chunks)
    for chunk in chunks:
        assert {(weight.dtype, weight.trained) for weight in chunk.weights} == {(chunk.dtype, chunk.trained)}
        end = 0
        for weight, offset in zip(chunk.weights, chunk.offsets, strict=True):
            assert offset == end
            end += weight.numel
        assert end <= chunk.numel < end + world * ALIGN
        assert chunk.numel // world * ITEMSIZE[chunk.dtype] % 4096 == 0  # a shard is whole pages
        assert max_numel is None or end <= max_numel or len(chunk.weights) == 1


@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=12), capacity=st.integers(1, 900))
def test_runs_are_as_few_and_as_even_as_can_be(sizes, capacity):
    weights = [Weight(str(i), (numel,), "float32", True) for i, numel in enumerate(sizes)]
    runs = even_runs(weights, capacity)
    assert [weight for run in runs for weight in run] == weights
    fewest, longest = best(sizes, capacity)
    assert len(runs) == fewest
    assert max(sum(weight.numel for weight in run) for run in runs) == longest


def best(sizes, capacity):
    """By trying every way to cut: the fewest runs within the capacity, and of those the smallest longest one."""
    count = len(sizes)
    found = []
    for cuts in range(1 << (count - 1)):
        runs, start = [], 0
        for end in range(1, count + 1):
            if end == count or cuts >> (end - 1) & 1:
                runs.append(sizes[start:end])
                start = end
        if all(sum(run) <= capacity or len(run) == 1 for run in runs):
            found.append((len(runs), max(map(sum, runs))))
    return min(found)


def test_equal_blocks_give_equal_chunks():
    block = [(640, "bfloat16", True), (64, "bfloat16", True), (2560, "bfloat16", True)]
    chunks = layout(named([[(9999, "bfloat16", True)], block, block, block]), world=2)
    assert len({chunk.numel for chunk in chunks[1:]}) == 1
