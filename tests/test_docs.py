"""What the documentation shows is true: its code blocks run, its links lead somewhere, its commands exist."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from penstock import cli
from penstock.data.toyland import save_tokenizer
from tests.conftest import PATIENCE

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_page(page, directory, model):
    """Runs a page's blocks from top to bottom in one directory: `json NAME` is a file, bash and python are run."""
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    ran = 0
    for language, name, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        text = text.replace("Qwen/Qwen3-0.6B", model)
        if name:
            (directory / name).write_text(text, encoding="utf-8")
        elif language in ("bash", "python"):
            command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
            done = subprocess.run(
                command, cwd=directory, env=environment, capture_output=True, text=True, timeout=PATIENCE
            )
            assert done.returncode == 0, f"{page.name}:\n{text}\n{done.stderr[-3000:]}"
            ran += 1
    return ran


@pytest.fixture
def model(tiny_model):
    address = tiny_model(vocab_size=400, max_length=256)
    save_tokenizer(Path(address), ["What is a penstock? The gated pipe that feeds a turbine."], vocab_size=400)
    return address


def write_data(directory):
    """The data files of docs/train.md, for the pages that only name them."""
    for _, name, text in BLOCK.findall((ROOT / "docs" / "train.md").read_text(encoding="utf-8")):
        if name.endswith(".jsonl"):
            (directory / name).write_text(text, encoding="utf-8")


def test_the_tour_runs_from_top_to_bottom(tmp_path, model):
    assert run_page(ROOT / "docs" / "train.md", tmp_path, model) >= 9


@pytest.mark.parametrize("name", ["scale-out.md", "benchmark.md", "../README.md"])
def test_the_other_pages_run_too(name, tmp_path, model):
    write_data(tmp_path)
    page = ROOT / "docs" / name
    if name == "../README.md":  # 200 rollouts of the default are for people with a purpose
        text = page.read_text(encoding="utf-8").replace("--max-new-tokens 64", "--max-new-tokens 64 --steps 1")
        page = tmp_path / "README.md"
        page.write_text(text.replace("chat runs/ppo", "chat runs/ppo </dev/null"), encoding="utf-8")
    assert run_page(page, tmp_path, model) >= 1


def test_the_page_about_serving_runs_too(tmp_path, model):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    text = text.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("--key", f"--port {port} --threads 1 --key")
    (tmp_path / "serve.md").write_text(text, encoding="utf-8")
    try:
        assert run_page(tmp_path / "serve.md", tmp_path, model) == 4
    finally:
        with contextlib.suppress(OSError):  # a block that failed leaves its server
            os.kill(int((tmp_path / "serve.pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_make_targets_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE)) <= targets
    assert set(re.findall(r"(?:^|`|\| )penstock ([a-z]+)", text, re.MULTILINE)) <= {
        name.split()[0] for name in cli.COMMANDS
    }
    for module in re.findall(r"python -m (benchmarks[.\w]*\w)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


def test_nothing_is_left_to_fill_in():
    for page in PAGES:
        assert not re.findall(
            r"\b(?:TODO|TBD|FIXME|[A-Z0-9]+_(?:SECONDS|RSS|SE|ACC|SFT|PPO|RM)|GOLD|PLANTED|KILLS|STEPS)\b",
            page.read_text(encoding="utf-8"),
        )
