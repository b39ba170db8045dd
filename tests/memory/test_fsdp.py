"""FSDP2's rows against plain PyTorch on one rank, and their checkpoints against every other row's."""

import dataclasses
from pathlib import Path

import pytest
import torch

from penstock.distributed.world import World
from penstock.errors import UserError
from penstock.memory import fsdp
from penstock.memory.placement import NAMES, known
from penstock.memory.strategy import Strategy
from penstock.models.decoder import Decoder
from penstock.models.lora_targets import LoraSpec
from penstock.models.roles import Actor
from penstock.models.surgery import add_adapters, quantise_base
from tests.algorithms.test_ranks import EXPERTS
from tests.conftest import TINY, torchrun
from tests.memory.test_stream import decoder, plain

ROOT = Path(__file__).parents[2]
MODELS = ("gpt2", "llama", "llama lora")
WORKER = """
import hashlib, os, sys, torch
from pathlib import Path
from penstock.algorithms import functional as fn
from penstock.algorithms.sft import response_logprobs
from penstock.memory.strategy import Strategy
from penstock.models.decoder import Decoder
from penstock.models.roles import RewardModel
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling
from penstock.run import optimizer_files
from penstock.run.optimizer_files import read_optimizer, saved_states, write_optimizer
from tests.memory.test_fsdp import model_of
from tests.memory.test_stream import FAMILIES, batches, weights_of

out, names, models, rows = sys.argv[1], *(text.split(",") for text in sys.argv[2:5])
os.environ["LOCAL_WORLD_SIZE"] = "2"  # hsdp's machines
results = {}

def written(strategy, stream, name):
    path = Path(out).with_name(name)
    write_optimizer(path if strategy.world.first else None, stream)
    strategy.world.broadcast(None)
    digest = hashlib.sha256()
    with saved_states(path) as read:
        for weight in stream.sink.weights:
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                digest.update(read(weight.name, kind).numpy().tobytes())
    return path, digest.hexdigest()

for name in names:
    for model in models:
        strategy = Strategy.named(name.split()[0], device="cpu", recompute=False if "kept" in name else None)
        rank, size = strategy.world.rank, strategy.world.size
        actor = model_of(model)
        stream = strategy.prepare(actor, weight_decay=0.1)
        losses, collectives = [], []
        for step in range(20):
            batch = list(batches(step))
            total = sum(int(rows.trained.sum()) for rows in batch)
            def loss_of(hidden, rows):
                return fn.sft_loss(response_logprobs(actor, hidden, rows), total), {}
            # All to one rank, or one to the second rank and the others to another: the rest is idle.
            share = [batch, []] if step % 5 == 0 else [batch[:2], batch[2:]]
            at = (rank - step) % size
            own = share[at] if at < 2 else []
            losses.append(strategy.step(stream, own, loss_of, lr=1e-2, max_grad_norm=0.5).sums["loss"])
        nothing = lambda hidden, rows: (hidden.sum() * torch.nan, {})
        assert not strategy.step(stream, own, nothing, lr=1.0).applied
        assert all(weight.grad is None for weight in actor.parameters())
        prompts = [[1, 5, 6], [1, 7], [1, 9, 9, 9]][rank::size]  # of four ranks one has none
        sampling = Sampling(max_new_tokens=12 if rank else 5, temperature=0.0)
        answers = []
        for phase in ("rollout", "score"):  # gathered once, and visit by visit
            with strategy.phase(phase), torch.no_grad():
                batch = generate(actor.decoder, prompts, sampling, eos_ids=[2])
                answers.append([answer.response_ids for answer in batch])
                collectives.append(stream.collective)
        assert collectives == [False, True]
        assert answers[0] == answers[1]
        digests = set()
        if "kept" not in name:
            saved, digest = written(strategy, stream, f"{name}-{model}")
            digests.add(digest)
            assert saved.is_dir()
            for row in rows if model == models[0] else ():
                disk = str(Path(out).with_name("disk")) if row == "gemini_nvme" else None
                other = Strategy.named(row, device="cpu", disk=disk)
                other_stream = other.prepare(model_of(model))
                read_optimizer(saved, 20, other_stream)
                for most in (1 << 40, 0):  # one file, or every rank its share
                    optimizer_files.GATHERED = most
                    again, digest = written(other, other_stream, f"{row}-{most}-{name}-{model}")
                    digests.add(digest)
                    parts = bool(other_stream.sink.shards()) or (most == 0 and other_stream.sink.collective)
                    assert again.is_dir() == parts
                    back = strategy.prepare(model_of(model))
                    read_optimizer(again, 20, back)
                    digests.add(written(strategy, back, f"back-{row}-{most}-{name}-{model}")[1])
                    strategy.world.broadcast(None)
        gathered = strategy.world.gather(answers[0])
        facts = {"losses": losses, "weights": weights_of(stream), "digests": digests, "answers": gathered}
        results[name, model] = facts
if strategy.world.first:
    torch.save(results, out)
strategy.world.leave()
again = Strategy.named(names[-1].split()[0], device="cpu", dtype="bf16")  # another run of the same processes
with again.init():
    judge = RewardModel(Decoder(FAMILIES["llama"]))  # its decoder has a head that nobody reads
stream, scores = again.prepare(judge), lambda hidden, rows: (judge.read(hidden.flatten(0, 1)).square().sum(), {})
assert again.step(stream, list(batches(0)) if again.world.first else [], scores, lr=1e-3).applied
again.world.leave()
"""


