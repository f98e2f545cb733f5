"""Reading a partition: every row once, in order, with its origin."""

from __future__ import annotations

import datetime
import decimal
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.common.rows import Fragment
from pipeline.errors import CorruptInput, InputChanged, MissingInput, SchemaDrift, StorageError
from pipeline.plan.packing import pack
from pipeline.sources import Discovery, discover, read_batches, selected_fragments
from pipeline.sources.parquet.opening import open_parquet
from pipeline.spec.parts import Source


def lake(folder: Path, *tables: pa.Table, row_group_size: int = 100, filter: str | None = None) -> Discovery:
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=row_group_size)
    return discover(Source(path=str(folder), filter=filter))


def fragments_of(found: Discovery) -> list[Fragment]:
    return [fragment for file in found.files for fragment in selected_fragments(file)]


def read(found: Discovery, fragments=None, *, batch_rows: int = 1000, filter: str | None = None, **options):
    given = {"columns": found.physical, "schema": found.schema, "versions": found.versions, **options}
    chosen = fragments_of(found) if fragments is None else fragments
    return list(read_batches(chosen, batch_rows=batch_rows, filter=filter or found.filter, **given))


def numbers(stop: int, start: int = 0) -> pa.Table:
    return pa.table({"a": pa.array(range(start, stop), pa.int64())})


def test_batches_are_bounded_in_order_and_say_where_rows_come_from(tmp_path):
    found = lake(tmp_path, numbers(250), numbers(300, 250))
    batches = read(found, batch_rows=90)
    assert all(0 < batch.table.num_rows <= 90 for batch in batches)
    assert [row for batch in batches for row in batch.table.column("a").to_pylist()] == list(range(300))
    assert np.concatenate([batch.fragment for batch in batches]).tolist() == [0] * 250 + [1] * 50
    assert np.concatenate([batch.row for batch in batches]).tolist() == [*range(250), *range(50)]
    assert all((batch.fragment.dtype, batch.row.dtype) == (np.int32, np.int64) for batch in batches)


def test_small_files_share_a_batch_in_one_chunk(tmp_path):
    found = lake(tmp_path, *(numbers(10) for _ in range(25)))
    batches = read(found, batch_rows=100)
    assert [batch.table.num_rows for batch in batches] == [100, 100, 50]
    assert {batch.table.column("a").num_chunks for batch in batches} == {1}


def test_a_fragment_may_begin_and_end_inside_row_groups(tmp_path):
    found = lake(tmp_path, numbers(1000))
    path = found.files[0].path
    pieces = [Fragment(path, 150, 420, 1, 5, 0), Fragment(path, 730, 731, 7, 8, 0)]
    batches = read(found, pieces, batch_rows=64)
    assert [row for batch in batches for row in batch.row.tolist()] == [*range(150, 420), 730]
    assert [row for batch in batches for row in batch.table.column("a").to_pylist()] == [*range(150, 420), 730]


def test_the_filter_counts_what_it_drops_per_fragment(tmp_path):
    found = lake(tmp_path, numbers(100), numbers(300, 100), numbers(310, 300))
    batches = read(found, batch_rows=50, filter="a >= 80 and a < 150")
    assert [row for batch in batches for row in batch.table.column("a").to_pylist()] == list(range(80, 150))
    assert [row for batch in batches for row in batch.row.tolist()] == [*range(80, 100), *range(50)]
    assert sum(batch.filtered for batch in batches).tolist() == [80, 150, 10]


def test_what_was_filtered_at_the_end_comes_in_an_empty_batch(tmp_path):
    found = lake(tmp_path, numbers(100))
    (batch,) = read(found, filter="a < 0 or a > 1000000")
    assert (batch.table.num_rows, batch.table.schema, batch.filtered.tolist()) == (0, found.schema, [100])


def test_no_fragments_no_batches(tmp_path):
    assert read(lake(tmp_path, numbers(10)), []) == []


def test_only_the_columns_that_are_asked_for_are_read_in_the_order_of_the_schema(tmp_path):
    found = lake(tmp_path, pa.table({"a": [1], "b": ["x"], "c": [1.5]}))
    schema = pa.schema([("c", pa.float64()), ("a", pa.int64())])
    (batch,) = read(found, columns=("a", "c"), schema=schema)
    assert batch.table.to_pylist() == [{"c": 1.5, "a": 1}]
    assert batch.table.schema == schema


