"""The demo's own decisions; the demo itself is measured by `python -m benchmarks demo` and by `make demo`."""

import json
import signal

import pytest

from penstock.commands import demo
from penstock.commands.config import DemoConfig
from penstock.commands.demo import SeedResult, noise_ceiling, over_optimised, page_of, write_lines
from penstock.data.toyland import Toyland
from penstock.errors import UserError
from penstock.run.session import StoppedError

FACTS = {
    "seed": 0, "base_gold": 0.1, "sft_gold": 1.0, "best_of_gold": 1.5, "ppo_gold": 2.0, "gold_se": 0.1,
    "base_se": 0.1, "sft_se": 0.08, "best_of_se": 0.05, "ppo_se": 0.06, "best_of": 8, "heldout": 256,
    "rm_accuracy": 0.7, "rm_ceiling": 0.8, "kl": 3.0, "seconds": 100.0,
}  # fmt: skip
STEPS = list(range(20))


def result(seed=0, gold=STEPS, proxy=STEPS):
    curves = {"gold (hidden) and proxy scores": {"gold": (STEPS, gold), "proxy": (STEPS, proxy)}}
    return SeedResult({**FACTS, "seed": seed}, curves, [("Q?", {"base": ("no", -1.0), "ppo": ("yes", 2.0)})])


def test_over_optimisation_is_said_aloud():
    falling = [-x for x in STEPS]
    assert over_optimised({"gold": (STEPS, falling), "proxy": (STEPS, STEPS)})
    assert not over_optimised({"gold": (STEPS, STEPS), "proxy": (STEPS, STEPS)})
    assert not over_optimised({"gold": (STEPS, falling), "proxy": (STEPS, falling)})
    assert "over-optimisation" in page_of([result(gold=falling)], "Animals.")
    assert "over-optimisation" not in page_of([result()], "Animals.")


def test_scatter_is_no_over_optimisation():
    """The second half of a demo in which gold ended at 2.63, from 1.34: its last three steps alone are lower."""
    gold = [2.41, 2.74, 2.47, 2.48, 2.32, 2.52, 2.51, 2.57, 2.31, 2.36, 2.66, 2.53, 2.64, 2.09]
    proxy = [1.03, 0.86, 0.95, 1.05, 1.18, 1.05, 1.11, 1.12, 1.02, 1.16, 0.94, 0.95, 1.02, 1.07]
    steps = list(range(28))
    assert not over_optimised({"gold": (steps, [1.0] * 14 + gold), "proxy": (steps, [0.1] * 14 + proxy)})
    falling = [y - 0.06 * step for step, y in enumerate(gold)]
    rising = [y + 0.02 * step for step, y in enumerate(proxy)]
    assert over_optimised({"gold": (steps, [1.0] * 14 + falling), "proxy": (steps, [0.1] * 14 + rising)})


def test_the_page_shows_every_seed_and_needs_nothing_from_outside(drawn):
    page = page_of([result(0), result(1)], "Animals.")
    assert "+10.0" in page  # PPO above SFT in standard errors
    assert "+1.00 +/- 0.16" in page  # 1.96 standard errors
    assert "Animals." in page
    assert page.count("data:image/png") == 2
    assert "http://" not in page
    assert "https://" not in page


def test_the_noise_ceiling_is_what_gold_itself_would_reach(tmp_path):
    world = Toyland(0)
    question = world.questions[0]
    fact = world.facts[question.animal][question.attribute]
    good = world.sentence(f"The {question.animal}", question.attribute, fact)
    row = {"prompt": question.prompt, "responses": [good, "Look it up yourself.", ""]}
    write_lines(tmp_path / "c.jsonl", [{**row, "ranking": [[0], [1], [2]]}, {**row, "ranking": [[0, 1], [2]]}])
    # golds 2, -2.5, -1: pairs 0>1 right, 0>2 right, 1>2 wrong; then 0>2 right, 1>2 wrong
    assert noise_ceiling(world, tmp_path / "c.jsonl") == pytest.approx(3 / 5)


def test_a_directory_that_no_demo_made_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no demo made it"):
        demo.demo(DemoConfig(out=str(tmp_path)))
    assert (tmp_path / "thesis.txt").exists()


def test_a_stopped_demo_with_other_flags_is_replaced_and_with_its_own_goes_on(tmp_path, monkeypatch, capsys):
    out, seen = tmp_path / "demo", []

    def stop(directory, seed, lesson, algorithms):
        seen.append((directory / "left").exists())
        (directory / "left").touch()
        raise StoppedError("stopped", signal.SIGTERM)

    monkeypatch.setattr(demo, "one_seed", stop)
    for seed, json_too in ((0, False), (0, True), (1, True), (1, False)):
        with pytest.raises(StoppedError):
            demo.demo(DemoConfig(out=str(out), seed=seed, json=json_too))
    assert seen == [False, True, False, True]
    assert capsys.readouterr().err.count("goes on with the demo") == 2


def test_reports_of_all_seeds_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "one_seed", lambda out, seed, lesson, algorithms: result(seed))
    left = tmp_path / "demo" / "left"
    for _ in range(2):  # the second replaces what the first made
        demo.demo(DemoConfig(out=str(tmp_path / "demo"), seeds=3, seed=5))
        assert not left.exists()
        left.touch()
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert [one["seed"] for one in report["seeds"]] == [5, 6, 7]
    assert set(report["seeds"][0]) == set(FACTS)
    assert (tmp_path / "demo" / "report.html").exists()
    line = "seed 7: gold base +0.10 +/- 0.20, sft +1.00 +/- 0.16, best of 8 +1.50 +/- 0.10, ppo +2.00 +/- 0.12 (95 %"
    assert line in capsys.readouterr().out
