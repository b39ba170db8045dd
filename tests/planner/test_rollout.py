"""What a rollout fetches and holds: an actor that stays, and a packed copy that answers."""

import pytest

from penstock.cli import main
from penstock.models import weight_shapes
from penstock.models.lora_targets import LoraSpec
from tests.planner.test_planning import (
    BASE,
    FAMILIES,
    LLAMA,
    assert_near,
    dry,
    forecast,
    on_one_base,
    real,
    work,
)


@pytest.mark.parametrize(("device", "once"), [(7_380_000, True), (7_300_000, False)])
def test_a_rollout_whose_slots_hold_the_actor_fetches_it_once(tmp_path, device, once):
    """As the engine does, to the byte; of 7 chunks the smaller budget holds 6."""
    planned, moved = forecast(work(), "gemini_cpu", device=device), real(work(), "gemini_cpu", tmp_path, device=device)
    assert planned.gathers_once is once
    nbytes = planned.traffic["rollout"]["host_read"]
    assert nbytes == moved["traffic"]["rollout"]["host_read"]
    assert (nbytes < 1.01 * 4 * weight_shapes.count_of(BASE, scalar=False)) is once


@pytest.mark.parametrize(
    ("strategy", "dtype", "world", "device", "of"),
    [
        ("gemini_cpu", "bf16", 1, 4_900_000, work(rollout_dtype="int8")),
        ("gemini_cpu", "bf16", 1, None, work(rollout_dtype="nf4", prompt_length=4)),
        ("gemini_nvme", "fp32", 1, None, work(rollout_dtype="nf4", rollout_batch_size=3)),
        ("gemini_cpu", "bf16", 1, 4_900_000, work(rollout_dtype="fp8")),
        ("gemini", "bf16", 4, None, work(LLAMA, rollout_dtype="nf4")),
        ("ddp", "fp32", 1, None, on_one_base(work(rollout_dtype="int8"), LoraSpec(4))),
        ("gemini_cpu", "bf16", 1, None, work(FAMILIES["qwen3_moe"], rollout_dtype="int8", max_new_tokens=600)),
    ],
)
def test_a_copy_that_answers_is_foretold(strategy, dtype, world, device, of):
    """Its bytes beside the cache, and that the actor's weights come once to make it."""
    planned, measured = forecast(of, strategy, dtype, world, device), dry(of, strategy, dtype, world, device)
    assert_near(planned, measured)
    assert planned.gathers_once is (device is None and strategy != "ddp")
    assert planned.objects["rollout_copy"]["device"] > 0
    for key, nbytes in measured["traffic"]["rollout"].items():
        assert planned.traffic["rollout"][key] == nbytes, key


def test_the_plan_says_where_a_copy_would_answer_sooner(capsys):
    flags = "plan --model 8b --stage grpo --no-reward-model --strategy gemini_cpu --batch-size 16 --micro-batch-size 1"
    flags = flags.split()
    line = "with --rollout-dtype int8 a copy answers"
    texts = []
    for more in (["16GB"], ["16GB", "--rollout-dtype", "int8"], ["80GB"]):
        with pytest.raises(SystemExit) as stopped:
            main([*flags, "--device-memory", *more])
        assert not stopped.value.code
        texts.append(capsys.readouterr().out)
    assert [line in text for text in texts] == [True, False, False]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--stage", "sft"], "answers with no copy"),
        (["--lora", "4", "--base-dtype", "nf4"], "packed already"),
        (["--strategy", "fsdp", "--world", "2"], "take --strategy gemini"),
    ],
)
def test_the_plan_refuses_a_copy_where_the_command_does(flags, why, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--model", "s", "--rollout-dtype", "int8", *flags])
    assert why in capsys.readouterr().err
