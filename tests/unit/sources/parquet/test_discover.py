"""Discovery: files, columns, row groups, and the messages of errors."""

from __future__ import annotations

import os
import random
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import CorruptInput, MissingInput, PipelineError, SchemaDrift, SpecError
from pipeline.sources import Discovery, discover, read_batches, resize, sample_batch, selected_fragments
from pipeline.sources.locate import locate
from pipeline.spec.parts import Source


def write(path: Path, table: pa.Table | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"a": [1, 2, 3]}) if table is None else table, path, **options)
    return path


def paths(source: str | tuple[str, ...]) -> list[str]:
    return [file.path for file in locate(source)]


def read_all(discovery: Discovery) -> list[dict]:
    fragments = [fragment for file in discovery.files for fragment in selected_fragments(file)]
    batches = read_batches(
        fragments,
        columns=discovery.physical,
        schema=discovery.schema,
        filter=discovery.filter,
        batch_rows=1000,
        versions=discovery.versions,
    )
    return [row for batch in batches for row in batch.table.to_pylist()]


def explained(error: PipelineError) -> None:
    """Every message has its four parts."""
    assert all((error.message, error.where, error.found, error.expected, error.next_step))


# ---- which files


def test_a_directory_is_searched_in_depth_without_hidden_names(tmp_path):
    wanted = [write(tmp_path / name) for name in ("b.parquet", "sub/a.parquet", "no_extension")]
    for name in (".hidden.parquet", "_temporary/x.parquet", "sub/_metadata", ".git/y.parquet"):
        write(tmp_path / name)
    (tmp_path / "_SUCCESS").touch()
    assert paths(str(tmp_path)) == sorted(map(str, wanted))


def test_files_globs_and_lists_give_each_file_once_and_sorted(tmp_path):
    a, b, c = (write(tmp_path / name) for name in ("x/a.parquet", "y/b.parquet", "y/c.parquet"))
    assert paths(str(a)) == [str(a)]
    assert paths(f"file://{a}") == [str(a)]
    assert paths(f"{tmp_path}/*/[bc].parquet") == [str(b), str(c)]
    assert paths(f"{tmp_path}/**/*.parquet") == [str(a), str(b), str(c)]
    assert paths((str(c), f"{tmp_path}/y", str(a))) == [str(a), str(b), str(c)]


def test_a_glob_passes_over_hidden_names_unless_they_are_spelled_out(tmp_path):
    write(tmp_path / "_x.parquet")
    a = write(tmp_path / "a.parquet")
    assert paths(f"{tmp_path}/*.parquet") == [str(a)]
    assert paths(f"{tmp_path}/_*.parquet") == [f"{tmp_path}/_x.parquet"]


def test_a_relative_path_is_made_absolute(tmp_path, monkeypatch):
    write(tmp_path / "in" / "a.parquet")
    monkeypatch.chdir(tmp_path)
    assert paths("in") == [str(tmp_path / "in" / "a.parquet")]


def test_a_link_to_a_folder_above_is_not_walked_for_ever(tmp_path):
    a = write(tmp_path / "data" / "a.parquet")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    assert paths(str(tmp_path / "data")) == [str(a)]


def test_a_path_with_wildcard_characters_that_exists_is_taken_as_it_is(tmp_path):
    a = write(tmp_path / "odd[1].parquet")
    write(tmp_path / "odd1.parquet")
    assert paths(str(a)) == [str(a)]


def test_discovery_does_not_depend_on_the_order_of_the_listing(tmp_path, monkeypatch):
    for number in range(12):
        write(tmp_path / f"{number}.parquet")
    before = discover(Source(path=str(tmp_path)))
    real = os.scandir

    class Shuffled:
        def __init__(self, folder):
            with real(folder) as entries:
                self.entries = list(entries)
            random.Random(3).shuffle(self.entries)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *args):
            return None

    monkeypatch.setattr("pipeline.sources.locate.os.scandir", Shuffled)
    assert discover(Source(path=str(tmp_path))) == before


