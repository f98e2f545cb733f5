"""Functions that travel by value: their names, what they carry, and what is refused."""

from __future__ import annotations

import functools
import linecache
import os.path
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from pipeline.common import travel
from pipeline.common.code_search import find_code
from pipeline.common.digest import digest_bytes
from pipeline.common.step_modules import StepModules
from pipeline.common.travel import (
    PackedValue,
    changed_since,
    describe,
    digest_of,
    entrypoint_of,
    is_packed,
    load_packed,
    shown_name,
)
from pipeline.errors import EnvMismatch, SpecError, StateCorrupt, StepFailed

Cell = Callable[..., dict[str, Any]]


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Cell:
    """Runs the text of a cell in ``__main__`` as a kernel does, and returns its names."""
    main = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    count = iter(range(1000))

    def run(text: str, **names: Any) -> dict[str, Any]:
        path = f"/tmp/ipykernel_1/{next(count)}.py"
        linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
        main.__dict__.update(names)
        exec(compile(text, path, "exec"), main.__dict__)
        return main.__dict__

    return run


def stored(entrypoint: str) -> bytes:
    data = travel.known(digest_of(entrypoint))
    assert data is not None
    return data


def value_of(entrypoint: str) -> PackedValue:
    return PackedValue.from_bytes(stored(entrypoint), sha256=digest_of(entrypoint), where="")


def load(entrypoint: str) -> Any:
    return load_packed(entrypoint, lambda _: None)


def test_importable_functions_go_by_name() -> None:
    assert entrypoint_of(os.path.join) == "posixpath:join"
    assert entrypoint_of(StepModules.function) == "pipeline.common.step_modules:StepModules.function"
    assert not is_packed("code:function")


def test_a_function_of_a_cell_carries_what_it_uses(cell: Cell) -> None:
    names = cell("factor = 3\ndef helper(x):\n    return x * factor\ndef clean(x):\n    return helper(x) + 1\n")
    name = entrypoint_of(names["clean"])
    assert is_packed(name)
    assert shown_name(name) == "clean"
    assert load(name)(2) == 7
    assert value_of(name).source == "def clean(x):\n    return helper(x) + 1\n"
    assert describe(name).startswith("clean (by value, ")


def test_lambdas_closures_instances_partials_and_methods_travel(cell: Cell) -> None:
    names = cell(
        "def outer(k):\n    def inner(x):\n        return x + k\n    return inner\n"
        "class Add:\n    def __init__(self, k):\n        self.k = k\n"
        "    def __call__(self, x):\n        return x + self.k\n"
    )
    values = {
        "lambda": lambda x: x + 5,
        "inner": names["outer"](5),
        "Add": names["Add"](5),
        "__call__": names["Add"](5).__call__,
    }
    for shown, value in values.items():
        name = entrypoint_of(value)
        assert shown_name(name) == shown.strip("_") or shown_name(name) == shown
        assert load(name)(1) == 6
    assert load(entrypoint_of(functools.partial(max, 6)))(1) == 6
    assert "class Add" in value_of(entrypoint_of(names["Add"](5))).source


def test_a_class_of_a_cell_travels(cell: Cell) -> None:
    names = cell("class Model:\n    def predict(self, x):\n        return x + 1\n")
    name = entrypoint_of(names["Model"], what="a model")
    before = vars(names["Model"])["predict"]
    loaded = load(name)
    assert loaded().predict(1) == 2
    assert loaded is not names["Model"]
    assert vars(names["Model"])["predict"] is before


def test_equal_cells_have_equal_bytes_in_every_process(tmp_path: Path) -> None:
    cell = (
        "import math\nk = 2\nclass A:\n    def f(self):\n        return k\n"
        "def clean(x, *, y=1):\n    return [math.sqrt(i) * A().f() for i in x]\n"
    )
    text = (
        "import linecache, sys\n"
        "from pipeline.common.travel import entrypoint_of\n"
        f"cell, path = {cell!r}, sys.argv[1]\n"
        "linecache.cache[path] = (1, None, cell.splitlines(keepends=True), path)\n"
        "exec(compile(cell, path, 'exec'), globals())\n"
        "print(entrypoint_of(clean))\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", text, f"/tmp/ipykernel_{number}/1.py"], capture_output=True, text=True, check=True
        ).stdout
        for number in range(2)
    }
    assert len(found) == 1


def test_tracebacks_show_the_line_of_the_cell(cell: Cell) -> None:
    names = cell("def clean(x):\n    return x['no such column']  # this line\n")
    function = load(entrypoint_of(names["clean"]))
    try:
        function({})
    except KeyError:
        text = traceback.format_exc()
    assert "<cell " in text
    assert "# this line" in text


