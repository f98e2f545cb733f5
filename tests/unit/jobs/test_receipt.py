"""Receipts: read back unchanged; an incomplete receipt is rejected."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.rows import RowCounts
from pipeline.errors import StateCorrupt
from pipeline.jobs.receipts import DataFile, FragmentCounts, Receipt, Timings
from pipeline.models.engines import EngineUse

WHOLE = Receipt(
    partition="00042",
    plan="p" * 64,
    model="m" * 64,
    attempt="a",
    data=DataFile("data/00042-a.parquet", 7, 100, "d" * 64),
    rejects=DataFile("rejects/00042-a.parquet", 2, 50, "r" * 64),
    rows=RowCounts(10, 7, 2, 1),
    files=(FragmentCounts("lake/ü.parquet", 5, 15, RowCounts(10, 7, 2, 1)),),
    seconds=Timings(0.5, 0.0, 1.5, 0.25, 2.0, 3.0),
    worker="host:1",
    batch_rows=1000,
    reasons={"contract:x:null": 2},
    engine=EngineUse({"trees": 7}, {"trees": 0.5, "xgboost": 1.5}, 4, 5, 0, 0.25, ("numba 0.68",), ("too small",)),
)
COUNTS = st.builds(RowCounts, *[st.integers(0, 1 << 40)] * 4)


def test_round_trip() -> None:
    """A receipt, with or without splits, is read back from its JSON unchanged."""
    assert Receipt.from_json(WHOLE.to_json_bytes()) == WHOLE
    split = Receipt("1", "p", "m", "a", None, None, RowCounts(), (), splits=("1.0", "1.1"))
    assert Receipt.from_json(split.to_json_bytes()) == split


@given(COUNTS, st.lists(st.builds(FragmentCounts, st.text(), st.integers(0), st.integers(0), COUNTS), max_size=3))
def test_round_trip_of_counts(rows: RowCounts, files: list[FragmentCounts]) -> None:
    """Counts and paths of any value are read back unchanged."""
    receipt = Receipt("0", "p", "m", "a", None, None, rows, tuple(files))
    assert Receipt.from_json(receipt.to_json_bytes()) == receipt


def test_it_is_one_line() -> None:
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
    optional = {"worker", "batch_rows", "reasons", "engine", "cuts", "round", "before", "peak_memory"}
    if name in optional:
        Receipt.from_json(json.dumps(record).encode())
    else:
        with pytest.raises(StateCorrupt) as caught:
            Receipt.from_json(json.dumps(record).encode(), where="00042.json")
        assert caught.value.where == "00042.json"


@pytest.mark.parametrize("text", [b"null", b"[]", b"3", b"\xff", b'{"schema_version": 2}'])
def test_something_else_is_refused(text: bytes) -> None:
    """JSON that is not a receipt of this version raises `StateCorrupt`."""
    with pytest.raises(StateCorrupt):
        Receipt.from_json(text)


def test_seconds_add_up() -> None:
    """Timings add field by field."""
    assert (WHOLE.seconds + WHOLE.seconds).total == 6.0
