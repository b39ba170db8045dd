"""What OpenAI's own client must see, whichever of its versions asks: forty cases, run by pytest and, in environments
with older and newer clients, by `python openai_cases.py ADDRESS KEY`. Needs nothing but openai.
"""

import asyncio
import json
import math
import sys

import openai

CASES = {}
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "What is a penstock?"}], "max_tokens": 12, "seed": 7}
TEXT = {"model": "tiny", "prompt": "What is", "max_tokens": 12, "seed": 7}


LONG = {"max_tokens": 40, "logit_bias": {"2": -100}}
"""Enough text for stop strings to be cut from: token 2 is the end of sequence."""


def case(function):
    """Registers a case under its name."""
    CASES[function.__name__] = function
    return function


def chat(client, **changes):
    return client.chat.completions.create(**{**ASK, **changes})


def text_of(client, **changes):
    """The text of a whole answer."""
    return chat(client, **changes).choices[0].message.content


def text(client, **changes):
    return client.completions.create(**{**TEXT, **changes})


def fails(error_class, call):
    """The error of this class, and of no other, that a call raises."""
    raised = None
    try:
        call()
    except openai.APIError as error:
        raised = error
    assert type(raised) is error_class, f"{type(raised).__name__}: {raised}"
    return raised


def joined(chunks, index=0):
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices and c.choices[0].index == index)


@case
def models_are_listed(client):
    assert "tiny" in [model.id for model in client.models.list()]


@case
def one_model_is_retrieved(client):
    assert client.models.retrieve("tiny").object == "model"


@case
def an_unknown_model_is_not_found(client):
    error = fails(openai.NotFoundError, lambda: client.models.retrieve("gpt-17"))
    assert error.code == "model_not_found"
    assert "tiny" in error.message


@case
def a_chat_is_answered(client):
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")


@case
def usage_adds_up(client):
    usage = chat(client, logit_bias={"2": -100}).usage
    assert usage.completion_tokens == 12
    assert usage.prompt_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@case
def the_same_seed_gives_the_same_answer(client):
    assert text_of(client) == text_of(client)


@case
def another_seed_gives_another(client):
    assert text_of(client) != text_of(client, seed=8)


@case
def without_a_seed_answers_differ(client):
    assert text_of(client, seed=None) != text_of(client, seed=None)


@case
def temperature_zero_needs_no_seed(client):
    assert text_of(client, temperature=0, seed=1) == text_of(client, temperature=0, seed=2)


@case
def n_answers_are_numbered_and_differ(client):
    choices = chat(client, n=3).choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert len({choice.message.content for choice in choices}) == 3
    assert choices[0].message.content == text_of(client)


@case
def max_completion_tokens_limits_too(client):
    answer = chat(client, max_tokens=None, max_completion_tokens=3, logit_bias={"2": -100})
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


@case
def a_stop_string_ends_an_answer_and_is_no_part_of_it(client):
    whole = text_of(client, **LONG)
    stop = whole[4:6]
    answer = chat(client, **LONG, stop=stop)
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@case
def several_stop_strings_may_be_given(client):
    whole = text_of(client, **LONG)
    answer = chat(client, **LONG, stop=["never said", whole[3:5], whole[6:8]])
    assert whole.startswith(answer.choices[0].message.content)
    assert len(answer.choices[0].message.content) <= 6


@case
def logprobs_come_with_their_tokens(client):
    answer = chat(client, logprobs=True, top_logprobs=3, logit_bias={"2": -100})
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert math.isfinite(token.logprob)
        assert token.logprob <= 0
        tops = [top.logprob for top in token.top_logprobs]
        assert len(tops) == 3
        assert tops == sorted(tops, reverse=True)
    spelled = b"".join(bytes(token.bytes) for token in content)
    assert spelled.decode(errors="replace") == answer.choices[0].message.content


@case
def a_bias_rules_out_or_forces_a_token(client):
    answer = chat(client, logit_bias={"40": 100}, max_tokens=4, logprobs=True)
    tokens = answer.choices[0].logprobs.content
    assert len({token.token for token in tokens}) == 1
    assert all(token.logprob > -1e-3 for token in tokens)


@case
def penalties_change_the_answer(client):
    plain = text_of(client, temperature=0, max_tokens=40)
    assert text_of(client, temperature=0, max_tokens=40, frequency_penalty=2) != plain
    assert text_of(client, temperature=0, max_tokens=40, presence_penalty=2) != plain


@case
def top_p_near_zero_is_greedy(client):
    greedy = text_of(client, temperature=0)
    assert text_of(client, top_p=1e-6) == greedy
    assert text_of(client, top_p=0) == greedy


@case
def extra_body_reaches_top_k_and_min_p(client):
    greedy = text_of(client, temperature=0)
    assert text_of(client, extra_body={"top_k": 1}) == greedy
    assert text_of(client, extra_body={"min_p": 1.0}) == greedy


@case
def harmless_keys_are_let_through(client):
    answer = chat(client, user="somebody", metadata={"a": "b"}, store=False, extra_body={"unheard_of": 1})
    assert answer.choices[0].message.content == text_of(client)


@case
def system_and_developer_messages_are_heard(client):
    brief = {"content": "Be brief."}
    system, developer = (
        text_of(client, messages=[{"role": role, **brief}, *ASK["messages"]]) for role in ("system", "developer")
    )
    assert system == developer != text_of(client)


