"""Transformers' own layers as our blocks, against transformers: logits, gradients, files, text, every strategy, LoRA.

`-m slow` runs all architectures of the table, make test those that differ most.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from penstock.algorithms.sft import Rows, response_logprobs
from penstock.memory.strategy import Strategy
from penstock.models import pretrained
from penstock.models.roles import Actor
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling
from tests.models.foreign_architectures import ALL, QUICK, saved

LENGTHS = (9, 14, 2, 6)
TOKENS = torch.randint(96, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(3))
VALID = torch.arange(TOKENS.shape[1]) < torch.tensor(LENGTHS)[:, None]
every = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Any:
    """By model_type: transformers' model and its directory."""
    made: dict[str, tuple[transformers.PreTrainedModel, Path]] = {}

    def of(name: str) -> tuple[transformers.PreTrainedModel, Path]:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            made[name] = saved(name, directory), directory
        return made[name]

    return of


def rows_alone(theirs: transformers.PreTrainedModel) -> Tensor:
    """transformers' logits of each row without padding, one row below the other."""
    logits = [
        theirs(row[None, :length], use_cache=False).logits[0] for row, length in zip(TOKENS, LENGTHS, strict=True)
    ]
    return torch.cat(logits)


@every
def test_logits_and_gradients_are_those_of_transformers_on_ragged_rows(models, name):
    theirs, directory = models(name)
    ours = pretrained.load(directory)[0]
    expected = rows_alone(theirs)
    logits = ours.logits(ours(TOKENS))[VALID]
    assert expected.std() > 0.5  # else the comparison says nothing
    assert (logits - expected).abs().max() <= 1e-4
    slopes = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)) / len(expected)
    theirs.zero_grad()
    (expected * slopes).sum().backward()
    (logits * slopes).sum().backward()
    of_theirs = {weight: wanted.grad for weight, wanted in theirs.named_parameters()}
    for weight, parameter in ours.named_parameters():
        wanted = of_theirs.get(ours.theirs[weight])
        if parameter.requires_grad and wanted is not None:
            assert parameter.grad is not None, weight
            assert (parameter.grad - wanted).abs().max() <= 1e-4 * max(1.0, float(wanted.abs().max())), weight


@every
def test_files_go_to_transformers_and_back_bit_by_bit(models, tmp_path, name):
    theirs, directory = models(name)
    ours = pretrained.load(directory)[0]
    pretrained.save(ours, tmp_path)
    written, read = load_file(tmp_path / "model.safetensors"), load_file(directory / "model.safetensors")
    assert written.keys() == read.keys()
    assert all(torch.equal(written[weight], read[weight]) for weight in read)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again.eval()(TOKENS).logits, theirs(TOKENS).logits)


# --- text -------------------------------------------------------------------------------------------------------------


def sampled(decoder: Any, **changes: Any) -> list[Any]:
    prompts = [row[:length].tolist() for row, length in zip(TOKENS, LENGTHS, strict=True)]
    return generate(decoder, prompts, Sampling(max_new_tokens=8, n=2, seed=5), eos_ids=range(0, 96, 5), **changes)


@every
def test_answers_do_not_depend_on_the_batch_and_their_log_probs_are_those_of_the_trainers_forward(models, name):
    """Ragged prompts, answers that end early, batches of eight and of three rows."""
    ours = pretrained.load(models(name)[1])[0]
    answers = sampled(ours)
    assert len({len(answer.response_ids) for answer in answers}) > 1
    assert [answer.response_ids for answer in sampled(ours, batch_size=3)] == [a.response_ids for a in answers]
    for answer in answers:
        whole = torch.tensor([answer.prompt_ids + answer.response_ids])
        with torch.no_grad():
            logprobs = ours.logprobs(ours(whole)[0, :-1], whole[0, 1:])[0]
        assert answer.logprobs == pytest.approx(logprobs[len(answer.prompt_ids) - 1 :].tolist(), rel=0, abs=1e-4)


# --- strategies and adapters ------------------------------------------------------------------------------------------


def trained(directory: Path, strategy_name: str, tmp_path: Path, **options: Any) -> tuple[Actor, list[float]]:
    """An actor after two steps on the rows, and the losses."""
    strategy = Strategy.named(strategy_name, device="cpu", recompute=True, disk=str(tmp_path / "disk"))
    with strategy.init():
        actor = Actor.from_pretrained(str(directory), **options)
    stream = strategy.prepare(actor)
    batches = [Rows(rows, valid) for rows, valid in zip(TOKENS.split(2), VALID.split(2), strict=True)]
    for batch in batches:
        batch.trained[:, 0] = False

    def loss_of(hidden: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        return -response_logprobs(actor, hidden, rows).sum() / int(VALID.sum()), {}

    with strategy.phase("train"):
        losses = [strategy.step(stream, batches, loss_of, lr=1e-3).sums["loss"] for _ in range(2)]
    return actor, losses


def weights_of(actor: Actor, directory: Path) -> dict[str, Tensor]:
    actor.save_pretrained(directory)
    return load_file(next(directory.glob("*.safetensors")))


@every
def test_streamed_training_is_resident_training_to_the_bit(models, tmp_path, name):
    directory, weights = models(name)[1], []
    for strategy in ("ddp", "gemini_cpu"):
        actor, losses = trained(directory, strategy, tmp_path)
        assert losses[1] < losses[0]
        assert actor.feed.moves is (strategy != "ddp")
        weights.append(weights_of(actor, tmp_path / strategy))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][weight], weights[1][weight]) for weight in weights[0])
    first = load_file(directory / "model.safetensors")
    moved = [weight for weight in first if not torch.equal(first[weight], weights[0][weight])]
    assert len(moved) > 0.7 * len(first)


@every
def test_an_adapter_learns_alone_and_loads_again(models, tmp_path, name):
    directory = models(name)[1]
    actor, losses = trained(directory, "gemini_cpu", tmp_path, lora=4)
    assert losses[1] < losses[0]
    tensors = weights_of(actor, tmp_path / "adapter")
    assert all("lora" in weight for weight in tensors)
    halves = [bool(tensor.any()) for weight, tensor in tensors.items() if "lora_B" in weight]
    assert sum(halves) > 0.7 * len(halves)
    again = Actor.from_pretrained(str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(again.decoder.logits(again(TOKENS, None)), actor.decoder.logits(actor(TOKENS, None)))
