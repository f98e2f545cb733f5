"""Garbage collection: removable files, and above all files that must stay."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.driver.retry import find_rejected
from pipeline.errors import SpecError
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.lease import hold_lease
from pipeline.jobs.listing import list_jobs
from pipeline.jobs.splits import split_receipt
from pipeline.jobs.status import Status
from pipeline.report.rejects import read_rejected, summarise
from pipeline.report.verify import verify
from pipeline.scoring.reject_masking import RejectMask
from pipeline.service.gc import is_old, lost_attempts, parse_age, sweep_job, sweep_root
from pipeline.service.queue import Submission, put_submission
from pipeline.sinks import publish
from pipeline.storage import local
from pipeline.testing.jobs import SmallJob, open_retry, read_output, small_job, write_receipt, write_receipts

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
LATER = NOON + timedelta(days=31)
MONTH = timedelta(days=30)


@pytest.fixture
def job(tmp_path: Path) -> SmallJob:
    return small_job(tmp_path / "lake", sink=str(tmp_path / "out"), bad_every=10)


@pytest.fixture
def directory(tmp_path: Path, job: SmallJob) -> JobDirectory:
    return JobDirectory.create(tmp_path / "jobs", job.plan, job="small-1", options=JobOptions(now=lambda: NOON))


def finish(directory: JobDirectory, job: SmallJob) -> None:
    receipts = write_receipts(directory, job)
    directory.set_status(Status.PUBLISHING)
    publish(directory.manifests.commit(directory.manifests.prepare(directory.ledger(receipts))).manifest, directory)
    directory.set_status(Status.SUCCEEDED_WITH_WARNINGS)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return all files except those of leases, which a sweep changes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "lease")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def found(directory: JobDirectory, *, delete: bool = False, older_than: timedelta | None = None) -> dict[str, str]:
    """Return the kind of each leftover by its path in the folder above the job directories."""
    sweep = sweep_job(directory, now=LATER, older_than=older_than, delete=delete)
    top = Path(directory.root).parents[1]
    return {os.path.relpath(one.path, top): one.kind for one in sweep.leftovers}


def litter(directory: JobDirectory, *names: str) -> None:
    for name in names:
        path = Path(directory.root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
        os.utime(path, (NOON.timestamp(), NOON.timestamp()))


def test_only_what_a_receipt_decided_against_is_lost() -> None:
    """A file is lost if its partition is settled and no receipt names the file."""
    names = ["data/00000-a.parquet", "data/00000-b.parquet", "data/00001-a.parquet", "data/00001.0-a.parquet"]
    assert lost_attempts(names, named={names[0]}, settled={"00000"}) == [names[1]]
    assert lost_attempts(names, named={names[0]}, settled={"00000", "00001"}) == [names[1], names[2]]
    assert lost_attempts(names, named={names[0]}, settled=None) == names[1:]


@pytest.mark.parametrize(("text", "hours"), [("30d", 720), ("12h", 12), (" 2 w ", 336)])
def test_ages(text: str, hours: int) -> None:
    """An age is a number with the unit h, d or w."""
    assert parse_age(text) == timedelta(hours=hours)


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1.5d", "30 days"])
def test_invalid_age_is_refused(text: str) -> None:
    """Text without number or unit, and negative or fractional ages, raise `SpecError`."""
    with pytest.raises(SpecError):
        parse_age(text)


def test_age_counts_from_the_last_event() -> None:
    """A job is old from its last event on; without a valid time it is not old."""
    events = [{"time": "2026-01-01T12:00:00.000Z"}, {"time": "2026-01-02T12:00:00.000Z"}]
    assert not is_old(events, now=NOON + timedelta(days=30), age=MONTH)
    assert is_old(events, now=NOON + timedelta(days=31), age=MONTH)
    assert not is_old([], now=LATER, age=MONTH)
    assert not is_old([{"time": "soon"}], now=LATER, age=MONTH)


def test_a_job_that_runs_keeps_what_may_still_count(directory: JobDirectory, job: SmallJob) -> None:
    """In an unfinished job, files of partitions without a receipt stay: their attempt may still commit."""
    write_receipt(directory, job, job.plan.partitions[0])
    lost = ("rounds/0/data/00000-zombie.parquet", "rounds/0/rejects/00000-zombie.parquet")
    kept = ("rounds/0/data/00001-zombie.parquet", "rounds/0/receipts/.00001.json.x.tmp")
    litter(directory, *lost, *kept, ".report.json.x.tmp", "rounds/0/merged/part-0.parquet")
    sweep = sweep_job(directory, now=LATER)
    assert found(directory, delete=True) == {
        **{f"jobs/small-1/{name}": "attempt" for name in lost},
        "jobs/small-1/.report.json.x.tmp": "unfinished",
        "jobs/small-1/rounds/0/merged": "merged",
    }
    assert sweep.kept.startswith("1 file of partitions without a receipt")
    assert sum(one.bytes for one in sweep.leftovers) == 4 * 5
    assert all(directory.store.path(name).exists() for name in kept)  # type: ignore[attr-defined]
    # The zombie's receipt lands after all, and counts.
    write_receipt(directory, job, job.plan.partitions[1], attempt="zombie")
    finish(directory, job)
    assert verify(directory, sample=0).ok


def test_a_finished_job_keeps_what_counts_and_loses_the_rest(
    tmp_path: Path, directory: JobDirectory, job: SmallJob
) -> None:
    """In a finished job all leftovers are removed, and nothing else; a dry run changes nothing."""
    finish(directory, job)
    clean = snapshot(tmp_path)
    litter(directory, "rounds/0/data/00001-b.parquet", "rounds/0/receipts/.00001.json.x.tmp")
    dirty = snapshot(tmp_path)
    assert len(found(directory)) == 2
    assert snapshot(tmp_path) == dirty, "a dry run changes nothing"
    assert len(found(directory, delete=True)) == 2
    assert snapshot(tmp_path) == clean
    assert found(directory, delete=True) == {}
    assert verify(directory, sample=0).ok


def test_the_file_of_who_cut_stays_until_the_first_part_has_a_receipt(directory: JobDirectory, job: SmallJob) -> None:
    """Files of the attempt that split a partition stay until the first part has a receipt."""
    part = job.plan.partitions[0]
    cut = split_receipt(part.id, (10,), plan=directory.record.plan, model="m", attempt="cutter")
    directory.store.put_if_absent("rounds/0/receipts/00000.json", cut.to_json_bytes())
    mine = [f"rounds/0/{kind}/00000-cutter.parquet" for kind in ("data", "rejects")]
    litter(directory, *mine, "rounds/0/data/00000-loser.parquet")
    assert found(directory) == {"jobs/small-1/rounds/0/data/00000-loser.parquet": "attempt"}
    first = split_receipt("00000.0", (5,), plan=directory.record.plan, model="m", attempt="driver")
    directory.store.put_if_absent("rounds/0/receipts/00000.0.json", first.to_json_bytes())
    assert {f"jobs/small-1/{name}" for name in mine} < set(found(directory))


def test_a_split_partition_needs_none_of_its_files(directory: JobDirectory, job: SmallJob) -> None:
    """A receipt that splits a partition settles it: files of the whole are leftovers."""
    whole = write_receipt(directory, job, job.plan.partitions[0], attempt="whole")
    directory.store.remove("rounds/0/receipts/00000.json")
    assert found(directory) == {}
    split = split_receipt("00000", (10,), plan=whole.plan, model="m", attempt="driver")
    directory.store.put_if_absent("rounds/0/receipts/00000.json", split.to_json_bytes())
    litter(directory, "rounds/0/data/00000.0-a.parquet")
    assert found(directory) == {
        "jobs/small-1/rounds/0/data/00000-whole.parquet": "attempt",
        "jobs/small-1/rounds/0/rejects/00000-whole.parquet": "attempt",
    }


def test_folders_beside_the_sink(tmp_path: Path, directory: JobDirectory, job: SmallJob) -> None:
    """Staging folders of the job beside the sink are removed, except those with foreign files."""
    receipts = write_receipts(directory, job)
    directory.manifests.commit(directory.manifests.prepare(directory.ledger(receipts)))
    half, foreign, others = (
        tmp_path / ".out~small-1~1~aaaaaaaa",
        tmp_path / ".out~small-1~1~bbbbbbbb",
        tmp_path / ".out~small-2~1~aaaaaaaa",
    )
    for folder in (half, foreign, others):
        folder.mkdir()
    (foreign / "thesis.tex").write_text("x")
    assert found(directory, delete=True) == {".out~small-1~1~aaaaaaaa": "staging"}
    assert not half.exists()
    assert foreign.exists()
    assert others.exists()


def test_files_in_the_sink_that_no_publication_lists(tmp_path: Path, directory: JobDirectory, job: SmallJob) -> None:
    """Files that the job left in its sink before it was to commit are removed; files of others and listed ones stay."""
    finish(directory, job)
    out = tmp_path / "out"
    before = sorted(os.listdir(out))
    part = next(out.glob("*.parquet"))
    own = part.name.replace("-1.parquet", "-1-aaaaaaaa.parquet")
    other = re.sub("-[0-9a-f]{8}-1.parquet", "-00000000-1-aaaaaaaa.parquet", part.name)
    for name in (own, other, "mine.parquet"):
        shutil.copy(part, out / name)
    assert found(directory) == {f"out/{own}": "unlisted"}
    assert found(directory, delete=True) == {f"out/{own}": "unlisted"}
    assert sorted(os.listdir(out)) == sorted([*before, other, "mine.parquet"])


@pytest.mark.fault(75)
def test_a_file_that_another_process_is_writing_stays(directory: JobDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that submits while the job is swept finds its unfinished file."""
    link, sweeps = local._link, []

    def slow(unfinished: Path, target: Path) -> bool:
        if "submissions" in str(target):
            sweeps.append(sweep_job(JobDirectory.open(directory.root), now=datetime.now(UTC), delete=True))
        return link(unfinished, target)

    monkeypatch.setattr(local, "_link", slow)
    put_submission(directory.store, Submission(1, "2026-01-01T00:00:00Z", "me", "by hand", "k"))
    assert [sweep.leftovers for sweep in sweeps] == [()]


