"""The page's routes under /api: sessions, conversations as trees, answers that stream into them, votes, export."""

import contextlib
import itertools
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, StreamingResponse

from penstock.serve import openai_requests
from penstock.serve.answers import Answer
from penstock.serve.auth import SESSION_SECONDS, cookie_of, csrf_of
from penstock.serve.detokenize import OPEN, opens_thought
from penstock.serve.errors import ApiError, documented
from penstock.serve.models.catalogue import ServedModel
from penstock.serve.openai_requests import Str
from penstock.serve.service import Service, service_of

MAX_CHARACTERS = 500_000
"""Of one message: it fits the body of a request, and is about the longest context of a model."""
MESSAGE_BYTES = 32
"""What a message takes in the body of a request to /v1 beside its text."""
api = APIRouter(prefix="/api", tags=["page"], dependencies=[Depends(HTTPBearer(auto_error=False))])
MessageId = Annotated[str, Field(pattern=r"^msg_[0-9a-f]{24}$")]
"""Drawn by the client: a request that is sent again, because its reply was lost, adds nothing twice."""
FAILS = documented(400, 401, 403, 404, 408, 413, 429)


class Strict(BaseModel):
    """A body of the page's own: nothing in it that we do not know."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Login(Strict):
    """The key that penstock serve printed."""

    key: str


class Csrf(BaseModel):
    """What X-CSRF-Token must say beside the session's cookie; and whether the session is the owner's."""

    csrf: str
    owner: bool


class NewConversation(Strict):
    """Title and system prompt."""

    title: Annotated[Str, Field(max_length=200)] | None = None
    system: Annotated[Str, Field(max_length=MAX_CHARACTERS)] | None = None


class ConversationChanges(NewConversation):
    """Title, system prompt, and whether it is pinned to the top of the list; what is left out stays."""

    pinned: bool | None = None


class NewMessage(Strict):
    """A user's turn: under an answer, or at the top (null). Another one there is another branch."""

    id: MessageId | None = None
    parent_id: str | None = None
    role: Literal["user"]
    content: Annotated[Str, Field(min_length=1, max_length=MAX_CHARACTERS)]


class Continuation(Strict):
    """How an answer goes on; what is left out is as it was, but for the seed."""

    temperature: openai_requests.Temperature | None = None
    top_p: openai_requests.Share | None = None
    top_k: openai_requests.TopK | None = None
    min_p: openai_requests.MinP | None = None
    max_tokens: openai_requests.Count | None = None
    seed: openai_requests.Seed | None = None
    repetition_penalty: openai_requests.RepetitionPenalty | None = None


class NewReply(Continuation):
    """Which model shall answer which message, and how."""

    id: MessageId | None = None
    parent_id: str
    model: str


class ThumbVote(Strict):
    """Likes or dislikes one answer; 0 takes it back."""

    kind: Literal["thumb"]
    message_id: str
    value: Literal[1, -1, 0]


class PairVote(Strict):
    """Prefers one of two answers shown side by side, left one first; null is a tie."""

    kind: Literal["pair"]
    shown: Annotated[list[str], Field(min_length=2, max_length=2)]
    chosen_id: str | None


class Conversation(BaseModel):
    """A conversation."""

    id: str
    title: str
    system: str
    created_at: str
    updated_at: str
    pinned: bool
    named: bool = Field(description="Whether a person chose the title.")


class Usage(BaseModel):
    """Tokens of an answer's prompt and its own, and the seconds from its first token to its last."""

    prompt_tokens: int
    completion_tokens: int
    seconds: float


class StoredMessage(BaseModel):
    """A message in a conversation's tree; an answer says which model gave it, how, and why it ended.

    finish_reason: null while it is being written; `cancelled` by who watched; `interrupted` by a server's end.
    """

    id: str
    conversation_id: str
    parent_id: str | None
    role: Literal["user", "assistant"]
    content: str
    model: str | None
    sampling: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "cancelled", "interrupted", "error"] | None
    created_at: str
    usage: Usage | None
    edited_from: str | None = Field(description="The answer that a person rewrote into this one.")


class WholeConversation(Conversation):
    """With all its messages, oldest first."""

    messages: list[StoredMessage]


class ConversationList(BaseModel):
    """Pinned ones, then others, each newest first."""

    data: list[Conversation]
    has_more: bool


class Vote(BaseModel):
    """A vote. `shown` holds the ids of the answers in the order of the screen."""

    id: str
    kind: Literal["thumb", "pair"]
    conversation_id: str
    message_id: str | None
    value: int | None
    shown: list[str]
    chosen_id: str | None
    created_at: str


