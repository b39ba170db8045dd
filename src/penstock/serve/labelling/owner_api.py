"""The owner's routes of the labelling room, under /api/labelling: settings, items, labellers, figures, exports."""

import itertools
import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, StreamingResponse

from penstock.data.jsonl import FieldError
from penstock.serve.errors import ApiError, documented
from penstock.serve.labelling import audit, export, room
from penstock.serve.labelling.import_items import read_item
from penstock.serve.labelling.labeller_api import room_errors
from penstock.serve.openai_requests import Count, Share, Str, Temperature
from penstock.serve.page_api import Strict
from penstock.serve.service import Service, service_of

owner_api = APIRouter(prefix="/api/labelling", tags=["labelling"], dependencies=[Depends(HTTPBearer(auto_error=False))])
FAILS = documented(400, 401, 403, 404, 408, 413, 429, 503)
NAME = re.compile(r"[^\s\x00-\x1f]([^\x00-\x1f]{0,58}[^\s\x00-\x1f])?")


class Settings(Strict):
    """What is left out stays."""

    guidelines: Annotated[Str, Field(max_length=100_000, description="Shown to labellers, as markdown.")] | None = None
    labellers_per_item: Annotated[int, Field(ge=1, le=50)] | None = None
    lease_minutes: Annotated[int, Field(ge=1, le=10_080)] | None = None
    gold_every: Annotated[int, Field(ge=0, le=1000, description="One item in so many tests the labeller.")] | None = (
        None
    )


class Drafting(Strict):
    """Who answers the prompts that come without answers, and how."""

    models: Annotated[list[str], Field(min_length=1, max_length=9)]
    answers: Annotated[int, Field(ge=2, le=9)] = 4
    keep: (
        Annotated[int, Field(ge=2, le=9, description="Of them, to rank: what the reward models are least sure of.")]
        | None
    ) = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    max_tokens: Count | None = None


class Import(Strict):
    """Items: objects in penstock's formats of comparisons and prompts, Argilla's records, or Label Studio's tasks."""

    items: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1000)]
    gold: Annotated[bool, Field(description="Their rankings are known, and test labellers.")] = False
    draft: Drafting | None = None


class Imported(BaseModel):
    """added: items that are new; known: those that were there already."""

    added: int
    known: int


class NewLabeller(Strict):
    """A labeller's name; for one that is there already the token is a new one."""

    name: Annotated[Str, Field(min_length=1, max_length=60)]


class LabellerToken(BaseModel):
    """The token is shown this once."""

    id: str
    name: str
    token: str


@owner_api.get("", responses=FAILS)
def overview(request: Request) -> JSONResponse:
    """Settings, how many items and judgements there are, how far labellers agree, and each one's figures."""
    store = service_of(request).store
    return JSONResponse({"settings": room.settings(store), **room.overview(store)})


@owner_api.patch("", responses=FAILS)
def change_settings(body: Settings, request: Request) -> JSONResponse:
    """Guidelines, labellers per item, minutes of a lease, how often gold items come."""
    return JSONResponse(room.change_settings(service_of(request).store, body.model_dump(exclude_none=True)))


@owner_api.post("/items", response_model=Imported, status_code=201, responses=FAILS)
def add_items(body: Import, request: Request) -> JSONResponse:
    """Adds items, all or none. What is there already is not added again, so a lost request can be sent again."""
    service, items = service_of(request), []
    draft = None if body.draft is None else _draft(body.draft, service)
    for i, item in enumerate(body.items):
        try:
            items.append(read_item(item, gold=body.gold, draft=draft))
        except FieldError as error:
            where = f"items[{i}].{error.name}"
            raise ApiError(400, f"{where}: {error.problem}", param=where) from error
    added = room.add_items(service.store, items)
    service.tell_items()
    return JSONResponse({"added": added, "known": len(items) - added}, 201)


@owner_api.delete("/items/{item_id}", status_code=204, responses=FAILS)
def remove_item(item_id: str, request: Request) -> Response:
    """Removes an item with its judgements; the audit trail keeps them."""
    with room_errors():
        room.remove_item(service_of(request).store, item_id)
    return Response(status_code=204)


@owner_api.post("/labellers", response_model=LabellerToken, status_code=201, responses=FAILS)
def add_labeller(body: NewLabeller, request: Request) -> JSONResponse:
    """A labeller with a token that opens the labelling room and nothing else."""
    if not NAME.fullmatch(body.name) or body.name in (audit.OWNER, audit.SERVER):
        text = f"{ascii(body.name)[:60]} is no name for a labeller; give one line that is not owner or server."
        raise ApiError(400, text, param="name")
    row, token = service_of(request).keys.add_labeller(body.name)
    return JSONResponse({"id": row["id"], "name": row["name"], "token": token}, 201)


@owner_api.delete("/labellers/{labeller_id}", status_code=204, responses=FAILS)
def end_labeller(labeller_id: str, request: Request) -> Response:
    """Ends a labeller's token and sessions. What was judged stays, what is held goes back."""
    with room_errors():
        service_of(request).keys.end_labeller(labeller_id)
    return Response(status_code=204)


LINES: dict[int | str, dict[str, Any]] = {200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}}}
ARRAY = {"application/json": {"schema": {"type": "array", "items": {"type": "object"}}}}


@owner_api.get(
    "/export", response_class=Response, responses={**FAILS, 200: {"content": {**LINES[200]["content"], **ARRAY}}}
)
def export_all(
    request: Request, what: Annotated[Literal["rankings", "rewritten", "argilla", "label-studio"], Query()] = "rankings"
) -> Response:
    """rankings: JSON lines that penstock reward and dpo read; rewritten: answers that penstock sft reads; argilla: a
    JSON array of records, as Argilla's Dataset.from_disk reads them; label-studio: one of tasks with annotations."""
    rows = export.EXPORTS[what](service_of(request).store)
    return _array(rows, what) if what in export.ARRAYS else _lines(rows, what)


@owner_api.get("/audit", response_class=Response, responses={**FAILS, **LINES})
def see_audit(request: Request) -> Response:
    """JSON lines: all that was done, oldest first."""
    return _lines(audit.events(service_of(request).store), "audit")


def _lines(rows: Iterable[dict[str, Any]], name: str) -> Response:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    headers = {"content-disposition": f'attachment; filename="{name}.jsonl"'}
    return StreamingResponse(lines, media_type="application/jsonl", headers=headers)


def _array(rows: Iterable[dict[str, Any]], name: str) -> Response:
    signs = itertools.chain(["[\n"], itertools.repeat(",\n"))
    parts = (sign + json.dumps(row, ensure_ascii=False) for row, sign in zip(rows, signs, strict=False))
    first = next(parts, "[")
    headers = {"content-disposition": f'attachment; filename="{name}.json"'}
    return StreamingResponse(itertools.chain([first], parts, ["\n]\n"]), media_type="application/json", headers=headers)


def _draft(body: Drafting, service: Service) -> dict[str, Any]:
    """As an item keeps it. Raises ApiError for a model that is not there."""
    for name in body.models:
        service.find(name)
    if body.keep and not service.catalogue.rewards():
        text = "no reward model is served that could choose among answers; serve one, or leave it out."
        raise ApiError(400, f"draft.keep: {text}", param="draft.keep")
    sampling = body.model_dump(include={"temperature", "top_p", "max_tokens"}, exclude_none=True)
    keep = {"keep": body.keep} if body.keep else {}
    return {"models": body.models, "answers": body.answers, **keep, "sampling": sampling}
