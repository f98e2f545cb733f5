"""Columns of every type that Parquet stores: planned, read and filtered in one and the same type."""

from __future__ import annotations

import datetime as dt
import io
import struct
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.common.rows import Fragment
from pipeline.errors import CorruptInput, SchemaDrift
from pipeline.sources import Discovery, discover, read_batches
from pipeline.sources.parquet.distinct_values import column_values
from pipeline.sources.parquet.opening import arrow_schema, parquet_errors, read_footer
from pipeline.sources.types import as_type, read_type, same_kind
from pipeline.spec.parts import Source
from pipeline.testing.arrow_types import ROWS, typed_columns

COLUMNS = typed_columns()
NAMES = pytest.mark.parametrize("name", COLUMNS)
LIMITED = int(pa.__version__.split(".")[0]) < 26


def planned(path: Path, *, filter: str | None = None) -> Discovery:
    return discover(Source(path=str(path), filter=filter))


def read(found: Discovery, *, batch_rows: int = 5) -> pa.Table:
    fragments = [Fragment(file.path, 0, file.rows, 0, len(file.row_groups), 0) for file in found.files]
    batches = list(
        read_batches(
            fragments,
            columns=found.physical,
            schema=found.schema,
            filter=found.filter,
            batch_rows=batch_rows,
            versions=found.versions,
        )
    )
    return pa.concat_tables([batch.table for batch in batches])


def plain_values(array: pa.Array | pa.ChunkedArray) -> list[str]:
    """Values as text: NaN and -0.0 are told apart, and so are instants that Python cannot hold."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if pa.types.is_temporal(array.type):
        array = array.cast(pa.int32() if array.type.bit_width == 32 else pa.int64())
    return list(map(repr, array.to_pylist()))


def skip_fixed_lists(name: str) -> None:
    if pa.types.is_fixed_size_list(COLUMNS[name].type) and LIMITED:
        pytest.skip("pyarrow before 26 reads no nulls in lists of a fixed size")


@pytest.mark.skipif(not LIMITED, reason="this pyarrow reads nulls in lists of a fixed size")
def test_a_limit_of_pyarrow_is_not_called_damage(tmp_path: Path) -> None:
    column = pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))
    pq.write_table(pa.table({"x": column}), tmp_path / "a.parquet")
    with pytest.raises(SchemaDrift, match="a type that cannot be read") as caught:
        read(planned(tmp_path / "a.parquet"))
    assert "upgrade pyarrow to 26" in caught.value.next_step


@pytest.mark.fault(87)
@NAMES
@pytest.mark.parametrize("stored", [True, False], ids=["arrow schema", "foreign writer"])
def test_a_column_is_read_in_the_type_in_which_it_was_planned(tmp_path: Path, name: str, stored: bool) -> None:
    if stored:
        skip_fixed_lists(name)
    table = pa.table({"x": COLUMNS[name], "n": pa.array(range(ROWS))})
    pq.write_table(table, tmp_path / "a.parquet", store_schema=stored)
    found = planned(tmp_path / "a.parquet", filter="n != 1 and n != 7")
    batches = read(found)
    assert batches.schema == found.schema
    assert found.schema.field("x").type == read_type(found.schema.field("x").type)
    rows = [row for row in range(ROWS) if row not in (1, 7)]
    assert batches["n"].to_pylist() == rows
    expected = pq.read_table(tmp_path / "a.parquet", partitioning=None)["x"].combine_chunks()
    expected = as_type(expected, read_type(expected.type))
    assert plain_values(batches["x"]) == [plain_values(expected)[row] for row in rows]


@NAMES
def test_two_writers_of_one_column_agree(tmp_path: Path, name: str) -> None:
    """A file with Arrow's own schema and one without hold the same kind, where Parquet alone tells the type."""
    skip_fixed_lists(name)
    table = pa.table({"x": COLUMNS[name]})
    pq.write_table(table, tmp_path / "a.parquet")
    kind = planned(tmp_path / "a.parquet").schema.field("x").type
    pq.write_table(table.cast(pa.schema([("x", kind)])) if kind == table["x"].type else table, tmp_path / "b.parquet")
    assert len(read(planned(tmp_path))) == 2 * ROWS


@pytest.mark.fault(87)
def test_ids_and_documents_of_other_writers_have_their_extension_types(tmp_path: Path) -> None:
    """UUID and JSON columns without an Arrow schema, as DuckDB and Spark write them."""
    ids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([uuid.UUID(int=5).bytes], pa.binary(16)))
    documents = pa.ExtensionArray.from_storage(pa.json_(pa.string()), pa.array(["{}"]))
    nested = pa.StructArray.from_arrays([ids, documents], ["id", "document"])
    table = pa.table({"id": ids, "document": documents, "nested": nested})
    pq.write_table(table, tmp_path / "a.parquet", store_schema=False)
    found = planned(tmp_path / "a.parquet")
    assert found.schema.field("id").type == pa.uuid()
    assert found.schema.field("document").type == pa.json_(pa.string())
    assert read(found).to_pylist() == table.to_pylist()


