"""`penstock watch` as a person meets it: one page in a real browser that follows the files of two runs."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the server: pip install 'penstock[serve]'")

from penstock.commands.watch import LivePage
from penstock.run.report import run_report
from tests.conftest import PATIENCE, cli
from tests.run.test_report import greedy, write_run
from tests.serve.conftest import eventually

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture
def watched(tmp_path):
    """Two runs and a server that shows them: (paths, address, process)."""
    paths = [
        write_run(tmp_path / name, [3.0, 2.5, 2.0, 1.5], left=60.0, samples=[greedy(0, name)] * 9) for name in "ab"
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock", "watch", *paths, "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    yield paths, re.search(r"http://127.0.0.1:\d+", process.stdout.readline())[0], process
    process.kill()
    process.wait()


def answer(url, method="GET", **headers):
    """Status and body."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, method=method, headers=headers), timeout=PATIENCE
        ) as reply:
            return reply.status, reply.read().decode(), dict(reply.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), dict(error.headers)


def test_there_is_one_page_that_only_reads(watched, tmp_path):
    paths, url, process = watched
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    status, text, headers = answer(url)
    assert status == 200
    assert "a, 4 steps, the last at " in text
    assert answer(url, **{"If-None-Match": headers["etag"]})[:2] == (304, "")
    for path in ("/metrics.jsonl", "/..%2fconfig.toml", "/../config.toml", "//etc/passwd", "/?run=/etc", "/index.html"):
        assert answer(url + path)[0] == (200 if "?" in path else 404), path
    assert [answer(url, method)[0] for method in ("POST", "PUT", "DELETE")] == [405] * 3
    assert answer(url, Host="rebound.example:80")[0] == 400
    assert answer(url, Host="localhost:6006")[0] == 200
    (paths[0] / "config.toml").rename(tmp_path / "elsewhere.toml")
    assert eventually(lambda: answer(url)[0] == 503)
    assert answer(url)[1] == f"{paths[0]}: is no run directory (no config.toml in it); check the path."
    (tmp_path / "elsewhere.toml").rename(paths[0] / "config.toml")
    assert answer(url)[0] == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's Chromium: apt-get install chromium")
def test_new_rows_appear_without_a_reload(watched):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    (a, b), url, process = watched
    playwright.expect.set_options(timeout=PATIENCE * 1000)
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        shown = browser.new_page()
        problems = []
        shown.on("pageerror", lambda error: problems.append(error))
        shown.goto(url)
        shown.evaluate("window.loaded = 'once'")
        row = shown.locator("tr", has_text="loss").first
        playwright.expect(row).to_have_text("loss1.5, from 31.5, from 3")
        shown.locator("summary", has_text="Configuration").click()
        picture = shown.locator("img").first.get_attribute("src")
        with (b / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 5, "loss": 0.25}) + '\n{"step": 6, "lo')  # the last line is half there
        with (a / "health.jsonl").open("w") as file:
            file.write(json.dumps({"step": 5, "text": "kl jump: <b>9</b> nats"}) + "\n")
        playwright.expect(row).to_have_text("loss1.5, from 30.25, from 3")
        playwright.expect(shown.get_by_role("alert")).to_have_text("a: from step 5: kl jump: <b>9</b> nats")
        playwright.expect(shown.locator("img").first).not_to_have_attribute("src", picture)
        assert shown.evaluate("window.loaded") == "once"
        with (b / "metrics.jsonl").open("a") as file:
            file.write('ss": 0.125}\n')
        playwright.expect(row).to_have_text("loss1.5, from 30.125, from 3")
        playwright.expect(shown.get_by_text("--lr")).to_be_visible()  # what was opened stays open
        process.send_signal(signal.SIGINT)
        playwright.expect(shown.locator(".sub")).to_contain_text("penstock watch has ended")
        assert problems == []
        browser.close()


def test_it_is_the_page_of_the_report(tmp_path):
    run = write_run(tmp_path / "run", [3.0, 2.0, 1.0], samples=[greedy(0, "x"), greedy(3, "y", 1.0)])
    policy = r".*?<meta http-equiv=\"Content-Security-Policy\"[^>]*>"  # a page that follows has a script
    parts = [re.fullmatch(policy + r"(.*<p class=\"sub\">).*?(</p>.*</main>).*", text, re.DOTALL).groups()
             for text in (run_report(run, "sft").read_text(), LivePage([run]).html())]  # fmt: skip
    assert parts[0] == parts[1]


def test_pictures_are_not_drawn_again_before_their_time_and_the_numbers_are(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("penstock.run.report._picture", lambda *arguments: drawn.append(arguments[0]) or "drawn")
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock.__setitem__(0, clock[0] + 1) or clock[0])
    live = LivePage([write_run(tmp_path / "run", [3.0, 2.0])])
    assert live.html() == live.html()
    assert drawn == ["loss"]
    write_run(tmp_path / "run", [3.0, 2.0, 1.0])
    clock[0] += 20  # reading took 1 second, reading and drawing 3
    assert "1<small>from 3" in live.html()
    assert drawn == ["loss"]
    clock[0] += 60
    assert "1<small>from 3" in live.html()
    assert drawn == ["loss", "loss"]
    clock[0] += 60
    live.html()
    assert drawn == ["loss", "loss"]


def test_what_cannot_be_watched_is_one_paragraph(tmp_path, capsys):
    run = write_run(tmp_path / "run", [1.0])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, says in (
            ([tmp_path], "is no run directory"), ([run, "--port", port], f"--port {port}: cannot listen there"),
            ([], "--run is missing"), ([run, "--port", "-1"], "must be a port"),
        ):  # fmt: skip
            assert cli("watch", *arguments) == 2
            assert says in capsys.readouterr().err
