"""POST /v1/score: what a reward model makes of answers, in the shape of vLLM's route of this name.

A score is the number that PPO learns from: read at the answer's end, centred and divided by its spread as the reward
model's training measured them.
"""

import math
import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from penstock.data.records import Prompt
from penstock.errors import DataError
from penstock.serve.errors import ApiError, documented
from penstock.serve.models.catalogue import ServedReward
from penstock.serve.openai_requests import CHANGES_MESSAGE, MAX_MESSAGES, ChatMessage, Loose, Str, refuse_unsupported
from penstock.serve.openai_responses import Usage
from penstock.serve.service import Service, request_bytes, service_of

MAX_SCORES = 256
"""In one request."""
scores = APIRouter(prefix="/v1", tags=["openai"], dependencies=[Depends(HTTPBearer(auto_error=False))])
Text = Str | Annotated[list[Str], Field(min_length=1, max_length=MAX_SCORES)]
Conversation = Annotated[list[ChatMessage], Field(min_length=2, max_length=MAX_MESSAGES)]


class ScoreRequest(Loose):
    """Either queries and documents, or conversations."""

    model: str
    queries: Annotated[Text | None, Field(description="One for all documents, or one for each.")] = None
    documents: Annotated[Text | None, Field(description="Answers, the assistant's turns.")] = None
    text_1: Annotated[Text | None, Field(description="vLLM's other name of queries.")] = None
    text_2: Annotated[Text | None, Field(description="vLLM's other name of documents.")] = None
    messages: (
        Annotated[Conversation | list[Conversation], Field(description="Conversations that end with the answer.")]
        | None
    ) = None
    apply_chat_template: Annotated[
        bool, Field(description="False: a query is a plain prompt, and its document goes on right behind it.")
    ] = True


class Score(BaseModel):
    """One answer's."""

    index: int
    object: Literal["score"]
    score: float


class ScoreList(BaseModel):
    """In the order of the request."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    system_fingerprint: str
    data: list[Score]
    usage: Usage


@scores.post(
    "/score", response_model=ScoreList, responses=documented(400, 401, 403, 404, 408, 413, 429, 500, 503)
)  # fmt: skip
async def score(body: ScoreRequest, request: Request) -> JSONResponse:
    """Scores answers by a reward model."""
    service = service_of(request)
    reward = service.find_reward(body.model)
    rows = await service.encode(request_bytes(request), encode, body, reward)
    service.scoring += 1
    try:
        values = await _scored(service, reward, rows)
    finally:
        service.scoring -= 1
    if not all(map(math.isfinite, values)):
        raise ApiError(500, f"{reward.id} gave a score that is no number.", code="model_failed")
    data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(values)]
    count = sum(map(len, rows))
    answer = {
        "id": f"score-{secrets.token_hex(12)}", "object": "list", "created": int(time.time()), "model": reward.id,
        "system_fingerprint": f"fp_{reward.digest[:12]}", "data": data,
        "usage": {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count},
    }  # fmt: skip
    return JSONResponse(answer)


async def _scored(service: Service, reward: ServedReward, rows: Sequence[Sequence[int]]) -> list[float]:
    values: list[float] = []
    for part in reward.parts(rows):  # streams go on between two passes
        if service.scheduler is None:
            raise ApiError(503, "the server is draining; try again in a moment.", code="draining")
        values += await service.scheduler.score(reward.number, rows[part])
    return values


def encode(request: ScoreRequest, reward: ServedReward) -> list[list[int]]:
    """A row of token ids per answer. Raises ApiError, with the key at fault."""
    refuse_unsupported(request, CHANGES)
    rows = []
    for param, record, answer in _records(request):
        try:
            row = reward.encoder.encode_response(record, answer, ended=True)
        except DataError as error:
            raise ApiError(400, str(error), param=param) from error
        if len(row) > reward.length:
            text = f"{param} has {len(row)} tokens, and {reward.id} has a context of {reward.length}; shorten it."
            raise ApiError(400, text, param=param, code="context_length_exceeded")
        rows.append(row)
    return rows


CHANGES: dict[str, Any] = {
    "truncate_prompt_tokens": (), "activation": (False,), "use_activation": (False,), "softmax": (False,),
    "chat_template": (), "instruction": (), "top_n": (), "data_1": (), "data_2": (), "items": (), "label_token_ids": (),
}  # fmt: skip
"""Keys of others' that change scores, with the values that do not."""


def _records(request: ScoreRequest) -> list[tuple[str, Prompt, str]]:
    """(key, prompt, answer) of each score that is asked for."""
    pairs = {"text_1": (request.queries, request.text_1), "text_2": (request.documents, request.text_2)}
    for name, given in pairs.items():
        if None not in given:
            raise ApiError(400, f"{name} is another name of what is there already; give one of them.", param=name)
    queries, documents = (_list(own, other) for own, other in pairs.values())
    complete = queries is None is documents if request.messages else None not in (queries, documents)
    if not complete:
        raise ApiError(400, "give queries and documents, or messages.", param="messages")
    if request.messages is not None:
        if not request.apply_chat_template:
            text = "apply_chat_template: false is for plain prompts; give queries and documents, or leave it out."
            raise ApiError(400, text, param="apply_chat_template")
        several = isinstance(request.messages[0], list)
        talks: Any = request.messages if several else [request.messages]
        if len(talks) > MAX_SCORES:
            raise ApiError(400, f"{len(talks)} conversations are more than {MAX_SCORES}.", param="messages")
        return [_conversation(talk, f"messages[{i}]" if several else "messages") for i, talk in enumerate(talks)]
    assert queries is not None
    assert documents is not None
    if len(queries) not in (1, len(documents)):
        text = f"{len(queries)} queries do not go with {len(documents)} documents; give one, or as many."
        raise ApiError(400, text, param="queries")
    records = []
    for i, document in enumerate(documents):
        query, where = queries[i % len(queries)], f"documents[{i}]"
        turns = ({"role": "user", "content": query},)
        record = (
            Prompt(messages=turns, where=where) if request.apply_chat_template else Prompt(prompt=query, where=where)
        )
        records.append((where, record, document))
    return records


def _conversation(talk: Sequence[ChatMessage], param: str) -> tuple[str, Prompt, str]:
    for i, message in enumerate(talk):
        refuse_unsupported(message, CHANGES_MESSAGE, f"{param}[{i}].")
    if talk[-1].role != "assistant":
        raise ApiError(
            400, "the last turn is the assistant's: it is what is scored.", param=f"{param}[{len(talk) - 1}]"
        )
    turns = tuple({"role": message.role, "content": message.text} for message in talk[:-1])
    return param, Prompt(messages=turns, where=param), talk[-1].text


def _list(text: str | list[str] | None, other: str | list[str] | None) -> list[str] | None:
    text = other if text is None else text
    return [text] if isinstance(text, str) else text
