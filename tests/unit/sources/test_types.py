"""Arrow types of columns."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sources.types import empty_table
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.inline import plan_inline, publish_inline, score_inline
from pipeline.testing.oracle import make_table

UUID = pa.uuid()
NESTED = (
    pa.struct([("id", UUID)]),
    pa.list_(UUID),
    pa.large_list(UUID),
    pa.list_(UUID, 2),
    pa.map_(pa.string(), UUID),
    pa.struct([("ids", pa.list_(pa.json_(pa.string())))]),
)


@pytest.mark.parametrize("kind", NESTED, ids=str)
def test_empty_table_has_nested_extension_types(kind: pa.DataType) -> None:
    """As in shredded variants; `pyarrow.Schema.empty_table` raises ArrowNotImplementedError."""
    schema = pa.schema([pa.field("a", kind, nullable=False, metadata={"k": "v"}), ("b", pa.int8())], metadata={"m": ""})
    table = empty_table(schema)
    assert table.schema.equals(schema, check_metadata=True)
    assert table.num_rows == 0


@pytest.mark.parametrize("kind", [pa.struct([("id", UUID)]), pa.list_(UUID)], ids=str)
def test_nested_extension_types_pass_a_job(
    make_spec: Callable[..., JobSpec], tmp_path: Path, kind: pa.DataType
) -> None:
    ids = [uuid.uuid4().bytes for _ in range(3)]
    inner = pa.ExtensionArray.from_storage(UUID, pa.array(ids, pa.binary(16)))
    column: pa.Array
    if pa.types.is_struct(kind):
        column = pa.StructArray.from_arrays([inner], fields=[kind.field(0)])
    else:
        column = pa.ListArray.from_arrays(pa.array([0, 1, 1, 3], pa.int32()), inner, type=kind)
    pq.write_table(make_table(3, seed=1).append_column("nested", column), tmp_path / "nested.parquet")
    spec = make_spec(source={"path": str(tmp_path / "nested.parquet")}, score={"keep": ["nested"]})
    job = score_inline(plan_inline(spec, directory=tmp_path / "jobs"), directory=tmp_path / "jobs", job="nested")
    publish_inline(job)
    (output,) = (tmp_path / "out").glob("*.parquet")
    assert pq.read_table(output)["nested"].combine_chunks().equals(column)
