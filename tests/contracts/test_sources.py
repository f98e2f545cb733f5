"""One suite for the source on every kind of storage: it finds the same files, reads the same rows, notices changes."""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import CorruptInput, InputChanged, MissingInput
from pipeline.sources import Discovery, discover, read_batches, selected_fragments
from pipeline.sources.parquet import reader
from pipeline.sources.parquet.fetching import SMALL_FILE_BYTES
from pipeline.spec.parts import Source
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import is_local_path
from pipeline.testing.s3 import S3

NAMES = ("day=1/a.parquet", "day=1/b.parquet", "day=2/a.parquet", "_hidden/x.parquet", "day=2/.tmp.parquet")
ROWS = 3000


def parquet(start: int, rows: int = ROWS) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": pa.array(range(start, start + rows), pa.int64())}), sink, row_group_size=1000)
    return sink.getvalue()


@dataclass
class Place:
    store: Store

    def discover(self, *paths: str, **options: Any) -> Discovery:
        urls = [f"{self.store.root}/{path}".rstrip("/") for path in paths]
        return discover(Source(path=urls if len(urls) > 1 else urls[0], **options))

    def names(self, found: Discovery) -> list[str]:
        folder = "/" + self.store.root.rpartition("/")[2] + "/"
        return [file.path.partition(folder)[2] for file in found.files]


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "s3":
        server: S3 = request.getfixturevalue("s3")
        root = server.url(uuid.uuid4().hex)
    else:
        root = str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    store = open_store(root)
    for number, name in enumerate(NAMES):
        store.replace(name, parquet(number * ROWS))
    return Place(store)


def read(found: Discovery) -> list[int]:
    fragments = [fragment for file in found.files for fragment in selected_fragments(file)]
    batches = read_batches(
        fragments, columns=["id"], schema=found.schema, batch_rows=700, filter=found.filter, versions=found.versions
    )
    return [row for batch in batches for row in batch.table["id"].to_pylist()]


@pytest.mark.parametrize(
    ("paths", "numbers"),
    [
        ((".",), (0, 1, 2)),
        (("day=1",), (0, 1)),
        (("day=*/a.parquet",), (0, 2)),
        (("day=1/b.parquet",), (1,)),
        (("day=2/*.parquet", "day=1/a.parquet", "day=2/a.parquet"), (0, 2)),
        (("_hidden/x.parquet",), (3,)),
    ],
)
def test_paths_stand_for_the_same_files_everywhere(
    place: Place, paths: tuple[str, ...], numbers: tuple[int, ...]
) -> None:
    found = place.discover(*("" if path == "." else path for path in paths))
    assert place.names(found) == [NAMES[number] for number in numbers]
    assert read(found) == [row for number in numbers for row in range(number * ROWS, (number + 1) * ROWS)]


def test_hive_keys_and_filters(place: Place) -> None:
    found = place.discover("", filter="day == 2 and id >= 6500")
    assert found.schema.field("day").type == pa.int64()
    assert read(found) == list(range(6500, 9000))


def test_missing_input_names_the_nearest(place: Place) -> None:
    with pytest.raises(MissingInput, match="did you mean day=1"):
        place.discover("dya=1")
    with pytest.raises(MissingInput):
        place.discover("day=3/*.parquet")


def test_a_damaged_file_is_named(place: Place) -> None:
    place.store.replace("day=1/b.parquet", parquet(0)[:-1])
    with pytest.raises(CorruptInput, match="truncated") as caught:
        place.discover("")
    assert caught.value.where.endswith("day=1/b.parquet")


def change(store: Store) -> None:
    store.replace("day=1/b.parquet", parquet(70_000))


def remove(store: Store) -> None:
    store.remove("day=1/b.parquet")


@pytest.mark.parametrize("spoil", [change, remove])
def test_a_file_that_changed_since_the_plan(place: Place, spoil: Callable[[Store], None]) -> None:
    found = place.discover("")
    spoil(place.store)
    with pytest.raises(InputChanged) as caught:
        read(found)
    assert caught.value.where.endswith("day=1/b.parquet")


@pytest.mark.parametrize("spoil", [change, remove])
def test_a_file_that_changes_between_the_look_and_the_reading(
    place: Place, spoil: Callable[[Store], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads without an error, as a file with other rows: only another look can tell."""
    found = place.discover("")

    def spoil_then(read: Callable[..., Any], path: str, *args: Any, **options: Any) -> Any:
        if path.endswith("day=1/b.parquet"):
            spoil(place.store)
        return read(path, *args, **options)

    function = "open_parquet" if is_local_path(place.store.root) else "fetch"
    monkeypatch.setattr(reader, function, partial(spoil_then, getattr(reader, function)))
    with pytest.raises(InputChanged):
        read(found)


@pytest.mark.parametrize("spoil", [change, remove])
def test_a_file_that_changes_while_it_is_read(place: Place, spoil: Callable[[Store], None]) -> None:
    place.store.replace("day=1/b.parquet", parquet(ROWS, SMALL_FILE_BYTES // 4))
    found = place.discover("day=1/b.parquet")
    assert found.files[0].size > SMALL_FILE_BYTES
    fragments = list(selected_fragments(found.files[0]))
    batches = read_batches(fragments, columns=["id"], schema=found.schema, batch_rows=700, versions=found.versions)
    next(batches)
    spoil(place.store)
    with pytest.raises(InputChanged):
        list(batches)
