"""Modules of steps: exactly the planned code, and apart from those of other jobs in the process."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.common.code_search import find_code
from pipeline.common.step_code import FoundCode
from pipeline.common.step_modules import MAX_CACHED, StepModules
from pipeline.errors import StepChanged, StepFailed
from pipeline.plan.recipe import MapRecipe
from pipeline.scoring.steps import check_step, load_steps

STEP = "featmod:build"


def write(folder: Path, **files: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


def plan(folder: Path, step: str = STEP) -> FoundCode:
    return find_code([step], import_paths=(str(folder),))


def load(folder: Path, found: FoundCode | None = None, **options: Any) -> Callable[..., Any]:
    code = (found or plan(folder)).steps
    options = {"scope": str(folder), **options}
    (step,) = load_steps([MapRecipe(STEP)], code=code, import_paths=(str(folder),), **options)
    return step.function


@pytest.mark.fault(77)
class TestSideBySide:
    def test_each_job_has_its_own_module_of_one_name(self, tmp_path: Path) -> None:
        functions = {}
        for name in ("one", "two"):
            write(tmp_path / name, featmod=f"def build(frame): return {name!r}")
            functions[name] = load(tmp_path / name)
        assert [functions[name](None) for name in ("one", "two", "one")] == ["one", "two", "one"]  # type: ignore[comparison-overlap]
        assert load(tmp_path / "one") is functions["one"]

    def test_late_imports_find_the_modules_of_their_job(self, tmp_path: Path) -> None:
        late = "def build(frame):\n    import helper\n    from pack import inner\n    return helper.NAME, inner.NAME"
        functions = []
        for name in ("one", "two"):
            write(tmp_path / name, featmod=late, helper=f"NAME = {name!r}")
            write(tmp_path / name / "pack", __init__="", inner=f"NAME = {name!r}")
            functions.append(load(tmp_path / name))
        assert [function(None) for function in functions] == [("one", "one"), ("two", "two")]
        assert [function(None) for function in functions[::-1]] == [("two", "two"), ("one", "one")]

    def test_threads_of_two_jobs(self, tmp_path: Path) -> None:
        late = "def build(frame):\n    from helper import NAME\n    return NAME"
        for name in ("one", "two"):
            write(tmp_path / name, featmod=late, helper=f"NAME = {name!r}")
        found: dict[str, set[str]] = {"one": set(), "two": set()}
        barrier = threading.Barrier(2)

        def work(name: str) -> None:
            barrier.wait()
            for number in range(30):
                found[name].add(load(tmp_path / name, scope=f"{name}{number % 6}")(None))

        threads = [threading.Thread(target=work, args=(name,)) for name in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {"one": {"one"}, "two": {"two"}}

    def test_namespace_packages(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            write(tmp_path / name, featmod="from space.tool import NAME\ndef build(frame): return NAME")
            write(tmp_path / name / "space", tool=f"NAME = {name!r}")
        assert [load(tmp_path / name)(None) for name in ("one", "two")] == ["one", "two"]

    def test_equal_code_of_two_jobs_reads_its_own_data(self, tmp_path: Path) -> None:
        source = "from pathlib import Path\nNAME = (Path(__file__).parent / 'name').read_text()\n"
        for name in ("one", "two"):
            write(tmp_path / name, featmod=source + "def build(frame): return NAME")
            (tmp_path / name / "name").write_text(name)
        assert [load(tmp_path / name)(None) for name in ("one", "two")] == ["one", "two"]

    def test_steps_of_one_job_share_their_helper(self, tmp_path: Path) -> None:
        write(tmp_path, helper="X = object()", a="import helper\ndef f(x): return helper.X")
        write(tmp_path, b="from helper import X\ndef f(x): return X")
        one, two = load_steps([MapRecipe("a:f"), MapRecipe("b:f")], import_paths=(str(tmp_path),))
        assert one.function(None) is two.function(None)  # type: ignore[arg-type]


@pytest.mark.fault(77)
class TestVersions:
    def test_edited_module_is_imported_anew(self, tmp_path: Path) -> None:
        write(tmp_path, featmod="import helper\ndef build(frame): return helper.NAME", helper="NAME = 'old'")
        before = load(tmp_path)
        write(tmp_path, helper="NAME = 'new'")
        after = load(tmp_path)
        assert (before(None), after(None)) == ("old", "new")

    def test_other_code_than_planned_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path, featmod="import helper\ndef build(frame): return helper.NAME", helper="NAME = 'old'")
        found = plan(tmp_path)
        write(tmp_path, helper="NAME = 'new'")
        with pytest.raises(StepChanged, match="the code of step featmod changed") as caught:
            load(tmp_path, found)
        assert caught.value.where == str(tmp_path / "helper.py")
        assert (caught.value.found[:7], caught.value.expected[:7]) == ("sha256 ", "sha256 ")

    def test_loaded_code_stays_when_its_file_changes(self, tmp_path: Path) -> None:
        write(tmp_path, featmod="def build(frame): return 'old'")
        found = plan(tmp_path)
        before = load(tmp_path, found)
        write(tmp_path, featmod="def build(frame): return 'new'")
        assert load(tmp_path, found) is before

    def test_archived_source_replaces_a_changed_file(self, tmp_path: Path) -> None:
        write(tmp_path, featmod="def build(frame): return 'old'")
        found = plan(tmp_path)
        write(tmp_path, featmod="def build(frame): return 'new'")
        archived = load(tmp_path, found, archived=lambda file: found.sources[file.sha256])
        assert archived(None) == "old"
        with pytest.raises(StepChanged) as caught:
            load(tmp_path, found, archived=lambda file: None, scope="other")
        assert "keeps no copy" in caught.value.found

    def test_missing_file_names_the_machine(self, tmp_path: Path) -> None:
        write(tmp_path, featmod="def build(frame): return frame")
        found = plan(tmp_path)
        (tmp_path / "featmod.py").unlink()
        with pytest.raises(StepFailed, match="is not on this machine") as caught:
            load(tmp_path, found)
        assert caught.value.where == str(tmp_path / "featmod.py")
        assert "storage that all workers have" in caught.value.next_step

    def test_file_in_another_place_of_the_worker_counts_if_it_is_equal(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path / "driver", featmod="def build(frame): return 'here'")
        found = plan(tmp_path / "driver")
        (tmp_path / "driver").rename(tmp_path / "worker")
        monkeypatch.setattr(sys, "path", [str(tmp_path / "worker"), *sys.path])
        assert load(tmp_path / "driver", found)(None) == "here"

    def test_stale_byte_code_is_never_used(self, tmp_path: Path) -> None:
        import os
        import py_compile

        write(tmp_path, featmod="def build(frame): return 'old'")
        status = (tmp_path / "featmod.py").stat()
        py_compile.compile(str(tmp_path / "featmod.py"))
        write(tmp_path, featmod="def build(frame): return 'new'")
        os.utime(tmp_path / "featmod.py", ns=(status.st_atime_ns, status.st_mtime_ns))
        assert load(tmp_path)(None) == "new"


class TestTraces:
    def test_modules_of_a_sample_are_forgotten(self, tmp_path: Path) -> None:
        write(tmp_path, featmod="import helper\ndef build(frame): return helper.NAME", helper="NAME = 'old'")
        found = plan(tmp_path)
        modules, path, finders = set(sys.modules), list(sys.path), list(sys.meta_path)
        own = StepModules(found.steps, import_paths=(str(tmp_path),), sources=found.sources)
        with own.in_use():
            assert own.function(STEP)(None) == "old"  # type: ignore[arg-type, comparison-overlap]
            assert sys.modules["featmod"] is not None
        assert (set(sys.modules) - modules, sys.path, sys.meta_path) == (set(), path, finders)

    def test_modules_of_a_notebook_come_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path, featmod="def build(frame): return frame")
        mine: Any = object()
        monkeypatch.setitem(sys.modules, "featmod", mine)
        check_step(STEP, import_paths=(str(tmp_path),))
        assert sys.modules["featmod"] is mine

    def test_few_jobs_are_kept(self, tmp_path: Path) -> None:
        from pipeline.common import step_modules

        write(tmp_path, featmod="def build(frame): return frame")
        for number in range(MAX_CACHED + 3):
            load(tmp_path, scope=str(number))
        assert len(step_modules._cache) == MAX_CACHED

    def test_pickle_and_dataclasses_find_their_module(self, tmp_path: Path) -> None:
        source = (
            "from __future__ import annotations\nimport dataclasses, pickle, typing\n"
            "@dataclasses.dataclass\nclass C:\n    x: int\n    y: typing.ClassVar[int] = 1\n"
            "def build(frame): return pickle.loads(pickle.dumps(C(3))).x, [f.name for f in dataclasses.fields(C)]"
        )
        write(tmp_path, featmod=source)
        assert load(tmp_path)(None) == (3, ["x"])


ENDS = {
    "sys.exit(0)": "SystemExit: 0",
    "sys.exit('bye')": "SystemExit: bye",
    "raise GeneratorExit": "GeneratorExit: ",
    "raise BaseException('b')": "BaseException: b",
    "raise RuntimeError('r')": "RuntimeError: r",
}


@pytest.mark.fault(78)
class TestProcessEnds:
    @pytest.mark.parametrize("end", ENDS)
    def test_module_that_ends_the_process_is_a_failed_step(self, tmp_path: Path, end: str) -> None:
        write(tmp_path, featmod=f"import sys\ndef build(frame): return frame\n{end}")
        with pytest.raises(StepFailed, match=r"when it is imported|cannot be imported") as caught:
            check_step(STEP, import_paths=(str(tmp_path),))
        assert caught.value.found == ENDS[end]
        assert "featmod" not in sys.modules

    @pytest.mark.parametrize("end", ENDS)
    def test_attribute_that_ends_the_process_is_a_failed_step(self, tmp_path: Path, end: str) -> None:
        write(tmp_path, featmod=f"import sys\ndef __getattr__(name):\n    {end}")
        with pytest.raises(StepFailed) as caught:
            check_step(STEP, import_paths=(str(tmp_path),))
        assert caught.value.found == ENDS[end]

    def test_attribute_of_a_class_that_raises(self, tmp_path: Path) -> None:
        source = "class M(type):\n    @property\n    def build(cls): raise ValueError('v')\nclass B(metaclass=M): pass"
        write(tmp_path, featmod=source)
        with pytest.raises(StepFailed) as caught:
            check_step("featmod:B.build", import_paths=(str(tmp_path),))
        assert caught.value.found == "ValueError: v"

    def test_interrupt_passes(self, tmp_path: Path) -> None:
        write(tmp_path, featmod="raise KeyboardInterrupt")
        with pytest.raises(KeyboardInterrupt):
            check_step(STEP, import_paths=(str(tmp_path),))
