"""The demo's small world: a base model is made and taught on Toyland, without a download.

Only the base model's corpus, the demonstrations and the labels come from the world.
"""

import dataclasses
import random
from pathlib import Path
from typing import Any

import torch

from penstock.commands.align.stages import Stage, run_stage
from penstock.commands.demo_runs import SMALL, Lesson, flags_of_run, write_lines
from penstock.data.toyland import Question, Toyland, save_tokenizer
from penstock.models import presets, pretrained
from penstock.models.decoder import Decoder

HELDOUT = 256
"""Questions that nothing is trained on."""
LABEL_NOISE = 0.7
"""Standard deviation of a labeller's judgement, in units of gold."""


def toy(seed: int) -> Lesson:
    """Four answers to each of 1,500 questions are ranked, and PPO answers the rest."""
    world = Toyland(seed)
    trained_on, heldout = world.split(seed, HELDOUT)
    ppo = {"lr": 3e-4, "critic_lr": 1e-3, "batch_size": 64, "micro_batch_size": 64, "epochs": 2, "steps": 28}
    sampled = {"lr": 3e-4, "steps": 28, "max_new_tokens": SMALL.tokens, "heldout": 0.0}
    groups = {**sampled, "batch_size": 64, "micro_batch_size": 64, "epochs": 2, "group_size": 8, "samples": 8}
    # A small model learns at ten to a hundred times the defaults, at less of it where labels are learned from.
    compared: dict[str, dict[str, Any]] = {
        "grpo": {**groups, "kl_coef": 0.2},  # rewards are in units of a group's deviation, about a half
        "rloo": {**groups, "advantage": "rloo", "kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.1},
        "dpo": {"lr": 5e-5, "beta": 0.1},
        "online dpo": {**sampled, "online": True, "beta": 0.1},
        "kto": {"lr": 3e-5, "beta": 0.1},
    }
    return Lesson(
        world=world,
        trained_on=trained_on,
        heldout=heldout,
        labelled=slice(1500, 3000),
        practised=slice(3000, None),
        noise=LABEL_NOISE,
        teach=lambda out, rng: taught(out, seed, world, trained_on, rng),
        reward={"lr": 3e-4, "batch_size": 16, "micro_batch_size": 64, "heldout": 0.15, "eval_every": 40},
        ppo={**ppo, "kl_coef": 0.1, "samples": 64},
        compared=compared,
        how=SMALL,
        says="A small world of animals and people who ask about them. A base model learned plain text; SFT learned to "
        "answer from demonstrators of mixed care. A good answer is true, to the point, friendly, not too long.",
    )


def taught(out: Path, seed: int, world: Toyland, trained_on: list[Question], rng: random.Random) -> tuple[Path, Path]:
    """The runs of a base model and of stage 1, which learns to answer from demonstrations."""
    data, untrained = out / "data", out / "untrained"
    data.mkdir(parents=True, exist_ok=True)

    # The base model has read about animals but never answered anybody.
    corpus = [world.text(rng) for _ in range(9600)]
    demonstrators = [(q, world.demonstration(q, rng)) for q in trained_on[:1500]]
    save_untrained(untrained, corpus[:2000] + [q.prompt + a for q, a in demonstrators[:500]], seed)
    write_lines(data / "corpus.jsonl", [{"prompt": "", "response": text} for text in corpus])
    flags = {"model": str(untrained), "lr": 5e-3, "heldout": 0.02, "samples": 0}
    base = run_stage(Stage("sft", {**flags_of_run(data / "corpus.jsonl", seed), **flags}, name="base"), out)

    write_lines(data / "demonstrations.jsonl", [{"prompt": q.prompt, "response": a} for q, a in demonstrators])
    flags = {"lr": 1.5e-3, "epochs": 3, "max_new_tokens": SMALL.tokens}
    tuned = run_stage(Stage("sft", {**flags_of_run(data / "demonstrations.jsonl", seed), **flags}, begins="base"), out)
    return base, tuned


def save_untrained(directory: Path, texts: list[str], seed: int) -> None:
    """A small model with random weights, and a tokenizer made from the texts."""
    tokenizer = save_tokenizer(directory, texts)
    architecture = dataclasses.replace(
        presets.named("s"), vocab_size=len(tokenizer), d_model=160, num_layers=3, num_heads=5, num_kv_heads=5,
        head_dim=32, d_ff=640, max_length=64,
        hf={name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")},
    )  # fmt: skip
    pretrained.save(Decoder(architecture, generator=torch.Generator().manual_seed(seed)), directory)
