"""Compile the kernels of the tree engine (`pipeline/models/trees/native`) to a shared library.

    python build_support/native.py          # into the checkout, where the package looks for the library

``setup.py`` calls `build` when the package is installed, ``make_wheels.py`` for each platform. Needs no package.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "pipeline" / "models" / "trees" / "native"
LIBRARY = "libtrees.so"
"""File name of the library, on every platform."""
REASON = "not_built.txt"
"""File beside the library's place that says why the library is missing."""

# -ffp-contract=off: a fused multiply-add would round otherwise than xgboost. -march=native is not used, so that a
# library runs on every machine of its platform: it has kernels for several kinds of processors and selects at run time.
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
X86_KINDS = {
    "v2": ("-msse4.2", "-mpopcnt"),
    "v3": ("-mavx2", "-mbmi2"),
    "v4": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mbmi2"),
}
"""Flags of each kind of kernels; processor.h checks for exactly these instructions."""


class CannotBuild(Exception):
    """The library cannot be built here; the message says why."""


def digest() -> str:
    """Return the SHA-256 of the sources. The package computes the same (`pipeline.models.trees.library`)."""
    found = hashlib.sha256()
    for path in sorted(path for path in SOURCES.iterdir() if path.suffix in {".c", ".h"}):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def find_compiler() -> list[str] | None:
    """Return the command of a C compiler: ``CC``, cc, gcc, clang, or ``ziglang`` from PyPI; None without one."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    return [sys.executable, "-m", "ziglang", "cc"] if find_spec("ziglang") else None


def build(target: Path, *, compiler: Sequence[str] | None = None) -> None:
    """Write the library to ``target``.

    :param compiler: command of the compiler; default: `find_compiler`.
    :raises CannotBuild: without a compiler, or when the compiler fails.
    """
    compiler = compiler or find_compiler()
    if compiler is None:
        raise CannotBuild("no C compiler was found when the package was installed (looked for cc, gcc, clang, ziglang)")
    kinds = X86_KINDS if "__x86_64__" in _run([*compiler, "-dM", "-E", "-x", "c", os.devnull]) else {"baseline": ()}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        plain = (f'-DSOURCES="{digest()}"',)
        units = [
            (SOURCES / name, Path(folder, name + ".o"), plain) for name in ("library.c", "assemble.c", "transforms.c")
        ]
        for kind, flags in kinds.items():
            units.append((SOURCES / "score.c", Path(folder, f"{kind}.o"), (f"-DKERNELS=kernels_{kind}", *flags)))
        for source, output, flags in units:
            _run([*compiler, *FLAGS, *flags, "-c", str(source), "-o", str(output)])
        # A library in use keeps its file: write another one and rename it.
        made = target.with_name(f"{target.name}.{os.getpid()}")
        _run([*compiler, "-shared", "-s", "-o", str(made), *(str(output) for _, output, _ in units)])
        made.replace(target)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotBuild(f"the C compiler {command[0]} cannot be run: {error}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise CannotBuild(
            f"the C compiler {command[0]} failed: {next((line for line in lines if 'error' in line), lines[-1])}"
        )
    if done.stderr:
        sys.stderr.write(done.stderr)
    return done.stdout


if __name__ == "__main__":
    build(SOURCES / LIBRARY)
