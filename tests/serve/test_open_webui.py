"""What Open WebUI sends to an OpenAI-compatible backend, kind by kind, replayed against our server.

The requests are written down from its source of 2026 (backend/open_webui/routers/openai.py and tasks.py,
utils/payload.py and utils/middleware.py): after its own keys are taken out, a chat is model, messages, stream,
stream_options and the sampling parameters of the model's settings, those that somebody added by hand among them; tasks
(title, tags, follow-ups, search queries, autocompletion) are a user's turn that is not streamed.
"""

import json
import socket

import pytest

from tests.conftest import PATIENCE
from tests.serve.conftest import KEY, eventually, paused, running, save_chatty

HEADERS = {
    "accept": "*/*", "accept-encoding": "gzip, deflate, br", "user-agent": "Python/3.11 aiohttp/3.13.0",
    "x-openwebui-user-name": "Zo%C3%AB M%C3%BCller", "x-openwebui-user-id": "5e4c1f6a-0000-4000-8000-000000000001",
    "x-openwebui-user-email": "zoe@example.org", "x-openwebui-user-role": "admin",
    "x-openwebui-chat-id": "5e4c1f6a-0000-4000-8000-000000000002", "x-openwebui-message-id": "local:7",
    "cookie": "token=eyJhbGciOiJIUzI1NiJ9.e30.x; oui-session=abc",  # auth_type session passes its own on
}  # fmt: skip
HELLO = [{"role": "user", "content": "What is a penstock?"}]
CHAT = {"stream": True, "model": "tiny", "messages": HELLO, "stream_options": {"include_usage": True}}
TASK = {"model": "tiny", "messages": [{"role": "user", "content": "### Task:\nA title, as JSON."}], "stream": False}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
TOOL = {"type": "function", "function": {"name": "time", "description": "", "parameters": {"type": "object"}}}
CALLED = [
    *HELLO,
    {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "time"}}]},
    {"role": "tool", "tool_call_id": "c", "content": "noon"},
]
ANSWERED = {
    "a first message": {},
    "a later one": {"messages": [*HELLO, {"role": "assistant", "content": "A pipe."}, *HELLO]},
    "a system prompt": {"messages": [{"role": "system", "content": "Be brief."}, *HELLO]},
    "a system prompt of a model whose name looks like OpenAI's new ones": {
        "messages": [{"role": "developer", "content": "Be brief."}, *HELLO], "max_completion_tokens": 5,
    },
    "text in parts, marked for a cache": {
        "messages": [{"role": "user", "content": [
            {"type": "text", "text": "What is"},
            {"type": "text", "text": " it?", "cache_control": {"type": "ephemeral"}},
        ]}],
    },
    "a file's text in the prompt": {"messages": [{"role": "user", "content": "<source id='1'>a</source>"}]},
    "all parameters of the model's settings": {
        "temperature": 0.8, "top_p": 0.9, "min_p": 0.05, "max_tokens": 128, "frequency_penalty": 0.1, "seed": 42,
        "presence_penalty": 0.1, "stop": ["\n\n"], "logit_bias": {"5": -100},
    },
    "parameters of other backends that do not change what the answer means": {
        "top_k": 40, "num_ctx": 2048, "num_thread": 2, "use_mmap": True, "keep_alive": "5m", "cache_prompt": True,
        "response_format": {"type": "text"}, "repeat_penalty": 1,
    },
    "a pipeline's user": {"user": {"name": "Zo\u00eb", "id": "1", "email": "zoe@example.org", "role": "admin"}},
    "answers of several models merged": {"messages": [{"role": "user", "content": "Responses from models: 'a' 'b'"}]},
}  # fmt: skip
REFUSED = {
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Look"}, PICTURE]}]},
                  "messages[0].content[1].type"),
    "native tools": ({"tools": [TOOL]}, "tools"),
    "a tool's result": ({"messages": CALLED}, "messages[2].role"),
    "a schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format"),
    "reasoning": ({"reasoning_effort": "high"}, "reasoning_effort"),
    "its Continue": ({"messages": [*HELLO, {"role": "assistant", "content": "A pipe"}]}, "messages[1].role"),
    "another repetition penalty": ({"repeat_penalty": 1.1}, "repeat_penalty"),
    "mirostat": ({"mirostat": 2}, "mirostat"),
}  # fmt: skip
ELSEWHERE = {
    "/v1/embeddings": {"model": "tiny", "input": ["a", "b"]},
    "/v1/responses": {"model": "tiny", "input": [], "stream": True},
    "/v1/audio/speech": {"model": "tiny", "input": "a", "voice": "alloy"},
    "/v1/images/generations": {
        "model": "tiny",
        "prompt": "a",
        "n": 1,
        "size": "512x512",
        "response_format": "b64_json",
    },
    "/v1/rerank": {"model": "tiny", "query": "a", "documents": ["b"], "top_n": 1},
}