def test_size_and_modification_time_are_recorded(tmp_path):
    path = write(tmp_path / "a.parquet")
    os.utime(path, ns=(1, 1_700_000_000_123_456_789))
    (file,) = discover(Source(path=str(path))).files
    mtime, inode, ctime, tail = file.version.split()
    assert (file.size, mtime, inode, ctime) == (
        path.stat().st_size,
        "mtime:1700000000123456789",
        f"inode:{path.stat().st_ino}",
        f"ctime:{path.stat().st_ctime_ns}",
    )
    assert tail.startswith("tail:")


def test_any_fsspec_file_system_works():
    memory = fsspec.filesystem("memory")
    memory.pipe("/lake-discover/country=DE/a.parquet", _bytes(pa.table({"a": [1, 2]})))
    memory.pipe("/lake-discover/country=FR/b.parquet", _bytes(pa.table({"a": [3]})))
    memory.pipe("/lake-discover/_SUCCESS", b"")
    try:
        for path in ("memory://lake-discover", "memory://lake-discover/*", "memory://lake-discover/*/*.parquet"):
            found = discover(Source(path=path))
            assert [file.path for file in found.files] == [
                "memory:///lake-discover/country=DE/a.parquet",
                "memory:///lake-discover/country=FR/b.parquet",
            ]
            assert all(file.version.startswith("modified:") for file in found.files)
            assert read_all(found) == [
                {"a": 1, "country": "DE"},
                {"a": 2, "country": "DE"},
                {"a": 3, "country": "FR"},
            ]
        with pytest.raises(MissingInput, match="lake-discover"):
            discover(Source(path="memory://lake-discovr"))
    finally:
        memory.rm("/lake-discover", recursive=True)


def test_the_version_of_an_object_is_its_etag(monkeypatch):
    from pipeline.sources import locate as module

    assert module._version({"ETag": '"abc"', "LastModified": "x"}) == "etag:abc"
    assert module._version({"LastModified": "2026-01-01"}) == "modified:2026-01-01"


def _bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


# ---- hive partition folders


def test_hive_keys_are_decoded_typed_and_may_be_null(tmp_path):
    write(tmp_path / "year=2024" / "city=K%C3%B6ln%2FDeutz" / "a.parquet", pa.table({"x": [1]}))
    write(tmp_path / "year=2025" / "city=__HIVE_DEFAULT_PARTITION__" / "b.parquet", pa.table({"x": [2]}))
    found = discover(Source(path=str(tmp_path)))
    assert found.files[0].hive_keys == (("year", "2024"), ("city", "Köln/Deutz"))
    assert found.key_names == ("year", "city")
    assert found.schema == pa.schema([("x", pa.int64()), ("year", pa.int64()), ("city", pa.string())])
    assert read_all(found) == [
        {"x": 1, "year": 2024, "city": "Köln/Deutz"},
        {"x": 2, "year": 2025, "city": None},
    ]


def test_a_key_is_text_as_soon_as_one_value_is(tmp_path):
    for value in ("1", "two"):
        write(tmp_path / f"k={value}" / "a.parquet")
    assert discover(Source(path=str(tmp_path))).schema.field("k").type == pa.string()


def test_keys_of_files_that_are_named_begin_at_the_base(tmp_path):
    path = write(tmp_path / "k=1" / "l=2" / "a.parquet")
    assert discover(Source(path=str(path))).key_names == ()
    assert discover(Source(path=[str(path)], base=str(tmp_path))).key_names == ("k", "l")
    assert discover(Source(path=[str(path)], base=f"{tmp_path}/k=1/")).key_names == ("l",)
    assert discover(Source(path=[str(path)], base=str(tmp_path / "other"))).key_names == ()


def test_keys_of_a_glob_begin_at_its_first_wildcard(tmp_path):
    write(tmp_path / "k=1" / "l=2" / "a.parquet")
    assert discover(Source(path=f"{tmp_path}/k=1/l=*/*.parquet")).key_names == ("l",)
    assert discover(Source(path=f"{tmp_path}/k=*/l=2/a.parquet")).key_names == ("k", "l")
    assert discover(Source(path=f"{tmp_path}/k=1/l=2/a.parquet")).key_names == ()


