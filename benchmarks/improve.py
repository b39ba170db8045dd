"""The loop with simulated users: `penstock improve` round after round, some of whose votes are flipped.

    python -m benchmarks improve [demo] [--seeds 3] [--first-seed 3] [--rounds-per-seed 5] [--processes 2]
    python -m benchmarks improve smollm2 [--seeds 3] [--rounds-per-seed 5] [--labels 240]

Users ask the served model, get two answers, and vote for the one that a hidden gold taste, plus noise, likes more; some
give a thumb to a single answer. Votes go into a server's database, and each round runs the command. One round of each
seed is poisoned: all its votes are flipped. Gold measures every version on questions that nobody votes on. What
has been run is kept under .real and is not run again. The rule that promotes was made on seeds 0 to 2, so the default
begins behind them.
"""

import functools
import json
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.facts import run_measures
from benchmarks.real.runs import RUNS
from penstock.commands.config import GenerateConfig
from penstock.commands.demo_toy import HELDOUT, LABEL_NOISE, taught
from penstock.commands.generate import answered
from penstock.commands.improve.command import settled
from penstock.commands.improve.config import ImproveConfig
from penstock.commands.improve.labels import write
from penstock.commands.improve.rounds import improve_once
from penstock.data import filmland
from penstock.data.records import Prompt
from penstock.data.toyland import Toyland
from penstock.run.versions import Versions
from penstock.serve.store import Store, open_store

THUMBS = 0.2
"""Share of questions whose user gives a thumb to the first answer instead of comparing two."""
Gold = Callable[[str, str, bool], float]
"""(question, answer, whether it ended) -> how good it is."""


class World(NamedTuple):
    """Who asks what, and what they like."""

    questions: list[str]
    heldout: list[str]
    gold: Gold
    noise: float
    """Standard deviation of a user's judgement, in units of gold."""
    thumb: float
    """What a user gives thumbs up from."""
    tokens: int
    """Of an answer at most."""


Answers = list[list[tuple[str, str]]]
"""Per question its answers: text, and why it ended."""


def answers(model: str, questions: Sequence[str], count: int, seed: int, tokens: int) -> Answers:
    """Sampled answers of a model to each question as a user's turn."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = [Prompt(where="-", messages=({"role": "user", "content": text},)) for text in questions]
        file = write(Path(folder) / "prompts.jsonl", prompts)
        config = GenerateConfig(model=model, data=str(file), n=count, seed=seed, max_new_tokens=tokens, batch_size=64)
        lines = [line for _, line in answered(config, lambda text: None)[1]]
    rows = [(line["response"], line["finish_reason"]) for line in lines]
    return [rows[i : i + count] for i in range(0, len(rows), count)]


def golds(model: str, world: World, seed: int) -> list[float]:
    """Gold of a model's answer to each held-out question."""
    rows = answers(model, world.heldout, 1, seed, world.tokens)
    return [world.gold(q, *_judged(row[0])) for q, row in zip(world.heldout, rows, strict=True)]


def _judged(answer: tuple[str, str]) -> tuple[str, bool]:
    return answer[0], answer[1] == "stop"


def vote(store: Store, model: str, world: World, asked: Sequence[str], rng: random.Random, flipped: bool) -> None:
    """Users ask, and vote; `flipped`: for what they like less."""
    rows = answers(model, asked, 2, rng.randrange(2**31), world.tokens)
    for question, pair in zip(asked, rows, strict=True):
        conversation = store.add_conversation("", "")["id"]
        message = store.add_message(conversation, None, "user", question)["id"]
        shown = [store.add_message(conversation, message, "assistant", text, model="live") for text, _ in pair]
        ended = [{**row, "content": text, "finish_reason": why} for row, (text, why) in zip(shown, pair, strict=True)]
        store.save_answers(ended)
        liking = [world.gold(question, *_judged(answer)) + rng.gauss(0.0, world.noise) for answer in pair]
        if rng.random() < THUMBS:
            store.vote_thumb(shown[0]["id"], 1 if (liking[0] > world.thumb) != flipped else -1)
        else:
            better = int(liking[1] > liking[0]) ^ int(flipped)
            store.vote_pair((shown[0]["id"], shown[1]["id"]), shown[better]["id"])


def rounds(out: Path, start: str, world: World, seed: int, count: int, labels: int, **flags: Any) -> list[dict]:
    """Rounds of one seed: decision, why, gold of the candidate and of what was served before, and the difference's
    standard error. A second call goes on behind the rounds that OUT/rounds.json has."""
    done = out / "rounds.json"
    rows = json.loads(done.read_text(encoding="utf-8")) if done.exists() else []
    store, poisoned = open_store(str(out / "serve"), None), 2 + seed % max(count - 1, 1)
    known: dict[str, list[float]] = {}
    for number in range(len(rows) + 1, count + 1):
        rng = random.Random(f"users {seed} {number}")
        asked = [rng.choice(world.questions) for _ in range(labels)]
        served = Versions(out / "live").model(Versions(out / "live").current) if number > 1 else start
        known[served] = known.get(served) or golds(served, world, seed)
        if not (voted := out / f"voted-{number}").exists():  # else a round that was stopped has them
            vote(store, served, world, asked, rng, number == poisoned)
            voted.touch()
        first = {"model": start, "data_dir": str(out / "serve"), "seed": seed, **flags} if number == 1 else {}
        config, versions = settled(ImproveConfig(run=str(out / "live"), device="cpu", quiet=True, **first))
        row = improve_once(config, versions, functools.partial(print, file=sys.stderr, flush=True))
        assert row is not None
        result = {"round": number, "poisoned": number == poisoned, "decision": row["decision"], "why": row["why"]}
        result |= {
            name: row[name] for name in ("state", "way", "examined", "agreement", "answers", "memory") if name in row
        }
        result |= {"seconds": round(row["seconds"], 1), "gold_before": statistics.mean(known[served])}
        if "model" in row:
            made = versions.model(row["version"])
            known[made] = golds(made, world, seed)
            change = [a - b for a, b in zip(known[made], known[served], strict=True)]
            result |= {"gold_candidate": statistics.mean(known[made]), "gold_change": statistics.mean(change)}
            result["gold_change_se"] = statistics.stdev(change) / math.sqrt(len(change))
        rows.append(result)
        done.write_text(json.dumps(rows), encoding="utf-8")
        shown = ("round", "poisoned", "decision", "way", "gold_before", "gold_change")
        print({name: result.get(name) for name in shown}, flush=True)
    store.close()
    return rows


