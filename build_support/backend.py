"""The build backend: that of setuptools, with ``ziglang`` from PyPI as a requirement where no C compiler is found."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from native import find_compiler
from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Return what a build needs beside ``build-system.requires`` (PEP 517)."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_compiler()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Return what an editable build needs beside ``build-system.requires`` (PEP 660)."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_compiler()]


def _compiler() -> list[str]:
    return [] if find_compiler() or not _has_ziglang() else ["ziglang"]


def _has_ziglang() -> bool:
    """Whether pip finds ``ziglang``: an installation must not fail where an index lacks it. True without pip."""
    # -I: an isolated build hides the packages of the environment, and pip with them.
    pip = [sys.executable, "-I", "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode:
        return True
    found = [*pip, "install", "--dry-run", "--ignore-installed", "--no-deps", "ziglang"]
    return subprocess.run(found, capture_output=True, check=False).returncode == 0