def test_a_column_in_the_file_hides_a_key_of_its_name(tmp_path):
    write(tmp_path / "a=7" / "f.parquet", pa.table({"a": [1]}))
    found = discover(Source(path=str(tmp_path)))
    assert (found.key_names, read_all(found)) == ((), [{"a": 1}])


def test_partition_folders_that_differ_are_refused(tmp_path):
    write(tmp_path / "k=1" / "a.parquet")
    write(tmp_path / "b.parquet")
    with pytest.raises(SchemaDrift, match="partition folders") as caught:
        discover(Source(path=str(tmp_path)))
    explained(caught.value)


# ---- row groups


def test_rows_and_bytes_are_those_of_the_footer(tmp_path):
    table = pa.table({"a": list(range(10)), "s": ["x" * 100] * 10, "n": [{"u": 1, "v": [1, 2]}] * 10})
    path = write(tmp_path / "a.parquet", table, row_group_size=4)
    found = discover(Source(path=str(path)))
    metadata = pq.read_metadata(path)
    groups = found.files[0].row_groups
    assert [group.rows for group in groups] == [4, 4, 2]
    assert groups[0].bytes >= metadata.row_group(0).total_byte_size - 1
    (only_a,) = resize(found, columns=("a",))
    chunk = metadata.row_group(0).column(0)
    assert only_a.row_groups[0].bytes == pytest.approx(chunk.total_uncompressed_size, rel=0.1)
    assert only_a.row_groups[0].compressed == pytest.approx(chunk.total_compressed_size, rel=0.1)
    assert [group.rows for group in only_a.row_groups] == [4, 4, 2]


def test_of_many_small_files_some_are_measured_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.sources.parquet.footers.SAMPLED_FILES", 8)
    for number in range(40):
        texts = [f"{number} {row} " + "x" * (row % 50) for row in range(200)]
        write(tmp_path / f"{number:02}.parquet", pa.table({"a": texts, "b": range(200)}), use_dictionary=False)
    odd = pa.table({"b": range(200), "a": ["y" * 500 + str(row) for row in range(200)]})
    write(tmp_path / "10b.parquet", odd, use_dictionary=False)
    sampled = discover(Source(path=str(tmp_path)))
    monkeypatch.setattr("pipeline.sources.parquet.footers.SAMPLED_FILES", 1000)
    each = discover(Source(path=str(tmp_path)))
    whole = [[file.row_groups[0].bytes for file in one.files] for one in (sampled, each)]
    assert whole[0] == pytest.approx(whole[1], rel=0.01), "nothing is to be divided where all columns are read"
    in_one, in_many = (discover(Source(path=str(tmp_path)), threads=threads) for threads in (1, 8))
    for columns in (("a",), ("b",)):
        found, exact = ([file.row_groups[0] for file in resize(one, columns=columns)] for one in (sampled, each))
        assert found[11] == exact[11], "another order of the columns"
        for one, other in zip(found, exact, strict=True):
            assert one.rows == other.rows
            assert one.bytes == pytest.approx(other.bytes, rel=0.1)
            assert one.compressed == pytest.approx(other.compressed, rel=0.1)
        assert resize(in_one, columns=columns) == resize(in_many, columns=columns)


def test_bytes_of_fixed_width_values_are_counted_decoded(tmp_path):
    write(tmp_path / "a.parquet", pa.table({"a": pa.array([7] * 100_000, pa.int64())}))
    (file,) = discover(Source(path=str(tmp_path))).files
    assert file.row_groups[0].bytes == 800_000


def test_zero_rows_and_zero_row_groups_are_fine(tmp_path):
    schema = pa.schema([("a", pa.int64())])
    write(tmp_path / "a.parquet", schema.empty_table())
    with pq.ParquetWriter(tmp_path / "b.parquet", schema):
        pass
    found = discover(Source(path=str(tmp_path)))
    assert [file.rows for file in found.files] == [0, 0]
    assert read_all(found) == []
    assert sample_batch(found, columns=("a",), schema=found.schema) is None


