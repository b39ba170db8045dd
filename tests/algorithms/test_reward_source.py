"""What a reward model of another tokenizer reads: the actor's text, never its ids, and no more than was answered."""

import pytest

from penstock.algorithms import reward_source
from penstock.algorithms.reward_functions import RewardFunction
from penstock.algorithms.reward_source import ModelReward, RewardSum
from penstock.config import DataFlags, RewardFlags
from penstock.data.chat import Encoder
from penstock.data.records import Prompt
from penstock.errors import UserError
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
