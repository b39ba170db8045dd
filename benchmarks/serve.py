"""The chat service measured from outside: the real command in a process of its own, real sockets, a small model.

    python -m benchmarks serve load          first token, gaps and tokens/s at 1, 8, 32 and 128 streams; overload
    python -m benchmarks serve security      25,000 requests made from the OpenAPI document; strangers, texts that would
                                             run, and bombs
    python -m benchmarks serve clients       three generations of the openai client, npm's, llm, LangChain, LiteLLM
    python -m benchmarks serve labelling     eight labellers at once, 1,000 items, and how far they agree

Each writes benchmarks/results/serve_NAME.json.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import facts, security, timing
from benchmarks import labelling as room

KEY = "a key for measurements"
ROWS, QUEUE, NEW_TOKENS = 32, 128, 64
STREAMS = (1, 8, 32, 128)
PAIRS = 7


def small_model(directory: Path) -> str:
    """Four layers of width 128 with random weights and 512 words: a million parameters, as the demo's."""
    from penstock.data.toyland import save_tokenizer
    from tests.conftest import save_tiny

    shape = {"vocab_size": 512, "d_model": 128, "num_layers": 4, "d_ff": 512, "max_length": 256}
    path = save_tiny(directory / "small", **shape, num_heads=4, num_kv_heads=4, head_dim=32)
    save_tokenizer(Path(path), ["What is a penstock? The gated pipe that feeds a turbine."], vocab_size=512)
    return path


@dataclass
class Server:
    """A running `penstock serve`."""

    process: subprocess.Popen[str]
    address: str
    port: int

    def answers_by_status(self) -> Counter[str]:
        """Requests that it has answered so far, as its own /metrics have it."""
        request = urllib.request.Request(f"{self.address}/metrics", headers={"authorization": f"Bearer {KEY}"})
        counts: Counter[str] = Counter()
        with urllib.request.urlopen(request) as answer:
            text = answer.read().decode()
        for status, count in re.findall(
            r'^penstock_serve_requests_total\{.*status="(\d+)"\} (\S+)$', text, re.MULTILINE
        ):
            counts[status] += int(float(count))
        return counts

    def rss_gb(self) -> float:
        """Resident memory now, of the server and of the models' process, in GB."""
        pid = self.process.pid
        pids = [str(pid), *Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]
        status = "".join(Path(f"/proc/{process}/status").read_text(encoding="utf-8") for process in pids)
        return sum(map(int, re.findall(r"VmRSS:\s+(\d+)", status))) * 1024 / 1e9


@contextlib.contextmanager
def serving(directory: Path, model: str, *more: str) -> Iterator[Server]:
    """The real command, ready to answer."""
    arguments = ["serve", model, "--port", "0", "--key", KEY, "--data-dir", str(directory / "data"), *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock", *arguments], stdout=subprocess.PIPE, text=True, cwd=directory
    )
    try:
        assert process.stdout
        address = process.stdout.readline().split()[-1]
        server = Server(process, address, int(address.rsplit(":", 1)[1]))
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health").close()
                break
            time.sleep(0.1)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)


# --- one stream over a bare socket ------------------------------------------------------------------------------------


@dataclass
class Stream:
    """What a streamed request saw. Times in seconds."""

    status: int = 0
    head: float = 0.0
    """Until the answer's head."""
    first: float = 0.0
    """Until the first token."""
    gaps: list[float] = field(default_factory=list)
    """Between arrivals of tokens."""
    tokens: int = 0
    ended: str = ""
    """How: "done", "error event", "cut"."""


COMPLETIONS = "/v1/chat/completions"


