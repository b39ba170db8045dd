"""The pages' files: index.html at /, others at addresses of their own, everything else under /assets/, each with the
hash of its bytes in its address.

The pages are served with `?v=HASH` behind every address in assets/, so that a browser may keep those files for ever
and still gets a new version at once. Addresses are relative, so that the page works below any prefix of a proxy's. What
pages have in common lies in shared/, and stands in them as `<!-- shared/head.html -->`.
"""

import functools
import hashlib
import mimetypes
import re
from pathlib import Path

from fastapi import APIRouter, Request, Response

from penstock.serve.errors import ApiError

PAGE = Path(__file__).parent / "page"
SUFFIXES = (".html", ".js", ".css", ".svg", ".png", ".ico", ".txt", ".woff2", ".json")
FOREVER = "public, max-age=31536000, immutable"
pages = APIRouter(include_in_schema=False)
SHARED = re.compile(r"[ \t]*<!-- (shared/\w+\.html) -->\n")
ADDRESS = re.compile(r"""(["'])/?(assets/[\w./-]+)(?:\?v=\w*)?\1""")


@functools.cache
def files() -> dict[str, tuple[bytes, str, str]]:
    """All files of the page: path -> (bytes, hash, media type). Read once; no other file is served."""
    contents = {}
    for path in sorted(PAGE.rglob("*")) if PAGE.is_dir() else []:
        if path.is_file() and path.suffix in SUFFIXES:
            body = path.read_bytes()
            media_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            if media_type.startswith("text/"):
                media_type += "; charset=utf-8"
            contents[path.relative_to(PAGE).as_posix()] = (body, hashlib.sha256(body).hexdigest()[:16], media_type)
    return contents


def whole(text: str) -> str:
    """A page with what it shares with others."""
    return SHARED.sub(lambda match: files()[match[1]][0].decode(), text)


def hashed(text: str) -> str:
    """A text of the page with the hash of each file behind its address."""

    def with_hash(match: re.Match[str]) -> str:
        quote, address = match[1], match[2]
        file = files().get(address.removeprefix("assets/"))
        return f"{quote}{address}?v={file[1]}{quote}" if file else match[0]

    return ADDRESS.sub(with_hash, text)


@pages.get("/")
async def index(request: Request) -> Response:
    """The page to chat in."""
    return _page("index.html", request)


@pages.get("/versions")
async def versions(request: Request) -> Response:
    """The page of versions."""
    return _page_below("versions/versions.html", request)


@pages.get("/label")
async def label(request: Request) -> Response:
    """The labelling room."""
    return _page_below("labelling/label.html", request)


def _page_below(name: str, request: Request) -> Response:
    path = request.scope.get("raw_path", b"").decode("latin-1")
    if path.endswith("/"):  # the page's relative addresses do not work below it
        return Response(status_code=308, headers={"location": f"../{path.rstrip('/').rpartition('/')[2]}"})
    return _page(name, request)


def _page(name: str, request: Request) -> Response:
    if name not in files():
        raise ApiError(404, "this installation has no pages; the API is at /v1.")
    body, _, media_type = files()[name]
    page = hashed(whole(body.decode())).encode()
    tag = f'"{hashlib.sha256(page).hexdigest()[:16]}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={"etag": tag})
    return Response(page, headers={"content-type": media_type, "etag": tag, "cache-control": "no-cache"})


@pages.get("/assets/{path:path}")
async def asset(path: str, request: Request) -> Response:
    """One of its files."""
    if path not in files() or path.endswith(".html"):
        raise ApiError(404, "the page has no such file.")
    body, version, media_type = files()[path]
    cache = FOREVER if request.query_params.get("v") == version else "no-cache"
    headers = {"content-type": media_type, "etag": f'"{version}"', "cache-control": cache}
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers)
