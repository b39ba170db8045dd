"""The page's routes for every day: search, answers rewritten, messages removed, titles by a model, import, markdown."""

from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from penstock.serve.chats.changes import remove_message, rewrite_answer, set_title
from penstock.serve.chats.importing import import_conversation
from penstock.serve.chats.markdown import as_markdown
from penstock.serve.chats.search import search
from penstock.serve.chats.titles import title_of
from penstock.serve.errors import ApiError
from penstock.serve.openai_requests import Str
from penstock.serve.page_api import (
    FAILS,
    MAX_CHARACTERS,
    MESSAGE,
    Conversation,
    StoredMessage,
    Strict,
    store_errors,
    with_times,
)
from penstock.serve.service import service_of

MAX_IMPORTED = 10_000
"""Messages of an imported conversation."""
Moment = Annotated[float, Field(ge=0, lt=2**33, description="Seconds since 1970.")]
chats = APIRouter(prefix="/api", tags=["page"], dependencies=[Depends(HTTPBearer(auto_error=False))])


class Hit(BaseModel):
    """The newest message of a conversation that holds the words."""

    message_id: str
    role: Literal["user", "assistant"]
    text: str = Field(description="One line around the first word.")


class FoundConversation(Conversation):
    """A conversation that a search found; its `hit` is null where the title holds the words."""

    hit: Hit | None


class SearchResult(BaseModel):
    """Titles first, then messages, each newest first. `rest`: sent with the same words it searches the older ones."""

    data: list[FoundConversation]
    rest: int | None


class NewWording(Strict):
    """What a person says that the answer should have been."""

    content: Annotated[Str, Field(min_length=1, max_length=MAX_CHARACTERS)]


class Titling(Strict):
    """Which model names the conversation."""

    model: str


class ImportedMessage(Strict):
    """A message; `parent` is the number of an earlier one, null for the first of a branch."""

    parent: int | None
    role: Literal["user", "assistant"]
    content: Annotated[Str, Field(min_length=1, max_length=MAX_CHARACTERS)]
    model: Annotated[Str, Field(max_length=200)] | None = None
    created_at: Moment | None = None
    finish_reason: Literal["stop", "length", "cancelled", "interrupted", "error"] | None = None
    disliked: bool = False


class ImportedConversation(Strict):
    """A conversation from elsewhere."""

    title: Annotated[Str, Field(max_length=200)] = ""
    system: Annotated[Str, Field(max_length=MAX_CHARACTERS)] = ""
    created_at: Moment | None = None
    messages: Annotated[list[ImportedMessage], Field(min_length=1, max_length=MAX_IMPORTED)]


class Imported(Conversation):
    """The conversation, and whether the same one was imported before."""

    existed: bool


@chats.get("/search", response_model=SearchResult, responses=FAILS)
def search_conversations(
    request: Request, q: Annotated[Str, Query(min_length=1, max_length=200)],
    rest: Annotated[int | None, Query(ge=1, lt=2**63)] = None,
) -> JSONResponse:  # fmt: skip
    """Conversations with all words of `q` in their title, or in one message, in capitals or not."""
    if not q.split():
        raise ApiError(400, "q holds no word.", param="q")
    rows, rest = search(service_of(request).store, q, rest)
    return JSONResponse({"data": [with_times(row) for row in rows], "rest": rest})


@chats.post(MESSAGE + "/rewrite", status_code=201, response_model=StoredMessage, responses=FAILS)
def rewrite(conversation_id: str, message_id: str, body: NewWording, request: Request) -> JSONResponse:
    """A person's wording of an answer, as another branch, and a vote that it is better than the first."""
    with store_errors():
        row = rewrite_answer(service_of(request).store, conversation_id, message_id, body.content)
    return JSONResponse(with_times(row), 201)


@chats.delete(MESSAGE, status_code=204, responses=FAILS)
async def remove(conversation_id: str, message_id: str, request: Request) -> Response:
    """Removes a message, all that follow it and the votes on them, and stops answers among them."""
    service = service_of(request)
    with store_errors():
        await run_in_threadpool(service.store.message, message_id, conversation_id)
        if writing := service.answers.of(conversation_id):
            below = await run_in_threadpool(service.store.below, message_id, conversation_id)
            await service.answers.stop(answer for answer in writing if answer.row["id"] in below)
        await run_in_threadpool(remove_message, service.store, conversation_id, message_id)
    return Response(status_code=204)


@chats.post("/conversations/{conversation_id}/title", response_model=Conversation, responses=FAILS)
async def make_title(conversation_id: str, body: Titling, request: Request) -> JSONResponse:
    """Has a model name a conversation by its first question and answer, while nobody waits for an answer.

    A title that a person chose stays, and so does the one that there is where the model gives none.
    """
    service = service_of(request)
    model = service.find(body.model)
    with store_errors():
        row = await run_in_threadpool(service.store.conversation, conversation_id)
        messages = await run_in_threadpool(service.store.messages, conversation_id)
    questions = {message["id"]: message["content"] for message in messages if message["role"] == "user"}
    answers = (message for message in messages if message["role"] == "assistant" and message["content"])
    answer = next(answers, None)
    if answer is not None and not row["named"]:
        title = await title_of(service, model, questions[answer["parent_id"]], answer["content"])
        if title:
            with store_errors():
                row = await run_in_threadpool(set_title, service.store, conversation_id, title)
    return JSONResponse(with_times(row))


THERE: dict[int | str, dict[str, Any]] = {200: {"model": Imported, "description": "It was there already."}}


@chats.post("/import", status_code=201, response_model=Imported, responses={**FAILS, **THERE})
def import_one(body: ImportedConversation, request: Request) -> JSONResponse:
    """Stores a conversation from elsewhere; 200 and `existed` where the same one is there already."""
    with store_errors():
        row, existed = import_conversation(service_of(request).store, body.model_dump())
    return JSONResponse({**with_times(row), "existed": existed}, 200 if existed else 201)


MARKDOWN: dict[int | str, dict[str, Any]] = {200: {"content": {"text/markdown": {"schema": {"type": "string"}}}}}


@chats.get(
    "/conversations/{conversation_id}/markdown", response_class=Response, responses={**FAILS, **MARKDOWN}
)  # fmt: skip
def export_markdown(conversation_id: str, request: Request, leaf: str | None = None) -> Response:
    """One way through a conversation as a markdown file: that which ends at `leaf`, or else at the newest message."""
    store = service_of(request).store
    with store_errors():
        conversation, messages = store.conversation(conversation_id), store.messages(conversation_id)
        if leaf is not None:
            store.message(leaf, conversation_id)
    tree = {message["id"]: message for message in messages}
    message = tree.get(leaf or (messages[-1]["id"] if messages else ""))
    path = []
    while message is not None:
        path.append(message)
        message = tree.get(message["parent_id"])
    name = quote(conversation["title"][:80].strip() or "conversation", safe="")
    headers = {"content-disposition": f"attachment; filename=\"conversation.md\"; filename*=UTF-8''{name}.md"}
    return Response(as_markdown(conversation, path[::-1]), media_type="text/markdown", headers=headers)
