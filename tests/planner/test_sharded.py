"""The plan of FSDP2's rows against what two ranks then hold."""

import json
from pathlib import Path

import pytest

from penstock.commands.dry_run import dry_run
from penstock.commands.plan import as_dict, on_this_machine
from penstock.errors import UserError
from penstock.memory.placement import PYTORCH
from penstock.models import presets
from penstock.planner.config import PlanConfig
from penstock.planner.from_flags import setting_of
from penstock.planner.workload import forecast_of, passes
from tests.conftest import torchrun

ROOT = Path(__file__).parents[2]
WORKER = """
import dataclasses, json, sys, weakref, torch
from torch.utils._python_dispatch import TorchDispatchMode
from penstock.algorithms import functional as fn
from penstock.algorithms.setup import role_specs, setting_of
from penstock.algorithms.sft import Rows, response_logprobs
from penstock.memory.strategy import Strategy
from penstock.models import presets
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor
from penstock.planner.workload import Workload, forecast_of
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling

SHAPE = dict(num_layers=4, d_model=256, num_heads=4, num_kv_heads=4, head_dim=64, d_ff=1024, vocab_size=4096)
MICRO, ROWS, PROMPT, NEW = 2, 8, 32, 32

class Alive(TorchDispatchMode):
    "Bytes of all storages, as large as they are now: FSDP2 makes them empty and large again."
    def __init__(self):
        super().__init__()
        self.storages, self.peak = weakref.WeakSet(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if type(x) in (torch.Tensor, torch.nn.Parameter):  # a DTensor has a size and no memory
                self.storages.add(x.untyped_storage())
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.storages))
        return result

config = dataclasses.replace(presets.named("s"), max_length=128, **SHAPE)
for dtype in ("fp32", "bf16"):
    for recompute in (None, False):
        strategy = Strategy.named("fsdp", device="cpu", dtype=dtype, recompute=recompute)
        with strategy.init():
            actor = Actor(Decoder(config))
        roles = tuple(dataclasses.replace(role, name="actor") for role in role_specs({"model": actor}))
        work = Workload("ppo", roles, ROWS, MICRO, ROWS, 1, PROMPT, NEW)
        planned = forecast_of(setting_of(strategy, work), timed=False)
        trained = torch.arange(PROMPT + NEW).repeat(MICRO, 1) >= PROMPT
        tokens, count = torch.full((MICRO, PROMPT + NEW), 5), ROWS // MICRO // strategy.world.size
        batch = [Rows(tokens, trained)] * count
        loss_of = lambda hidden, rows: (fn.sft_loss(response_logprobs(actor, hidden, rows), ROWS * NEW), {})
        read = lambda hidden, rows: response_logprobs(actor, hidden, rows).sum()
        prompts = [[5] * PROMPT] * (ROWS // strategy.world.size)
        with Alive() as alive:
            stream = strategy.prepare(actor)
            for phase, run in {
                "train": lambda: strategy.step(stream, batch, loss_of, lr=1e-3),
                "score": lambda: strategy.evaluate(stream, batch, read),
                "rollout": lambda: generate(actor.decoder, prompts, Sampling(max_new_tokens=NEW), eos_ids=[]),
            }.items():
                alive.peak = 0
                with strategy.phase(phase):
                    run()
                if strategy.world.first:
                    print(json.dumps([dtype, recompute, phase, planned.phases[phase]["device"] / alive.peak]))
strategy.world.leave()
"""


def plan(stage="sft", **flags):
    return setting_of(PlanConfig(model="8b", stage=stage, **flags))


def test_shards_and_gathers_by_hand():
    """8b in bf16: 8.26e9 weights, of which a rank of n keeps 4 + 8 + 4 bytes per n, and gathers 2 per step twice."""
    config = presets.named("8b")
    for strategy, nodes, shards in (("fsdp", 1, 16), ("fsdp", 2, 16), ("hsdp", 2, 8)):
        forecast = forecast_of(plan(strategy=strategy, world=16, nodes=nodes))
        weights = forecast.objects["weights"]["device"] * shards / 4
        assert weights == pytest.approx(8.26e9, rel=0.01)
        assert forecast.objects["optimizer"]["device"] == pytest.approx(8 * weights / shards, rel=0.01)
        root = config.vocab_size * config.d_model * (1 if config.tied else 2)  # is gathered once in a step
        expected = (2 * 2 * (weights - root) + 2 * root + 4 * weights) * (shards - 1) / shards
        if shards < 16:  # two copies' gradients are summed over machines
            expected += 4 * weights / shards
        assert forecast.traffic["train"]["ranks"] == pytest.approx(expected, rel=0.01)


