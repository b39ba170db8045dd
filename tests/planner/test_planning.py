"""The plan against the engine: names and shapes, bytes on real tensors and on pretended ones, and the command."""

import dataclasses
import json
import re
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from penstock.algorithms.config import DistillConfig, DPOConfig, GRPOConfig, KTOConfig
from penstock.autochunk.meter import Meter
from penstock.cli import main
from penstock.commands.dry_run import dry_run, iterate, models_of
from penstock.commands.plan import command
from penstock.config import PPOConfig, RewardConfig, SFTConfig
from penstock.distributed.world import World
from penstock.errors import ResourceError, UserError
from penstock.flags import flags_of
from penstock.kernels import compile as compiler
from penstock.memory import plan, prepare
from penstock.memory.program import visits_of
from penstock.memory.strategy import Strategy
from penstock.memory.tiers import Disk, Ram, _AtOnce
from penstock.models import lora_targets, weight_shapes
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.linear import computing
from penstock.models.lora_targets import LoraSpec
from penstock.models.moe import experts
from penstock.models.roles import Actor, Critic
from penstock.planner import footprint, workload
from penstock.planner.config import PlanConfig
from penstock.planner.from_flags import config_of, setting_of, workload_of
from penstock.planner.workload import RoleSpec, Setting, Workload, forecast_of, passes
from penstock.rollout.sampling import Sampling, pick
from tests.conftest import ROWS

CPU = torch.device("cpu")


def mostly(rows, quick):
    """The rows of a table, of which those that prove nothing more than the others wait for the long campaigns."""
    return [row if quick(*row) else pytest.param(*row, marks=pytest.mark.slow) for row in rows]


BASE = DecoderConfig("gpt2", 512, d_model=128, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=32, d_ff=512,
                     max_length=128)  # fmt: skip
LLAMA = dataclasses.replace(
    BASE, family="llama", position="rotary", rotary_dim=32, norm="rms", activation="silu", gated=True, d_ff=320,
    qkv_bias=False, out_bias=False, mlp_bias=False, tied=False, num_kv_heads=2,
)  # fmt: skip
YARN = tuple(
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1}.items()
)
FAMILIES = {
    "gpt2": BASE,
    "opt": dataclasses.replace(BASE, family="opt", position_offset=2, activation="relu"),
    "opt 350m": dataclasses.replace(
        BASE, family="opt", position_offset=2, activation="relu", pre_norm=False, final_norm=False, embed_dim=64
    ),
    "bloom": dataclasses.replace(BASE, family="bloom", position="alibi", embed_norm=True),
    "gpt_neox": dataclasses.replace(
        BASE, family="gpt_neox", position="rotary", rotary_dim=8, parallel_residual=True, tied=False
    ),
    "llama": LLAMA,
    "qwen3": dataclasses.replace(LLAMA, family="qwen3", qk_norm=True, tied=True),
    "mistral": dataclasses.replace(LLAMA, family="mistral", windows=(16, 16, 16)),
    "gemma2": dataclasses.replace(
        LLAMA,
        family="gemma2",
        windows=(16, 0, 16),
        out_norms=True,
        norm_offset=1.0,
        embed_scale=11.3,
        tied=True,
        activation="gelu_tanh",
        attention_softcap=50.0,
        logit_softcap=30.0,
    ),
    "gemma3": dataclasses.replace(
        LLAMA,
        family="gemma3_text",
        windows=(16, 0, 16),
        window_rope=(("rope_theta", 30.0),),
        out_norms=True,
        norm_offset=1.0,
        embed_scale=11.3,
        tied=True,
        activation="gelu_tanh",
        qk_norm=True,
    ),
    "granite": dataclasses.replace(
        LLAMA,
        family="granite",
        embed_scale=12.0,
        residual_scale=0.2,
        attention_scale=0.1,
        logit_divisor=8.0,
    ),
    "smollm3": dataclasses.replace(LLAMA, family="smollm3", rotary_layers=(True, False, True), tied=True),
    "qwen3_moe": dataclasses.replace(
        LLAMA, family="qwen3_moe", qk_norm=True, num_experts=8, experts_per_token=2, expert_ff=96, dense_layers=(1,)
    ),
    "gpt_oss": dataclasses.replace(
        LLAMA,
        family="gpt_oss",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        num_experts=4,
        experts_per_token=2,
        expert_ff=192,
        router_bias=True,
        sinks=True,
        clamp=(1.702, 7.0),
        windows=(16, 0, 16),
    ),
    "mixtral": dataclasses.replace(LLAMA, family="mixtral", num_experts=4, experts_per_token=2, expert_ff=128),
    "olmo3": dataclasses.replace(
        LLAMA,
        family="olmo3",
        windows=(16, 0, 16),
        window_rope=(("rope_theta", 500.0),),
        pre_norm=False,
        out_norms=True,
        qk_norm=True,
        qk_norm_wide=True,
        rotary_dim=24,
        rope_scaling=YARN,
    ),
}


def work(config=BASE, **changes):
    roles = (
        RoleSpec("actor", config, trained=True, scalar=False),
        RoleSpec("critic", config, trained=True, scalar=True),
        RoleSpec("reference", config, trained=False, scalar=False),
        RoleSpec("reward", config, trained=False, scalar=True),
    )
    sizes = {"batch_size": 8, "micro_batch_size": 4, "mini_batch_size": 8, "prompt_length": 40, "max_new_tokens": 24}
    return Workload("ppo", roles, **{"epochs": 1, **sizes, **changes})


def one_model(stage, config=BASE, scalar=False):
    role = RoleSpec("model", config, trained=True, scalar=scalar)
    return dataclasses.replace(work(config), stage=stage, roles=(role,))


def forecast(of, strategy, dtype="fp32", world=1, device=None, host=None):
    return forecast_of(Setting(of, strategy, dtype, world, {"device": device, "host": host, "disk": None}))