def test_statistics_and_keys_decide_which_row_groups_are_wanted(tmp_path):
    write(tmp_path / "k=1" / "a.parquet", pa.table({"a": list(range(10))}), row_group_size=5)
    write(tmp_path / "k=2" / "a.parquet", pa.table({"a": list(range(10))}), row_group_size=5)
    found = discover(Source(path=str(tmp_path), filter="k == 2 and a >= 5"))
    assert [[group.selected for group in file.row_groups] for file in found.files] == [[False, False], [False, True]]
    assert [row["a"] for row in read_all(found)] == [5, 6, 7, 8, 9]


# ---- columns


def test_files_are_read_by_column_name_whatever_their_order(tmp_path):
    write(tmp_path / "a.parquet", pa.table({"x": [1], "y": ["a"]}))
    write(tmp_path / "b.parquet", pa.table({"y": ["b"], "x": [2]}))
    found = discover(Source(path=str(tmp_path)))
    assert read_all(found) == [{"x": 1, "y": "a"}, {"x": 2, "y": "b"}]


def test_differences_that_are_not_drift(tmp_path):
    strict = pa.schema([pa.field("x", pa.int64(), nullable=False), pa.field("s", pa.string()),
                        pa.field("l", pa.list_(pa.field("element", pa.int32(), nullable=False)))])  # fmt: skip
    loose = pa.schema([("x", pa.int64()), ("s", pa.large_string()), ("l", pa.list_(pa.field("item", pa.int32())))])
    write(tmp_path / "a.parquet", pa.table({"x": [1], "s": ["a"], "l": [[1]]}, schema=strict))
    write(tmp_path / "b.parquet", pa.table({"x": [None], "s": ["b"], "l": [[None]]}, schema=loose))
    found = discover(Source(path=str(tmp_path)))
    assert found.schema.field("x").nullable
    assert read_all(found) == [{"x": 1, "s": "a", "l": [1]}, {"x": None, "s": "b", "l": [None]}]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (pa.table({"x": ["1"], "y": [1]}), ["'x'", "string", "int64"]),
        (pa.table({"x": [1]}), ["'y'", "no such column"]),
        (pa.table({"x": [1], "yy": [1]}), ["'y'", "nearest is 'yy'"]),
        (pa.table({"x": [1], "y": [1], "z": [1]}), ["'z'"]),
        (pa.table([[1], [1], [2]], names=["x", "y", "y"]), ["'y'", "more than once"]),
    ],
)
def test_drift_names_both_files_the_column_and_the_types(tmp_path, other, words):
    first = write(tmp_path / "a.parquet", pa.table({"x": [1], "y": [2]}))
    second = write(tmp_path / "b.parquet", other)
    with pytest.raises(SchemaDrift) as caught:
        discover(Source(path=str(tmp_path)))
    explained(caught.value)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert str(second) in text
    assert "more than once" in text or str(first) in text


def test_columns_that_are_not_needed_may_differ(tmp_path):
    write(tmp_path / "a.parquet", pa.table({"x": [1], "y": [2]}))
    write(tmp_path / "b.parquet", pa.table({"z": [1.5], "x": [3], "y": ["text"]}))
    found = discover(Source(path=str(tmp_path), columns=("x",)))
    assert found.schema.names == ["x"]
    assert found.available == ("x", "y")
    assert read_all(found) == [{"x": 1}, {"x": 3}]
    assert discover(Source(path=str(tmp_path)), columns=("x",)).schema.names == ["x"]


def test_an_unknown_column_of_the_spec_is_a_spec_error_with_the_nearest(tmp_path):
    write(tmp_path / "a.parquet", pa.table({"income": [1]}))
    with pytest.raises(SpecError, match="did you mean income"):
        discover(Source(path=str(tmp_path), columns=("incme",)))
    with pytest.raises(SpecError, match="did you mean income"):
        discover(Source(path=str(tmp_path), filter="incme > 1"))


