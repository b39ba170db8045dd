"""The chat service measured from outside: the real command in a process of its own, real sockets, a small model.

    python -m benchmarks serve load          first token, gaps and tokens/s at 1, 8, 32 and 128 streams; overload
    python -m benchmarks serve disconnects   1,000 clients that leave at random moments
    python -m benchmarks serve drain         SIGTERM with 32 live streams
    python -m benchmarks serve fuzz          5,000 requests made from the OpenAPI document
    python -m benchmarks serve clients       the same cases with three generations of the openai client

Each writes benchmarks/results/serve_NAME.json.
"""

import asyncio
import contextlib
import json
import os
import random
import re
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

from benchmarks import facts, timing

KEY = "a key for measurements"
ROWS, QUEUE, NEW_TOKENS = 32, 128, 64
STREAMS = (1, 8, 32, 128)
PAIRS = 7


def small_model(directory: Path) -> str:
    """Four layers of width 128 with random weights and 512 words: a million parameters, as the demo's."""
    import torch

    from penstock.data.toyland import save_tokenizer
    from penstock.models import pretrained
    from penstock.models.config import DecoderConfig
    from penstock.models.decoder import Decoder

    config = DecoderConfig(
        family="gpt2", vocab_size=512, d_model=128, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32, d_ff=512,
        max_length=256, hf={"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
    )  # fmt: skip
    path = directory / "small"
    pretrained.save(Decoder(config, generator=torch.Generator().manual_seed(0)), path)
    save_tokenizer(path, ["What is a penstock? The gated pipe that feeds a turbine."], vocab_size=512)
    return str(path)


@dataclass
class Server:
    """A running `penstock serve`."""

    process: subprocess.Popen[str]
    address: str
    port: int

    def metrics(self) -> dict[str, float]:
        """What /metrics says, by name."""
        request = urllib.request.Request(f"{self.address}/metrics", headers={"authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request) as answer:
            lines = answer.read().decode().splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}

    def rss_gb(self) -> float:
        """Resident memory now, in GB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        match = re.search(r"VmRSS:\s+(\d+)", status)
        assert match
        return int(match[1]) * 1024 / 1e9


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


def request_bytes(body: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    """A POST, as it goes over the wire."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def chat_body(seed: int, **more: Any) -> dict[str, Any]:
    """A streamed chat request with a prompt of its own."""
    messages = [{"role": "user", "content": f"What is penstock number {seed}?"}]
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": "small", "messages": messages, "max_tokens": NEW_TOKENS, "seed": seed, **usage, **more}


async def stream_once(port: int, body: dict[str, Any], leave: Callable[[Stream], bool] | None = None) -> Stream:
    """Sends one request on a connection of its own and reads its events as they come; `leave` may hang up."""
    stream = Stream()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started = last = time.perf_counter()
    writer.write(request_bytes(body))
    data = bytearray()
    try:
        while chunk := await reader.read(65536):
            now = time.perf_counter()
            data += chunk
            if not stream.status:
                stream.status, stream.head = int(data[9:12]), now - started
            if stream.status != 200:
                break
            if chunk.count(b'"content": "') > chunk.count(b'"role"') or b'"finish_reason": "' in chunk:
                if stream.first:
                    stream.gaps.append(now - last)
                else:
                    stream.first = now - started
                last = now
            if b"data: [DONE]" in chunk:
                break
            if leave is not None and leave(stream):
                break
    except ConnectionError:
        pass
    finally:
        writer.close()
    if match := re.search(rb'"completion_tokens": (\d+)', data):
        stream.tokens = int(match[1])
    stream.ended = "done" if b"[DONE]" in data else "error event" if b'data: {"error"' in data else "cut"
    return stream


def percentile(values: list[float], share: float) -> float:
    """The value below which that share lies."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else float("nan")


def milliseconds(values: list[float], share: float) -> float:
    """A percentile in ms."""
    return round(percentile(values, share) * 1000, 2)


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


async def closed_loop(port: int, count: int, seconds: float) -> tuple[list[Stream], float]:
    """`count` clients, each asking again as soon as it was answered. What they saw, and the seconds it took."""
    streams: list[Stream] = []
    started = time.perf_counter()

    async def client(number: int) -> None:
        turn = 0
        while time.perf_counter() - started < seconds:
            streams.append(await stream_once(port, chat_body(number * 10_000 + turn)))
            turn += 1

    await asyncio.gather(*(client(number) for number in range(count)))
    return streams, time.perf_counter() - started


def row_of(streams: list[Stream], spent: float, server: Server, count: int) -> dict[str, Any]:
    """A row of the table."""
    gaps = [gap for stream in streams for gap in stream.gaps]
    return {
        "streams": count, "requests": len(streams), "errors": sum(stream.ended != "done" for stream in streams),
        "first_token_ms_p50": milliseconds([stream.first for stream in streams], 0.5),
        "first_token_ms_p99": milliseconds([stream.first for stream in streams], 0.99),
        "gap_ms_p50": milliseconds(gaps, 0.5), "gap_ms_p99": milliseconds(gaps, 0.99),
        "tokens_per_second": round(sum(stream.tokens for stream in streams) / spent, 1),
        "rss_gb": round(server.rss_gb(), 3),
    }  # fmt: skip


async def overload(port: int, seconds: float) -> tuple[list[Stream], list[Stream]]:
    """Clients that ask again and again fill rows and queue; a new one comes every 20 ms. (accepted, refused)."""
    stop = time.perf_counter() + seconds
    accepted: list[Stream] = []
    refused: list[Stream] = []

    async def resident(number: int) -> None:
        turn = 0
        while time.perf_counter() < stop:
            stream = await stream_once(port, chat_body(number * 10_000 + turn))
            (accepted if stream.status == 200 else refused).append(stream)
            if stream.status != 200:
                await asyncio.sleep(0.2)
            turn += 1

    async def visitors() -> None:
        number = 0
        await asyncio.sleep(1.0)
        while time.perf_counter() < stop:
            stream = await stream_once(port, chat_body(90_000_000 + number))
            (accepted if stream.status == 200 else refused).append(stream)
            number += 1
            await asyncio.sleep(0.02)

    await asyncio.gather(*(resident(number) for number in range(ROWS + QUEUE)), visitors())
    return accepted, refused


def load(seconds: float = 20.0) -> dict[str, Any]:
    """The table, `seconds` per row, and what overload does."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = small_model(directory)
        table = []
        with serving(directory, model, "--rows", str(ROWS), "--queue", str(QUEUE), "--threads", "1") as server:
            asyncio.run(closed_loop(server.port, 8, 2.0))  # warm
            for count in STREAMS:
                table.append(row_of(*asyncio.run(closed_loop(server.port, count, seconds)), server, count))
                print(table[-1], flush=True)
            rates = rates_in_turns(server, model, seconds / 4)
            full, _ = asyncio.run(closed_loop(server.port, ROWS + QUEUE, seconds))
            accepted, refused = asyncio.run(overload(server.port, seconds))
    return {
        "model": "gpt2, 4 layers of 128, 1M weights, fp32, random", "rows": ROWS, "queue": QUEUE,
        "new_tokens": NEW_TOKENS, "table": table,
        "tokens_per_second_at_32": rates,
        "share_of_the_engine": round(timing.ratio(rates, "served", "engine"), 3),
        "share_of_the_engine_staggered": round(timing.ratio(rates, "served", "engine_staggered"), 3),
        "overload": {
            "accepted": len(accepted), "accepted_errors": sum(stream.ended != "done" for stream in accepted),
            "refused": len(refused), "refused_statuses": sorted({stream.status for stream in refused}),
            "refused_ms_p50": milliseconds([stream.head for stream in refused], 0.5),
            "refused_ms_p99": milliseconds([stream.head for stream in refused], 0.99),
            "gap_ms_p99_full": milliseconds([gap for stream in full for gap in stream.gaps], 0.99),
            "gap_ms_p99_overloaded": milliseconds([gap for stream in accepted for gap in stream.gaps], 0.99),
            "first_token_ms_p99_full": milliseconds([stream.first for stream in full], 0.99),
            "first_token_ms_p99_overloaded": milliseconds([stream.first for stream in accepted], 0.99),
        },
    }  # fmt: skip


def rates_in_turns(server: Server, model: str, seconds: float) -> dict[str, list[float]]:
    """Tokens/s of the engine alone, all prompts at once and staggered, and of the server with 32 clients, in turns."""

    def alone(staggered: bool) -> float:
        os.kill(server.process.pid, signal.SIGSTOP)
        rate = round(engine_rate(model, seconds, staggered=staggered), 1)
        os.kill(server.process.pid, signal.SIGCONT)
        return rate

    def served() -> float:
        return row_of(*asyncio.run(closed_loop(server.port, ROWS, seconds)), server, ROWS)["tokens_per_second"]

    calls = {"engine": lambda: alone(False), "engine_staggered": lambda: alone(True), "served": served}
    return timing.alternate(calls, PAIRS)


# --- disconnects and draining -----------------------------------------------------------------------------------------


def disconnects(clients: int = 1000) -> dict[str, Any]:
    """Clients that leave at random moments, streamed and not; then nothing may be left running."""
    rng = random.Random(0)

    async def leave_soon(port: int, number: int) -> str:
        body = chat_body(number, max_tokens=200)
        if number % 2:
            body = {**body, "stream": False}
            del body["stream_options"]
        task = asyncio.create_task(stream_once(port, body))
        await asyncio.sleep(rng.random() * 0.5)
        if task.done():
            return task.result().ended
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return "left"

    async def crowd(port: int) -> list[str]:
        gate = asyncio.Semaphore(64)

        async def client(number: int) -> str:
            async with gate:
                return await leave_soon(port, number)

        return await asyncio.gather(*(client(number) for number in range(clients)))

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with serving(directory, small_model(directory)) as server:
            ends = asyncio.run(crowd(server.port))
            waited = time.perf_counter()
            while (now := server.metrics())["penstock_serve_outstanding_answers"] and time.perf_counter() - waited < 30:
                time.sleep(0.01)
            idle = time.perf_counter() - waited
            after = asyncio.run(stream_once(server.port, chat_body(1)))
            return {
                "clients": clients, "left": ends.count("left"),
                "outstanding_after": now["penstock_serve_outstanding_answers"],
                "rows_used_after": now["penstock_serve_rows_used"], "seconds_until_idle": round(idle, 3),
                "next_request": after.ended,
            }  # fmt: skip


def drain(streams: int = 32) -> dict[str, Any]:
    """SIGTERM while streams run: each must end by itself or with an error event, and the exit code be 0."""

    async def crowd(server: Server) -> list[Stream]:
        tasks = [asyncio.create_task(stream_once(server.port, chat_body(i, max_tokens=200))) for i in range(streams)]
        while server.metrics()["penstock_serve_answer_tokens_total"] < streams * 4:
            await asyncio.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        return await asyncio.gather(*tasks)

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with serving(directory, small_model(directory)) as server:
            ended = asyncio.run(crowd(server))
            code = server.process.wait(60)
    ends = [stream.ended for stream in ended]
    return {"streams": streams, "exit_code": code, "ends": {end: ends.count(end) for end in sorted(set(ends))}}


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


def answers_by_status(server: Server) -> Counter[str]:
    """Requests that the server has answered so far, as its own metrics have it."""
    counts: Counter[str] = Counter()
    for label, count in server.metrics().items():
        if match := re.fullmatch(r'penstock_serve_requests_total\{.*status="(\d+)"\}', label):
            counts[match[1]] += int(count)
    return counts


def fuzz(examples: int = 300) -> dict[str, Any]:
    """`examples` requests per operation and phase, with a fixed seed. 5xx counts every answer from 500 on."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        # Short answers: what is tried here is the requests.
        with serving(directory, small_model(directory), "--threads", "1", "--max-length", "48") as server:
            before = answers_by_status(server)
            command = fuzzing(server.address, KEY, examples=examples, phases="examples,coverage,fuzzing")
            done = subprocess.run(command, capture_output=True, text=True, cwd=directory)
            made = answers_by_status(server) - before
    print(done.stdout[-6000:])
    return {
        "seed": SEED, "checks": CHECKS, "requests": made.total(), "answers_by_status": dict(sorted(made.items())),
        "answers_5xx": sum(count for status, count in made.items() if status >= "500"),
        "exit_code": done.returncode, "summary": re.findall(r"\d+ generated.*", done.stdout),
    }  # fmt: skip


def clients() -> dict[str, Any]:
    """The forty cases with the last openai 1.x, the last 2.x and the newest, each in an environment of its own."""
    cases = facts.ROOT / "tests" / "serve" / "openai_cases.py"
    versions: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = f"tiny={small_model(directory)}"
        with serving(directory, model, "--threads", "1") as server:
            for wanted in ("openai<2", "openai<3", "openai"):
                environment = directory / f"client{len(versions)}"
                subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
                python = str(environment / "bin" / "python")
                subprocess.run([python, "-m", "pip", "install", "-q", wanted], check=True)
                command = [python, str(cases), server.address, KEY]
                report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                results = report["results"]
                failed = {case: outcome for case, outcome in results.items() if outcome != "passed"}
                versions[report["openai"]] = {
                    "cases": len(results),
                    "passed": len(results) - len(failed),
                    "failed": failed,
                }
                print(report["openai"], versions[report["openai"]], flush=True)
    return {"clients": versions}


def main(arguments: list[str]) -> int:
    """Writes serve_NAME.json."""
    measures: dict[str, Callable[..., dict]] = {
        "load": load, "disconnects": disconnects, "drain": drain, "fuzz": fuzz, "clients": clients
    }  # fmt: skip
    return facts.run_measures(arguments, __doc__, measures, "serve", "fastapi", "uvicorn")
