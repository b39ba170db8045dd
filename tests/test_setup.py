"""tools/setup.sh without a network: a stand-in for Python records what pip is asked for, and refuses what it must."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import PATIENCE

ROOT = Path(__file__).parent.parent
TORCH = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
PYTHON = """#!/bin/sh
case "$*" in
    --version) echo Python 3.14.0 ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *"import torch"*) exit 1 ;;
    "-m pip --version") ;;
    *) echo "$*" >>"$LOG"; case "$*" in $REFUSED) echo no matching distribution >&2; exit 1 ;; esac ;;
esac
"""
FROM_PYTORCH = "--index-url https://download.pytorch.org/whl/cpu"


def setup(
    tmp_path: Path, refused: str, system: str = "Linux", gpu: bool = False, **variables: str
) -> tuple[str, list[str]]:
    """What `sh tools/setup.sh` prints, and what it asks pip to install, without the options that are always there."""
    smi = {"nvidia-smi": "#!/bin/sh\n"} if gpu else {}
    programs = {"python": PYTHON, "uname": f"#!/bin/sh\necho {system}\n"} | smi
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": str(tmp_path / "python"), "LOG": str(log), "REFUSED": refused}
    env |= variables
    command = ["sh", "tools/setup.sh", str(tmp_path / "venv")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr == ""
    always = "-m pip install --quiet --disable-pip-version-check --constraint constraints.txt "
    return done.stdout, [line.removeprefix(always) for line in log.read_text().splitlines()]


@pytest.mark.skipif(os.path.exists("/usr/bin/nvidia-smi"), reason="the machine has an NVIDIA GPU")
@pytest.mark.parametrize(
    ("refused", "attempts", "last_message"),
    [("nothing", 1, "the CPU build: this machine"),
     ("*--no-deps torch==*", 2, "the CPU build, from https://download.pytorch.org/whl/cpu"),
     ("*+cpu", 3, "no CPU build was found (see {venv}/setup.log); installing the default build: several gigabytes")],
)  # fmt: skip
def test_without_a_gpu_the_cpu_build_comes_first_and_the_default_build_last(tmp_path, refused, attempts, last_message):
    printed, asked = setup(tmp_path, refused)
    order = [f"--no-deps {TORCH}+cpu", f"--no-deps --timeout 30 --retries 1 {FROM_PYTORCH} {TORCH}+cpu", TORCH]
    assert asked == [*order[:attempts], "--editable .[dev,serve,verify]"]
    assert last_message.format(venv=tmp_path / "venv") in printed.splitlines()[-2]
    assert "no matching distribution" not in printed
    assert ("no matching distribution" in (tmp_path / "venv" / "setup.log").read_text()) == (attempts > 1)


@pytest.mark.parametrize(("system", "gpu"), [("Linux", True), ("Darwin", False)])
def test_with_a_gpu_or_on_macos_the_default_build_comes_at_once(tmp_path, system, gpu):
    printed, asked = setup(tmp_path, "nothing", system, gpu)
    assert asked == [TORCH, "--editable .[dev,serve,verify]"]
    assert "the default build for this machine" in printed


def test_without_a_python_it_says_which_ones_will_do():
    done = subprocess.run(["sh", "tools/setup.sh", "x"], cwd=ROOT, env={"PATH": "/usr/bin:/bin"}, capture_output=True)
    assert done.returncode == 2
    assert b"Python 3.11 to 3.14" in done.stderr


def test_a_python_without_venv_is_told_which_package_has_it(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n[ $1 = --version ]\n")  # as Debian's python3 without python3-venv
    python.chmod(0o755)
    env = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}
    command = ["sh", "tools/setup.sh", str(tmp_path / "venv")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.endswith("On Debian and Ubuntu: sudo apt install python3-venv\n")


@pytest.mark.parametrize(("compiler", "lines"), [("sh", 0), ("no-such-compiler", 1)])
def test_a_missing_compiler_is_named_with_what_it_costs(tmp_path, compiler, lines):
    printed, _ = setup(tmp_path, "nothing", CC=compiler)
    assert printed.count("no C compiler: a CPU takes two to five times as long.") == lines
    assert printed.count("sudo apt install gcc") == lines


@pytest.mark.parametrize(("wanted", "packages"), [("cuda", [TORCH]), ("cpu", [f"--no-deps {TORCH}+cpu"])])
def test_a_container_says_which_torch_it_wants_whatever_the_machine_has(tmp_path, wanted, packages):
    _, asked = setup(tmp_path, "nothing", gpu=wanted == "cpu", TORCH=wanted, EXTRAS="serve,hub")
    assert asked == [*packages, "--editable .[serve,hub]"]


def test_a_wheel_may_stand_in_for_the_checkout(tmp_path):
    _, asked = setup(tmp_path, "nothing", TORCH="cpu", EXTRAS="serve", PACKAGE="penstock.whl")
    assert asked[-1] == "penstock.whl[serve]"


def dockerfile() -> list[list[str]]:
    """The words of its instructions."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line and not line.startswith("#")]


def test_the_containers_steps_have_all_files_that_they_need(tmp_path):
    for word, *arguments in dockerfile():
        if word == "COPY":
            *files, target = arguments
            for file in files:
                place = tmp_path / "image" / target / (file if target == "./" else "")
                place.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if (ROOT / file).is_dir() else shutil.copy)(ROOT / file, place)
    (install,) = (" ".join(words[1:]) for words in dockerfile() if "tools/setup.sh" in words)
    assert "EXTRAS=serve,verify,hub,gguf sh tools/setup.sh /opt/venv && penstock doctor" in install
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path / "image", capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


def test_whoever_runs_the_container_has_a_cache_that_root_has_not_made():
    """Nobody else may read there: the container's own kernels would not be compiled."""
    caches, made = [""], []
    for word, *arguments in dockerfile():
        caches += [text.partition("=")[2] for text in arguments if word == "ENV" and text.startswith("XDG_CACHE_HOME=")]
        made += caches[-1:] if word == "RUN" else []
    assert caches[-1] == "/tmp"
    assert caches[-1] not in made


def test_the_dockerfile_has_no_fault_that_hadolint_knows():
    program = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    if program is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([program, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("python", ["3.11", "3.14"])
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_the_lock_has_a_version_that_every_platform_may_take(python, system):
    marks = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": system, "extra": ""}
    locked = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(marks):
                assert canonicalize_name(pin.name) not in locked, f"two versions of {pin.name}"
                locked[canonicalize_name(pin.name)] = str(pin.specifier).removeprefix("==")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["dev"], *extras["serve"], *extras["verify"]]:
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate(marks):
            assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)]), text