def ask(server, method, path, body=None):
    return server.ask(method, path, body, headers=HEADERS)


def test_a_connection_is_verified_by_its_models(server):
    reply = server.ask("GET", "/v1/models", headers={**HEADERS, "content-type": "application/json"})
    assert (reply.status, reply.json["object"]) == (200, "list")
    assert {"tiny", "other"} <= {card["id"] for card in reply.json["data"]}
    assert all(card["object"] == "model" for card in reply.json["data"])
    wrong = server.ask("GET", "/v1/models", headers=HEADERS, key="not the key of this server")
    assert (wrong.status, wrong.error["type"]) == (401, "authentication_error")


@pytest.mark.parametrize("kind", ANSWERED)
def test_a_chat_is_streamed_with_its_usage(server, kind):
    reply = ask(server, "POST", "/v1/chat/completions", {**CHAT, "max_tokens": 5, **ANSWERED[kind]})
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, last, done = reply.events
    assert done is None
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["model"] == "tiny" for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert last["choices"] == []
    usage = last["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > usage["completion_tokens"]


@pytest.mark.parametrize("change", [
    {}, {"max_tokens": 1000}, {"messages": [{"role": "user", "content": "queries\n" * 20}]},
], ids=["tags, follow-ups, an emoji", "a title, with more tokens than there are", "search queries"])  # fmt: skip
def test_a_task_is_answered_whole(server, change):
    reply = ask(server, "POST", "/v1/chat/completions", {**TASK, **change})
    assert reply.status == 200, reply.body
    [choice] = reply.json["choices"]
    assert isinstance(choice["message"]["content"], str)
    assert choice["message"]["role"] == "assistant"
    assert reply.json["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_done_is_refused_by_name_and_not_ignored(server, kind):
    change, param = REFUSED[kind]
    reply = ask(server, "POST", "/v1/chat/completions", {**CHAT, **change})
    assert reply.status == 400, reply.body  # as JSON, although a stream was asked for: it shows error.message
    assert reply.error["param"] == param
    assert len(reply.error["message"]) > 20


@pytest.mark.parametrize("path", ELSEWHERE)
def test_routes_of_other_backends_are_not_here(server, path):
    reply = ask(server, "POST", path, ELSEWHERE[path])
    assert (reply.status, reply.error["code"]) == (404, "not_found")


def test_stopping_closes_the_connection_and_frees_the_row(tmp_path):
    with running(tmp_path / "data", save_chatty(tmp_path / "tiny", max_length=4000)) as server:
        body = json.dumps({**CHAT, "max_tokens": 3900, "logit_bias": {"2": -100}})
        lines = [f"{name}: {value}" for name, value in HEADERS.items()]
        lines += ["host: x", f"authorization: Bearer {KEY}", "content-type: application/json"]
        head = "POST /v1/chat/completions HTTP/1.1\r\n" + "\r\n".join([*lines, f"content-length: {len(body)}"])
        scheduler, model = server.service.scheduler, server.service.catalogue.models["tiny"]
        with paused(model, lambda: False, after=20):
            with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as connection:
                connection.sendall(f"{head}\r\n\r\n{body}".encode())
                assert b"200 OK" in connection.recv(1024)
                assert eventually(lambda: scheduler.tokens_made > 0)
            assert server.idle()
        assert scheduler.tokens_made < 3900
