"""`penstock eval`: who wins, how sure that is, and what length has to do with it."""

import http.server
import json
import math
import os
import threading

import numpy
import pytest
import torch

from penstock.commands import evaluate
from tests.conftest import cli

REWARD = """
def score(prompts, responses, response_ids, **_):
    return [float(sum(ids)) for ids in response_ids]
"""


@pytest.fixture
def files(tmp_path, tiny_model, make_tokenizer, jsonl):
    """Two models with a tokenizer, prompts, and a reward function."""
    first, second = tiny_model("first", seed=0, vocab_size=320), tiny_model("second", seed=1, vocab_size=320)
    make_tokenizer("first")
    make_tokenizer("second")
    (tmp_path / "reward.py").write_text(REWARD)
    data = jsonl([{"prompt": f"Say {word} to me"} for word in "abcdefghijklmnop"])
    return first, second, ("--data", data, "--max-new-tokens", 6), ("--reward-fn", f"{tmp_path / 'reward.py'}:score")


def result_of(capsys, *arguments):
    assert cli("eval", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_win_rate_is_that_of_the_scores(files, capsys):
    first, second, data, reward = files
    alone = [result_of(capsys, model, *data, *reward)["score"] for model in (first, second)]
    both = result_of(capsys, first, "--against", second, *data, *reward)
    assert [both["score"], both["score_against"]] == alone
    assert both["prompts"] == 16
    assert both["win_rate"] == pytest.approx((both["wins"] + both["ties"] / 2) / 16)
    swapped = result_of(capsys, second, "--against", first, *data, *reward)
    assert swapped["win_rate"] == pytest.approx(1 - both["win_rate"])
    assert swapped["win_rate_length_controlled"] == pytest.approx(1 - both["win_rate_length_controlled"])
    same = result_of(capsys, first, "--against", first, *data, *reward)
    assert (same["win_rate"], same["ties"]) == (0.5, 16)
    assert same["win_rate_interval"] == pytest.approx([0.403, 0.597], abs=1e-3)


def test_a_prompt_that_is_asked_twice_is_compared_with_its_own_repetition(files, capsys):
    first, _, (_, data, *more), reward = files
    twice = result_of(capsys, first, "--against", first, "--data", f"{data}*2", *more, *reward, "--temperature", 1)
    assert (twice["prompts"], twice["ties"], twice["left_out"], twice["longer_by"]) == (32, 32, 0, 0)


def test_a_judge_that_counts_letters_is_seen_through():
    rng = numpy.random.default_rng(0)
    lengths = rng.normal(40, 50, size=400)
    outcomes = (rng.random(400) < 1 / (1 + numpy.exp(-lengths / 40))).astype(float)
    assert outcomes.mean() > 0.65
    assert abs(evaluate.length_controlled(outcomes, lengths) - 0.5) < 0.05
    better = (rng.random(400) < 0.8).astype(float)  # whatever its length
    assert evaluate.length_controlled(better, rng.normal(0, 50, size=400)) == pytest.approx(better.mean(), abs=0.03)
    assert evaluate.length_controlled(better, numpy.zeros(400)) == better.mean()
    assert math.isfinite(evaluate.length_controlled((lengths > 100).astype(float), lengths - 100))


def test_the_rate_at_equal_length_is_that_of_torchs_logistic_regression():
    rng = numpy.random.default_rng(0)
    lengths = rng.normal(100, 50, size=400)  # most answers are longer, so that it is a guess at the edge
    outcomes = (rng.random(400) < 1 / (1 + numpy.exp(1 - lengths / 40))).astype(float)
    columns = torch.stack([torch.ones(400), torch.tanh(torch.tensor(lengths / lengths.std()))], dim=1).double()
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        total = entropy(columns @ weights, torch.tensor(outcomes), reduction="sum")
        total = total + evaluate.RIDGE / 2 * weights.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    wanted = torch.sigmoid(weights[0]).item()
    assert wanted < 0.3 < outcomes.mean()
    assert evaluate.length_controlled(outcomes, lengths) == pytest.approx(wanted, abs=1e-6)


class Judge(http.server.BaseHTTPRequestHandler):
    """Answers as an OpenAI-compatible server, with what `server.verdict` says of the two answers."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        first, second = text.rsplit("Answer A:\n", 1)[1].rsplit("\n\nAnswer B:\n", 1)
        message = {"role": "assistant", "content": self.server.verdict(first, second.rstrip("\n"))}
        answer = {
            "id": "1", "object": "chat.completion", "created": 1, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        }  # fmt: skip
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def judge():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (lambda first, second: "[[A]]" if first >= second else "so: [[B]]", None),
        (lambda first, second: "It is always [[A]].", 0.5),  # the first one, whatever it is: a contradiction
        (lambda first, second: "[[A]] or [[B]]? [[tie]]", 0.5),
    ],
)
def test_a_judge_reads_both_orders(files, capsys, judge, verdict, expected):
    judge.verdict = verdict
    first, second, data, _ = files
    flags = ("--judge", f"http://127.0.0.1:{judge.server_port}/v1", "--judge-model", "m")
    result = result_of(capsys, first, "--against", second, *data, *flags)
    assert (result["by"], result["without_verdict"]) == ("m", 0)
    if expected is None:
        assert result["wins"] + result["ties"] <= 16
        other = result_of(capsys, second, "--against", first, *data, *flags)
        assert other["win_rate"] == pytest.approx(1 - result["win_rate"])
    else:
        assert (result["win_rate"], result["ties"]) == (expected, 16)


def test_pairs_without_a_verdict_are_left_out_and_counted(files, capsys, judge):
    first, second, data, _ = files
    flags = ("--judge", f"http://127.0.0.1:{judge.server_port}/v1", "--judge-model", "m")
    judge.verdict = lambda first, second: "I cannot say."
    assert cli("eval", first, "--against", second, *data, *flags) == 3
    assert "16 of 16 pairs have no verdict; an answer of the judge has no verdict in it" in capsys.readouterr().err


def test_a_run_keeps_what_was_measured_and_its_report_and_card_show_it(files, tmp_path, capsys, jsonl):
    first, second, data, reward = files
    out = tmp_path / "run"
    prompts = data[1]
    rows = jsonl([{"prompt": "a", "response": "b"}] * 2, name="rows.jsonl")
    flags = ("--steps", 1, "--batch-size", 1, "--heldout", 0, "--max-length", 24)
    assert cli("sft", "--model", first, "--data", rows, "--out", out, *flags) == 0
    for _ in range(2):
        assert cli("eval", out, "--against", second, "--data", prompts, "--max-new-tokens", 6, *reward) == 0
    assert len((out / "evaluations.jsonl").read_text().splitlines()) == 2
    assert (out / "report.html").read_text().count("reward.py:score") >= 2
    assert cli("export", out, "--out", tmp_path / "exported") == 0
    assert "| second |" in (tmp_path / "exported" / "README.md").read_text()


LM_EVAL = {  # as lm-eval 0.4.13 writes it, cut down; a group has no samples of its own
    "results": {
        "arc_easy": {"alias": "arc_easy", "acc,none": 0.37, "acc_stderr,none": 0.0485, "sample_len": 100},
        "sums": {"alias": "sums", "exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A"},
        "everything": {"alias": "everything", "acc,none": 0.3},
    },
    "n-samples": {"arc_easy": {"original": 2376, "effective": 100}, "sums": {"original": 8, "effective": 8}},
    "date": 1764500000.0,
}
OLDER = {"results": {"old": {"acc,none": 0.1, "ppl,none": float("inf"), "exact_match,none": 1}}, "n-samples": {}}


def test_a_run_keeps_what_lm_eval_measured(files, tmp_path, capsys, jsonl):
    first, _, _, _ = files
    out, scores = tmp_path / "run", tmp_path / "scores" / "served"
    rows = jsonl([{"prompt": "a", "response": "b"}] * 2, name="rows.jsonl")
    flags = ("--steps", 1, "--batch-size", 1, "--heldout", 0, "--max-length", 24)
    assert cli("sft", "--model", first, "--data", rows, "--out", out, *flags) == 0
    scores.mkdir(parents=True)
    (scores / "results_2026-11-30T10-00-00.json").write_text(json.dumps(LM_EVAL))
    older = scores / "results_2026-11-30T09-00-00.json"
    older.write_text(json.dumps(OLDER))
    os.utime(older, (1, 1))
    capsys.readouterr()
    assert cli("eval", out, "--lm-eval", tmp_path / "scores") == 0
    assert "arc_easy, lm-eval acc: 0.3700" in capsys.readouterr().out
    assert cli("export", out, "--out", tmp_path / "exported") == 0
    for page in (out / "report.html", tmp_path / "exported" / "README.md"):
        text = page.read_text()
        assert "100 of arc_easy" in text
        assert "0.370 +- 0.049" in text
        assert "lm-eval exact_match (strict)" in text
        assert "all of everything" in text
        assert "of old" not in text
    assert cli("eval", out, "--lm-eval", older) == 0
    printed, errors = capsys.readouterr()
    assert "old, lm-eval exact_match: 1.0000" in printed
    assert "old, ppl: is inf and is not kept" in errors
    assert cli("eval", out, "--lm-eval", scores, "--out", tmp_path / "result.json") == 2
    assert "--out: is not used with --lm-eval" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        (None, "has no results_*.json"),
        ("[]", "is no result of lm-eval"),
        ('{"results": {"a": 1}}', "is no result"),
        ('{"results": {}, "n-samples": {}}', "has no figure of any task"),
    ],
)
def test_what_lm_eval_did_not_write_is_refused(tmp_path, capsys, written, complaint):
    if written:
        (tmp_path / "results_1.json").write_text(written)
    (tmp_path / "config.toml").write_text('command = "sft"\n')
    assert cli("eval", tmp_path, "--lm-eval", tmp_path) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())
    assert cli("eval", tmp_path / "model", "--lm-eval", tmp_path / "results_1.json") == 2
    assert "is no run directory" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ((), "eval needs a score"),
        (("--judge", "http://127.0.0.1:1/v1"), "add --against MODEL"),
        (("--judge", "http://127.0.0.1:1/v1", "--reward-fn", "length"), "goes without --reward"),
        (("--judge-model", "m", "--reward-fn", "length"), "--judge-model m: nothing asks it"),
    ],
)
def test_what_cannot_be_measured_is_refused(files, capsys, flags, complaint):
    first, _, data, _ = files
    assert cli("eval", first, *data, *flags) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())


def test_a_result_that_cannot_be_written_is_printed_and_kept_by_the_run(files, tmp_path, capsys, jsonl):
    first, _, data, reward = files
    out = tmp_path / "run"
    rows = jsonl([{"prompt": "a", "response": "b"}] * 2, name="rows.jsonl")
    flags = ("--steps", 1, "--batch-size", 1, "--heldout", 0, "--max-length", 24)
    assert cli("sft", "--model", first, "--data", rows, "--out", out, *flags) == 0
    capsys.readouterr()
    assert cli("eval", out, *data, *reward, "--out", tmp_path / "nowhere" / "result.json", "--json") == 2
    printed, errors = capsys.readouterr()
    assert json.loads(printed.splitlines()[-1])["prompts"] == 16
    assert f"--out {tmp_path / 'nowhere' / 'result.json'}: cannot be written" in " ".join(errors.split())
    assert len((out / "evaluations.jsonl").read_text().splitlines()) == 1
