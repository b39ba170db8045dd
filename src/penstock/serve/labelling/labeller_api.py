"""The labeller's routes under /api/label: what a labeller's token opens. The owner may label too."""

import contextlib
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from penstock.data.jsonl import FieldError
from penstock.serve.errors import ApiError, documented
from penstock.serve.labelling import labellers, leases, room
from penstock.serve.openai_requests import Str
from penstock.serve.page_api import Strict
from penstock.serve.service import service_of

labeller_api = APIRouter(prefix="/api/label", tags=["label"], dependencies=[Depends(HTTPBearer(auto_error=False))])
FAILS = documented(400, 401, 403, 404, 408, 409, 413, 429, 503)
Position = Annotated[int, Field(ge=0, le=8)]
Flag = Literal["harmful", "private", "nonsense", "unclear", "other"]


class Judgement(Strict):
    """What a labeller says of an item; answers have the numbers of the order in which they were shown."""

    outcome: Literal["ranked", "skipped"]
    ranking: Annotated[
        list[Position | list[Position]] | None,
        Field(max_length=9, description="Best first; lists are ties. Null for an item that is skipped."),
    ] = None
    edits: Annotated[
        dict[Annotated[str, Field(pattern="^[0-8]$")], Annotated[Str, Field(min_length=1, max_length=100_000)]],
        Field(max_length=9, description="Answers that were rewritten, by their number.", default_factory=dict),
    ]
    flag: Annotated[Flag | None, Field(description="What is wrong with the item, for its owner.")] = None
    note: Annotated[Str, Field(max_length=2000)] | None = None
    seconds: Annotated[float, Field(ge=0, le=86400)] | None = None


class Progress(BaseModel):
    """done: items that this labeller has ranked; left: items that there are still for this labeller."""

    done: int
    left: int


class Item(BaseModel):
    """An item to judge; `judgement` is what was said before it was reopened."""

    id: str
    prompt: str | list[dict[str, Any]]
    answers: list[str]
    leased_until: float
    judgement: dict[str, Any] | None


class NextItem(BaseModel):
    """The item that the labeller holds; null when nothing is left."""

    item: Item | None
    progress: Progress


class Me(BaseModel):
    """Who labels, and how."""

    name: str
    owner: bool
    guidelines: str
    progress: Progress


@contextlib.contextmanager
def room_errors() -> Iterator[None]:
    """Answers what the room raises: LookupError with 404, TakenError with 409, FieldError and ValueError with 400."""
    try:
        yield
    except FieldError as error:
        raise ApiError(400, f"{error.name}: {error.problem}", param=error.name) from error
    except leases.TakenError as error:
        raise ApiError(409, str(error)) from error
    except (LookupError, ValueError) as error:
        raise ApiError(404 if isinstance(error, LookupError) else 400, str(error.args[0])) from error


@labeller_api.get("/me", response_model=Me, responses=FAILS)
def see_me(request: Request) -> JSONResponse:
    """The labeller's name, the guidelines, and how far the work is."""
    store, labeller_id = service_of(request).store, _labeller(request)
    with room_errors():
        name = labellers.name_of(store, labeller_id)
    owner = request.scope["penstock.caller"].labeller_id is None
    progress = leases.progress(store, labeller_id, time.time())
    guidelines = room.settings(store)["guidelines"]
    return JSONResponse({"name": name, "owner": owner, "guidelines": guidelines, "progress": progress})


@labeller_api.post("/next", response_model=NextItem, responses=FAILS)
def next_item(request: Request) -> JSONResponse:
    """The item that the labeller holds, or a new one, which nobody else gets meanwhile."""
    store, labeller_id = service_of(request).store, _labeller(request)
    with room_errors():
        return _shown(request, leases.next_item(store, labeller_id, time.time()))


@labeller_api.post("/items/{item_id}", response_model=Progress, responses=FAILS)
def judge(item_id: str, body: Judgement, request: Request) -> JSONResponse:
    """Stores a judgement. The same one again changes nothing; 409: somebody else has the item by now."""
    store, labeller_id = service_of(request).store, _labeller(request)
    if (body.outcome == "ranked") != (body.ranking is not None):
        raise ApiError(400, "an item is ranked with a ranking, or skipped without one.", param="ranking")
    if body.outcome == "skipped" and body.edits:
        raise ApiError(400, "answers of a skipped item are not rewritten; rank it, or leave them out.", param="edits")
    with room_errors():
        leases.judge(store, labeller_id, item_id, body.model_dump(), time.time())
    return JSONResponse(leases.progress(store, labeller_id, time.time()))


@labeller_api.post("/undo", response_model=NextItem, responses=FAILS)
def undo(request: Request) -> JSONResponse:
    """Reopens the labeller's last judgement; null where nothing was judged."""
    store, labeller_id = service_of(request).store, _labeller(request)
    with room_errors():
        return _shown(request, leases.undo(store, labeller_id, time.time()))


def _shown(request: Request, item: Any) -> JSONResponse:
    progress = leases.progress(service_of(request).store, _labeller(request), time.time())
    return JSONResponse({"item": item, "progress": progress})


def _labeller(request: Request) -> str:
    """The id of who asks."""
    labeller_id = request.scope["penstock.caller"].labeller_id
    return labeller_id or labellers.owner(service_of(request).store)
