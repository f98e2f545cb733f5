"""Receipts: read back unchanged, one by one and spooled; an incomplete receipt is rejected."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.agreement import Agreement
from pipeline.common.rows import RowCounts
from pipeline.errors import StateCorrupt
from pipeline.jobs.receipts import (
    SPOOLED,
    DataFile,
    DeviceTotals,
    FragmentCounts,
    Receipt,
    Receipts,
    SpooledReceipts,
    Timings,
    Totals,
)
from pipeline.jobs.splits import partition_key
from pipeline.models.engines import EngineUse

WHOLE = Receipt(
    partition="00042",
    plan="p" * 64,
    model="m" * 64,
    attempt="a",
    data=DataFile("data/00042-a.parquet", 7, 100, "sha256:" + "d" * 64),
    rejects=DataFile("rejects/00042-a.parquet", 2, 50, "xxh3-128:" + "e" * 32),
    rows=RowCounts(10, 7, 2, 1),
    files=(FragmentCounts("lake/ü.parquet", 5, 15, RowCounts(10, 7, 2, 1)),),
    seconds=Timings(0.5, 0.0, 1.5, 0.25, 2.0, 3.0),
    worker="host:1",
    batch_rows=1000,
    reasons={"contract:x:null": 2},
    engine=EngineUse({"trees": 7}, {"trees": 0.5, "xgboost": 1.5}, 4, 5, 0, 0.25, ("x86-64-v3",), ("too small",)),
)
COUNTS = st.builds(RowCounts, *[st.integers(0, 1 << 40)] * 4)


@pytest.mark.fault(56)
def test_round_trip() -> None:
    """A receipt, with or without splits, is read back from its JSON unchanged."""
    assert Receipt.from_json(WHOLE.to_json_bytes()) == WHOLE
    split = Receipt("1", "p", "m", "a", None, None, RowCounts(), (), splits=("1.0", "1.1"), split_points=(5,))
    assert Receipt.from_json(split.to_json_bytes()) == split


def test_agreements_of_challengers_are_stored_and_added_up() -> None:
    """The sums have any number of digits; a receipt without a challenger has no such field."""
    first, second = Agreement(3, 2, -(2**70), 2**71, 0.5, 1, 0), Agreement(1, 1, 5, 5, 0.25, 0, 2)
    receipts = [replace(WHOLE, partition=str(n), agreements={"q": one}) for n, one in enumerate((first, second))]
    assert [Receipt.from_json(receipt.to_json_bytes()) for receipt in receipts] == receipts
    assert Totals.of([*receipts, WHOLE]).agreements == {"q": first + second}
    assert b"agreements" not in WHOLE.to_json_bytes()


@given(COUNTS, st.lists(st.builds(FragmentCounts, st.text(), st.integers(0), st.integers(0), COUNTS), max_size=3))
def test_round_trip_of_counts(rows: RowCounts, files: list[FragmentCounts]) -> None:
    """Counts and paths of any value are read back unchanged."""
    receipt = Receipt("0", "p", "m", "a", None, None, rows, tuple(files))
    assert Receipt.from_json(receipt.to_json_bytes()) == receipt


class TestDevice:
    """The GPU that scored rows."""

    ON_GPU = replace(WHOLE, device="GPU-1", device_peak=3 << 30, engine=EngineUse({"xgboost-cuda": 6, "xgboost": 1}))

    def test_round_trip(self) -> None:
        assert Receipt.from_json(self.ON_GPU.to_json_bytes()) == self.ON_GPU

    def test_receipt_of_a_cpu_has_no_field_of_a_device(self) -> None:
        """Versions that know no devices read it."""
        assert not {"device", "device_peak"} & json.loads(WHOLE.to_json_bytes()).keys()

    def test_totals_are_sums_of_rows_and_the_largest_peak(self) -> None:
        other = replace(self.ON_GPU, device="GPU-2", device_peak=1)
        totals = Totals.of([WHOLE, self.ON_GPU, replace(self.ON_GPU, device_peak=5 << 30), other])
        assert totals.devices == {"GPU-1": DeviceTotals(12, 5 << 30), "GPU-2": DeviceTotals(6, 1)}


def test_receipt_is_one_line() -> None:
    """The JSON of a receipt contains no line break."""
    assert WHOLE.to_json_bytes().count(b"\n") == 0


def test_every_cut_is_refused() -> None:
    """A receipt truncated at any byte raises `StateCorrupt`."""
    text = WHOLE.to_json_bytes()
    for length in range(len(text)):
        with pytest.raises(StateCorrupt, match="damaged"):
            Receipt.from_json(text[:length], where="00042.json")


@pytest.mark.parametrize("name", [*json.loads(WHOLE.to_json_bytes())])
def test_a_missing_field_is_refused(name: str) -> None:
    """A missing field raises `StateCorrupt` with the file, unless the field is optional."""
    record = json.loads(WHOLE.to_json_bytes())
    del record[name]
    optional = {"worker", "batch_rows", "reasons", "engine", "round", "before", "peak_memory"}
    if name in optional:
        Receipt.from_json(json.dumps(record).encode())
    else:
        with pytest.raises(StateCorrupt) as caught:
            Receipt.from_json(json.dumps(record).encode(), where="00042.json")
        assert caught.value.where == "00042.json"


@pytest.mark.parametrize("text", [b"null", b"[]", b"3", b"\xff", b'{"schema_version": 9}'])
def test_something_else_is_refused(text: bytes) -> None:
    """JSON that is not a receipt of this version raises `StateCorrupt`."""
    with pytest.raises(StateCorrupt):
        Receipt.from_json(text)


def test_receipt_of_an_older_version_is_refused_by_its_version() -> None:
    """The error names both versions, so that nobody looks for damage."""
    old = {**json.loads(WHOLE.to_json_bytes()), "schema_version": 1}
    with pytest.raises(StateCorrupt) as caught:
        Receipt.from_json(json.dumps(old).encode())
    assert "schema_version 1" in str(caught.value.found)
    assert "schema_version 3" in str(caught.value.expected)


def test_seconds_add_up() -> None:
    """Timings add field by field."""
    assert (WHOLE.seconds + WHOLE.seconds).total == 6.0


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


def test_receipts_are_sorted_by_round_and_source_order(kind: type[Receipts]) -> None:
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
