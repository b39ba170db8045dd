"""Chromium before a `penstock serve` with two tiny models: fixtures of the tests of the page, and what a person does.

Every page that a test opens is watched: it must ask no other host for anything, open no dialog and write no error to
the console. Pictures are kept in $PENSTOCK_SCREENSHOTS, or in pytest's temporary directory. Those of the documentation:

    PENSTOCK_SCREENSHOTS=docs/page python -m pytest tests/serve -k pictures
"""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.data.toyland import Toyland, save_tokenizer
from penstock.serve.page_api import with_times
from tests.conftest import EOS, PATIENCE, save_tiny
from tests.serve.gate import Gate
from tests.zygote import zygotic

ROOT = Path(__file__).parent.parent.parent
CHROMIUM = Path("/usr/bin/chromium")
KEY = "a key that only tests know"
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
WAIT = PATIENCE * 1000
"""Milliseconds for anything to appear."""


@dataclass
class ServedPage:
    """A server that runs, its store, for changes that no route makes, and a gate at which its answers wait."""

    url: str
    store: Any
    gate: Gate


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPage]:
    home = tmp_path_factory.mktemp("served")
    for seed, name in enumerate(("left", "right")):
        _save_babbler(home / name, seed)
    gate = Gate(home / "gate")
    command = zygotic("-m", "tests.serve.gate", home / "gate", "serve", home / "left", home / "right")
    flags = ["--port", "0", "--key", KEY, "--data-dir", str(home / "data"), "--rows", "4"]
    with open(home / "log", "wb") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # tiny models: threads only wait for each other
        streams = {"stdout": subprocess.PIPE, "stderr": log, "text": True}
        process = subprocess.Popen([*command, *flags], cwd=ROOT, env=environment, **streams)
    try:
        first = process.stdout.readline()
        assert "http://" in first, first + (home / "log").read_text()
        url = re.search(r"http://\S+", first)[0]
        _wait_for_models(url, process)
        from penstock.serve.store import open_store

        store = open_store(str(home / "data"), None)
        yield ServedPage(url, store, gate)
        store.close()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0, (home / "log").read_text()
    assert "Traceback" not in (home / "log").read_text()


