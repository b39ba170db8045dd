"""Keys of a request: what they do, by transformers' `generate` and `apply_chat_template`, and which are refused."""

import pytest
import torch
import transformers

from penstock.serve import openai_requests
from penstock.serve.openai_requests import CHANGES_CHAT, CHANGES_TEXT, ChatRequest
from tests.conftest import EOS
from tests.serve.conftest import running, save_chatty

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "seed": 1}
PROMPT = [1, 40, 41, 42]
GREEDY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def theirs(server):
    """transformers' own model of the same weights: greedy token ids behind PROMPT, in so many tokens at most."""
    model = transformers.AutoModelForCausalLM.from_pretrained(server.service.catalogue.sources["tiny"])

    def generate(count, **options):
        options = {"eos_token_id": EOS, "pad_token_id": 0, **options}
        row = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=count, **options)
        return row[0, len(PROMPT) :].tolist()

    return generate


def answer(server, **changes):
    """(text, tokens made, finish reason) of a completion."""
    reply = server.post({**GREEDY, **changes}, "/v1/completions")
    assert reply.status == 200, reply.body
    choice = reply.json["choices"][0]
    return choice["text"], reply.json["usage"]["completion_tokens"], choice["finish_reason"]


def spoken(server, ids, *ends):
    """The text of token ids without ends."""
    return server.service.catalogue.models["tiny"].decode([token for token in ids if token not in ends])


# --- what ends an answer ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fewest", [0, 1, 5, 11, 23, 24])
def test_stop_token_ids_and_min_tokens_are_transformers_eos_token_id_and_min_new_tokens(server, theirs, fewest):
    plain = theirs(24, bad_words_ids=[[EOS]])
    stop = plain[6]
    wanted = theirs(24, eos_token_id=[EOS, stop], min_new_tokens=fewest)
    text, made, reason = answer(server, stop_token_ids=[stop], min_tokens=fewest)
    ended = wanted[-1] in (EOS, stop)
    assert (made, reason) == (len(wanted), "stop" if ended else "length")
    assert text == spoken(server, wanted[:-1] if ended else wanted)
    assert made >= fewest


def test_ignore_eos_goes_on_behind_an_end(server, theirs):
    bias = 8.0
    ended = theirs(24, sequence_bias={(EOS,): bias})
    wanted = theirs(24, sequence_bias={(EOS,): bias}, eos_token_id=None)
    assert len(ended) < len(wanted) == 24, "the bias makes no early end"
    biased = {"logit_bias": {str(EOS): bias}}
    assert answer(server, **biased) == (spoken(server, ended, EOS), len(ended), "stop")
    assert answer(server, **biased, ignore_eos=True) == (spoken(server, wanted, EOS), 24, "length")
    # A token that was named ends it all the same, an EOS too.
    assert answer(server, **biased, ignore_eos=True, stop_token_ids=[EOS]) == answer(server, **biased)


def test_a_stop_string_ends_no_answer_before_min_tokens(server):
    long = {"temperature": 1, "seed": 7, "max_tokens": 40, "logit_bias": {str(EOS): -100}}
    whole, made, _ = answer(server, **long)
    stop = whole[4:6]
    assert answer(server, **long, stop=stop)[::2] == (whole[:4], "stop")
    assert answer(server, **long, stop=stop, min_tokens=40) == (whole, made, "length")