def request_bytes(body: dict[str, Any], path: str = COMPLETIONS) -> bytes:
    """A POST, as it goes over the wire."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
    head += "" if path == COMPLETIONS else "connection: close\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def chat_body(seed: int, **more: Any) -> dict[str, Any]:
    """A streamed chat request with a prompt of its own."""
    messages = [{"role": "user", "content": f"What is penstock number {seed}?"}]
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": "small", "messages": messages, "max_tokens": NEW_TOKENS, "seed": seed, **usage, **more}


async def sent(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What a POST is answered with."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_bytes(body, path))
    _, _, text = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return json.loads(text)


async def stored_once(port: int, chat: str, seed: int) -> Stream:
    """A turn of the page in a conversation of the server: a question, and its answer, which is stored as it comes."""
    question = await sent(port, f"{chat}/messages", {"role": "user", "content": f"What is penstock number {seed}?"})
    body = {"parent_id": question["id"], "model": "small", "max_tokens": NEW_TOKENS, "seed": seed}
    return await stream_once(port, body, f"{chat}/replies")


async def stream_once(port: int, body: dict[str, Any], path: str = COMPLETIONS) -> Stream:
    """Sends one request on a connection of its own and reads its events as they come."""
    stream = Stream()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started = last = time.perf_counter()
    writer.write(request_bytes(body, path))
    data = bytearray()
    try:
        while chunk := await reader.read(65536):
            now = time.perf_counter()
            data += chunk
            if not stream.status:
                stream.status, stream.head = int(data[9:12]), now - started
            if stream.status != 200:
                break
            words = chunk.count(b'"content": "') > chunk.count(b'"role"') or b'"type": "delta"' in chunk
            if words or b'"finish_reason": "' in chunk:
                if stream.first:
                    stream.gaps.append(now - last)
                else:
                    stream.first = now - started
                last = now
            if b"data: [DONE]" in chunk or b'"type": "done"' in chunk:
                break
    except ConnectionError:
        pass
    finally:
        writer.close()
    if match := re.search(rb'"completion_tokens": (\d+)', data):
        stream.tokens = int(match[1])
    failed = b'data: {"error"' in data or b'"type": "error"' in data
    ended = b"[DONE]" in data or b'"type": "done"' in data
    stream.ended = "done" if ended else "error event" if failed else "cut"
    return stream


def percentiles(name: str, values: list[float]) -> dict[str, float]:
    """The middle and the 99th of a hundred, in ms."""
    ordered = sorted(values) or [float("nan")]
    return {f"{name}_ms_p{part}": round(1000 * ordered[len(ordered) * part // 100], 2) for part in (50, 99)}


def latencies(streams: list[Stream]) -> dict[str, Any]:
    """How many came to their end, and what they waited for."""
    return {
        "requests": len(streams), "errors": sum(stream.ended != "done" for stream in streams),
        **percentiles("first_token", [stream.first for stream in streams]),
        **percentiles("gap", [gap for stream in streams for gap in stream.gaps]),
    }  # fmt: skip


# --- load -------------------------------------------------------------------------------------------------------------


def engine_rate(model: str, seconds: float, *, staggered: bool) -> float:
    """Tokens/s of the engine alone, with 32 rows always full, on one thread: what the service is measured against.

    Left alone all rows begin and end together, so their prompts are read in one batch. `staggered`: they begin with
    answers of 1 to 64 tokens, so that afterwards one prompt at a time is read, as for clients that come at any time.
    """
    import torch

    from penstock.models.tokenizer_files import load_tokenizer
    from penstock.rollout import engine as engines
    from penstock.rollout.sampling import Sampling

    torch.set_num_threads(1)
    engine = engines.Engine(engines.load(model, "fp32")[1].decoder, rows=ROWS)
    tokenizer, made, seed = load_tokenizer(model), 0, 0
    started = time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        while len(engine._waiting) + len(engine._running) < ROWS:
            seed += 1
            prompt = tokenizer(f"What is penstock number {seed}?\n").input_ids
            short = staggered and seed <= ROWS
            engine.submit(
                prompt, Sampling(max_new_tokens=seed * NEW_TOKENS // ROWS if short else NEW_TOKENS, seed=seed)
            )
        made += len(engine.step())
    return made / spent


async def client(port: int, stop: float, first: int, pause: float = 0.0, stored: bool = False) -> list[Stream]:
    """Asks again as soon as it was answered, or after a pause where it was refused, until `stop`."""
    streams: list[Stream] = []
    chat = f"/api/conversations/{(await sent(port, '/api/conversations', {}))['id']}" if stored else ""
    while time.perf_counter() < stop:
        seed = first + len(streams)
        streams.append(await (stored_once(port, chat, seed) if stored else stream_once(port, chat_body(seed))))
        if streams[-1].status != 200:
            await asyncio.sleep(pause)
    return streams


def closed_loop(
    port: int, count: int, seconds: float, *, visitors: bool = False, stored: bool = False
) -> tuple[list[Stream], float]:
    """What `count` clients saw, and the seconds. With visitors, one more that asks again 20 ms after it is refused.
    `stored`: they are pages, whose answers are kept as they come."""
    started = time.perf_counter()
    stop = started + seconds

    async def crowd() -> list[list[Stream]]:
        clients = [client(port, stop, number * 10_000, pause=0.2, stored=stored) for number in range(count)]
        return await asyncio.gather(*clients, *([client(port, stop, 90_000_000, pause=0.02)] if visitors else []))

    streams = [stream for streams in asyncio.run(crowd()) for stream in streams]
    return streams, time.perf_counter() - started


def row_of(server: Server, count: int, seconds: float, *, stored: bool = False) -> dict[str, Any]:
    """A row of the table."""
    streams, spent = closed_loop(server.port, count, seconds, stored=stored)
    return {
        "streams": count, **latencies(streams),
        "tokens_per_second": round(sum(stream.tokens for stream in streams) / spent, 1),
        "rss_gb": round(server.rss_gb(), 3),
    }  # fmt: skip


def load(seconds: float = 20.0) -> dict[str, Any]:
    """The table, `seconds` per row, and what overload does: clients that fill rows and queue, and one that comes."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = small_model(directory)
        with serving(directory, model, "--rows", str(ROWS), "--queue", str(QUEUE), "--threads", "1") as server:
            closed_loop(server.port, 8, 2.0)  # warm
            table = [row_of(server, count, seconds) for count in STREAMS]
            stored = [row_of(server, count, seconds, stored=True) for count in STREAMS]
            rates = rates_in_turns(server, model, seconds / 4)
            full, _ = closed_loop(server.port, ROWS + QUEUE, seconds)
            streams, _ = closed_loop(server.port, ROWS + QUEUE, seconds, visitors=True)
    refused = [stream for stream in streams if stream.status != 200]
    return {
        "model": "gpt2, 4 layers of 128, 1M weights, fp32, random", "rows": ROWS, "queue": QUEUE,
        "new_tokens": NEW_TOKENS, "table": table, "stored": stored,
        "tokens_per_second_at_32": rates,
        "stored_share_of_streamed": round(timing.ratio(rates, "stored", "served"), 3),
        "share_of_the_engine": round(timing.ratio(rates, "served", "engine"), 3),
        "share_of_the_engine_staggered": round(timing.ratio(rates, "served", "engine_staggered"), 3),
        "full": latencies(full),
        "overloaded": latencies([stream for stream in streams if stream.status == 200]),
        "refused": {
            "requests": len(refused), "statuses": sorted({stream.status for stream in refused}),
            **percentiles("answered", [stream.head for stream in refused]),
        },
    }  # fmt: skip


