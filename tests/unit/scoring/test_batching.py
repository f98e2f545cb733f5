from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.common.rows import Fragment
from pipeline.scoring.batching import rebatch
from pipeline.sources import SourceBatch, read_batches
from pipeline.testing.recipes import make_partition

SIZES = (70, 0, 13, 1, 40)


@pytest.fixture(scope="module")
def fragments(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fragment, ...]:
    """Of files of these sizes; the first one begins and ends inside its file."""
    folder, paths, start = tmp_path_factory.mktemp("batches"), [], 0
    for number, rows in enumerate(SIZES):
        paths.append(folder / f"{number}.parquet")
        ids = np.arange(start, start + rows)
        pq.write_table(pa.table({"id": ids, "third": ids % 3}), paths[-1], row_group_size=16)
        start += rows
    first, *others = make_partition(*paths).fragments
    return (Fragment(first.path, 5, 60, first.group_start, first.group_stop, first.bytes), *others)


def read(fragments: tuple[Fragment, ...], *, keep: str | None, batch_rows: int) -> Iterator[SourceBatch]:
    schema = pa.schema([pa.field("id", pa.int64()), pa.field("third", pa.int64())])
    return read_batches(fragments, columns=schema.names, schema=schema, filter=keep, batch_rows=batch_rows)


@settings(deadline=None)
@given(
    st.sampled_from([None, "third == 0", "id < 8 or id > 62", "id > 1000", "id > 100", "id < 30"]),
    st.integers(1, 90),
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
)
def test_each_batch_stands_for_a_range_of_rows(
    fragments: tuple[Fragment, ...], keep: str | None, batch_rows: int, sizes: list[int]
) -> None:
    whole = list(read(fragments, keep=keep, batch_rows=batch_rows))
    wanted = itertools.cycle(sizes)
    found = list(rebatch(iter(whole), fragments, lambda: next(wanted)))
    for part in ("fragment", "row", "filtered"):
        kept = [getattr(batch, part) for batch in found]
        if part != "filtered":
            assert np.concatenate([*kept, []]).tolist() == [
                value for batch in whole for value in getattr(batch, part).tolist()
            ]
    ids = [value for batch in found for value in batch.table.column("id").to_pylist()]
    assert ids == [value for batch in whole for value in batch.table.column("id").to_pylist()]
    starts = np.cumsum([0, *(fragment.rows for fragment in fragments)])
    done = np.zeros(len(fragments), np.int64)
    for batch in found:
        done += batch.filtered + np.bincount(batch.fragment, minlength=len(fragments))
        # What was told of so far are the first rows of the partition, fragment by fragment.
        assert done.tolist() == np.diff(np.minimum(starts, done.sum())).tolist()
    assert not whole or done.sum() == starts[-1]


def test_a_little_more_than_wanted_is_not_cut(fragments: tuple[Fragment, ...]) -> None:
    (whole,) = read(fragments, keep=None, batch_rows=1000)
    assert next(iter(rebatch([whole], fragments, lambda: 80))) is whole
    assert [batch.table.num_rows for batch in rebatch([whole], fragments, lambda: 50)] == [50, 59]
