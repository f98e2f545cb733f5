from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.common.rows import RowCounts
from pipeline.jobs.receipts import SPOOLED, DataFile, FragmentCounts, Receipt, Receipts, SpooledReceipts
from pipeline.jobs.splits import partition_key
from pipeline.models.engines import EngineUse


def receipt(partition: str, *, round: int = 0, **fields: Any) -> Receipt:
    return Receipt(
        partition=partition,
        plan="p" * 64,
        model="m" * 64,
        attempt=f"attempt-{partition}",
        data=DataFile(f"data/{partition}.parquet", 10, 1000, "0" * 64),
        rejects=None,
        rows=RowCounts(10, 9, 1, 0),
        files=(FragmentCounts("/lake/a.parquet", 0, 10, RowCounts(10, 9, 1, 0)),),
        reasons={"null:x": 1},
        engine=EngineUse(rows={"trees": 10}, reasons=("because",)),
        round=round,
        **fields,
    )


@pytest.fixture(params=[Receipts, SpooledReceipts])
def kind(request: pytest.FixtureRequest) -> type[Receipts]:
    found: type[Receipts] = request.param
    return found


def test_what_goes_in_comes_out_by_round_and_source_order(kind: type[Receipts]) -> None:
    """Receipts are kept by round and partition, sort in source order, and know their splits."""
    some = [receipt("00010"), receipt("00002", splits=("00002.0", "00002.1")), receipt("00001", round=1)]
    some += [receipt("00002.1"), receipt("00002.0")]
    held = kind(some)
    assert len(held) == 5
    assert sorted(held, key=repr) == sorted(some, key=repr)
    assert [(one.round, one.partition) for one in held.sorted(partition_key)] == [
        (0, "00002"),
        (0, "00002.0"),
        (0, "00002.1"),
        (0, "00010"),
        (1, "00001"),
    ]
    assert set(held.partitions(0)) == {"00010", "00002", "00002.0", "00002.1"}
    assert held.splits(0) == {"00002": some[1]}
    assert held.splits(1) == {}
    assert some[0] in held
    assert replace(some[0], round=3) not in held


def test_of_two_for_a_partition_the_last_one_is_there(kind: type[Receipts]) -> None:
    """A second receipt of a partition replaces the first."""
    held = kind([receipt("00001", splits=("00001.0",))])
    later = receipt("00001", worker="another")
    held.add(later)
    assert list(held) == [later]
    assert not held.is_split(0, "00001")


def test_a_book_that_outgrows_its_memory_goes_to_a_file_and_loses_nothing() -> None:
    """Receipts beyond the memory limit move to a file and stay readable."""
    held, count = SpooledReceipts(), 0
    while held._end <= 1.5 * SPOOLED:
        held.add(receipt(f"{count:05d}", batch_rows=count))
        count += 1
    assert held._file._rolled  # type: ignore[attr-defined]
    assert [one.batch_rows for one in held.sorted(partition_key)] == list(range(count))
    held.add(receipt("00000", batch_rows=-1))
    assert held.get(0, "00000").batch_rows == -1
    assert held.get(0, f"{count - 1:05d}").batch_rows == count - 1
