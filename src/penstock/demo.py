"""`penstock demo`: base model, SFT, labellers, reward model, PPO, and an honest report, on Toyland.

Every stage runs as a user would run it, through the same functions and run directories; only the base model's corpus,
the demonstrations and the labels come from Toyland. Gold scores are measured here, on questions that no stage ever
saw, and shown to nobody else (PPO.md 25).
"""

import dataclasses
import json
import math
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from penstock.algorithms.ppo import ppo
from penstock.algorithms.reward import reward
from penstock.algorithms.sft import sft
from penstock.config import DataFlags, DemoConfig, OptimFlags, PPOConfig, RewardConfig, RunFlags, SFTConfig
from penstock.data.toyland import Question, Toyland, ranking, ranks, save_tokenizer
from penstock.errors import UserError
from penstock.models.decoder import Decoder
from penstock.models.families import gpt2
from penstock.models.roles import Actor
from penstock.rollout.engine import Answer, generate
from penstock.rollout.sampling import Sampling
from penstock.run.directory import resolve_model
from penstock.run.metrics import peak_rss_bytes

HELDOUT = 256
"""Questions that nothing is trained on."""
LABEL_NOISE = 0.7
"""Standard deviation of a labeller's judgement, in units of gold."""
RESPONSE_TOKENS = 40
MARK = ".penstock-demo"
"""Only a directory that holds this file is ever replaced."""


def demo(config: DemoConfig) -> Path:
    """Runs all seeds and writes report.html and report.json in `config.out`."""
    out = Path(config.out)
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise UserError(f"--out {out}: is not empty and no demo made it; choose another --out.")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()
    results = []
    for seed in range(config.seed, config.seed + config.seeds):
        here = out if config.seeds == 1 else out / f"seed-{seed}"
        results.append(one_seed(here, seed))
        result = results[-1].facts
        print(
            f"seed {seed}: gold base {result['base_gold']:+.2f}, sft {result['sft_gold']:+.2f}, "
            f"ppo {result['ppo_gold']:+.2f} (se {result['gold_se']:.2f}); reward model {result['rm_accuracy']:.3f} of "
            f"{result['rm_ceiling']:.3f}; kl {result['kl']:.1f} nats; {result['seconds']:.0f} s",
            flush=True,
        )
    report = {"seeds": [one.facts for one in results], "peak_rss_bytes": peak_rss_bytes()}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    from penstock.demo_report import write

    write(out / "report.html", results, report)
    print(json.dumps(report) if config.json else f"wrote {out / 'report.html'}")
    return out


@dataclasses.dataclass
class SeedResult:
    """One repetition: the facts of report.json, where its runs are, and answers to look at."""

    facts: dict[str, Any]
    path: Path
    answers: dict[str, list[Answer]]
    texts: dict[str, list[str]]
    golds: dict[str, list[float]]
    questions: list[Question]
    curve: list[tuple[int, float]]
    """(PPO step, gold on rollouts of that step): measured afterwards from samples, never trained on."""


def one_seed(out: Path, seed: int) -> SeedResult:
    """The whole way once."""
    started = time.perf_counter()
    world, rng = Toyland(seed), random.Random(f"demo {seed}")
    trained_on, heldout = world.split(seed, HELDOUT)
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)

    # A base model that has read about animals but never answered anybody.
    corpus = [world.text(rng) for _ in range(12_000)]
    demonstrators = [(q, world.demonstration(q, rng)) for q in trained_on[:1500]]
    untrained = out / "untrained"
    tokenizer = save_tokenizer(untrained, corpus[:2000] + [q.prompt + a for q, a in demonstrators[:500]])
    architecture = dataclasses.replace(
        gpt2.size("s"), vocab_size=len(tokenizer), d_model=192, num_layers=3, num_heads=6, num_kv_heads=6,
        head_dim=32, d_ff=768, max_length=64, eos_id=tokenizer.eos_token_id,
    )  # fmt: skip
    Decoder(architecture, generator=torch.Generator().manual_seed(seed)).save_pretrained(untrained)
    bos = [tokenizer.bos_token_id]
    write_lines(data / "corpus.jsonl", [{"prompt_ids": bos, "response_ids": tokenizer(t).input_ids} for t in corpus])
    base = sft(
        SFTConfig(
            model=str(untrained),
            data=DataFlags(data=(str(data / "corpus.jsonl"),), max_length=64),
            run=RunFlags(out=str(out / "base"), seed=seed, checkpoint_every=10_000, keep=1),
            optim=OptimFlags(lr=3e-3, batch_size=64, micro_batch_size=64),
            heldout=0.02, samples=0,
        )
    )  # fmt: skip

    # Stage 1: demonstrations.
    write_lines(data / "demonstrations.jsonl", [{"prompt": q.prompt, "response": a} for q, a in demonstrators])
    tuned = sft(
        SFTConfig(
            model=str(base),
            data=DataFlags(data=(str(data / "demonstrations.jsonl"),), max_length=64),
            run=RunFlags(out=str(out / "sft"), seed=seed, checkpoint_every=10_000, keep=1),
            optim=OptimFlags(lr=5e-4, batch_size=32, micro_batch_size=32, epochs=2),
            max_new_tokens=RESPONSE_TOKENS,
        )
    )

    # Stage 2: labellers rank K = 4 answers of the SFT model by gold plus noise; the reward model sees ranks only.
    asked = trained_on[1500:2300]
    sampled = answer(tuned, asked, Sampling(max_new_tokens=RESPONSE_TOKENS, n=4, seed=seed + 1))
    comparisons = []
    for question, four in zip(asked, sampled, strict=True):
        golds = [world.gold(question, text, ended) for text, ended in four]
        labels = ranks(golds, LABEL_NOISE, rng)
        comparisons.append(
            {"prompt": question.prompt, "responses": [text for text, _ in four], "ranking": ranking(labels)}
        )
    write_lines(data / "comparisons.jsonl", comparisons)
    judge = reward(
        RewardConfig(
            model=str(tuned),
            data=DataFlags(data=(str(data / "comparisons.jsonl"),), max_length=64),
            run=RunFlags(out=str(out / "reward"), seed=seed, checkpoint_every=10_000, keep=1),
            optim=OptimFlags(lr=5e-4, batch_size=16, micro_batch_size=64, epochs=2),
            heldout=0.2, eval_every=20,
        )
    )  # fmt: skip

    # Stage 3: PPO sees prompts and the reward model.
    write_lines(data / "prompts.jsonl", [{"prompt": q.prompt} for q in trained_on[2300:]])
    aligned = ppo(
        PPOConfig(
            actor=str(tuned), reward=str(judge),
            data=DataFlags(data=(str(data / "prompts.jsonl"),), max_length=64),
            run=RunFlags(out=str(out / "ppo"), seed=seed, checkpoint_every=10_000, keep=1),
            optim=OptimFlags(lr=2e-4, batch_size=64, micro_batch_size=64, epochs=4, steps=40),
            critic_lr=5e-4, max_new_tokens=RESPONSE_TOKENS, kl_coef=0.05,
        )
    )  # fmt: skip
    return measure(out, seed, world, heldout, {"base": base, "sft": tuned, "ppo": aligned}, judge, started)
