"""Quarantined files: damaged files, files unlike the others, and a second check of both."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.common.rows import InputFile, QuarantinedFile
from pipeline.errors import CorruptInput, SchemaDrift
from pipeline.sources import discover, find_source, parse_filter
from pipeline.spec.parts import Source

SCHEMA = pa.schema([("id", pa.int64()), ("x", pa.float32())])


def write(path: Path, **columns: pa.Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"id": pa.array([1, 2, 3], pa.int64()), "x": pa.array([0.5, 1.5, 2.5], pa.float32()), **columns}
    pq.write_table(pa.table(table), path)
    return path


@pytest.fixture
def five_file_lake(tmp_path: Path) -> Path:
    """Five files of the same kind."""
    for number in range(5):
        write(tmp_path / "lake" / f"{number}.parquet")
    return tmp_path / "lake"


def rejected(five_file_lake: Path, **fields: object) -> dict[str, tuple[str, int | None]]:
    found = discover(Source(path=str(five_file_lake), **fields), quarantine_files=True)  # type: ignore[arg-type]
    assert {file.path for file in found.files}.isdisjoint(file.path for file in found.rejected)
    assert len(found.files) + len(found.rejected) == len(list(five_file_lake.rglob("*.parquet")))
    return {Path(file.path).name: (file.reason, file.rows) for file in found.rejected}


def test_readable_files_are_not_quarantined(five_file_lake: Path) -> None:
    assert rejected(five_file_lake) == {}
    assert discover(Source(path=str(five_file_lake)), quarantine_files=True) == discover(
        Source(path=str(five_file_lake))
    )


@pytest.mark.fault(36)
def test_truncated_file_is_quarantined_or_complete(five_file_lake: Path) -> None:
    whole = (five_file_lake / "2.parquet").read_bytes()
    for length in [*range(0, len(whole), max(1, len(whole) // 200)), len(whole) - 1]:
        (five_file_lake / "2.parquet").write_bytes(whole[:length])
        with pytest.raises(CorruptInput):
            discover(Source(path=str(five_file_lake)))
        assert rejected(five_file_lake) == {"2.parquet": ("file:CorruptInput", None)}


@pytest.mark.fault(39)
@pytest.mark.parametrize("number", [0, 3])
def test_file_with_other_columns_is_quarantined_at_any_position(five_file_lake: Path, number: int) -> None:
    write(five_file_lake / f"{number}.parquet", x=pa.array(["a", "b", "c"]))
    with pytest.raises(SchemaDrift):
        discover(Source(path=str(five_file_lake)))
    assert rejected(five_file_lake) == {f"{number}.parquet": ("file:SchemaDrift", 3)}
    write(five_file_lake / f"{number}.parquet", extra=pa.array([1, 2, 3]))
    assert rejected(five_file_lake) == {f"{number}.parquet": ("file:SchemaDrift", 3)}
    # A column that nobody needs makes no difference.
    assert rejected(five_file_lake, columns=("id", "x")) == {}


def test_of_two_kinds_as_frequent_the_first_counts(tmp_path: Path) -> None:
    five_file_lake = tmp_path / "lake"
    write(five_file_lake / "0.parquet")
    write(five_file_lake / "1.parquet", x=pa.array(["a", "b", "c"]))
    assert rejected(five_file_lake) == {"1.parquet": ("file:SchemaDrift", 3)}


def test_when_no_file_can_be_read_the_first_is_named(five_file_lake: Path) -> None:
    for path in five_file_lake.iterdir():
        path.write_bytes(b"")
    with pytest.raises(CorruptInput) as caught:
        discover(Source(path=str(five_file_lake)), quarantine_files=True)
    assert caught.value.where.endswith("0.parquet")


def again(file: QuarantinedFile, *, is_all: bool = True, filter: str | None = None) -> InputFile | QuarantinedFile:
    condition = parse_filter(filter) if filter else None
    return find_source("parquet").recheck(file, schema=SCHEMA, columns=("id", "x"), is_all=is_all, condition=condition)


def test_repaired_file_is_read_again(five_file_lake: Path) -> None:
    path = five_file_lake / "2.parquet"
    aside = QuarantinedFile(str(path), "file:CorruptInput", "damaged")
    found = again(aside)
    assert isinstance(found, InputFile)
    assert (found.path, found.rows, found.size) == (str(path), 3, path.stat().st_size)
    ruled_out = again(aside, filter="id > 3")
    assert isinstance(ruled_out, InputFile)
    assert [group.selected for group in ruled_out.row_groups] == [False]


def test_file_that_is_still_bad_has_its_present_reason(five_file_lake: Path) -> None:
    path = five_file_lake / "2.parquet"
    aside = QuarantinedFile(str(path), "file:SchemaDrift", "old", 7, (("day", "1"),))
    path.write_bytes(b"PAR1")
    found = again(aside)
    assert isinstance(found, QuarantinedFile)
    assert (found.reason, found.rows, found.hive_keys) == ("file:CorruptInput", None, (("day", "1"),))
    path.unlink()
    gone = again(aside)
    assert isinstance(gone, QuarantinedFile)
    assert gone.reason == "file:InputChanged"
    write(path, x=pa.array(["a", "b", "c"]))
    drifted = again(aside)
    assert isinstance(drifted, QuarantinedFile)
    assert (drifted.reason, drifted.rows) == ("file:SchemaDrift", 3)
    assert "'x' of type string" in drifted.message
    write(path, extra=pa.array([1, 2, 3]))
    assert isinstance(again(aside), QuarantinedFile)
    assert isinstance(again(aside, is_all=False), InputFile)