def dry(of, strategy, dtype="fp32", world=1, device=None, host=None):
    return dry_run(Setting(of, strategy, dtype, world, {"device": device, "host": host, "disk": None}))


def real(of, name, tmp_path, device=None):
    """The same iteration on tensors that have memory, computed as a GPU does, on a machine without a compiler: updates
    then need the most."""
    planned = forecast(of, name, device=device)
    tiers = {"device": Ram("device", CPU, device), "host": Ram("host", CPU), "disk": Disk(tmp_path)}
    strategy = Strategy(
        name, World(0, 1, CPU), torch.float32, reserve=planned.activations, few_tokens=planned.few_tokens,
        offloaded=planned.offloaded, tiers=tiers,
    )  # fmt: skip
    at_once = mock.patch.object(prepare, "worker", return_value=_AtOnce())  # the meter sees one thread
    with at_once, mock.patch.object(compiler, "compiled", return_value="no compiler"), computing("narrow"):
        found = iterate(of, strategy, models_of(of, strategy))
    tiers["disk"].close()
    return found


def assert_near(planned, measured, most=1.15):
    for tier, nbytes in measured.items():
        if tier != "traffic":
            assert nbytes <= planned.peak[tier] <= most * nbytes, (tier, planned.peak[tier] / max(nbytes, 1))


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_knows_every_weight_of_a_model_and_the_order_they_are_needed_in(name, scalar):
    model = (Critic if scalar else Actor)(Decoder(FAMILIES[name], device="meta"))
    where = dict(model.named_parameters())
    planned = weight_shapes.groups_of(FAMILIES[name], "float32", trained=True, scalar=scalar)
    assert [(group, [w.name for w in weights]) for group, weights in planned] == model.groups()
    assert all(w.shape == tuple(where[w.name].shape) for _, weights in planned for w in weights)
    assert weight_shapes.visits_of(FAMILIES[name], scalar=scalar) == visits_of(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_operations_are_those_that_torch_counts(name):
    actor, rows, length = Actor(Decoder(FAMILIES[name])), 2, 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        actor.decoder.logits(actor(torch.zeros(rows, length, dtype=torch.int64), None))
    planned = rows * footprint.flops_of(FAMILIES[name], [(length, length)])
    planned += footprint.head_flops(FAMILIES[name], rows * length)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.06)  # torch counts the masked half of attention


