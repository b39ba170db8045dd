"""/v1 and the access to it: shapes of errors, limits, keys, and the numbers behind the text."""

import json
import math
import socket
import threading
from pathlib import Path

import httpx2
import pytest
import torch
import transformers

from penstock.rollout.engine import Engine
from penstock.rollout.sampling import Sampling
from penstock.serve import http_protocol, middleware
from tests.conftest import PATIENCE
from tests.serve.conftest import KEY, eventually, paused, running, save_chatty, worker_of

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "seed": 1}


# --- errors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("method", "path", "status", "code"), [
    ("GET", "/v2/models", 404, "not_found"), ("GET", "/v1/models/none", 404, "model_not_found"),
    ("DELETE", "/v1/models", 405, "method_not_allowed"), ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
    ("GET", "/assets/../app.py", 404, "not_found"), ("GET", "/assets/%2e%2e/app.py", 404, "not_found"),
    ("GET", "/api/conversations/conv_none", 404, "not_found"), ("GET", "/api/conversations/%00", 404, "not_found"),
    ("GET", "/api/conversations?limit=0", 400, "invalid_value"), ("GET", "/api/session", 401, "no_session"),
])  # fmt: skip
def test_every_error_has_the_same_shape(server, method, path, status, code):
    reply = server.ask(method, path)
    assert reply.status == status
    assert reply.error["code"] == code
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize(("change", "param", "says"), [
    ({"messages": []}, "messages", "at least 1"), ({"messages": None}, "messages", "list"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "assistant"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "string"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", "text"),
    ({"messages": [*ASK["messages"], {"role": "assistant", "content": "x"}]}, "messages[1].role", "continue_final"),
    ({"continue_final_message": True}, "continue_final_message", "the last one is not"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls", "leave"),
    ({"messages": [{"role": "user", "content": "x"}] * 4097}, "messages", "4096"),
    ({"messages": [{"role": "user", "content": "x" * 2000}]}, "messages", "256"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "half a character"),
    ({"n": 17}, "n", "16"), ({"n": True}, "n", "integer"), ({"stop": "x" * 65}, "stop", "64"),
    ({"stop": ["a"] * 5}, "stop", "4"), ({"stop": ""}, "stop", "1"), ({"temperature": "1"}, "temperature", "number"),
    ({"temperature": math.nan}, "temperature", "finite"), ({"temperature": 2.5}, "temperature", "2"),
    ({"top_p": -0.1}, "top_p", "0"), ({"top_k": -1}, "top_k", "0"), ({"min_p": 2}, "min_p", "1"),
    ({"max_tokens": 0}, "max_tokens", "1"), ({"max_completion_tokens": 5}, "max_tokens", "differ"),
    ({"seed": 2**63}, "seed", "less"), ({"logit_bias": {"x": 1}}, "logit_bias", "0 to 399"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "100"), ({"presence_penalty": 3}, "presence_penalty", "2"),
    ({"repetition_penalty": 5e-324}, "repetition_penalty", "0.1"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "20"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
    ({"tools": [{"type": "function"}]}, "tools", "leave it out"),
    ({"response_format": {"type": "json_object"}}, "response_format", "leave it out"),
    ({"modalities": ["text", "audio"]}, "modalities", "leave it out"),
    ({"audio": {"voice": "x"}}, "audio", "leave it out"), ({"functions": [{}]}, "functions", "leave it out"),
    ({"model": 5}, "model", "string"),
])  # fmt: skip
def test_bad_input_names_the_key_and_the_limit(server, change, param, says):
    reply = server.post({**ASK, **change})
    assert reply.status == 400
    assert reply.error["param"] == param
    assert says in reply.error["message"]
    assert reply.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": [400]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"), ({"prompt": ["a"] * 5, "n": 16}, "prompt"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"), ({"suffix": "x"}, "suffix"),
        ({"best_of": 4}, "best_of"), ({"logprobs": 6}, "logprobs"), ({}, "prompt"),
    ],
)  # fmt: skip
def test_bad_completions_are_refused_too(server, change, param):
    body = {"model": "tiny", **({"prompt": "x"} if change else {}), **change}
    reply = server.post(body, "/v1/completions")
    assert (reply.status, reply.error["param"].partition("[")[0]) == (400, param)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'"x"', b"[" * 20_000, b'{"model": "tiny"}'])
