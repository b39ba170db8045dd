"""The labelling room with several labellers at once, over HTTP, and their agreement beside another implementation's.

`python -m benchmarks serve labelling` runs this against the real command. Labellers rank answers by a hidden quality
and noise of their own; some skip an item, and some take a judgement back and judge again.
"""

import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.security import Ask, bearer

EACH = 2
"""Labellers per item."""
GOLD_EVERY = 20
SKIPS, UNDOES = 0.02, 0.05
"""Shares of items."""
NOISE = 0.35
"""Standard deviation of a labeller's judgement; qualities are uniform in 0 .. 1."""
ROUNDS = 5
"""Times that labellers come to look whether something is left."""
TIE = 0.1
"""Answers that look as equal as that are tied."""
SECRETS = (b"gold", b"quality", b"accuracy", b"alpha", b"model")
"""Words that nothing which a labeller gets may have in it."""


class Hands:
    """Who holds what now, and what was wrong with that."""

    def __init__(self) -> None:
        self.lock, self.holders = threading.Lock(), Counter[str]()
        self.most, self.seconds, self.refused, self.leaks = 0, list[float](), 0, 0
        self.done: Counter[str] = Counter()

    def take(self, prompt: str) -> None:
        with self.lock:
            self.holders[prompt] += 1
            self.most = max(self.most, self.holders[prompt] * (not prompt.startswith("known")))

    def give(self, prompt: str, did: str) -> None:
        with self.lock:
            self.holders[prompt] -= 1
            self.done[did] += 1


def items_of(count: int, rng: random.Random, kind: str) -> list[dict[str, Any]]:
    """Prompts with 2 to 9 answers, whose text says their quality: from 0.000 to 0.999."""
    items = []
    for i in range(count):
        answers = [f"{quality / 1000:.3f}" for quality in rng.sample(range(1000), rng.randint(2, 9))]
        order = sorted(range(len(answers)), key=lambda place: -float(answers[place]))
        items.append({"prompt": f"{kind} {i}", "responses": answers} | ({"ranking": order} if kind == "known" else {}))
    return items


def work(ask: Ask, token: str, rng: random.Random, hands: Hands) -> list[str]:
    """One labeller, until nothing is left: the prompts that came, in order."""

    def call(path: str, body: Any = None) -> dict[str, Any]:
        started = time.perf_counter()
        reply = ask("POST", f"/api/label/{path}", body, bearer(token))
        with hands.lock:
            hands.seconds.append(time.perf_counter() - started)
            hands.refused += reply.status != 200
            hands.leaks += any(word in reply.body for word in SECRETS)
        return json.loads(reply.body)

    seen = []
    while (item := call("next")["item"]) is not None:
        seen.append(item["prompt"])
        hands.take(item["prompt"])
        if rng.random() < SKIPS:
            hands.give(item["prompt"], "skipped")
            call(f"items/{item['id']}", {"outcome": "skipped"})
            continue
        judgement = {"outcome": "ranked", "ranking": ranking(item["answers"], rng)}
        hands.give(item["prompt"], "ranked")
        call(f"items/{item['id']}", judgement)
        if rng.random() < UNDOES:
            item = call("undo")["item"]
            hands.take(item["prompt"])
            hands.give(item["prompt"], "undone")
            call(f"items/{item['id']}", {"outcome": "ranked", "ranking": ranking(item["answers"], rng)})
    return seen


def ranking(answers: Sequence[str], rng: random.Random) -> list[list[int]]:
    """Best first; answers that look alike share a place."""
    looks = [float(answer) + rng.gauss(0.0, NOISE) for answer in answers]
    levels: list[list[int]] = []
    for place in sorted(range(len(answers)), key=lambda i: -looks[i]):
        if levels and looks[levels[-1][0]] - looks[place] < TIE:
            levels[-1].append(place)
        else:
            levels.append([place])
    return levels


