"""The log-probabilities of answers, and those that the frozen model gives that preference learning compares with.

The reference's are read beside the training, batch by batch, or once before it and kept in the run directory.
"""

import dataclasses
import gc
import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from penstock.algorithms import functional as fn
from penstock.algorithms.config import DPOFlags
from penstock.algorithms.preference_losses import counts_of, preference_loss, summary
from penstock.algorithms.reward import Ranking, Rankings, longest_row, micro_batches
from penstock.algorithms.setup import reserve_activations, role_specs, strategy_of
from penstock.algorithms.sft import Rows, response_logprobs
from penstock.config import OptimFlags
from penstock.errors import UserError
from penstock.memory.strategy import Strategy
from penstock.memory.stream import Stream
from penstock.memory.tiers import Disk
from penstock.models.adapter_files import WEIGHTS, AdapterFile
from penstock.models.roles import Actor
from penstock.planner.workload import Workload
from penstock.run.session import Session
from penstock.sources import file_digest


def answer_logprobs(model: Actor, hidden: Tensor, batch: Rankings) -> Tensor:
    """The log-probability of each answer, its tokens' summed, end included: hidden [B, T, D] -> [B] fp32."""
    answered = [n for ranking in batch.rankings for n in ranking.response_lengths]
    lengths = torch.tensor(answered, device=batch.tokens.device)
    mask = fn.response_mask(batch.lengths - lengths, lengths, batch.tokens.shape[1])
    return row_logprobs(model, hidden, Rows(batch.tokens, mask))


def row_logprobs(model: Actor, hidden: Tensor, rows: Rows) -> Tensor:
    """The log-probability of each row's trained tokens, summed: hidden [B, T, D] -> [B] fp32."""
    return fn.unpack(response_logprobs(model, hidden, rows), rows.trained.sum(dim=1)).sum(dim=1)


def with_reference(
    strategy: Strategy, reference: Stream, rankings: Sequence[Ranking], optim: OptimFlags
) -> list[Ranking]:
    """The same rankings, on every rank, with the log-probabilities of their answers under the reference.

    No more rankings are read at a time than an optimizer step has, for all micro-batches share a visit.
    """
    world = strategy.world
    known: list[Ranking] = []
    for start in range(0, len(rankings), optim.batch_size):
        batch = rankings[start : start + optim.batch_size]
        share = world.share_of(list(enumerate(batch)))
        share.sort(key=lambda pair: longest_row(pair[1]))  # the order in which micro_batches has them
        batches = micro_batches([ranking for _, ranking in share], optim.micro_batch_size, world.device)
        with strategy.phase("score"):
            sums = strategy.evaluate(
                reference, batches, lambda hidden, part: answer_logprobs(reference.model, hidden, part)
            )
        values = iter([float(value) for part in sums for value in part.cpu()])
        own = sorted((i, tuple(next(values) for _ in ranking.rows)) for i, ranking in share)
        ranks = world.gather([logprobs for _, logprobs in own])  # the inverse of share_of
        of_prompt = [ranks[i % world.size][i // world.size] for i in range(len(batch))]
        known += [dataclasses.replace(pair[0], ref_logprobs=pair[1]) for pair in zip(batch, of_prompt, strict=True)]
    return known


def workload(models: dict[str, Actor], rankings: Sequence[Ranking], optim: OptimFlags) -> Workload:
    """What a step on these rankings is, at most: their longest rows, and the most answers to a prompt."""
    most, longest = max(len(ranking.rows) for ranking in rankings), max(map(longest_row, rankings))
    answer = max(max(ranking.response_lengths) for ranking in rankings)
    rows, micro = optim.batch_size * most, max(optim.micro_batch_size, most)
    return Workload("dpo", role_specs(models), rows, micro, rows, 1, longest - answer, answer)


def evaluate_rankings(
    strategy: Strategy, stream: Stream, rankings: Sequence[Ranking], optim: OptimFlags, flags: DPOFlags
) -> dict[str, float]:
    """The metrics of rankings that are not learned from; as many of them are read at a time as a step has."""
    world, counts = strategy.world, counts_of(rankings)
    sums: dict[str, float] = {}

    def read(hidden: Tensor, batch: Rankings) -> None:
        logprobs = answer_logprobs(stream.model, hidden, batch)
        loss, stats = preference_loss(logprobs, batch.rankings, flags, counts)
        for name, value in {"loss": loss, **stats}.items():
            sums[name] = sums.get(name, 0.0) + float(value)

    with strategy.phase("score"):
        for start in range(0, len(rankings), optim.batch_size):
            share = world.share_of(list(rankings[start : start + optim.batch_size]))
            strategy.evaluate(stream, micro_batches(share, optim.micro_batch_size, world.device), read)
    parts = world.gather(sums)
    return summary({name: sum(part.get(name, 0.0) for part in parts) for name in sorted({*chain(*parts)})})


# --- once, before training ------------------------------------------------------------------------------------------

FILE = "reference.safetensors"
"""In the run directory: the log-probability of every answer, in the order of the data."""


def precomputed(session: Session, models: dict[str, Actor], rankings: Sequence[Ranking]) -> list[Ranking]:
    """The rankings with log-probabilities under the reference: from the run directory, or computed and kept there.

    Takes the reference out of the models; its memory is free again afterwards. Raises UserError for a file of another
    reference or of other data.
    """
    reference = models.pop("reference")
    path, digest = session.path / FILE, digest_of(reference, rankings)
    if path.exists():
        with safetensors.safe_open(path, framework="pt") as file:
            saved, values = (file.metadata() or {}).get("digest"), iter(file.get_tensor("logprobs").tolist())
        if saved != digest:
            raise UserError(
                f"{path}: is of another reference or of other data than this run has; put those back, or remove the "
                "file, and it is computed again."
            )
        return [
            dataclasses.replace(ranking, ref_logprobs=tuple(next(values) for _ in ranking.rows)) for ranking in rankings
        ]
    config, strategy = session.config, strategy_of(session.config.run)
    session.say(f"--precompute-reference: {sum(len(ranking.rows) for ranking in rankings)} answers are read once")
    reserve_activations(strategy, workload({"reference": reference}, rankings, config.optim))
    known = with_reference(strategy, strategy.prepare(reference), rankings, config.optim)
    if session.world.first:
        logprobs = torch.tensor([value for ranking in known for value in ranking.ref_logprobs])
        unfinished = path.with_name(f"{path.name}.tmp")
        save_file({"logprobs": logprobs}, unfinished, {"digest": digest})
        unfinished.rename(path)
    for tier in strategy.tiers.values():
        if isinstance(tier, Disk):
            tier.close()
    del strategy, reference
    gc.collect()  # a model and its stream know each other; their memory goes before that of the model that learns
    return known


def digest_of(reference: Actor, rankings: Sequence[Ranking]) -> str:
    """A hash of the reference's weights and of every answer's tokens."""
    parts: list[Any] = [weights_digest(reference)]
    parts += [[ranking.rows, ranking.response_lengths] for ranking in rankings]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def weights_digest(model: Actor) -> str:
    """What differs between models of different weights, before they are prepared."""
    decoder = model.decoder
    parts = [decoder.source.digest() if decoder.source else f"seed {decoder.seed}", str(decoder.base_dtype)]
    saved = decoder.adapted.saved if decoder.adapted else None
    if isinstance(saved, AdapterFile):
        parts.append(file_digest(Path(saved.directory) / WEIGHTS))
    return " ".join(parts)
