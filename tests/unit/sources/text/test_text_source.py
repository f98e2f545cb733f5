"""Text files are planned by byte ranges with exact row numbers, pinned, and read in any pieces."""

from __future__ import annotations

import csv
import gzip
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from pipeline.common.rows import Fragment, InputFile, QuarantinedFile
from pipeline.errors import CorruptInput, InputChanged, SchemaDrift
from pipeline.plan.packing import pack
from pipeline.sources import Discovery, discover, find_source, read_batches, sample_batch, selected_fragments
from pipeline.sources.distinct import Occurrence
from pipeline.sources.text import files, reader
from pipeline.spec.parts import CsvOptions, DaskInput, Source

CELLS = ("", "a", 'x"y', "two\nlines", "c,d", "\n\n", "ü" * 20)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rng = random.Random(5)
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "value"])
        writer.writerows([number, rng.choice(CELLS), number / 4] for number in range(500))
    return tmp_path / "a.csv"


def source(path: Path, **options: Any) -> Source:
    return Source(path=path, **{"format": "csv", **options})


def read(found: Discovery, fragments: tuple[Fragment, ...] = (), **options: Any) -> tuple[pa.Table, list[Any]]:
    chosen = fragments or tuple(part for file in found.files for part in selected_fragments(file))
    batches = list(
        read_batches(
            chosen, columns=found.physical, schema=found.schema, filter=found.filter, versions=found.versions,
            format=found.format, keep_problems=True, **{"batch_rows": 64, **options},
        )
    )  # fmt: skip
    assert all(batch.table.num_rows <= options.get("batch_rows", 64) for batch in batches)
    rows = [(int(n), *problem) for b in batches for n, problem in zip(b.row, b.problems, strict=False) if problem]
    return pa.concat_tables([batch.table for batch in batches]), rows


@pytest.mark.parametrize("block", [100, 1000, 1 << 23])
@pytest.mark.parametrize("chunk", [16, 700, 1 << 22])
def test_every_range_has_exactly_its_rows(path: Path, monkeypatch: pytest.MonkeyPatch, block: int, chunk: int) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", block)
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk)
    found = discover(source(path))
    assert found.files[0].rows == 500
    partitions = pack(found.files, threads=3, target_bytes=2000)
    ids: list[int] = []
    for partition in partitions:
        table, problems = read(found, partition)
        assert table.column("id").to_pylist() == list(range(partition[0].row_start, partition[-1].row_stop))
        ids += table.column("id").to_pylist()
        assert problems == []
    assert ids == list(range(500))


def test_rejects_have_file_line_and_row(tmp_path: Path) -> None:
    text = 'id,t,v\r\n1,"a\r\nb",1\r\n\r\nx,y,2\r\n3,z\r\n4,q,5'
    (tmp_path / "a.csv").write_text(text, newline="")
    found = discover(source(tmp_path, types={"id": "int64", "v": "int64"}, filter="v > 1"))
    table, problems = read(found)
    assert problems == [
        (1, "cell:id:int64", "line 5, column 'id': 'x' is no int64"),
        (2, "line:columns", "line 6: 2 cells, not 3"),
    ]
    assert table.column("id").to_pylist() == [None, None, 4]  # the filter drops no row that it cannot judge
    assert sample_batch(found, columns=found.physical, schema=found.schema).table.num_rows == 1  # type: ignore[union-attr]
    with pytest.raises(CorruptInput, match="line 5, column 'id'"):
        list(
            read_batches(
                tuple(selected_fragments(found.files[0])), columns=found.physical, schema=found.schema,
                batch_rows=10, format=found.format,
            )
        )  # fmt: skip


def test_files_of_one_source(tmp_path: Path) -> None:
    """Headers may be in any order; hive keys are columns; a compressed file is one row group."""
    for day, text in (("1", "a,b\n1,2\n"), ("2", "b,a\n4,3\n"), ("3", "a,b\n")):
        (tmp_path / f"day={day}").mkdir()
        (tmp_path / f"day={day}" / "x.csv").write_text(text)
    (tmp_path / "day=2" / "y.csv.gz").write_bytes(gzip.compress(b"a,b\n5,6\n7,8\n"))
    found = discover(source(tmp_path))
    assert found.key_names == ("day",)
    table, _ = read(found)
    assert table.to_pydict() == {"a": [1, 3, 5, 7], "b": [2, 4, 6, 8], "day": [1, 2, 2, 2]}
    narrow = discover(source(tmp_path, columns=["b"]), columns=("b",))
    assert read(narrow)[0].column("b").to_pylist() == [2, 4, 6, 8]
    only_key = replace(found, schema=pa.schema([found.schema.field("day")]))
    assert read(only_key)[0].column("day").to_pylist() == [1, 2, 2, 2]


