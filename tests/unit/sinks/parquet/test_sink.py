"""Publishing to Parquet: the view of readers, rejected outputs, and repeated publication without changes."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.common.checksum import checksum_bytes
from pipeline.common.digest import digest_bytes
from pipeline.errors import DiskFull, OutputConflict, OutputExists, RefusedForSafety, SpecError, StateCorrupt
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.manifest import Manifest
from pipeline.sinks import SinkContents, SinkRequest, check, publish, read_published
from pipeline.sinks.parquet import layout, publication, swap
from pipeline.sinks.parquet.sink import ParquetSink
from pipeline.spec.sink import Sink
from pipeline.testing.jobs import SmallJob, read_output, small_job, write_receipts
from pipeline.testing.stores import disk_full


def run(tmp_path: Path, job: SmallJob, name: str) -> tuple[JobDirectory, Manifest, SinkContents]:
    directory = JobDirectory.open_or_create(tmp_path / "jobs", job.plan, job=name)
    write_receipts(directory, job)
    manifest = directory.manifests.commit(directory.manifests.prepare(directory.ledger())).manifest
    return directory, manifest, publish(manifest, directory)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {name: ((folder / name).stat().st_ino, (folder / name).stat().st_mtime_ns) for name in os.listdir(folder)}


def is_success(folder: Path) -> bool:
    """True if ``_SUCCESS`` is of the state of ``_manifest.json``."""
    text = json.loads((folder / "_SUCCESS").read_text())
    return bool(text["manifest_sha256"] == digest_bytes((folder / "_manifest.json").read_bytes()))


def state_of(folder: Path) -> layout.SinkState:
    return layout.SinkState.from_json((folder / "_manifest.json").read_bytes(), where="")


@pytest.fixture(params=["swap", "in place"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run on a file system that can swap folders, and on one that cannot."""
    if request.param == "in place":
        monkeypatch.setattr(swap, "rename_exchange", lambda *_: errno.EINVAL)
        monkeypatch.setattr(os.path, "ismount", lambda *_: True)
    return str(request.param)


def test_error_mode_publishes_every_row_in_order(tmp_path: Path, way: str) -> None:
    job = small_job(tmp_path / "lake", sink=str(tmp_path / "deep" / "out"))
    _, manifest, result = run(tmp_path, job, "a-1")
    out = tmp_path / "deep" / "out"
    assert read_output(out).equals(job.expected)
    assert (result.rows, len(result.files), result.is_new) == (75, 3, True)
    state = state_of(out)
    assert [file.name for file in state.files] == sorted(n for n in os.listdir(out) if n.endswith(".parquet"))
    assert [file.checksum for file in state.files] == [file.checksum for file in manifest.files]
    success = json.loads((out / "_SUCCESS").read_text())
    assert success["manifest_sha256"] == digest_bytes((out / "_manifest.json").read_bytes())
    assert os.listdir(out.parent) == ["out"]


def test_every_usual_reader_reads_it(tmp_path: Path) -> None:
    """pyarrow and pandas read the output folder as one table."""
    import pandas as pd
    import pyarrow.dataset as ds

    job = small_job(tmp_path / "lake", sink=str(tmp_path / "out"))
    run(tmp_path, job, "a-1")
    assert ds.dataset(tmp_path / "out").to_table().num_rows == 75
    assert len(pd.read_parquet(tmp_path / "out")) == 75


def test_publishing_again_changes_nothing(tmp_path: Path, way: str) -> None:
    """A second publication of a manifest leaves every file unchanged."""
    job = small_job(tmp_path / "lake", sink=str(tmp_path / "out"))
    directory, manifest, _ = run(tmp_path, job, "a-1")
    before = listing(tmp_path / "out")
    again = publish(manifest, directory)
    assert not again.is_new
    assert again.rows == 75
    assert listing(tmp_path / "out") == before