def test_job_of_a_running_driver_is_left_alone(directory: JobDirectory, job: SmallJob) -> None:
    """While a driver holds the lease, nothing is removed."""
    write_receipts(directory, job)
    litter(directory, "rounds/0/data/00001-b.parquet")
    with hold_lease(directory.store, lease_seconds=0.06):
        sweep = sweep_job(directory, now=LATER, lease_seconds=30, delete=True)
    assert sweep.leftovers == ()
    assert sweep.kept.startswith("another driver runs this job: process ")
    assert len(found(directory)) == 1


def test_a_damaged_receipt_stops_the_removal(directory: JobDirectory, job: SmallJob) -> None:
    """If a receipt is damaged, nothing of the job is removed."""
    write_receipts(directory, job)
    litter(directory, "rounds/0/data/00001-b.parquet")
    directory.store.replace("rounds/0/receipts/00001.json", b"{")
    before = snapshot(Path(directory.root))
    sweep = sweep_job(directory, now=LATER, older_than=MONTH, delete=True)
    assert sweep.leftovers == ()
    assert sweep.kept.startswith("StateCorrupt: a receipt is damaged")
    assert snapshot(Path(directory.root)) == before


def test_old_jobs_go_and_their_output_stays(tmp_path: Path, directory: JobDirectory, job: SmallJob) -> None:
    """A finished job older than the age is removed; its output stays."""
    finish(directory, job)
    assert found(directory, older_than=timedelta(days=32)) == {}
    assert found(directory, older_than=MONTH) == {"jobs/small-1": "job"}
    assert Path(directory.root).exists()
    assert found(directory, older_than=MONTH, delete=True) == {"jobs/small-1": "job"}
    assert os.listdir(tmp_path / "jobs") == []
    assert read_output(tmp_path / "out").num_rows == job.expected.num_rows


