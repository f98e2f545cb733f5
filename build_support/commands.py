"""Commands of setuptools for the compiled library (``cmdclass`` in pyproject.toml)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from native import LIBRARY, REASON, SOURCES, CannotBuild, build
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class BuildLibrary(build_ext):
    """Build a plain shared library. Where that fails the installation succeeds, and a file in it says why."""

    def build_extension(self, ext: Any) -> None:
        """Write the library, or the reason why there is none, where the package looks for both."""
        target = Path(self.get_ext_fullpath(ext.name))
        reason = target.with_name(REASON)
        for path in (target, reason):
            path.unlink(missing_ok=True)
        try:
            build(target)
        except CannotBuild as error:
            self.warn(f"the tree engine is left out, jobs run with xgboost: {error}")
            target.parent.mkdir(parents=True, exist_ok=True)
            reason.write_text(f"{error}\n", "utf-8")

    def copy_extensions_to_source(self) -> None:
        """Copy the library, or the reason, to the checkout of an editable installation."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            reason = Path(self.build_lib, *ext.name.split(".")[:-1], REASON)
            if reason.exists():
                (SOURCES / LIBRARY).unlink(missing_ok=True)
                shutil.copyfile(reason, SOURCES / REASON)
            else:
                (SOURCES / REASON).unlink(missing_ok=True)

    def get_ext_filename(self, fullname: str) -> str:
        """Return a name without Python's version in it: the library serves all of them."""
        return str(Path(*fullname.split(".")[:-1], LIBRARY))


class PlatformWheel(bdist_wheel):
    """Tag wheels for a platform and every Python 3: the library needs no Python headers."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the parts of the wheel's tag."""
        return ("py3", "none", super().get_tag()[2])
