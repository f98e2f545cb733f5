"""Fan-outs on real Dask processes: children retried alone, published together, and summed up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.driver.fan_out import FanOutStop
from pipeline.driver.outcome import cancel_job
from pipeline.errors import Cancelled, ChildrenFailed
from pipeline.events import Callback, StatusChanged
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.fan_out import last_commit
from pipeline.jobs.listing import find_job
from pipeline.jobs.status import Status
from pipeline.report.build import make_report
from pipeline.report.rejects import summarise
from pipeline.report.verify import verify
from pipeline.runner import resume, retry, run
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.oracle import make_table, oracle, train_model

Make = Callable[..., JobSpec]
ROWS = 60


def make_hive(folder: Path, keys: list[str], *, rows: int = ROWS) -> dict[str, Path]:
    """One folder with one file for each key."""
    files = {}
    for number, key in enumerate(keys):
        place = folder / f"key={key}"
        place.mkdir(parents=True)
        files[key] = place / "x.parquet"
        pq.write_table(make_table(rows, seed=number, start=rows * number), files[key], row_group_size=25)
    return files


def published(folder: Path) -> pd.DataFrame:
    """All rows of one child's output."""
    tables = [pq.read_table(file, partitioning=None) for file in sorted(folder.glob("*.parquet"))]
    return pa.concat_tables(tables).to_pandas()


