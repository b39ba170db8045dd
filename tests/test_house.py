"""The floors of the house (docs/architecture.md), file by file: no import goes upward, and none in a circle."""

import ast
import subprocess
import sys
from pathlib import Path

from tests.conftest import PATIENCE

SOURCE = Path(__file__).parent.parent / "src" / "penstock"
FLOORS = [  # top to bottom; a file imports its own folder and lower floors
    {"__main__", "__init__"},
    {"cli"},
    {"commands"},
    {"serve", "algorithms"},
    {"rollout", "run", "data", "planner"},
    {"models"},
    {"memory"},
    {"autochunk", "distributed"},
    {"kernels"},
    {"config", "hub"},
    {"flags"},
    {"units", "sources"},
    {"errors"},
]
HEIGHT = {room: len(FLOORS) - i for i, floor in enumerate(FLOORS) for room in floor}


def module_of(path: Path, source: Path = SOURCE) -> str:
    """A file's name from the package down: "models.decoder"; a folder's __init__ is the folder, the package's ""."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, modules: set[str]) -> set[str]:
    """The files that a file imports: at its top, inside functions and for type checkers alone."""
    targets: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module and node.module.split(".")[0] == "penstock":
                names = [f"{node.module}.{alias.name}".removeprefix("penstock.") for alias in node.names]
                targets |= {name if name in modules else name.rpartition(".")[0] for name in names}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "penstock"]
            targets |= {name.removeprefix("penstock").removeprefix(".") for name in names}
    return targets


def graph(source: Path = SOURCE) -> dict[str, set[str]]:
    """Every file and the files that it imports."""
    files = {module_of(path, source): path for path in sorted(source.rglob("*.py"))}
    return {name: imports(path, set(files)) - {name} for name, path in files.items()}


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Files that reach each other by imports."""
    reach = {name: set(targets) for name, targets in arrows.items()}
    for middle in arrows:
        for targets in reach.values():
            if middle in targets:
                targets |= reach[middle]
    groups = {tuple(sorted(b for b in arrows if b in reach[a] and a in reach[b])) for a in arrows}
    return [list(group) for group in sorted(groups) if len(group) > 1]


def room_of(module: str) -> str:
    return module.split(".")[0] or "__init__"


def upward(arrows: dict[str, set[str]]) -> list[str]:
    """Imports that stay on a floor but leave the folder, or go up."""
    return [
        f"{name} -> {target}"
        for name, targets in arrows.items()
        for target in sorted(targets)
        if target  # the package itself: its version
        and room_of(name) != room_of(target)
        and HEIGHT[room_of(target)] >= HEIGHT[room_of(name)]
    ]


def test_no_import_goes_upward():
    assert upward(graph()) == []


def test_no_files_import_in_a_circle():
    assert circles(graph()) == []


def test_every_folder_and_file_has_a_floor():
    rooms = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms == set(HEIGHT)


def test_the_walk_sees_every_kind_of_import(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "cli.py").write_text("")
    (tmp_path / "run" / "session.py").write_text("def late():\n    import penstock.cli\n")
    (tmp_path / "run" / "progress.py").write_text(
        "from typing import TYPE_CHECKING\nfrom penstock.run.session import Session\n"
        "if TYPE_CHECKING:\n    from penstock.run import report\n"
    )
    (tmp_path / "run" / "report.py").write_text("from penstock.run import progress\n")
    arrows = graph(tmp_path)
    assert arrows["run.progress"] == {"run.session", "run.report"}
    assert upward(arrows) == ["run.session -> cli"]
    assert circles(arrows) == [["run.progress", "run.report"]]


def test_the_command_line_starts_without_torch():
    """Parsing a command line must stay fast: torch alone takes a second to import. So must a plan."""
    planner = "".join(f", penstock.planner.{path.stem}" for path in sorted((SOURCE / "planner").glob("[a-z]*.py")))
    code = f"import sys, penstock.cli{planner}\nsys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE).returncode == 0


def test_files_stay_one_idea_long():
    long = {str(path): n for path in SOURCE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 500}
    assert not long, "over 500 lines: is it two ideas?"


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def parameter_count(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def test_functions_fit_on_a_screen():
    long, wide = [], []
    for path in sorted(SOURCE.rglob("*.py")):
        for function in functions(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(SOURCE)}:{function.lineno} {function.name}"
            if function.end_lineno - function.lineno + 1 > 60:
                long.append(where)
            if parameter_count(function) > 8:
                wide.append(where)
    assert long == [], "over 60 lines"
    assert wide == [], "over 8 parameters"


NAMES_THAT_SAY_NOTHING = {"one", "found", "told", "said", "mine", "here", "there", "beside"}


def identifiers(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.append(node.id)
        elif isinstance(node, ast.arg):
            names.append(node.arg)
        elif isinstance(node, ast.Attribute):
            names.append(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
    return names


def test_variables_are_what_they_hold():
    root = SOURCE.parent.parent
    vague = {}
    for path in [*sorted((root / "src").rglob("*.py")), *sorted((root / "benchmarks").rglob("*.py"))]:
        names = [
            name for name in identifiers(ast.parse(path.read_text(encoding="utf-8"))) if name in NAMES_THAT_SAY_NOTHING
        ]
        if names:
            vague[str(path.relative_to(root))] = sorted(set(names))
    assert vague == {}


def test_folders_stay_small():
    sizes = {folder.name: len(list(folder.glob("*.py"))) for folder in SOURCE.rglob("*") if folder.is_dir()}
    assert {name: size for name, size in sizes.items() if size > 22} == {}
    assert sizes["memory"] <= 15
