"""Requests that schemathesis makes from our own OpenAPI document, good and bad: none may break the server, and every
answer is one that the document promises. The long campaign is benchmarks/serve.py fuzz.
"""

import json
import subprocess
import sys

from tests.serve.conftest import KEY

CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")


def fuzz(address, report, examples, seed=1):
    """Runs schemathesis; the number of requests it made, and what it complained of."""
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json", "--header",
        f"Authorization: Bearer {KEY}", "--checks", ",".join(CHECKS), "--max-examples", str(examples), "--seed", str(seed),
        "--generation-deterministic", "--workers", "1", "--report", "ndjson", "--report-ndjson-path", str(report),
        "--no-color", "--request-timeout", "60", "--phases", "examples,coverage,fuzzing",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=3000)


def test_no_request_breaks_the_server(server, tmp_path):
    done = fuzz(server.address, tmp_path / "report", 3)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert json.dumps("x")
