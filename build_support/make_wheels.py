"""Build a wheel for each platform on this machine: Linux on x86-64 and ARM, for every Python 3.

    pip install ziglang
    python build_support/make_wheels.py            # into dist/

Zig compiles for any processor, and against an old glibc, so that the wheels need none newer. Each wheel is checked: its
library needs no other library and no newer symbol than the wheel's tag promises (as auditwheel would check).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

from native import LIBRARY, SOURCES

ROOT = Path(__file__).resolve().parents[1]
GLIBC = (2, 17)
"""Oldest glibc that the wheels run on: that of manylinux2014."""
MACHINES = {"x86_64": 62, "aarch64": 183}
"""Processors, and the number of each in an ELF header."""


def make_wheel(machine: str, *, target: Path) -> Path:
    """Build and check the wheel for one kind of processor; return its path in ``target``."""
    tag = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}"
    # -I: pip hides the packages of this environment from what a build runs.
    zig = f"{sys.executable} -I -m ziglang cc -target {machine}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
    # setuptools would put files of an earlier build into the wheel.
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(target), str(ROOT)]
    options = f"--config-settings=--build-option=--plat-name={tag}"
    subprocess.run([*command, options], env=os.environ | {"CC": zig}, check=True)
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    (wheel,) = target.glob(f"*-py3-none-{tag}.whl")
    problems = find_problems(wheel, machine=machine)
    if problems:
        raise SystemExit(f"{wheel.name}: {'; '.join(problems)}")
    return wheel


def find_problems(wheel: Path, *, machine: str, glibc: tuple[int, int] = GLIBC) -> list[str]:
    """Return what keeps the library of a wheel from loading on every machine that the wheel's tag names."""
    name = (SOURCES / LIBRARY).relative_to(ROOT).as_posix()
    with zipfile.ZipFile(wheel) as archive:
        if name not in archive.namelist():
            return [f"{name} is missing"]
        data = archive.read(name)
    found = struct.unpack_from("<H", data, 18)[0]
    problems = [] if found == MACHINES[machine] else [f"a library for the processor {found} of ELF, not for {machine}"]
    versions = {(int(major), int(minor)) for major, minor in re.findall(rb"GLIBC_(\d+)\.(\d+)", data)}
    problems += [f"a symbol of glibc {major}.{minor}" for major, minor in sorted(versions) if (major, minor) > glibc]
    libraries = set(re.findall(rb"\0(lib[\w+-]+\.so\.\d+)\0", data)) - {b"libc.so.6"}
    return problems + [f"the library {name.decode()} is needed" for name in sorted(libraries)]


def main() -> None:
    """Build the wheels of all machines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument(
        "--machine", choices=MACHINES, action="append", help="only this one; may be given several times"
    )
    chosen = parser.parse_args()
    for machine in chosen.machine or MACHINES:
        wheel = make_wheel(machine, target=chosen.out)
        sys.stdout.write(f"{wheel}: {wheel.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
