"""What a trial of a few steps says of a whole stage."""

import json
import math
from pathlib import Path

import pytest

from penstock.commands.align import evaluation, trial
from penstock.commands.align.choice import Duration
from penstock.commands.align.evaluation import Judge
from penstock.commands.align.planning import StagePlan
from penstock.commands.align.stages import Stage, run_stage
from penstock.errors import ResourceError, UserError
from tests.conftest import comparisons, save_tiny, write_jsonl


def planned(**flags):
    return StagePlan(Stage("dpo", {"model": "m", "batch_size": 4, **flags}), Duration(100, 1.0, 0.0), {}, 400, "")


def test_steps_checkpoints_and_evaluations_are_told_apart(tmp_path):
    seconds = [5.0, 1.0, 1.0, 3.0, 2.0, 2.0]  # a slow start, a checkpoint's 2 s in the fourth, evaluations of 1 s
    rows = "".join(json.dumps({"step": i, "timing/step_seconds": s}) + "\n" for i, s in enumerate(seconds, 1))
    (tmp_path / "perf.jsonl").write_text(rows)
    whole = trial.extrapolated(planned(), tmp_path, 30.0, 20)
    # 18 s beside the five steps, 4 s of a slow start, 20 evaluations in 100 steps, one checkpoint before the last
    assert whole == Duration(100, 1.0, 18.0 + 4.0 + 20 * 1.0 + 2.0)
    rare = trial.extrapolated(planned(eval_every=50, checkpoint_every=10), tmp_path, 30.0, 20)
    assert rare.fixed == 18.0 + 4.0 + 2 * 1.0 + 9 * 2.0
    assert trial.extrapolated(planned(), tmp_path, 30.0, 0).fixed == 18.0 + 4.0 + 2.0


SCORES = [([0.5, math.nan], "must be a finite number"), ([1.0, 1.0], "nothing can be learned")]


def test_a_line_of_prompts_ends_at_its_newline_alone(tmp_path, monkeypatch):
    prompts, read = tmp_path / "prompts.jsonl", []
    prompts.write_text('{"prompt": "a\u2028b"}\n{"prompt": "c"}\n', encoding="utf-8")
    monkeypatch.setattr(
        evaluation, "answers_of", lambda config, _: read.append(Path(config.data).read_text("utf-8")) or []
    )
    evaluation.sampled(Judge(prompts, {"reward": "r"}), "m", 1)
    assert [json.loads(text) for text in read] == [{"prompt": "a\u2028b"}]


@pytest.mark.parametrize(("scores", "problem"), SCORES)
def test_scores_that_cannot_be_learned_from_are_refused(tmp_path, monkeypatch, scores, problem):
    lines = [{"score": score, "finish_reason": "stop"} for score in scores]
    monkeypatch.setattr(trial, "sampled", lambda *_: lines)
    with pytest.raises(UserError, match=problem):
        trial.score_sanity(Judge(tmp_path, {"reward_fn": ("number",)}), "model", learns_first=False)


def answers(scores):
    """`sampled` of a model whose answers to the held-out prompts have these scores."""
    return lambda judge, model, count: [{"score": score, "finish_reason": "stop"} for score in scores[:count]]


def test_a_task_that_is_seldom_solved_is_tried_on_all_prompts(tmp_path, monkeypatch):
    """Of 16 answers all are wrong in 44 % of trials of a model that is right once in 20."""
    monkeypatch.setattr(trial, "sampled", answers([0.0] * 20 + [1.0]))
    facts, count = trial.score_sanity(Judge(tmp_path, {"reward_fn": ("number",)}), "model", learns_first=False)
    assert count == 21
    assert "0 to 1" in facts[-1]


def test_equal_scores_of_the_start_are_a_fact_where_a_stage_teaches_first(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "sampled", answers([0.0] * 40))
    facts, count = trial.score_sanity(Judge(tmp_path, {"reward_fn": ("number",)}), "model", learns_first=True)
    assert (count, "0 to 0" in facts[-1]) == (trial.ASKED, True)


def test_a_loss_that_is_no_number_is_seen(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    with pytest.raises(ResourceError, match=r"loss is not finite after 1 steps; give a lower --set dpo\.lr"):
        trial.check_finite(planned().stage, tmp_path)


def test_a_stage_that_began_goes_on_with_its_own_flags(tmp_path):
    data = write_jsonl(tmp_path / "pairs.jsonl", comparisons(20))
    model = save_tiny(tmp_path / "model")
    flags = {"data": [data], "model": model, "batch_size": 4, "max_length": 32, "lr": 1e-3}
    path = run_stage(Stage("dpo", flags), tmp_path / "runs", steps=2, quiet=True)
    assert run_stage(Stage("dpo", flags | {"lr": 1.0}), tmp_path / "runs", steps=3) == path
    assert "lr = 0.001" in (path / "config.toml").read_text()
    with pytest.raises(UserError, match="is a run of penstock dpo, not of sft"):
        run_stage(Stage("sft", flags, name="dpo"), tmp_path / "runs")


def test_the_resumed_step_does_not_count_as_memory_of_the_stage(tmp_path, monkeypatch):
    """Its models may stand beside those of the run before: SmolLM2's trial took 7.4 GB, and its stage 4.0."""

    def filled(stage, root, **changes):
        held = bytearray(100_000_000 if changes["steps"] == trial.STEPS else 500_000_000)
        del held
        return root

    monkeypatch.setattr(trial, "run_stage", filled)
    monkeypatch.setattr(trial, "extrapolated", lambda *_: Duration(1, 1.0, 0.0))
    with trial.memory_meter() as before:
        pass
    (measured,) = trial.try_stages([planned()], tmp_path, lambda _: 0, print)
    if Path("/proc/self/clear_refs").exists():
        assert measured.peak_bytes < before[0] + 300_000_000


def test_the_peak_of_memory_is_that_of_a_block():
    with trial.memory_meter() as first:
        filled = bytearray(200_000_000)
        del filled
    with trial.memory_meter() as second:
        pass
    assert first[0] > 200_000_000
    if Path("/proc/self/clear_refs").exists():
        assert second[0] < first[0] - 150_000_000
