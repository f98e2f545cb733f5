"""Columns without nulls, by the statistics in footers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sources import Discovery, discover
from pipeline.spec.parts import Source


def find(folder: Path, **fields: str) -> Discovery:
    return discover(Source(path=str(folder), **fields), count_nulls=True)


def write(path: Path, *, nulls: tuple[int, ...] = (), **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.arange(100)
    table = pa.table(
        {
            "id": rows,
            "n": pa.array(rows, mask=np.isin(rows, nulls)),
            "flag": rows > 50,
            "x": rows / 2,
            "pair": pa.array([{"a": row, "b": row} for row in range(100)]),
        }
    )
    pq.write_table(table, path, row_group_size=10, **options)


def test_columns_without_nulls_in_any_file_are_known(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    assert find(tmp_path).never_null == {"id", "n", "flag"}
    write(tmp_path / "b.parquet", nulls=(95,))
    assert find(tmp_path).never_null == {"id", "flag"}
    assert discover(Source(path=str(tmp_path))).never_null == frozenset()


def test_only_row_groups_that_are_read_count(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", nulls=(95,))
    assert find(tmp_path, filter="id < 50").never_null == {"id", "n", "flag"}
    assert find(tmp_path, filter="id > 50").never_null == {"id", "flag"}


def test_a_column_without_statistics_may_have_nulls(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", write_statistics=["flag"])
    assert find(tmp_path).never_null == {"flag"}


def test_a_required_column_has_no_nulls(tmp_path: Path) -> None:
    schema = pa.schema([pa.field("id", pa.int64(), nullable=False), pa.field("n", pa.int64())])
    pq.write_table(pa.table({"id": [1], "n": [1]}, schema=schema), tmp_path / "a.parquet", write_statistics=False)
    assert find(tmp_path).never_null == {"id"}


@pytest.mark.parametrize(("folder", "known"), [("k=3", {"k"}), ("k=__HIVE_DEFAULT_PARTITION__", set())])
def test_a_hive_key_is_null_in_the_default_partition_only(tmp_path: Path, folder: str, known: set[str]) -> None:
    write(tmp_path / "k=2" / "a.parquet")
    write(tmp_path / folder / "b.parquet")
    assert find(tmp_path).never_null == {"id", "n", "flag"} | known


def test_a_quarantined_file_may_hold_nulls_once_it_is_repaired(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    found = discover(Source(path=str(tmp_path)), quarantine_files=True, count_nulls=True)
    assert (len(found.rejected), found.never_null) == (1, frozenset())
