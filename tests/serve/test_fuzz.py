"""Requests that schemathesis makes from our own OpenAPI document, good and bad: none may break the server, and every
answer is one that the document promises. The long campaign is `python -m benchmarks serve security`.
"""

import re
import subprocess

from benchmarks import security
from benchmarks.serve import fuzzing
from tests.conftest import PATIENCE
from tests.serve.conftest import KEY, running, save_chatty
from tests.serve.page_payloads import PAYLOADS


def test_no_request_breaks_the_server(server):
    command = fuzzing(server.address, KEY, examples=12, phases="fuzzing")
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (count,) = re.findall(r"(\d+) generated, \d+ passed", done.stdout)
    assert 100 <= int(count) <= 500


def test_strangers_and_labellers_open_nothing_no_text_becomes_a_page_and_no_bomb_goes_off(tmp_path):
    with running(tmp_path / "data", save_chatty(tmp_path / "tiny")) as server:
        ask = security.asker(server.address)
        met = security.strangers(ask, KEY)
        assert met["routes"] > 35
        assert met["requests"] == 6 * met["routes"]
        assert (met["opened"], met["leaks"]) == ([], [])
        shown = security.payloads(ask, KEY, PAYLOADS[:5])
        assert shown["taken_for_a_page"] == []
        assert shown["refused"] == shown["texts"]  # as names of models, and nothing else
        bombs = security.bombs(ask, KEY, "tiny", lambda: 0.0)
        assert (bombs["let_in"], bombs["answered_afterwards"]) == ([], True)
    page = security.Reply(200, {"content-type": "text/html"}, b"")
    assert security._as_page("the oracle", page) == ["the oracle"]