def test_output_follows_the_umask(tmp_path: Path, way: str) -> None:
    """Output folder and files have the modes of the umask."""
    before = os.umask(0o022)
    try:
        run(tmp_path, small_job(tmp_path / "lake", sink=str(tmp_path / "out")), "a-1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o644}


def test_error_mode_with_data_there(tmp_path: Path) -> None:
    """In mode ``error``, existing data raises `OutputExists` and stays."""
    out = tmp_path / "out"
    run(tmp_path, small_job(tmp_path / "lake", sink=str(out)), "a-1")
    before = listing(out)
    with pytest.raises(OutputExists, match="5 files") as caught:
        run(tmp_path, small_job(tmp_path / "lake2", sink=str(out), start=100), "b-1")
    assert caught.value.exit_code == 6
    assert "overwrite" in caught.value.next_step
    assert listing(out) == before
    assert sorted(os.listdir(tmp_path)) == ["jobs", "lake", "lake2", "out"]


def test_overwrite_replaces_everything(tmp_path: Path, way: str) -> None:
    """In mode ``overwrite``, only the new rows remain, and the manifest names the replaced job."""
    out = tmp_path / "out"
    run(tmp_path, small_job(tmp_path / "lake", sink=str(out), rows=(9,) * 5), "a-1")
    job = small_job(tmp_path / "lake2", sink=str(out), mode="overwrite", start=100)
    run(tmp_path, job, "b-1")
    assert read_output(out).equals(job.expected)
    state = state_of(out)
    assert [one.job for one in state.publications] == ["b-1"]
    assert state.replaced == (("a-1", 1),)
    assert sorted(os.listdir(tmp_path)) == ["jobs", "lake", "lake2", "out"]


def test_overwrite_keeps_the_mode_of_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o700)
    os.chmod(out, 0o2770)
    pq.write_table(pa.table({"z": [1]}), out / "old.parquet")
    run(tmp_path, small_job(tmp_path / "lake", sink=str(out), mode="overwrite"), "a-1")
    assert stat.S_IMODE(out.stat().st_mode) == 0o2770
    assert not (out / "old.parquet").exists()