def campaign(ask: Ask, key: str, count: int, labellers: int, directory: Path) -> dict[str, Any]:
    """All items by all labellers at once, and what the room's export and figures say afterwards."""
    rng, owner = random.Random(0), bearer(key)
    ask("PATCH", "/api/labelling", {"labellers_per_item": EACH, "gold_every": GOLD_EVERY}, owner)
    for items, gold in ((items_of(count, rng, "item"), False), (items_of(count // 20, rng, "known"), True)):
        for first in range(0, len(items), 500):
            body = {"items": items[first : first + 500], "gold": gold}
            reply = ask("POST", "/api/labelling/items", body, owner)
            assert reply.status == 201, reply.body
    names = [f"labeller {i}" for i in range(labellers)]
    tokens = [json.loads(ask("POST", "/api/labelling/labellers", {"name": n}, owner).body)["token"] for n in names]
    hands, started = Hands(), time.perf_counter()
    rngs, seen = [random.Random(f"labeller {i}") for i in range(labellers)], [list[str]() for _ in range(labellers)]
    with ThreadPoolExecutor(labellers) as threads:
        for _ in range(ROUNDS):  # an item that its last holder skips is left when all others have gone home
            for i, more in enumerate(threads.map(lambda i: work(ask, tokens[i], rngs[i], hands), range(labellers))):
                seen[i] += more
            figures = json.loads(ask("GET", "/api/labelling", None, owner).body)
            if not figures["open_items"]:
                break
    spent = time.perf_counter() - started
    exported = ask("GET", "/api/labelling/export", None, owner).body.decode().splitlines()
    lines = [json.loads(line) for line in exported]
    judged = Counter(line["prompt"] for line in lines)
    units = units_of(lines)
    reference = reference_alpha(units, directory)
    return {
        "labellers": labellers, "items": count, "judgements": len(lines),
        "items_with_two": sum(times == EACH for times in judged.values()), "items_open": figures["open_items"],
        "twice_by_the_same": len(lines) - len({(line["prompt"], line["labeller"]) for line in lines}),
        "given_twice": sum(times > 1 for prompts in seen for times in Counter(prompts).values()),
        "most_hands_at_once": hands.most, "answers_that_leaked": hands.leaks, "refused": hands.refused,
        "done": dict(hands.done), "known_items_judged": sum(row["gold_ranked"] for row in figures["labellers"]),
        "seconds_taken": round(spent, 1), "requests": len(hands.seconds),
        "request_ms_p50": round(1000 * statistics.median(hands.seconds), 2),
        "request_ms_p99": round(1000 * statistics.quantiles(hands.seconds, n=100)[-1], 2),
        "alpha": figures["alpha"], "alpha_of_the_package": reference["alpha"], "package": reference["version"],
        "alpha_difference": abs(figures["alpha"] - reference["alpha"]),
    }  # fmt: skip


def units_of(lines: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Of each answer of each item the places that labellers gave it, worked out from the export alone: 0 the best, 1
    the worst, ties in the middle."""
    by_prompt: dict[str, list[dict[str, float]]] = {}
    for line in lines:
        places, better, answers = dict[str, float](), 0, line["responses"]
        for level in line["ranking"]:
            for answer in level:
                places[answers[answer]] = (better + (len(level) - 1) / 2) / (len(answers) - 1)
            better += len(level)
        by_prompt.setdefault(line["prompt"], []).append(places)
    return [[ranking[answer] for ranking in rankings] for rankings in by_prompt.values() for answer in rankings[0]]


ASKED = """
import importlib.metadata, json, sys, numpy, krippendorff
units = json.load(sys.stdin)
most = max(map(len, units))
table = numpy.array([unit + [float("nan")] * (most - len(unit)) for unit in units], dtype=float).T
alpha = krippendorff.alpha(reliability_data=table, level_of_measurement="ordinal")
print(json.dumps({"alpha": float(alpha), "version": "krippendorff " + importlib.metadata.version("krippendorff")}))
"""


def reference_alpha(units: Sequence[Sequence[float]], directory: Path) -> dict[str, Any]:
    """What PyPI's package says of the same units, in an environment of its own."""
    subprocess.run([sys.executable, "-m", "venv", str(directory / "reference")], check=True)
    python = str(directory / "reference" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "krippendorff"], check=True)
    done = subprocess.run([python, "-c", ASKED], input=json.dumps(units), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)
