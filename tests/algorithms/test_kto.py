"""KTO: the loss against a loop in fp64, z0 and a whole step against transformers, the distribution that it ends at."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock.algorithms.config import KTOFlags
from penstock.algorithms.kto import KTO, Judged, kto_loss, mismatched, summary
from penstock.config import OptimFlags
from penstock.memory.strategy import Strategy
from penstock.models import pretrained
from penstock.models.decoder import Decoder
from penstock.models.roles import Actor
from tests.conftest import EOS, TINY, cli, metrics, torchrun, votes, write_jsonl

ROOT = Path(__file__).parents[2]
SHAPES = [(3, 4), (1, 2), (5, 1), (2, 6), (4, 3), (1, 5), (6, 2), (2, 2)]  # tokens of prompt and answer, ragged


def judged(prompt, answer, liked):
    return Judged([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), liked)


def ragged(seed=0, shapes=SHAPES):
    """Votes on answers of any length, three of eight disliked."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda count: torch.randint(3, 16, (count,), generator=rng).tolist()  # noqa: E731
    return [judged([1, *draw(p - 1)], draw(a), i % 8 not in (1, 4, 6)) for i, (p, a) in enumerate(shapes)]


@pytest.fixture
def models(tmp_path):
    """Addresses of a policy and of a reference that disagree by nats, so that z0 is above 0."""
    for name, seed in (("policy", 1), ("reference", 2)):
        rng = torch.Generator().manual_seed(seed)
        decoder = Decoder(TINY, generator=rng)
        with torch.no_grad():
            for weight in decoder.parameters():
                weight.add_(0.2 * torch.randn(weight.shape, generator=rng))
        pretrained.save(decoder, tmp_path / name)
    return str(tmp_path / "policy"), str(tmp_path / "reference")


def iteration(models, name="naive", flags=None, micro=4, optim=None, **peft):
    strategy = Strategy.named(name, device="cpu")
    with strategy.init():
        policy = Actor.from_pretrained(models[0], **peft)
        reference = (policy if models[1] == models[0] else Actor.from_pretrained(models[1])).frozen()
    optim = optim or OptimFlags(1e-2, batch_size=8, micro_batch_size=micro, max_grad_norm=1e9)
    policy, reference = strategy.prepare_all(policy, reference, **optim.adamw)
    return KTO(strategy, policy, reference, optim, flags or KTOFlags(), max_length=32)


# --- slowly, again --------------------------------------------------------------------------------------------------
def oracle_loss(log_ratios, liked, z0, beta, desirable, undesirable):
    """Ethayarajh et al. 2024, eq. 7, one vote at a time in Python's own fp64: the mean of w * (1 - v)."""
    losses = []
    for r, good in zip(log_ratios, liked, strict=True):
        v = 1 / (1 + math.exp(-beta * ((r - z0) if good else (z0 - r))))
        losses.append((desirable if good else undesirable) * (1 - v))
    return sum(losses) / len(losses)


def oracle_logp(model, prompt, answer):
    """The log-probability of an answer: transformers' logits of one row, one token at a time."""
    rows = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    return sum(rows[len(prompt) - 1 + i, token] for i, token in enumerate(answer))


def parts_of(batch):
    return [(vote.tokens[: vote.start], vote.tokens[vote.start :], vote.liked) for vote in batch]


def oracle_z0(policy, reference, batch):
    """The mean log-ratio of each prompt with the answer of the vote before it; 0 at least."""
    parts = parts_of(batch)
    with torch.no_grad():
        ratios = [
            oracle_logp(policy, prompt, parts[i - 1][1]) - oracle_logp(reference, prompt, parts[i - 1][1])
            for i, (prompt, _, _) in enumerate(parts)
        ]
    return max(float(sum(ratios)) / len(ratios), 0.0)


def theirs(address):
    return AutoModelForCausalLM.from_pretrained(address).double().eval()


