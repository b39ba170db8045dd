"""Compiles penstock's C into a wheel where PENSTOCK_KERNELS asks for it: `all`, or levels of kernels/prebuilt.py.

PENSTOCK_KERNELS=all pip wheel . --no-deps
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent / "src"))
from penstock.kernels import prebuilt

NAMES = prebuilt.wanted(os.environ.get("PENSTOCK_KERNELS", ""))


class BuildWithKernels(build_py):
    """The package's files, and its compiled libraries."""

    def run(self) -> None:
        super().run()
        out = Path(self.build_lib) / "penstock" / "kernels" / "prebuilt"
        for level in NAMES:
            out.mkdir(parents=True, exist_ok=True)
            for name, sources in prebuilt.LIBRARIES.items():
                paths = [str(prebuilt.HERE / source) for source in sources]
                command = [os.environ.get("CC", "cc"), *prebuilt.FLAGS, *prebuilt.LEVELS[level][0], *paths]
                subprocess.run([*command, "-o", str(out / f"{name}-{level}.so"), "-lm"], check=True)


class PlatformWheel(bdist_wheel):
    """For any Python 3, and where there are libraries for this platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2]) if NAMES else super().get_tag()

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not NAMES


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel})
