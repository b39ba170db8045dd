"""`penstock watch`: the report of runs, drawn again as their files grow, at one address of this machine.

There is one page and no other path, it only reads the runs' files, and it answers to the names of this machine alone.
"""

import contextlib
import hashlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from penstock.commands.config import WatchConfig
from penstock.errors import UserError
from penstock.run.report import RunFiles, page, sections_of

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from penstock.serve.listener import address_of, listen
except ModuleNotFoundError as error:
    raise UserError(f"penstock watch needs {error.name}: pip install 'penstock[serve]'.") from error

SHARE = 0.1
"""Of one core that drawing pictures may take: the runs may need it more."""
FILES = ("config.toml", "metrics.jsonl", "perf.jsonl", "samples.jsonl", "health.jsonl")
HOSTS = ["127.0.0.1", "localhost"]
"""What a browser must have asked for: no other name that leads here (DNS rebinding)."""
SCRIPT = """
const update = (old, fresh) => {
  const same = old.nodeName === fresh.nodeName && old.childNodes.length === fresh.childNodes.length
  if (!same) {
    const opened = [...old.querySelectorAll?.("details") ?? []].map(part => part.open)
    fresh.querySelectorAll?.("details").forEach((part, i) => { part.open = opened[i] ?? false })
    return old.replaceWith(fresh)
  }
  if (old.nodeType === Node.TEXT_NODE && old.data !== fresh.data) old.data = fresh.data
  for (const name of fresh.getAttributeNames?.() ?? [])
    if (old.getAttribute(name) !== fresh.getAttribute(name)) old.setAttribute(name, fresh.getAttribute(name))
  const children = [...fresh.childNodes];
  [...old.childNodes].forEach((child, i) => update(child, children[i]))
}
const main = () => document.querySelector("main")
const poll = async () => {
  try {
    const reply = await fetch("/", {cache: "no-cache"})
    if (!reply.ok) throw reply.status
    update(main(), new DOMParser().parseFromString(await reply.text(), "text/html").querySelector("main"))
  } catch {
    document.querySelector(".sub").textContent = "penstock watch has ended; this is what it showed last"
  }
  setTimeout(poll, 2000)
}
setTimeout(poll, 2000)
"""


def watch(config: WatchConfig) -> None:
    """Serves the page until Ctrl-C. Raises UserError where a path is no run or the port is taken."""
    live = LivePage([Path(path) for path in config.run])
    live.html()
    listener = listen(HOSTS[0], config.port)
    server = uvicorn.Server(
        uvicorn.Config(
            build(live), ws="none", lifespan="off", log_level="error", access_log=False, server_header=False,
            timeout_graceful_shutdown=1,
        )
    )  # fmt: skip
    print(f"penstock watch: {address_of(listener)} (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


def build(live: "LivePage") -> Starlette:
    """The application: GET / and nothing else."""

    def index(request: Request) -> Response:
        try:
            body = live.html().encode("utf-8", "backslashreplace")
        except UserError as error:  # a run was moved away
            return Response(str(error), status_code=503)
        headers = {"etag": f'"{hashlib.sha256(body).hexdigest()[:16]}"', "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type="text/html")

    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)
    return Starlette(routes=[Route("/", index)], middleware=[hosts])


class LivePage:
    """The page of runs as their files are, with pictures as old as SHARE demands."""

    def __init__(self, paths: Sequence[Path]) -> None:
        names = [path.absolute().name for path in paths]
        self._paths = {
            name if names.count(name) == 1 else str(path): path for name, path in zip(names, paths, strict=True)
        }
        self._lock = threading.Lock()
        self._html, self._files = "", list[tuple[int, int]]()
        self._pictures: dict[str, str] = {}
        self._read_again = self._draw_again = 0.0
        """Not before these times (time.monotonic)."""
        self._old_pictures = False

    def html(self) -> str:
        """Raises UserError where a path is no run."""
        with self._lock:
            files = [_state_of(path / name) for path in self._paths.values() for name in FILES]
            now = time.monotonic()
            draw = now >= self._draw_again and (files != self._files or self._old_pictures)
            if not draw and (files == self._files or now < self._read_again):
                return self._html
            runs = {name: RunFiles.read(path) for name, path in self._paths.items()}
            sections = sections_of(runs)
            self._read_again = time.monotonic() + (time.monotonic() - now) / SHARE
            if draw:
                self._pictures = {}
            title = f"penstock {' and '.join(dict.fromkeys(run.config['command'] for run in runs.values()))}"
            subtitle = "; ".join(f"{name}, {run.steps} steps{self._age(name)}" for name, run in runs.items())
            self._html = page(title, subtitle, sections, self._pictures, SCRIPT)
            if draw:
                self._draw_again = time.monotonic() + (time.monotonic() - now) / SHARE
            self._files, self._old_pictures = files, not draw
            return self._html

    def _age(self, name: str) -> str:
        """When the run wrote its last row."""
        modified, size = _state_of(self._paths[name] / "perf.jsonl")
        return time.strftime(", the last at %H:%M:%S", time.localtime(modified / 1e9)) if size else ""


def _state_of(file: Path) -> tuple[int, int]:
    """When a file was changed (nanoseconds since 1970), and its bytes; zeros without one."""
    try:
        state = file.stat()
    except FileNotFoundError:
        return 0, 0
    return state.st_mtime_ns, state.st_size
