from __future__ import annotations

import threading
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import StorageError
from pipeline.sources import discover, read_batches, selected_fragments
from pipeline.sources.parquet import fetching, opening
from pipeline.sources.parquet.fetching import FILES_AHEAD, SmallFiles, fits, small_files
from pipeline.spec.parts import Source

COLUMNS = 12


class Counted(MemoryFileSystem):
    """A remote file system in memory whose files are read by counted requests."""

    protocol = "counted"
    store: ClassVar[dict[str, Any]] = {}
    requests: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("counted://", "memory://"))

    def unstrip_protocol(self, name):
        return f"counted://{name.lstrip('/')}"

    def cat_file(self, path, start=None, end=None, **options):
        self.requests.append(path)
        return super().cat_file(path, start=start, end=end, **options)

    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode=mode, **options)
        if mode != "rb":
            return file
        return Asked(self._strip_protocol(path), bytes(file.getbuffer()), self.requests)


class Asked(fsspec.spec.AbstractBufferedFile):
    """A file without a cache: each read is a request."""

    def __init__(self, path: str, content: bytes, requests: list[str]) -> None:
        self.content, self.requests = content, requests
        super().__init__(None, path, "rb", cache_type="none", size=len(content))

    def _fetch_range(self, start, end):
        self.requests.append(self.path)
        return self.content[start:end]


@pytest.fixture
def requests():
    fsspec.register_implementation("counted", Counted, clobber=True)
    Counted.store.clear()
    Counted.requests.clear()
    return Counted.requests


def write(name: str, *, rows: int, group: int) -> pa.Table:
    table = pa.table({f"c{n}": np.random.default_rng(n).random(rows) for n in range(COLUMNS)})
    with Counted().open(name, "wb") as file:
        pq.write_table(table, file, row_group_size=group, use_dictionary=False)
    return table


def read(requests: list[str], columns: list[str] | None = None) -> tuple[pa.Table, list[str]]:
    """Return the rows of all files, and the requests for them."""
    found = discover(Source(path="counted://lake"))
    fragments = [fragment for file in found.files for fragment in selected_fragments(file)]
    requests.clear()
    batches = read_batches(
        fragments,
        columns=columns or found.physical,
        schema=found.schema if columns is None else pa.schema([found.schema.field(name) for name in columns]),
        batch_rows=1000,
        versions=found.versions,
    )
    return pa.concat_tables([batch.table for batch in batches]), list(requests)


def test_a_small_remote_file_takes_one_request(requests):
    tables = [write(f"/lake/{n}.parquet", rows=500, group=100) for n in range(3)]
    table, made = read(requests)
    assert table.equals(pa.concat_tables(tables))
    assert sorted(made) == [f"/lake/{n}.parquet" for n in range(3)]


def test_a_row_group_of_a_large_remote_file_takes_one_request(requests):
    expected = write("/lake/a.parquet", rows=30_000, group=10_000)
    table, made = read(requests)
    assert table.equals(expected)
    assert len(made) == 1 + 3, "its footer, and each of its row groups"


def test_only_the_columns_that_are_read_are_requested(requests):
    expected = write("/lake/a.parquet", rows=30_000, group=10_000)
    table, made = read(requests, ["c2", "c9"])
    assert table.equals(expected.select(["c2", "c9"]))
    assert len(made) == 1 + 3 * 2


def test_a_row_group_too_large_for_memory_is_read_column_by_column(requests, monkeypatch):
    monkeypatch.setattr(fetching, "GROUP_BYTES", 10_000 * COLUMNS * 8 // 2)
    monkeypatch.setattr(opening, "REMOTE_BUFFER_BYTES", 1 << 16)
    expected = write("/lake/a.parquet", rows=30_000, group=10_000)
    table, made = read(requests)
    assert table.equals(expected)
    assert len(made) > 1 + 3 * COLUMNS


def test_the_bytes_of_nested_and_of_dotted_columns_count(tmp_path):
    nested = pa.array([{"x": 1.0, "y": [2.0] * 10}] * 1000)
    pq.write_table(
        pa.table({"s": nested, "a.b": np.random.default_rng(0).random(1000), "c": [1] * 1000}), tmp_path / "a"
    )
    metadata = pq.read_metadata(tmp_path / "a")
    chunks = [metadata.row_group(0).column(leaf) for leaf in range(4)]
    sizes = {chunk.path_in_schema: chunk.total_compressed_size for chunk in chunks}
    for column, size in {"s": sizes["s.x"] + sizes["s.y.list.element"], "a.b": sizes["a.b"], "c": sizes["c"]}.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fetching, "GROUP_BYTES", size)
            assert fits(metadata, range(1), [column])
            patch.setattr(fetching, "GROUP_BYTES", size - 1)
            assert not fits(metadata, range(1), [column])


def test_files_are_fetched_at_the_same_time_and_given_in_order():
    together = threading.Barrier(4, timeout=30)

    def read(path: str) -> bytes:
        together.wait()
        return path.encode()

    paths = [str(number) for number in range(8)]
    with small_files(paths, read) as files:
        assert [files.take(path) for path in paths] == [path.encode() for path in paths]


def test_an_error_is_raised_for_its_file_alone():
    def read(path: str) -> bytes:
        if path == "b":
            raise StorageError("no", where=path)
        return path.encode()

    with small_files(["a", "b", "c"], read) as files:
        assert files.take("a") == b"a"
        with pytest.raises(StorageError) as caught:
            files.take("b")
        assert caught.value.where == "b"
        assert files.take("c") == b"c"


def test_a_bounded_number_of_files_is_held():
    asked = []
    files = SmallFiles(map(str, range(1000)), lambda path: asked.append(path) or b"")
    for number in range(10):
        files.take(str(number))
    files.close()
    assert len(asked) <= 10 + FILES_AHEAD


def test_no_thread_is_started_for_local_files(tmp_path, monkeypatch):
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "a.parquet")
    monkeypatch.setattr(fetching, "ThreadPoolExecutor", None)
    found = discover(Source(path=str(tmp_path)))
    fragments = list(selected_fragments(found.files[0]))
    batches = read_batches(fragments, columns=["a"], schema=found.schema, batch_rows=10, versions=found.versions)
    assert [batch.table.num_rows for batch in batches] == [2]