def test_a_reader_in_an_overwrite_sees_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader sees the old output before the swap, and the new output right after it."""
    out = tmp_path / "out"
    old = small_job(tmp_path / "lake", sink=str(out))
    run(tmp_path, old, "a-1")
    new = small_job(tmp_path / "lake2", sink=str(out), mode="overwrite", start=500)
    seen = []
    exchange = swap.rename_exchange

    def looked_at(one: bytes, other: bytes) -> int:
        seen.append(read_output(out))
        done = exchange(one, other)
        seen.append(read_output(out))
        return done

    monkeypatch.setattr(swap, "rename_exchange", looked_at)
    run(tmp_path, new, "b-1")
    assert [table.equals(job.expected) for table, job in zip(seen, (old, new), strict=True)] == [True, True]


def test_resuming_a_replaced_job_does_not_bring_it_back(tmp_path: Path, way: str) -> None:
    """A job whose output was replaced publishes nothing when resumed."""
    out = tmp_path / "out"
    old, manifest, _ = run(tmp_path, small_job(tmp_path / "lake", sink=str(out)), "a-1")
    run(tmp_path, small_job(tmp_path / "lake2", sink=str(out), mode="overwrite", start=100), "b-1")
    before = listing(out)
    assert publish(manifest, old).is_replaced
    assert listing(out) == before


def test_append_adds(tmp_path: Path) -> None:
    """In mode ``append``, rows of both jobs remain, and a second publication adds nothing."""
    out = tmp_path / "out"
    one = small_job(tmp_path / "lake", sink=str(out), mode="append")
    two = small_job(tmp_path / "lake2", sink=str(out), mode="append", start=100)
    run(tmp_path, one, "a-1")
    directory, manifest, result = run(tmp_path, two, "b-1")
    assert result.rows == 75
    both = pa.concat_tables([one.expected, two.expected]).combine_chunks()
    assert read_output(out).sort_by("id").equals(both.sort_by("id"))
    assert [publication.job for publication in state_of(out).publications] == ["a-1", "b-1"]
    assert not publish(manifest, directory).is_new
    assert len(state_of(out).files) == 6


def test_append_counts_what_was_there_before(tmp_path: Path) -> None:
    """In mode ``append``, files from before are part of the manifest."""
    out = tmp_path / "out"
    out.mkdir()
    pq.write_table(pa.table({"id": [1], "p": pa.array([2.0], pa.float32())}), out / "old.parquet")
    run(tmp_path, small_job(tmp_path / "lake", sink=str(out), mode="append"), "a-1")
    state = state_of(out)
    assert sum(file.rows for file in state.files) == 76
    assert state.files[0].name == "old.parquet"


@pytest.mark.parametrize("has_manifest", [True, False])
def test_append_of_another_schema_is_refused(tmp_path: Path, has_manifest: bool) -> None:
    out = tmp_path / "out"
    if has_manifest:
        run(tmp_path, small_job(tmp_path / "lake", sink=str(out)), "a-1")
        state = state_of(out)
        other = pa.schema([("id", pa.int32()), ("extra", pa.string()), ("p", pa.float32())])
        text = layout.SinkState(state.publications, other.serialize().to_pybytes().hex()).to_json_bytes()
        (out / "_manifest.json").write_bytes(text)
    else:
        out.mkdir()
        columns = {"id": pa.array([1], pa.int32()), "extra": ["x"], "p": pa.array([1.0], pa.float32())}
        pq.write_table(pa.table(columns), out / "old.parquet")
    before = listing(out)
    with pytest.raises(OutputConflict, match="id: int32 -> int64; extra: string -> missing"):
        run(tmp_path, small_job(tmp_path / "lake2", sink=str(out), mode="append"), "b-1")
    assert listing(out) == before


def test_append_beside_folders_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out" / "day=1").mkdir(parents=True)
    with pytest.raises(OutputConflict, match="day=1/"):
        run(tmp_path, small_job(tmp_path / "lake", sink=str(tmp_path / "out"), mode="append"), "a-1")


@pytest.mark.parametrize("foreign", ["notes.txt", "sub/", "fake.parquet", ".hidden"])
def test_overwrite_never_removes_what_is_no_output(tmp_path: Path, foreign: str) -> None:
    """In mode ``overwrite``, a foreign file or folder raises `RefusedForSafety`, and nothing changes."""
    out = tmp_path / "out"
    run(tmp_path, small_job(tmp_path / "lake", sink=str(out)), "a-1")
    if foreign.endswith("/"):
        (out / foreign).mkdir()
    else:
        (out / foreign).write_text("mine")
    before = listing(out)
    with pytest.raises(RefusedForSafety, match=foreign.rstrip("/")) as caught:
        run(tmp_path, small_job(tmp_path / "lake2", sink=str(out), mode="overwrite"), "b-1")
    assert caught.value.exit_code == 7
    assert listing(out) == before


def test_file_that_arrives_in_the_old_folder_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that arrives in the old folder during the swap is kept beside the output."""
    out = tmp_path / "out"
    run(tmp_path, small_job(tmp_path / "lake", sink=str(out)), "a-1")
    exchange = swap.rename_exchange

    def late(one: bytes, other: bytes) -> int:
        (out / "notes.txt").write_text("mine")
        return exchange(one, other)

    monkeypatch.setattr(swap, "rename_exchange", late)
    job = small_job(tmp_path / "lake2", sink=str(out), mode="overwrite", start=100)
    run(tmp_path, job, "b-1")
    assert read_output(out).equals(job.expected)
    assert [path.read_text() for path in tmp_path.glob(".out~*/notes.txt")] == ["mine"]


