"""What a reward model of another tokenizer reads: the actor's text, never its ids, and no more than was answered; and
what several rewards add up to."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.algorithms import reward_source
from penstock.algorithms.reward_functions import RewardFunction
from penstock.algorithms.reward_source import ModelReward, RewardSum, scorable
from penstock.config import DataFlags, RewardFlags
from penstock.data.chat import Encoder
from penstock.data.records import Prompt
from penstock.errors import DataError, UserError
from penstock.memory.strategy import Strategy
from penstock.models.roles import RewardModel
from penstock.rollout.engine import Answer
from tests.conftest import CHATML


@pytest.fixture
def read_rows(make_tokenizer, tiny_model, monkeypatch):
    """read_rows(records, answers, template): the rows that a reward model with this template scores."""
    rows = []

    def score_rows(strategy, stream, batch, size):
        rows.extend(batch)
        return [0.0] * len(batch)

    def read(records, answers, template=CHATML, **flags):
        flags = DataFlags(data=(), **flags)
        sizes = {"eos_ids": [1], "vocab_size": 320, "max_length": 100}
        actor = Encoder.for_model(str(make_tokenizer("actor", bos=True)), **sizes)
        judge = Encoder.for_model(str(make_tokenizer("judge", template=template)), **sizes, flags=flags, task="judge")
        model = RewardModel.from_pretrained(tiny_model("reward", vocab_size=320))
        source = ModelReward(model, Strategy.named("naive", device="cpu"), actor, judge, 4)
        source.stream = object()
        source.score(records, [make(actor) for make in answers])
        return [judge.tokenizer.decode(row) for row in rows]

    monkeypatch.setattr(reward_source, "score_rows", score_rows)
    return read


def answer(prompt: str, response: str, ended: bool = True):
    """The actor's answer, in its own tokens."""

    def make(actor):
        ids = actor.tokenizer(response, add_special_tokens=False).input_ids + [1] * ended
        return Answer(actor.tokenizer(prompt).input_ids, ids, finish_reason="stop" if ended else "length")

    return make


def test_prompts_of_token_ids_reach_it_as_text(read_rows):
    record = Prompt(where="f:1", prompt_ids=(5, 6, 7))  # another text in the reward model's tokenizer
    assert read_rows([record], [answer("Hello there", " fine")]) == ["Hello there fine<eos>"]
    said: list[str] = []
    source = ModelReward.__new__(ModelReward)
    source.reads_actor_tokens = False
    source.check([record], said.append)
    assert said == ["1 prompts are token ids; the reward model has another tokenizer and reads their text"]


def test_a_cut_answer_is_not_closed_by_its_template(read_rows):
    record = Prompt(where="f:1", messages=({"role": "user", "content": "Hi"},))
    text = "Q: Hi\n"
    for template, closed in (
        (CHATML, "<|im_end|>"),
        ("{% for m in messages %}{{ m.content }} ###{% endfor %}", " ###"),
    ):
        whole, cut = read_rows([record] * 2, [answer(text, "Yes"), answer(text, "Yes", ended=False)], template)[-2:]
        assert whole.startswith(cut + closed)
        assert cut.endswith("Yes")


def test_plain_prompts_become_turns_of_its_template_as_they_do_for_the_actor(read_rows):
    record = Prompt(where="f:1", prompt="Hi")
    (row,) = read_rows([record], [answer("Hi", "Yes")], apply_chat_template=True, system="S", template_args=("x=1",))
    assert row == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>"
    )


def test_without_a_tokenizer_it_is_refused_at_the_start(make_tokenizer, tiny_model, tmp_path):
    RewardModel.from_pretrained(tiny_model("base", vocab_size=330)).save_pretrained(tmp_path / "reward")
    config = RewardFlags(reward=str(tmp_path / "reward"))
    actor = Encoder.for_model(str(make_tokenizer("actor")), eos_ids=[1], vocab_size=320, max_length=100)
    with pytest.raises(UserError, match="does not read the actor's tokens, and texts cannot go between them"):
        reward_source.reward_source(config, actor, Strategy.named("naive", device="cpu"), DataFlags(data=()), 4, print)


