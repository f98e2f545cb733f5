"""Files that a publication may remove, and files that other publications may still need."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import Fenced, OutputConflict
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.manifest import Manifest
from pipeline.sinks import PublishedFile, find_strays, publish
from pipeline.sinks.parquet import cleanup, layout, swap
from pipeline.sinks.parquet.publication import Publisher
from pipeline.storage.store import open_store
from pipeline.testing.jobs import SmallJob, read_output, small_job, write_receipts
from pipeline.testing.stores import Crash, disk_full


def run(tmp_path: Path, job: SmallJob, name: str) -> tuple[JobDirectory, Manifest]:
    directory = JobDirectory.open_or_create(tmp_path / "jobs", job.plan, job=name)
    write_receipts(directory, job)
    manifest = directory.manifests.commit(directory.manifests.prepare(directory.ledger())).manifest
    publish(manifest, directory)
    return directory, manifest


def state_of(folder: Path) -> layout.SinkState:
    state = layout.read_state(open_store(folder))
    assert state is not None
    return state


def is_success(folder: Path) -> bool:
    return (folder / "_SUCCESS").read_bytes() == layout.success_text(state_of(folder))


def name_of(job: str, number: int, *, partition: str = "00000", attempt: str = "") -> str:
    attempt = f"-{attempt}" if attempt else ""
    return f"part-{partition}-{layout.job_tag(job)}-{number}{attempt}.parquet"


def publication(job: str, number: int = 1, *, mode: str = "append", **fields: object) -> layout.Publication:
    file = PublishedFile(name_of(job, number), 1, 1, "")
    return layout.Publication(job, number, mode, (file,), **fields)  # type: ignore[arg-type]


NAMES = {
    "own file that counts": name_of("own", 2),
    "own file of an earlier manifest": name_of("own", 1, attempt="aaaaaaaa"),
    "own file of a later manifest": name_of("own", 3, attempt="aaaaaaaa"),
    "other job's file that counts": name_of("other", 1),
    "other job's file that does not count": name_of("other", 1, attempt="aaaaaaaa"),
    "overwritten job's file": name_of("gone", 1),
    "unknown job's file": name_of("unknown", 1, attempt="aaaaaaaa"),
    "file without a job": "old.parquet",
    "replaced file": "replaced.parquet",
    "no Parquet": "notes.txt",
}


@pytest.mark.parametrize(
    ("mode", "is_last", "is_locked", "is_abandoned", "expected"),
    [
        ("append", True, False, True, {"own file of an earlier manifest", "overwritten job's file", "replaced file"}),
        (
            "append",
            True,
            True,
            True,
            {
                "own file of an earlier manifest",
                "own file of a later manifest",
                "overwritten job's file",
                "replaced file",
            },
        ),
        (
            "overwrite",
            True,
            False,
            False,
            {
                "own file of an earlier manifest",
                "overwritten job's file",
                "replaced file",
                "file without a job",
            },
        ),
        (
            "overwrite",
            True,
            False,
            True,
            {
                "own file of an earlier manifest",
                "overwritten job's file",
                "replaced file",
                "file without a job",
                "unknown job's file",
                "other job's file that does not count",
            },
        ),
        (
            "overwrite",
            True,
            True,
            False,
            set(NAMES) - {"own file that counts", "other job's file that counts", "no Parquet"},
        ),
        (
            "overwrite",
            False,
            False,
            True,
            {"own file of an earlier manifest", "overwritten job's file", "replaced file"},
        ),
    ],
)
def test_files_that_can_never_count_again(
    mode: str, is_last: bool, is_locked: bool, is_abandoned: bool, expected: set[str]
) -> None:
    own, other = publication("own", 2, mode=mode, replaces=("replaced.parquet",)), publication("other")
    order = (other, own) if is_last else (own, other)
    state = layout.SinkState(order, "", (("gone", 1),))
    found = cleanup.removable(NAMES.values(), state, own, is_locked=is_locked, is_abandoned=lambda name: is_abandoned)
    texts = {name: text for text, name in NAMES.items()}
    assert {texts[name] for name in found} == expected


@pytest.mark.fault(71)
def test_success_is_of_the_state_that_is_there(tmp_path: Path) -> None:
    """A missing and a wrong ``_SUCCESS`` are written, and a right one stays as it is."""
    out = tmp_path / "out"
    run(tmp_path, small_job(tmp_path / "lake", sink=str(out)), "a-1")
    place, store = out / "_SUCCESS", open_store(out)
    before = place.stat().st_ino
    cleanup.settle_success(store)
    assert place.stat().st_ino == before
    for spoil in (place.unlink, lambda: place.write_text("{}")):
        spoil()
        cleanup.settle_success(store)
        assert is_success(out)


@pytest.mark.fault(71)
def test_a_publisher_that_fails_leaves_the_mark_of_the_state_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an object store another job publishes meanwhile; then this one's storage is full."""
    url = f"memory://{tmp_path.name}/out"
    run(tmp_path, small_job(tmp_path / "l0", sink=url, mode="append"), "a-1")
    add = Publisher._add_in_place

    def full(self: Publisher, piece: object) -> object:
        if self.manifest.job == "b-1":
            run(tmp_path, small_job(tmp_path / "l2", sink=url, mode="append", start=200), "c-1")
            raise disk_full()
        return add(self, piece)  # type: ignore[arg-type]

    monkeypatch.setattr(Publisher, "_add_in_place", full)
    with pytest.raises(OSError, match="space"):
        run(tmp_path, small_job(tmp_path / "l1", sink=url, mode="append", start=100), "b-1")
    store = open_store(url)
    state = layout.read_state(store)
    assert state is not None
    assert [one.job for one in state.publications] == ["a-1", "c-1"]
    assert store.read("_SUCCESS") == layout.success_text(state)
    assert layout.uncounted(store.list(), state) == []


