"""The floors of the house (docs/architecture.md): nothing imports upward, and the command line starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "penstock"
FLOORS = {
    # floor: what it may import of penstock besides itself and the ground (errors, config)
    "memory": set(),
    "models": {"memory"},
    "rollout": {"memory", "models"},
    "data": {"memory", "models"},
    "run": {"memory", "models"},
    "algorithms": {"memory", "models", "rollout", "data", "run"},
    "bench": {"memory", "models", "rollout", "data", "run", "algorithms"},
    "serve": {"memory", "models", "rollout", "data", "run"},
}
GROUND = {"errors", "config", "flags"}


def imports(path: Path) -> set[str]:
    """The penstock modules a file imports, at its top or inside a function: {"models.decoder", ...}."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "penstock":
            found |= {f"{node.module}.{name.name}".removeprefix("penstock.") for name in node.names}
            assert node.level == 0
        elif isinstance(node, ast.Import):
            found |= {
                name.name.removeprefix("penstock.") for name in node.names if name.name.split(".")[0] == "penstock"
            }
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_nothing_imports_upward(floor):
    allowed = FLOORS[floor] | GROUND | {floor}
    files = sorted((SOURCE / floor).rglob("*.py"))
    assert files
    for path in files:
        upward = {name for name in imports(path) if name.split(".")[0] not in allowed}
        assert not upward, f"{path.relative_to(SOURCE)} imports {upward}"


def test_every_directory_is_a_floor_with_rules():
    there = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert there == set(FLOORS)


def test_the_ground_stands_on_nothing():
    for name in GROUND:
        assert imports(SOURCE / f"{name}.py") <= {f"errors.{error}" for error in ("UserError", "DataError")}


def test_the_command_line_starts_without_torch():
    """Parsing a command line must stay fast: torch alone takes a second to import."""
    code = (
        "import sys, penstock.cli, penstock.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_walk_sees_imports_inside_functions(tmp_path):
    (tmp_path / "x.py").write_text("def f():\n    from penstock.run.session import Session\n    import penstock.cli\n")
    assert imports(tmp_path / "x.py") == {"run.session.Session", "cli"}


def test_files_stay_one_idea_long():
    long = {str(path): n for path in SOURCE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 500}
    assert not long, "over 500 lines: is it two ideas?"
