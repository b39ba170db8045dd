"""SFT: the loss and its gradient against transformers' own, and which tokens they are about."""

import datetime
import json
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from penstock.algorithms import functional as fn
from penstock.algorithms.ppo import ppo
from penstock.algorithms.sft import heldout_loss, micro_batches, prompt_of, response_logprobs, sft
from penstock.commands.config import ExportConfig
from penstock.commands.export import export
from penstock.config import DataFlags, LoraFlags, OptimFlags, RunFlags, SFTConfig
from penstock.data.chat import Encoder
from penstock.data.limits import Example
from penstock.data.records import Prompt
from penstock.errors import UserError
from penstock.flags import from_dict
from penstock.memory.strategy import Strategy
from penstock.models.roles import Actor
from penstock.rollout.engine import Engine
from penstock.rollout.sampling import Sampling
from penstock.run.session import Session
from tests.conftest import CHATML, demonstrations, last_model, metrics, ppo_config

CPU = torch.device("cpu")
EXAMPLES = [
    Example([1, 3, 4, 5, 2], [False, False, False, True, True]),
    Example([1, 6, 2], [False, True, True]),
    Example([1, 7, 8, 2, 9, 10, 11, 2], [False, False, True, True, False, False, True, True]),  # two turns
    Example([1, 12], [False, True]),  # cut before its EOS
]
COUNT = sum(sum(example.trained) for example in EXAMPLES)