class Hide(Callback):
    """Takes files away as soon as the fan-out runs, before their children do."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def on_status(self, event: StatusChanged) -> None:
        if event.after == Status.RUNNING:
            for file in self.files:
                file.rename(file.with_suffix(".hidden"))

    def bring_back(self) -> None:
        for file in self.files:
            file.with_suffix(".hidden").rename(file)


def drivers(job: JobDirectory) -> int:
    """Return the number of drivers that have worked on it."""
    return sum(event["event"] == "driver" for event in job.events.read())


def receipts(job: JobDirectory) -> dict[str, tuple[str, int]]:
    """Attempt and time of every receipt."""
    folder = Path(job.root) / "rounds/0/receipts"
    return {
        file.name: (json.loads(file.read_text())["attempt"], file.stat().st_mtime_ns) for file in folder.glob("*.json")
    }


def test_of_fifty_children_two_fail_and_only_these_are_retried(
    make_spec: Make, settings: Settings, model_path: Path, tmp_path: Path
) -> None:
    keys = [f"k{number:02d}" for number in range(50)]
    files = make_hive(tmp_path / "hive", keys)
    hide = Hide([files["k31"], files["k44"]])
    spec = make_spec(source={"path": str(tmp_path / "hive")}, fan_out={"by": "key", "max_parallel": 4})
    with pytest.raises(ChildrenFailed) as caught:
        run(spec, settings=settings, callbacks=[hide])
    assert caught.value.message == "2 of 50 children failed; nothing was published"
    assert caught.value.exit_code == 4
    assert "k31" in caught.value.found
    assert not (tmp_path / "out").exists()

    job = find_job(settings.directory, "@last")
    assert job.status() is Status.FAILED
    statuses = {child.id.rpartition(".")[2]: child.status() for child in job.children()}
    assert {key for key, status in statuses.items() if status is Status.FAILED} == {"k31", "k44"}
    assert {status for key, status in statuses.items() if key not in ("k31", "k44")} == {Status.SCORED}
    before = {child.id: receipts(child) for child in job.children()}
    report = make_report(job)
    assert report.rows.input == report.rows.output == 48 * ROWS
    assert (report.partitions.done, report.partitions.planned) == (48, 50)
    text = report.text()
    assert "48 SCORED" in text
    assert "2 FAILED" in text

    hide.bring_back()
    report = resume("@last", settings=settings)
    assert report.status == "SUCCEEDED"
    assert report.rows.to_dict() == {"in": 50 * ROWS, "out": 50 * ROWS, "rejected": 0, "filtered": 0}
    assert [child.status for child in report.children] == ["SUCCEEDED"] * 50
    for child in job.children():
        key = child.id.rpartition(".")[2]
        # Its first driver scored it, and the last one published it; between them, one more where the first had failed.
        assert drivers(child) == (3 if key in ("k31", "k44") else 2)
        if key not in ("k31", "k44"):
            assert receipts(child) == before[child.id]
        assert child.manifests.numbers() == [1]
        pd.testing.assert_frame_equal(
            published(tmp_path / f"out/key={key}").drop(columns="key"), oracle([files[key]], model_path)
        )
    assert [event["manifest"] for event in job.events.read() if event["event"] == "published"] == [1]
    commit = last_commit(job)
    assert commit is not None
    assert (commit.number, commit.rows.output, len(commit.children)) == (1, 50 * ROWS, 50)
    assert sum(event.get("after") == "PUBLISHING" for event in job.events.read()) == 1
    assert resume("@last", settings=settings).to_dict()["published"] == 1
    assert drivers(job) == 2
    assert verify(job, sample=100).ok


def test_a_child_that_is_resumed_alone_lets_its_parent_add_up(
    make_spec: Make, settings: Settings, tmp_path: Path
) -> None:
    files = make_hive(tmp_path / "hive", ["a", "b", "c"])
    hide = Hide([files["b"], files["c"]])
    spec = make_spec(source={"path": str(tmp_path / "hive")}, fan_out={"by": "key", "max_parallel": 1})
    with pytest.raises(ChildrenFailed):
        run(spec, settings=settings, callbacks=[hide])
    hide.bring_back()
    report = resume("@last.b", settings=settings)
    assert report.status == "SCORED"
    parent = find_job(settings.directory, "@last")
    assert parent.status() is Status.FAILED
    stored = parent.read_report()
    assert stored is not None
    assert stored["rows"]["out"] == 2 * ROWS
    assert not (tmp_path / "out").exists()
    # The last that the others waited for.
    assert resume("@last.c", settings=settings).status == "SUCCEEDED"
    assert parent.status() is Status.SUCCEEDED
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["key=a", "key=b", "key=c"]
    assert make_report(parent).rows.output == 3 * ROWS
    assert resume("@last.a", settings=settings).status == "SUCCEEDED"


def test_children_publish_themselves_if_the_spec_asks_for_it(
    make_spec: Make, settings: Settings, tmp_path: Path
) -> None:
    files = make_hive(tmp_path / "hive", ["a", "b", "c"])
    hide = Hide([files["c"]])
    spec = make_spec(
        source={"path": str(tmp_path / "hive")},
        sink={"path": str(tmp_path / "out/${fan_out.value}/scored")},
        fan_out={"by": "key", "max_parallel": 1, "publish": "each"},
    )
    with pytest.raises(ChildrenFailed) as caught:
        run(spec, settings=settings, callbacks=[hide])
    assert caught.value.message == "1 of 3 children failed"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]
    hide.bring_back()
    report = resume("@last", settings=settings)
    assert report.status == "SUCCEEDED"
    assert [drivers(child) for child in find_job(settings.directory, "@last").children()] == [1, 1, 2]
    assert len(published(tmp_path / "out/c/scored")) == ROWS


def test_children_of_a_column_share_out_every_row(
    make_spec: Make, settings: Settings, lake: Any, model_path: Path, tmp_path: Path
) -> None:
    report = run(make_spec(fan_out={"by": "segment"}), settings=settings)
    assert report.status == "SUCCEEDED"
    assert report.rows.output == lake.rows
    parts = [published(folder) for folder in sorted((tmp_path / "out").iterdir())]
    everything = pd.concat(parts).sort_values("id", ignore_index=True)
    expected = oracle(lake.files, model_path).sort_values("id", ignore_index=True)
    for frame in (everything, expected):
        frame["segment"] = frame["segment"].astype("object")
    pd.testing.assert_frame_equal(everything, expected)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "segment=__HIVE_DEFAULT_PARTITION__",
        "segment=gold",
        "segment=silver",
    ]


def test_a_model_and_a_limit_for_each_child(make_spec: Make, settings: Settings, tmp_path: Path) -> None:
    files = make_hive(tmp_path / "hive", ["a", "b"])
    models = {key: train_model(tmp_path / f"{key}.ubj", rounds=3 + number) for number, key in enumerate("ab")}
    spec = make_spec(
        source={"path": str(tmp_path / "hive/key=${fan_out.value}")},
        score={"model": str(tmp_path / "${fan_out.value}.ubj")},
        maps=("steps_for_tests:fail_on_thirteens",),
        errors={"max_fraction": 0.5},
        fan_out={"by": ["a", "b"]},
    )
    report = run(spec, settings=settings)
    # Of 120 rows, ids 13 and 113: one in each child.
    assert report.status == "SUCCEEDED_WITH_WARNINGS"
    assert report.rows.to_dict() == {"in": 2 * ROWS, "out": 2 * ROWS - 2, "rejected": 2, "filtered": 0}
    assert [child.rows.rejected for child in report.children] == [1, 1]
    job = find_job(settings.directory, "@last")
    summary = summarise(job)
    assert (summary.total, len(summary.files)) == (2, 2)
    for key in "ab":
        expected = oracle([files[key]], models[key])
        expected = expected[expected["id"] % 100 != 13].reset_index(drop=True)
        pd.testing.assert_frame_equal(published(tmp_path / f"out/value={key}"), expected)


def test_a_retry_of_one_child_makes_another_commit(
    make_spec: Make, settings: Settings, model_path: Path, tmp_path: Path
) -> None:
    """The commit of the fan-out names the manifests that its children published last."""
    make_hive(tmp_path / "hive", ["a", "b"])
    spec = make_spec(
        source={"path": str(tmp_path / "hive")},
        maps=("steps_for_tests:fail_on_thirteens",),
        errors={"max_fraction": 0.5},
        fan_out={"by": "key", "publish": "each"},
    )
    assert run(spec, settings=settings).status == "SUCCEEDED_WITH_WARNINGS"
    job = find_job(settings.directory, "@last")
    child = job.children()[0]
    overrides = ("steps=" + json.dumps([{"score": {"model": str(model_path)}}]),)
    assert retry(child.id, overrides=overrides, settings=settings).status == "SUCCEEDED"
    commit = last_commit(job)
    assert commit is not None
    assert (commit.number, [part.manifest for part in commit.children]) == (2, [2, 1])
    assert commit.rows.to_dict() == {"in": 2 * ROWS, "out": 2 * ROWS - 1, "rejected": 1, "filtered": 0}
    report = job.read_report()
    assert report is not None
    assert (report["status"], report["rows"]["out"]) == ("SUCCEEDED_WITH_WARNINGS", 2 * ROWS - 1)


def test_a_fan_out_that_is_cancelled_cancels_its_children(
    make_spec: Make, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_hive(tmp_path / "hive", ["a", "b", "c"])
    is_asked = threading.Event()
    request = FanOutStop.request

    def noted(self: FanOutStop, *arguments: Any, **options: Any) -> None:
        request(self, *arguments, **options)
        is_asked.set()

    class Cancel(Callback):
        def on_status(self, event: StatusChanged) -> None:
            if event.after == Status.RUNNING:
                cancel_job(find_job(settings.directory, event.job), reason="not wanted")
                # Its driver looks for the request now and then; no child has begun before it has.
                assert is_asked.wait(120)

    monkeypatch.setattr(FanOutStop, "request", noted)
    spec = make_spec(source={"path": str(tmp_path / "hive")}, fan_out={"by": "key"})
    with pytest.raises(Cancelled):
        run(spec, settings=settings, callbacks=[Cancel()])
    job = find_job(settings.directory, "@last")
    assert job.status() is Status.CANCELLED
    assert not (tmp_path / "out").exists()
    assert resume("@last", settings=settings).status == "SUCCEEDED"


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["a child is scored", "all are scored", "a child is published", "all are published"])
def test_a_fan_out_whose_driver_is_killed_is_completed(
    moment: str, settings: Settings, model_path: Path, tmp_path: Path
) -> None:
    files = make_hive(tmp_path / "hive", ["a", "b", "c", "d"])
    (tmp_path / "job.yaml").write_text(
        f"name: hive\nsource: {{path: {tmp_path}/hive}}\nsteps: [{{score: {{model: {model_path}}}}}]\n"
        f"sink: {{path: {tmp_path}/out}}\nfan_out: {{by: key, max_parallel: 2}}\n"
    )
    arguments = [sys.executable, "-m", "pipeline"]
    options = ["--directory", settings.directory, "--cluster", str(settings.cluster), "-q"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "STOP_AT": moment}
    code = "import kill_for_tests; kill_for_tests.main()"
    environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent)
    died = subprocess.run(
        [sys.executable, "-c", code, "run", str(tmp_path / "job.yaml"), "--job", "hive-1", *options],
        env=environment,
        cwd=tmp_path,
        check=False,
        timeout=300,
    )
    assert died.returncode == -signal.SIGKILL
    job = find_job(settings.directory, "hive-1")
    before = {child.id: receipts(child) for child in job.children()}
    if moment in ("a child is scored", "all are scored"):
        assert not (tmp_path / "out").exists()
    subprocess.run([*arguments, "resume", "hive-1", *options], env=environment, cwd=tmp_path, check=True, timeout=300)
    assert job.status() is Status.SUCCEEDED
    for child in job.children():
        assert before[child.id].items() <= receipts(child).items()
        assert child.manifests.numbers() == [1]
        key = child.id.rpartition(".")[2]
        found = published(tmp_path / f"out/key={key}").drop(columns="key")
        pd.testing.assert_frame_equal(found, oracle([files[key]], model_path))
    commit = last_commit(job)
    assert commit is not None
    assert (commit.number, commit.rows.output) == (1, 4 * ROWS)
