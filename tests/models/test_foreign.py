"""Transformers' own layers as our blocks, against transformers: logits, gradients, files, text, every strategy, LoRA.

`-m slow` runs all architectures of the table, make test those that differ most.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from penstock.algorithms.ppo import ppo
from penstock.algorithms.sft import Rows, response_logprobs
from penstock.distributed.world import World
from penstock.errors import UserError
from penstock.memory.prepare import groups_of
from penstock.memory.program import visits_of
from penstock.memory.strategy import Strategy
from penstock.models import lora_targets, pretrained, weight_shapes
from penstock.models.foreign.family import path_of
from penstock.models.lora_targets import LoraSpec
from penstock.models.roles import Actor, Critic
from penstock.planner.config import PlanConfig
from penstock.planner.from_flags import config_of, setting_of
from penstock.rollout.engine import Engine, generate
from penstock.rollout.sampling import Sampling
from tests.algorithms.test_ppo import REWARD_FN, write_reward_fn
from tests.algorithms.test_ppo import config as ppo_settings
from tests.conftest import cli, last_model, metrics, torchrun
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
    torch.set_default_dtype(theirs.dtype)  # of what layers make themselves
    try:
        rows = [row[None, :length] for row, length in zip(TOKENS, LENGTHS, strict=True)]
        return torch.cat([theirs(row, use_cache=False).logits[0] for row in rows])
    finally:
        torch.set_default_dtype(torch.float32)


def in_fp64(theirs: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """In parts some layers keep to fp32; experts are called one by one, for their usual product has no fp64."""
    exact = copy.deepcopy(theirs).double()
    exact.set_experts_implementation("eager")
    return exact


def rounding_of(theirs: transformers.PreTrainedModel) -> float:
    """How far two computations of logits may be apart, of which one rounds as transformers' fp32 does, and the other up
    to three times as much: a delta rule multiplies roundings, other layers do not."""
    with torch.no_grad():
        return 4 * float((rows_alone(theirs) - rows_alone(in_fp64(theirs))).abs().max()) + 1e-5


@torch.no_grad()
def apart(values: Tensor, exact: Tensor) -> float:
    """The largest difference, in shares of the largest number where that is above 1."""
    return float((values - exact).abs().max() / exact.abs().max().clamp(min=1))


@every
def test_logits_and_gradients_are_those_of_transformers_on_ragged_rows(models, name):
    """From its fp64 no further than three times as far as its own fp32 is."""
    theirs, directory = models(name)
    ours, exact = pretrained.load(directory)[0], in_fp64(theirs)
    logits = [ours.logits(ours(TOKENS))[VALID], rows_alone(theirs), rows_alone(exact)]
    assert logits[1].std() > 0.5  # else the comparison says nothing
    assert apart(logits[0], logits[2]) <= 3 * apart(logits[1], logits[2]) + 1e-5
    slopes = torch.randn(logits[1].shape, generator=torch.Generator().manual_seed(1)) / len(logits[1])
    theirs.zero_grad()
    for each in logits:
        (each * slopes).sum().backward()
    names = {ours.theirs[weight]: parameter for weight, parameter in ours.named_parameters()}
    grads = {
        weight: (names[weight].grad, rounded.grad, wanted.grad)
        for (weight, rounded), wanted in zip(theirs.named_parameters(), exact.parameters(), strict=True)
        if weight in names and names[weight].requires_grad and wanted.grad is not None
    }
    rounding = max(apart(rounded, wanted) for _, rounded, wanted in grads.values())
    for weight, (found, _, wanted) in grads.items():
        assert found is not None, weight
        assert apart(found, wanted) <= 3 * rounding + 1e-5, weight


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
    batches = [Rows(rows, valid.clone()) for rows, valid in zip(TOKENS.split(2), VALID.split(2), strict=True)]
    for batch in batches:
        batch.trained[:, 0] = False

    def loss_of(hidden: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        return -response_logprobs(actor, hidden, rows).sum() / int(VALID.sum()), {}

    with strategy.phase("train"):
        own = strategy.world.share_of(batches)
        losses = [strategy.step(stream, own, loss_of, lr=1e-3).sums["loss"] for _ in range(2)]
    for phase in ("rollout", "score") if strategy_name == "fsdp" else ():  # gathered once, and visit by visit
        with strategy.phase(phase):
            answers = [answer.response_ids for answer in sampled(actor.decoder)]
        assert strategy.world.gather(answers) == [answers] * strategy.world.size
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
    if name == "openai-gpt":  # its products are Conv1D
        with pytest.raises(UserError, match="no layer of this model is a linear one"):
            trained(directory, "gemini_cpu", tmp_path, lora=4)
        return
    actor, losses = trained(directory, "gemini_cpu", tmp_path, lora=4)
    assert losses[1] < losses[0]
    tensors = weights_of(actor, tmp_path / "adapter")
    assert all("lora" in weight for weight in tensors)
    halves = [bool(tensor.any()) for weight, tensor in tensors.items() if "lora_B" in weight]
    assert sum(halves) > 0.7 * len(halves)
    again = Actor.from_pretrained(str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(again.decoder.logits(again(TOKENS, None)), actor.decoder.logits(actor(TOKENS, None)))


@every
def test_a_ppo_iteration_reads_what_the_engine_wrote_and_saves_what_transformers_loads(models, tmp_path, jsonl, name):
    rewards = write_reward_fn(tmp_path, REWARD_FN.format(table={token: token / 48 - 1 for token in range(96)}))
    prompts = jsonl([{"prompt_ids": [1, 3, *range(3, 3 + i)]} for i in range(4)])
    settings = {
        "optim": {"steps": 1, "batch_size": 4, "micro_batch_size": 2, "epochs": 1},
        "samples": 0,
        "missing_eos_penalty": None,
    }
    run = ppo(ppo_settings(tmp_path, str(models(name)[1]), prompts, rewards, **settings))
    (row,) = metrics(run)
    near = rounding_of(models(name)[0])
    assert row["val/first_ratio_gap"] <= near
    assert row["val/engine_logprob_gap"] <= near
    theirs = transformers.AutoModelForCausalLM.from_pretrained(last_model(run), dtype=torch.float32)
    ours = pretrained.load(last_model(run))[0]
    with torch.no_grad():
        assert (theirs.eval()(TOKENS).logits - ours.logits(ours(TOKENS))).abs().max() <= near


@every
def test_the_plan_knows_the_weights_of_the_model_without_reading_them(models, name):
    """In bf16, where some architectures keep single weights in fp32; of actor and critic, with and without adapters."""
    directory = models(name)[1]
    config = config_of(str(directory), "--model")
    strategy = Strategy.named("ddp", device="cpu", dtype="bf16")
    for role, spec in ((Actor, None), (Critic, None), (Actor, LoraSpec(2))):
        if spec and not config.foreign.products:  # OpenAI's first model: all of its products are convolutions
            with pytest.raises(UserError, match="no layer of this model is a linear one"):
                role.from_pretrained(str(directory), lora=spec)
            continue
        with strategy.init():
            model = role.from_pretrained(str(directory), lora=spec)
        options: Any = {"trained": True, "scalar": role is Critic}
        if spec is None:
            planned = weight_shapes.groups_of(config, "bfloat16", **options)
        else:
            planned = lora_targets.groups_of(config, "bfloat16", spec, **options)
        real = {(w.name, w.shape, w.dtype, w.trained) for _, members in groups_of(model) for w in members}
        assert {(w.name, w.shape, w.dtype, w.trained) for _, members in planned for w in members} == real
        assert weight_shapes.visits_of(config, scalar=options["scalar"]) == visits_of(model)


SHARDED = {"qwen3_5_text": {"lora": 4}, "deepseek_v3": {}, "gptj": {}}
WORKER = """
import json, sys
from pathlib import Path
from penstock.distributed.world import World
from tests.models.test_foreign import SHARDED, trained