def test_a_file_in_the_way(tmp_path: Path) -> None:
    """A file at the output path raises `RefusedForSafety` in every mode."""
    (tmp_path / "out").write_text("mine")
    for mode in ("error", "overwrite", "append"):
        with pytest.raises(RefusedForSafety):
            run(tmp_path, small_job(tmp_path / "lake", sink=str(tmp_path / "out"), mode=mode), f"{mode}-1")
    assert (tmp_path / "out").read_text() == "mine"


def test_symlinked_output_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    old = small_job(tmp_path / "lake", sink=str(tmp_path / "out"))
    run(tmp_path, old, "a-1")
    job = small_job(tmp_path / "lake2", sink=str(tmp_path / "out"), mode="overwrite", start=100)
    run(tmp_path, job, "b-1")
    assert (tmp_path / "out").is_symlink()
    assert read_output(tmp_path / "real").equals(job.expected)


def test_empty_output_has_the_schema(tmp_path: Path) -> None:
    job = small_job(tmp_path / "lake", sink=str(tmp_path / "out"), rows=(0, 0))
    _, _, result = run(tmp_path, job, "a-1")
    assert result.rows == 0
    assert pq.read_table(tmp_path / "out").schema.names == ["id", "p"]


@pytest.mark.parametrize("mode", ["error", "append"])
def test_small_files_are_merged(tmp_path: Path, mode: str) -> None:
    """Files below the target size become one file with all rows and a correct digest."""
    out = tmp_path / "out"
    if mode == "append":
        out.mkdir()
        pq.write_table(pa.table({"id": [0], "p": pa.array([0.0], pa.float32())}), out / "a-old.parquet")
    job = small_job(tmp_path / "lake", sink=str(out), mode=mode, rows=(3,) * 20, start=1, target_file_size="1 MiB")
    directory, manifest, result = run(tmp_path, job, "a-1")
    assert len(result.files) == 1
    merged = pq.ParquetFile(out / result.files[0].name)
    assert merged.num_row_groups == 1
    assert merged.read().replace_schema_metadata(None).equals(job.expected)
    with (out / result.files[0].name).open("rb") as file:
        assert checksum_bytes(file.read()) == result.files[0].checksum
    assert not directory.store.list_folders("rounds/0/merged")
    assert not publish(manifest, directory).is_new


def test_merging_keeps_order_and_large_files(tmp_path: Path) -> None:
    """Only adjacent small files are merged; row order stays."""
    rows = (10, 10, 20000, 10, 10, 10)
    job = small_job(tmp_path / "lake", sink=str(tmp_path / "out"), rows=rows, target_file_size="60 KB")
    _, _, result = run(tmp_path, job, "a-1")
    assert [file.rows for file in result.files] == [20, 20000, 30]
    assert read_output(tmp_path / "out").equals(job.expected)


def test_merging_keeps_types_and_metadata(tmp_path: Path) -> None:
    """Merged files keep types, metadata and values, with different dictionaries too."""
    from pipeline.jobs.manifest import ManifestFile
    from pipeline.sinks.parquet.pack import Piece, write_merged
    from pipeline.storage.local import LocalStore

    columns = {
        "kind": pa.array(["a", "b", None]).dictionary_encode(),
        "when": pa.array([1, None, 3], pa.timestamp("ns", "Europe/Berlin")),
        "list": pa.array([[1.0], [], None], pa.list_(pa.float64())),
        "cost": pa.array([None, None, 1], pa.decimal128(10, 2)),
    }
    table = pa.table(columns).replace_schema_metadata({"owner": "me"})
    other = table.set_column(0, "kind", pa.array(["z", "a", "y"]).dictionary_encode())
    store, sources = LocalStore(tmp_path), []
    for number, one in enumerate((table, other)):
        pq.write_table(one, tmp_path / f"{number}")
        sources.append(ManifestFile(f"{number:05d}", f"{number}", 3, store.size(f"{number}"), ""))
    with store.open_output("merged") as output:
        file = write_merged(
            Piece("merged", tuple(sources)), source=store, schema=table.schema, compression="zstd", output=output
        )
    read = pq.read_table(tmp_path / "merged")
    assert file.rows == 6
    assert read.schema.equals(table.schema)
    assert read.schema.metadata[b"owner"] == b"me"
    assert read.to_pylist() == [*table.to_pylist(), *other.to_pylist()]