def theirs(address):
    """transformers' loss and gradients: labels of -100 wherever a token is not trained, one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(address)
    loss = torch.zeros(())
    for example in EXAMPLES:
        labels = [token if flag else -100 for token, flag in zip(example.tokens, example.trained, strict=True)]
        output = model(torch.tensor([example.tokens]), labels=torch.tensor([labels]))
        loss = loss + output.loss * sum(example.trained) / COUNT
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_loss_and_gradient_are_those_of_transformers_in_any_micro_batch(tiny_model, size):
    address = tiny_model()
    loss, grads = theirs(address)
    actor, total = Actor.from_pretrained(address), 0.0
    for batch in micro_batches(EXAMPLES, size, CPU):
        part = fn.sft_loss(response_logprobs(actor, actor(batch.tokens, None), batch), COUNT)
        part.backward()
        total += float(part.detach())
    assert total == pytest.approx(loss, abs=1e-6)
    assert torch.allclose(actor.decoder.embed.tokens.grad, grads["transformer.wte.weight"], atol=1e-6)
    assert torch.allclose(actor.decoder.embed.positions.grad, grads["transformer.wpe.weight"], atol=1e-6)
    ours = actor.decoder.blocks[0].qkv.weight.grad
    assert torch.allclose(ours, grads["transformer.h.0.attn.c_attn.weight"].T, atol=1e-6)


def test_heldout_loss_is_a_mean_over_trained_tokens(tiny_model):
    address = tiny_model()
    strategy, actor = Strategy.named("naive", device="cpu"), Actor.from_pretrained(address)
    found = heldout_loss(strategy, strategy.prepare(actor), EXAMPLES, 2)
    assert found == pytest.approx(theirs(address)[0], abs=1e-6)


def test_micro_batches_hold_every_row_once_and_neighbours_in_length():
    batches = micro_batches(EXAMPLES, 3, CPU)
    rows = [[token for token in row if token] for batch in batches for row in batch.tokens.tolist()]  # 0 pads
    assert sorted(rows) == sorted(example.tokens for example in EXAMPLES)
    assert sum(int(batch.trained.sum()) for batch in batches) == COUNT
    assert [len(batch.tokens) for batch in batches] == [3, 1]
    assert batches[1].tokens.shape[1] == 8


def test_a_probe_is_everything_before_the_last_answer():
    assert prompt_of(EXAMPLES[0]) == [1, 3, 4]
    assert prompt_of(EXAMPLES[2]) == [1, 7, 8, 2, 9, 10]


def test_the_best_checkpoint_has_the_lowest_heldout_loss(tmp_path, tiny_model, jsonl):
    """Noise learned by heart: the held-out loss rises again, and `best` is not `latest` (PPO.md 24)."""
    run = sft(
        SFTConfig(
            model=tiny_model(), data=DataFlags(data=(jsonl(demonstrations(12)),), max_length=32),
            run=RunFlags(out=str(tmp_path / "run"), checkpoint_every=1, keep=99),
            optim=OptimFlags(lr=2e-2, batch_size=4, micro_batch_size=4, steps=24), heldout=0.5, eval_every=1,
        )
    )  # fmt: skip
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["heldout/loss"] for row in rows}
    best = min(losses, key=losses.get)
    assert (Path(run) / "checkpoints" / "best").read_text().split()[0] == f"step-{best:06d}"
    assert best < 24


def test_it_learns_what_it_is_shown(tmp_path, tiny_model, jsonl):
    rows = [{"prompt_ids": [1, 3 + i], "response_ids": [15 - i, 15 - i]} for i in range(5)] * 4
    run = sft(
        SFTConfig(
            model=tiny_model(), data=DataFlags(data=(jsonl(rows),), max_length=32),
            run=RunFlags(out=str(tmp_path / "r")), heldout=0.0,
            optim=OptimFlags(lr=2e-2, batch_size=10, micro_batch_size=5, steps=60),
        )
    )  # fmt: skip
    samples = [json.loads(line) for line in (Path(run) / "samples.jsonl").read_text().splitlines()]
    after = {row["prompt"]: row["response"] for row in samples if row["step"] == 60}
    assert after["[1, 3]"] == "[15, 15, 2]"
    assert all(after[f"[1, {3 + i}]"] == f"[{15 - i}, {15 - i}, 2]" for i in range(5) if f"[1, {3 + i}]" in after)


CHAT = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]}] * 4


@pytest.fixture
def chat_run(tmp_path, make_tokenizer, tiny_model, jsonl):
    """chat_run(**flags): a run that has learned CHAT by heart, on a model whose config ends answers with <eos>."""

    def run(template=CHATML, eos_token="<eos>", steps=60, **flags):
        model = make_tokenizer("model", template=template, eos_token=eos_token)
        tiny_model("model", vocab_size=320, hf={} if eos_token is None else {"eos_token_id": 1})
        optim = OptimFlags(lr=2e-2, batch_size=4, micro_batch_size=4, steps=steps, warmup=0.0)
        data = DataFlags(
            data=(jsonl(CHAT),), max_length=32, **{key: flags.pop(key) for key in ("eos",) if key in flags}
        )
        out = RunFlags(out=str(tmp_path / "run"), checkpoint_every=1000)
        peft = LoraFlags(**flags)
        return sft(SFTConfig(model=str(model), data=data, run=out, optim=optim, peft=peft, heldout=0.0, samples=0))

    return run


def answers_of(directory, prompt):
    """What transformers and our engine answer, greedily: the ids of each."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :].tolist()
    engine = Engine.from_pretrained(str(directory), device="cpu")
    (ours,) = engine.generate([prompt], Sampling(temperature=0.0, max_new_tokens=12))
    return theirs, ours


def test_what_was_trained_to_end_a_turn_ends_answers_of_all_that_comes_out(chat_run, tmp_path):
    run = chat_run()
    export(ExportConfig(run=str(run), out=str(tmp_path / "exported")))
    encoder = Encoder.for_model(str(tmp_path / "exported"), eos_ids=[1], vocab_size=320, max_length=32)
    prompt = encoder.encode_prompt(Prompt(where="f:1", messages=({"role": "user", "content": "Hi"},)))
    for directory in (last_model(run), tmp_path / "exported"):
        theirs, ours = answers_of(directory, prompt)
        assert encoder.tokenizer.decode(theirs) == "Hello there<|im_end|>"
        assert ours.response_ids == theirs
        assert ours.finish_reason == "stop"
        assert ours.text == "Hello there"
        for name in ("config.json", "generation_config.json"):
            assert json.loads((directory / name).read_text())["eos_token_id"] == [1, 3]


