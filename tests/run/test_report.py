"""The page of a run, and of several with their curves in the same pictures."""

import pytest
import tomli_w

from penstock.run.metrics import to_json
from penstock.run.report import Curves, Figures, RunFiles, Samples, Table, Text, page, sections_of


def write_run(path, losses, *, command="sft", left=0.0, **files):
    """A run directory with these losses, a held-out loss every second step, and more rows by the name of their file."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.toml").write_text(tomli_w.dumps({"command": command, "lr": 1e-5 * len(losses), "out": str(path)}))
    rows = {
        "metrics": [
            {"step": step, "loss": loss, "constant": 1} | ({"heldout/loss": loss + 1} if step % 2 == 0 else {})
            for step, loss in enumerate(losses, start=1)
        ],
        "perf": [
            {"step": step, "perf/host_peak_bytes": 2e9, "timing/left_seconds": left}
            for step in range(1, len(losses) + 1)
        ],
    }
    for name, lines in (rows | files).items():
        (path / f"{name}.jsonl").write_text("".join(to_json(row) + "\n" for row in lines))
    return path


def greedy(step, response, score=None):
    return {"step": step, "kind": "greedy", "prompt": "<p>", "response": response, "score": score}


def test_a_run_alone_has_its_figures_answers_and_curves(tmp_path):
    path = write_run(tmp_path / "one", [3.0, 2.0, 1.0, 0.5], left=75.0, samples=[greedy(0, "a"), greedy(4, "b", 1.0)])
    figures, samples, curves, config = sections_of({"one": RunFiles.read(path)})
    assert figures == Figures(
        {"loss": "0.5\nfrom 3", "held-out loss": "1.5\nfrom 3", "peak host memory": "2.00 GB", "time left": "0:01:15"}
    )
    assert samples == Samples(
        "Answers before and after", [("<p>", {"before": ("a", None), "after 4 steps": ("b", 1.0)})]
    )
    training, held_out = ([1, 2, 3, 4], [3.0, 2.0, 1.0, 0.5]), ([2, 4], [3.0, 1.5])
    assert curves == Curves("Learning", {"loss": {"training": training, "held-out": held_out}})
    assert config == Table("Configuration", ["flag", "value"], [["--lr", "4e-05"], ["--out", str(path)]], folded=True)
    assert "time left" not in str(sections_of({"": RunFiles.read(write_run(tmp_path / "ended", [3.0, 2.0]))}))


def test_several_runs_are_side_by_side_and_their_curves_in_one_picture(tmp_path):
    health = [{"step": 3, "text": "kl jump: 9 nats"}]
    paths = {
        "a": write_run(tmp_path / "a", [3.0, 2.0], samples=[greedy(0, "x")], health=health),
        "b": write_run(tmp_path / "b", [4.0, 1.0, 0.5, 0.4], command="dpo", samples=[greedy(0, "y"), greedy(4, "z")]),
    }
    warning, table, samples, curves, config = sections_of({name: RunFiles.read(path) for name, path in paths.items()})
    assert warning == Text("a: from step 3: kl jump: 9 nats", loud=True)
    assert (table.header, table.rows[0]) == (["", "a", "b"], ["loss", "2, from 3", "0.4, from 4"])
    ((prompt, answers),) = samples.rows
    assert prompt == "<p>"
    assert {who: text for who, (text, _) in answers.items()} == {
        "a, before": "x",
        "b, before": "y",
        "b, after 4 steps": "z",
    }
    assert curves.pictures == {"loss": {
        "a": ([1, 2], [3.0, 2.0]), "b": ([1, 2, 3, 4], [4.0, 1.0, 0.5, 0.4]), "b, held-out": ([2, 4], [2.0, 1.4]),
    }}  # fmt: skip
    assert config.header == ["flag", "a", "b"]
    assert ["--lr", "2e-05", "4e-05"] in config.rows
    assert "&lt;p&gt;" in page("t", "s", [samples])


def test_pictures_that_are_drawn_already_are_taken(tmp_path):
    curves = Curves("Learning", {"loss": {"loss": ([1, 2], [2.0, 1.0])}})
    pictures = {}
    first = page("t", "s", [curves], pictures)
    assert pictures["Learning/loss"] in first
    assert 'src="drawn"' in page("t", "s", [curves], {"Learning/loss": "drawn"})


@pytest.mark.parametrize("count", [0, 1])
def test_a_run_that_has_hardly_begun_has_a_page(tmp_path, count):
    run = RunFiles.read(write_run(tmp_path / "run", [1.0] * count))
    assert run.steps == count
    assert "Configuration" in page("t", "s", sections_of({"run": run}))


def test_a_word_of_a_table_stays_whole_and_a_path_may_be_broken():
    text = page("t", "s", [Table("T", ["stage", "run"], [["reward", "/a/long/path/of/some/run"]])])
    assert '<td>reward</td><td class="long">/a/long/path/of/some/run</td>' in text