def _save_babbler(directory: Path, seed: int) -> None:
    """A random model that says whole words: the last norm's bias points away from every other token."""
    tokenizer = save_tokenizer(directory, [question.prompt for question in Toyland(0).questions[:500]])
    save_tiny(directory, seed, vocab_size=len(tokenizer), max_length=8192)
    weights = load_file(directory / "model.safetensors")
    weights["transformer.ln_f.bias"][0] = 10.0
    words = [bool(re.fullmatch(r" ?[A-Za-z]{2,}|\.", tokenizer.decode([i]))) for i in range(len(tokenizer))]
    words[EOS] = True
    weights["transformer.wte.weight"][:, 0] = torch.where(torch.tensor(words), 0.0, -10.0)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _wait_for_models(url: str, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        with contextlib.suppress(urllib.error.HTTPError):  # 503 while they are loaded
            urllib.request.urlopen(f"{url}/health")
            return
        time.sleep(0.05)


@pytest.fixture(scope="module")  # while it runs, asyncio.run refuses
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip("needs Debian's Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Watch:
    """Requests, dialogs and errors of a page. `allowed`: words of the console errors that a test causes."""

    errors: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)

    def over(self, page: Any) -> None:
        """Watches from now on."""
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        page.on("websocket", lambda socket: self.requests.append(socket.url))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("popup", lambda other: self.errors.append(f"another page was opened: {other.url}"))

    def check(self, url: str) -> None:
        """Fails if there was any that should not be."""
        assert not self.dialogs
        assert not [request for request in self.requests if not request.startswith(("data:", "blob:", url + "/"))]
        assert not [error for error in self.errors if not any(words in error for words in self.allowed)]


Open = Callable[..., Any]


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def contexts(browser: Any) -> dict[bool, Any]:
    """Two browser contexts, a wide one and a phone (True), shared to save time: open_page clears them."""
    shared = {"permissions": ["clipboard-read", "clipboard-write"], "reduced_motion": "reduce"}
    wide = browser.new_context(**shared)
    phone = browser.new_context(**shared, has_touch=True, is_mobile=True, device_scale_factor=2)
    for context in (wide, phone):
        context.set_default_timeout(WAIT)
    return {False: wide, True: phone}


@pytest.fixture
def new_page(served: ServedPage, contexts: dict[bool, Any], watch: Watch) -> Iterator[Open]:
    """new_page(width=390, allowed=["401"], known={...}): an empty page in a browser that has this in its storage only.
    At the end of the test the watch is asked."""
    pages = []

    def make(*, width: int = 1280, scheme: str = "light", allowed=(), known: dict[str, str] | None = None) -> Any:
        watch.allowed += allowed
        context = contexts[width < 600]
        context.clear_cookies()
        page = context.new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": 844 if width < 600 else 820})
        page.emulate_media(color_scheme=scheme)
        page.add_init_script(
            f"""if (!sessionStorage.begun) {{
              localStorage.clear();
              Object.assign(localStorage, {json.dumps(known or {})});
              sessionStorage.begun = "yes";
            }}"""
        )
        watch.over(page)
        return page

    yield make
    for page in pages:
        page.close()
    watch.check(served.url)


@pytest.fixture
def open_page(served: ServedPage, new_page: Open) -> Open:
    """open_page(width=390, sampling={...}): the page, logged in, in a browser that has these settings only."""

    def open_it(*, width: int = 1280, scheme: str = "light", log_in: bool = True, allowed=(), **settings: Any) -> Any:
        known = json.dumps({"sampling": {"max_tokens": 12, "seed": 7}, "titles": False, **settings})
        page = new_page(width=width, scheme=scheme, allowed=allowed, known={"penstock.settings": known})
        page.goto(f"{served.url}/#key={KEY}" if log_in else served.url)
        if log_in:
            page.wait_for_selector(".welcome")
        return page

    return open_it


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chosen = os.environ.get("PENSTOCK_SCREENSHOTS")
    directory = Path(chosen) if chosen else tmp_path_factory.mktemp("screenshots")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


LOOKS = [(width, scheme) for scheme in ("light", "dark") for width in (1280, 390)]
Shoot = Callable[[str, Any], None]


AXE = os.environ.get("PENSTOCK_AXE")
"""axe-core's axe.min.js, which npm install axe-core puts into node_modules: every screen that is shot is checked."""


def axe_finds_nothing(page: Any, name: str) -> None:
    """axe-core's rules of accessibility, on the page as it is now."""
    page.evaluate(Path(str(AXE)).read_text() + "\n;0")
    result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    problems = [
        (rule["id"], rule["impact"], [node["html"][:200] for node in rule["nodes"]]) for rule in result["violations"]
    ]
    assert problems == [], name
    assert len(result["passes"]) > 10  # it has looked


@pytest.fixture
def shoot(pictures: Path) -> Iterator[Shoot]:
    """shoot("chat", page) once for each of LOOKS, in their order: pictures/chat.png shows the page in all of them."""
    shots: dict[str, list[bytes]] = {}

    def take(name: str, page: Any) -> None:
        wide = page.evaluate("document.documentElement.scrollWidth")  # not innerWidth, which a phone makes as wide
        assert wide <= page.viewport_size["width"], name
        shots.setdefault(name, []).append(page.screenshot(scale="css"))
        if AXE:
            axe_finds_nothing(page, name)

    yield take
    for name, images in shots.items():
        _side_by_side(images).save(pictures / f"{name}.png", optimize=True)


def _side_by_side(images: list[bytes]) -> Any:
    """A wide one and a telephone's in a row, light above dark."""
    from PIL import Image

    opened, gap = [Image.open(io.BytesIO(image)).convert("RGB") for image in images], 24
    assert len(opened) == len(LOOKS)
    rows = [opened[:2], opened[2:]]
    heights = [max(image.height for image in row) for row in rows]
    width = max(sum(image.width for image in row) for row in rows) + gap
    sheet = Image.new("RGB", (width, sum(heights) + gap), (128, 132, 136))
    for row, top in zip(rows, (0, heights[0] + gap), strict=True):
        for image, left in zip(row, (0, row[0].width + gap), strict=True):
            sheet.paste(image, (left, top))
    return _in_few_colours(sheet)


def _in_few_colours(sheet: Any) -> Any:
    """For a third of the bytes: the 64 most frequent colours as they are, and 192 that cover the others, where
    Pillow's own ways grey what is rare or tint the grounds."""
    from PIL import Image

    numbers = numpy.asarray(sheet).astype(numpy.int32) @ (1 << 16, 1 << 8, 1)
    colours, places, counts = numpy.unique(numbers, return_inverse=True, return_counts=True)
    parts = numpy.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=-1)
    rare = numpy.array(sheet.quantize(192, Image.Quantize.MAXCOVERAGE).getpalette()[: 3 * 192]).reshape(-1, 3)
    palette = numpy.concatenate([parts[numpy.argsort(-counts)[:64]], rare])
    nearest = numpy.square(parts[:, None] - palette).sum(-1).argmin(1)
    image = Image.fromarray(nearest[places].reshape(numbers.shape).astype(numpy.uint8))
    image.putpalette(palette.astype(numpy.uint8).tobytes())
    return image


