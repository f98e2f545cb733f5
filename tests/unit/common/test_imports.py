"""Imports without garbage collection, and without optional parts."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from pipeline.common.imports import (
    _kept,
    _modules_of,
    allow_partial_imports,
    frozen_imports,
    import_for_forks,
    import_library,
    require_whole_imports,
)


def test_objects_made_inside_are_frozen() -> None:
    before = gc.get_freeze_count()
    try:
        with frozen_imports():
            assert not gc.isenabled()
            made = [[number] for number in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(made)
    finally:
        gc.unfreeze()


def test_a_collector_that_was_off_stays_off_and_an_error_comes_through() -> None:
    gc.disable()
    try:
        with pytest.raises(ImportError), frozen_imports():
            raise ImportError
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


PACKAGE = """
try:
    import optional_part
    HAS_PART = True
except ImportError:
    HAS_PART = False
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a package that imports ``optional_part`` if it can; nothing stays imported or allowed."""
    (tmp_path / "whole_package").mkdir()
    (tmp_path / "whole_package" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "whole_package" / "inner.py").write_text("")
    (tmp_path / "optional_part.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "whole_package"
    require_whole_imports()
    _kept.clear()
    for name in ("whole_package", "whole_package.inner", "optional_part"):
        sys.modules.pop(name, None)


class TestPartialImport:
    def test_nothing_is_left_out_of_a_process_that_may_run_code_of_others(self, package: str) -> None:
        assert import_library(package, without=["optional_part"]).HAS_PART

    def test_part_is_left_out_where_allowed_and_can_be_imported_after(self, package: str) -> None:
        allow_partial_imports()
        assert not import_library(package, without=["optional_part"]).HAS_PART
        import_module("optional_part")
        assert not import_library(package, without=["optional_part"]).HAS_PART, "it is imported already"

    def test_part_that_is_imported_already_is_not_left_out(self, package: str) -> None:
        import_module("optional_part")
        allow_partial_imports()
        assert import_library(package, without=["optional_part"]).HAS_PART

    def test_code_of_others_gets_the_whole_package(self, package: str) -> None:
        allow_partial_imports()
        before = import_library(package, without=["optional_part"])
        import_module(f"{package}.inner")
        require_whole_imports()
        after = import_module(package)
        assert after is not before
        assert after.HAS_PART
        assert f"{package}.inner" not in sys.modules, "its modules belong to the package that was given up"
        assert import_library(package, without=["optional_part"]) is after

    def test_library_that_needs_all_its_packages_gets_them_whole(self, package: str) -> None:
        allow_partial_imports()
        import_library(package, without=["optional_part"])
        assert import_library(package, without=[]).HAS_PART

    def test_package_kept_for_forks_is_imported_where_parts_may_be_left_out(self, package: str) -> None:
        import_for_forks(package, without=["optional_part"])
        assert package not in sys.modules
        allow_partial_imports()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "path", [])
            assert not import_library(package, without=["optional_part"]).HAS_PART
        require_whole_imports()
        assert import_library(package, without=["optional_part"]).HAS_PART

    def test_package_kept_for_forks_is_whole_for_code_of_others(self, package: str) -> None:
        import_for_forks(package, without=["optional_part"])
        assert import_module(package).HAS_PART
        allow_partial_imports()
        assert import_library(package, without=["optional_part"]).HAS_PART, "it is imported already"

    def test_missing_package_is_an_import_error_and_hides_nothing(self, package: str) -> None:
        allow_partial_imports()
        with pytest.raises(ImportError):
            import_library("no_such_package_here", without=["optional_part"])
        assert import_module("optional_part").__name__ == "optional_part"

    def test_whole_imports_are_required_while_another_thread_imports(self, package: str) -> None:
        allow_partial_imports()
        import_library(package, without=["optional_part"])
        stop = threading.Event()

        def import_others() -> None:
            while not stop.is_set():
                for number in range(50):
                    sys.modules[f"other_{number}"] = sys
                for number in range(50):
                    del sys.modules[f"other_{number}"]

        thread = threading.Thread(target=import_others)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        thread.start()
        try:
            assert [_modules_of({package}) for _ in range(200)] == [[package]] * 200
        finally:
            stop.set()
            thread.join()
            sys.setswitchinterval(interval)