@pytest.mark.fault(87)
def test_timestamps_of_12_bytes_keep_dates_that_nanoseconds_cannot_hold(tmp_path: Path) -> None:
    moments = pa.array([dt.datetime(9999, 12, 31), dt.datetime(1, 1, 1), dt.datetime(2024, 1, 1, 1, 2, 3, 4)])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"t": moments}), path, use_deprecated_int96_timestamps=True, store_schema=False)
    assert pq.read_metadata(path).schema.column(0).physical_type == "INT96"
    found = planned(path)
    assert found.schema.field("t").type == pa.timestamp("us")
    assert read(found)["t"].to_pylist() == moments.to_pylist()


@pytest.mark.parametrize("index", [pa.int8(), pa.int16(), pa.int64()])
def test_dictionaries_of_several_files_are_numbered_together(tmp_path: Path, index: pa.DataType) -> None:
    """Files of 100 categories each, together more than one byte can number, in one batch."""
    for day in range(3):
        values = pa.array([f"{day}-{number}" for number in range(100)]).dictionary_encode()
        width = index if day else pa.int8()
        pq.write_table(pa.table({"x": values.cast(pa.dictionary(width, pa.string()))}), tmp_path / f"{day}.parquet")
    table = read(planned(tmp_path), batch_rows=1000)
    assert table["x"].num_chunks == 1
    assert table["x"].to_pylist() == [f"{day}-{number}" for day in range(3) for number in range(100)]


@pytest.mark.parametrize("kind", [pa.string_view(), pa.string(), pa.dictionary(pa.int8(), pa.string())])
def test_texts_of_every_kind_fan_out(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"x": pa.array(["a", "b", "a", None]).cast(kind)}), tmp_path / "a.parquet")
    values = column_values(planned(tmp_path), "x", limit=10)
    assert {value: occurrence.rows for value, occurrence in values.items()} == {"a": 2, "b": 1, None: 1}


@pytest.mark.fault(88)
def test_a_type_that_cannot_be_read_is_no_damage() -> None:
    with pytest.raises(SchemaDrift, match="cannot be read") as caught, parquet_errors("a.parquet"):
        raise pa.ArrowNotImplementedError("Nested data conversions not implemented for chunked array outputs")
    assert "source.columns" in caught.value.next_step
    with pytest.raises(CorruptInput), parquet_errors("a.parquet"):
        raise pa.ArrowInvalid("Couldn't deserialize thrift")


def test_the_schema_of_a_footer_is_the_one_of_the_open_file(tmp_path: Path) -> None:
    for name, array in COLUMNS.items():
        pq.write_table(pa.table({"x": array}), tmp_path / "a.parquet", store_schema=False)
        with pq.ParquetFile(tmp_path / "a.parquet") as file:
            opened = file.schema_arrow.field(0).type
        schema = arrow_schema(read_footer(str(tmp_path / "a.parquet")), path="a.parquet")
        assert schema.field(0).type == read_type(opened), name


@NAMES
def test_the_type_read_has_no_views_and_one_width_of_indices(name: str) -> None:
    kind = read_type(COLUMNS[name].type)
    assert "view" not in str(kind)
    assert "indices=int" not in str(kind).replace("indices=int32", "")
    assert read_type(kind) == kind
    assert same_kind(kind, COLUMNS[name].type)
    assert plain_values(as_type(COLUMNS[name], kind)) == plain_values(COLUMNS[name])


def test_dictionaries_inside_lists_are_read_from_every_row_group(tmp_path: Path) -> None:
    values = [["a", "b"], [], ["c"], None] * 50
    table = pa.table({"x": pa.array(values, pa.list_(pa.dictionary(pa.int8(), pa.string()))), "n": range(200)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=30)
    found = planned(tmp_path / "a.parquet")
    assert pa.types.is_string(found.schema.field("x").type.value_type)
    assert read(found, batch_rows=64)["x"].to_pylist() == values


def write_empty_struct(path: Path) -> None:
    """Write columns ``e`` (a group without fields, as parquet-mr writes it) and ``a``, which pyarrow cannot write."""
    file = io.BytesIO()
    pq.write_table(pa.table({"a": [1, 2]}), file, store_schema=False)
    data = file.getvalue()
    size = struct.unpack("<I", data[-8:-4])[0]
    pages, footer = data[: -8 - size], data[-8 - size : -8]
    root = b"\x18\x06schema\x15\x02\x00"
    at = footer.index(root)
    count = footer.rindex(b"\x2c", 0, at)
    two_children, group = b"\x18\x06schema\x15\x04\x00", b"\x35\x02\x18\x01e\x15\x00\x00"
    footer = footer[:count] + b"\x3c" + footer[count + 1 : at] + two_children + group + footer[at + len(root) :]
    path.write_bytes(pages + footer + struct.pack("<I", len(footer)) + b"PAR1")


@pytest.mark.fault(88)
def test_a_struct_without_fields_is_refused_when_planning_unless_it_is_left_out(tmp_path: Path) -> None:
    """Parquet stores nothing of it: reading would give other columns than the plan."""
    write_empty_struct(tmp_path / "a.parquet")
    with pytest.raises(SchemaDrift, match="cannot be read") as caught:
        planned(tmp_path / "a.parquet")
    assert "struct<>" in caught.value.found
    found = discover(Source(path=str(tmp_path / "a.parquet"), columns=("a",)))
    assert read(found)["a"].to_pylist() == [1, 2]
