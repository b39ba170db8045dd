"""The counts of operations against what torch counts of the real thing, and the published formula by hand."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from penstock.commands.bench import count
from penstock.models import presets, weight_shapes
from penstock.models.decoder import Decoder
from penstock.planner import footprint
from tests.conftest import TINY

ROWS = count.Rows(3, 7, 5)
WIDE = dataclasses.replace(TINY, d_model=64, head_dim=32, d_ff=256)


def counted(call):
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def test_reading_whole_rows_is_what_torch_counts_but_for_unseen_keys():
    decoder = Decoder(WIDE)
    tokens = torch.randint(16, (1, ROWS.length))
    with torch.no_grad():
        blocks = counted(lambda: decoder(tokens))
    attention = count.attention_flops(WIDE, ROWS.length)
    square = attention * 2 * ROWS.length / (ROWS.length + 1)  # torch's kernel computes the upper triangle too
    assert footprint.flops_of(WIDE, [(ROWS.length, ROWS.length)]) - attention + square == blocks


def test_training_is_three_forwards_and_recomputing_a_fourth_of_the_blocks():
    forward = ROWS.count * 2 * footprint.flops_of(WIDE, [(ROWS.length, ROWS.length)])
    head = ROWS.count * footprint.head_flops(WIDE, ROWS.new)
    once = count.train_flops(WIDE, ROWS, recompute=False)
    assert once == pytest.approx(3 * forward + 3 * head)
    assert count.train_flops(WIDE, ROWS, recompute=True) == pytest.approx(once + forward)


def test_an_adapter_saves_the_gradients_of_frozen_weights():
    frozen = count.train_flops(WIDE, ROWS, recompute=False, lora_rank=2)
    full = count.train_flops(WIDE, ROWS, recompute=False)
    adapters = ROWS.count * 2 * 3 * count.adapter_flops(WIDE, ROWS.length, 2)
    whole = footprint.flops_of(WIDE, [(ROWS.length, ROWS.length)])
    linear = ROWS.count * 2 * (whole - count.attention_flops(WIDE, ROWS.length))
    assert full - frozen == pytest.approx(linear + ROWS.count * footprint.head_flops(WIDE, ROWS.new) - adapters)
    places = (64 + 192) + (64 + 64) + (64 + 256) + (256 + 64)  # qkv as one, out, up, down
    assert count.adapter_flops(WIDE, 1, 2) == 2 * 2 * places * WIDE.num_layers


def test_a_cached_rollout_is_one_pass_over_every_token_but_the_last():
    whole = footprint.flops_of(WIDE, [(ROWS.length - 1, ROWS.length - 1)]) + footprint.head_flops(WIDE, ROWS.new)
    assert count.rollout_flops(WIDE, ROWS) == pytest.approx(ROWS.count * whole)


def test_the_published_formula_counts_a_rollout_as_if_there_were_no_cache():
    """400 + 112 tokens, 8 rows: about twenty times what is computed."""
    rows, shape = count.Rows(8, 400, 112), presets.named("s")
    parameters = dict.fromkeys(("actor", "critic", "reference", "reward"), 1000)
    per_row = 2 * 1000 * (400 + 401 + 510 + 511) / 4 * 112 + 4 * 2 * 1000 * 512
    assert count.published_experience_flops(parameters, rows) == 8 * per_row
    assert count.published_train_flops(parameters, rows) == 8 * 512 * 2 * 3 * 2000
    real = {name: weight_shapes.count_of(shape, scalar=False) for name in parameters}
    honest = count.rollout_flops(shape, rows) + count.score_flops(shape, rows)
    assert 10 < count.published_experience_flops(real, rows) / honest < 30