# --- what a person does -----------------------------------------------------------------------------------------------
def say(page: Any, text: str, *, wait: bool = True) -> None:
    """Types a message and sends it."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Control+Enter")  # on a phone too, where Return alone makes a line
    if wait:
        settled(page, text)


def settled(page: Any, text: str | None = None) -> None:
    """Waits until a message is shown and all its answers have ended."""
    if text is not None:
        page.locator(".bubble").filter(has_text=text).last.wait_for()  # sooner than expect(), which polls
    page.wait_for_selector("#thread .turn:last-child:is(.assistant, .pair) .actions")
    page.wait_for_selector("#send:not(.busy)")


def reload(page: Any, text: str | None = None) -> None:
    page.reload()
    settled(page, text)


def grows(page: Any, *, beyond: int = 0) -> int:
    """Waits until the last answer on the screen is longer; its length."""
    length = "([...document.querySelectorAll('.prose')].at(-1)?.textContent.length ?? 0)"
    page.wait_for_function(f"least => {length} > least", arg=beyond)
    return page.evaluate(length)


def answers(page: Any) -> list[str]:
    """The texts of the answers on the screen."""
    return page.locator(".prose").all_inner_texts()


def conversation_of(page: Any, served: ServedPage) -> list[dict[str, Any]]:
    """The messages in the server's store."""
    return served.store.messages(page.url.split("#/")[1])


def ask(page: Any, path: str) -> Any:
    """The server's answer to this page's session."""
    return page.evaluate("path => fetch(path).then(answer => answer.json())", path)


def speak(page: Any, served: ServedPage, *texts: str) -> None:
    """The next answers are these texts, stored as the server stores a model's."""
    queue = list(texts)

    def answer(route: Any) -> None:
        body, text = route.request.post_data_json, queue.pop(0)
        conversation = urlsplit(route.request.url).path.split("/")[3]
        parent, model = body["parent_id"], body["model"]
        message = served.store.add_message(
            conversation, parent, "assistant", "", model=model, sampling={}, message_id=body["id"]
        )
        usage = {"prompt_tokens": 30, "completion_tokens": 148, "seconds": 4.2}
        ended = {**message, "content": text, "finish_reason": "stop", "usage": usage}
        served.store.save_answers([ended])
        message, ended = with_times(message), with_times(ended)
        delta = {"type": "delta", "content": text}
        stream(route, [{"type": "message", "message": message}, delta, {"type": "done", "message": ended}])

    page.route("**/replies", answer, times=len(texts))


def stream(route: Any, events: list[dict[str, Any]]) -> None:
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    route.fulfill(content_type="text/event-stream", body=body)
