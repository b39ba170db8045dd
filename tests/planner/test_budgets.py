"""Whatever the algorithm and the budget: it is kept, or refused before anything runs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.commands.dry_run import dry_run
from penstock.errors import ResourceError
from penstock.models.config import DecoderConfig
from penstock.planner.config import PlanConfig
from penstock.planner.from_flags import workload_of
from penstock.planner.workload import Setting, forecast_of
from tests.planner.test_planning import BASE

STAGES = ["sft", "reward", "ppo", "grpo", "dpo", "kto", "distill"]


def workload(stage: str, lora: bool, shape: DecoderConfig = BASE):
    flags = {"stage": stage, "batch_size": 8, "micro_batch_size": 2, "prompt_length": 24, "max_new_tokens": 16}
    options = {"group_size": 4} | ({"teacher_model": "s"} if stage == "distill" else {})
    return workload_of(PlanConfig(model="s", lora=4 if lora else None, **flags, **options), shape)


@pytest.mark.parametrize("stage", STAGES)
@settings(max_examples=3)
@given(
    name=st.sampled_from(["gemini_cpu", "gemini_nvme", "gemini_auto", "zero2_cpu"]),
    dtype=st.sampled_from(["fp32", "bf16"]),
    lora=st.booleans(),
    share=st.floats(0.1, 1.2),
)
def test_any_device_budget_is_kept_or_refused(stage, name, dtype, lora, share):
    work = workload(stage, lora)

    def setting(device):
        return Setting(work, name, dtype, budgets={"device": device, "host": None, "disk": None})

    device = int(share * forecast_of(setting(None), timed=False).peak["device"])
    planned = forecast_of(setting(device), timed=False).peak["device"]
    try:
        taken = dry_run(setting(device))["device"]
    except ResourceError:
        taken = None
    assert planned > device if taken is None else taken <= device