def test_a_body_that_is_no_request_is_refused(server, data):
    reply = server.ask("POST", "/v1/chat/completions", data=data, headers={"content-type": "application/json"})
    assert reply.status == 400
    assert reply.error["message"]


def test_an_unknown_model_is_answered_with_those_that_are_known(server):
    reply = server.post({**ASK, "model": "gpt-\ud83d\n<b>"})
    assert reply.status == 404
    assert "tiny, other" in reply.error["message"]
    assert reply.error["code"] == "model_not_found"


def test_a_prompt_beyond_the_context_is_told_both_numbers(server):
    error = server.post({"model": "tiny", "prompt": [5] * 256}, "/v1/completions").error
    assert "256 tokens" in error["message"]
    assert "context of 256" in error["message"]
    assert error["code"] == "context_length_exceeded"
    assert server.post({"model": "tiny", "prompt": [5] * 255}, "/v1/completions").status == 200


def test_null_is_the_same_as_leaving_out(server):
    plain = server.post(ASK).json["choices"]
    nulls = dict.fromkeys(("temperature", "top_p", "n", "stop", "tools", "audio", "stream", "logit_bias", "user"))
    assert server.post({**ASK, **nulls}).json["choices"] == plain


# --- numbers ----------------------------------------------------------------------------------------------------------
def test_the_servers_logprobs_are_the_trainers(server):
    model = server.service.catalogue.models["tiny"]
    prompt = [1, 40, 41, 42]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "logprobs": 0, "seed": 3}
    logprobs = server.post(body, "/v1/completions").json["choices"][0]["logprobs"]["token_logprobs"]
    # The tokens, by asking an engine for the same answer.
    decoder = worker_of(model).models[model.number].decoder
    engine = Engine(decoder, eos_ids=model.encoder.eos_ids, rows=1)
    (answer,) = engine.generate([prompt], Sampling(max_new_tokens=40, seed=3))
    ids = [token for token in answer.response_ids if token != 2]
    row = torch.tensor([prompt + answer.response_ids])
    with torch.no_grad():
        states = decoder.forward(row, torch.tensor([row.shape[1]]))[0, len(prompt) - 1 : -1]
        wanted = torch.log_softmax(decoder.logits(states), -1).gather(1, row[0, len(prompt) :, None])[:, 0]
    assert len(ids) >= 10
    difference = torch.tensor(logprobs) - wanted[: len(ids)]
    assert difference.abs().max() <= 1e-5


def test_logprobs_are_always_numbers(server):
    body = {**ASK, "temperature": 0.002, "logprobs": True, "top_logprobs": 20, "logit_bias": {"40": 100, "41": -100}}
    text = server.post(body).body.decode()
    assert "Infinity" not in text
    assert "NaN" not in text
    tokens = json.loads(text)["choices"][0]["logprobs"]["content"]
    assert min(top["logprob"] for token in tokens for top in token["top_logprobs"]) == -9999.0


@pytest.mark.parametrize("penalty", [0.1, 10])
@pytest.mark.parametrize("temperature", [1e-30, 0.001, 2])
def test_the_limits_of_all_settings_together_still_give_numbers(server, penalty, temperature):
    extremes = {
        "temperature": temperature, "repetition_penalty": penalty, "presence_penalty": -2, "frequency_penalty": -2,
        "top_p": 0, "min_p": 1, "top_k": 1, "max_tokens": 200, "logit_bias": {str(i): 100 for i in range(3, 300)},
    }  # fmt: skip
    assert server.post({**ASK, **extremes}).status == 200


def test_the_coldest_temperatures_are_greedy(server):
    greedy = server.post({**ASK, "temperature": 0}).json["choices"][0]["message"]
    assert server.post({**ASK, "temperature": 1e-30}).json["choices"][0]["message"] == greedy


# --- who may ask ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/openapi.json", "/api/conversations", "/api/export", "/nowhere"]
)
def test_every_route_needs_the_key(server, path):
    for key in (None, "wrong", "", KEY + "x", KEY[:-1]):
        reply = server.ask("GET", path, key=key)
        assert (reply.status, reply.error["type"]) == (401, "authentication_error")