folder = Path(sys.argv[1])
for name, options in SHARDED.items():
    actor, losses = trained(folder / name, "fsdp", folder, **options)
    world = World.join("cpu")
    actor.save_pretrained(folder / f"{name}-fsdp" if world.first else None)
    if world.first:
        print(json.dumps([name, losses]))
World.join("cpu").leave()
"""


def test_two_ranks_of_fsdp2_learn_what_one_learns(models, tmp_path):
    """Of a hybrid with adapters, a mixture, and a head with a bias."""
    for name in SHARDED:
        (tmp_path / name).symlink_to(models(name)[1])
    (tmp_path / "worker.py").write_text(WORKER)
    root = Path(__file__).parents[2]
    printed = torchrun(tmp_path / "worker.py", tmp_path, PYTHONPATH=f"{root / 'src'}:{root}")
    of_two = dict(map(json.loads, printed.splitlines()))
    for name, options in SHARDED.items():
        actor, losses = trained(tmp_path / name, "ddp", tmp_path, **options)
        assert of_two[name] == pytest.approx(losses, abs=1e-5)
        weights = weights_of(actor, tmp_path / f"{name}-ddp")
        sharded = load_file(next((tmp_path / f"{name}-fsdp").glob("*.safetensors")))
        assert weights.keys() == sharded.keys()
        for weight, tensor in weights.items():
            assert torch.allclose(sharded[weight], tensor, atol=1e-5, rtol=0), (name, weight)


def test_fsdp2_does_not_take_layers_that_share_weights(models):
    directory = str(models("zamba")[1])
    strategy = Strategy("fsdp", World(0, 2, torch.device("cpu")), torch.float32)
    with strategy.init():
        actor = Actor.from_pretrained(directory)
    for refused in (
        lambda: strategy.prepare(actor),
        lambda: setting_of(PlanConfig(model=directory, stage="sft", strategy="fsdp", world=2, prompt_length=32)),
    ):
        with pytest.raises(UserError, match="--strategy fsdp: FSDP2 does not shard weights that layers share"):
            refused()


# --- what is refused --------------------------------------------------------------------------------------------------


GEMMA3N = {
    "model_type": "gemma3n_text", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64, "laurel_rank": 4,
    "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0, 0.0],
}  # fmt: skip


@pytest.mark.parametrize(("hf", "path", "reason"), [
    ({"model_type": "llama"}, "native", "a family of penstock's own decoder"),
    ({"model_type": "novel", "auto_map": {"AutoModelForCausalLM": "modeling.Novel"}}, "refused", "trust_remote_code"),
    ({"model_type": "vit"}, "refused", "has no causal language model of that type"),
    ({"model_type": "bert"}, "refused", "reads in both directions"),
    (GEMMA3N, "refused", "leave each other tensors"),
    ({"model_type": "phi", "hidden_size": "wide"}, "refused", "transformers does not build it"),
])  # fmt: skip
def test_the_path_of_a_config_and_its_reason(hf, path, reason):
    taken, why = path_of(hf)
    assert taken == path
    assert reason in why


def test_layers_that_hand_each_other_more_than_states_are_refused_before_anything_runs(models, capsys):
    directory = models("glm_moe_dsa")[1]
    reason = "its layers hand each other more than states"
    assert path_of(models("glm_moe_dsa")[0].config.to_dict()) == ("refused", reason)
    with pytest.raises(UserError, match=reason):
        pretrained.load(directory, device="meta")
    for command in (("plan", "--model", directory), ("doctor", directory)):
        assert cli(*command) == 2
        assert reason in " ".join(capsys.readouterr().err.split())


def test_the_path_of_a_model_that_transformers_builds(models):
    taken, why = path_of(models("mamba")[0].config.to_dict())
    assert (taken, "transformers' own layers are its blocks" in why) == ("foreign", True)


def test_what_transformers_layers_cannot_do_is_refused_by_its_flag(models, tmp_path):
    directory = models("gptj")[1]
    for options, flag in (
        ({"recompute": False}, "--keep-activations"),
        ({"activation_budget": "1MB"}, "--activation-budget"),
    ):
        strategy = Strategy.named("gemini_cpu", device="cpu", **options)
        with strategy.init():
            actor = Actor.from_pretrained(str(directory))
        with pytest.raises(UserError, match=flag):
            strategy.prepare(actor)
    with pytest.raises(UserError, match="int8"):
        Engine.from_pretrained(str(directory), dtype="int8")


def test_a_cache_that_differs_from_whole_rows_is_not_used(models, monkeypatch):
    directory, length = models("gptj")[1], transformers.DynamicCache.get_seq_length
    right = [answer.response_ids for answer in sampled(pretrained.load(directory)[0])]
    monkeypatch.setattr(transformers.DynamicCache, "get_seq_length", lambda *args, **names: length(*args, **names) + 1)
    with pytest.warns(UserWarning, match="gives other states than whole rows"):
        assert [answer.response_ids for answer in sampled(pretrained.load(directory)[0])] == right


def test_the_last_layers_alone_learn(models, tmp_path):
    directory = models("gptj")[1]
    actor, _ = trained(directory, "gemini_cpu", tmp_path, unfrozen=1)
    before, after = load_file(directory / "model.safetensors"), weights_of(actor, tmp_path / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(("transformer.h.2.", "transformer.ln_f", "lm_head")) for name in moved)


def test_a_packed_base_learns_through_adapters_and_streams(models, tmp_path):
    for strategy in ("ddp", "gemini_cpu"):
        _, losses = trained(models("qwen3_5_text")[1], strategy, tmp_path, lora=4, base_dtype="nf4")
        assert losses[1] < losses[0]