def test_a_function_reads_special_tokens_that_are_text(make_tokenizer):
    directory = make_tokenizer(template=CHATML, eos_token="<|im_end|>", extra_special_tokens=["<think>"])
    actor = Encoder.for_model(str(directory), eos_ids=[1], vocab_size=330, max_length=100)
    texts = []
    function = RewardFunction("f.py:score", lambda prompts, responses: texts.extend(prompts + responses) or [0.0])
    ids = actor.tokenizer("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n").input_ids
    answer = Answer(ids, actor.tokenizer("<think>Hm<|im_end|>").input_ids)
    RewardSum([function], actor).score([Prompt(where="f:1")], [answer])
    assert texts == ["user\nHi\nassistant\n", "<think>Hm"]


def test_the_bias_of_a_head_is_added_to_the_score_and_no_scale_is_claimed(tiny_model, tmp_path):
    RewardModel.from_pretrained(tiny_model()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith("penstock_")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    states, plain = torch.randn(4, 16), RewardModel.trained(str(tmp_path))
    save_file(
        {**load_file(tmp_path / "model.safetensors"), "score.bias": torch.ones(1)}, tmp_path / "model.safetensors"
    )
    biased = RewardModel.trained(str(tmp_path))
    assert torch.allclose(biased.read(states), plain.read(states) + 1.0)
    encoder = Encoder(None, eos_ids=[2], vocab_size=16, max_length=32)
    assert not ModelReward(biased, Strategy.named("naive", device="cpu"), encoder, encoder, 4).has_scale


# --- several rewards --------------------------------------------------------------------------------------------------
PLAIN = Encoder(None, eos_ids=[2], vocab_size=16, max_length=32)
ANSWERS = [Answer([1], [3]), Answer([1, 4], [4, 5]), Answer([1], [6, 6, 6])]
RECORDS = [Prompt(where=f"data.jsonl:{i + 1}", prompt_ids=(1,), fields={"answer": i}) for i in range(3)]


def functions(tmp_path, **bodies):
    """Functions of a file, by name, each a line of code that gives the scores."""
    lines = [
        f"def {name}(prompts, responses, *, response_ids, **_):\n    return {body}\n" for name, body in bodies.items()
    ]
    (tmp_path / "fn.py").write_text("".join(lines))
    return [RewardFunction.load(f"{tmp_path / 'fn.py'}:{name}") for name in bodies]


def test_scores_are_the_weighted_sum_of_the_parts_that_apply(tmp_path):
    tokens, odd = "[len(ids) for ids in response_ids]", "[1.0 if len(ids) % 2 else None for ids in response_ids]"
    parts = functions(tmp_path, tokens=tokens, odd=odd)
    assert RewardSum(parts, PLAIN).score(RECORDS, ANSWERS) == [2.0, 2.0, 4.0]
    source = RewardSum(parts, PLAIN, weights=(0.5, -2.0))
    assert source.score(RECORDS, ANSWERS) == [0.5 - 2.0, 1.0, 1.5 - 2.0]
    expected = {"rewards/tokens/mean": 2.0, "rewards/tokens/std": 1.0, "rewards/odd/mean": 1.0, "rewards/odd/std": 0.0}
    parts = torch.tensor(source.score_parts(RECORDS, ANSWERS))[:, 1:]
    assert source.metrics(parts) == expected  # of the parts themselves, over the answers that they apply to


def test_an_answer_that_nothing_scores_is_an_error(tmp_path):
    parts = functions(tmp_path, first="[0.0, None, 1.0]", second="[1.0, None, None]")
    with pytest.raises(UserError, match=r"none gives a score \(all None\); the answer to data.jsonl:2 \[1, 4\]"):
        RewardSum(parts, PLAIN).score(RECORDS, ANSWERS)


@pytest.mark.parametrize(("body", "why"), [
    ("[0.0, float('nan'), 1.0]", r"fn.py:score: gave nan; scores must be finite; the answer to data.jsonl:2 \[1, 4\]"),
    ("[0.0]", r"gave 1 scores for 3 responses; 3 answers, the first is the answer to data.jsonl:1 \[1\]"),
    ("[1 / (len(ids) - 3) for ids in response_ids]", r"ZeroDivisionError.*; the answer to data.jsonl:3 \[1\]"),
])  # fmt: skip
def test_errors_name_the_function_and_the_record(tmp_path, body, why):
    with pytest.raises(UserError, match=why):
        RewardSum(functions(tmp_path, score=body), PLAIN).score(RECORDS, ANSWERS)


def test_functions_of_one_name_have_metrics_of_their_own(tmp_path):
    source = RewardSum([RewardFunction.load("regex:a"), RewardFunction.load("regex:b")], PLAIN)
    parts = torch.tensor(source.score_parts(RECORDS, ANSWERS))[:, 1:]
    assert [*source.metrics(parts)] == [
        f"rewards/{name}/{kind}" for name in ("regex", "regex_2") for kind in ("mean", "std")
    ]


def test_scores_without_parts_have_no_metrics_of_parts():
    """Those of a step that an earlier release stopped inside: resuming it raised."""
    source = RewardSum([RewardFunction.load("regex:a")], PLAIN)
    assert source.metrics(torch.zeros(3, 0)) == {}


def test_a_reward_model_and_functions_are_summed_and_the_model_reads_the_actors_tokens(
    tiny_model, tmp_path, monkeypatch
):
    RewardModel.from_pretrained(tiny_model()).save_pretrained(tmp_path / "judge")
    rows = []
    monkeypatch.setattr(reward_source, "score_rows", lambda *args: rows.extend(args[2]) or [10.0, 20.0, 30.0])
    (function,) = functions(tmp_path, tokens="[len(ids) for ids in response_ids]")
    flags = RewardFlags(reward=str(tmp_path / "judge"), reward_fn=(function.address,), reward_weights=(0.1, 1.0))
    strategy, lines = Strategy.named("naive", device="cpu"), []
    source = reward_source.reward_source(flags, PLAIN, strategy, DataFlags(data=()), 4, lines.append)
    source.stream = object()
    assert source.score(RECORDS, ANSWERS) == pytest.approx([1.0 + 1, 2.0 + 2, 3.0 + 3])
    assert rows == [[1, 3], [1, 4, 4, 5], [1, 6, 6, 6]]
    assert [*source.metrics(torch.zeros(3, 2))][::2] == ["rewards/judge/mean", "rewards/tokens/mean"]
    assert not source.reads_actor_tokens  # it is not scored beside the other models, or the functions would not count
    assert not source.starts_critic


def test_a_field_that_no_record_has_is_refused_and_those_that_are_read_are_named(tmp_path):
    (tmp_path / "fn.py").write_text("def score(prompts, responses, *, answr, level=1, **_):\n    return []\n")
    source = RewardSum([RewardFunction.load(f"{tmp_path / 'fn.py'}:score")], PLAIN)
    with pytest.raises(
        UserError, match=r"requires a field answr, and no record has it; they have answer. --keys answr="
    ):
        source.check(RECORDS, print)
    source, lines = RewardSum([RewardFunction.load("number")], PLAIN), []
    source.check(RECORDS, lines.append)
    assert lines == ["--reward-fn number: reads the records' answer"]


def test_a_record_without_the_field_is_refused_with_its_line_or_left_out():
    source, lines = RewardSum([RewardFunction.load("number")], PLAIN), []
    records = [*RECORDS[:2], Prompt(where="data.jsonl:3", prompt_ids=(1,), fields={"answer": None})]
    side = records, [[1]] * 3
    with pytest.raises(DataError, match=r"data.jsonl:3: answer: is missing; --reward-fn number requires it"):
        scorable(side, source, DataFlags(data=()), print)
    assert scorable(side, source, DataFlags(data=(), skip_bad=True), lines.append) == (records[:2], [[1]] * 2)
    assert lines[0].startswith("--skip-bad left out 1 of 3 prompts, the first: data.jsonl:3: answer")


def test_time_outs_and_processes_give_the_same_scores(tmp_path):
    (function,) = functions(tmp_path, tokens="[len(ids) for ids in response_ids]")
    strategy = Strategy.named("naive", device="cpu")
    for changes in ({"reward_timeout": 600.0}, {"reward_workers": 2}):
        flags = RewardFlags(reward_fn=(function.address, "regex:x"), **changes)
        source = reward_source.reward_source(flags, PLAIN, strategy, DataFlags(data=()), 4, print)
        assert source.score(RECORDS, ANSWERS) == [1.0, 2.0, 3.0]
        assert len(source.workers.processes) == changes.get("reward_workers", 1)
        source.workers.close()