def test_bad_target_size(tmp_path: Path) -> None:
    """An invalid target size raises `SpecError`."""
    with pytest.raises(SpecError, match=r"target_file_size"):
        check(Sink.model_construct(path=str(tmp_path / "out"), target_file_size="many"), SinkRequest())


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_damaged_checkpoint_is_not_published(tmp_path: Path, damage: str) -> None:
    """A missing or truncated checkpoint raises `StateCorrupt`, and the output stays."""
    out = tmp_path / "out"
    run(tmp_path, small_job(tmp_path / "lake", sink=str(out)), "a-1")
    before = listing(out)
    job = small_job(tmp_path / "lake2", sink=str(out), mode="overwrite")
    directory = JobDirectory.create(tmp_path / "jobs", job.plan, job="b-1")
    manifest = directory.manifests.prepare(directory.ledger(write_receipts(directory, job)))
    if damage == "missing":
        directory.store.remove(manifest.files[1].name)
    else:
        directory.store.replace(manifest.files[1].name, b"short")
    with pytest.raises(StateCorrupt, match="00001"):
        publish(manifest, directory)
    assert listing(out) == before


def test_flipped_bit_is_found_when_merging(tmp_path: Path) -> None:
    """A flipped bit in a checkpoint raises `StateCorrupt` before any output exists."""
    job = small_job(tmp_path / "lake", sink=str(tmp_path / "out"), rows=(500, 500), target_file_size="1 MiB")
    directory = JobDirectory.create(tmp_path / "jobs", job.plan, job="a-1")
    manifest = directory.manifests.prepare(directory.ledger(write_receipts(directory, job)))
    data = bytearray(directory.store.read(manifest.files[1].name))
    data[200] ^= 1
    directory.store.replace(manifest.files[1].name, bytes(data))
    with pytest.raises(StateCorrupt, match="damaged"):
        publish(manifest, directory)
    assert not (tmp_path / "out").exists()
    assert sorted(os.listdir(tmp_path)) == ["jobs", "lake"]


