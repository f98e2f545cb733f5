from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path

import dask
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputChanged, SchemaDrift, StepFailed
from pipeline.execution.dask_config import override_config
from pipeline.execution.dask_step import (
    apply_step,
    build_frame,
    empty_frame,
    fingerprint,
    frame_schema,
    key_columns,
    partition_table,
    step_config,
)
from pipeline.plan.dask_recipe import DaskRecipe, DaskTable, DaskWork
from pipeline.sources import discover
from pipeline.spec.parts import Source

ORDERS = pa.table(
    {
        "order": range(300),
        "customer": pa.array([n % 20 if n % 7 else None for n in range(300)], pa.int64()),
        "price": pa.array([Decimal(n) / 4 for n in range(300)], pa.decimal128(8, 2)),
        "day": pa.array([date(2024, 1, 1 + n % 28) for n in range(300)]),
    }
)
CUSTOMERS = pa.table({"customer": range(20), "country": [f"c{n % 3}" for n in range(20)]})


@pytest.fixture
def work(tmp_path: Path) -> DaskWork:
    for name, table in (("orders", ORDERS), ("customers", CUSTOMERS)):
        (tmp_path / name).mkdir()
        for number in range(2):
            half = table.num_rows // 2
            part = table.slice(number * half, half)
            pq.write_table(part, tmp_path / name / f"{number}.parquet", row_group_size=50)
    tables = {name: DaskTable.of(discover(Source(path=tmp_path / name))) for name in ("orders", "customers")}
    recipe = DaskRecipe("joins:history", b"", (("customers", tables["customers"]),), partition_bytes=3000)
    return DaskWork(recipe, tables["orders"], threads=2, partitions=1, fingerprint="")


def joined(df, customers):
    return df.merge(customers, on="customer")


def sums(df, customers):
    return df.merge(customers, on="customer").groupby("country").agg({"price": "sum"}).reset_index()


def computed(frame) -> pd.DataFrame:
    with override_config({**step_config("tasks"), "scheduler": "synchronous"}):
        return frame.compute()


def in_tasks(work: DaskWork) -> DaskWork:
    return replace(work, recipe=replace(work.recipe, shuffle="tasks"))


def test_tables_are_read_as_planned(work):
    frame = build_frame(work, lambda df, customers: df)
    assert frame.npartitions == len(work.packed()[""]) > 1
    rows = computed(frame)
    assert pa.Table.from_pandas(rows, preserve_index=False).replace_schema_metadata(None).equals(ORDERS)
    narrow = computed(frame[["price"]])
    assert list(narrow.columns) == ["price"]


def test_joins_keep_the_types(work):
    rows = computed(build_frame(in_tasks(work), joined))
    expected = ORDERS.join(CUSTOMERS, "customer", join_type="inner").sort_by("order")
    made = partition_table(rows.sort_values("order"), frame_schema(rows, where="x"), where="x")
    assert made.select(expected.column_names).equals(expected)


def test_a_changed_file_is_found(work):
    pq.write_table(ORDERS.slice(0, 10), work.main.files[0].path)
    with pytest.raises(InputChanged):
        computed(build_frame(work, lambda df, customers: df))


def test_the_origin_of_rows(work):
    recipe = replace(work.recipe, origin=True)
    rows = computed(build_frame(replace(work, recipe=recipe), lambda df, customers: df[["order", "_file", "_row"]]))
    assert list(rows["_row"]) == [*range(150), *range(150)]
    assert list(rows["_file"]) == [file.path for file in work.main.files for _ in range(150)]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda df, customers: df.compute(), "must be lazy"),
        (lambda df, customers: df.persist(), "must be lazy"),
        (lambda df, customers: df[df.order > len(df)], "must be lazy"),
        (lambda df, customers: df.sort_values("order"), "must be lazy"),
        (lambda df, customers: df.set_index("order").reset_index(), "must be lazy"),
        (lambda df, customers: df.groupby("customer").agg({"price": "sum"}), "has an index"),
        (lambda df, customers: df["price"], "no Dask DataFrame"),
        (lambda df, customers: df["nothing"].to_frame(), "a dask step failed"),
        (lambda df: df, "a dask step failed"),
    ],
)
def test_steps_that_cannot_run(work, step, message):
    with pytest.raises(StepFailed, match=message) as caught:
        build_frame(work, step)
    assert caught.value.where.startswith("joins:history")