def test_large_compressed_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_UNPACKED", 10)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"a\n" + b"1\n" * 20))
    with pytest.raises(CorruptInput, match="too large for one partition"):
        discover(source(tmp_path))


def test_files_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    (tmp_path / "b.csv").write_text("a,c\n1,2\n")
    (tmp_path / "c.csv").write_text('a,b\n1,"2\n')
    (tmp_path / "d.csv").write_bytes("a,b\n1,2\n".encode("utf-16"))
    with pytest.raises(SchemaDrift, match="another schema"):
        discover(source(tmp_path / "*.csv"))
    with pytest.raises(CorruptInput, match="UTF-16"):
        discover(source(tmp_path / "d.csv"))
    found = discover(source(tmp_path), quarantine_files=True)
    assert [file.path[-5:] for file in found.files] == ["a.csv"]
    assert [file.reason for file in found.rejected] == ["file:SchemaDrift", "file:CorruptInput", "file:CorruptInput"]
    (tmp_path / "c.csv").write_text("a,b\n1,2\n")
    adapter = find_source(found.format)
    checked = [
        adapter.recheck(file, schema=found.schema, columns=found.physical, is_all=True, condition=None)
        for file in found.rejected
    ]
    assert [type(file) for file in checked] == [QuarantinedFile, InputFile, QuarantinedFile]


def with_rows(found: Discovery, rows: int, version: str) -> Discovery:
    """Return a source whose only row group is said to have other rows."""
    file = found.files[0]
    groups = (replace(file.row_groups[0], rows=rows),)
    return replace(found, files=(replace(file, row_groups=groups, version=version),))


def test_changed_files_are_noticed(path: Path) -> None:
    found = discover(source(path))
    assert find_source(found.format).count_rows(str(path)) == 500
    with path.open("a") as file:
        file.write("500,x,1\n")
    with pytest.raises(InputChanged):
        read(found)
    with pytest.raises(InputChanged):
        discover(source(path), planned=found.files)
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(CorruptInput, match="other rows"):
        read(with_rows(found, 499, discover(source(path)).files[0].version))


def test_distinct_values(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("k,v\nx,1\ny,2\nx,3\n")
    found = discover(source(tmp_path))
    values = find_source(found.format).distinct_values(found, "k", limit=5)
    assert values["x"] == Occurrence(2, {found.files[0].path: {0}})


def test_memory_stays_at_a_chunk_and_a_batch(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,t\n" + "".join(f"{number},{'x' * 100}\n" for number in range(200_000)))
    found = discover(source(tmp_path))
    fragments = tuple(selected_fragments(found.files[0]))
    peak = 0
    before = pa.total_allocated_bytes()
    for batch in read_batches(
        fragments, columns=found.physical, schema=found.schema, batch_rows=5000, versions=found.versions,
        format=found.format,
    ):  # fmt: skip
        peak = max(peak, pa.total_allocated_bytes() - before)
        del batch
    assert 0 < peak < 20 << 20


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"format": "jsonl", "csv": {}}, "has csv: and format: jsonl"),
        ({"types": {"a": "int64"}}, "has types: and format: parquet"),
        ({"format": "csv", "csv": {"delimiter": '"'}}, "uses a character twice"),
        ({"format": "csv", "csv": {"delimiter": "ab"}}, "is 'ab'"),
    ],
)
def test_options_of_other_formats_are_mistakes(options: dict[str, Any], found: str) -> None:
    with pytest.raises(ValidationError, match=found):
        Source(path="x", **options)


def test_tables_of_dask_steps_have_the_same_options() -> None:
    table = DaskInput(path="x", format="csv", csv=CsvOptions(delimiter=";"), types={"a": "int64"})
    assert table.source.reader == Source(path="x", format="csv", csv={"delimiter": ";"}, types={"a": "int64"}).reader