def test_a_column_whose_name_begins_like_that_of_another_with_a_dot(tmp_path):
    found = lake(tmp_path, pa.table({"a.b": [2], "a": [1]}))
    (batch,) = read(found, columns=("a",), schema=pa.schema([("a", pa.int64())]))
    assert batch.table.to_pylist() == [{"a": 1}]


def test_hive_keys_alone_keep_the_number_of_rows(tmp_path):
    for value, rows in (("1", 3), ("2", 4)):
        (tmp_path / f"k={value}").mkdir()
        pq.write_table(numbers(rows), tmp_path / f"k={value}" / "f.parquet")
    found = discover(Source(path=str(tmp_path)))
    (batch,) = read(found, columns=(), schema=pa.schema([("k", pa.int64())]))
    assert batch.table.column("k").to_pylist() == [1, 1, 1, 2, 2, 2, 2]
    (batch,) = read(found, columns=(), schema=pa.schema([("k", pa.int64())]), filter="k == 2")
    assert (batch.table.num_rows, batch.filtered.tolist()) == (4, [3, 0])


def test_every_type_comes_out_as_it_went_in(tmp_path):
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, 6)
    table = pa.table(
        {
            "dictionary": pa.array(["a", None, "b"]).dictionary_encode(),
            "zone": pa.array([moment, None, moment], pa.timestamp("us", "Europe/Berlin")),
            "nanoseconds": pa.array([1, None, 3], pa.timestamp("ns")),
            "decimal": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("-2.00")], pa.decimal128(10, 2)),
            "nested": [{"a": [1, None], "b": "x"}, None, {"a": None, "b": None}],
            "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
            "binary": [b"\x00\xff", None, b""],
            "unsigned": pa.array([2**64 - 1, None, 0], pa.uint64()),
            "float": [float("nan"), None, -0.0],
            "null": pa.nulls(3),
        }
    )
    found = lake(tmp_path, table, table, row_group_size=2)
    (batch,) = read(found)
    batch.table.validate(full=True)
    assert batch.table.schema.equals(found.schema)
    # Parquet calls the item of every list "element"; but for that, types are those that were written.
    assert found.schema == pq.read_schema(found.files[0].path).remove_metadata()
    for name in set(table.column_names) - {"nested"}:
        assert batch.table.column(name).type == table.column(name).type
    for name in table.column_names:
        assert repr(batch.table.column(name).to_pylist()) == repr(table.column(name).to_pylist() * 2)


def test_dictionaries_too_large_for_their_common_index_stay_in_chunks(tmp_path):
    tables = [
        pa.table(
            {"d": pa.DictionaryArray.from_arrays(pa.array(range(100), pa.int8()), [f"{x}{n}" for n in range(100)])}
        )
        for x in "ab"
    ]
    (batch,) = read(lake(tmp_path, *tables))
    assert batch.table.column("d").to_pylist() == [f"{x}{n}" for x in "ab" for n in range(100)]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=6),
    group=st.integers(1, 120),
    batch_rows=st.integers(1, 200),
    target=st.integers(40, 3000),
    filter=st.sampled_from([None, "a >= 100", "a < 50 or a > 200", "a == 7"]),
)
def test_partitions_together_give_every_row_once(tmp_path_factory, sizes, group, batch_rows, target, filter):
    folder = tmp_path_factory.mktemp("lake")
    found = lake(folder, *(numbers(size) for size in sizes), row_group_size=group, filter=filter)
    wanted = {None: lambda a: True, "a >= 100": lambda a: a >= 100, "a == 7": lambda a: a == 7}
    keeps = wanted.get(filter, lambda a: a < 50 or a > 200)
    seen, filtered = [], 0
    for fragments in pack(found.files, threads=2, target_bytes=target):
        for batch in read(found, fragments, batch_rows=batch_rows):
            assert batch.table.num_rows <= batch_rows
            filtered += int(batch.filtered.sum())
            paths = [fragments[number].path for number in batch.fragment]
            assert batch.table.column("a").to_pylist() == batch.row.tolist()
            seen += zip(paths, batch.row.tolist(), strict=True)
    expected = [(file.path, a) for file in found.files for a in range(file.rows) if keeps(a)]
    assert seen == expected
    pruned = sum(g.rows for file in found.files for g in file.row_groups if not g.selected)
    assert filtered + pruned + len(seen) == sum(sizes)


# ---- what is wrong


