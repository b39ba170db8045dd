"""OpenAI's own client against the server: its cases, and its retries."""

import threading

import openai
import pytest

from tests.conftest import PATIENCE
from tests.serve.conftest import KEY, engine_of, paused, running, save_chatty
from tests.serve.openai_cases import ASK, CASES, Cases, fails


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0) as openai_client:
        yield openai_client


@pytest.mark.parametrize("name", CASES)
def test_the_client_sees(client, name):
    CASES[name](Cases(client))


def test_there_are_forty_cases():
    assert len(CASES) == 40


def test_a_last_turn_of_the_assistant_is_gone_on_with(client):
    """The tests' template writes nothing around a turn, so that the same text without a template is the oracle."""
    beginning = "A pipe that"
    asked = {**ASK, "messages": [*ASK["messages"], {"role": "assistant", "content": beginning}]}
    assert fails(openai.BadRequestError, lambda: client.chat.completions.create(**asked)).param == "messages[1].role"
    answer = client.chat.completions.create(**asked, extra_body={"continue_final_message": True})
    text = ASK["messages"][0]["content"] + "\n" + beginning
    wanted = client.completions.create(model="tiny", prompt=text, max_tokens=ASK["max_tokens"], seed=ASK["seed"])
    assert answer.choices[0].message.content == wanted.choices[0].text
    assert answer.usage == wanted.usage


def test_a_full_server_is_a_rate_limit_and_the_client_tries_again(tmp_path):
    model = save_chatty(tmp_path / "tiny")
    with (
        running(tmp_path / "data", model, rows=1, queue=1) as small,
        openai.OpenAI(base_url=f"{small.address}/v1", api_key=KEY, max_retries=0) as hasty,
        openai.OpenAI(base_url=f"{small.address}/v1", api_key=KEY, max_retries=PATIENCE) as patient,
    ):
        long = {**ASK, "max_tokens": 240, "logit_bias": {"2": -100}, "stream": True}
        go_on = threading.Event()
        with paused(small.service.catalogue.models["tiny"], go_on.is_set):
            first, second = hasty.chat.completions.create(**long), hasty.chat.completions.create(**long)
            error = fails(openai.RateLimitError, lambda: hasty.chat.completions.create(**ASK))
            assert error.code == "queue_full"
            assert float(error.response.headers["retry-after"]) >= 1
            go_on.set()
        assert patient.chat.completions.create(**ASK).choices[0].message.content
        assert [sum(1 for _ in stream) > 100 for stream in (first, second)] == [True, True]


def test_the_client_waits_while_a_model_loads(tmp_path, monkeypatch):
    from penstock.serve.models import catalogue

    load, go_on = catalogue.Catalogue._load, threading.Event()
    monkeypatch.setattr(catalogue.Catalogue, "_load", lambda *arguments: go_on.wait(PATIENCE) and load(*arguments))
    with running(tmp_path / "data", save_chatty(tmp_path / "tiny"), wait=False) as slow:
        assert slow.ask("GET", "/health", key=None).error["code"] == "loading"
        with openai.OpenAI(base_url=f"{slow.address}/v1", api_key=KEY, max_retries=0) as hasty:
            assert fails(openai.InternalServerError, lambda: hasty.chat.completions.create(**ASK)).code == "loading"
        with openai.OpenAI(base_url=f"{slow.address}/v1", api_key=KEY, max_retries=PATIENCE) as patient:
            threading.Timer(1.0, go_on.set).start()
            assert patient.chat.completions.create(**ASK).choices[0].message.content
        assert slow.ask("GET", "/health", key=None).status == 200


def test_a_failure_in_the_middle_is_an_error_event_and_the_next_request_is_answered(tmp_path):
    with (
        running(tmp_path / "data", save_chatty(tmp_path / "tiny")) as server,
        openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0) as client,
    ):

        def break_after(good_steps):
            engine, steps = engine_of(server.service.catalogue.models["tiny"]), []
            step = engine.step

            def breaks():
                steps.append(None)
                if len(steps) > good_steps:
                    raise RuntimeError("the device is on fire")
                return step()

            engine.step = breaks

        break_after(4)
        stream = client.chat.completions.create(**{**ASK, "stream": True, "logit_bias": {"2": -100}})
        with pytest.raises(openai.APIError, match="the model failed"):
            list(stream)
        assert client.chat.completions.create(**ASK).choices[0].message.content
        break_after(0)
        error = fails(openai.InternalServerError, lambda: client.chat.completions.create(**ASK))
        assert error.code == "model_failed"