def rates_in_turns(server: Server, model: str, seconds: float) -> dict[str, list[float]]:
    """Tokens/s of the engine alone, all prompts at once and staggered, and of the server with 32 clients, of the API
    and pages, in turns."""

    def alone(staggered: bool) -> float:
        os.kill(server.process.pid, signal.SIGSTOP)
        rate = round(engine_rate(model, seconds, staggered=staggered), 1)
        os.kill(server.process.pid, signal.SIGCONT)
        return rate

    calls: dict[str, Callable[[], float]] = {
        "engine": lambda: alone(False), "engine_staggered": lambda: alone(True),
        "served": lambda: row_of(server, ROWS, seconds)["tokens_per_second"],
        "stored": lambda: row_of(server, ROWS, seconds, stored=True)["tokens_per_second"],
    }  # fmt: skip
    return timing.alternate(calls, PAIRS)


# --- requests from the document, and openai's clients -----------------------------------------------------------

SEED = 20221205
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "response_headers_conformance", "unsupported_method", "ignored_auth",
)  # fmt: skip


def fuzzing(address: str, key: str, *, examples: int, phases: str, seed: int = SEED) -> list[str]:
    """schemathesis against a server: `examples` requests per operation at most, in each of its phases."""
    return [
        sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run",
        f"{address}/openapi.json", "--header", f"Authorization: Bearer {key}", "--checks", ",".join(CHECKS),
        "--max-examples", str(examples), "--seed", str(seed), "--phases", phases, "--workers", "1", "--no-color",
        "--request-timeout", "120", "--generation-database", "none", "--continue-on-failure",
    ]  # fmt: skip


