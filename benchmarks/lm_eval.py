"""lm-eval through our server against its own `hf` model on the same weights: the same scores.

    python -m benchmarks lm_eval [--model DIR ...] [--items 100]

Three local tasks that need no download: sums with four choices (multiple choice), the last word of a sentence
(loglikelihood), sums that are written (generate_until); the last one by `local-chat-completions` too, where the model
has a chat template. Each side answers all of them; compared are accuracies, and the log-likelihood of every item.
Without --model a tiny model with random weights. Needs lm-eval in an environment of its own: the python that
PENSTOCK_LM_EVAL_PYTHON names, or .peers/lm_eval, which is made where it is missing.
"""

import json
import os
import random
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import facts
from benchmarks.peers.run import environment_of
from benchmarks.serve import KEY, serving, small_model

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
KINDS = {
    "choice": ("multiple_choice", 'doc_to_choice: "{{choices}}"\nmetric_list:\n  - metric: acc'),
    "last_word": ("loglikelihood", "metric_list:\n  - metric: acc\n  - metric: perplexity"),
    "sums": (
        "generate_until",
        'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 8\n  do_sample: false\n'
        "filter_list:\n  - name: number\n    filter:\n      - function: regex\n        regex_pattern: '(-?\\d+)'\n"
        "      - function: take_first\nmetric_list:\n  - metric: exact_match",
    ),
}
WORKED = "".join(f"Question: What is {a} plus {b}?\nAnswer: {a + b}\n\n" for a, b in ((2, 3), (7, 1), (4, 4)))
SENTENCES = ("The cat sat on the|mat", "Water is made of hydrogen and|oxygen", "The capital of France is|Paris",
             "She opened the door and went|inside", "Two and two make|four", "The opposite of hot is|cold")  # fmt: skip


def write_tasks(directory: Path, items: int) -> None:
    """NAME.yaml and NAME.jsonl of each task."""
    rng = random.Random(0)
    for name, (kind, more) in KINDS.items():
        rows = []
        for i in range(items):
            a, b = rng.randrange(20), rng.randrange(20)
            question = f"Question: What is {a} plus {b}?\nAnswer:"
            if name == "choice":
                choices = [str(a + b + shift) for shift in (0, 1, 2, 10)]
                answer = rng.randrange(4)
                choices[0], choices[answer] = choices[answer], choices[0]
                rows.append({"question": question, "choices": choices, "answer": answer})
            elif name == "last_word":
                text, word = SENTENCES[i % len(SENTENCES)].split("|")
                rows.append({"question": f"{i}. {text}", "answer": f" {word}"})
            else:
                a, b = a % 8 + 1, b % 8 + 1
                rows.append({"question": f"{WORKED}Question: What is {a} plus {b}?\nAnswer:", "answer": str(a + b)})
        file = directory / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        task = TASK.format(name=name, kind=kind, file=file, more=more)
        (directory / f"{name}.yaml").write_text(task, encoding="utf-8")


def evaluated(directory: Path, side: str, model: str, arguments: str, *more: str) -> dict[str, Any]:
    """Of each task its metrics, and its items in order: log-likelihoods, and whether they are greedy, or texts."""
    names = ["sums"] if more else [*KINDS]
    python = os.environ.get("PENSTOCK_LM_EVAL_PYTHON") or str(environment_of("lm_eval"))
    out = directory / side
    command = [
        python, "-m", "lm_eval", "run", "--model", model, "--model_args", arguments, "--tasks", *names,
        "--include_path", str(directory), "--output_path", str(out), "--log_samples", "--device", "cpu",
        *more,
    ]  # fmt: skip
    environment = {**os.environ, "OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"lm-eval, {side}: {done.stderr[-2000:]}")
    (results,) = out.rglob("results_*.json")
    metrics = json.loads(results.read_text(encoding="utf-8"))["results"]
    items = {}
    for name in names:
        (file,) = out.rglob(f"samples_{name}_*.jsonl")
        samples = sorted(map(json.loads, file.read_text(encoding="utf-8").splitlines()), key=lambda row: row["doc_id"])
        items[name] = [sample["resps"] for sample in samples]
    return {"metrics": metrics, "items": items}


def compared(model: str, items: int) -> dict[str, Any]:
    """One model on both sides."""
    chats = (
        "chat_template" in (Path(model) / "tokenizer_config.json").read_text(encoding="utf-8")
        or (Path(model) / "chat_template.jinja").exists()
    )
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_tasks(directory, items)
        pretrained, template = f"pretrained={model},dtype=float32", "--apply_chat_template"
        theirs = evaluated(directory, "hf", "hf", pretrained)
        chat_of_theirs = evaluated(directory, "hf-chat", "hf", pretrained, template) if chats else None
        with serving(directory, f"served={model}", "--dtype", "fp32", "--max-length", "256") as server:
            url = f"base_url={server.address}/v1/completions,model=served,tokenizer={model},max_length=256"
            ours = evaluated(
                directory, "ours", "local-completions", f"{url},tokenized_requests=True,add_bos_token=True"
            )
            rows = {task: row_of(kind, task, ours, theirs) for task, (kind, _) in KINDS.items()}
            if chat_of_theirs:
                url = f"base_url={server.address}/v1/chat/completions,model=served"
                ours = evaluated(directory, "chat", "local-chat-completions", url, template)
                rows["sums, chat"] = row_of("generate_until", "sums", ours, chat_of_theirs)
    return rows


def row_of(kind: str, task: str, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """One task, compared."""
    pairs = list(zip(ours["items"][task], theirs["items"][task], strict=True))
    metrics = {
        key.partition(",")[0]: (value, theirs["metrics"][task][key])
        for key, value in ours["metrics"][task].items()
        if isinstance(value, float) and "stderr" not in key
    }
    row: dict[str, Any] = {"items": len(pairs), "ours_and_theirs": metrics}
    if kind == "generate_until":
        return row | {"same_text": sum(own == other for own, other in pairs) / len(pairs)}
    numbers = [
        (float(a[0]), float(b[0]), str(a[1]) == str(b[1]))
        for own, other in pairs
        for (a,), (b,) in zip(own, other, strict=True)
    ]
    row["largest_gap"] = max(abs(a - b) for a, b, _ in numbers)
    return row | {"same_greedy": sum(same for *_, same in numbers) / len(numbers)}


def main(arguments: list[str]) -> int:
    """Writes lm_eval.json; returns 1 where an accuracy differs, or a log-likelihood by more than 1e-3."""
    parser = facts.flags(__doc__)
    parser.add_argument("--model", nargs="*", default=[], help="Hugging Face directories; a tiny model comes first")
    parser.add_argument("--items", type=int, default=100, help="of each task")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for model in [small_model(Path(name)), *options.model]:
            results["tiny" if model.startswith(name) else Path(model).name] = compared(model, options.items)
            print(json.dumps(results, indent=1), flush=True)
    facts.write("lm_eval", {"models": results}, "transformers")
    exact = ("acc", "exact_match")
    good = all(
        row.get("largest_gap", 0) <= 1e-3
        and all(own == other for key, (own, other) in row["ours_and_theirs"].items() if key in exact)
        for rows in results.values()
        for row in rows.values()
    )
    return int(not good)