def unfinished(directory: JobDirectory, job: SmallJob) -> None:
    write_receipts(directory, job)
    directory.set_status(Status.FAILED)


def unpublished(directory: JobDirectory, job: SmallJob) -> None:
    directory.manifests.commit(directory.manifests.prepare(directory.ledger(write_receipts(directory, job))))
    directory.set_status(Status.PUBLISHING)
    directory.set_status(Status.SUCCEEDED)


@pytest.mark.parametrize("make", [unfinished, unpublished])
def test_old_jobs_whose_output_is_not_whole_stay(
    directory: JobDirectory, job: SmallJob, make: Callable[[JobDirectory, SmallJob], None]
) -> None:
    """Old jobs that failed, or whose output was not published, stay."""
    make(directory, job)
    before = snapshot(Path(directory.root))
    sweep = sweep_job(directory, now=LATER, older_than=MONTH, delete=True)
    assert sweep.leftovers == ()
    assert sweep.kept
    assert snapshot(Path(directory.root)) == before


def test_a_removal_that_was_cut_short_is_finished(
    tmp_path: Path, directory: JobDirectory, job: SmallJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job whose removal crashed is not listed, and the next sweep of the root removes the rest."""
    finish(directory, job)

    def die(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            found(directory, older_than=MONTH, delete=True)
    (left,) = os.listdir(tmp_path / "jobs")
    assert left.startswith(".small-1.")
    assert list_jobs(tmp_path / "jobs") == ()
    (one,) = sweep_root(tmp_path / "jobs").leftovers
    assert one.bytes > 0
    sweep_root(tmp_path / "jobs", delete=True)
    assert os.listdir(tmp_path / "jobs") == []


def test_on_an_object_store(tmp_path: Path) -> None:
    """Leftovers and old jobs are removed on an object store too."""
    job = small_job(tmp_path / "lake", sink="memory://gc/out")
    directory = JobDirectory.create("memory://gc/jobs", job.plan, job="small-1", options=JobOptions(now=lambda: NOON))
    finish(directory, job)
    directory.store.replace("rounds/0/data/00001-b.parquet", b"12345")
    (one,) = sweep_job(directory, now=LATER, delete=True).leftovers
    assert (one.kind, one.path, one.bytes) == ("attempt", "memory://gc/jobs/small-1/rounds/0/data/00001-b.parquet", 5)
    (one,) = sweep_job(directory, now=LATER, older_than=MONTH, delete=True).leftovers
    assert one.kind == "job"
    assert one.bytes > 1000
    assert not directory.store.exists("job.json")
    assert read_output("memory://gc/out").num_rows == job.expected.num_rows


def test_command_shows_first_and_removes_with_yes(
    tmp_path: Path, directory: JobDirectory, job: SmallJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``gc`` only lists leftovers; ``gc --yes`` removes them."""
    monkeypatch.chdir(tmp_path)
    finish(directory, job)
    litter(directory, "rounds/0/data/00001-b.parquet")
    path = str(Path(directory.root, "rounds/0/data/00001-b.parquet"))
    shown = CliRunner().invoke(main, ["gc", "--directory", "jobs"])
    assert shown.exit_code == 0, shown.output
    assert shown.output.splitlines() == [
        "Nothing was removed. Found one thing that counts nowhere: 5 B.",
        f"  attempt         5 B  {path}",
        "  next       python -m pipeline gc small-1 --yes",
    ]
    assert os.path.exists(path)
    told = CliRunner().invoke(main, ["gc", "--all", "--yes", "--json", "--directory", "jobs"])
    result = json.loads(told.output)
    assert (result["removed"], result["bytes"]) == (True, 5)
    assert result["jobs"][0]["leftovers"] == [{"kind": "attempt", "path": path, "bytes": 5}]
    assert not os.path.exists(path)
    again = CliRunner().invoke(main, ["gc", "small-1", "--directory", "jobs"])
    assert again.output == "nothing to remove\n"
    wrong = CliRunner().invoke(main, ["gc", "small-1", "--all"])
    assert wrong.exit_code == 2


class TestRetention:
    """``errors.retain`` of a job whose last event is 31 days old."""

    @pytest.fixture
    def retained(self, tmp_path: Path, job: SmallJob) -> Callable[[str], JobDirectory]:
        def make(retain: str) -> JobDirectory:
            errors = job.plan.spec.errors.model_copy(update={"retain": retain})
            plan = replace(job.plan, spec=job.plan.spec.model_copy(update={"errors": errors}))
            now = JobOptions(now=lambda: NOON)
            directory = JobDirectory.create(tmp_path / "jobs", plan, job="small-1", options=now)
            finish(directory, replace(job, plan=plan))
            return directory

        return make

    def test_not_yet_due(self, retained: Callable[[str], JobDirectory]) -> None:
        assert found(retained("32 days"), delete=True) == {}

    def test_removal(self, retained: Callable[[str], JobDirectory]) -> None:
        """The rows go, the counts stay; a retry, an export and a check say so."""
        directory = retained("30 days")
        names = {f"jobs/small-1/rounds/0/rejects/0000{number}-a.parquet" for number in range(3)}
        assert found(directory) == dict.fromkeys(names, "rejects")
        assert summarise(directory).groups[0].examples
        assert found(directory, delete=True) == dict.fromkeys(names, "rejects")
        assert found(directory, delete=True) == {}
        assert not list(Path(directory.root).glob("rounds/*/rejects/*"))
        summary = summarise(directory)
        assert (summary.total, summary.files, summary.groups[0].examples) == (8, (), ())
        assert "2026-02-01" in summary.removed
        assert "removed on 2026-02-01" in summary.text()
        with pytest.raises(SpecError, match="no longer stored"):
            list(read_rejected(directory))
        with pytest.raises(SpecError, match="cannot be retried") as refused:
            open_retry(directory)
        assert "errors.retain" in refused.value.found
        proof = {check.name: check for check in verify(directory, sample=0).checks}
        assert proof["rejects"].ok
        assert "2026-02-01" in proof["rejects"].detail


def test_masked_rows_are_not_retried(directory: JobDirectory, job: SmallJob) -> None:
    """But fixed files are, beside them."""
    receipts = write_receipts(directory, job)
    for receipt in receipts:
        assert receipt.rejects
        path = directory.store.path(f"rounds/0/{receipt.rejects.name}")
        table = pq.read_table(path).drop_columns(["x"])
        path.unlink()
        pq.write_table(table.replace_schema_metadata(RejectMask(left_out=("x",)).metadata), path)
    with pytest.raises(SpecError, match="cannot be retried") as refused:
        open_retry(directory)
    assert "values of x" in refused.value.found
    assert find_rejected(directory.store, directory.ledger(), threads=1, skips_masked=True).rows == 0
