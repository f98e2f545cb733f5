"""The files that count as the code of a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.common.code_search import find_code
from pipeline.common.digest import digest_bytes


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__in__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def modules(folder: Path, step: str = "features:build") -> list[str]:
    (code,) = find_code([step], import_paths=(str(folder),)).steps
    return [file.module for file in code.files]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import helpers", ["helpers"]),
        ("import helpers as h, json, numpy", ["helpers"]),
        ("from helpers import x", ["helpers"]),
        ("def build(frame):\n    import helpers", ["helpers"]),
        ("try:\n    import helpers\nexcept ImportError:\n    import gone", ["helpers"]),
        ("import pack.inner", ["pack", "pack.inner", "pack.sibling"]),
        ("from pack import inner", ["pack", "pack.inner", "pack.sibling"]),
        ("from pack import *", ["pack"]),
        ("from space.tool import x", ["space.tool"]),
        ("from space import tool", ["space.tool"]),
        ("import importlib\nimportlib.import_module('helpers')", ["helpers"]),
        ("from .. import nothing", []),
        ("import pipeline, random", []),
        ("def broken(:", []),
    ],
)
def test_imports_are_followed(tmp_path: Path, source: str, expected: list[str]) -> None:
    write(tmp_path, features=source, helpers="x = 1", random="shadow = 1", pack__in____init__="")
    write(tmp_path, pack__in__inner="from . import sibling\nfrom .gone import x", pack__in__sibling="import pack.inner")
    write(tmp_path, space__in__tool="x = 1", unused="")
    assert modules(tmp_path) == ["features", *expected]


def test_step_in_a_package_and_two_steps(tmp_path: Path) -> None:
    write(tmp_path, top__in____init__="", top__in__sub__in____init__="from ..other import x", top__in__other="x = 1")
    write(tmp_path, top__in__sub__in__steps="", second="import top.other")
    assert modules(tmp_path, "top.sub.steps:build") == ["top", "top.other", "top.sub", "top.sub.steps"]
    one, two = find_code(["top.sub.steps:a", "second:b", "second:c"], import_paths=(str(tmp_path),)).steps
    assert (one.module, two.module) == ("top.sub.steps", "second")
    assert [file.module for file in two.files] == ["second", "top", "top.other"]


def test_native_modules_count_by_their_bytes(tmp_path: Path) -> None:
    write(tmp_path, features="import fast")
    from importlib.machinery import EXTENSION_SUFFIXES

    (tmp_path / f"fast{EXTENSION_SUFFIXES[0]}").write_bytes(b"\x7fELF")
    found = find_code(["features:build"], import_paths=(str(tmp_path),))
    (file,) = [file for file in found.steps[0].files if file.module == "fast"]
    assert (file.sha256, file.is_source) == (digest_bytes(b"\x7fELF"), False)
    assert file.sha256 not in found.sources


def test_module_from_elsewhere_counts_with_its_own_file() -> None:
    (code,) = find_code(["pipeline.demo.features:build"]).steps
    assert [file.module for file in code.files] == ["pipeline.demo.features"]
    (gone,) = find_code(["no_such_module:build"]).steps
    assert gone.files == ()


def test_first_folder_wins_and_an_edit_is_seen_at_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, features=f"NAME = {name!r}")
    paths = [str(tmp_path / name) for name in ("one", "two")]
    first, other = (find_code(["features:f"], import_paths=order).steps[0] for order in (paths, paths[::-1]))
    assert [file.path for file in first.files] == [str(tmp_path / "one" / "features.py")]
    assert first.digest != other.digest
    write(tmp_path / "one", features="NAME = 'two'")
    assert find_code(["features:f"], import_paths=paths).steps[0].digest == other.digest