def test_a_rollout_gathers_all_once_where_it_fits_and_every_block_for_every_token_where_not():
    """Then the root comes three times: for the embedding, the last norm, and the head."""
    config = presets.named("8b")
    root = 2 * config.vocab_size * config.d_model * (1 if config.tied else 2)
    for memory, fits in ((None, True), ("24GB", False)):
        setting = plan(stage="ppo", strategy="fsdp", world=16, device_memory=memory, rollout_batch_size=2)
        forecast, (answers,) = forecast_of(setting), passes(setting)["rollout"]
        assert answers.times == 2
        assert forecast.gathers_once == fits
        visits = answers.times * (answers.prefills + answers.tokens)
        expected = 2 * 8.26e9 if fits else visits * (2 * 8.26e9 + 2 * root)
        assert forecast.traffic["rollout"]["ranks"] == pytest.approx(expected * 15 / 16, rel=0.01)
        for phase in ("rollout", "score"):  # what is leased is gathered before it is used
            seconds = forecast.seconds[phase]
            assert seconds.total == pytest.approx(seconds.compute + seconds.network)


def test_a_rollout_that_gathers_once_fits_where_its_own_peak_does():
    """Gradients, a tenth of it, are gone by then; CUDA's libraries are a few percent."""
    flags = {"stage": "ppo", "strategy": "fsdp", "world": 4, "micro_batch_size": 1}
    peak = forecast_of(plan(**flags)).phases["rollout"]["device"]
    for share, fits in ((1.03, True), (0.97, False)):
        assert forecast_of(plan(**flags, device_memory=f"{int(share * peak)}B")).gathers_once == fits


def test_an_update_touches_what_is_trained_alone():
    forecast = forecast_of(plan(strategy="fsdp", world=8, lora=16))
    nbytes = forecast.objects["optimizer"]["device"] * 3.5  # two moments and the weights, read and written; gradients
    assert forecast.seconds["train"].optimizer == pytest.approx(nbytes / 1.5e12)


def test_what_a_checkpoint_is_written_from_is_counted_where_host_memory_has_room_for_it():
    forecast = forecast_of(plan(strategy="fsdp", world=16))
    states = forecast.objects["weights"]["device"] + forecast.objects["optimizer"]["device"]
    assert forecast.objects["checkpoints"] == {"host": states}
    assert {phase["host"] for phase in forecast.phases.values()} == {states}
    narrow = plan(strategy="fsdp", world=16, host_memory="1GB")
    result = as_dict(narrow, forecast_of(narrow))
    assert result["predicted"]["host"] == 0
    assert "checkpoints keep training waiting: --host-memory has no room" in result["notes"][-1]


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(UserError, match="--nodes 3: does not divide --world 16"):
        plan(strategy="hsdp", world=16, nodes=3)
    with pytest.raises(UserError, match="--nodes 0: must be at least 1"):
        plan(strategy="hsdp", world=16, nodes=0)
    for flags in ({"base_dtype": "nf4", "lora": 8}, {"chunk_size": "64MB"}, {"activation_budget": "1GB"}):
        flag = f"--{next(iter(flags)).replace('_', '-')}"
        with pytest.raises(UserError, match=f"{flag} with --strategy fsdp"):
            plan(strategy="fsdp", world=2, **flags)
        setting = plan(strategy="gemini", world=2, **flags)
        assert not {change.strategy for change in on_this_machine(setting)} & {*PYTORCH}
        assert plan(strategy="fsdp", **flags).world == 1  # which gemini runs
    with pytest.raises(UserError, match="--dry-run"):
        dry_run(plan(strategy="fsdp", world=2))


def test_what_two_ranks_hold_is_what_was_planned(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    lines = torchrun(tmp_path / "worker.py", PYTHONPATH=f"{ROOT / 'src'}:{ROOT}").splitlines()
    assert len(lines) == 12
    for line in lines:
        *case, ratio = json.loads(line)
        assert 1.0 <= ratio <= 1.15, (case, ratio)
