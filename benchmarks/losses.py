"""Ours against TRL's newest release on the same batches: log-probabilities, advantages, losses, gradients.

    python -m benchmarks losses [--keep]

TRL's side (peers/trl_losses.py) runs its own trainers in an environment of its own, on tiny random models of two
families that it saves; ours reads the models and the rows, and takes the steps that our commands take, in smaller
micro-batches. A difference is the largest of both families. Ends with 1 where one that no note explains is above 1e-4.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.facts import flags, write
from benchmarks.peers.run import ENVIRONMENTS, HERE, environment_of, requirements_of
from penstock.algorithms import functional as fn
from penstock.algorithms import preference
from penstock.algorithms.config import DPOFlags, GRPOFlags, KTOFlags
from penstock.algorithms.experience import Roles
from penstock.algorithms.grpo import GRPO, with_advantages
from penstock.algorithms.kto import KTO, Judged
from penstock.algorithms.preference_losses import LOSSES
from penstock.algorithms.reference import with_reference
from penstock.algorithms.reward import Ranking
from penstock.config import OptimFlags
from penstock.data.batching import pad
from penstock.memory.strategy import Strategy
from penstock.memory.stream import Stream
from penstock.models.roles import Actor
from penstock.rollout.engine import Answer

Case = dict[str, Any]
LIMIT = 1e-4
OPTIM = OptimFlags(lr=1e-6, batch_size=8, micro_batch_size=3)

# Ours of every case of trl_losses.py
PAIRS = {
    "dpo": DPOFlags(beta=0.3),
    "dpo, robust": DPOFlags(loss="robust", beta=0.3, label_smoothing=0.1),
    "dpo, ipo": DPOFlags(loss="ipo", beta=0.3),
    "dpo, hinge": DPOFlags(loss="hinge", beta=0.3),
    "dpo, by tokens": DPOFlags(beta=3.0, length_normalize=True),
    "dpo and sft": DPOFlags(beta=0.3, sft_coef=0.5),
    "simpo": DPOFlags(loss="simpo", beta=2.0, simpo_gamma=0.5),
    "cpo": DPOFlags(loss="cpo", beta=0.3, sft_coef=1.0),
    "cpo, smoothed": DPOFlags(loss="cpo", beta=0.3, sft_coef=0.0, label_smoothing=0.1),
    "orpo": DPOFlags(loss="orpo", beta=0.3),
    "orpo, prompts of one token": DPOFlags(loss="orpo", beta=0.3),
}
VOTES = {
    "kto": KTOFlags(beta=0.3),
    "kto, weighted": KTOFlags(beta=0.3, desirable_weight=1.5, undesirable_weight=0.8),
}
PLAIN: Any = {"kl_coef": 0.0, "missing_eos_penalty": None, "max_new_tokens": 10}
BY_ROWS: Any = {**PLAIN, "normalization": "sequence"}
RLOO: Any = {**PLAIN, "advantage": "rloo", "kl_in": "reward", "kl_estimator": "k1"}
GROUPS = {
    "grpo": GRPOFlags(**BY_ROWS),
    "grpo, KL as published": GRPOFlags(**{**BY_ROWS, "kl_coef": 0.1}),
    "grpo, KL": GRPOFlags(**{**BY_ROWS, "kl_coef": 0.1}),
    "grpo, scaled by the batch": GRPOFlags(**BY_ROWS, advantage="reinforce++_baseline"),
    "grpo, ragged prompts": GRPOFlags(**BY_ROWS),
    "dapo": GRPOFlags(**PLAIN, clip_high=0.28),
    "dapo, on its own policy": GRPOFlags(**PLAIN),
    "dr_grpo": GRPOFlags(**PLAIN, advantage="dr_grpo"),
    "bnpo": GRPOFlags(**PLAIN),
    "cispo": GRPOFlags(**PLAIN, loss="cispo", clip=1.0, clip_high=0.2),
    "gspo": GRPOFlags(**BY_ROWS, loss="gspo", clip=0.02, clip_high=0.03),
    "rloo": GRPOFlags(**RLOO),
    "rloo, KL": GRPOFlags(**{**RLOO, "kl_coef": 0.05}),
    "rloo, on its own policy": GRPOFlags(
        **{**RLOO, "kl_coef": 0.05, "max_new_tokens": 1}, normalization="constant"
    ),
}  # fmt: skip
ANSWERS_RATIO = (
    "TRL clips the ratio of the whole answer, the product of its tokens' (rloo_trainer.py:1822-1833); ours each token's"
)
NOTES = {
    "orpo": "TRL's likelihood is that of prompt and answer (experimental/orpo/orpo_trainer.py:799), ours, as the "
    "paper's, of the answer: equal where a prompt has one token, which nothing predicts",
    "grpo, KL as published": "TRL without use_bias_correction_kl (grpo_trainer.py:3104); ours multiplies KL by the "
    "ratio as TRL's default does, which gives it the gradient of KL(policy, reference)",
    "grpo, scaled by the batch": "TRL divides by the deviation of all rewards + 1e-4 (grpo_trainer.py:2787); our "
    "reinforce++_baseline by that of the differences, over tokens",
    "grpo, ragged prompts": "TRL pads prompts on the left and gives no positions (grpo_trainer.py:1450), so a GPT-2 "
    "reads shorter prompts at positions that are not theirs; Llama's are relative, and equal",
    "rloo": ANSWERS_RATIO,
    "rloo, KL": ANSWERS_RATIO,
    "rloo, on its own policy": f"{ANSWERS_RATIO}. At ratio 1 the gradient is the same, the loss's value is not",
}
"""What differs by definition, with TRL's source."""


