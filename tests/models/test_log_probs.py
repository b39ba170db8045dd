"""Log-probabilities without logits: against the plain formula, values and gradients, tiles, adapters, and bytes."""

import math

import pytest
import torch

from penstock.autochunk.meter import Meter
from penstock.models import log_probs, tiling
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.linear import arithmetic_of, computing, precise
from penstock.models.lora_targets import LoraSpec
from penstock.models.roles import Actor
from tests.algorithms import oracle
from tests.algorithms.test_functional import TOLERANCE, agree, agree_with_gradients


def of_logits(logits, targets, temperature=1.0, **more):
    """The distribution of given logits: states are the logits and the head is the identity."""
    identity = torch.eye(logits.shape[1], dtype=logits.dtype)
    return log_probs.logprobs([(logits, identity)], targets, temperature, **more)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_token_logprobs_and_entropy(temperature, count):
    rng = torch.Generator().manual_seed(count)
    logits = 3 * torch.randn(count, 7, generator=rng)
    targets = torch.randint(7, (count,), generator=rng)
    ours, theirs = ((lambda x, of=of: of(x, targets, temperature)[0]) for of in (of_logits, oracle.token_logprobs))
    agree_with_gradients(ours, theirs, logits)
    entropy = of_logits(logits.requires_grad_(), targets, temperature)[1]
    agree(entropy, oracle.token_logprobs(logits, targets, temperature)[1])
    assert not entropy.requires_grad


def test_token_logprobs_by_hand():
    logits = torch.tensor([[math.log(1.0), math.log(4.0)]])
    logprobs, entropy = of_logits(logits, torch.tensor([1]), temperature=2.0)  # odds 1 : 2
    assert logprobs.item() == pytest.approx(math.log(2 / 3), abs=TOLERANCE)
    assert entropy.item() == pytest.approx(-(1 / 3) * math.log(1 / 3) - (2 / 3) * math.log(2 / 3), abs=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_softmax_of_half_precision_logits_is_taken_in_fp32(dtype):
    logits = (4 * torch.randn(6, 33, generator=torch.Generator().manual_seed(0))).to(dtype)
    targets = torch.arange(6)
    for temperature in (1.0, 0.7):
        agree(of_logits(logits, targets, temperature), oracle.token_logprobs(logits, targets, temperature), 2e-6)


def test_bf16_logits_are_not_rounded_on_a_cpu_and_the_process_is_left_as_it_was():
    """A bf16 logit of 30 would be off by up to 0.06. On processors with bf16 instructions the products use them."""
    rng = torch.Generator().manual_seed(0)
    states, weight = (3 * torch.randn(40, 64, generator=rng).bfloat16() for _ in range(2))
    targets = torch.randint(40, (40,), generator=rng)
    setting = torch.backends.mkldnn.matmul.fp32_precision
    found = log_probs.logprobs([(precise(states), weight)], targets)[0]
    logits = states.double() @ weight.double().t()
    assert logits.abs().max() > 100
    agree(found, logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].float(), 1e-4)
    assert torch.backends.mkldnn.matmul.fp32_precision == setting


@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize("slow", [False, True])
def test_bf16_gradients_are_those_of_exact_arithmetic_but_for_rounding(placed, slow):
    """Of states and of the head, in several tiles of columns; `slow`: as on processors without bf16 instructions."""
    rng = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, 64, generator=rng).bfloat16().requires_grad_() for n in (70, 130_000))
    targets = torch.randint(len(weight), (len(states),), generator=rng)
    if placed:
        weight.grad = torch.zeros_like(weight)
    with computing("wide" if slow else arithmetic_of("cpu")):
        log_probs.logprobs([(precise(states), weight)], targets)[0].sum().backward()
    exact = [one.detach().double().requires_grad_() for one in (states, weight)]
    (exact[0] @ exact[1].t()).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    for ours, theirs in zip((states, weight), exact, strict=True):
        gap = (ours.grad.double() - theirs.grad).abs()
        assert gap.max() <= 2**-7 * theirs.grad.abs().max()
        assert gap.mean() <= 2**-8 * theirs.grad.abs().mean()


