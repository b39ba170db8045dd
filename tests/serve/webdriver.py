"""Debian's Chromium, Firefox and WebKit behind one W3C WebDriver interface, without a package of Python's.

Chromium and WebKit have a driver that speaks it over HTTP (packages chromium-driver and webkit2gtk-driver); Firefox
itself speaks the same commands over a socket (Marionette). A browser shows nothing: Firefox and Chromium need no
screen, WebKit draws on one of Xvfb's. playwright brings browsers of its own, and cannot drive these.
"""

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PATIENCE, free_port
from tests.serve.conftest import eventually

NEEDS = {
    "chromium": ("chromium", "chromedriver"),
    "firefox": ("firefox-esr",),
    "webkit": ("WebKitWebDriver", "Xvfb"),
}
PACKAGES = {"chromium": "chromium chromium-driver", "firefox": "firefox-esr", "webkit": "webkit2gtk-driver xvfb"}
"""Debian's."""
MINI_BROWSERS = sorted(map(str, Path("/usr/lib").glob("*/webkit2gtk-4.1/MiniBrowser")))
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "Control": "\ue009"}
PATHS = {
    "Navigate": "url", "Refresh": "refresh", "ExecuteAsyncScript": "execute/async", "FindElement": "element",
    "ElementClick": "element/{id}/click", "PerformActions": "actions", "SetTimeouts": "timeouts", "Print": "print",
    "DevTools": "goog/cdp/execute",
}  # fmt: skip
CHROMIUM = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"]}
FIREFOX = {"marionette.port": 0, "browser.shell.checkDefaultBrowser": False, "app.update.enabled": False}
"""Preferences. Port 0: a free one."""
SCRIPT = """
const values = [...arguments], done = values.pop();
(async () => { %s })().then((value) => done({ value }), (error) => done({ error: String(error) }));
"""


INPUT_METHOD = """
const browser = Services.wm.getMostRecentWindow("navigator:browser");
const method = Cc["@mozilla.org/text-input-processor;1"].createInstance(Ci.nsITextInputProcessor);
method.beginInputTransactionForTests(browser);
method.setPendingCompositionString(arguments[0]);
method.appendClauseToPendingComposition(arguments[0].length, method.ATTR_RAW_CLAUSE);
method.flushPendingComposition();
const enter = new browser.KeyboardEvent("", { key: "Enter", code: "Enter" });
method.commitComposition(enter);
method.keyup(enter);
"""
"""Runs in Firefox itself, not in a page."""


class WebDriverError(Exception):
    """A command failed."""


class Browser(ABC):
    """One window."""

    @abstractmethod
    def command(self, name: str, **parameters: Any) -> Any:
        """A command of W3C WebDriver by its name in the standard: its value. Raises WebDriverError."""

    def goto(self, url: str) -> None:
        self.command("Navigate", url=url)

    def reload(self) -> None:
        self.command("Refresh")

    def run(self, script: str, *values: Any) -> Any:
        """What the body of an asynchronous function returns; `values` are its."""
        result = self.command("ExecuteAsyncScript", script=SCRIPT % script, args=values)
        if "error" in result:
            raise WebDriverError(result["error"])
        return result.get("value")

    def value(self, expression: str, *values: Any) -> Any:
        return self.run(f"return {expression}", *values)

    def until(self, condition: str, *values: Any) -> None:
        """Waits until an expression is true in the page."""
        is_true = eventually(lambda: self.value(f"Boolean({condition})", *values))
        assert is_true, f"{condition}\n{self.value('document.body.innerText')}"

    def click(self, selector: str) -> None:
        """Clicks where the last such element is that is shown."""
        shown = "[...document.querySelectorAll(values[0])].filter((e) => e.getClientRects().length).at(-1)"
        self.until(shown, selector)
        self.run("document.querySelector('[data-aim]')?.removeAttribute('data-aim')")
        self.run(f"{shown}.dataset.aim = ''", selector)
        element = self.command("FindElement", using="css selector", value="[data-aim]")
        self.command("ElementClick", id=next(iter(element.values())))

    def press(self, *keys: str) -> None:
        """Presses keys, all of them at once: press("Control", "Enter")."""
        signs = [KEYS.get(key, key) for key in keys]
        down = [{"type": "keyDown", "value": sign} for sign in signs]
        up = [{"type": "keyUp", "value": sign} for sign in reversed(signs)]
        self.command("PerformActions", actions=[{"type": "key", "id": "keyboard", "actions": down + up}])

    def type(self, text: str) -> None:
        for letter in text:
            self.press(letter)

    def wheel(self, selector: str, pixels: int) -> None:
        """Turns the wheel over an element; negative pixels are upward."""
        element = self.command("FindElement", using="css selector", value=selector)
        turn = {"type": "scroll", "x": 0, "y": 0, "deltaX": 0, "deltaY": pixels, "duration": 0, "origin": element}
        self.command("PerformActions", actions=[{"type": "wheel", "id": "wheel", "actions": [turn]}])

    def compose(self, text: str) -> None:
        """Writes a word with an input method, and confirms it with Return; skips where no command does."""
        pytest.skip("this driver has no input method")

    def pages(self) -> int | None:
        """How many pages of paper the page takes; None where no command prints."""
        try:
            paper = base64.b64decode(self.command("Print"))
        except WebDriverError as error:
            if "unknown command" in str(error):
                return None
            raise
        parts = [paper]
        for packed in re.findall(rb"stream\r?\n(.*?)endstream", paper, re.DOTALL):  # where Firefox has its pages
            with contextlib.suppress(zlib.error):
                parts.append(zlib.decompressobj().decompress(packed))
        return len(re.findall(rb"/Type\s*/Page\b", b"\n".join(parts)))