def test_health_and_the_page_need_none(server):
    assert server.ask("GET", "/health", key=None).json == {"status": "serving"}
    assert server.ask("GET", "/", key=None).status in (200, 404)


def log_in(server):
    reply = server.ask("POST", "/api/session", {"key": KEY}, key=None)
    return reply.headers["set-cookie"].split(";")[0], reply.json["csrf"], reply


def test_a_session_is_a_cookie_and_a_token(server):
    cookie, csrf, reply = log_in(server)
    assert {"HttpOnly", "Path=/", "SameSite=strict"} <= set(reply.headers["set-cookie"].split("; "))
    with_cookie = {"cookie": cookie}
    assert server.ask("GET", "/api/session", key=None, headers=with_cookie).json == {"csrf": csrf, "owner": True}
    assert server.ask("GET", "/v1/models", key=None, headers=with_cookie).status == 200
    refused = server.ask("POST", "/api/conversations", {}, key=None, headers=with_cookie)
    assert (refused.status, refused.error["code"]) == (403, "invalid_csrf_token")
    wrong = server.ask("POST", "/api/conversations", {}, key=None, headers={**with_cookie, "x-csrf-token": csrf[:-1]})
    assert wrong.status == 403
    right = {**with_cookie, "x-csrf-token": csrf}
    assert server.ask("POST", "/api/conversations", {}, key=None, headers=right).status == 201
    assert server.ask("POST", "/v1/chat/completions", ASK, key=None, headers=right).status == 200
    assert server.ask("DELETE", "/api/session", key=None, headers=right).status == 204
    assert server.ask("GET", "/api/session", key=None, headers=with_cookie).status == 401


def test_a_wrong_key_opens_no_session(server):
    reply = server.ask("POST", "/api/session", {"key": "wrong"}, key=None)
    assert reply.status == 401
    assert "set-cookie" not in reply.headers
    name = f"penstock_session_{server.port}"
    assert server.ask("GET", "/api/session", key=None, headers={"cookie": f"{name}=made-up"}).status == 401


def test_keys_and_sessions_are_kept_as_hashes_only(server):
    cookie, _, _ = log_in(server)
    stored = b"".join(path.read_bytes() for path in Path(server.service.config.data_dir).iterdir())
    assert KEY.encode() not in stored
    assert cookie.split("=")[1].encode() not in stored


def test_answers_say_what_a_browser_must_not_do(server):
    for path in ("/health", "/v1/models", "/nowhere", "/"):
        headers = server.ask("GET", path).headers
        assert headers["content-security-policy"].startswith("default-src 'self';")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers


def test_other_origins_are_let_in_by_name_only(tmp_path):
    with running(tmp_path / "data", save_chatty(tmp_path / "tiny"), cors=("https://friend.example",)) as server:
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
        friend = server.ask("OPTIONS", "/v1/models", key=None, headers={"origin": "https://friend.example", **asks})
        assert friend.headers["access-control-allow-origin"] == "https://friend.example"
        assert "access-control-allow-credentials" not in friend.headers
        stranger = server.ask("OPTIONS", "/v1/models", key=None, headers={"origin": "https://other.example", **asks})
        assert "access-control-allow-origin" not in stranger.headers


def test_a_key_may_have_so_many_requests_in_work(tmp_path):
    with running(tmp_path / "data", save_chatty(tmp_path / "tiny"), per_key=2) as server:
        closed = threading.Event()
        with paused(server.service.catalogue.models["tiny"], closed.is_set):
            streams = [open_stream(server) for _ in range(2)]
            refused = server.ask("GET", "/v1/models")
            assert (refused.status, refused.headers["retry-after"]) == (429, "1")
            for stream in streams:
                stream.close()
            closed.set()
            assert server.idle()
        assert eventually(lambda: server.ask("GET", "/v1/models").status == 200)


def test_the_chat_template_runs_in_a_sandbox(tmp_path):
    model = save_chatty(tmp_path / "tiny")
    settings = json.loads((tmp_path / "tiny" / "tokenizer_config.json").read_text())
    for template in ("{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__ }}", "{{ messages.append(1) }}"):
        (tmp_path / "tiny" / "chat_template.jinja").write_text(template)
        settings["chat_template"] = template
        (tmp_path / "tiny" / "tokenizer_config.json").write_text(json.dumps(settings))
        with running(tmp_path / f"data{len(template)}", model) as server:
            reply = server.post(ASK)
            assert reply.status == 400
            assert "the chat template refuses" in reply.error["message"]