def test_the_loss_is_a_loop_over_votes():
    rng = torch.Generator().manual_seed(1)
    ratios = torch.cat([torch.randn(40, generator=rng, dtype=torch.float64) * 30, torch.tensor([0.0, 500.0, -500.0])])
    liked = torch.rand(len(ratios), generator=rng) < 0.5
    for z0, beta in itertools.product((0.0, 0.3, 7.0), (0.01, 0.1, 1.0)):
        expected = oracle_loss(ratios.tolist(), liked.tolist(), z0, beta, 1.0, 1.0)
        assert float(kto_loss(ratios.float(), liked, z0, beta).mean()) == pytest.approx(expected, abs=1e-6)
    assert torch.equal(kto_loss(torch.zeros(2), torch.tensor([True, False]), 0.0, 0.1), torch.tensor([0.5, 0.5]))


def test_each_prompt_is_paired_with_the_answer_before_it_and_the_first_with_the_last():
    batch = [judged([1, 2], [3], True), judged([4], [5, 6], False), judged([7, 8, 9], [10], True)]
    pairs = mismatched(batch, 4)
    assert [pair.tokens for pair in pairs] == [[1, 2, 10], [4, 3], [7, 8, 9, 5]]  # the last one is cut
    assert [pair.trained for pair in pairs] == [
        [False, False, True], [False, True], [False, False, False, True]
    ]  # fmt: skip


@pytest.mark.parametrize("micro", [1, 2, 3, 8])
def test_z0_is_that_of_mismatched_pairs_over_the_whole_batch(models, micro):
    batch = ragged()
    expected = oracle_z0(theirs(models[0]), theirs(models[1]), batch)
    assert expected > 0.05
    assert iteration(models, micro=micro).score(batch).kl == pytest.approx(expected, abs=1e-6)
    swapped = (models[1], models[0])
    assert oracle_z0(theirs(models[1]), theirs(models[0]), batch) == 0.0
    assert iteration(swapped, micro=micro).score(batch).kl == 0.0


FLAGS = {
    "kto": KTOFlags(beta=0.3), "weights": KTOFlags(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5),
    "apo": KTOFlags("apo_zero_unpaired", beta=0.3),
}  # fmt: skip


