"""Libraries that a wheel can bring for machines without a compiler, one per set of instructions. No torch in here.

`PENSTOCK_KERNELS=all pip wheel .` compiles them into the wheel (setup.py). A machine with a compiler compiles for
itself (kernels/compile.py), and these are not looked at.
"""

import platform
from pathlib import Path

from penstock.errors import UserError
from penstock.kernels.machine import cpu_facts

LIBRARIES = {"decode": ("decode.c", "activations.c", "products.c"), "adamw": ("adamw.c",)}
"""The C files of each; its name is that of the first one."""
FLAGS = (
    "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC",
)  # fmt: skip
"""For every compiler: results do not depend on whether a product and a sum were one instruction."""
AVX2 = frozenset(["abm", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"])
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
LEVELS: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    # name: what the compiler is told, and the flags of /proc/cpuinfo that a processor must have; the best ones first
    "amx": (
        ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"},
    ),
    "avx512bf16": (("-march=x86-64-v4", "-mavx512bf16"), AVX512 | {"avx512_bf16"}),
    "avx512": (("-march=x86-64-v4",), AVX512),
    "avx2": (("-march=x86-64-v3",), AVX2),
    "x86": (("-march=x86-64-v2",), frozenset({"sse4_2", "ssse3", "popcnt"})),
    "arm": (("-march=armv8-a",), frozenset({"asimd"})),
}
HERE = Path(__file__).parent
PLACE = HERE / "prebuilt"


def levels_of(machine: str) -> list[str]:
    """The levels that a compiler for this machine (platform.machine()) can make."""
    arm = machine in ("aarch64", "arm64")
    return [name for name in LEVELS if (name == "arm") == arm]


def wanted(levels: str) -> list[str]:
    """The levels that PENSTOCK_KERNELS names, or all. Raises UserError for others."""
    own, names = levels_of(platform.machine()), levels.split()
    if names == ["all"]:
        return own
    for name in names:
        if name not in LEVELS:
            raise UserError(
                f"PENSTOCK_KERNELS={levels}: there is no level {name}; give all, or some of {', '.join(own)}."
            )
    return names


def best(name: str) -> Path | None:
    """The library of that name for the most of this processor's instructions, if the wheel has one."""
    instructions = set(cpu_facts().split())
    for level in levels_of(platform.machine()):
        library = PLACE / f"{name}-{level}.so"
        if LEVELS[level][1] <= instructions and library.exists():
            return library
    return None
