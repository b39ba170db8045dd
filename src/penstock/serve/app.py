"""The web application, built out of its parts: all routes, the shapes of errors, and the middleware in front."""

from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPBearer
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from penstock.serve import openai_api, openai_requests, page_api, static_files
from penstock.serve.chats.chats_api import chats
from penstock.serve.errors import ApiError, busy_database, documented
from penstock.serve.labelling import labeller_api, owner_api
from penstock.serve.metrics import CONTENT_TYPE
from penstock.serve.middleware import AccessMiddleware, Application
from penstock.serve.models.catalogue import ServedModel
from penstock.serve.scoring import score_api
from penstock.serve.service import Life, Service, service_of
from penstock.serve.versions import versions_api


def build(service: Service) -> Application:
    """The application: routes, error shapes, and the access check in front."""
    handlers: dict[Any, Any] = {
        ApiError: _api_error,
        OperationalError: _database_error,
        PoolTimeout: _database_error,
        HTTPException: _http_error,
        RequestValidationError: _validation_error,
        Exception: _internal_error,
    }
    app = FastAPI(
        title="penstock",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        exception_handlers=handlers,
        redirect_slashes=False,
        servers=[{"url": service.config.root_path}] if service.config.root_path else None,
    )
    app.state.service = service
    rooms = (chats, labeller_api.labeller_api, owner_api.owner_api, versions_api.versions_api)
    for router in (openai_api.v1, score_api.scores, server_api, page_api.api, *rooms, static_files.pages):
        app.include_router(router)
    app.openapi = lambda: _document(app, service)  # type: ignore[method-assign]
    inner: Application = AccessMiddleware(app, lambda: service.keys, service.metrics, service.config.root_path)
    if service.config.cors:
        inner = CORSMiddleware(
            inner,
            allow_origins=list(service.config.cors),
            allow_methods=["GET", "HEAD", "POST", "PATCH", "DELETE"],
            allow_headers=["*"],  # clients add headers of their own (x-stainless-...); a key is needed all the same
            expose_headers=["x-request-id", "retry-after", "content-disposition", "www-authenticate"],
        )
    return inner


def _document(app: FastAPI, service: Service) -> dict[str, Any]:
    """The OpenAPI document: 400 in our shape where the framework would say 422, and the names of the models."""
    document = get_openapi(title=app.title, version="1", routes=app.routes, servers=app.servers)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    known = [name for name, model in service.catalogue.models.items() if isinstance(model, ServedModel)]
    if known:
        for schema in document["components"]["schemas"].values():
            if schema["title"] in ("ChatRequest", "CompletionRequest", "NewReply"):
                schema["properties"]["model"]["enum"] = known
    return document


# --- health and metrics -----------------------------------------------------------------------------------------------

server_api = APIRouter(tags=["server"])


@server_api.get("/health", responses={200: {"description": "serving"}, **documented(503)})
async def health(request: Request) -> JSONResponse:
    """Whether requests are answered: 503 while models load and while the server drains. Needs no key."""
    life = service_of(request).life
    if life is not Life.SERVING:
        raise ApiError(503, f"the server is {life.value}.", code=life.value)
    return JSONResponse({"status": "serving"})


@server_api.get(
    "/metrics", dependencies=[Depends(HTTPBearer(auto_error=False))], response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **documented(401, 403, 429)},
)  # fmt: skip
async def metrics(request: Request) -> Response:
    """Counters, as Prometheus reads them."""
    return Response(service_of(request).metrics.text(), headers={"content-type": CONTENT_TYPE})


# --- errors -----------------------------------------------------------------------------------------------------------


async def _api_error(request: Request, error: Any) -> Response:
    return Response(error.encoded, error.status, headers=error.headers, media_type="application/json")


async def _database_error(request: Request, error: Any) -> Response:
    return await _api_error(request, busy_database(error))


async def _http_error(request: Request, error: Any) -> Response:
    messages = {404: "there is nothing at this address.", 405: "this address does not take this method."}
    text = messages.get(error.status_code, str(error.detail))
    return await _api_error(request, ApiError(error.status_code, text, headers=error.headers))


async def _validation_error(request: Request, error: Any) -> Response:
    # Where a key may have several types, a wrong value for one of them says more than a wrong type for the others.
    problems = error.errors()
    problem = next((problem for problem in problems if not problem["type"].endswith("_type")), problems[0])
    path = [part for part in problem["loc"] if part not in ("body", "query", "path")]
    param = openai_requests.param_of(path, error.body) if problem["loc"][0] == "body" else str(path[-1])
    if problem["type"].startswith("union_tag"):
        param = problem["ctx"]["discriminator"].strip("'")
    code = "missing_required_parameter" if problem["type"] == "missing" else "invalid_value"
    text = f"{param or 'the body'}: {problem['msg'].removeprefix('Value error, ')}."
    return await _api_error(request, ApiError(400, text, param=param, code=code))


async def _internal_error(request: Request, error: Any) -> Response:
    text = f"internal error ({type(error).__name__}); please report it with this answer's x-request-id."
    return await _api_error(request, ApiError(500, text))  # the middleware logs it
