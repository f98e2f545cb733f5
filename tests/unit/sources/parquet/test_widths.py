"""Bytes of a plan are those of decoded values, also of texts that repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sources import adapter, discover, read_batches, sample_batch, selected_fragments
from pipeline.sources.parquet import widths
from pipeline.spec.parts import Source

ROWS = 20_000

COLUMNS: dict[str, Any] = {
    "repeating texts": lambda: pa.array([f"w{n % 5}" * 200 for n in range(ROWS)]),
    "long texts": lambda: pa.array([f"{n} " * 100 for n in range(ROWS)]),
    "texts with a common begin": lambda: pa.array(["x" * 300 + str(n) for n in range(ROWS)]),
    "repeating bytes": lambda: pa.array([bytes([n % 3]) * 500 for n in range(ROWS)]),
    "nested lists": lambda: pa.array([[[n % 2] * 9] * 9 for n in range(ROWS)]),
    "lists of texts": lambda: pa.array([["tag" * 30] * (n % 4) for n in range(ROWS)]),
    "structs": lambda: pa.array([{"a": "y" * 90, "b": n % 3} for n in range(ROWS)]),
    "nulls": lambda: pa.nulls(ROWS, pa.string()),
    "mostly nulls": lambda: pa.array([None if n % 10 else "z" * 400 for n in range(ROWS)]),
    "views": lambda: pa.array([f"w{n % 5}" * 20 for n in range(ROWS)], pa.string_view()),
    "numbers": lambda: pa.array([n % 2 for n in range(ROWS)], pa.int64()),
}


@pytest.mark.fault(98)
@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}], ids=["dictionary", "plain"])
def test_planned_bytes_are_those_of_a_batch(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    """A text of 400 bytes that repeats was planned with 1 byte."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"s": COLUMNS[kind]()}), path, row_group_size=ROWS // 2, **options)
    discovery = discover(Source(path=str(path)))
    (file,) = discovery.files
    planned = sum(group.bytes for group in file.row_groups)
    batches = read_batches(list(selected_fragments(file)), columns=["s"], schema=discovery.schema, batch_rows=ROWS // 2)
    decoded = sum(batch.table.nbytes for batch in batches)
    assert planned >= 0.9 * decoded
    assert planned <= 1.5 * decoded + ROWS * 9 or kind == "texts with a common begin"


def test_the_widest_sample_counts(tmp_path: Path) -> None:
    """Files differ: the projection is an upper bound, not the mean."""
    for number, width in enumerate((10, 20, 900)):
        pq.write_table(pa.table({"s": ["x" * width] * 5000}), tmp_path / f"{number}.parquet")
    files = discover(Source(path=str(tmp_path))).files
    assert all(file.row_groups[0].bytes >= 900 * 5000 for file in files)


def test_damaged_rows_are_left_to_the_job(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"s": ["x" * 50] * 5000}), path, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    assert discover(Source(path=str(path))).files[0].rows == 5000


@pytest.mark.fault(98)
def test_rows_of_many_bytes_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan must not need more memory than its sample."""
    monkeypatch.setattr(widths, "MOST_BYTES", 1000)
    monkeypatch.setattr(widths, "decoded_widths", lambda *args: pytest.fail("decoded"))
    pq.write_table(pa.table({"s": ["x" * 2000, "y" * 2000]}), tmp_path / "a.parquet")
    (file,) = discover(Source(path=str(tmp_path))).files
    assert file.row_groups[0].bytes >= 4000


@pytest.mark.fault(98)
def test_the_sample_for_steps_is_limited_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan with a step took 4.4 GB for 1,000 rows of long texts."""
    monkeypatch.setattr(adapter, "SAMPLED_BYTES", 100_000)
    pq.write_table(pa.table({"s": ["x" * 5000] * 500}), tmp_path / "a.parquet")
    discovery = discover(Source(path=str(tmp_path)))
    batch = sample_batch(discovery, columns=["s"], schema=discovery.schema)
    assert batch is not None
    assert 10 <= batch.table.num_rows <= 20
    monkeypatch.setattr(adapter, "SAMPLED_BYTES", 1)
    batch = sample_batch(discovery, columns=["s"], schema=discovery.schema)
    assert batch is not None
    assert batch.table.num_rows == 1