@pytest.fixture
def ppo_step(chat_run, tmp_path, jsonl):
    """ppo_step(**flags): the metrics of one step of PPO from `chat_run`; a score is an answer's length in letters."""

    def step(**flags):
        (tmp_path / "fn.py").write_text(
            "def score(prompts, responses, **_):\n    return [float(len(r)) for r in responses]\n"
        )
        config = ppo_config(
            actor=str(chat_run()), reward_fn=f"{tmp_path}/fn.py:score", run=RunFlags(out=str(tmp_path / "ppo")),
            data=DataFlags(data=(jsonl([{"messages": CHAT[0]["messages"][:1]}]),), max_length=32), samples=2,
            optim=OptimFlags(lr=1e-6, batch_size=4, steps=1, epochs=1), **{"max_new_tokens": 12} | flags,
        )  # fmt: skip
        (row,) = metrics(ppo(config))
        return row

    return step


def test_a_turn_that_ends_as_its_template_ends_it_is_not_cut_for_ppo(ppo_step):
    row = ppo_step()
    assert row["val/missing_eos_rate"] == 0.0
    assert row["objective/scores"] == len("Hello there")


def test_a_text_ends_the_answers_of_ppo_and_stays_in_them(ppo_step):
    """Issue 19, item 16: --stop. The answers of `show` end at it too."""
    row = ppo_step(stop=("lo",))
    assert row["val/missing_eos_rate"] == 0.0
    assert row["objective/scores"] == len("Hello")


def test_no_answer_of_ppo_ends_before_min_new_tokens(ppo_step, tmp_path):
    row = ppo_step(min_new_tokens=10)
    assert row["objective/response_length"] >= 10
    assert "truncated (min_new_tokens=10): KL may turn negative" in (tmp_path / "ppo" / "log.txt").read_text()


def test_an_adapter_and_what_is_merged_of_it_end_answers_as_trained(chat_run, tmp_path):
    run = chat_run(lora=16, steps=120)
    export(ExportConfig(run=str(run), out=str(tmp_path / "merged"), merge=True))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["eos_token_id"] == [1, 3]
    for directory in (last_model(run), tmp_path / "merged"):
        assert Actor.from_pretrained(str(directory)).decoder.config.eos_ids == (1, 3)


def test_a_model_without_any_end_trains_with_the_token_that_is_named(chat_run, tmp_path):
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(UserError, match=r"no response could ever end; give the token that is to end them: --eos"):
        chat_run(template=bare, eos_token=None)
    run = chat_run(template=bare, eos_token=None, eos="<|im_end|>", steps=2)
    assert json.loads((last_model(run) / "config.json").read_text())["eos_token_id"] == 3
    assert AutoTokenizer.from_pretrained(last_model(run)).eos_token == "<|im_end|>"
    assert "answers: the template ends them with no token" in (run / "log.txt").read_text()


def test_templates_go_out_as_they_came_in(chat_run, tmp_path):
    named = {"default": CHATML, "tool_use": "tools" + CHATML}
    run = chat_run(template=named, eos_token="<|im_end|>", steps=1)
    export(ExportConfig(run=str(run), out=str(tmp_path / "exported")))
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").chat_template == named


def test_a_missing_generation_prompt_is_in_what_comes_out(chat_run):
    bare = CHATML.partition("{% if add")[0]
    template = AutoTokenizer.from_pretrained(last_model(chat_run(template=bare, steps=1))).chat_template
    assert template.startswith(bare)
    assert template.endswith('{% if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}')


def test_the_day_of_a_run_is_kept_in_it(chat_run):
    run = chat_run(template="{{ strftime_now('%Y') }}" + CHATML, steps=1)
    flags = tomllib.loads((run / "config.toml").read_text())
    assert datetime.date.today() - datetime.date.fromisoformat(flags["date"]) <= datetime.timedelta(days=1)
    config = from_dict(SFTConfig, {key: flags[key] for key in flags if key != "command"} | {"date": "2001-02-03"})
    session = Session("sft", config, Strategy.named("naive", device="cpu").world, resume=True)
    assert session.config.data.date == "2001-02-03"