def test_large_logits_neither_overflow_nor_lose_their_differences():
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4]], requires_grad=True)
    logprobs, entropy = of_logits(logits, torch.tensor([1]))
    agree((logprobs, entropy), oracle.token_logprobs(logits, torch.tensor([1])))
    logprobs.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_a_token_ruled_out_adds_nothing_to_the_entropy():
    logprobs, entropy = of_logits(torch.tensor([[0.0, -1e30, 0.0]]), torch.tensor([2]))
    agree(logprobs, torch.tensor([-math.log(2)]))
    agree(entropy, torch.tensor([math.log(2)]))


def test_without_entropy_the_log_probs_are_the_same():
    logits, targets = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    logprobs, entropy = of_logits(logits, targets, 0.7, entropy=False)
    assert entropy is None
    assert torch.equal(logprobs, of_logits(logits, targets, 0.7)[0])


def test_many_tokens_are_scored_like_few(monkeypatch):
    """Rows are visited in tiles, and the seams do not show."""
    monkeypatch.setattr(tiling, "HEAD_TILE", 5 * 1024)
    rng = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(5003, 5, generator=rng), torch.randint(5, (5003,), generator=rng)
    logprobs, entropy = of_logits(logits, targets)
    assert logprobs.shape == entropy.shape == (5003,)
    for n in (0, 1, 1023, 1024, 2047, 2048, 4095, 4096, 5002):
        token = slice(n, n + 1)
        agree((logprobs[token], entropy[token]), oracle.token_logprobs(logits[token], targets[token]))


def bent(logits, softcap):
    """Soft-capped, as Gemma 2 does."""
    return torch.tanh(logits / softcap) * softcap if softcap else logits


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("tile", [1, 40, 1 << 23])
@pytest.mark.parametrize("placed", [True, False])
def test_gradients_reach_states_head_and_adapter(tile, placed, softcap, monkeypatch):
    """`placed`: the weights have gradients already, and theirs are added to them."""
    monkeypatch.setattr(tiling, "HEAD_TILE", tile)
    rng = torch.Generator().manual_seed(0)
    given = [torch.randn(*shape, generator=rng) for shape in ((9, 6), (13, 6), (9, 2), (13, 2))]
    targets, upstream = torch.randint(13, (9,), generator=rng), torch.randn(9, generator=rng)
    ours, plain = ([one.clone().requires_grad_() for one in given] for _ in range(2))
    for i in (1, 3):
        if placed:
            ours[i].grad, plain[i].grad = torch.ones_like(given[i]), torch.ones_like(given[i])
    got, entropy = log_probs.logprobs([(ours[0], ours[1]), (ours[2], ours[3])], targets, 0.7, softcap=softcap)
    logits = bent(plain[0] @ plain[1].t() + plain[2] @ plain[3].t(), softcap)
    want, spread = oracle.token_logprobs(logits, targets, 0.7)
    agree((got, entropy), (want, spread), 2e-6)
    (got * upstream).sum().backward()
    (want * upstream).sum().backward()
    for one, other in zip(ours, plain, strict=True):
        assert (one.grad - other.grad).abs().max() <= 1e-5


@pytest.mark.parametrize("targets", ["all-linear", ("lm_head", "wte")])
def test_a_decoder_says_what_its_logits_say(tiny_model, targets):
    actor = Actor.from_pretrained(tiny_model(), lora=LoraSpec(3, targets=targets))
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    hidden = actor(torch.arange(3, 13)[None], None)[0]
    wanted = torch.arange(4, 14)
    expected = oracle.token_logprobs(actor.decoder.logits(hidden), wanted, 1.3)
    agree(actor.decoder.logprobs(hidden, wanted, 1.3), expected, 2e-6)


def test_frozen_weights_get_no_gradient():
    states, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
    log_probs.logprobs([(states, weight)], torch.arange(5))[0].sum().backward()
    assert weight.grad is None
    assert states.grad is not None