def fuzzed(server: Server, directory: Path, examples: int) -> dict[str, Any]:
    """Requests made from the OpenAPI document, and what was answered."""
    before = server.answers_by_status()
    command = fuzzing(server.address, KEY, examples=examples, phases="examples,coverage,fuzzing")
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory)
    made = server.answers_by_status() - before
    print(done.stdout[-6000:])
    return {
        "seed": SEED, "checks": CHECKS, "requests": made.total(), "answers_by_status": dict(sorted(made.items())),
        "answers_5xx": sum(count for status, count in made.items() if status >= "500"),
        "exit_code": done.returncode, "summary": re.findall(r"\d+ generated.*", done.stdout),
    }  # fmt: skip


def attacked(examples: int = 700) -> dict[str, Any]:
    """benchmarks/security.py, and on the same server up to `examples` requests per operation and phase of schemathesis,
    with a fixed seed. 5xx counts every answer from 500 on."""
    from tests.serve.page_payloads import PAYLOADS

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        # Short answers: what is tried here is the requests.
        with serving(directory, small_model(directory), "--threads", "1", "--max-length", "48") as server:
            ask, before = security.asker(server.address), server.answers_by_status()  # 503 while it loads
            result = {
                "strangers": security.strangers(ask, KEY), "payloads": security.payloads(ask, KEY, PAYLOADS),
                "bombs": security.bombs(ask, KEY, "small", server.rss_gb),
                **fuzzed(server, directory, examples),
            }  # fmt: skip
            made = server.answers_by_status() - before
            return {**result, "all_answers_5xx": sum(made[status] for status in made if status >= "500")}


def labelling(items: int = 1000, labellers: int = 8) -> dict[str, Any]:
    """benchmarks/labelling.py on the real command."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with serving(directory, small_model(directory), "--threads", "1") as server:
            return room.campaign(security.asker(server.address), KEY, items, labellers, directory)


def clients() -> dict[str, Any]:
    """The same cases with the last openai 1.x, the last 2.x and the newest; what llm, LangChain, LiteLLM and, where
    node is installed, npm's openai see. Each in an environment of its own."""
    tests, versions = facts.ROOT / "tests" / "serve", dict[str, Any]()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = f"tiny={small_model(directory)}"
        with serving(directory, model, "--threads", "1") as server:
            for wanted in ("openai<2", "openai<3", "openai"):
                report = asked(directory, tests / "openai_cases.py", [wanted], server)
                versions[f"openai {report['openai']}"] = counted(report["results"])
            report = asked(directory, tests / "other_clients.py", ["llm", "langchain-openai", "litellm"], server)
            versions |= {package: counted(results) for package, results in report.items()}
            if shutil.which("npm"):
                subprocess.run(["npm", "install", "--silent", "openai"], cwd=directory, check=True)
                command = ["node", str(tests / "npm_client.mjs"), server.address, KEY]
                done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True)
                report = json.loads(done.stdout)
                versions[f"npm openai {report['openai']}"] = counted(report["results"])
    return {"clients": versions}


def asked(directory: Path, script: Path, packages: list[str], server: Server) -> dict[str, Any]:
    """What a script reports that runs in an environment with these packages."""
    environment = directory / f"client{len(list(directory.glob('client*')))}"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = str(environment / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    command = [python, str(script), server.address, KEY]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def counted(results: dict[str, str]) -> dict[str, Any]:
    """How many cases passed, and what the others said."""
    failed = {case: outcome for case, outcome in results.items() if outcome != "passed"}
    print(len(results), failed, flush=True)
    return {"cases": len(results), "passed": len(results) - len(failed), "failed": failed}


def main(arguments: list[str]) -> int:
    """Writes serve_NAME.json."""
    measures = {"load": load, "security": attacked, "clients": clients, "labelling": labelling}
    return facts.run_measures(arguments, __doc__, measures, "serve", "fastapi", "uvicorn")