def model_of(name):
    """An actor; with "lora" behind its family, adapters learn, some of them on its head."""
    family, _, adapted = name.partition(" ")
    actor = Actor(decoder(family))
    if adapted:
        add_adapters(actor.decoder, LoraSpec(4), seed=1)
    return actor


def run(folder, ranks, names, rows=()):
    (folder / "worker.py").write_text(WORKER)
    torchrun(
        folder / "worker.py", folder / "out.pt", ",".join(names), ",".join(MODELS), ",".join(rows) or "ddp",
        ranks=ranks, PYTHONPATH=f"{ROOT / 'src'}:{ROOT}",
    )  # fmt: skip
    return torch.load(folder / "out.pt", weights_only=False)


def test_what_fsdp2_does_not_do_is_refused(monkeypatch):
    with pytest.raises(UserError, match="take hsdp or gemini_8bit"):
        known("hsdp_8bit")
    actor, packed = model_of("llama lora"), model_of("llama lora")
    quantise_base(packed.decoder, "nf4")
    for model, options, flag in (
        (packed, {}, "--base-dtype"), (actor, {"chunk_size": 4096}, "--chunk-size"),
        (actor, {"activation_budget": 10**9}, "--activation-budget"),
    ):  # fmt: skip
        strategy = Strategy("hsdp", World(0, 2, torch.device("cpu")), torch.float32, **options)
        with pytest.raises(UserError, match=f"{flag} with --strategy hsdp: FSDP2"):
            strategy.prepare(model)
    monkeypatch.delattr(fsdp.FSDPModule, fsdp.ZEROS, raising=False)  # as in torch 2.11
    experts = Actor(Decoder(dataclasses.replace(TINY, **EXPERTS)))
    with pytest.raises(UserError, match="cannot train experts"):
        fsdp.prepare(experts, None, None, None, dtype=torch.float32, recompute=True, gathers_once=None, adamw={})


@pytest.mark.parametrize(("ranks", "names"), [(2, ("fsdp", "fsdp kept")), (4, ("fsdp", "hsdp"))])
def test_twenty_steps_and_answers_are_those_of_one_rank_however_uneven_the_work(ranks, names, tmp_path):
    others = [name for name in NAMES if name != "naive"] if ranks == 2 else ["gemini"]
    results = run(tmp_path, ranks, names, others)
    for model in MODELS:
        losses, weights = plain(model_of(model))
        for name in names:
            ours = results[name, model]
            assert ours["losses"] == pytest.approx(losses, abs=1e-5), (name, model)
            for key, weight in weights.items():
                assert torch.allclose(ours["weights"][key], weight, atol=1e-5, rtol=0), (name, model, key)
            assert len(ours["digests"]) == ("kept" not in name), (name, model)
            assert sum(map(len, ours["answers"])) == 3
            assert ours["answers"] == results[names[0], model]["answers"]