@pytest.mark.parametrize(("change", "param"), [
    ({"min_tokens": 25}, "min_tokens"), ({"min_tokens": -1}, "min_tokens"),
    ({"stop_token_ids": [400]}, "stop_token_ids"), ({"stop_token_ids": list(range(65))}, "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
])  # fmt: skip
def test_ends_that_cannot_be_are_refused(server, change, param):
    reply = server.post({**GREEDY, **change}, "/v1/completions")
    assert (reply.status, reply.error["param"]) == (400, param)


# --- chat templates ---------------------------------------------------------------------------------------------------
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if tone is defined %}[{{ tone }}]{% endif %}{% if reasoning_effort %}({{ reasoning_effort }}){% endif %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def templated(tmp_path_factory):
    directory = tmp_path_factory.mktemp("templated")
    path = save_chatty(directory / "tiny")
    (directory / "tiny" / "chat_template.jinja").write_text(TEMPLATE)
    with running(directory / "data", path, template_args=("tone=dry",)) as server:
        yield server


@pytest.mark.parametrize("turns", [["hi"], ["hi", "hello", "and you?"]])
@pytest.mark.parametrize(("keys", "theirs"), [
    ({}, {}), ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
    ({"chat_template_kwargs": {"tone": "warm", "enable_thinking": True}}, {"tone": "warm", "enable_thinking": True}),
    ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
    ({"add_generation_prompt": False}, {"add_generation_prompt": False}), ({"add_generation_prompt": True}, {}),
])  # fmt: skip
def test_arguments_reach_the_chat_template_as_transformers_hands_them(templated, turns, keys, theirs):
    model = templated.service.catalogue.models["tiny"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    request = ChatRequest.model_validate({"model": "tiny", "messages": messages, **keys})
    wanted = model.encoder.tokenizer.apply_chat_template(
        messages, **{"tone": "dry", "add_generation_prompt": True, **theirs}, return_dict=False
    )
    assert openai_requests.encode_chat(request, model).prompts == [wanted]
    reply = templated.post({**ASK, "messages": messages, **keys})
    assert reply.json["usage"]["prompt_tokens"] == len(wanted)


def test_arguments_of_a_request_are_that_requests_alone(templated):
    plain = templated.post(ASK).json["usage"]["prompt_tokens"]
    for i in range(20):  # more than are remembered
        reply = templated.post({**ASK, "chat_template_kwargs": {"tone": "dry" * i}})
        assert (reply.json["usage"]["prompt_tokens"] == plain) == (i == 1)
    assert templated.post(ASK).json["usage"]["prompt_tokens"] == plain


@pytest.mark.parametrize(("keys", "param", "names"), [
    ({"chat_template_kwargs": {"nobody_reads_it": 1}}, "chat_template_kwargs", "nobody_reads_it"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages"),
    ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs", "add_generation_prompt"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "tokenize"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "chat_template"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs", "dict"),
])  # fmt: skip
def test_arguments_that_the_template_does_not_read_are_refused(templated, keys, param, names):
    reply = templated.post({**ASK, **keys})
    assert (reply.status, reply.error["param"]) == (400, param)
    assert names in reply.error["message"]


def test_a_template_without_reasoning_refuses_an_effort(server):
    reply = server.post({**ASK, "reasoning_effort": "high"})
    assert (reply.status, reply.error["param"], reply.error["code"]) == (
        400,
        "reasoning_effort",
        "unsupported_parameter",
    )


# --- what is refused --------------------------------------------------------------------------------------------------
CHANGING = {
    "tools": [{"type": "function"}], "response_format": {"type": "json_schema", "json_schema": {}}, "best_of": 2,
    "structured_outputs": {"choice": ["a"]}, "guided_choice": ["a", "b"], "guided_json": {"type": "object"},
    "guided_regex": "a+", "guided_grammar": "x", "json_schema": {"type": "object"}, "grammar": "root ::= x",
    "bad_words": ["a"], "logits_processors": ["x"], "n_predict": 5, "repeat_penalty": 1.1, "skip_special_tokens": False,
    "tool_choice": "required", "do_sample": False, "modalities": ["audio"], "extra_body": {"top_k": 1},
}  # fmt: skip


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_each_key_that_changes_the_answer_is_refused_by_name_and_let_through_where_it_changes_nothing(server, route):
    body, changes = (ASK, CHANGES_CHAT) if "chat" in route else (GREEDY, CHANGES_TEXT)
    assert CHANGING.keys() <= changes.keys()
    for key in changes:
        value = CHANGING.get(key, {"some": ["thing"]})
        reply = server.post({**body, key: value}, route)
        assert (reply.status, reply.error["param"], reply.error["code"]) == (400, key, "unsupported_parameter")
    neutral = {key: harmless[0] for key, harmless in changes.items() if harmless}
    plain = server.post(body, route).json["choices"]
    assert server.post({**body, **neutral}, route).json["choices"] == plain
    assert server.post({**body, **dict.fromkeys(changes)}, route).json["choices"] == plain


def test_kinds_of_response_format_are_refused(server):
    for kind in ("json_object", "json_schema", "structural_tag", "regex"):
        assert server.post({**ASK, "response_format": {"type": kind}}).error["param"] == "response_format"
    assert server.post({**ASK, "response_format": {"type": "text"}}).status == 200
