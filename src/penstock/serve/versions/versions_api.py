"""The owner's routes of versions, under /api/versions: which is served, whose votes count, a new round."""

import contextlib
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from penstock.errors import UserError
from penstock.run.versions import Versions
from penstock.serve.errors import ApiError, documented
from penstock.serve.openai_requests import Str
from penstock.serve.page_api import Strict
from penstock.serve.service import Service, service_of

versions_api = APIRouter(
    prefix="/api/versions", tags=["versions"], dependencies=[Depends(HTTPBearer(auto_error=False))]
)
FAILS = documented(400, 401, 403, 404, 408, 413, 429)


class Model(Strict):
    """The name of a served folder of versions."""

    model: Str


class ModelVersion(Model):
    """One of its versions."""

    version: int = Field(ge=0, le=2**31)


class Trust(ModelVersion):
    """Whether the votes that came with a version count."""

    trusted: bool


class VersionedModel(BaseModel):
    """A folder of versions: its lines as they are, oldest first, and what follows from them."""

    model: str
    current: int
    follows: bool = Field(description="Whether this server answers from another version as soon as one is served.")
    busy: bool = Field(description="Whether a round runs.")
    log: str = Field(description="The last lines of the newest round that was begun here.")
    states: dict[str, str] = Field(description="Of the votes that came with each version.")
    versions: list[dict[str, Any]]


class VersionedModels(BaseModel):
    """Those among the served models."""

    data: list[VersionedModel]


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (UserError, ValueError) as error:
        raise ApiError(400, str(error)) from error


def _source(service: Service, name: str) -> str:
    source = service.catalogue.sources.get(name)
    if source is None or not Versions.exist(source):
        raise ApiError(404, f"there is no folder of versions {ascii(name)[:80]} here; penstock improve makes one.")
    return source


def _described(service: Service, name: str) -> dict[str, Any]:
    source = _source(service, name)
    with _refusals():
        versions = Versions(source)
        return {
            "model": name, "current": versions.current, "follows": service.config.follow,
            "busy": service.rounds.runs(source), "log": service.rounds.log(source),
            "states": {str(number): state for number, state in versions.states.items()}, "versions": versions.rows,
        }  # fmt: skip


@versions_api.get("", response_model=VersionedModels, responses=FAILS)
def list_versions(request: Request) -> JSONResponse:
    """Every served folder of versions, with all lines."""
    service = service_of(request)
    names = [name for name, source in service.catalogue.sources.items() if Versions.exist(source)]
    return JSONResponse({"data": [_described(service, name) for name in names]})


@versions_api.post("/serve", response_model=VersionedModel, responses=FAILS)
def serve_version(body: ModelVersion, request: Request) -> JSONResponse:
    """Serves a version from now on: back or forward. What only later ones learned is withdrawn."""
    service = service_of(request)
    with _refusals():
        Versions(_source(service, body.model)).serve(body.version, "chosen on the page")
    return JSONResponse(_described(service, body.model))


@versions_api.post("/trust", response_model=VersionedModel, responses=FAILS)
def trust_votes(body: Trust, request: Request) -> JSONResponse:
    """Says whether the votes that came with a version may be learned."""
    service = service_of(request)
    with _refusals():
        Versions(_source(service, body.model)).trust(body.version, body.trusted, "said on the page")
    return JSONResponse(_described(service, body.model))


@versions_api.post("/rounds", status_code=202, response_model=VersionedModel, responses=FAILS)
def begin_round(body: Model, request: Request) -> JSONResponse:
    """Begins a round beside the server, or goes on with one that was stopped."""
    service = service_of(request)
    with _refusals():
        service.rounds.begin(_source(service, body.model))
    return JSONResponse(_described(service, body.model), 202)


@versions_api.post("/rounds/stop", response_model=VersionedModel, responses=FAILS)
def stop_round(body: Model, request: Request) -> JSONResponse:
    """Has the round end after a checkpoint; the next one goes on from there."""
    service = service_of(request)
    with _refusals():
        service.rounds.stop(_source(service, body.model))
    return JSONResponse(_described(service, body.model))