def test_logits_exist_a_tile_at_a_time(monkeypatch):
    rows, vocabulary, width = 2048, 2000, 8
    monkeypatch.setattr(tiling, "HEAD_TILE", 64 * vocabulary)
    states = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    with Meter() as meter:
        log_probs.logprobs([(states, weight)], torch.arange(rows) % vocabulary, entropy=False)[0].sum().backward()
    tile, states_bytes = 64 * vocabulary * 4, rows * width * 4
    assert meter.peak <= 1.25 * tile + 4 * states_bytes  # one of them, never the next beside it
    assert meter.peak < 0.1 * rows * vocabulary * 4


def test_a_gpu_has_larger_tiles_than_a_processors_cache():
    """Of 4M logits a GPU's kernels would take less time than it takes to launch them."""
    rows, head = 2100, torch.zeros(9000, 1)
    for arithmetic, most in (("wide sums", tiling.HEAD_TILE), ("narrow", tiling.GPU_HEAD_TILE)):
        with computing(arithmetic):
            tiles = [(some, column) for some, columns in log_probs._tiles(rows, head) for column in columns]
        sizes = [(some.stop - some.start) * (column.stop - column.start) for some, column in tiles]
        assert sum(sizes) == rows * len(head)
        assert most / 2 < max(sizes) <= most