@pytest.mark.parametrize("mode", ["overwrite", "append"])
@pytest.mark.fault(27)
def test_full_disk_leaves_what_was_there(tmp_path: Path, way: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves the previous output; the next publication succeeds."""
    out = tmp_path / "out"
    run(tmp_path, small_job(tmp_path / "lake", sink=str(out)), "a-1")
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    job = small_job(tmp_path / "lake2", sink=str(out), mode=mode, start=100)
    directory = JobDirectory.create(tmp_path / "jobs", job.plan, job="b-1")
    manifest = directory.manifests.prepare(directory.ledger(write_receipts(directory, job)))
    link, calls = os.link, []

    def full(one: str, other: str) -> None:
        calls.append(other)
        if len(calls) == 2:
            raise disk_full()
        link(one, other)

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(DiskFull):
        publish(manifest, directory)
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before
    publish(manifest, directory)
    assert read_published(manifest, directory) is not None


@pytest.mark.fault(66)
def test_two_jobs_that_append_at_once_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of both are there, and ``_SUCCESS`` is of the last state."""
    out = tmp_path / "out"
    jobs = [small_job(tmp_path / f"lake{start}", sink=str(out), mode="append", start=start) for start in (0, 100, 200)]
    run(tmp_path, jobs[0], "a-1")
    other = threading.Thread(target=run, args=(tmp_path, jobs[2], "c-1"))
    add = publication.Publisher._add_in_place

    def slow(self: publication.Publisher, piece: object) -> object:
        if self.manifest.job == "b-1" and other.ident is None:
            other.start()
        return add(self, piece)  # type: ignore[arg-type]

    monkeypatch.setattr(publication.Publisher, "_add_in_place", slow)
    run(tmp_path, jobs[1], "b-1")
    other.join(60)
    assert [one.job for one in state_of(out).publications] == ["a-1", "b-1", "c-1"]
    assert read_output(out).num_rows == 3 * 75
    assert is_success(out)
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


@pytest.mark.parametrize("mode", ["error", "overwrite", "append"])
def test_two_drivers_of_one_job_converge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, mode: str) -> None:
    """A second driver waits while the first publishes; the output is complete, once."""
    out = tmp_path / "out"
    old = small_job(tmp_path / "lake", sink=str(out), mode="append")
    if mode != "error":
        run(tmp_path, old, "a-1")
    job = small_job(tmp_path / "lake2", sink=str(out), mode=mode, start=100)
    directory = JobDirectory.create(tmp_path / "jobs", job.plan, job="b-1")
    manifest = directory.manifests.prepare(directory.ledger(write_receipts(directory, job)))
    second: list[SinkContents] = []
    other = threading.Thread(target=lambda: second.append(publish(manifest, JobDirectory.open(directory.root))))
    add = publication.Publisher._add

    def slow(self: publication.Publisher, *args: object) -> object:
        if other.ident is None:
            other.start()
        return add(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(publication.Publisher, "_add", slow)
    assert publish(manifest, directory).is_new
    other.join(60)
    assert [one.is_new for one in second] == [False]
    expected = [job.expected] if mode != "append" else [old.expected, job.expected]
    assert read_output(out).sort_by("id").equals(pa.concat_tables(expected).combine_chunks())
    assert {file.name for file in state_of(out).files} == {n for n in os.listdir(out) if n.endswith(".parquet")}
    assert is_success(out)
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


@pytest.mark.parametrize("mode", ["error", "overwrite", "append"])
def test_object_store(tmp_path: Path, mode: str) -> None:
    """Modes ``error``, ``overwrite`` and ``append`` work on an object store as on a disk."""
    url = f"memory://{uuid.uuid4().hex}/out"
    old = small_job(tmp_path / "lake", sink=url)
    run(tmp_path, old, "a-1")
    assert read_output(url).equals(old.expected)
    job = small_job(tmp_path / "lake2", sink=url, mode=mode, start=100, target_file_size="1 MiB")
    if mode == "error":
        with pytest.raises(OutputExists):
            run(tmp_path, job, "b-1")
        return
    directory, manifest, _ = run(tmp_path, job, "b-1")
    expected = [job.expected] if mode == "overwrite" else [old.expected, job.expected]
    assert read_output(url).sort_by("id").equals(pa.concat_tables(expected).combine_chunks())
    assert not publish(manifest, directory).is_new


def _check(path: Path | str, *sources: Path | str, mode: str = "error", state: tuple[str, ...] = ()) -> None:
    request = SinkRequest(sources=[str(source) for source in sources], state=state)
    check(Sink.model_validate({"path": str(path), "mode": mode}), request)


def test_places_that_overlap_with_the_source(in_folder: Path) -> None:
    """An output path that overlaps with the source, directly or by a link, is rejected."""
    lake = in_folder / "lake"
    lake.mkdir()
    (in_folder / "link").symlink_to(lake)
    for bad in (lake, lake / "out", in_folder / "link", in_folder / "link" / "out", lake / ".." / "lake"):
        with pytest.raises(RefusedForSafety, match="overlaps"):
            _check(bad, lake)
    with pytest.raises(RefusedForSafety, match="overlaps"):
        _check(in_folder / "data", in_folder / "data" / "lake" / "a.parquet")
    _check(in_folder / "lake2", lake)


@pytest.mark.parametrize(
    ("source", "sink", "is_bad"),
    [
        ("lake/*.parquet", "lake", True),
        ("lake/*.parquet", "lake/out", False),
        ("lake/*", "lake/out", True),
        ("lake/*/*.parquet", "lake/out", True),
        ("lake/20*/*.parquet", "lake/out", False),
        ("lake/**/*.parquet", "lake/a/b", True),
        ("*/x.parquet", "out", True),
        ("lake/*.parquet", "out", False),
        ("s3://b/lake/*.parquet", "s3://b/lake", True),
        ("s3://b/lake", "s3://b/out", False),
        ("s3://b/lake", "s3://b/lake/out", True),
    ],
)
def test_places_and_globs(in_folder: Path, source: str, sink: str, is_bad: bool) -> None:
    """An output path is rejected if the source pattern could match files in it."""
    from pipeline.sinks.guards import check_place

    source = source if "://" in source else f"{in_folder}/{source}"
    sink = sink if "://" in sink else f"{in_folder}/{sink}"
    if is_bad:
        with pytest.raises(RefusedForSafety):
            check_place(sink, sources=[source])
    else:
        check_place(sink, sources=[source])


def test_places_that_are_too_much(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root, home, current folder, their parents and job directories are rejected as output."""
    home = in_folder / "home" / "me"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for bad in ("/", home, home.parent, "~", in_folder, ".", in_folder.parent, "s3://"):
        with pytest.raises(RefusedForSafety):
            _check(bad, mode="overwrite")
    with pytest.raises(RefusedForSafety, match="job directories"):
        _check(in_folder / "state", state=(str(in_folder / "state" / "jobs"),))
    with pytest.raises(RefusedForSafety, match="job directories"):
        _check(in_folder / "state" / "jobs" / "x", state=(str(in_folder / "state" / "jobs"),))
    _check(home / "out")


def test_check_refuses_what_publish_would(in_folder: Path) -> None:
    """`check` raises the errors of `publish` before the job runs."""
    out = in_folder / "out"
    out.mkdir()
    _check(out)
    (out / "x.txt").write_text("")
    with pytest.raises(OutputExists, match=r"x\.txt"):
        _check(out)
    with pytest.raises(RefusedForSafety, match=r"x\.txt"):
        _check(out, mode="overwrite")
    _check(out, mode="append")
    with pytest.raises(SpecError, match="no sink"):
        check(Sink(path=str(out), format="nonsense"), SinkRequest())


def test_check_lets_a_job_go_on_with_its_own_output(tmp_path: Path) -> None:
    """`check` accepts output published by the same job."""
    out = tmp_path / "out"
    directory, _, _ = run(tmp_path, small_job(tmp_path / "lake", sink=str(out)), "a-1")
    sink = directory.plan.spec.sink
    ParquetSink().check(sink, SinkRequest(job="a-1"))
    with pytest.raises(OutputExists):
        ParquetSink().check(sink, SinkRequest(job="b-1"))


def test_damaged_sink_manifest_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tmp_path, small_job(tmp_path / "lake", sink=str(out)), "a-1")
    (out / "_manifest.json").write_text("{")
    with pytest.raises(StateCorrupt, match="manifest is damaged"):
        run(tmp_path, small_job(tmp_path / "lake2", sink=str(out), mode="overwrite"), "b-1")


def test_two_jobs_of_one_id_are_not_taken_for_each_other(tmp_path: Path) -> None:
    """Two jobs with one id but different plans raise `OutputConflict`."""
    out = str(tmp_path / "out")
    first, second = small_job(tmp_path / "lake", sink=out), small_job(tmp_path / "other", sink=out)
    _, manifest, _ = run(tmp_path / "here", first, "a-1")
    before = listing(tmp_path / "out")
    assert state_of(tmp_path / "out").publications[0].plan == manifest.plan
    with pytest.raises(OutputConflict, match="another job with the same id"):
        run(tmp_path / "there", second, "a-1")
    sink = second.plan.spec.sink
    with pytest.raises(OutputConflict, match="another job with the same id"):
        check(sink, SinkRequest(job="a-1", plan=second.plan.digest))
    check(sink, SinkRequest(job="a-1", plan=first.plan.digest))
    assert listing(tmp_path / "out") == before
