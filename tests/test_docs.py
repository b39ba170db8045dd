"""What the documentation shows is true: its code blocks run, its links lead somewhere, and every name in it exists."""

import ast
import contextlib
import functools
import importlib
import inspect
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import penstock
from benchmarks.__main__ import BENCHMARKS
from penstock import cli
from penstock.data.toyland import save_tokenizer
from tests.conftest import PATIENCE
from tests.zygote import stand_ins, zygotic
from tools import cli_page

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_page(page, directory, model):
    """Runs a page's blocks from top to bottom in one directory: `json NAME` is a file, bash and python are run."""
    environment = {
        **os.environ, "PATH": f"{stand_ins()}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHON_EXEC": str(stand_ins() / "python"), "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    ran = 0
    for language, name, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        text = text.replace("Qwen/Qwen3-0.6B", model)
        if name:
            (directory / name).write_text(text, encoding="utf-8")
        elif language in ("bash", "python"):
            command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else zygotic("-c", text)
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


@pytest.mark.parametrize(
    "name", ["memory.md", "distributed.md", "python.md", "benchmark.md", "align.md", "improve.md", "../README.md"]
)
def test_the_other_pages_run_too(name, tmp_path, model):
    write_data(tmp_path)
    page = ROOT / "docs" / name
    if name == "../README.md":  # 200 rollouts of the default are for people with a purpose
        text = page.read_text(encoding="utf-8").replace("--max-new-tokens 64", "--max-new-tokens 64 --steps 1")
        page = tmp_path / "README.md"
        page.write_text(text.replace("chat runs/ppo", "chat runs/ppo </dev/null"), encoding="utf-8")
    assert run_page(page, tmp_path, model) >= 1


@pytest.mark.parametrize(("name", "blocks"), [("serve.md", 4), ("labelling.md", 3)])
def test_the_pages_about_serving_run_too(name, blocks, tmp_path, model):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    text = text.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("--key", f"--port {port} --threads 1 --key")
    (tmp_path / name).write_text(text, encoding="utf-8")
    try:
        assert run_page(tmp_path / name, tmp_path, model) == blocks
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
    assert set(re.findall(r"python -m benchmarks ([a-z_]+)", text)) <= set(BENCHMARKS)


FOLDERS, SUFFIXES = ("src", "benchmarks", "tools"), (".py", ".js", ".json", ".sh")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*") if path.suffix in SUFFIXES]
SOURCE_TEXT = "\n".join(path.read_text(encoding="utf-8") for path in [*SOURCES, ROOT / "Makefile"])
WORDS = set(re.findall(r"\w+", SOURCE_TEXT))
FOREIGN_FLAGS = {
    "--standalone", "--nproc_per_node", "--nnodes", "--rdzv_id", "--rdzv_backend", "--rdzv_endpoint", "--max-restarts",
    "--local-addr", "--requeue", "--signal",
}  # fmt: skip
"""torchrun's and Slurm's."""
FOREIGN_NAMES = {
    "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
    "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "TRACKIO_DIR",
}  # fmt: skip
"""What torch and loggers read from the environment."""
DATA_FILE = re.compile(r".*\.(?:json|jsonl|toml|html|txt|md|safetensors|parquet|arrow|csv|tsv|gz|zst|png|bin|pt)")


def members() -> dict[str, set[str]]:
    """What can stand behind a dot: the top-level names of each module, and the members of each class."""
    names: dict[str, set[str]] = {}
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        scopes = [(path.stem, tree), *((node.name, node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
        for scope, node in scopes:
            defined = names.setdefault(scope, set())
            for line in node.body:
                if isinstance(line, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    defined.add(line.name)
                targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
                defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def missing_names(text: str, page: Path) -> list[str]:
    """Files, functions, classes and flags that a page names and that do not exist."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    known, missing = members(), []
    roots = [ROOT, ROOT / "src", ROOT / "src" / "penstock", ROOT / "src" / "penstock" / "models", page.parent]
    for name in re.findall(r"`([^`\n]+)`", text):
        flags = re.findall(r"(?<!\S)--[a-z][\w-]*", name)
        missing += [
            flag for flag in flags if flag not in FOREIGN_FLAGS
            and flag[2:].removeprefix("no-").replace("-", "_") not in WORDS and f'"{flag}"' not in SOURCE_TEXT
        ]  # fmt: skip
        if re.fullmatch(r"[\w/.-]+\.(py|c|h|sh)", name):
            if not any((root / name).exists() for root in roots) and name not in {path.name for path in SOURCES}:
                missing.append(name)
        elif DATA_FILE.fullmatch(name):
            continue
        elif match := re.fullmatch(r"(?:[a-z_]+\.)*(\w+)\.(\w+)(?:\(.*\))?", name):
            scope, member = match.groups()
            owners = [known[owner] for owner in (scope, scope.title()) if owner in known]  # strategy.init: Strategy's
            if owners and member not in set.union(*owners) and member not in known:
                missing.append(name)
        elif re.fullmatch(r"[A-Za-z]+_\w+|[A-Z][a-z]+[A-Z]\w+", name) and name not in WORDS | FOREIGN_NAMES:
            missing.append(name)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_of_a_file_function_or_flag_exists(page):
    assert missing_names(page.read_text(encoding="utf-8"), page) == []


def test_a_name_that_does_not_exist_is_noticed():
    wrong = "`memory/nothing.py` `functional.nothing` `Strategy.nothing` `--no-such-flag` `NoSuchClass` `no_function`"
    right = "`memory/plan.py` `functional.gae` `strategy.init()` `--lora-targets` `RewardModel` `kl_k2` `config.json`"
    assert missing_names(f"{right} {wrong}", ROOT / "README.md") == re.findall(r"`(.+?)`", wrong)


def test_what_launchers_read_is_well_formed():
    """Scripts and manifests for machines that no test has."""
    blocks = BLOCK.findall((ROOT / "docs" / "distributed.md").read_text(encoding="utf-8"))
    scripts = [text for language, _, text in blocks if language == "sh"]
    manifests = [yaml.safe_load_all(text) for language, _, text in blocks if language == "yaml"]
    for script in scripts:
        assert subprocess.run(["bash", "-n", "-c", script], check=False).returncode == 0
    kinds = [document.get("kind", "SkyPilot") for manifest in manifests for document in manifest]
    assert kinds == ["Service", "Job", "SkyPilot"]
    assert len(scripts) == 3


def test_the_page_of_commands_is_what_the_commands_say():
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == cli_page.page(), "run: python tools/cli_page.py"


def test_nothing_is_left_to_fill_in():
    for page in PAGES:
        assert not re.findall(
            r"\b(?:TODO|TBD|FIXME|[A-Z0-9]+_(?:SECONDS|RSS|SE|ACC|SFT|PPO|RM)|GOLD|PLANTED|KILLS|STEPS)\b",
            page.read_text(encoding="utf-8"),
        )


NAMED = (
    "sft", "reward", "ppo", "dpo", "grpo", "kto", "distill", "align", "plan", "autochunk.api.autochunk",
    "Strategy.named", "Strategy.init", "Strategy.prepare", "Strategy.step", "Strategy.evaluate", "Strategy.phase",
    "Actor.from_pretrained", "Engine.from_pretrained", "Engine.generate", "Engine.stream", "Sampling",
)  # fmt: skip
"""What the page of Python lists with its types."""


def signature_of(name: str) -> str:
    """As the page has it: types without their modules, and no self."""
    importlib.import_module("penstock.autochunk.api")
    found = functools.reduce(getattr, name.split("."), penstock)
    text = str(inspect.signature(found))
    text = re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Za-z])", "", text).replace("self, ", "").replace("(self)", "()")
    text = re.sub(r"-> '(\w+)'", r"-> \1", text)
    text = re.sub(r"\*<class '(\w+)'>|Unpack\[(\w+)\]", r"\1\2", text)  # before Python 3.13, and since
    if inspect.isgeneratorfunction(getattr(found, "__wrapped__", None)):
        text = text.replace("-> Iterator[", "-> ContextManager[")
    return name.replace("autochunk.api.", "") + text


def test_the_page_of_python_has_the_types_of_today():
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    wanted = "\n".join(map(signature_of, NAMED))
    assert f"```text\n{wanted}\n```" in page, f"docs/python.md should say:\n{wanted}"
    assert set(penstock.__all__) - {"__version__"} <= set(re.findall(r"\w+", page))