def verdicts(seeds: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """What the rounds of all seeds show."""
    flat = [row for rows in seeds for row in rows]
    honest = [row for row in flat if not row["poisoned"]]
    promoted = [row for row in honest if row["decision"] == "promoted"]
    return {
        "honest_rounds": len(honest), "promoted": len(promoted),
        "promoted_and_gold_rose": sum(row["gold_change"] > 0 for row in promoted),
        "promoted_and_gold_fell_by_two_errors": sum(
            row["gold_change"] < -2 * row["gold_change_se"] for row in promoted
        ),
        "poisoned_rounds": len(flat) - len(honest),
        "poisoned_rounds_promoted": sum(row["poisoned"] and row["decision"] == "promoted" for row in flat),
        "gold_first_and_last": [[rows[0]["gold_before"], _last_gold(rows)] for rows in seeds],
    }  # fmt: skip


def _last_gold(rows: Sequence[dict[str, Any]]) -> float:
    """Gold of what is served after the last round."""
    last = rows[-1]
    return float(last["gold_candidate"] if last["decision"] == "promoted" else last["gold_before"])


def campaign(run: Callable[..., list[dict]], seeds: range, count: int, labels: int, processes: int) -> dict[str, Any]:
    """The rounds of all seeds, so many at once, and what they show."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        results = [*pool.map(functools.partial(kept, run, count=count, labels=labels), seeds)]
    return {"labels_per_round": labels, "first_seed": seeds.start, "seeds": results, **verdicts(results)}


def kept(run: Callable[..., list[dict]], seed: int, **sizes: int) -> list[dict]:
    """The rounds of a seed: those that were run before, and the others."""
    out = RUNS / f"improve-{run.__name__}-{seed}-{'-'.join(map(str, sizes.values()))}"
    out.mkdir(parents=True, exist_ok=True)
    return run(out, seed, **sizes)


def demo(
    seeds: int = 3, first_seed: int = 3, rounds_per_seed: int = 5, labels: int = 1000, processes: int = 1
) -> dict[str, Any]:
    """The demo's world: animals, and a hidden gold that likes true, short, friendly answers."""
    return campaign(demo_seed, range(first_seed, first_seed + seeds), rounds_per_seed, labels, processes)


def demo_seed(out: Path, seed: int, count: int, labels: int) -> list[dict[str, Any]]:
    """The rounds of one seed, from a model that demonstrations have taught."""
    world = Toyland(seed)
    trained_on, heldout = world.split(seed, HELDOUT)
    _, tuned = taught(out, seed, world, trained_on, random.Random(f"demo {seed}"))
    asking, held = ([q.prompt.strip() for q in side] for side in (trained_on[1500:], heldout))
    users = World(asking, held, gold_of(world, {q.prompt.strip(): q for q in world.questions}), LABEL_NOISE, 1.5, 40)
    return rounds(out, str(tuned), users, seed, count, labels, max_length=64)


def gold_of(world: Any, asked: dict[str, Any]) -> Gold:
    """Of a world of the demo's. asked: its questions by their texts."""
    return lambda question, text, ended: world.gold(asked[question], text, ended)


def smollm2(
    seeds: int = 3, first_seed: int = 3, rounds_per_seed: int = 5, labels: int = 240, processes: int = 1
) -> dict[str, Any]:
    """SmolLM2-135M-Instruct writes about films; the hidden gold is Filmland's: VADER's sentiment, briefly said."""
    return campaign(smollm2_seed, range(first_seed, first_seed + seeds), rounds_per_seed, labels, processes)


def smollm2_seed(out: Path, seed: int, count: int, labels: int) -> list[dict[str, Any]]:
    """The rounds of one seed, in LoRA. The judge reads each comparison once: more taught it no more."""
    from tests.smollm2 import directory

    world = filmland.Filmland()
    asking, held = ([q.text for q in side] for side in world.split(seed, 96))
    users = World(asking, held, gold_of(world, {q.text: q for q in world.questions}), filmland.LABEL_NOISE, 0.45, 32)
    settings = ("reward.lr=5e-4", "reward.epochs=1")
    flags = {"max_length": 128, "learns": "lora", "lr": 2e-4, "epochs": 2, "dtype": "bf16", "set": settings}
    return rounds(out, str(directory()), users, seed, count, labels, **flags)


def main(arguments: list[str]) -> int:
    """Runs the measures that are named."""
    return run_measures(arguments, __doc__, {"demo": demo, "smollm2": smollm2}, "improve", "transformers", "numpy")