def main(arguments: list[str]) -> int:
    """Runs TRL's side, then ours."""
    parser = flags(__doc__)
    parser.add_argument("--keep", action="store_true", help="keep the environment (.peers/, about 1.5 GB)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        command = [str(environment_of("trl_newest")), str(HERE / "trl_losses.py"), directory]
        variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
        variables.pop("PYTHONPATH", None)
        subprocess.run(command, env=variables, check=True, stderr=subprocess.DEVNULL)
        rows = compare(Path(directory))
    if not options.keep:
        shutil.rmtree(ENVIRONMENTS, ignore_errors=True)
    print(json.dumps(rows, indent=1))
    write("losses", {"requirements": requirements_of("trl_newest"), "rows": rows})
    if wrong := unexplained(rows):
        print(f"above {LIMIT:g}, and no note says why: {', '.join(wrong)}")
    return int(bool(wrong))


def unexplained(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The cases that differ, NaN too, without a note."""
    return [name for name, row in rows.items() if "note" not in row and not max(row.values()) <= LIMIT]


def compare(directory: Path) -> dict[str, dict[str, Any]]:
    """By case, the largest differences of both families, and what explains those that are meant."""
    rows: dict[str, dict[str, Any]] = {}
    for family, cases in json.loads((directory / "trl.json").read_text()).items():
        for name, case in cases.items():
            for key, difference in differences(case, ours_of(name, directory / family, case)).items():
                row = rows.setdefault(name, {})
                row[key] = max(difference, row.get(key, 0.0))
    return {name: row | ({"note": NOTES[name]} if name in NOTES else {}) for name, row in rows.items()}


def differences(theirs: Case, ours: Case) -> dict[str, float]:
    """The largest absolute difference of each quantity of ours; of the gradient's norm a share of it."""
    result = {}
    for key, value in ours.items():
        left, right = torch.tensor(value, dtype=torch.float64), torch.tensor(theirs[key], dtype=torch.float64)
        difference = (left - right).abs() / (right if key == "grad_norm" else 1.0)
        result[key] = float(difference.max())
    return result


def ours_of(name: str, directory: Path, case: Case) -> Case:
    """What we make of a case."""
    tables: tuple[tuple[dict[str, Any], Callable], ...] = ((PAIRS, of_pairs), (VOTES, of_votes), (GROUPS, of_groups))
    table, run = next((table, run) for table, run in tables if name in table)
    logps = [logprobs(directory / model, case["rows"]) for model in ("policy", "behaviour", "reference")]
    return {"logps": logps, **run(directory, case, table[name])}


def of_pairs(directory: Path, case: Case, pair_flags: DPOFlags) -> Case:
    """`penstock dpo`'s step on all pairs, and on each."""
    half = len(case["rows"]) // 2
    rankings = [
        Ranking([prompt + chosen, prompt + rejected], (0, 1), (len(chosen), len(rejected)))
        for (prompt, chosen), (_, rejected) in zip(case["rows"][:half], case["rows"][half:], strict=True)
    ]
    with_one = LOSSES[pair_flags.loss].reference
    strategy, (policy, *references) = prepared(directory, "policy", *["reference"] * with_one)
    for reference in references:
        rankings = with_reference(strategy, reference, rankings, OPTIM)
    each = [preference.learn(strategy, policy, [ranking], OPTIM, pair_flags, 0.0) for ranking in rankings]
    stats = preference.learn(strategy, policy, rankings, OPTIM, pair_flags, 0.0)
    return {"loss": stats.sums["loss"], "each": [step.sums["loss"] for step in each], "grad_norm": stats.grad_norm}


def of_votes(directory: Path, case: Case, vote_flags: KTOFlags) -> Case:
    """`penstock kto`'s step; it pairs prompts and answers for its KL itself."""
    strategy, (policy, reference) = prepared(directory, "policy", "reference")
    votes = [
        Judged(prompt + answer, [False] * len(prompt) + [True] * len(answer), label)
        for (prompt, answer), label in zip(case["rows"], case["labels"], strict=False)
    ]
    iteration = KTO(strategy, policy, reference, OPTIM, vote_flags)
    batch = iteration.score(votes)
    stats = iteration.learn(batch, 0.0)
    return {"loss": stats.sums["loss"], "kl": batch.kl, "grad_norm": stats.grad_norm}


def of_groups(directory: Path, case: Case, group_flags: GRPOFlags) -> Case:
    """`penstock grpo`'s experience of the same answers, and its step."""
    strategy, (policy, behaviour, reference) = prepared(directory, "policy", case["behaviour"], "reference")
    group_flags = dataclasses.replace(group_flags, group_size=case["group"])
    answers = [Answer(prompt, answer, [0.0] * len(answer)) for prompt, answer in case["rows"]]
    roles = Roles(behaviour, reference, scorer=lambda records, rollout: case["rewards"])
    with strategy.phase("score"):
        experience = GRPO(strategy, roles, OPTIM, group_flags).read(answers, [None] * len(answers), case["group"])
    experience = with_advantages(experience, group_flags)
    stats = GRPO(strategy, Roles(policy), OPTIM, group_flags).learn(experience, torch.arange(len(answers)))
    return {
        "advantages": experience.advantages[:, 0].tolist(), "loss": stats.sums["loss"], "grad_norm": stats.grad_norm,
    }  # fmt: skip


def prepared(directory: Path, *names: str) -> tuple[Strategy, list[Stream]]:
    """Models in fp32, the first of which learns."""
    strategy = Strategy.named("ddp", dtype="fp32", device="cpu")
    with strategy.init():
        models = [Actor.from_pretrained(str(directory / name)) for name in names]
    for frozen in models[1:]:
        frozen.eval().requires_grad_(False)
    return strategy, strategy.prepare_all(*models)


def logprobs(directory: Path, rows: list[tuple[list[int], list[int]]]) -> list[float]:
    """Of each answer given its prompt, by the plain forward of our decoder."""
    actor = Actor.from_pretrained(str(directory))
    tokens, lengths = pad([prompt + answer for prompt, answer in rows])
    answered = torch.tensor([len(answer) for _, answer in rows])
    mask = fn.response_mask(lengths - answered, answered, tokens.shape[1])
    with torch.no_grad():
        states = fn.states_before(actor(tokens, lengths), mask)
        packed, _ = actor.decoder.logprobs(states, tokens[mask], entropy=False)
    return fn.unpack(packed, answered).sum(dim=1).tolist()
