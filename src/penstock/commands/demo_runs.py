"""Runs of the demo: their flags, their answers, and how far a model has moved."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from penstock.algorithms import functional as fn
from penstock.algorithms.experience import logprobs_of, scoring_batches
from penstock.algorithms.reward import score_rows
from penstock.algorithms.setup import encoder_of
from penstock.commands.config import GenerateConfig
from penstock.commands.generate import generate as answer_file
from penstock.config import DataFlags
from penstock.data.records import Prompt
from penstock.memory.strategy import Strategy
from penstock.models.roles import Actor, RewardModel
from penstock.rollout.engine import Answer, generate, load
from penstock.rollout.sampling import Sampling
from penstock.run.directory import resolve_model
from penstock.run.metrics import read_lines

Question = Any
"""What a world's questions have: `prompt`, as the data format holds it, and `text`, as people read it."""


@dataclass(frozen=True)
class Answering:
    """How a demo's models answer; the default is the small world's."""

    tokens: int = 40
    """Of an answer at most."""
    max_length: int = 64
    """Of prompt and answer together."""
    batch_size: int = 256
    dtype: Literal["fp32", "bf16"] = "fp32"
    best_of: int = 8
    """Answers of the SFT model from which the reward model takes one: what PPO has to beat at a fraction of the
    price."""


SMALL = Answering()


class World(Protocol):
    """Questions, and a hidden gold function that says how good an answer is."""

    @property
    def questions(self) -> Sequence[Question]:
        """All of them."""

    def gold(self, question: Question, answer: str, ended: bool = True) -> float:
        """`ended`: by itself. No model is trained on it (PPO.md 25)."""


@dataclass(frozen=True)
class Lesson:
    """What a demo teaches, to whom and from what: all in which the small world and the real model differ."""

    world: World
    trained_on: Sequence[Question]
    heldout: Sequence[Question]
    """Questions that nothing is trained on."""
    labelled: slice
    """Of `trained_on`: those whose answers are ranked."""
    practised: slice
    """Those that PPO answers."""
    noise: float
    """Standard deviation of a labeller's judgement, in units of gold."""
    teach: Callable[[Path, random.Random], tuple[Path, Path]]
    """(directory, random numbers) -> the base model, and the run of stage 1, which learned from demonstrations."""
    reward: Mapping[str, Any]
    """Flags of stage 2."""
    ppo: Mapping[str, Any]
    """Flags of stage 3."""
    compared: Mapping[str, Mapping[str, Any]]
    """Flags of the algorithms that --algorithms compares, by name (demo_algorithms.KINDS)."""
    how: Answering
    says: str
    """What it is, for the report."""


def flags_of_run(data: Path, seed: int) -> dict[str, Any]:
    """Of a stage on a file of rows of at most 64 tokens, which keeps its last checkpoint."""
    placement = {"strategy": "ddp", "dtype": "fp32", "checkpoint_every": 10_000, "keep": 1}
    return {"data": str(data), "max_length": 64, "seed": seed, "batch_size": 32, "micro_batch_size": 32, **placement}


def answer(
    run: Path, questions: Sequence[Question], seed: int, n: int = 1, how: Answering = SMALL
) -> tuple[list[Answer], list[tuple[str, bool]]]:
    """`n` sampled answers of a run's model to each question, side by side: as they are, and (text, ended by itself)."""
    source = resolve_model(str(run))
    _, actor = load(source, how.dtype)
    encoder = encoder_of(source, actor.decoder.config, DataFlags((), max_length=how.max_length), reserve=how.tokens)
    prompts = [encoder.encode_prompt(prompt_of(question)) for question in questions]
    sampling = Sampling(max_new_tokens=how.tokens, n=n, seed=seed)
    answers = generate(actor.decoder, prompts, sampling, eos_ids=encoder.eos_ids, batch_size=how.batch_size)
    return answers, [(encoder.decode(a.response_ids), a.finish_reason == "stop") for a in answers]


def prompt_of(question: Question) -> Prompt:
    """The question as a record: text, or a user's turn."""
    if isinstance(question.prompt, str):
        return Prompt(prompt=question.prompt, where="question")
    return Prompt(messages=tuple(question.prompt), where="question")


def kl_of(answers: Sequence[Answer], reference: Path) -> float:
    """KL of the model that gave these answers from a run's model, nats per answer: k1 on its own samples."""
    actor = Actor.from_pretrained(resolve_model(str(reference))).eval()
    with torch.no_grad():
        (rows,) = scoring_batches(answers, len(answers), torch.device("cpu"))
        reference_logprobs, _ = logprobs_of(actor, actor(rows.tokens, rows.prompt_lengths + rows.lengths), rows, 1.0)
    logprobs = fn.unpack(torch.tensor([p for answer in answers for p in answer.logprobs]), rows.lengths)
    return float((logprobs - reference_logprobs).sum()) / len(answers)


def proxies(judge: Path, answers: Sequence[Answer], how: Answering = SMALL) -> list[float]:
    """What a run's reward model, which reads the tokens of these answers, says of each."""
    strategy = Strategy.named("naive", dtype=how.dtype)
    with strategy.init():
        model = RewardModel.trained(resolve_model(str(judge))).eval().requires_grad_(False)
    rows = [answer.prompt_ids + answer.response_ids for answer in answers]
    return score_rows(strategy, strategy.prepare(model), rows, how.batch_size)


def best_of(
    out: Path, run: Path, questions: Sequence[Question], judge: Path, seed: int, how: Answering = SMALL
) -> list[tuple[str, bool]]:
    """Per question the answer, of several, that the reward model likes most: (text, ended by itself)."""
    asked, answered = out / "data" / "heldout.jsonl", out / "data" / "best-of.jsonl"
    write_lines(asked, [{"prompt": question.prompt} for question in questions])
    answered.unlink(missing_ok=True)  # of a demo that was stopped
    answer_file(
        GenerateConfig(
            model=str(run), data=str(asked), out=str(answered), reward=str(judge), best_of=how.best_of, seed=seed,
            max_new_tokens=how.tokens, batch_size=how.batch_size, dtype=how.dtype,
        )
    )  # fmt: skip
    return [(row["response"], row["finish_reason"] == "stop") for row in read_lines(answered)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
