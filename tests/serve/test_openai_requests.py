"""Which turns reach the chat template, and how a last turn of the assistant is gone on with: transformers renders the
same conversation with `continue_final_message`.
"""

from types import SimpleNamespace

import pytest

from penstock.data.chat import Encoder
from penstock.serve.errors import ApiError
from penstock.serve.openai_requests import ChatRequest, encode_chat
from tests.conftest import CHATML
from tests.data.test_chat import assistant, encoder_of, user

SYSTEM, DEVELOPER = ({"role": role, "content": "Be brief."} for role in ("system", "developer"))
TALK = [user("Hi"), assistant("Hello"), user("Bye")]
CONTINUED = {"continue_final_message": True}
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = {
    "ChatML": {"template": CHATML, "eos_token": "<|im_end|>"},
    "plain": {},
    "BOS in front": {"template": "{{ bos_token }}" + CHATML, "eos_token": "<|im_end|>", "bos": True},
}


def model_of(directory):
    encoder = encoder_of(directory, max_length=2**31)
    return SimpleNamespace(
        id="tiny",
        encoder=encoder,
        encoder_with=lambda _: encoder,
        length=1000,
        vocab_size=320,
    )


@pytest.fixture
def chatml(make_tokenizer):
    return model_of(make_tokenizer(**TEMPLATES["ChatML"]))


def prompt(model, messages, **changes):
    request = ChatRequest.model_validate({"model": "tiny", "messages": messages, **changes})
    [ids] = encode_chat(request, model).prompts
    return ids


def shown(model, messages, **changes):
    """The prompt as text, special tokens included."""
    return model.encoder.tokenizer.decode(prompt(model, messages, **changes))


def rendered(model, messages, **options):
    """The same as transformers writes it."""
    template = model.encoder.template.sources["default"]
    return model.encoder.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **options)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("beginning", ["See", "See you\n\nsoon", "\u00e9t\u00e9 \U0001f4a7", "1. One\n2."])
def test_a_last_turn_of_the_assistant_is_gone_on_with_as_transformers_does(make_tokenizer, name, beginning):
    model = model_of(make_tokenizer(**TEMPLATES[name]))
    messages = [SYSTEM, *TALK, assistant(beginning)]
    ids = prompt(model, messages, **CONTINUED)
    wanted = rendered(model, messages, continue_final_message=True)
    if name == "plain":
        wanted = wanted.replace(f"Assistant: {beginning}", f"Assistant:{beginning}")  # an answer is sampled behind ":"
    assert model.encoder.tokenizer.decode(ids) == wanted
    before = prompt(model, messages[:-1])
    assert ids[: len(before)] == before  # the answer's own ids, behind those of its prompt


def test_an_answer_that_spells_an_end_is_gone_on_with_as_text(chatml):
    ids = prompt(chatml, [*TALK, assistant("It ends with <|im_end|>")], **CONTINUED)
    before = prompt(chatml, TALK)
    assert chatml.encoder.tokenizer.decode(ids[len(before) :]) == "It ends with <|im_end|>"
    assert not set(ids[len(before) :]) & set(chatml.encoder.eos_ids)


@pytest.mark.parametrize(("messages", "changes", "param", "says"), [
    ([*TALK, assistant("See")], {}, "messages[3].role", "continue_final_message: true"),
    ([*TALK, assistant("See")], {"continue_final_message": False}, "messages[3].role", "continue_final_message: true"),
    (TALK, CONTINUED, "continue_final_message", "the last one is not"),
    ([assistant("See")], CONTINUED, "messages[0].role", "put a user's turn in front"),
    ([assistant("")], {}, "messages", "add a user's"),
])  # fmt: skip
def test_what_cannot_be_gone_on_with_is_refused(chatml, messages, changes, param, says):
    with pytest.raises(ApiError, match=says) as raised:
        prompt(chatml, messages, **changes)
    assert (raised.value.status, raised.value.param) == (400, param)


@pytest.mark.parametrize("messages", [
    [assistant("Welcome!"), user("Hi")], [SYSTEM, {**SYSTEM, "content": "Be kind."}, user("Hi")],
    [user("Hi"), assistant("Hello"), SYSTEM, user("Bye")], [user("Hi"), SYSTEM], [user("Hi"), user("Are you there?")],
])  # fmt: skip
def test_a_history_goes_to_a_template_that_takes_it(chatml, messages):
    assert shown(chatml, messages) == rendered(chatml, messages, add_generation_prompt=True)


def test_a_developer_is_a_developer_where_the_template_knows_the_role(make_tokenizer):
    knows = model_of(make_tokenizer("knows", template="{# developer #}" + CHATML, eos_token="<|im_end|>"))
    other = model_of(make_tokenizer("other", template=CHATML, eos_token="<|im_end|>"))
    for messages in ([DEVELOPER, user("Hi")], [SYSTEM, user("Hi"), DEVELOPER, user("Bye")]):
        assert shown(knows, messages).count("<|im_start|>developer\nBe brief.") == 1
        assert "developer" not in shown(other, messages)


@pytest.mark.parametrize("messages", [[assistant("Welcome!"), user("Hi")], [*TALK[:2], SYSTEM, user("Bye")]])
def test_a_history_that_the_template_refuses_is_a_bad_request(make_tokenizer, messages):
    strict = model_of(make_tokenizer(template=ALTERNATE))
    with pytest.raises(ApiError, match="the chat template refuses them: Roles must alternate") as raised:
        prompt(strict, messages)
    assert (raised.value.status, raised.value.param) == (400, "messages")


def test_more_messages_than_the_context_has_tokens_are_refused_unread(chatml, monkeypatch):
    monkeypatch.setattr(Encoder, "encode_prompt", lambda *_, **__: pytest.fail("the template writes all of them"))
    with pytest.raises(ApiError, match="begin a new conversation") as raised:
        prompt(chatml, [user("x"), assistant("y")] * (chatml.length // 2) + [user("z")])
    assert (raised.value.param, raised.value.code) == ("messages", "context_length_exceeded")


@pytest.mark.parametrize("place", [1, 3, 5])
def test_an_empty_turn_of_the_assistant_is_left_out(chatml, place):
    messages = [*TALK, assistant("See you"), user("Wait")]
    with_empty = [*messages[:place], assistant(""), *messages[place:]]
    for changes in {}, CONTINUED if place == 5 else {}:  # a place for the answer, as some clients send it
        assert prompt(chatml, with_empty, **changes) == prompt(chatml, messages)
