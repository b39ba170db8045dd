"""Runs of the demo's small world: their flags, their answers, and how far a model has moved."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from penstock.algorithms import functional as fn
from penstock.algorithms.experience import logprobs_of, scoring_batches
from penstock.algorithms.setup import encoder_of
from penstock.commands.config import GenerateConfig
from penstock.commands.generate import generate as answer_file
from penstock.config import DataFlags
from penstock.data.records import Prompt
from penstock.data.toyland import Question
from penstock.models.roles import Actor
from penstock.rollout.engine import Answer, generate
from penstock.rollout.sampling import Sampling
from penstock.run.directory import resolve_model
from penstock.run.metrics import read_lines

RESPONSE_TOKENS = 40
BEST_OF = 8
"""Answers of the SFT model from which the reward model takes one: what PPO has to beat at an eighth of the price."""


def flags_of_run(data: Path, seed: int) -> dict[str, Any]:
    """Of a stage on a file of rows of at most 64 tokens, which keeps its last checkpoint."""
    placement = {"strategy": "ddp", "dtype": "fp32", "checkpoint_every": 10_000, "keep": 1}
    return {"data": str(data), "max_length": 64, "seed": seed, "batch_size": 32, "micro_batch_size": 32, **placement}


def answer(run: Path, questions: list[Question], sampling: Sampling) -> tuple[list[Answer], list[tuple[str, bool]]]:
    """Sampled answers of a run's model to each question, `sampling.n` side by side: as they are, and (text, ended by
    itself)."""
    source = resolve_model(str(run))
    actor = Actor.from_pretrained(source).eval()
    encoder = encoder_of(source, actor.decoder.config, DataFlags((), max_length=64), reserve=RESPONSE_TOKENS)
    prompts = [encoder.encode_prompt(Prompt(prompt=q.prompt, where="toyland")) for q in questions]
    answers = generate(actor.decoder, prompts, sampling, eos_ids=encoder.eos_ids, batch_size=256)
    return answers, [(encoder.decode(a.response_ids), a.finish_reason == "stop") for a in answers]


def kl_of(answers: Sequence[Answer], reference: Path) -> float:
    """KL of the model that gave these answers from a run's model, nats per answer: k1 on its own samples."""
    actor = Actor.from_pretrained(resolve_model(str(reference))).eval()
    with torch.no_grad():
        (rows,) = scoring_batches(answers, len(answers), torch.device("cpu"))
        reference_logprobs, _ = logprobs_of(actor, actor(rows.tokens, rows.prompt_lengths + rows.lengths), rows, 1.0)
    logprobs = fn.unpack(torch.tensor([p for answer in answers for p in answer.logprobs]), rows.lengths)
    return float((logprobs - reference_logprobs).sum()) / len(answers)


def best_of(out: Path, run: Path, questions: list[Question], judge: Path, seed: int) -> list[tuple[str, bool]]:
    """Per question the answer, of `BEST_OF`, that the reward model likes most: (text, ended by itself)."""
    asked, answered = out / "data" / "heldout.jsonl", out / "data" / "best-of.jsonl"
    write_lines(asked, [{"prompt": question.prompt} for question in questions])
    answer_file(
        GenerateConfig(
            model=str(run), data=str(asked), out=str(answered), reward=str(judge), best_of=BEST_OF, seed=seed,
            max_new_tokens=RESPONSE_TOKENS, batch_size=256,
        )
    )  # fmt: skip
    return [(row["response"], row["finish_reason"] == "stop") for row in read_lines(answered)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