class HttpBrowser(Browser):
    """A browser behind a driver's HTTP server."""

    def __init__(self, program: str, capabilities: dict[str, Any], ends: ExitStack, **variables: str) -> None:
        port = free_port()
        ends.enter_context(_process(program, f"--port={port}", env={**os.environ, **variables}))
        self._session = f"http://127.0.0.1:{port}/session"
        assert eventually(lambda: _answers(port))
        session = self._post("", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]
        self._session += f"/{session}"
        ends.callback(self._ask, urllib.request.Request(self._session, method="DELETE"))

    def command(self, name: str, **parameters: Any) -> Any:
        return self._post("/" + PATHS[name].format(id=parameters.pop("id", "")), parameters)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"content-type": "application/json"}
        return self._ask(urllib.request.Request(self._session + path, json.dumps(body).encode(), headers))

    def _ask(self, request: urllib.request.Request) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise WebDriverError(error.read().decode()) from None


class Chromium(HttpBrowser):
    """Its driver passes commands of the DevTools protocol on."""

    def __init__(self, ends: ExitStack) -> None:
        super().__init__("chromedriver", {"goog:chromeOptions": CHROMIUM}, ends)

    def compose(self, text: str) -> None:
        end = {"selectionStart": len(text), "selectionEnd": len(text)}
        key = {"type": "rawKeyDown", "windowsVirtualKeyCode": 229, "key": "Process", "code": "Enter"}
        self.command("DevTools", cmd="Input.imeSetComposition", params={"text": text, **end})
        self.command("DevTools", cmd="Input.dispatchKeyEvent", params=key)
        self.command("DevTools", cmd="Input.insertText", params={"text": text})


class Firefox(Browser):
    """Marionette: [0, number, command, parameters], answered by [1, number, error, result], each behind its length."""

    def __init__(self, profile: Path, ends: ExitStack) -> None:
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in FIREFOX.items()]
        (profile / "user.js").write_text("\n".join(lines))
        flags = ["--headless", "--width=1280", "--height=900", "--no-remote", "--marionette"]
        flags += ["--remote-allow-system-access", "--profile", str(profile)]
        ends.enter_context(_process("firefox-esr", *flags))
        port = profile / "MarionetteActivePort"
        assert eventually(lambda: port.exists() and port.read_text())
        self._socket = ends.enter_context(socket.create_connection(("127.0.0.1", int(port.read_text()))))
        self._answers = ends.enter_context(self._socket.makefile("rb"))
        self._numbers = itertools.count()
        self._read()
        self.command("NewSession")

    def command(self, name: str, **parameters: Any) -> Any:
        return self._send(f"WebDriver:{name}", **parameters)

    def _send(self, name: str, **parameters: Any) -> Any:
        message = json.dumps([0, next(self._numbers), name, parameters]).encode()
        self._socket.sendall(b"%d:%b" % (len(message), message))
        _, _, error, result = self._read()
        if error is not None:
            raise WebDriverError(f"{error['error']}: {error['message']}")
        return result.get("value", result)

    def compose(self, text: str) -> None:
        self._send("Marionette:SetContext", value="chrome")
        try:
            self.command("ExecuteScript", script=INPUT_METHOD, args=[text])
        finally:
            self._send("Marionette:SetContext", value="content")

    def _read(self) -> Any:
        length = b""
        while (digit := self._answers.read(1)) != b":":
            assert digit
            length += digit
        return json.loads(self._answers.read(int(length)))


@contextlib.contextmanager
def _process(*command: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **options}
    process = subprocess.Popen(command, **quiet)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE)


@contextlib.contextmanager
def _display() -> Iterator[str]:
    """The name of a screen of Xvfb's."""
    read, write = os.pipe()
    flags = ("-displayfd", str(write), "-nolisten", "tcp", "-screen", "0", "1280x1000x24")
    with _process("Xvfb", *flags, pass_fds=(write,)), os.fdopen(read) as number:
        os.close(write)
        yield f":{number.readline().strip()}"


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/status") as answer:
        return answer.status == 200
    return False


@contextlib.contextmanager
def started(name: str, folder: Path) -> Iterator[Browser]:
    """A browser by name, with a profile of its own. Skips the test where the machine does not have it."""
    missing = [program for program in NEEDS[name] if shutil.which(program) is None]
    if missing or (name == "webkit" and not MINI_BROWSERS):
        pytest.skip(f"{name} needs {' and '.join(missing) or 'MiniBrowser'}: apt-get install {PACKAGES[name]}")
    with ExitStack() as ends:
        browser: Browser
        if name == "firefox":
            browser = Firefox(folder, ends)
        elif name == "chromium":
            browser = Chromium(ends)
        else:
            options = {"binary": MINI_BROWSERS[-1], "args": ["--automation", "--geometry=1280x900"]}
            display = ends.enter_context(_display())
            browser = HttpBrowser("WebKitWebDriver", {"webkitgtk:browserOptions": options}, ends, DISPLAY=display)
        browser.command("SetTimeouts", script=PATIENCE * 1000, pageLoad=PATIENCE * 1000)
        yield browser
