"""The plan of models whose layers are transformers' own, against what they take; see planner.measuring.foreign."""

import dataclasses
import tempfile

import pytest
import torch
import transformers

from penstock.autochunk.meter import Meter
from penstock.errors import UserError
from penstock.models.foreign.decoder import ForeignDecoder
from penstock.models.lora_targets import LoraSpec
from penstock.planner import footprint
from penstock.planner.activations import Batch, Work, activations_of
from penstock.planner.from_flags import config_of
from penstock.planner.measuring import foreign
from penstock.planner.workload import Setting, forecast_of, notes, passes
from penstock.rollout.engine import Engine
from penstock.rollout.sampling import Sampling
from tests.models.foreign_architectures import ALL, SMALL
from tests.planner.test_planning import assert_near, dry, forecast, on_one_base, one_model, plan_of, real, work

WIDE = {"hidden_size": 128, "n_embd": 128, "intermediate_size": 384, "vocab_size": 1000, "num_key_value_heads": 4}
LONG = {"max_position_embeddings": 256, "n_positions": 256}
KINDS = ("gptj", "mamba", "qwen3_5_text")


def shape(model_type, **changes):
    """So large that bytes outweigh what the plan keeps free for trifles."""
    layers = {"num_hidden_layers": 4 if model_type.startswith("qwen3_5") else 2}
    kind = SMALL | ALL[model_type] | (WIDE if model_type in KINDS else {}) | LONG | layers | changes
    with tempfile.TemporaryDirectory() as directory:
        transformers.AutoConfig.for_model(model_type, **kind).save_pretrained(directory)
        return config_of(directory, "--model")


def tokens(model_type):
    """A selective scan goes through them in turn, slowly, and holds much of each."""
    return {"prompt_length": 8 if model_type == "mamba" else 40, "max_new_tokens": 12}


def sft(model_type):
    return dataclasses.replace(one_model("sft", shape(model_type)), **tokens(model_type))


def ppo(model_type):
    return work(shape(model_type), **tokens(model_type))


@pytest.mark.parametrize("strategy", ["ddp", "gemini_cpu"])
@pytest.mark.parametrize("of", [sft, ppo])
@pytest.mark.parametrize("model_type", KINDS)
def test_what_their_layers_hold_is_foretold(model_type, of, strategy, tmp_path):
    workload = of(model_type)
    assert_near(forecast(workload, strategy), real(workload, strategy, tmp_path))


@pytest.mark.parametrize("strategy", ["ddp", "gemini_cpu"])
def test_with_adapters_on_one_base_too(strategy, tmp_path):
    of = on_one_base(ppo("gptj"), LoraSpec(4))
    assert_near(forecast(of, strategy), real(of, strategy, tmp_path))


@pytest.mark.parametrize(("model_type", "of"), [("gptj", ppo), ("deepseek_v3", sft)])
def test_a_dry_run_of_them_takes_what_the_real_one_takes(model_type, of, tmp_path):
    """The second has experts, and a buffer in its files, which does not learn."""
    of = dataclasses.replace(of(model_type), batch_size=4, mini_batch_size=4, max_new_tokens=5)
    pretended, measured = dry(of, "gemini_cpu"), real(of, "gemini_cpu", tmp_path)
    assert pretended["traffic"] == measured["traffic"]
    for tier in ("device", "host"):
        assert pretended[tier] == pytest.approx(measured[tier], rel=0.01), tier


@pytest.mark.parametrize("model_type", KINDS)
def test_text_in_step_holds_what_the_plan_says(model_type):
    """Prompts, the first steps with their check, and a cache that grows to the end of the rows."""
    of = work(shape(model_type), prompt_length=12, max_new_tokens=12)
    (planned,) = passes(Setting(of, "gemini_cpu", "fp32"))["rollout"]
    decoder = ForeignDecoder(of.roles[0].config, device="cpu", generator=torch.Generator().manual_seed(0))
    engine = Engine(decoder, eos_ids=(), rows=8, length=of.length)
    for row in range(8):
        engine.submit([row + 1] * of.prompt_length, Sampling(max_new_tokens=12))
    with Meter() as meter:
        while engine.busy:
            engine.step()
    assert meter.peak <= 1.01 * activations_of([(planned, True)], None) <= 1.15 * meter.peak
    if model_type == "gptj":
        assert planned.cache_bytes == footprint.cache_of(decoder.config, "float32", 8, of.length - 1)


def test_long_rows_of_a_scan_are_planned_from_short_ones(monkeypatch):
    model = foreign.Model(shape("mamba"), "float32", None, None, trained=True)
    whole = foreign.measured(model, Batch(2, 32, 64), Work((), 0, 0, 0))
    monkeypatch.setattr(foreign, "LONG", 16)
    line = foreign.measured(model, Batch(2, 32, 64), Work((), 0, 0, 0))
    for expected, part in zip(whole.parts, line.parts, strict=True):
        assert part.saved == pytest.approx(expected.saved, rel=0.01)
        assert part.backward == pytest.approx(expected.backward, rel=0.01)


def test_what_does_not_run_without_memory_is_planned_by_the_formula_and_said(capsys, tmp_path):
    transformers.AutoConfig.for_model("jetmoe", **SMALL | LONG).save_pretrained(tmp_path)
    config = config_of(str(tmp_path), "--model")
    (note,) = notes(Setting(one_model("sft", config), "ddp", "fp32"))
    assert note.startswith("jetmoe: its layers are transformers' own and do not run on tensors without memory (Runtime")
    of = ["--model", str(tmp_path), "--stage", "sft", "--dtype", "fp32"]
    small = ["--batch-size", "8", "--micro-batch-size", "4", "--prompt-length", "40", "--max-new-tokens", "24"]
    assert note in plan_of(capsys, *of, *small, "--strategy", "ddp")[1].splitlines()


def test_the_plan_refuses_slices_as_the_run_does():
    budgets = {"device": None, "host": None, "disk": None}
    with pytest.raises(UserError, match="--activation-budget: the layers of gptj are transformers' own"):
        forecast_of(Setting(sft("gptj"), "ddp", "fp32", 1, budgets, activation_budget=10**6))
