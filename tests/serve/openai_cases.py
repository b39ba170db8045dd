"""What OpenAI's own client must see, whichever of its versions asks: forty cases, run by pytest and, in environments
with older and newer clients, by `python openai_cases.py ADDRESS KEY`. Needs nothing but openai.
"""

import asyncio
import json
import math
import sys

import openai

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "What is a penstock?"}], "max_tokens": 12, "seed": 7}
TEXT = {"model": "tiny", "prompt": "What is", "max_tokens": 12, "seed": 7}
LONG = {"max_tokens": 40, "logit_bias": {"2": -100}}
"""Enough text for stop strings to be cut from: token 2 is the end of sequence."""


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


class Client:
    """What the cases ask of openai's client."""

    def __init__(self, client):
        self.client = client

    def chat(self, **changes):
        return self.client.chat.completions.create(**{**ASK, **changes})

    def text_of(self, **changes):
        """The text of a whole answer."""
        return self.chat(**changes).choices[0].message.content

    def text(self, **changes):
        return self.client.completions.create(**{**TEXT, **changes})

    def in_async(self):
        return openai.AsyncOpenAI(base_url=str(self.client.base_url), api_key=self.client.api_key)


class Cases(Client):
    """Each method is a case."""

    def models_are_listed(self):
        assert "tiny" in [model.id for model in self.client.models.list()]

    def one_model_is_retrieved(self):
        assert self.client.models.retrieve("tiny").object == "model"

    def an_unknown_model_is_not_found(self):
        error = fails(openai.NotFoundError, lambda: self.client.models.retrieve("gpt-17"))
        assert error.code == "model_not_found"
        assert "tiny" in error.message

    def a_chat_is_answered(self):
        answer = self.chat()
        assert answer.object == "chat.completion"
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].message.content
        assert answer.choices[0].finish_reason in ("stop", "length")

    def usage_adds_up(self):
        usage = self.chat(logit_bias={"2": -100}).usage
        assert usage.completion_tokens == 12
        assert usage.prompt_tokens > 0
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens

    def the_same_seed_gives_the_same_answer(self):
        assert self.text_of() == self.text_of()

    def another_seed_gives_another(self):
        assert self.text_of() != self.text_of(seed=8)

    def without_a_seed_answers_differ(self):
        assert self.text_of(seed=None) != self.text_of(seed=None)

    def temperature_zero_needs_no_seed(self):
        assert self.text_of(temperature=0, seed=1) == self.text_of(temperature=0, seed=2)

    def n_answers_are_numbered_and_differ(self):
        choices = self.chat(n=3).choices
        assert [choice.index for choice in choices] == [0, 1, 2]
        assert len({choice.message.content for choice in choices}) == 3
        assert choices[0].message.content == self.text_of()

    def max_completion_tokens_limits_too(self):
        answer = self.chat(max_tokens=None, max_completion_tokens=3, logit_bias={"2": -100})
        assert answer.usage.completion_tokens == 3
        assert answer.choices[0].finish_reason == "length"

    def a_stop_string_ends_an_answer_and_is_no_part_of_it(self):
        whole = self.text_of(**LONG)
        stop = whole[4:6]
        answer = self.chat(**LONG, stop=stop)
        assert answer.choices[0].message.content == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"

    def several_stop_strings_may_be_given(self):
        whole = self.text_of(**LONG)
        answer = self.chat(**LONG, stop=["never said", whole[3:5], whole[6:8]])
        assert whole.startswith(answer.choices[0].message.content)
        assert len(answer.choices[0].message.content) <= 6

    def logprobs_come_with_their_tokens(self):
        answer = self.chat(logprobs=True, top_logprobs=3, logit_bias={"2": -100})
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

    def a_bias_rules_out_or_forces_a_token(self):
        answer = self.chat(logit_bias={"40": 100}, max_tokens=4, logprobs=True)
        tokens = answer.choices[0].logprobs.content
        assert len({token.token for token in tokens}) == 1
        assert all(token.logprob > -1e-3 for token in tokens)

    def penalties_change_the_answer(self):
        plain = self.text_of(temperature=0, max_tokens=40)
        assert self.text_of(temperature=0, max_tokens=40, frequency_penalty=2) != plain
        assert self.text_of(temperature=0, max_tokens=40, presence_penalty=2) != plain

    def top_p_near_zero_is_greedy(self):
        greedy = self.text_of(temperature=0)
        assert self.text_of(top_p=1e-6) == greedy
        assert self.text_of(top_p=0) == greedy

    def extra_body_reaches_top_k_and_min_p(self):
        greedy = self.text_of(temperature=0)
        assert self.text_of(extra_body={"top_k": 1}) == greedy
        assert self.text_of(extra_body={"min_p": 1.0}) == greedy

    def harmless_keys_are_let_through(self):
        answer = self.chat(user="somebody", metadata={"a": "b"}, store=False, extra_body={"unheard_of": 1})
        assert answer.choices[0].message.content == self.text_of()

    def system_and_developer_messages_are_heard(self):
        orders = [{"role": role, "content": "Be brief."} for role in ("system", "developer")]
        system, developer = (self.text_of(messages=[order, *ASK["messages"]]) for order in orders)
        assert system == developer != self.text_of()

    def content_may_come_in_parts(self):
        parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a penstock?"}]
        answer = self.chat(messages=[{"role": "user", "content": parts}])
        assert answer.choices[0].message.content == self.text_of()

    def a_stream_says_what_the_whole_answer_says(self):
        chunks = list(self.chat(stream=True))
        assert chunks[0].object == "chat.completion.chunk"
        assert chunks[0].choices[0].delta.role == "assistant"
        assert joined(chunks) == self.text_of()
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        assert len({chunk.id for chunk in chunks}) == 1

    def a_stream_can_end_with_usage(self):
        chunks = list(self.chat(stream=True, stream_options={"include_usage": True}))
        assert chunks[-1].choices == []
        assert chunks[-1].usage == self.chat().usage
        assert all(chunk.usage is None for chunk in chunks[:-1])

    def a_stream_of_several_answers_keeps_them_apart(self):
        chunks = list(self.chat(stream=True, n=2))
        whole = self.chat(n=2).choices
        assert [joined(chunks, i) for i in range(2)] == [choice.message.content for choice in whole]

    def a_stream_stops_at_stop_strings(self):
        whole = self.text_of(**LONG)
        stop = whole[4:6]
        chunks = list(self.chat(**LONG, stream=True, stop=stop))
        assert joined(chunks) == whole[: whole.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"

    def a_stream_carries_logprobs(self):
        chunks = list(self.chat(stream=True, logprobs=True, top_logprobs=2))
        streamed = [token for c in chunks if c.choices[0].logprobs for token in c.choices[0].logprobs.content]
        whole = self.chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content
        assert [(token.token, token.logprob) for token in streamed] == [(token.token, token.logprob) for token in whole]

    def a_stream_can_be_closed_early(self):
        stream = self.chat(stream=True, max_tokens=200)
        next(iter(stream))
        stream.close()
        assert self.text_of()

    def the_async_client_streams_too(self):
        async def run():
            async with self.in_async() as async_client:
                stream = await async_client.chat.completions.create(**ASK, stream=True)
                return [chunk async for chunk in stream]

        assert joined(asyncio.run(run())) == self.text_of()

    def a_text_is_gone_on_with(self):
        answer = self.text()
        assert answer.object == "text_completion"
        assert answer.choices[0].text
        assert answer.usage.completion_tokens <= 12

    def several_prompts_are_answered_in_order(self):
        choices = self.text(prompt=["What is", "Say hello"], n=2).choices
        assert [choice.index for choice in choices] == [0, 1, 2, 3]
        assert choices[0].text == self.text().choices[0].text
        assert choices[2].text == self.text(prompt="Say hello").choices[0].text

    def token_ids_are_a_prompt(self):
        assert self.text(prompt=[1, 40, 41]).usage.prompt_tokens == 3
        assert len(self.text(prompt=[[1, 40], [1, 41]]).choices) == 2

    def a_text_streams(self):
        chunks = list(self.text(stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == self.text().choices[0].text

    def a_texts_logprobs_are_columns(self):
        columns = self.text(logprobs=2, logit_bias={"2": -100}).choices[0].logprobs
        lists = (columns.tokens, columns.token_logprobs, columns.top_logprobs, columns.text_offset)
        assert [len(column) for column in lists] == [12] * 4
        assert all(math.isfinite(logprob) for logprob in columns.token_logprobs)
        assert columns.text_offset[0] == 0
        assert columns.text_offset == sorted(columns.text_offset)

    def a_wrong_key_is_an_authentication_error(self):
        with openai.OpenAI(base_url=str(self.client.base_url), api_key="wrong", max_retries=0) as stranger:
            assert fails(openai.AuthenticationError, lambda: stranger.models.list()).code == "invalid_api_key"

    def what_cannot_be_is_a_bad_request_with_its_param(self):
        for change, param in (
            ({"temperature": 3}, "temperature"), ({"n": 17}, "n"), ({"messages": []}, "messages"),
            ({"stop": ["a"] * 5}, "stop"), ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
            ({"top_logprobs": 2}, "top_logprobs"), ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ):  # fmt: skip
            error = fails(openai.BadRequestError, lambda change=change: self.chat(**change))
            assert error.param == param, (change, error.param)
            assert isinstance(error.code, str)

    def what_would_change_the_meaning_is_refused(self):
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
        json_format = {"type": "json_object"}
        for change, param in (({"tools": [tool]}, "tools"), ({"response_format": json_format}, "response_format")):
            assert fails(openai.BadRequestError, lambda change=change: self.chat(**change)).param == param
        assert self.chat(response_format={"type": "text"}, tool_choice="none").choices

    def a_prompt_beyond_the_context_names_both_numbers(self):
        error = fails(openai.BadRequestError, lambda: self.text(prompt=[5] * 300))
        assert error.code == "context_length_exceeded"
        assert "300" in error.message
        assert "256" in error.message

    def an_unknown_model_in_a_request_is_not_found(self):
        error = fails(openai.NotFoundError, lambda: self.chat(model="gpt-17"))
        assert error.param == "model"
        assert "tiny" in error.message

    def every_answer_has_a_request_id(self):
        assert self.chat()._request_id
        raw = self.client.chat.completions.with_raw_response.create(**ASK, extra_headers={"x-request-id": "mine-1"})
        assert raw.headers["x-request-id"] == "mine-1"
        assert fails(openai.NotFoundError, lambda: self.chat(model="no")).request_id

    def requests_run_beside_each_other(self):
        async def run():
            async with self.in_async() as async_client:
                calls = [async_client.chat.completions.create(**{**ASK, "seed": seed}) for seed in range(12)]
                return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

        together = asyncio.run(run())
        assert together[7] == self.text_of()
        assert len(set(together)) == 12


CASES = {name: case for name, case in vars(Cases).items() if not name.startswith("_")}


def main():
    """Runs every case; prints one JSON object: the client's version and each case's result."""
    client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key=sys.argv[2], max_retries=0)
    results = {}
    for name, case in CASES.items():
        try:
            case(Cases(client))
            results[name] = "passed"
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    print(json.dumps({"openai": openai.__version__, "results": results}))


if __name__ == "__main__":
    main()
