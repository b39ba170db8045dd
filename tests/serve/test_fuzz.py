"""Requests that schemathesis makes from our own OpenAPI document, good and bad: none may break the server, and every
answer is one that the document promises. The long campaign is `python -m benchmarks serve fuzz`.
"""

import re
import subprocess

from benchmarks.serve import fuzzing
from tests.conftest import PATIENCE
from tests.serve.conftest import KEY


def test_no_request_breaks_the_server(server):
    command = fuzzing(server.address, KEY, examples=12, phases="fuzzing")
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (count,) = re.findall(r"(\d+) generated, \d+ passed", done.stdout)
    assert 100 <= int(count) <= 500