def test_the_line_that_computes_is_named(work):
    with pytest.raises(StepFailed, match="must be lazy") as caught:
        build_frame(work, lambda df, customers: df.compute())
    assert caught.value.where.endswith(__file__)


def test_nothing_can_hide_a_computation(work):
    def hides(df, customers):
        try:
            df.compute()
        except Exception:
            return df
        return df

    with pytest.raises(StepFailed, match="must be lazy"):
        build_frame(work, hides)


def test_a_step_is_planned_without_rows(work):
    named = {"customers": empty_frame(CUSTOMERS.schema)}
    result = apply_step(sums, empty_frame(ORDERS.schema), named, where="joins:sums")
    planned = frame_schema(result._meta, where="joins:sums")
    made = partition_table(computed(build_frame(in_tasks(work), sums)), planned, where="joins:sums")
    assert made.num_rows == 3


def test_a_column_without_a_type(work):
    meta = pd.DataFrame({"text": pd.Series([], dtype=object)})
    with pytest.raises(StepFailed, match="has no type"):
        frame_schema(meta, where="x")


def test_partitions_of_other_columns_or_types():
    schema = pa.schema([("a", pa.int64())])
    with pytest.raises(SchemaDrift, match="other columns"):
        partition_table(pd.DataFrame({"b": [1]}), schema, where="x")
    with pytest.raises(SchemaDrift, match="another type"):
        partition_table(pd.DataFrame({"a": ["text"]}), schema, where="x")


def test_columns_that_join_or_group(work):
    assert key_columns(build_frame(work, sums), ORDERS.column_names) == ["customer"]


def test_other_work_has_another_fingerprint(work):
    def printed(work, step, shuffle="p2p"):
        frame = build_frame(work, step)
        return fingerprint(frame, frame_schema(frame._meta, where="x"), shuffle=shuffle)[0]

    first = printed(work, joined)
    assert printed(work, joined) == first
    others = [
        printed(work, sums),
        printed(work, joined, shuffle="tasks"),
        printed(replace(work, recipe=replace(work.recipe, partition_bytes=1000)), joined),
        printed(replace(work, columns=("order",)), joined),
    ]
    assert len({first, *others}) == 5


def test_the_fingerprint_is_equal_in_another_process(work, tmp_path):
    code = """
import json, sys
sys.path[:0] = sys.argv[2].split(":")
import importlib
from pipeline.plan.dask_recipe import DaskWork
test = importlib.import_module(sys.argv[3])
work = DaskWork.from_record(json.load(open(sys.argv[1])))
frame = test.build_frame(work, test.joined)
print(*test.fingerprint(frame, test.frame_schema(frame._meta, where="x"), shuffle="p2p"))
"""
    import json

    (tmp_path / "work").write_text(json.dumps(work.to_record()))
    frame = build_frame(work, joined)
    own = fingerprint(frame, frame_schema(frame._meta, where="x"), shuffle="p2p")
    arguments = [str(tmp_path / "work"), ":".join(sys.path), __name__]
    other = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    assert other.stdout.split() == [own[0], str(own[1])]


def test_a_record_gives_the_work_back(work):
    assert DaskWork.from_record(work.to_record()) == work
    assert DaskWork.from_record(work.to_record()).digest == work.digest
    assert replace(work, attempt=1).digest != work.digest
    assert work.halved().largest_bytes < work.largest_bytes
    assert dask.config.get("scheduler", None) is None, "the guard is gone"