@case
def content_may_come_in_parts(client):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a penstock?"}]
    answer = chat(client, messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == text_of(client)


@case
def a_stream_says_what_the_whole_answer_says(client):
    chunks = list(chat(client, stream=True))
    assert chunks[0].object == "chat.completion.chunk"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert joined(chunks) == text_of(client)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert len({chunk.id for chunk in chunks}) == 1


@case
def a_stream_can_end_with_usage(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == chat(client).usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


@case
def a_stream_of_several_answers_keeps_them_apart(client):
    chunks = list(chat(client, stream=True, n=2))
    whole = chat(client, n=2).choices
    assert [joined(chunks, i) for i in range(2)] == [choice.message.content for choice in whole]


@case
def a_stream_stops_at_stop_strings(client):
    whole = text_of(client, **LONG)
    stop = whole[4:6]
    chunks = list(chat(client, **LONG, stream=True, stop=stop))
    assert joined(chunks) == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


@case
def a_stream_carries_logprobs(client):
    chunks = list(chat(client, stream=True, logprobs=True, top_logprobs=2))
    streamed = [token for c in chunks if c.choices[0].logprobs for token in c.choices[0].logprobs.content]
    whole = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [(token.token, token.logprob) for token in streamed] == [(token.token, token.logprob) for token in whole]


@case
def a_stream_can_be_closed_early(client):
    stream = chat(client, stream=True, max_tokens=200)
    next(iter(stream))
    stream.close()
    assert text_of(client)


@case
def the_async_client_streams_too(client):
    async def run():
        async with openai.AsyncOpenAI(base_url=str(client.base_url), api_key=client.api_key) as async_client:
            stream = await async_client.chat.completions.create(**ASK, stream=True)
            return [chunk async for chunk in stream]

    assert joined(asyncio.run(run())) == text_of(client)


@case
def a_text_is_gone_on_with(client):
    answer = text(client)
    assert answer.object == "text_completion"
    assert answer.choices[0].text
    assert answer.usage.completion_tokens <= 12


@case
def several_prompts_are_answered_in_order(client):
    choices = text(client, prompt=["What is", "Say hello"], n=2).choices
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    assert choices[0].text == text(client).choices[0].text
    assert choices[2].text == text(client, prompt="Say hello").choices[0].text


@case
def token_ids_are_a_prompt(client):
    assert text(client, prompt=[1, 40, 41]).usage.prompt_tokens == 3
    assert len(text(client, prompt=[[1, 40], [1, 41]]).choices) == 2


@case
def a_text_streams(client):
    chunks = list(text(client, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text(client).choices[0].text


@case
def a_texts_logprobs_are_columns(client):
    columns = text(client, logprobs=2, logit_bias={"2": -100}).choices[0].logprobs
    lists = (columns.tokens, columns.token_logprobs, columns.top_logprobs, columns.text_offset)
    assert [len(column) for column in lists] == [12] * 4
    assert all(math.isfinite(logprob) for logprob in columns.token_logprobs)
    assert columns.text_offset[0] == 0
    assert columns.text_offset == sorted(columns.text_offset)


@case
def a_wrong_key_is_an_authentication_error(client):
    with openai.OpenAI(base_url=str(client.base_url), api_key="wrong", max_retries=0) as stranger:
        assert fails(openai.AuthenticationError, lambda: stranger.models.list()).code == "invalid_api_key"


@case
def what_cannot_be_is_a_bad_request_with_its_param(client):
    for change, param in (
        ({"temperature": 3}, "temperature"), ({"n": 17}, "n"), ({"messages": []}, "messages"),
        ({"stop": ["a"] * 5}, "stop"), ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"top_logprobs": 2}, "top_logprobs"), ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ):  # fmt: skip
        error = fails(openai.BadRequestError, lambda change=change: chat(client, **change))
        assert error.param == param, (change, error.param)
        assert isinstance(error.code, str)


@case
def what_would_change_the_meaning_is_refused(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    json_format = {"type": "json_object"}
    for change, param in (({"tools": [tool]}, "tools"), ({"response_format": json_format}, "response_format")):
        assert fails(openai.BadRequestError, lambda change=change: chat(client, **change)).param == param
    assert chat(client, response_format={"type": "text"}, tool_choice="none").choices


@case
def a_prompt_beyond_the_context_names_both_numbers(client):
    error = fails(openai.BadRequestError, lambda: text(client, prompt=[5] * 300))
    assert error.code == "context_length_exceeded"
    assert "300" in error.message
    assert "256" in error.message


@case
def an_unknown_model_in_a_request_is_not_found(client):
    error = fails(openai.NotFoundError, lambda: chat(client, model="gpt-17"))
    assert error.param == "model"
    assert "tiny" in error.message


@case
def every_answer_has_a_request_id(client):
    assert chat(client)._request_id
    raw = client.chat.completions.with_raw_response.create(**ASK, extra_headers={"x-request-id": "mine-1"})
    assert raw.headers["x-request-id"] == "mine-1"
    assert fails(openai.NotFoundError, lambda: chat(client, model="no")).request_id


@case
def requests_run_beside_each_other(client):
    async def run():
        async with openai.AsyncOpenAI(base_url=str(client.base_url), api_key=client.api_key) as async_client:
            calls = [async_client.chat.completions.create(**{**ASK, "seed": seed}) for seed in range(12)]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    together = asyncio.run(run())
    assert together[7] == text_of(client)
    assert len(set(together)) == 12


def main():
    """Runs every case; prints one JSON object: the client's version and each case's result."""
    client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key=sys.argv[2], max_retries=0)
    results = {}
    for name, function in CASES.items():
        try:
            function(client)
            results[name] = "passed"
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    print(json.dumps({"openai": openai.__version__, "results": results}))


if __name__ == "__main__":
    main()
