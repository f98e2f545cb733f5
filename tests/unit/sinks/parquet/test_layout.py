"""The manifest of an output: damage is an error of state, never a bug."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import StateCorrupt
from pipeline.sinks.parquet import checks
from pipeline.sinks.parquet.layout import SinkState
from pipeline.storage.store import open_store


@pytest.mark.fault(73)
@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"a":' * 50_000, b"{}", b"null", b"\xff", b'{"schema_version": 1, "publications": 5}']
)
def test_damaged_manifest(data: bytes) -> None:
    """A manifest that is nested too deep, or is no manifest, is damaged."""
    with pytest.raises(StateCorrupt, match="the output's manifest is damaged"):
        SinkState.from_json(data, where="out/_manifest.json")


@pytest.mark.fault(73)
@pytest.mark.parametrize("schema", ["zz", "00", "ff" * 40, "é"])
def test_damaged_schema(tmp_path: Path, schema: str) -> None:
    """A schema that cannot be read makes the manifest damaged."""
    state = SinkState((), schema, ())
    with pytest.raises(StateCorrupt, match="the output's manifest is damaged"):
        checks._check_schema(open_store(str(tmp_path)), state, [], pa.schema([("x", pa.int64())]))