def test_a_filter_column_is_read_even_where_it_is_not_selected(tmp_path):
    write(tmp_path / "a.parquet", pa.table({"x": [1, 2], "y": [1, 2]}))
    assert discover(Source(path=str(tmp_path), columns=("x",), filter="y > 1")).schema.names == ["x", "y"]


# ---- what is wrong


def test_a_missing_path_names_what_is_near(tmp_path):
    write(tmp_path / "customers" / "a.parquet")
    with pytest.raises(MissingInput, match="did you mean customers") as caught:
        discover(Source(path=str(tmp_path / "custmers")))
    explained(caught.value)
    with pytest.raises(MissingInput, match="customers"):
        discover(Source(path=str(tmp_path / "custmers" / "deep" / "a.parquet")))


@pytest.mark.parametrize("path", ["", "/*.parquet"])
def test_no_file_at_all(tmp_path, path):
    (tmp_path / "_SUCCESS").touch()
    with pytest.raises(MissingInput) as caught:
        discover(Source(path=str(tmp_path) + path))
    explained(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"id,age\n1,2\n", "not a Parquet file"),
        (b"PAR1", "damaged"),
        (b"PAR1" + bytes(100), "truncated"),
        (b"PAR1" + bytes(100) + b"PARE", "encrypted"),
    ],
)
def test_a_file_that_is_no_parquet_is_named(tmp_path, content, words):
    write(tmp_path / "a.parquet")
    bad = tmp_path / "b.parquet"
    bad.write_bytes(content)
    with pytest.raises(CorruptInput, match=words) as caught:
        discover(Source(path=str(tmp_path)))
    explained(caught.value)
    assert caught.value.where == str(bad)


def test_truncation_anywhere_is_found_at_plan_time(tmp_path):
    whole = _bytes(pa.table({"a": list(range(1000)), "s": [str(n) for n in range(1000)]}))
    path = tmp_path / "a.parquet"
    for cut in random.Random(1).sample(range(len(whole)), 60):
        path.write_bytes(whole[:cut])
        with pytest.raises(CorruptInput):
            discover(Source(path=str(path)))


def test_an_unknown_protocol_is_a_spec_error():
    with pytest.raises(SpecError, match="cannot be used"):
        discover(Source(path="nonsense://bucket/x"))


def test_an_error_in_a_footer_read_on_a_thread_is_that_of_the_first_file_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.sources.parquet.discover._SLOW_SECONDS", 0.0)
    for number in range(40):
        write(tmp_path / f"{number:02d}.parquet")
    for number in (25, 30):
        (tmp_path / f"{number}.parquet").write_bytes(b"nonsense")
    with pytest.raises(CorruptInput) as caught:
        discover(Source(path=str(tmp_path)), threads=4)
    assert caught.value.where.endswith("25.parquet")


def test_threads_find_the_same(tmp_path, monkeypatch):
    for number in range(40):
        write(tmp_path / f"{number:02d}.parquet", pa.table({"a": pa.array(range(number), pa.int64())}))
    alone = discover(Source(path=str(tmp_path)), threads=1)
    monkeypatch.setattr("pipeline.sources.parquet.discover._SLOW_SECONDS", 0.0)
    assert discover(Source(path=str(tmp_path)), threads=4) == alone


# ---- sample


def test_a_sample_has_the_first_rows_that_the_filter_keeps(tmp_path):
    write(tmp_path / "a.parquet", pa.table({"a": list(range(10))}).slice(0, 0))
    write(tmp_path / "b.parquet", pa.table({"a": list(range(5000))}), row_group_size=500)
    found = discover(Source(path=str(tmp_path), filter="a >= 700"))
    batch = sample_batch(found, columns=("a",), schema=found.schema, rows=100)
    assert batch is not None
    assert 0 < batch.table.num_rows <= 300
    assert batch.table.column("a")[0].as_py() == 700
