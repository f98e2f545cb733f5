"""Masked rejects: columns that are left out, hashes with a key, hidden messages, and the checks of the policy."""

from __future__ import annotations

import datetime
import hashlib
import hmac
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import SpecError
from pipeline.plan.columns import check_masked_names
from pipeline.scoring.outputs import reject_schema
from pipeline.scoring.reject_masking import HIDDEN_MESSAGE, RejectMask, masked_columns
from pipeline.spec.parts import Errors

KEY = "k" * 32
SOURCE = pa.schema([("id", pa.int64()), ("name", pa.string()), ("age", pa.int32())])


def errors(**fields: Any) -> Errors:
    return Errors.model_validate(fields)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REJECT_KEY", KEY)


def rejects() -> pa.Table:
    rows = {"id": [7, None], "name": ["Ann", "Bob"], "age": [999, 5], "_file": ["a", "a"], "_row": [0, 4]}
    more = {"_reason": ["contract:age:max"] * 2, "_message": ["age is 999, above 110", "age of Bob"]}
    return pa.table({**rows, **more}, schema=reject_schema(SOURCE))


def expected_hash(text: str) -> str:
    return hmac.new(KEY.encode(), text.encode(), hashlib.sha256).hexdigest()


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, ["id", "name", "age"]),
        ({"keep_columns": ["age"]}, ["age"]),
        ({"keep_columns": []}, []),
        ({"hash_columns": ["id"], "hash_key": "env:REJECT_KEY"}, ["id", "name", "age"]),
        ({"keep_columns": ["age"], "hash_columns": ["id"], "hash_key": "env:REJECT_KEY"}, ["id", "age"]),
    ],
)
def test_stored_columns(fields: dict[str, Any], names: list[str]) -> None:
    mask = RejectMask.of(errors(**fields), SOURCE)
    stored = mask.apply(rejects())
    assert stored.column_names == [*names, "_file", "_row", "_reason", "_message"]
    assert stored.schema == mask.schema(reject_schema(SOURCE))
    hidden = [HIDDEN_MESSAGE] * 2 if fields else rejects()["_message"].to_pylist()
    assert stored["_message"].to_pylist() == hidden
    hashed = fields.get("hash_columns", [])
    assert set(masked_columns({k.encode(): v.encode() for k, v in mask.metadata.items()})) == {
        name for name in SOURCE.names if name not in names or name in hashed
    }
    if hashed:
        assert stored["id"].to_pylist() == [expected_hash("7"), None]


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        ("Ann", pa.string(), "Ann"),
        ("Zoë", pa.large_string(), "Zoë"),
        (True, pa.bool_(), "true"),
        (datetime.date(2024, 5, 6), pa.date32(), "2024-05-06"),
        ("DE", pa.dictionary(pa.int32(), pa.string()), "DE"),
        ([1, 2], pa.list_(pa.int64()), "[1, 2]"),
    ],
)
def test_hashed_text(value: Any, kind: pa.DataType, text: str) -> None:
    """The text that is hashed is the value's own, so that others can compute the hash."""
    schema = pa.schema([("id", kind)])
    mask = RejectMask.of(errors(hash_columns=["id"], hash_key="env:REJECT_KEY"), schema)
    table = pa.table({"id": pa.array([value], pa.string() if pa.types.is_dictionary(kind) else kind)})
    table = table.cast(schema)
    for name, column in zip(reject_schema(schema).names[1:], (["a"], [0], ["r"], ["m"]), strict=True):
        table = table.append_column(name, pa.array(column))
    assert mask.apply(table)["id"].to_pylist() == [expected_hash(text)]


def test_short_or_missing_key(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = errors(hash_columns=["id"], hash_key="env:REJECT_KEY")
    monkeypatch.setenv("REJECT_KEY", "short")
    with pytest.raises(SpecError, match="too short"):
        RejectMask.of(policy, SOURCE)
    monkeypatch.delenv("REJECT_KEY")
    with pytest.raises(SpecError, match="REJECT_KEY"):
        RejectMask.of(policy, SOURCE)


@pytest.mark.parametrize(
    "fields",
    [
        {"hash_columns": ["id"]},
        {"hash_key": "env:REJECT_KEY"},
        {"hash_columns": ["id"], "hash_key": "a key as it is"},
        {"retain": "a month"},
    ],
)
def test_invalid_policy(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"hash_|retain|secret"):
        errors(**fields)


@pytest.mark.parametrize("field", ["keep_columns", "hash_columns"])
def test_unknown_column(field: str) -> None:
    policy = errors(**{field: ["idd"]}, **({"hash_key": "env:REJECT_KEY"} if field == "hash_columns" else {}))
    with pytest.raises(SpecError, match="no such column") as caught:
        check_masked_names(policy, SOURCE)
    assert caught.value.where == f"errors.{field}"