@pytest.mark.parametrize("name", ["naive", "gemini_cpu"])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_a_whole_step_is_that_of_a_plain_loop(models, flags, name):
    """Loss, metrics, gradient norm and the weights after one AdamW step, against transformers in fp64."""
    optim = OptimFlags(1e-2, batch_size=8, micro_batch_size=3, max_grad_norm=0.05, adam_epsilon=1e-5)
    batch = ragged()
    ours = iteration(models, name, flags, optim=optim)
    scored = ours.score(batch)
    stats = ours.learn(scored, 1e-2)

    policy, reference = theirs(models[0]), theirs(models[1])
    z0 = oracle_z0(policy, reference, batch) if flags.loss == "kto" else 0.0
    assert scored.kl == pytest.approx(z0, abs=1e-6)
    losses, logps, ratios = [], [], []
    for prompt, answer, liked in parts_of(batch):
        logp = oracle_logp(policy, prompt, answer)
        ratio = logp - oracle_logp(reference, prompt, answer).detach()
        weight = flags.desirable_weight if liked else flags.undesirable_weight
        losses.append(weight * (1 - torch.sigmoid(flags.beta * ((ratio - z0) if liked else (z0 - ratio)))))
        logps.append(float(logp.detach()))
        ratios.append(flags.beta * float(ratio.detach()))
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.05)
    torch.optim.AdamW(policy.parameters(), 1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0).step()

    facts, liked = summary(stats.sums, scored.kl), [vote.liked for vote in batch]
    assert facts["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    assert stats.grad_norm == pytest.approx(float(norm), abs=1e-6)
    for kind, side in ((True, "chosen"), (False, "rejected")):
        chosen = [i for i, good in enumerate(liked) if good is kind]
        assert facts[f"count/{side}"] == len(chosen)
        for name, values in (("logps", logps), ("rewards", ratios)):
            assert facts[f"{name}/{side}"] == pytest.approx(sum(values[i] for i in chosen) / len(chosen), rel=1e-5)
    assert facts["rewards/margins"] == pytest.approx(facts["rewards/chosen"] - facts["rewards/rejected"])
    tokens = torch.arange(3, 16)[None]
    assert torch.allclose(logits(ours, tokens), policy(tokens).logits.float(), atol=2e-5)


def logits(ours, tokens):
    """Of the policy, wherever its weights live."""
    part = type("Tokens", (), {"tokens": tokens})()
    read = lambda hidden, _: ours.policy.model.decoder.logits(hidden)  # noqa: E731
    return ours.strategy.evaluate(ours.policy, [part], read)[0].float()


def gradients(ours, batch):
    ours.learn(ours.score(batch), 0.0)
    return [parameter.grad.clone() for parameter in ours.policy.model.parameters()]


def test_micro_batches_change_nothing(models):
    whole = gradients(iteration(models, micro=8), ragged())
    assert sum(float(grad.abs().sum()) for grad in whole) > 0.01
    for micro in (1, 2, 4):
        for a, b in zip(whole, gradients(iteration(models, micro=micro), ragged()), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-6)


GRADIENT = """
import sys, torch
from tests.algorithms.test_kto import gradients, iteration, ragged

policy, reference, out = sys.argv[1:]
ours = iteration((policy, reference), "ddp", micro=2)
batch = ragged()
saved = gradients(ours, batch), ours.score(batch).kl
if ours.strategy.world.first:
    torch.save(saved, out)
ours.strategy.world.leave()
"""


def test_two_ranks_have_the_gradient_and_the_z0_of_one(models, tmp_path):
    (tmp_path / "gradient.py").write_text(GRADIENT)
    for ranks in (1, 2):
        torchrun(
            tmp_path / "gradient.py",
            *models,
            tmp_path / f"{ranks}.pt",
            ranks=ranks,
            PYTHONPATH=f"{ROOT / 'src'}:{ROOT}",
        )
    (alone, kl), (together, kl_of_two) = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))
    assert kl == pytest.approx(kl_of_two, abs=1e-6)
    assert kl > 0.05
    for a, b in zip(alone, together, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


# --- a known optimum ------------------------------------------------------------------------------------------------
WORLDS = {"three answers are all there is": (3, (3.0, 1.5, 0.9)), "three of sixteen": (16, (3.0, 1.5, 0.9))}
"""Tokens of the vocabulary, and the utility of the first three: an answer is liked with probability sigmoid(utility).

In the second the policy can move all mass to the answers that are judged, so z0 grows with their log-ratios.
"""


def expected_optimum(reference, drawn, liked, beta, step=200):
    """The distribution over answers that maximises KTO's expected value, by trying all of a grid.

    The value is measured from z0, which no gradient goes through: the optimum is the point that is best for its own z0.
    """
    grid = [(i, j, step - i - j) for i in range(step + 1) for j in range(step + 1 - i)]
    policies = torch.tensor(grid, dtype=torch.float64) / step
    ratios = (policies / reference).log()
    z0 = 0.0
    for _ in range(40):
        above = torch.sigmoid(beta * (ratios - z0))
        value = (drawn * (liked * above + (1 - liked) * (1 - above))).sum(1)
        best = int(value.argmax())
        z0 = 0.5 * z0 + 0.5 * max(float((drawn * ratios[best]).sum()), 0.0)
    return policies[best], z0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("world", WORLDS)
def test_it_ends_at_the_distribution_that_maximises_its_expected_value(world, seed, tiny_model):
    """One prompt, answers of one token; votes are drawn anew at every step, by a utility that KTO does not see."""
    size, utility = WORLDS[world]
    address = tiny_model(vocab_size=size, seed=seed, hf={})
    steps, batch_size, beta = 100, 192, 1.0
    optim = OptimFlags(1.0, batch_size=batch_size, micro_batch_size=batch_size)
    ours = iteration((address, address), flags=KTOFlags(beta=beta), optim=optim)
    tokens = torch.tensor([[1]])
    start = logits(ours, tokens)[0, -1].double().softmax(-1)
    drawn, liked = start[:3] / start[:3].sum(), torch.tensor(utility, dtype=torch.float64).sigmoid()
    best, z0 = expected_optimum(start[:3], drawn, liked, beta)
    assert (z0 > 1.0) == (size > 3)
    optimum = torch.cat([best, torch.zeros(size - 3, dtype=torch.float64)])
    rng = torch.Generator().manual_seed(seed)
    for step in range(steps):
        answers = torch.multinomial(drawn, batch_size, replacement=True, generator=rng)
        thumbs = torch.rand(batch_size, generator=rng, dtype=torch.float64) < liked[answers]
        batch = [judged([1], [a], good) for a, good in zip(answers.tolist(), thumbs.tolist(), strict=True)]
        ours.learn(ours.score(batch), 0.006 * (1 - step / steps))
    end = logits(ours, tokens)[0, -1].double().softmax(-1)
    assert 0.5 * float((start - optimum).abs().sum()) > 0.08  # it had somewhere to go
    assert 0.5 * float((end - optimum).abs().sum()) <= 0.03, (end, optimum)


# --- the command ----------------------------------------------------------------------------------------------------
def command(folder, model, rows, *flags, out="run"):
    data = write_jsonl(folder / "votes.jsonl", rows)
    fixed = ["--steps", 3, "--batch-size", 6, "--micro-batch-size", 4, "--lr", 1e-2, "--max-length", 20]
    return cli("kto", "--model", model, "--data", data, "--out", folder / out, *fixed, *flags)


def test_every_row_is_a_prompt_and_an_answer_with_its_end(tmp_path, tiny_model, monkeypatch):
    from penstock.algorithms import kto as module

    seen = []
    real = module.KTO.score
    monkeypatch.setattr(module.KTO, "score", lambda self, batch: seen.extend(batch) or real(self, batch))
    rows = [{"prompt_ids": [1, 3 + i], "response_ids": [5, 6][: 1 + i % 2], "label": i % 2 == 0} for i in range(6)]
    assert command(tmp_path, tiny_model(), rows, "--heldout", 0) == 0
    assert {(tuple(vote.tokens), vote.start, vote.liked) for vote in seen} == {
        ((1, 3 + i, *[5, 6][: 1 + i % 2], EOS), 2, i % 2 == 0) for i in range(6)
    }


@pytest.mark.parametrize(("batch_size", "parts"), [(8, 1), (5, 2)])
def test_held_out_votes_are_read_in_parts_of_a_batch_each_with_its_own_z0(models, batch_size, parts):
    optim = OptimFlags(1e-2, batch_size=batch_size, micro_batch_size=2)
    facts, batch = iteration(models, optim=optim).evaluate(ragged()), ragged()
    policy, reference = theirs(models[0]), theirs(models[1])
    losses, kl = [], 0.0
    with torch.no_grad():
        for part in (batch[i::parts] for i in range(parts)):
            z0 = oracle_z0(policy, reference, part)
            ratios = [float(oracle_logp(policy, p, a) - oracle_logp(reference, p, a)) for p, a, _ in parts_of(part)]
            losses += [oracle_loss([r], [v.liked], z0, 0.1, 1, 1) for r, v in zip(ratios, part, strict=True)]
            kl += z0 * len(part) / len(batch)
    assert facts["loss"] == pytest.approx(sum(losses) / len(batch), abs=1e-6)
    assert facts["kl"] == pytest.approx(kl, abs=1e-6)
    assert facts["count/chosen"] == sum(vote.liked for vote in batch)


def test_metrics_have_trls_names_and_the_lowest_held_out_loss_is_the_best(tmp_path, tiny_model):
    assert (
        command(tmp_path, tiny_model(), votes(40), "--heldout", 0.3, "--eval-every", 1, "--early-stopping-patience", 2)
        == 0
    )
    row = metrics(tmp_path / "run")[0]
    sums = {f"{name}/{side}" for name in ("count", "rewards", "logps") for side in ("chosen", "rejected")}
    names = {"loss", "kl", "rewards/margins", *sums}
    assert names | {f"heldout/{name}" for name in names} <= set(row)
    assert (tmp_path / "run" / "checkpoints" / "best").exists()
    assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"])
    assert "<b>rewards/margins</b>" in (tmp_path / "run" / "report.html").read_text()


def test_a_batch_without_one_kind_has_no_means_of_it():
    sums = {"loss": 0.5, "count/chosen": 2.0, "rewards/chosen": 1.0, "logps/chosen": -4.0, "count/rejected": 0.0,
            "rewards/rejected": 0.0, "logps/rejected": 0.0}  # fmt: skip
    assert summary(sums, 0.25) == {
        "loss": 0.5, "kl": 0.25, "count/chosen": 2.0, "rewards/chosen": 0.5, "logps/chosen": -2.0, "count/rejected": 0.0
    }  # fmt: skip


@pytest.mark.parametrize(("liked", "disliked", "flags", "says"), [
    (5, 5, [], "5 liked and 5 disliked answers"),
    (6, 2, [], "weigh 3.00 times the disliked; 1 to 1.33 is advised: --desirable-weight 0.33 to 0.44 or "
     "--undesirable-weight 2.25 to 3.00"),
    (2, 8, ["--undesirable-weight", 0.5], "weigh 0.50 times the disliked; 1 to 1.33 is advised: --desirable-weight "
     "2.00 to 2.67 or --undesirable-weight 0.19 to 0.25"),
    (4, 0, [], "WARNING: votes of one kind: all answers were liked, and penstock sft learns from them better"),
    (0, 4, [], "WARNING: votes of one kind: all answers were disliked, and none says what is good"),
])  # fmt: skip
def test_the_balance_of_votes_is_said(tmp_path, tiny_model, capfd, liked, disliked, flags, says):
    labels = [True] * liked + [False] * disliked
    rows = [{"prompt_ids": [1, 3 + i], "response_ids": [5], "label": label} for i, label in enumerate(labels)]
    assert command(tmp_path, tiny_model(), rows, "--heldout", 0, *flags) == 0
    err = capfd.readouterr().err
    assert says in err
    assert f"{liked} liked and {disliked} disliked answers" in err
    assert ("is advised" in err) == ("is advised" in says)


@pytest.mark.parametrize(("liked", "disliked", "weight"), [(4, 3, 1.0), (3, 4, 4 / 3), (3, 4, 16 / 9), (1, 3, 3.0)])
def test_weights_at_the_ends_of_the_advised_range_are_silent(tmp_path, tiny_model, capfd, liked, disliked, weight):
    labels = [True] * liked + [False] * disliked
    rows = [{"prompt_ids": [1, 3 + i], "response_ids": [5], "label": label} for i, label in enumerate(labels)]
    assert command(tmp_path, tiny_model(), rows, "--heldout", 0, "--desirable-weight", weight) == 0
    assert "is advised" not in capfd.readouterr().err


def test_pairs_beyond_the_limit_are_cut_and_said(tmp_path, tiny_model, capfd):
    long = [{"prompt_ids": [1] * 16, "response_ids": [5], "label": True},
            {"prompt_ids": [1], "response_ids": [5] * 12, "label": False}] * 3  # fmt: skip
    assert command(tmp_path, tiny_model(), long, "--heldout", 0) == 0
    assert "mismatched pairs of up to 29 tokens are cut at 20 (--max-length)" in capfd.readouterr().err
    assert command(tmp_path, tiny_model(), long, "--heldout", 0, "--loss", "apo_zero_unpaired", out="apo") == 0
    assert "mismatched" not in capfd.readouterr().err
    assert {row["kl"] for row in metrics(tmp_path / "apo")} == {0.0}


def test_the_reference_under_an_adapter_stands_on_the_models_base(tiny_model):
    address = tiny_model()
    ours = iteration((address, address), "gemini_cpu", lora=4)
    assert ours.policy.shares(ours.reference)
    full = iteration((address, address), "gemini_cpu")
    assert not full.policy.shares(full.reference)


def test_another_reference_is_read_and_must_read_the_same_tokens(tmp_path, tiny_model, capfd):
    model, other, stranger = tiny_model(), tiny_model("other", 7), tiny_model("stranger", vocab_size=8)
    assert command(tmp_path, model, votes(12)) == 0
    assert command(tmp_path, model, votes(12), "--reference", other, out="run2") == 0
    first, second = (metrics(tmp_path / name)[0] for name in ("run", "run2"))
    assert (first["rewards/chosen"], first["kl"]) == (0.0, 0.0)
    assert second["rewards/chosen"] != 0.0
    assert command(tmp_path, model, votes(12), "--reference", stranger, out="run3") == 2
    assert "--reference" in capfd.readouterr().err


def test_packed_bases_learn_through_adapters(tmp_path, tiny_model):
    flags = ["--lora", 4, "--base-dtype", "int8", "--strategy", "gemini_cpu"]
    assert command(tmp_path, tiny_model(), votes(12), *flags) == 0
    rows = metrics(tmp_path / "run")
    assert rows[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-6)
    assert rows[-1]["rewards/chosen"] != 0.0
