"""Batches that are limited by their decoded bytes, which no footer tells."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sources import SourceBatch, decoded_bytes, discover, read_batches, selected_fragments
from pipeline.sources.decoded_bytes import DecodedBytes
from pipeline.sources.parquet import decoding
from pipeline.sources.parquet.decoding import DecodingSize, decode_limited
from pipeline.spec.parts import Source
from pipeline.testing.examples import choose


def texts(widths: Sequence[int]) -> pa.Table:
    """Return a row for each width: a number, and a text of that width, of which few differ."""
    values = {width: "x" * width for width in set(widths)}
    return pa.table({"n": pa.array(range(len(widths)), pa.int64()), "s": [values[width] for width in widths]})


def read(folder: Path, *, rows: int, most_bytes: int, filter: str | None = None) -> list[SourceBatch]:
    found = discover(Source(path=str(folder)))
    fragments = [fragment for file in found.files for fragment in selected_fragments(file)]
    return list(
        read_batches(
            fragments,
            columns=found.schema.names,
            schema=found.schema,
            filter=filter,
            batch_rows=rows,
            batch_bytes=most_bytes,
            versions=found.versions,
        )
    )


def size_of(batch: SourceBatch) -> int:
    return sum(map(DecodedBytes(batch.table.schema), batch.table.to_batches()))


@pytest.mark.parametrize(
    ("kind", "is_fixed"),
    [
        (pa.float32(), True), (pa.bool_(), True), (pa.timestamp("us", "UTC"), True), (pa.decimal128(9, 2), True),
        (pa.uuid(), True), (pa.struct({"a": pa.int8(), "b": pa.list_(pa.int8(), 3)}), True), (pa.null(), True),
        (pa.string(), False), (pa.list_(pa.int8()), False), (pa.dictionary(pa.int32(), pa.int8()), False),
        (pa.struct({"a": pa.binary()}), False), (pa.json_(), False), (pa.map_(pa.int8(), pa.int8()), False),
    ],
    ids=str,
)  # fmt: skip
def test_types_whose_values_all_take_the_same_bytes(kind: pa.DataType, is_fixed: bool) -> None:
    schema = pa.schema({"a": pa.int64(), "b": kind})
    assert DecodedBytes(schema).is_fixed is is_fixed
    rows = pa.record_batch([pa.array([1, None] * 400), pa.nulls(800, kind)], schema=schema)
    assert DecodedBytes(schema)(rows) >= (rows.nbytes if is_fixed else 6400)


def test_columns_of_fixed_width_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their bytes are planned exactly, and copies for joining small pieces would cost time."""
    monkeypatch.setattr(decoded_bytes, "_column_bytes", lambda column: pytest.fail("measured"))
    pq.write_table(pa.table({"x": np.arange(10_000.0)}), tmp_path / "a.parquet")
    assert [batch.table.num_rows for batch in read(tmp_path, rows=6000, most_bytes=1)] == [6000, 4000]


@pytest.mark.parametrize("is_dictionary", [False, True])
def test_repeating_texts_are_limited_by_their_decoded_bytes(tmp_path: Path, is_dictionary: bool) -> None:
    """The file takes 1 byte a row, and 65,536 rows of 2,000 decoded bytes were one batch of 125 MiB."""
    table = texts([2000] * 20_000)
    table = table.set_column(1, "s", table["s"].dictionary_encode()) if is_dictionary else table
    pq.write_table(table, tmp_path / "a.parquet")
    batches = read(tmp_path, rows=65_536, most_bytes=1 << 20)
    assert max(map(size_of, batches)) <= 1 << 20
    assert len(batches) < 60
    assert [row for batch in batches for row in batch.row.tolist()] == list(range(20_000))


def test_no_piece_of_a_wide_row_group_is_decoded_whole(tmp_path: Path) -> None:
    """A plan samples the first and the last row group; those between may be wider by any factor."""
    place = tmp_path / "a.parquet"
    with pq.ParquetWriter(place, texts([1]).schema) as writer:
        for width in (4, 3000, 4):
            writer.write_table(texts([width] * 40_000))
    limit = 8 << 20
    with pq.ParquetFile(place) as file:
        size = DecodingSize(rows=65_536, most_bytes=limit, width=20.0)
        pieces = list(decode_limited(file, range(3), columns=None, size=size))
    most = max(map(DecodedBytes(pieces[0].schema), pieces))
    assert sum(piece.num_rows for piece in pieces) == 120_000
    assert most <= limit
    assert pieces[0].num_rows == decoding.FIRST_ROWS
    assert max(piece.num_rows for piece in pieces[:5]) > 10_000


def test_rows_as_narrow_as_planned_are_read_in_whole_batches(tmp_path: Path) -> None:
    """Only the first rows of a row group are read in small pieces, which are copied when they are joined."""
    pq.write_table(texts([10] * 300_000), tmp_path / "a.parquet")
    batches = read(tmp_path, rows=65_536, most_bytes=1 << 28)
    assert [batch.table.num_rows for batch in batches] == [18_432, 65_536, 65_536, 65_536, 65_536, 19_424]


def test_a_row_that_is_larger_than_a_batch_may_be_is_read_alone(tmp_path: Path) -> None:
    pq.write_table(texts([10, 10, 5000, 10]), tmp_path / "a.parquet")
    batches = read(tmp_path, rows=100, most_bytes=1000)
    assert [batch.row.tolist() for batch in batches] == [[0, 1], [2], [3]]


def test_filtered_rows_are_counted_once(tmp_path: Path) -> None:
    pq.write_table(texts([100] * 100), tmp_path / "a.parquet")
    batches = read(tmp_path, rows=100, most_bytes=1000, filter="n >= 50")
    assert len(batches) > 3
    assert sum(int(batch.filtered.sum()) for batch in batches) == 50
    assert [row for batch in batches for row in batch.row.tolist()] == list(range(50, 100))


@settings(max_examples=choose(60, of=1000))
@given(
    widths=st.lists(st.sampled_from([0, 1, 9, 300, 2000]), min_size=1, max_size=80),
    files=st.lists(st.integers(1, 79), max_size=3, unique=True),
    group=st.integers(1, 40),
    rows=st.integers(1, 50),
    most_bytes=st.integers(1, 9000),
    filter=st.sampled_from([None, "n > 7", "n < 3 or n > 30", "n < 0"]),
)
def test_every_limit_gives_every_row_once(
    tmp_path_factory: pytest.TempPathFactory,
    widths: list[int],
    files: list[int],
    group: int,
    rows: int,
    most_bytes: int,
    filter: str | None,
) -> None:
    folder, table = tmp_path_factory.mktemp("lake"), texts(widths)
    edges = [0, *sorted(edge for edge in files if edge < len(widths)), len(widths)]
    for number, (start, stop) in enumerate(pairwise(edges)):
        pq.write_table(table.slice(start, stop - start), folder / f"{number}.parquet", row_group_size=group)
    limited = read(folder, rows=rows, most_bytes=most_bytes, filter=filter)
    whole = read(folder, rows=100, most_bytes=0, filter=filter)
    for batch in limited:
        assert batch.table.num_rows <= rows
        assert batch.table.num_rows < 2 or size_of(batch) <= most_bytes
    for one, other in [(limited, whole)]:
        assert pa.concat_tables(batch.table for batch in one).equals(pa.concat_tables(batch.table for batch in other))
        assert np.array_equal(*(np.concatenate([batch.row for batch in batches]) for batches in (one, other)))
        assert np.array_equal(*(sum(batch.filtered for batch in batches) for batches in (one, other)))
