"""Child processes of a server: whatever ends one ends nothing but the child."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InfrastructureError, MissingInput, PipelineError
from pipeline.jobs.directory import JobDirectory
from pipeline.service.triggers import jobs as trigger_jobs
from pipeline.service.triggers.child import ChildDied, count_rows_in_child, run_in_child
from pipeline.service.triggers.jobs import trigger_task
from pipeline.service.triggers.log import open_log
from pipeline.settings import Settings
from pipeline.testing.oracle import Lake

PATHS = "pipeline.sources.locate:locate"


class TestRunInChild:
    def test_result_comes_back(self) -> None:
        """Arguments and result are objects of this process."""
        assert run_in_child("pipeline.common.units:parse_bytes", "1 KiB") == 1024

    def test_error_comes_back(self) -> None:
        """An error keeps its class and fields; an exception of another kind is wrapped."""
        with pytest.raises(MissingInput) as caught:
            run_in_child(PATHS, "/nowhere/at/all")
        assert caught.value.where
        with pytest.raises(PipelineError, match="ZeroDivisionError"):
            run_in_child("operator:truediv", 1, 0)

    @pytest.mark.fault(109)
    @pytest.mark.parametrize(
        ("target", "arguments", "ending"),
        [("os:abort", (), "SIGABRT"), ("os:_exit", (0,), "exit status 0"), ("sys:exit", (3,), "exit status 3")],
    )
    def test_end_of_the_child_is_an_error(self, target: str, arguments: tuple[int, ...], ending: str) -> None:
        """An abort and an exit of the child raise `ChildDied` here."""
        with pytest.raises(ChildDied) as caught:
            run_in_child(target, *arguments)
        assert caught.value.found == ending

    @pytest.mark.fault(109)
    def test_child_that_hangs_is_killed(self) -> None:
        """A child that does not end in time is killed, and the work may be tried again."""
        with pytest.raises(InfrastructureError, match="did not end in time"):
            run_in_child("signal:pause", seconds=1.0)


def test_footers_of_good_and_bad_files(tmp_path: Path) -> None:
    """Rows of good files are counted beside a damaged and a missing file."""
    good, bad = tmp_path / "good.parquet", tmp_path / "bad.parquet"
    pq.write_table(pa.table({"x": [1, 2, 3]}), good)
    bad.write_bytes(good.read_bytes()[:-20])
    counts = count_rows_in_child([str(good), str(bad), str(tmp_path / "none.parquet")])
    assert counts[str(good)] == 3
    assert isinstance(counts[str(bad)], PipelineError)
    assert isinstance(counts[str(tmp_path / "none.parquet")], PipelineError)


TRIGGERS = """
triggers:
  - {{name: aborts, job: aborts.yaml, every: 1 h}}
  - {{name: landing, job: job.yaml, arrival: {{path: {folder}/}}}}
"""
JOB = """
name: {name}
source: {{path: {folder}/}}
steps: [{step}{{score: {{model: {model}, output: p, keep: [id]}}}}]
sink: {{path: out/{name}, mode: append}}
"""


@pytest.mark.fault(109)
def test_server_outlives_abort_and_bad_file(
    in_folder: Path, lake: Lake, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that aborts while its job is planned, and a half-written file, end neither the server nor other jobs."""
    landing = in_folder / "landing"
    landing.mkdir()
    good = lake.files[0]
    shutil.copy(good, landing / "good.parquet")
    (landing / "half.parquet").write_bytes(good.read_bytes()[:-100])
    (in_folder / "aborting.py").write_text("import os\n\n\ndef build(frame):\n    os.abort()\n")
    (in_folder / "job.yaml").write_text(JOB.format(name="scored", step="", folder=landing, model=model_path))
    (in_folder / "aborts.yaml").write_text(
        JOB.format(name="aborts", step="{map: 'aborting:build'}, ", folder=lake.path, model=model_path)
    )
    (in_folder / "triggers.yaml").write_text(TRIGGERS.format(folder=landing))
    settings = Settings(directory=str(in_folder / "jobs"))
    task = trigger_task(settings)
    assert task is not None
    task.tick(datetime.now(UTC))
    later = datetime.now(UTC) + timedelta(hours=1)
    monkeypatch.setattr(trigger_jobs, "utc_now", lambda: later)
    task.tick(later)
    (past,) = open_log(settings.directory, "aborts").read().recent
    assert (past.status, "SIGABRT" in past.reason) == ("REFUSED", True)
    state = open_log(settings.directory, "landing").read()
    assert ["half.parquet" in past.reason for past in state.recent] == [True]
    (landed,) = state.open
    plan = JobDirectory.open(f"{settings.directory}/{landed.job}").plan
    assert [Path(file.path).name for file in plan.files] == ["good.parquet"]