@pytest.mark.parametrize("strategy", ["ddp", "gemini_nvme"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_peaks_are_foretold_on_real_tensors(name, strategy, tmp_path):
    of = work(FAMILIES[name])
    device = None if strategy == "ddp" else 12_000_000 if FAMILIES[name].sinks else 9_000_000
    assert_near(forecast(of, strategy, device=device), real(of, strategy, tmp_path, device))


@pytest.mark.parametrize("strategy", ["gemini_cpu", "gemini_nvme", "gemini_auto"])
def test_a_dry_run_takes_what_the_real_one_takes(strategy, tmp_path):
    of = work(micro_batch_size=2)
    pretended, found = dry(of, strategy, device=8_000_000), real(of, strategy, tmp_path, device=8_000_000)
    for tier in ("device", "host", "disk"):
        assert pretended[tier] == pytest.approx(found[tier], rel=0.01), tier
    assert pretended["traffic"] == found["traffic"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("of", [one_model, work], ids=["sft", "ppo"])
def test_words_outweigh_everything_and_are_foretold(of, dtype):
    """200,000 of them: the head's tiles are what learning needs most, and choosing a token what a rollout does."""
    many = dataclasses.replace(BASE, vocab_size=200_000, d_model=32, head_dim=8, d_ff=64)
    workload = of("sft", many) if of is one_model else of(many)
    assert_near(forecast(workload, "gemini_cpu", dtype), dry(workload, "gemini_cpu", dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "rule", [{}, {"temperature": 0.7}, {"top_k": 50}, {"top_p": 0.9}, {"temperature": 0.7, "top_k": 50, "top_p": 0.9}],
    ids=str,
)  # fmt: skip
def test_choosing_a_token_holds_what_the_plan_says(rule, dtype, monkeypatch):
    rows, words = 8, 50_000
    logits = torch.randn(rows, words).to(getattr(torch, dtype))
    planned = footprint.sampling_of(dataclasses.replace(BASE, vocab_size=words), dtype, rows, **rule)
    with Meter() as compiled:  # no distribution is made; another device than a CPU makes one
        pick(logits.float(), torch.rand(rows), Sampling(**rule))
    assert compiled.peak + logits.nbytes <= 1.001 * planned
    monkeypatch.setattr(compiler, "compiled", lambda *_: "no compiler")
    with Meter() as meter:
        wide = logits.float()  # which the engine keeps
        pick(wide, torch.rand(rows), Sampling(**rule))
    assert meter.peak + logits.nbytes == pytest.approx(planned, rel=0.001)


def test_the_plan_of_a_rollout_knows_how_tokens_are_chosen():
    def sampling(**flags):
        config = PlanConfig(model="s", batch_size=8, **flags)
        return passes(setting_of(config))["rollout"][0].sampling

    assert sampling(top_p=0.9) - sampling() == 8 * 50257 * 16
    assert sampling(temperature=0.5) - sampling() == 8 * 50257 * 4
    assert sampling(top_k=50) - sampling() == 8 * 50257 * 4


@pytest.mark.parametrize("name", ["gpt2", "opt 350m", "llama", "qwen3_moe"])
def test_what_a_cpu_widens_is_foretold(name):
    """bf16 without instructions for it: fp32 copies of rows and of a weight's tile, at the product that needs them."""
    of = dataclasses.replace(one_model("sft", FAMILIES[name]), prompt_length=100)
    setting = Setting(of, "ddp", "bf16", recompute=True, arithmetic="wide")
    assert_near(forecast_of(setting), dry_run(setting))


@pytest.mark.parametrize("strategy", ["gemini", "gemini_cpu", "zero2"])
def test_gradients_that_ranks_sum_are_foretold(strategy):
    """Of a table of 200,000 words a rank's part, in fp32, outweighs the activations of a few tokens."""
    many = dataclasses.replace(BASE, vocab_size=200_000)
    of = dataclasses.replace(
        one_model("sft", many), batch_size=4, mini_batch_size=4, micro_batch_size=1, prompt_length=8, max_new_tokens=8
    )
    planned, alone = (forecast(of, strategy, "bf16", world) for world in (4, 1))
    assert planned.activations > 1.3 * alone.activations
    assert_near(planned, dry(of, strategy, "bf16", 4))


@pytest.mark.parametrize(
    ("strategy", "world"),
    [
        (name, world)
        for name in (*ROWS, "gemini_cpu_8bit", "gemini_nvme_8bit") for world in (1, 4) if (name, world) != ("naive", 4)
    ],
)  # fmt: skip
def test_every_strategys_peaks_are_foretold(strategy, world):
    of = work(batch_size=8 if world == 1 else 16, prompt_length=100)
    assert_near(forecast(of, strategy, "bf16", world), dry(of, strategy, "bf16", world))


@pytest.mark.parametrize(
    ("strategy", "world", "device"), [("gemini_cpu", 1, None), ("gemini", 4, None), ("gemini_auto", 1, 12_000_000)]
)
def test_activations_that_are_kept_while_weights_move_are_foretold(strategy, world, device):
    of = dataclasses.replace(one_model("sft"), batch_size=16, mini_batch_size=16, prompt_length=100)
    budgets = {"device": device, "host": None, "disk": None}
    setting = Setting(of, strategy, "bf16", world, budgets, recompute=False)
    planned = forecast_of(setting)
    assert_near(planned, dry_run(setting))
    if strategy == "gemini_cpu":  # elsewhere an update's scratch on the device is the most
        again = forecast_of(dataclasses.replace(setting, recompute=None))
        assert planned.activations > again.activations
        assert planned.seconds["train"].compute < again.seconds["train"].compute


def test_what_a_checkpoint_gathers_is_counted():
    """The largest chunk is the table of 50,257 tokens: on the device a piece of it, in host memory all of it."""
    table = 50_257 * 768
    for strategy, world, host in (
        ("gemini_cpu", 1, 4),  # weights and states are there: of bf16 an fp32 master is made
        ("gemini_cpu", 4, 2 + 10 + 4),
        ("zero1", 4, 2 + 10 + 4),
        ("gemini_cpu_8bit", 1, 8 + 4),
    ):
        config = PlanConfig(model="s", stage="sft", strategy=strategy, world=world, batch_size=4, micro_batch_size=1,
                            prompt_length=8, max_new_tokens=8)  # fmt: skip
        planned = forecast_of(setting_of(config), timed=False)
        device = plan.GATHER_BYTES * 5 // 4 if world > 1 else 0
        assert planned.objects["checkpoint"]["device"] == device
        assert planned.objects["checkpoint"]["host"] == pytest.approx(host * table, rel=0.01)
        assert planned.activations >= device


DEEP = dataclasses.replace(BASE, num_layers=8)


def batched(of, rows):
    return dataclasses.replace(of, batch_size=rows, mini_batch_size=rows, micro_batch_size=2)


@pytest.mark.parametrize(
    ("of", "strategy", "dtype", "world"),
    [
        (batched(one_model("sft", DEEP), 16), "gemini_cpu", "fp32", 1),
        (batched(one_model("sft", DEEP), 32), "gemini_cpu", "bf16", 2),
        pytest.param(batched(one_model("sft", DEEP), 16), "gemini_auto", "bf16", 1, marks=pytest.mark.slow),
        pytest.param(batched(work(DEEP, rollout_batch_size=8), 16), "gemini_cpu", "bf16", 1, marks=pytest.mark.slow),
    ],
    ids=["fp32", "two ranks", "auto", "ppo"],
)
def test_what_blocks_read_goes_to_the_host_where_the_device_cannot_hold_it(of, strategy, dtype, world):
    """And no sooner; the device then holds what two blocks read."""
    setting = Setting(of, strategy, dtype, world, {"device": 1, "host": None, "disk": None})
    kept, away = (workload._forecast(setting, False, True, of.rolls_out, x).peak["device"] for x in (False, True))
    assert forecast(of, strategy, dtype, world, device=kept).offloaded == 0
    assert away < 0.75 * kept
    device = (kept + away) // 2
    planned, measured = (run(of, strategy, dtype, world, device=device) for run in (forecast, dry))
    assert planned.offloaded
    assert planned.objects["block_inputs"]["host"] == planned.offloaded
    assert measured["device"] <= planned.peak["device"] <= device
    assert_near(planned, measured, 1.15 if world == 1 else 1.3)
    for key in ("host_read", "host_written"):
        expected, moved = (sum(phase[key] for phase in run.values()) for run in (planned.traffic, measured["traffic"]))
        assert expected == pytest.approx(moved, rel=0.1), key
        assert expected > planned.offloaded


def test_what_blocks_read_leaves_a_device_that_holds_it_where_that_is_much_faster_and_host_memory_is_given(capsys):
    """GRPO of 8B in 47 GB: in its room the whole actor stays in slots while it generates."""
    flags = "--model 8b --stage grpo --strategy gemini_cpu --device-memory 47GB --batch-size 256 --micro-batch-size 4"
    flags = [*flags.split(), "--critic-model", "s", "--rollout-batch-size", "64"]
    stays, leaves, no_room = (
        plan_of(capsys, *flags, *more)[1] for more in ([], ["--host-memory", "300GB"], ["--host-memory", "150GB"])
    )
    line = "inputs of blocks wait in host memory from forward to backward: 41.88 GB"
    assert [line in out for out in (stays, leaves, no_room)] == [False, True, False]
    seconds = [float(out.split("one iteration: ")[1].split()[0]) for out in (stays, leaves)]
    assert seconds[1] < 0.3 * seconds[0]


@pytest.mark.parametrize(("dtype", "device"), [("fp32", 20_000_000), ("bf16", 30_000_000)])
def test_states_of_which_some_are_on_the_device_are_foretold(dtype, device):
    """The others are in host memory, beside a shadow of the weights; each update needs room where it runs."""
    of = one_model("sft", DEEP)
    planned = forecast(of, "gemini_auto", dtype, device=device)
    assert planned.objects["optimizer"]["device"] > 0
    assert planned.objects["weights"]["host"] * (2 if dtype == "fp32" else 5) == planned.objects["optimizer"]["host"]
    assert_near(planned, dry(of, "gemini_auto", dtype, device=device))


def test_activations_that_are_kept_do_not_go_to_the_host():
    of = batched(one_model("sft", DEEP), 16)
    setting = Setting(of, "gemini_cpu", "fp32", 1, {"device": 1, "host": None, "disk": None}, recompute=False)
    assert forecast_of(setting).offloaded == 0
    assert forecast_of(dataclasses.replace(setting, strategy="ddp", recompute=None)).offloaded == 0
    assert forecast_of(dataclasses.replace(setting, strategy="ddp", recompute=True)).offloaded > 0


def on_one_base(of, spec):
    """The same work through adapters: four roles on one base."""
    specs = [None if role.name == "reference" else spec for role in of.roles]
    roles = (dataclasses.replace(role, spec=spec, base="base") for role, spec in zip(of.roles, specs, strict=True))
    return dataclasses.replace(of, roles=tuple(roles))


@pytest.mark.parametrize(("name", "strategy", "dtype"), mostly(
    [(name, *placed) for name in FAMILIES for placed in (("naive", "bf16"), ("gemini_cpu", "fp32"))],
    lambda name, strategy, _: strategy == "naive" or name in ("gpt2", "llama", "qwen3_moe"),  # blocks do not matter
))  # fmt: skip
def test_four_roles_on_one_base_are_foretold(name, strategy, dtype):
    of = on_one_base(work(FAMILIES[name], prompt_length=100), LoraSpec(4))
    assert_near(forecast(of, strategy, dtype), dry(of, strategy, dtype))


def test_one_base_and_its_adapters_take_a_fraction_of_four_models():
    four, one = work(), on_one_base(work(), LoraSpec(4))
    adapters = sum(
        weight.numel
        for role in one.roles if role.spec
        for _, weights in lora_targets.groups_of(BASE, "bfloat16", role.spec, trained=role.trained, scalar=role.scalar)
        for weight in weights if ".lora." in weight.name
    )  # fmt: skip
    base = 2 * weight_shapes.count_of(BASE, scalar=False)
    pages = 4 * 4096 * 5 * 12  # chunks end on pages: of five groups, four models, up to 12 bytes an element
    assert forecast(one, "gemini_cpu", "bf16").peak["host"] < base + 14 * adapters + pages + 12 * plan.UPDATE_TILE
    assert forecast(four, "gemini_cpu", "bf16").peak["host"] > 15 * base


@pytest.mark.parametrize(("one_base", "device"), [(True, 6_400_000), (False, 8_000_000)])
def test_traffic_is_foretold(tmp_path, one_base, device):
    """Bytes that scoring and learning fetch; on one base, four roles share what moves."""
    of = work(mini_batch_size=4, epochs=2)
    of = on_one_base(of, LoraSpec(4)) if one_base else of
    planned = forecast(of, "gemini_nvme", device=device)
    moved = real(of, "gemini_nvme", tmp_path, device=device)["traffic"]
    for key in ("host_written", "disk_read", "disk_written"):
        expected, measured = (sum(phase[key] for phase in run.values()) for run in (planned.traffic, moved))
        assert expected == pytest.approx(measured, rel=0.1), key


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", ["zero1_cpu", "zero2_cpu", "zero2_cpu_8bit"])
def test_what_an_update_in_host_memory_moves_is_foretold_to_the_byte(strategy, dtype, world):
    """Gradients come down once, and each rank's new share of the weights goes up once."""
    of = one_model("sft")
    planned, moved = forecast(of, strategy, dtype, world), dry(of, strategy, dtype, world)["traffic"]
    for key, nbytes in moved["train"].items():
        assert planned.traffic["train"][key] == nbytes, key
    if strategy == "zero1_cpu":  # micro-batches go one after the other, and gradients add up in fp32
        share = weight_shapes.count_of(BASE, scalar=False) / world
        assert moved["train"]["host_written"] == pytest.approx(4 * share, rel=0.1)
        assert moved["train"]["host_read"] == pytest.approx((4 if dtype == "fp32" else 2) * share, rel=0.1)


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("strategy", ["gemini_cpu", "gemini_nvme"])
def test_the_experts_that_answers_choose_are_foretold_and_no_others_come(strategy, batch_size, tmp_path):
    wide = dataclasses.replace(FAMILIES["qwen3_moe"], num_layers=6, num_experts=24, dense_layers=())
    of = work(wide, batch_size=batch_size, mini_batch_size=batch_size, micro_batch_size=2, prompt_length=8)
    device = 13_500_000
    planned = forecast(of, strategy, device=device)
    assert planned.few_tokens >= 8
    # a router that tells tokens apart and likes all experts alike, and every step is run
    choose, generator = experts.choose, torch.Generator().manual_seed(0)

    def drawn(logits, k, norm):
        return choose(torch.randn(logits.shape, generator=generator), k, norm)

    with mock.patch.multiple("penstock.commands.dry_run", STEPS=24), mock.patch.object(experts, "choose", drawn):
        moved = real(of, strategy, tmp_path, device=device)["traffic"]["rollout"]
    way = "host_read" if strategy == "gemini_cpu" else "disk_read"
    assert planned.traffic["rollout"][way] == pytest.approx(moved[way], rel=0.1)
    with mock.patch.object(plan, "few_tokens", return_value=0):
        everything = forecast(of, strategy, device=device).traffic["rollout"][way]
    assert moved[way] < (0.4 if batch_size == 2 else 0.75) * everything


def test_auto_stays_within_its_budget_when_roles_step_side_by_side():
    """Their gradients are there at once, and not one after the other."""
    of = on_one_base(work(mini_batch_size=4), LoraSpec(16))
    least = forecast(of, "gemini_auto", "bf16", device=1).peak["device"]
    for device in range(least, 3 * least, least // 16):
        assert forecast(of, "gemini_auto", "bf16", device=device).peak["device"] <= device


def test_what_blocks_of_models_side_by_side_read_has_pages_of_its_own():
    """They stay for the next phase, whoever borrows them then."""
    of = batched(on_one_base(work(dataclasses.replace(BASE, num_layers=5), rollout_batch_size=4), LoraSpec(4)), 8)
    setting = Setting(of, "gemini_cpu", "bf16", 1, {"device": 1, "host": None, "disk": None})
    kept, away = (workload._forecast(setting, False, True, True, x).peak["device"] for x in (False, True))
    planned, measured = (run(of, "gemini_cpu", "bf16", device=(kept + away) // 2) for run in (forecast, dry))
    assert planned.further
    assert planned.offloaded > planned.further
    assert_near(planned, measured)


@pytest.mark.parametrize(("lora", "host"), [(16, "10GB"), (None, "16GB")])
def test_auto_leaves_host_memory_to_what_no_disk_holds(lora, host):
    """A KV cache, gradients, and inputs of blocks, of models that stand on one base two at a time."""
    config = PlanConfig(
        model="xl", lora=lora, device_memory="3GB", host_memory=host, disk="500GB", prompt_length=256, arithmetic="cpu"
    )
    setting = setting_of(config)
    planned = forecast_of(setting, timed=False)
    assert planned.swapped
    assert planned.offloaded
    assert bool(planned.further) == bool(lora)
    assert planned.peak["host"] <= setting.budgets["host"]


@pytest.mark.parametrize(("stage", "scalar"), [("sft", False), ("reward", True)])
def test_other_stages_are_foretold(stage, scalar):
    of = one_model(stage, scalar=scalar)
    assert_near(forecast(of, "gemini_cpu"), dry(of, "gemini_cpu"))


def groups(spec=None, **changes):
    """grpo: actor and reference, and no reward model; four answers to each prompt."""
    base = "base" if spec else None
    roles = [RoleSpec("actor", BASE, trained=True, scalar=False, spec=spec, base=base)]
    roles.append(RoleSpec("reference", BASE, trained=False, scalar=False, base=base))
    return dataclasses.replace(work(**changes), stage="grpo", roles=tuple(roles), group_size=4)


@pytest.mark.parametrize(("strategy", "dtype", "world"), [
    ("naive", "fp32", 1), ("ddp", "bf16", 1), ("gemini_cpu", "bf16", 4), ("gemini_nvme", "bf16", 1),
])  # fmt: skip
@pytest.mark.parametrize("spec", [None, LoraSpec(4)], ids=["full", "lora"])
def test_groups_are_foretold(spec, strategy, dtype, world):
    of = groups(spec, batch_size=16, mini_batch_size=16)
    planned, measured = forecast(of, strategy, dtype, world), dry(of, strategy, dtype, world)
    assert_near(planned, measured)
    assert set(planned.phases) == {"rollout", "score", "train"} == set(measured["traffic"])


def test_a_group_reads_its_prompt_once():
    alone = dataclasses.replace(groups(), group_size=1)
    flops = [passes(Setting(of, "ddp", "fp32"))["rollout"][0].flops for of in (groups(), alone)]
    assert flops[0] == flops[1] / 4


def preference(config=BASE, spec=None, reference=True, stage="dpo", **changes):
    """dpo, kto: rows of which 24 tokens are answers; under adapters the reference stands on the same base."""
    base = "base" if spec else None
    roles = [RoleSpec("model", config, trained=True, scalar=False, spec=spec, base=base)]
    roles += [RoleSpec("reference", config, trained=False, scalar=False, base=base)] * reference
    return dataclasses.replace(work(config, **changes), stage=stage, roles=tuple(roles))


@pytest.mark.parametrize(("stage", "adapted", "strategy", "dtype", "world"), mostly(
    [
        (stage, adapted, *placed) for stage in ("dpo", "kto") for adapted in ("full", "lora") for placed in (
            ("naive", "fp32", 1), ("ddp", "bf16", 1), ("gemini_cpu", "fp32", 1), ("gemini_cpu", "bf16", 4),
            ("gemini", "bf16", 1), ("gemini_nvme", "bf16", 1),
        )
    ],
    lambda stage, adapted, strategy, *_: (stage, adapted) == ("dpo", "full") or strategy in ("naive", "gemini_cpu"),
))  # fmt: skip
def test_preference_learning_is_foretold(stage, adapted, strategy, dtype, world):
    spec = LoraSpec(4) if adapted == "lora" else None
    of = preference(spec=spec, stage=stage, batch_size=16, mini_batch_size=16, prompt_length=100)
    planned, measured = forecast(of, strategy, dtype, world), dry(of, strategy, dtype, world)
    assert_near(planned, measured)
    assert set(planned.phases) == {"score", "train"} == set(measured["traffic"])


@pytest.mark.parametrize("spec", [None, LoraSpec(4)], ids=["full", "lora"])
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_the_traffic_of_preference_learning_is_foretold(tmp_path, stage, spec):
    of = preference(spec=spec, stage=stage)
    device = forecast(of, "gemini_nvme", device=1).peak["device"] + 100_000
    planned, moved = forecast(of, "gemini_nvme", device=device), real(of, "gemini_nvme", tmp_path, device)["traffic"]
    for key in ("host_written", "disk_read", "disk_written"):
        expected, measured = (sum(phase[key] for phase in run.values()) for run in (planned.traffic, moved))
        assert expected == pytest.approx(measured, rel=0.15), key  # the first iteration fills the slots, too


def test_a_reference_under_adapters_takes_no_weights_and_without_any_no_pass():
    alone, beside = (preference(spec=LoraSpec(4), reference=reference) for reference in (False, True))
    planned = [forecast(of, "gemini_cpu", "bf16") for of in (alone, beside)]
    assert planned[0].peak["host"] == planned[1].peak["host"]
    assert set(planned[0].phases) == {"train"}
    full = (
        forecast(preference(), "gemini_cpu", "bf16").peak["host"]
        - forecast(preference(reference=False), "gemini_cpu", "bf16").peak["host"]
    )
    assert full == pytest.approx(2 * weight_shapes.count_of(BASE, scalar=False), rel=0.05)
    assert_near(forecast(alone, "gemini_cpu", "bf16"), dry(alone, "gemini_cpu", "bf16"))


def test_the_plan_of_the_command_knows_pairs_and_the_reference(capsys):
    base = ["--model", "s", "--stage", "dpo", "--lora", "8", "--strategy", "gemini_cpu", "--json"]
    for flags, phases in ([], {"score", "train"}), (["--precompute-reference"], {"train"}):
        code, out = plan_of(capsys, *base, *flags)
        assert (code, set(json.loads(out)["phases"])) == (0, phases)


def teaching(config=BASE, spec=None, **changes):
    """distill: a student, and a teacher of more and wider layers."""
    larger = dataclasses.replace(config, num_layers=5, d_model=2 * config.d_model, head_dim=2 * config.head_dim)
    roles = (
        RoleSpec("model", config, trained=True, scalar=False, spec=spec, base="base" if spec else None),
        RoleSpec("teacher", larger, trained=False, scalar=False),
    )
    return dataclasses.replace(work(config), **{"stage": "distill", "roles": roles, "top_k": 64, **changes})


@pytest.mark.parametrize(("changes", "strategy", "dtype", "world"), mostly(
    [
        (changes, *placed) for changes in ({}, {"samples": True}, {"stored": True}, {"spec": LoraSpec(4)}) for placed in
        (("naive", "fp32", 1), ("gemini_cpu", "fp32", 1), ("gemini_cpu", "bf16", 1), ("gemini", "bf16", 4),
         ("gemini_nvme", "bf16", 1))
    ],
    lambda changes, strategy, dtype, _: not changes or (strategy, dtype) in (("naive", "fp32"), ("gemini_cpu", "bf16")),
), ids=str)  # fmt: skip
def test_distillation_is_foretold(changes, strategy, dtype, world):
    of = teaching(**changes)
    planned, measured = forecast(of, strategy, dtype, world), dry(of, strategy, dtype, world)
    assert_near(planned, measured)
    phases = {"score", "train"} | ({"rollout"} if of.samples else set())
    assert phases == set(planned.phases) == set(measured["traffic"])


def test_large_layers_of_a_packed_teacher_are_foretold():
    wide = dataclasses.replace(BASE, d_model=1600, num_heads=25, num_kv_heads=25, head_dim=64, d_ff=6400, num_layers=2)
    roles = (RoleSpec("teacher", wide, trained=False, scalar=False, base_dtype="nf4"),)
    of = dataclasses.replace(teaching(batch_size=1), roles=roles, micro_batch_size=1)
    assert_near(forecast(of, "gemini_cpu", "bf16"), dry(of, "gemini_cpu", "bf16"))


def test_the_dry_run_of_distillation_takes_what_the_real_one_takes(tmp_path):
    of = teaching(micro_batch_size=2)
    device = forecast(of, "gemini_cpu", device=1).peak["device"]
    pretended, measured = dry(of, "gemini_cpu", device=device), real(of, "gemini_cpu", tmp_path, device=device)
    assert pretended["traffic"] == measured["traffic"]
    assert pretended["device"] == pytest.approx(measured["device"], rel=0.01)


XL_FOR_S = """
    --stage distill --model s --teacher-model xl --strategy gemini_cpu --device-memory 320MB --batch-size 8
    --micro-batch-size 1 --prompt-length 64 --max-new-tokens 64
"""


@pytest.mark.parametrize("flags", [["--lora", "8"], ["--lora", "8", "--on-policy", "0.5"], ["--precompute-teacher"]])
def test_gpt2_xl_teaches_gpt2_in_300_mb_and_cudas_libraries(capsys, flags):
    code, out = plan_of(capsys, *XL_FOR_S.split(), *flags, "--json")
    assert code == 0
    assert json.loads(out)["parameters"] == {"model": 124_439_808, "teacher": 1_557_611_200}
    assert json.loads(out)["predicted"]["device"] - json.loads(out)["outside"] <= 300_000_000


def test_where_both_do_not_fit_a_teacher_that_reads_first_is_advised(capsys):
    code, out = plan_of(capsys, *XL_FOR_S.split(), "--json")
    assert code == 3
    assert "--precompute-teacher fits" in json.loads(out)["advice"]


def test_kto_reads_mismatched_pairs_before_it_learns():
    """The reference reads the answers and the pairs, the policy the pairs: three forwards, and one step."""
    of = preference(stage="kto", micro_batch_size=3)
    reference, policy = passes(Setting(of, "ddp", "fp32"))["score"]
    assert (reference.model, reference.count, policy.model, policy.count) == ("reference", 6, "model", 3)
    assert reference.flops == 2 * policy.flops
    assert dry(of, "gemini_cpu", device=forecast(of, "gemini_cpu", device=1).peak["device"])


def test_a_device_budget_holds_activations_too():
    of = work(prompt_length=100)
    least = forecast(of, "gemini_cpu", device=1).peak["device"]
    assert dry(of, "gemini_cpu", device=least)["device"] <= least
    with pytest.raises(ResourceError, match=r"at least .* with their activations"):
        dry(of, "gemini_cpu", device=least - 200_000)


def test_auto_fills_the_device_then_host_memory_then_the_disk():
    of = work()
    everything = forecast(of, "gemini_auto").peak
    assert everything["host"] == everything["disk"] == 0
    some = forecast(of, "gemini_auto", device=everything["device"] // 2).peak
    assert everything["device"] // 3 < some["device"] <= everything["device"] // 2
    assert some["host"] > some["disk"] == 0
    # buffers take 243 MB of host memory, more than these models, and an update 12 MB in between
    for host in range(257_000_000, 267_000_000, 500_000):
        tight = forecast(of, "gemini_auto", device=everything["device"] // 2, host=host).peak
        assert 0 < tight["host"] <= host
        assert tight["disk"] > 0


def plan_of(capsys, *flags):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *flags])
    return stopped.value.code, capsys.readouterr().out


def test_the_command_says_as_json_what_fits(capsys):
    code, out = plan_of(capsys, "--model", "8b", "--strategy", "gemini_cpu", "--device-memory", "40GB", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["fits"] is True
    assert found["advice"] is None
    assert set(found["predicted"]) == {"device", "host", "disk"}
    assert {"rollout", "score", "train"} == set(found["phases"]) == set(found["traffic"])
    assert {"weights", "grads", "optimizer", "activations", "kv_cache", "head_tile", "slots"} <= set(found["objects"])
    # DESIGN 6: four equal models take 30 bytes a weight, 8.3 billion of them
    assert found["predicted"]["host"] == pytest.approx(30 * found["parameters"]["actor"], rel=0.01)


@pytest.mark.parametrize(
    "flags",
    ["--device-memory 24GB --host-memory 128GB", "--device-memory 3GB --host-memory 400GB",
     "--device-memory 3GB --batch-size 32", "--host-memory 128GB --device-memory 80GB --strategy ddp --stage sft"],
)  # fmt: skip
def test_the_change_it_advises_fits(capsys, flags):
    base = ["--model", "8b", "--strategy", "gemini_cpu", *flags.split()]
    code, out = plan_of(capsys, *base, "--json")
    found = json.loads(out)
    assert code == 3
    assert not found["fits"]
    assert found["lacking"]
    change, _, _ = found["advice"].partition(" fits: ")
    assert change.startswith("--")
    code, out = plan_of(capsys, *base, *change.split(), "--json")
    assert (code, json.loads(out)["fits"]) == (0, True)


def test_when_nothing_fits_it_says_what_would(capsys):
    base = ["--model", "175b", "--strategy", "gemini_cpu", "--device-memory", "2GB", "--host-memory", "1GB"]
    code, out = plan_of(capsys, *base, "--disk", "1GB", "--json")
    assert code == 3
    change = json.loads(out)["advice"].split(";")[1].removesuffix(" would.")
    code, _ = plan_of(capsys, *base, "--disk", "1GB", *change.split(), "--json")
    assert code == 0


def test_a_disk_without_a_limit_is_planned_as_one():
    setting = setting_of(PlanConfig(model="8b", strategy="gemini_nvme", disk="/scratch/penstock"))
    assert setting.budgets["disk"] is None
    assert setting_of(PlanConfig(model="8b", strategy="gemini_nvme", disk="/scratch:2GB")).budgets["disk"] == 2 * 10**9


def test_processes_of_one_machine_share_its_memory(capsys):
    flags = ["--model", "8b", "--strategy", "gemini_nvme", "--world", "16", "--nodes", "2", "--disk", "9TB", "--json"]
    found = json.loads(plan_of(capsys, *flags)[1])
    checkpoint = found["objects"]["checkpoint"]["host"]
    assert found["per_machine"] == {
        "processes": 8,
        "host": 8 * (found["predicted"]["host"] + checkpoint),
        "disk": 8 * found["predicted"]["disk"],
    }
    assert "\n8 of a machine" in plan_of(capsys, *flags[:-1])[1]
    cpu = json.loads(plan_of(capsys, *flags, "--arithmetic", "cpu")[1])
    assert cpu["per_machine"]["host"] == 8 * (cpu["predicted"]["host"] + checkpoint + cpu["predicted"]["device"])


def test_the_text_names_the_command_to_run(capsys):
    models = ["--model", "xl", "--critic-model", "s"]
    code, out = plan_of(capsys, *models, "--strategy", "colossalai_gemini_cpu", "--world", "2")
    assert code == 0
    assert "torchrun --nproc_per_node 2 -m penstock ppo --strategy gemini_cpu --dtype bf16" in out
    out = plan_of(capsys, *models, "--strategy", "hsdp", "--world", "16", "--nodes", "2")[1]
    assert "torchrun --nnodes 2 --nproc_per_node 8 -m penstock ppo --strategy hsdp" in out
    assert re.search(r"\bwritten       ranks   seconds  limit\nrollout( +0 bytes){4} +[\d.]+ [GT]B +[\d.]+  ", out)
    for disk, flag in (("2TB", "PATH:2TB"), ("/scratch:2TB", "/scratch:2TB"), ("/scratch", "/scratch")):
        out = plan_of(capsys, *models, "--strategy", "gemini_nvme", "--disk", disk)[1]
        assert f"--strategy gemini_nvme --dtype bf16 --disk {flag} ..." in out


def test_a_dry_run_stands_beside_the_plan(capsys):
    code, out = plan_of(capsys, "--model", "s", "--batch-size", "2", "--prompt-length", "16", "--max-new-tokens", "4",
                     "--strategy", "gemini_cpu", "--world", "2", "--dry-run", "--json")  # fmt: skip
    found = json.loads(out)
    assert code == 0
    found["predicted"]["device"] -= found["outside"]  # a dry run has no libraries
    for tier in ("device", "host", "disk"):
        assert found["measured"][tier] <= found["predicted"][tier] <= 1.15 * found["measured"][tier]


def test_planning_imports_no_torch():
    code = (
        "import sys; from penstock.cli import main\n"
        "try: main(['plan', '--model', '175b', '--world', '32', '--json'])\n"
        "except SystemExit as stopped: assert stopped.code == 0\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("flags", "what"),
    [("--model 9b", "no size '9b'"), ("--model xl --prompt-length 1024", "leaves no room"),
     ("--model xl --strategy zero9", "no such strategy"), ("--model xl --link fast", "--link fast: not a number")],
)  # fmt: skip
def test_what_cannot_be_planned_is_said(capsys, flags, what):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *flags.split()])
    assert stopped.value.code == 2
    assert what in capsys.readouterr().err


def test_a_directory_is_planned_from_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2}))
    assert config_of(str(tmp_path), "--model").d_model == 64
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mambo"}))
    with pytest.raises(UserError, match="mambo"):
        config_of(str(tmp_path), "--model")


@pytest.mark.parametrize("strategy", ["gemini_cpu", pytest.param("naive", marks=pytest.mark.slow)])
def test_a_kv_cache_that_does_not_fit_is_swapped(strategy, tmp_path):
    """A budget below what the cache takes beside the rest, and above what two layers of it do."""
    of = work(batch_size=32, micro_batch_size=1, mini_batch_size=32, prompt_length=8, max_new_tokens=120)
    roomy = forecast(of, strategy)
    assert not roomy.swapped
    least = roomy.peak["device"] - roomy.slots.nbytes
    device = least - roomy.objects["kv_cache"]["device"] // 4 + sum(roomy.slots.weights[:3]) * (strategy != "naive")
    planned = forecast(of, strategy, device=device)
    assert planned.swapped
    assert planned.peak["device"] <= device
    measured = dry(of, strategy, device=device)
    assert_near(planned, measured)
    assert measured["host"] >= footprint.cache_of(BASE, "float32", 32, 128)
    rollout, done = planned.traffic["rollout"], measured["traffic"]["rollout"]
    for way in ("host_read", "host_written"):
        assert done[way] <= rollout[way] <= 1.2 * done[way]


COMMANDS = {
    "ppo": PPOConfig, "grpo": GRPOConfig, "sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "kto": KTOConfig,
    "distill": DistillConfig,
}  # fmt: skip


@pytest.mark.parametrize("stage", COMMANDS)
def test_what_is_planned_is_the_commands_run_and_the_line_gives_it(stage):
    own = {flag.name: flag for flag in flags_of(COMMANDS[stage])}
    plain = PlanConfig(model="s", stage=stage)
    assert (plain.rows, plain.passes) == (own["batch_size"].default, own["epochs"].default)
    sized = {"batch_size": 16, "epochs": 3, "micro_batch_size": 2, "lora": 4, "lora_targets": ("q_proj", "v_proj")}
    sampled = {"group_size": 4, "max_new_tokens": 64, "temperature": 0.7, "top_k": 50, "top_p": 0.9}
    sampled |= {"mini_batch_size": 8, "rollout_batch_size": 4}
    sampled |= {"rollout_dtype": "int8"} if stage in ("ppo", "grpo") else {}
    config = PlanConfig(model="s", stage=stage, activation_budget="1GB", **sized, **sampled)
    words = command(config, setting_of(config)).split()
    given = dict(re.findall(r"--([a-z-]+) ((?:[^- ]\S* ?)+)", " ".join(words[:-1])))
    given = {name.replace("-", "_"): value.strip() for name, value in given.items()}
    assert given.keys() <= own.keys()
    wanted = sized | {name: sampled[name] for name in sampled if stage in ("ppo", "grpo") and name in own}
    for name, value in wanted.items():
        assert given[name] == (" ".join(value) if isinstance(value, tuple) else str(value))
    assert "--batch-size" not in command(plain, setting_of(plain))


@pytest.mark.parametrize(("stage", "flags", "together"), [
    ("grpo", {"group_size": 4}, 4), ("dpo", {}, 2), ("reward", {}, 2), ("sft", {}, 1), ("kto", {}, 1), ("ppo", {}, 1),
])  # fmt: skip
def test_comparisons_share_their_prompt_as_groups_do(stage, flags, together):
    work = workload_of(PlanConfig(stage=stage, model="s", batch_size=8, micro_batch_size=8, **flags))
    assert work.group_size == together
    assert work.batch_size == 8 * (2 if stage in ("dpo", "reward") else 1)


@pytest.mark.parametrize(("prompt", "whole"), [(20, 4), (4, 16)])
def test_a_groups_prompt_is_computed_once_per_micro_batch_where_it_is_a_quarter_of_the_tokens(prompt, whole):
    roles = (RoleSpec("actor", FAMILIES["llama"], True, False),)
    work = Workload("grpo", roles, 16, 8, 16, 1, prompt, 10, group_size=4)
    (step,) = passes(Setting(work, "ddp", "fp32"))["train"]
    length, config = prompt + 10, FAMILIES["llama"]
    rows = [(length, length)] * whole + [(11, length)] * (16 - whole)
    assert step.flops == 3 * (footprint.flops_of(config, rows) + footprint.head_flops(config, 16 * 10))