class VoteList(BaseModel):
    """Oldest first."""

    data: list[Vote]


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """Answers the store's LookupError with 404 and its ValueError with 400."""
    try:
        yield
    except (LookupError, ValueError) as error:
        raise ApiError(404 if isinstance(error, LookupError) else 400, str(error.args[0])) from error


def with_times(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON: times in ISO 8601, UTC."""
    times: dict[str, Any] = {
        name: datetime.fromtimestamp(row[name], UTC).isoformat(timespec="milliseconds")
        for name in ("created_at", "updated_at")
        if name in row
    }
    return {**row, **times}


# --- sessions ---------------------------------------------------------------------------------------------------------


@api.post("/session", response_model=Csrf, responses=documented(400, 401, 408, 413))
def log_in(body: Login, request: Request) -> JSONResponse:
    """Opens a session for who knows the key: an HttpOnly cookie, and a token that must come beside it."""
    service = service_of(request)
    session = service.keys.open_session(body.key.strip())
    if session is None:
        raise ApiError(
            401, "this key is not the server's; penstock serve printed it when it first started.", param="key"
        )
    answer = JSONResponse(_session(service, session))
    # A proxy with TLS says so. A client that lies about it loses its own cookie.
    scheme = request.headers.get("x-forwarded-proto", request.url.scheme).split(",")[0].strip().lower()
    answer.set_cookie(
        cookie_of(request.scope), session, max_age=SESSION_SECONDS, path=service.config.root_path or "/",
        secure=scheme == "https", httponly=True, samesite="strict",
    )  # fmt: skip
    return answer


@api.get("/session", response_model=Csrf, responses=documented(401, 403, 429))
def see_session(request: Request) -> JSONResponse:
    """The token of the session that the cookie names."""
    session = request.scope.get("penstock.session")
    if session is None:
        raise ApiError(401, "there is no session; POST the key to /api/session.", code="no_session")
    return JSONResponse(_session(service_of(request), session))


def _session(service: Service, session: str) -> dict[str, Any]:
    caller = service.keys.remembers(session)
    return {"csrf": csrf_of(session), "owner": caller is not None and caller.labeller_id is None}


@api.delete("/session", status_code=204, responses=documented(401, 403, 429))
def log_out(request: Request) -> Response:
    """Ends the session that the cookie names."""
    session = request.scope.get("penstock.session")
    service = service_of(request)
    if session is not None:
        service.keys.close_session(session)
    answer = Response(status_code=204)
    path = service.config.root_path or "/"
    answer.delete_cookie(cookie_of(request.scope), path=path, httponly=True, samesite="strict")
    return answer


# --- conversations ----------------------------------------------------------------------------------------------------


@api.get("/conversations", response_model=ConversationList, responses=FAILS)
def list_conversations(
    request: Request, limit: Annotated[int, Query(ge=1, le=200)] = 50, before: str | None = None
) -> JSONResponse:
    """Pinned conversations, then the others, each by their last use, from behind `before` on."""
    with store_errors():
        rows, has_more = service_of(request).store.list_conversations(limit, before)
    return JSONResponse({"data": [with_times(row) for row in rows], "has_more": has_more})


@api.post("/conversations", status_code=201, response_model=Conversation, responses=FAILS)
def add_conversation(body: NewConversation, request: Request) -> JSONResponse:
    """A new conversation; its first message names it if it has no title."""
    row = service_of(request).store.add_conversation(body.title or "", body.system or "")
    return JSONResponse(with_times(row), 201)


@api.get("/conversations/{conversation_id}", response_model=WholeConversation, responses=FAILS)
def one_conversation(conversation_id: str, request: Request) -> JSONResponse:
    """A conversation with the whole tree of its messages."""
    store = service_of(request).store
    with store_errors():
        row, messages = store.conversation(conversation_id), store.messages(conversation_id)
    return JSONResponse({**with_times(row), "messages": [with_times(message) for message in messages]})


@api.patch("/conversations/{conversation_id}", response_model=Conversation, responses=FAILS)
def change_conversation(conversation_id: str, body: ConversationChanges, request: Request) -> JSONResponse:
    """Sets title, system prompt or pin."""
    changes = body.model_dump(exclude_none=True)
    with store_errors():
        return JSONResponse(with_times(service_of(request).store.change_conversation(conversation_id, changes)))


@api.delete("/conversations/{conversation_id}", status_code=204, responses=FAILS)
async def remove_conversation(conversation_id: str, request: Request) -> Response:
    """Removes a conversation with its messages and votes, and stops its answers."""
    service = service_of(request)
    await service.answers.stop(service.answers.of(conversation_id))
    with store_errors():
        await run_in_threadpool(service.store.remove_conversation, conversation_id)
    return Response(status_code=204)


@api.post("/conversations/{conversation_id}/messages", status_code=201, response_model=StoredMessage, responses=FAILS)
async def add_message(conversation_id: str, body: NewMessage, request: Request) -> JSONResponse:
    """A user's message. Editing one is adding another under the same parent; it stops the answers below that."""
    service = service_of(request)
    store = service.store
    with store_errors():
        row = await run_in_threadpool(
            store.add_message, conversation_id, body.parent_id, "user", body.content, message_id=body.id
        )
        if writing := service.answers.of(conversation_id):
            below = await run_in_threadpool(store.below, body.parent_id, conversation_id)
            below -= await run_in_threadpool(store.below, row["id"], conversation_id)  # where it was sent again
            await service.answers.stop(answer for answer in writing if answer.row["id"] in below)
    return JSONResponse(with_times(row), 201)


# --- answers ----------------------------------------------------------------------------------------------------------


EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
ANSWER_FAILS = documented(400, 401, 403, 404, 408, 413, 429, 503)
MESSAGE = "/conversations/{conversation_id}/messages/{message_id}"


@api.post("/conversations/{conversation_id}/replies", response_class=Response, responses={**EVENTS, **ANSWER_FAILS})
async def add_reply(conversation_id: str, body: NewReply, request: Request) -> Response:
    """Has a model answer a message, and shows it as GET .../events does. Who leaves does not stop it."""
    service = service_of(request)
    if body.id is not None and (answer := service.answers.find(body.id, conversation_id)):
        return _shown(answer)
    model = service.find(body.model)
    with store_errors():
        turns = await run_in_threadpool(service.store.turns, body.parent_id, conversation_id)
    sampling = body.model_dump(exclude={"id", "parent_id", "model"}, exclude_none=True)

    def add(drawn: dict[str, Any]) -> dict[str, Any]:
        return service.store.add_message(
            conversation_id, body.parent_id, "assistant", "", model=model.id, model_digest=model.digest,
            sampling=drawn, message_id=body.id,
        )  # fmt: skip

    return _shown(await _begin(service, model, {"messages": turns, **sampling}, sampling, add))


@api.post(MESSAGE + "/continuation", response_class=Response, responses={**EVENTS, **ANSWER_FAILS})
async def continue_answer(conversation_id: str, message_id: str, body: Continuation, request: Request) -> Response:
    """Has an answer's model go on with it in place, and shows it as GET .../events does."""
    service = service_of(request)
    with store_errors():
        message = await run_in_threadpool(service.store.message, message_id, conversation_id)
        turns = await run_in_threadpool(service.store.turns, message_id, conversation_id)
    if writing := service.answers.find(message_id):
        return _shown(writing)
    model = service.find(message["model"] or "")
    kept = {name: value for name, value in (message["sampling"] or {}).items() if name not in ("seed", "continued")}
    sampling = {**kept, **body.model_dump(exclude_none=True)}
    chat = {"messages": turns, "continue_final_message": bool(message["content"]), **sampling}

    def reopen(drawn: dict[str, Any]) -> dict[str, Any]:
        return service.store.reopen_answer(message_id, conversation_id, {**drawn, "model_digest": model.digest})

    return _shown(await _begin(service, model, chat, sampling, reopen))


@api.get(MESSAGE + "/events", response_class=Response, responses={**EVENTS, **FAILS})
async def watch_answer(conversation_id: str, message_id: str, request: Request) -> Response:
    """An answer as events: the message with its text so far, what it gains, and how it ended; at any time, to any
    number of viewers."""
    service = service_of(request)
    answer = service.answers.find(message_id, conversation_id)
    if answer is None:  # it has ended and is stored so, or another request begins it just now
        with store_errors():
            message = await run_in_threadpool(service.store.message, message_id, conversation_id)
        answer = service.answers.find(message_id) or Answer(message)
    return _shown(answer)


@api.post(MESSAGE + "/stop", response_model=StoredMessage, responses=FAILS)
async def stop_answer(conversation_id: str, message_id: str, request: Request) -> JSONResponse:
    """Ends an answer as it is; one that has ended stays so."""
    service = service_of(request)
    with store_errors():
        await run_in_threadpool(service.store.message, message_id, conversation_id)
        await service.answers.stop(filter(None, [service.answers.find(message_id)]))
        row = await run_in_threadpool(service.store.message, message_id, conversation_id)
    return JSONResponse(with_times(row))


async def _begin(
    service: Service, model: ServedModel, chat: dict[str, Any], sampling: dict[str, Any],
    store: Callable[[dict[str, Any]], dict[str, Any]],
) -> Answer:  # fmt: skip
    """Begins to write an answer. `store`: stores its message, given the sampling with the seed that was drawn."""
    try:
        body = openai_requests.ChatRequest.model_validate({"model": model.id, **chat})
    except ValidationError as error:  # more turns than one request may have
        raise ApiError(400, f"this conversation cannot be sent: {error.errors()[0]['msg']}.") from error
    size = sum(MESSAGE_BYTES + len(message.text) for message in body.messages)
    encoded = await service.encode(size, openai_requests.encode_chat, body, model)
    generation = service.begin(model, encoded)  # before the store: a refused request leaves no message
    try:
        with store_errors():
            # With the seed the same answer can be generated again.
            message = await run_in_threadpool(store, {**sampling, "seed": encoded.sampling.seed})
    except BaseException:
        service.cancel(generation)
        raise
    if not message["content"] and opens_thought(model.decode, generation.prompts[0]):
        message["content"] = OPEN  # the template wrote it: the stored text says by itself what is a thought
    return service.answers.begin(message, generation)


def _shown(answer: Answer) -> Response:
    headers = {"x-accel-buffering": "no"}
    return StreamingResponse(_events(answer), media_type="text/event-stream", headers=headers)


async def _events(answer: Answer) -> AsyncGenerator[bytes, None]:
    message, seen = answer.message, len(answer.texts)
    yield _event(type="message", message=with_times(message))
    async for text in answer.growth(seen):
        yield _event(type="delta", content=text) if text else b": still here\n\n"
    if answer.failure is not None:
        yield _event(type="error", **answer.failure.body)
    else:
        yield _event(type="done", message=with_times(answer.message))


def _event(**fields: Any) -> bytes:
    return f"data: {json.dumps(fields)}\n\n".encode()


# --- votes and export -------------------------------------------------------------------------------------------------


def _vote(row: dict[str, Any]) -> dict[str, Any]:
    pair = row["kind"] == "pair"
    return {
        "id": row["id"], "kind": row["kind"], "conversation_id": row["conversation_id"],
        "message_id": None if pair else row["message_id"], "value": row["value"],
        "shown": [answer["message_id"] for answer in row["shown"]], "chosen_id": row["chosen_id"],
        "created_at": with_times(row)["created_at"],
    }  # fmt: skip


@api.post("/votes", response_model=Vote, responses=FAILS)
def add_vote(body: Annotated[ThumbVote | PairVote, Field(discriminator="kind")], request: Request) -> JSONResponse:
    """Stores a vote, in the place of an earlier one on the same answers."""
    store = service_of(request).store
    with store_errors():
        if isinstance(body, ThumbVote):
            row = store.vote_thumb(body.message_id, body.value)
        else:
            row = store.vote_pair((body.shown[0], body.shown[1]), body.chosen_id)
    return JSONResponse(_vote(row))


@api.get("/votes", response_model=VoteList, responses=FAILS)
def list_votes(request: Request, conversation_id: str | None = None) -> JSONResponse:
    """The votes in a conversation, or all."""
    with store_errors():
        rows = service_of(request).store.votes(conversation_id)
    return JSONResponse({"data": [_vote(row) for row in rows]})


JSON_LINES: dict[int | str, dict[str, Any]] = {200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}}}


def _lines(request: Request, conversation_id: str | None, name: str) -> Response:
    leaves = service_of(request).store.leaves(conversation_id)
    with store_errors():  # before the answer begins
        first = list(itertools.islice(leaves, 1))
    lines = (json.dumps({"messages": turns}, ensure_ascii=False) + "\n" for turns in itertools.chain(first, leaves))
    headers = {"content-disposition": f'attachment; filename="{name}.jsonl"'}
    return StreamingResponse(lines, media_type="application/jsonl", headers=headers)


@api.get("/conversations/{conversation_id}/export", response_class=Response, responses={**FAILS, **JSON_LINES})
def export_one(conversation_id: str, request: Request) -> Response:
    """JSON lines: one conversation per way through the tree, as penstock sft reads them."""
    return _lines(request, conversation_id, "conversation")


@api.get("/export", response_class=Response, responses={**FAILS, **JSON_LINES})
def export_all(request: Request) -> Response:
    """The same of all conversations."""
    return _lines(request, None, "conversations")
