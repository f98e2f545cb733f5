"""The Python API: exports, typed parts, types that a user's mypy sees, and frames."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import pipeline
from pipeline import Errors, Job, MapStep, Score, ScoreStep, Settings, Sink, Source
from pipeline.errors import SpecError
from pipeline.spec.job_spec import JobSpec

ROOT = Path(__file__).parents[2]
PARTS = {"source": {"path": "lake/"}, "steps": [{"score": {"model": "m.ubj"}}], "sink": {"path": "out/"}}


class TestExports:
    def test_every_name_is_there(self) -> None:
        assert [name for name in pipeline.__all__ if not hasattr(pipeline, name)] == []
        assert dir(pipeline) == sorted(pipeline.__all__)

    def test_every_error_is_exported(self) -> None:
        from pipeline import errors

        kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
        assert kinds <= set(pipeline.__all__)

    def test_import_loads_nothing_else(self) -> None:
        code = "import sys, pipeline; sys.exit(str([m for m in sys.modules if m.startswith('pipeline.')] or '') or 0)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr

    def test_unknown_name(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'jobz'"):
            _ = pipeline.jobz  # type: ignore[attr-defined]

    def test_predict_is_score(self) -> None:
        assert pipeline.predict is pipeline.score


class TestJob:
    def test_has_a_keyword_for_every_field(self) -> None:
        assert set(JobSpec.model_fields) <= set(inspect.signature(Job).parameters)

    def test_parts_and_dicts_are_the_same_job(self, tmp_path: Path) -> None:
        by_parts = Job(
            "churn",
            Source(path=tmp_path / "lake", columns=["a", "b"]),
            [MapStep(map="features:build"), Score(model=tmp_path / "m.ubj", keep=["a"])],
            Sink(path=tmp_path / "out", mode="append"),
            errors=Errors(max_fraction=0.5),
        )
        by_dicts = Job(
            name="churn",
            source={"path": str(tmp_path / "lake"), "columns": ["a", "b"]},
            steps=[{"map": "features:build"}, {"score": {"model": tmp_path / "m.ubj", "keep": ["a"]}}],
            sink={"path": tmp_path / "out", "mode": "append"},
            errors={"max_fraction": 0.5},
        )
        assert by_parts.spec == by_dicts.spec
        assert by_parts.spec.source.path == str(tmp_path / "lake")
        assert isinstance(by_parts.spec.steps[1], ScoreStep)

    def test_placeholders_in_parts_are_filled_in(self) -> None:
        job = Job("c", Source(path="lake/${params.day}/"), PARTS["steps"], Sink(path="out/"), params={"day": "monday"})  # type: ignore[arg-type]
        assert job.spec.source.path == "lake/monday/"

    def test_invalid_field_is_a_spec_error(self) -> None:
        with pytest.raises(SpecError, match=r"source\.pth is not a field"):
            Job("c", {"path": "a", "pth": "b"}, [{"score": {"model": "m.ubj"}}], {"path": "o"})

    def test_shortcuts_win_over_settings(self, tmp_path: Path) -> None:
        settings = Settings(workers=7, threads=2)
        job = Job("c", settings=settings, workers=1, directory=tmp_path, **PARTS)  # type: ignore[arg-type]
        assert (job.settings.workers, job.settings.threads, job.settings.directory) == (1, 2, str(tmp_path))

    def test_repr_is_one_line_and_print_shows_the_spec(self) -> None:
        job = Job("c", **PARTS)  # type: ignore[arg-type]
        assert repr(job) == "<Job c: lake/ → out/>"
        assert JobSpec.load(str(job)) == job.spec
        assert "<table" in job._repr_html_()

    def test_jobs_that_exist_are_not_methods(self) -> None:
        """A method `resume` would resume another job than the one it is called on."""
        assert not {"resume", "retry", "attach"} & set(dir(Job))


USER_CODE = """
from pathlib import Path
from typing import assert_type

import dask.dataframe as dd
import pandas as pd

import pipeline
from pipeline import Job, JobHandle, PlanSummary, Report, Score, Settings, Sink, Source, Status

job = Job("c", Source(path=Path("lake")), [{"map": "f:b"}, Score(model="m.ubj", keep=["a"])], Sink(path="o"), workers=2)
assert_type(job.plan(), PlanSummary)
assert_type(job.run(), Report)
assert_type(job.submit(), JobHandle)
assert_type(pipeline.resume("@last"), Report)
assert_type(pipeline.attach("@last").status, Status)
assert_type(pipeline.list_jobs(), pd.DataFrame)
assert_type(pipeline.score(pd.DataFrame(), Path("m.ubj")), pd.DataFrame)
assert_type(Settings.load(workers=2), Settings)

def lazily(frame: dd.DataFrame) -> dd.DataFrame:
    return pipeline.predict(frame, "m.ubj")

Job("c", Source(pth="lake"), [], Sink(path="o"))  # wrong
Settings.load(worker=2)  # wrong
pipeline.score(3, "m.ubj")  # wrong
"""

UNSEEN = ["sqlalchemy", "bokeh", "narwhals", "polars", "IPython", "PIL", "rich", "hypothesis", "tornado", "distributed"]
UNSEEN += ["matplotlib", "pyarrow", "fsspec"]
"""Packages of which users see no type: two thirds of all that mypy would read."""
MYPY = f"""
[mypy]
ignore_missing_imports = True
follow_imports = silent

[mypy-{",".join(f"{name}.*" for name in UNSEEN)}]
follow_imports = skip
"""


@pytest.mark.slow
def test_users_see_the_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER_CODE)
    (tmp_path / "mypy.ini").write_text(MYPY)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "user.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    wrong = [number for number, line in enumerate(USER_CODE.splitlines(), 1) if line.endswith("# wrong")]
    found = sorted({int(line.split(":")[1]) for line in done.stdout.splitlines() if line.startswith("user.py:")})
    assert found == wrong, done.stdout + done.stderr


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(pipeline.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("package", ["spec", "plan", "report", "storage"])
def test_packages_offer_their_own_names(package: str) -> None:
    face = import_module(f"pipeline.{package}")
    assert dir(face) == sorted(face.__all__)
    for name in face.__all__:
        assert getattr(face, name).__module__.startswith(f"pipeline.{package}.")
    with pytest.raises(AttributeError):
        _ = face.nothing
