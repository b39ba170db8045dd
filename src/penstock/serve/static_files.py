"""The page's files: index.html at /, everything else under /assets/, each with the hash of its bytes in its address.

index.html is served with `?v=HASH` behind every address in /assets/, so that a browser may keep those files for ever
and still sees a new version at once.
"""

import functools
import hashlib
import mimetypes
import re
from pathlib import Path

from fastapi import APIRouter, Request, Response

from penstock.serve.errors import ApiError

PAGE = Path(__file__).parent / "page"
FOREVER = "public, max-age=31536000, immutable"
pages = APIRouter(include_in_schema=False)
ADDRESS = re.compile(r"""(["'])/?(assets/[\w./-]+)(?:\?v=\w*)?\1""")


@functools.cache
def files() -> dict[str, tuple[bytes, str, str]]:
    """Everything the page consists of: path -> (bytes, hash, media type). Read once; nothing else can be asked for."""
    found = {}
    for path in sorted(PAGE.rglob("*")) if PAGE.is_dir() else []:
        if path.is_file() and path.suffix in (
            ".html",
            ".js",
            ".css",
            ".svg",
            ".png",
            ".ico",
            ".txt",
            ".woff2",
            ".json",
        ):
            body = path.read_bytes()
            kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            kind += "; charset=utf-8" if kind.startswith("text/") else ""
            found[path.relative_to(PAGE).as_posix()] = (body, hashlib.sha256(body).hexdigest()[:16], kind)
    return found


def hashed(text: str) -> str:
    """A text of the page with the hash of each file behind its address."""

    def with_hash(match: re.Match[str]) -> str:
        quote, address = match[1], match[2]
        there = files().get(address.removeprefix("assets/"))
        return f"{quote}/{address}?v={there[1]}{quote}" if there else match[0]

    return ADDRESS.sub(with_hash, text)


@pages.get("/")
def index(request: Request) -> Response:
    """The page."""
    if "index.html" not in files():
        raise ApiError(404, "this installation has no chat page; the API is at /v1.")
    body, _, kind = files()["index.html"]
    page = hashed(body.decode()).encode()
    tag = f'"{hashlib.sha256(page).hexdigest()[:16]}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={"etag": tag})
    return Response(page, headers={"content-type": kind, "etag": tag, "cache-control": "no-cache"})


@pages.get("/assets/{path:path}")
def asset(path: str, request: Request) -> Response:
    """One of its files."""
    if path not in files() or path == "index.html":
        raise ApiError(404, "the page has no such file.")
    body, version, kind = files()[path]
    kept = FOREVER if request.query_params.get("v") == version else "no-cache"
    headers = {"content-type": kind, "etag": f'"{version}"', "cache-control": kept}
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers)