def of_several(logits, ids):
    """The plain formula in float64: log-probabilities of k tokens, and of all others together."""
    logprobs = logits.double().log_softmax(-1)
    rest = logprobs.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([logprobs.gather(1, ids), rest], dim=1)


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, 0.0), (0.7, 0.0), (0.7, 2.0)])
@pytest.mark.parametrize("tile", [1, 40, 1 << 23])
@pytest.mark.parametrize("k", [1, 3, 12])
def test_several_tokens_of_a_state_and_all_others_together(k, tile, temperature, softcap, monkeypatch):
    """Values and gradients, of states, head and adapter, in tiles of any size."""
    monkeypatch.setattr(tiling, "HEAD_TILE", tile)
    rng = torch.Generator().manual_seed(0)
    given = [torch.randn(*shape, generator=rng) for shape in ((9, 6), (13, 6), (9, 2), (13, 2))]
    ids = torch.stack([torch.randperm(13, generator=rng)[:k] for _ in range(9)])
    upstream = torch.randn(9, k + 1, generator=rng)
    ours = [tensor.clone().requires_grad_() for tensor in given]
    plain = [tensor.double().requires_grad_() for tensor in given]
    result, _ = log_probs.logprobs(
        [(ours[0], ours[1]), (ours[2], ours[3])], ids, temperature, entropy=False, others=True, softcap=softcap
    )
    logits = bent(plain[0] @ plain[1].t() + plain[2] @ plain[3].t(), softcap)
    expected = of_several(logits / temperature, ids)
    agree(result, expected.float(), 2e-6)
    (result * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for tensor, other in zip(ours, plain, strict=True):
        assert (tensor.grad - other.grad).abs().max() <= 1e-5


def test_one_token_of_several_is_the_one_token_bit_by_bit():
    rng = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, 16, generator=rng) for n in (40, 3000))
    targets, upstream = torch.randint(3000, (40,), generator=rng), torch.randn(40, generator=rng)
    results = []
    for shape in ((40,), (40, 1)):
        leaves = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
        result, entropy = log_probs.logprobs([(leaves[0], leaves[1])], targets.view(shape), 0.7)
        assert result.shape == shape
        (result.view(40) * upstream).sum().backward()
        results.append([result.view(40), entropy, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_left_beside_the_likeliest_is_never_one_minus_the_rest():
    """A student that is sure has 1e-20 for all others: their gradient must not drown in the rounding of 1 - p."""
    logits = torch.tensor([[50.0, 2.0, 1.0, 0.0]], requires_grad=True)
    plain = logits.detach().double().requires_grad_()
    result = of_logits(logits, torch.tensor([[0]]), entropy=False, others=True)[0]
    expected = of_several(plain, torch.tensor([[0]]))
    agree(result, expected.float(), 2e-6)
    result[0, 1].backward()
    expected[0, 1].backward()
    agree(logits.grad, plain.grad.float(), 2e-6)


def test_nothing_is_left_beside_the_whole_vocabulary():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    result = of_logits(logits, torch.arange(5).expand(3, 5), entropy=False, others=True)[0]
    agree(result[:, :5], logits.double().log_softmax(-1).float(), 2e-6)
    assert (result[:, 5] <= -1e29).all()
    (result.exp() * result).sum().backward()  # minus the entropy
    wanted = logits.detach().double().requires_grad_()
    (wanted.softmax(-1) * wanted.log_softmax(-1)).sum().backward()
    agree(logits.grad, wanted.grad.float(), 2e-6)


@pytest.mark.parametrize("tile", [1, 40, 130, 1 << 23])
@pytest.mark.parametrize(("k", "vocabulary"), [(1, None), (4, None), (13, None), (4, 9), (9, 9)])
def test_the_likeliest_tokens_are_those_of_a_sort(k, vocabulary, tile, monkeypatch):
    monkeypatch.setattr(tiling, "HEAD_TILE", tile)
    rng = torch.Generator().manual_seed(1)
    states, weight = torch.randn(9, 6, generator=rng), torch.randn(13, 6, generator=rng)
    ids, logprobs = log_probs.top_logprobs([(states, weight)], k, 0.7, vocabulary=vocabulary)
    logits = states.double() @ weight.double().t() / 0.7
    assert torch.equal(ids, logits[:, :vocabulary].argsort(dim=1, descending=True)[:, :k])
    agree(logprobs, of_several(logits, ids).float().clamp(min=log_probs.NEVER), 2e-6)


def test_the_likeliest_tokens_of_a_decoder_have_the_log_probs_that_it_gives_them(tiny_model):
    actor = Actor.from_pretrained(tiny_model(), lora=LoraSpec(3, targets=("lm_head", "wte")))
    hidden = actor(torch.arange(3, 13)[None], None)[0].detach()
    ids, logprobs = actor.decoder.top_logprobs(hidden, 5, 1.3)
    agree(logprobs, actor.decoder.logprobs(hidden, ids, 1.3, entropy=False, others=True)[0], 2e-6)


def test_the_likeliest_tokens_are_sought_a_tile_at_a_time(monkeypatch):
    rows, vocabulary, width, k = 2048, 2000, 8, 4
    monkeypatch.setattr(tiling, "HEAD_TILE", 64 * vocabulary)
    states, weight = torch.randn(rows, width), torch.randn(vocabulary, width)
    with Meter() as meter:
        log_probs.top_logprobs([(states, weight)], k)
    assert meter.peak <= 1.25 * 64 * vocabulary * 4 + 3 * rows * k * 12
    assert meter.peak < 0.1 * rows * vocabulary * 4


@pytest.mark.parametrize(("divisor", "softcap"), [(8.0, 0.0), (1.0, 2.0)])
def test_a_decoder_that_bends_its_logits_says_what_they_say(divisor, softcap):
    """Granite divides them, Gemma 2 caps them: the same in logits, log-probs and the likeliest tokens."""
    config = DecoderConfig("gemma2", 37, 16, 1, 2, 2, 8, 24, 16, logit_divisor=divisor, logit_softcap=softcap)
    decoder = Decoder(config, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        decoder.embed.tokens.mul_(40.0)  # loud enough to be capped
    states = decoder(torch.arange(10)[None])[0]
    with torch.no_grad():
        logits, raw = decoder.logits(states), states @ decoder.head_weight.t()
    assert torch.allclose(logits, bent(raw / divisor, softcap), atol=1e-5)
    assert raw.abs().max() > softcap
    ids, likely = decoder.top_logprobs(states, 3, 0.7)
    expected = (logits / 0.7).log_softmax(-1).topk(3)
    assert torch.equal(ids, expected.indices)
    assert torch.allclose(likely[:, :3], expected.values, atol=1e-5)
    said, _ = decoder.logprobs(states, ids[:, 1], 0.7)
    assert torch.allclose(said, expected.values[:, 1], atol=1e-5)