def test_values_that_cannot_travel_are_named(cell: Cell) -> None:
    names = cell("def clean(x):\n    with lock:\n        return x\n", lock=threading.Lock())
    with pytest.raises(SpecError, match="cannot travel to workers: clean") as caught:
        entrypoint_of(names["clean"])
    assert "lock (_thread.lock)" in caught.value.found
    assert "open it inside of the function" in caught.value.next_step


def test_large_values_are_named_and_refused(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    names = cell("def clean(x):\n    return table[x]\n", table=np.zeros(3_000_000))
    text = describe(entrypoint_of(names["clean"]))
    assert "it carries table (ndarray, 22.9 MiB)" in text
    monkeypatch.setattr(travel, "MAX_BYTES", 20 << 20)
    with pytest.raises(SpecError, match="too large to travel: clean") as caught:
        entrypoint_of(names["clean"])
    assert "table (ndarray, 22.9 MiB)" in caught.value.found


def test_secrets_in_the_source_are_refused(cell: Cell) -> None:
    names = cell("def clean(x):\n    return x, 'postgresql://you:sentinel-pw@host/db'\n")
    with pytest.raises(SpecError, match="holds a secret") as caught:
        entrypoint_of(names["clean"])
    assert "sentinel-pw" not in str(caught.value)


def test_only_planned_bytes_are_loaded(cell: Cell) -> None:
    name = entrypoint_of(cell("def clean(x):\n    return x\n")["clean"])
    data = stored(name)
    travel._known.clear()
    with pytest.raises(StateCorrupt, match="not the planned one"):
        load_packed(name, lambda _: data + b"x")
    with pytest.raises(SpecError, match="the function clean is not here"):
        load(name)
    assert load_packed(name, lambda _: data)(3) == 3


def test_reading_a_stored_value_runs_no_code() -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("it ran",))

    data = pickle.dumps({"schema_version": 1, "name": Evil()})
    with pytest.raises(StateCorrupt, match="cannot be read"):
        PackedValue.from_bytes(data, sha256=digest_bytes(data), where="x")


def test_another_python_is_refused_by_name(cell: Cell) -> None:
    name = entrypoint_of(cell("def clean(x):\n    return x\n")["clean"])
    other = replace(value_of(name), python="3.1")
    with pytest.raises(EnvMismatch, match="stored by another version of Python") as caught:
        other.load(where="clean")
    assert "Python 3.1," in caught.value.expected


def test_a_redefinition_is_noticed(cell: Cell) -> None:
    name = entrypoint_of(cell("def clean(x):\n    return x\n")["clean"])
    assert changed_since(name) == ""
    cell("def clean(x):\n    return -x\n")
    assert changed_since(name) == "clean is defined differently in this session"


def test_modules_it_imports_belong_to_its_code(cell: Cell, tmp_path: Path) -> None:
    (tmp_path / "tools_of_cell.py").write_text("FLAG = 'old'\n")
    names = cell("def clean(x):\n    import tools_of_cell\n    return tools_of_cell.FLAG\n")
    name, paths = entrypoint_of(names["clean"]), (str(tmp_path),)
    (before,) = find_code([name], import_paths=paths).steps
    assert [file.module for file in before.files] == [name, "tools_of_cell"]
    (tmp_path / "tools_of_cell.py").write_text("FLAG = 'new'\n")
    (after,) = find_code([name], import_paths=paths).steps
    assert before.digest != after.digest


def test_its_own_module_is_not_imported(cell: Cell) -> None:
    import numpy.linalg

    names = cell("def clean(x):\n    return linalg.norm(zeros(x))\n", linalg=numpy.linalg, zeros=np.zeros)
    modules = value_of(entrypoint_of(names["clean"])).modules
    assert {"numpy", "numpy.linalg"} <= set(modules)
    assert __name__ not in value_of(entrypoint_of(lambda x: x)).modules


def test_steps_get_the_function(cell: Cell) -> None:
    name = entrypoint_of(cell("def clean(x):\n    return x + 1\n")["clean"])
    code = find_code([name])
    travel._known.clear()
    assert StepModules(code.steps, sources=code.sources).function(name)(1) == 2
    assert StepModules(code.steps, stored=dict(code.sources).get).function(name)(1) == 2
    with pytest.raises(SpecError, match="is not here"):
        StepModules(code.steps).function(name)


def test_what_it_needs_and_workers_lack_is_a_failed_step(cell: Cell, tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text("def f(x):\n    return x\n")
    sys.path.insert(0, str(tmp_path))
    try:
        names = cell("from only_here import f\ndef clean(x):\n    return f(x)\n")
        name = entrypoint_of(names["clean"])
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["only_here"]
    with pytest.raises(StepFailed, match="cannot be imported") as caught:
        StepModules(find_code([name]).steps).function(name)
    assert "only_here" in caught.value.found