@pytest.mark.fault(70)
def test_files_of_a_job_that_never_published_are_not_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A job dies before its commit, another one appends, the first is resumed: every row counts once."""
    out = tmp_path / "out"
    out.mkdir()
    pq.write_table(pa.table({"id": [1], "p": pa.array([2.0], pa.float32())}), out / "old.parquet")
    job = small_job(tmp_path / "la", sink=str(out), mode="append", start=100, rows=(30, 5))
    directory = JobDirectory.create(tmp_path / "jobs", job.plan, job="a-1")
    manifest = directory.manifests.commit(directory.manifests.prepare(directory.ledger(write_receipts(directory, job))))

    def die(self: Publisher, *_: object) -> None:
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(Publisher, "after", die)
        with pytest.raises(Crash):
            publish(manifest.manifest, directory)
    assert len(list(out.glob("part-*.parquet"))) == 2
    run(tmp_path, small_job(tmp_path / "lb", sink=str(out), mode="append", start=500, rows=(7,)), "b-1")
    assert "2 files of jobs that have not published" in caplog.text
    assert [one.job for one in state_of(out).publications] == ["", "b-1"]
    publish(manifest.manifest, directory)
    assert sum(file.rows for file in state_of(out).files) == 1 + 35 + 7
    assert read_output(out).num_rows == 1 + 35 + 7


@pytest.mark.fault(66)
@pytest.mark.parametrize("mode", ["error", "append"])
def test_file_that_arrives_in_an_empty_sink_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """A tool that takes no lock writes a file right before the swap: it stays."""
    out = tmp_path / "out"
    place = swap.place

    def late(staging: Path, path: Path) -> None:
        path.mkdir(exist_ok=True)
        pq.write_table(pa.table({"id": [1], "p": pa.array([2.0], pa.float32())}), path / "mine.parquet")
        place(staging, path)

    monkeypatch.setattr(swap, "place", late)
    job = small_job(tmp_path / "lake", sink=str(out), mode=mode, start=100, rows=(7,))
    if mode == "error":
        with pytest.raises(OSError, match="there is data"):
            run(tmp_path, job, "a-1")
        assert os.listdir(out) == ["mine.parquet"]
    else:
        run(tmp_path, job, "a-1")
        assert sum(file.rows for file in state_of(out).files) == 8
    assert (out / "mine.parquet").exists()
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


@pytest.mark.fault(67)
def test_a_fenced_driver_makes_no_visible_step(tmp_path: Path) -> None:
    """Fenced at its first, second, third look: the sink is as the last allowed step left it, and its files are gone."""
    out = tmp_path / "out"
    run(tmp_path, small_job(tmp_path / "l0", sink=str(out), mode="append", rows=(9,)), "o-1")
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    for mode, looks in (("overwrite", 1), ("append", 2)):
        job = small_job(tmp_path / mode, sink=str(out), mode=mode, start=100)
        directory = JobDirectory.create(tmp_path / "jobs", job.plan, job=f"{mode}-1")
        manifest = directory.manifests.prepare(directory.ledger(write_receipts(directory, job)))
        for allowed in range(looks):
            calls: list[int] = []

            def check(calls: list[int] = calls, allowed: int = allowed) -> None:
                calls.append(1)
                if len(calls) > allowed:
                    raise Fenced("another driver has taken this job over")

            with pytest.raises(Fenced):
                publish(manifest, directory, check_lease=check)
            # Between steps 1 and 3 the mark of success is absent: the driver that took over writes it.
            kept = {name: data for name, data in before.items() if name != "_SUCCESS" or not allowed}
            assert {name: (out / name).read_bytes() for name in os.listdir(out)} == kept
        cleanup.settle_success(open_store(out))
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith(".")) == []


def test_folders_of_other_jobs_are_not_found(tmp_path: Path) -> None:
    """The staging folder of job ``x-1.de`` (a child of ``x-1``) is none of job ``x``."""
    out = tmp_path / "out"
    paths = {job: swap.staging_path(out, job=job, number=1) for job in ("x-1.de", "x", "x-1", "x-1.deadbeef")}
    for path in paths.values():
        path.mkdir()
    for job, path in paths.items():
        assert swap.find_staging(out, job=job, number=1) == [path]
    half_removed = paths["x"].rename(f"{paths['x']}.01234567")
    assert swap.find_staging(out, job="x", number=1) == [half_removed]


def test_new_parents_of_an_output_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of each new folder is synced in the folder above it."""
    out = tmp_path / "new" / "deep" / "out"
    synced, fsync = set(), os.fsync

    def noted(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    run(tmp_path, small_job(tmp_path / "lake", sink=str(out)), "a-1")
    assert {str(tmp_path), str(tmp_path / "new"), str(tmp_path / "new" / "deep")} <= synced


@pytest.mark.fault(72)
def test_strays_of_a_sink(tmp_path: Path) -> None:
    """Each kind of stray is named; an append looks at its own files only."""
    out = tmp_path / "out"
    directory, manifest = run(tmp_path, small_job(tmp_path / "lake", sink=str(out)), "a-1")
    assert find_strays(manifest, directory) == ()
    part = next(out.glob("part-*.parquet"))
    shutil.copy(part, out / "part-99999-deadbeef-1.parquet")
    assert find_strays(manifest, directory) == (
        "1 Parquet file that no publication lists, such as part-99999-deadbeef-1.parquet",
    )
    (out / "_SUCCESS").write_text("{}")
    assert find_strays(manifest, directory)[1:] == ("_SUCCESS is of another state than _manifest.json",)
    (out / "_SUCCESS").unlink()
    assert find_strays(manifest, directory)[1:] == ("no _SUCCESS",)
    later, appended = run(tmp_path, small_job(tmp_path / "l2", sink=str(out), mode="append", start=500), "b-1")
    assert find_strays(appended, later) == ()
    own = part.name.replace(layout.job_tag("a-1"), layout.job_tag("b-1"))
    shutil.copy(part, out / own)
    assert find_strays(appended, later) == (f"1 Parquet file that no publication lists, such as {own}",)


@pytest.mark.fault(72)
def test_an_older_publication_in_a_sink_that_a_job_overwrote_is_a_stray(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tmp_path, small_job(tmp_path / "l1", sink=str(out), mode="append"), "a-1")
    directory, manifest = run(tmp_path, small_job(tmp_path / "l2", sink=str(out), mode="overwrite", start=99), "b-1")
    state = state_of(out)
    first = layout.Publication("a-1", 1, "append", ())
    changed = layout.SinkState((first, *state.publications), state.schema)
    (out / "_manifest.json").write_bytes(changed.to_json_bytes())
    (out / "_SUCCESS").write_bytes(layout.success_text(changed))
    assert find_strays(manifest, directory) == ("an older publication in a sink of mode overwrite, of a-1",)


def test_a_manifest_that_changes_all_the_time_is_a_conflict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run(tmp_path, small_job(tmp_path / "lake", sink=str(out)), "a-1")
    (out / "_SUCCESS").unlink()
    store = open_store(out)
    monkeypatch.setattr(type(store), "replace_if_unchanged", lambda *_, **__: False)
    with pytest.raises(OutputConflict, match="all the time"):
        cleanup.settle_success(store)