# --- how much, how slow -----------------------------------------------------------------------------------------------
def raw(server, data):
    """The server's answer to these bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def head(*lines):
    first = ["POST /v1/chat/completions HTTP/1.1", "host: x", f"authorization: Bearer {KEY}"]
    return "\r\n".join([*first, *lines, "", ""])


def test_a_body_of_100_mb_is_refused_before_it_is_sent(server, monkeypatch):
    monkeypatch.setattr(middleware, "LINGER_SECONDS", 0.1)
    answer = raw(server, head("content-length: 104857600").encode())
    assert answer.startswith(b"HTTP/1.1 413")
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "request_too_large"


def test_a_body_of_100_mb_in_chunks_is_refused_at_the_first_that_is_too_many(server):
    def body():
        for _ in range(100):
            yield b"x" * 2**20

    url, headers = f"{server.address}/v1/chat/completions", {"authorization": f"Bearer {KEY}"}
    reply = httpx2.post(url, content=body(), headers=headers, timeout=PATIENCE)
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "request_too_large"
    assert server.post(ASK).status == 200


def test_a_body_of_just_one_mib_is_read(server):
    padding = "x" * (2**20 - len(json.dumps({**ASK, "user": ""})))
    assert server.post({**ASK, "user": padding}).status == 200
    assert server.post({**ASK, "user": padding + "x"}).status == 413


def test_a_head_that_never_ends_is_given_up(server, monkeypatch):
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 1.0)
    assert raw(server, b"") == b""
    assert raw(server, b"GET /health HTTP/1.1\r\nx: y\r\n").startswith(b"HTTP/1.1 408")


def test_a_head_of_fifty_kilobytes_is_refused(server):
    answer = raw(server, b"GET /health HTTP/1.1\r\n" + b"".join(b"x-%d: %s\r\n" % (i, b"y" * 8000) for i in range(6)))
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"type": "invalid_request_error"' in answer


def test_what_is_no_http_is_told_so(server):
    assert raw(server, b"\x16\x03\x01 hello\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_a_body_that_drips_is_given_up(server, monkeypatch):
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(middleware, "LINGER_SECONDS", 0.1)
    assert raw(server, head("content-length: 100").encode() + b"{").startswith(b"HTTP/1.1 408")


def test_a_client_that_stops_reading_loses_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(middleware, "SEND_SECONDS", 0.6)
    with running(tmp_path / "data", save_chatty(tmp_path / "tiny", max_length=4000)) as server:
        body = json.dumps({**ASK, "max_tokens": 3900, "n": 4, "stream": True, "logprobs": True, "top_logprobs": 20})
        with socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect(("127.0.0.1", server.port))
            lazy.sendall((head(f"content-length: {len(body)}", "content-type: application/json") + body).encode())
            assert eventually(lambda: server.service.scheduler.tokens_made > 0)
            assert server.idle()


# --- leaving ----------------------------------------------------------------------------------------------------------
def open_stream(server, **changes):
    """A connection that receives a long answer."""
    body = json.dumps({**ASK, "max_tokens": 240, "logit_bias": {"2": -100}, "stream": True, **changes})
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall((head(f"content-length: {len(body)}", "content-type: application/json") + body).encode())
    if changes.get("stream", True):
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    return connection


@pytest.mark.parametrize("streamed", [True, False])
def test_who_leaves_frees_his_rows_at_once(tmp_path, streamed):
    with running(tmp_path / "data", save_chatty(tmp_path / "tiny", max_length=4000)) as server:
        scheduler, model = server.service.scheduler, server.service.catalogue.models["tiny"]
        with paused(model, lambda: False, after=20):
            connection = open_stream(server, stream=streamed, max_tokens=3900, n=3)
            assert eventually(lambda: scheduler.rows_used == 3)
            connection.close()
            assert server.idle()
        assert scheduler.tokens_made < 3 * 3900
        assert server.post(ASK).status == 200


# --- prompts that are read --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("new", [0, 3])
def test_echo_is_what_transformers_says_of_the_prompts(server, new):
    """Prompts of several lengths in one request, as token ids; as lm-eval asks."""
    path = server.service.catalogue.sources["tiny"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompts = [[5, 17, 300, 8], [399], [9] * 40, [21, 4, 250]]
    body = {"model": "tiny", "prompt": prompts, "echo": True, "logprobs": 3, "max_tokens": new, "temperature": 0}
    reply = server.post({**body, "logit_bias": {"2": -100}}, "/v1/completions")
    assert reply.status == 200, reply.body
    assert reply.json["usage"]["completion_tokens"] == new * len(prompts)
    for prompt, choice in zip(prompts, reply.json["choices"], strict=True):
        logprobs, end = choice["logprobs"], len(prompt)
        assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == end + new
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        with torch.no_grad():
            expected = theirs(torch.tensor([prompt])).logits[0].log_softmax(-1)
        own = expected[torch.arange(end - 1), torch.tensor(prompt[1:], dtype=torch.int64)]
        assert logprobs["token_logprobs"][1:end] == pytest.approx(own.tolist(), abs=1e-4)
        best = [max(top.values()) for top in logprobs["top_logprobs"][1:end]]
        assert best == pytest.approx(expected[: end - 1].max(-1).values.tolist(), abs=1e-4)
        offsets = logprobs["text_offset"]
        assert offsets == sorted(offsets)
        assert choice["finish_reason"] == "length"


def test_behind_an_echo_an_end_of_sequence_is_listed_too(server):
    """lm-eval asks for one token more, and takes the last one of the list for it."""
    body = {"model": "tiny", "prompt": [5, 17, 300], "echo": True, "logprobs": 1, "max_tokens": 1}
    choice = server.post({**body, "logit_bias": {"2": 100}}, "/v1/completions").json["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["token_logprobs"]) == 4
    assert choice["logprobs"]["token_logprobs"][-1] == pytest.approx(0, abs=1e-3)


def test_echo_of_a_text_is_the_text_before_its_answers_and_streams(server):
    body = {"model": "tiny", "prompt": "What is a", "echo": True, "max_tokens": 4, "seed": 3, "n": 2}
    plain = server.post({**body, "echo": False}, "/v1/completions").json["choices"]
    whole = server.post(body, "/v1/completions").json["choices"]
    assert [choice["text"] for choice in whole] == ["What is a" + choice["text"] for choice in plain]
    streamed = ["", ""]
    for event in server.post({**body, "stream": True}, "/v1/completions").events[:-1]:
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == [choice["text"] for choice in whole]
    assert "logprobs" in whole[0]
    assert whole[0]["logprobs"] is None


def test_a_model_that_fails_while_it_reads_is_an_error_and_the_next_request_is_answered(server, monkeypatch):
    model = server.service.catalogue.models["tiny"]
    body = {"model": "tiny", "prompt": "x", "echo": True, "logprobs": 1, "max_tokens": 0}
    with monkeypatch.context() as broken:
        broken.setattr(worker_of(model).models[model.number].decoder, "forward", None)
        reply = server.post(body, "/v1/completions")
    assert (reply.status, reply.error["code"]) == (500, "model_failed")
    assert server.post(body, "/v1/completions").status == 200


def test_the_openapi_document_promises_our_errors(server):
    document = server.ask("GET", "/openapi.json").json
    assert set(document["paths"]) >= {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"}
    for path in document["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]
            for status, response in operation["responses"].items():
                if status >= "400":
                    assert response["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorAnswer")


def test_metrics_count(server):
    def now():
        lines = server.ask("GET", "/metrics").body.decode().splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}

    before = now()
    made = server.post({**ASK, "max_tokens": 5, "logit_bias": {"2": -100}}).json["usage"]
    after = now()
    tokens, prompts = "penstock_serve_answer_tokens_total", "penstock_serve_prompt_tokens_total"
    assert after[tokens] - before[tokens] == made["completion_tokens"] == 5
    assert after[prompts] - before[prompts] == made["prompt_tokens"]
    assert after["penstock_serve_ready"] == 1
    name = 'penstock_serve_requests_total{method="POST",route="/v1/chat/completions",status="200"}'
    assert after[name] == before.get(name, 0) + 1
