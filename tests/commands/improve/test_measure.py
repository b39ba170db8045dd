"""What a candidate may not get worse at."""

from penstock.commands.improve import measure
from penstock.commands.improve.config import ImproveConfig


def test_small_leads_that_turn_round_are_a_regression_and_a_lead_that_shrinks_is_none(monkeypatch, jsonl):
    """The margin is of the share in the right order, as its help says."""
    file = jsonl([{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(40)])
    leads = {"start": 3.0, "candidate": 2.8, "turned": -0.04, "little": 0.04}
    monkeypatch.setattr(
        measure, "answer_logprobs",
        lambda kind, records, model, *_: (records, [[(leads[model], 1), (0.0, 1)] for _ in records]),
    )  # fmt: skip
    config = ImproveConfig.of(run="r", regression=(file,))
    for models, met in ((("candidate", "start", "start"), True), (("turned", "little", "little"), False)):
        checks = measure.regressions(config, measure.Models(*models), (None, None))
        assert [check.passed for check in checks] == [met, met]