def test_a_file_that_changed_since_the_plan_is_refused(tmp_path):
    found = lake(tmp_path, numbers(100))
    path = Path(found.files[0].path)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(InputChanged, match="changed since") as caught:
        read(found)
    assert str(status.st_mtime_ns) in caught.value.expected
    assert read(found, versions=None)[0].table.num_rows == 100
    path.unlink()
    with pytest.raises(InputChanged, match="file not found"):
        read(found)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    found = lake(tmp_path, numbers(100_000), row_group_size=1000)
    path = Path(found.files[0].path)
    batches = read_batches(
        fragments_of(found), columns=("a",), schema=found.schema, batch_rows=1000, versions=found.versions
    )
    next(batches)
    os.utime(path, ns=(0, 0))
    with pytest.raises(InputChanged):
        list(batches)


def test_another_schema_than_planned_names_file_and_column(tmp_path):
    found = lake(tmp_path, pa.table({"a": [1], "b": [1]}))
    for schema, words in (
        (pa.schema([("c", pa.int64())]), "no column 'c'"),
        (pa.schema([("a", pa.string())]), "int64"),
    ):
        with pytest.raises(SchemaDrift, match=words) as caught:
            read(found, columns=tuple(schema.names), schema=schema)
        assert caught.value.where == found.files[0].path


@pytest.mark.parametrize("rows", [2**14, 2**20])
def test_damage_inside_a_file_is_corrupt_input(tmp_path, rows):
    found = lake(tmp_path, pa.table({"a": np.random.default_rng(0).random(rows)}), row_group_size=rows)
    path = Path(found.files[0].path)
    data = bytearray(path.read_bytes())
    data[4:2000] = bytes(1996)
    path.write_bytes(data)
    with pytest.raises(CorruptInput) as caught:
        read(found, versions=None)
    assert caught.value.where == str(path)


def test_more_rows_planned_than_the_file_has(tmp_path):
    found = lake(tmp_path, numbers(100))
    path = found.files[0].path
    for fragment in (Fragment(path, 0, 200, 0, 1, 0), Fragment(path, 100, 200, 1, 2, 0)):
        with pytest.raises(CorruptInput, match="other rows than"):
            read(found, [fragment])


def test_page_checksums_are_verified_where_there_are_some(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"a": np.random.default_rng(0).random(1000)})
    pq.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    found = discover(Source(path=str(path)))
    data = bytearray(path.read_bytes())
    data[4000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptInput, match=r"damaged|CRC"):
        read(found, versions=None)


def test_a_storage_failure_is_no_damage_of_the_file(tmp_path, monkeypatch):
    found = lake(tmp_path, numbers(100))

    def fails(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pipeline.sources.parquet.opening.open_source", fails)
    with pytest.raises(StorageError, match="Input/output error"):
        read(found)


def test_memory_does_not_grow_with_the_row_group(tmp_path):
    """Peak of the memory pool for one row group of 400,000 rows, in a process of its own: 20 batches' worth at most."""
    rows, columns, batch_rows = 400_000, 16, 8192
    table = pa.table({f"c{n}": np.random.default_rng(n).random(rows) for n in range(columns)})
    lake(tmp_path, table, row_group_size=rows)
    code = """
import sys, pyarrow as pa
from pipeline.sources import discover, read_batches, selected_fragments
from pipeline.spec.job_spec import Source
found = discover(Source(path=sys.argv[1]))
fragments = list(selected_fragments(found.files[0]))
rows = sum(b.table.num_rows for b in read_batches(
    fragments, columns=found.physical, schema=found.schema, batch_rows=int(sys.argv[2])))
print(rows, pa.default_memory_pool().max_memory())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(batch_rows)], capture_output=True, text=True, check=True
    )
    read_rows, peak = map(int, done.stdout.split())
    group, batch = rows * columns * 8, batch_rows * columns * 8
    assert read_rows == rows
    # Besides batches there is a page, a dictionary and a buffer for each column.
    assert peak < 3 * batch + columns * 2_400_000 < group * 1.0 + 3 * batch
    assert peak < 0.85 * group


def test_a_missing_source_is_not_an_input_that_changed(tmp_path):
    with pytest.raises(MissingInput):
        discover(Source(path=str(tmp_path / "nothing")))


def test_columns_are_looked_up_only_where_some_are_left_out(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [1, 2], "b": [3, 4]}), path)
    with open_parquet(str(path), columns=["a", "b"]) as file:
        assert next(file.iter_batches(10)).num_columns == 2
        assert file._paths is None
        assert next(file.iter_batches(10, columns=["b"])).schema.names == ["b"]
        assert set(file._paths) == {"a", "b"}
