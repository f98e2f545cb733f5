"""The output of a job is the same, bit by bit, however its input is cut into batches, row groups, files and partitions.

Batches are cut by time, so that every run of a job is such a cut.
"""

from __future__ import annotations

import datetime as dt
import decimal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.common.rows import Fragment
from pipeline.models.model import Feature, ModelVersion
from pipeline.models.registry import resolve
from pipeline.plan.plan import Partition
from pipeline.plan.recipe import MapRecipe
from pipeline.scoring.arrow import first_difference, one_array
from pipeline.scoring.batching import rebatch
from pipeline.scoring.scorer import Scorer
from pipeline.scoring.step_plan import plan_steps
from pipeline.scoring.steps import Step
from pipeline.sources import discover, read_batches, sample_batch
from pipeline.spec.model_ref import ModelRef
from pipeline.spec.parts import Source
from pipeline.testing.examples import choose
from pipeline.testing.oracle import train_model
from pipeline.testing.recipes import make_recipe

NAN = float("nan")
BIG = 2**53 + 1


class Predictor:
    """Twice the feature; some rows fail."""

    def encode(self, table: pa.Table) -> np.ndarray:
        return table.column(0).to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, 1)

    def predict(self, matrix: np.ndarray, *, kind: str) -> np.ndarray:
        if (matrix == 5).any():
            raise ValueError("five")
        return matrix[:, 0] * 2

    def is_out_of_memory(self, error: BaseException) -> bool:
        return False


def some_raise(frame: pd.DataFrame) -> pd.DataFrame:
    if frame["n"].isin(range(3, 40, 7)).any():
        raise KeyError("three")
    return frame.assign(y=frame["x"] + 1)


STEPS: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "same": lambda frame: frame,
    "key of a nullable integer": lambda frame: frame.assign(key="c" + frame["id"].astype(str)),
    "key of an integer": lambda frame: frame.assign(key="c" + frame["n"].astype(str)),
    "renamed": lambda frame: frame.rename(columns={"id": "customer", "flag": "is_old", "x": "z", "code": "plan"}),
    "filled": lambda frame: frame.fillna({"id": 0, "flag": False}),
    "sum of integers": lambda frame: frame.assign(id=frame["id"] + frame["n"], small=frame["n"] * 5),
    "clipped": lambda frame: frame.assign(x=frame["x"].clip(lower=0), f=frame["f"] * 2),
    "made missing": lambda frame: frame.assign(x=frame["x"].where(frame["n"] > 4), y=frame["x"] / frame["f"]),
    "few rows": lambda frame: frame[frame["n"].isin(range(0, 40, 3))],
    "no rows": lambda frame: frame[frame["n"] < 0],
    "in another order": lambda frame: frame.sort_values(["f", "n"], ascending=False),
    "some raise": some_raise,
    "not": lambda frame: frame.assign(flag=~frame["flag"]),
    "text": lambda frame: frame.assign(text=frame["text"].str.upper(), pair=frame["text"] + frame["code"]),
    "decimals": lambda frame: frame.assign(amount=frame["amount"].map(lambda v: v * 2, na_action="ignore")),
    "days": lambda frame: frame.assign(day=frame["day"].where(frame["n"] > 3, dt.date(2020, 1, 1))),
    "hours": lambda frame: frame.assign(
        at=frame["at"] + pd.Timedelta("1h"), hour=frame["at"].dt.hour.astype("float32")
    ),
    "one code": lambda frame: frame.assign(code=frame["code"].replace({"a": "z"})),
    "sums over columns": lambda frame: frame.assign(y=frame[["x", "f", "n", "x", "f", "n", "x", "f", "n"]].sum(axis=1)),
}
VALUE_BOUND = {"decimals", "days"}
"""Steps on objects of Python: with dtype_backend pyarrow their dtypes have other methods."""


def make_table(seed: int, rows: int, *, has_nulls: bool) -> pa.Table:
    random = np.random.default_rng(seed)

    def null(share: float = 0.2) -> np.ndarray:
        return random.random(rows) < (share if has_nulls else 0)

    values = np.where(random.random(rows) < 0.2, NAN, random.integers(-5, 9, rows))
    stamps = random.integers(0, 2**40, rows)
    cents = [decimal.Decimal(int(value)) / 100 for value in random.integers(0, 9999, rows)]
    return pa.table(
        {
            "n": pa.array(np.arange(rows) % 40, pa.int32()),
            "id": pa.array(BIG + random.integers(0, 99, rows), mask=null()),
            "flag": pa.array(random.random(rows) < 0.5, mask=null()),
            "x": pa.array(values, mask=null()),
            "f": pa.array(random.integers(-3, 3, rows).astype(np.float32), mask=null()),
            "text": pa.array(random.choice(["a", "bc", ""], rows), pa.string(), mask=null()),
            "code": pa.array(random.choice(["a", "b", "c"], rows), pa.string(), mask=null()).dictionary_encode(),
            "at": pa.array(stamps, pa.timestamp("us", "UTC"), mask=null()),
            "amount": pa.array(
                cents, pa.decimal128(12, 2), mask=null()
            ),
            "day": pa.array(random.integers(-9999, 9999, rows).astype(np.int32), pa.date32(), mask=null()),
        }
    )  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """One way to cut the input."""

    files: tuple[int, ...]
    """First row of each file but the first one."""
    groups: int
    """Rows of a row group."""
    partitions: tuple[int, ...]
    """First row of each partition but the first one."""
    read: int
    """Rows that are read at a time."""
    batch: int
    """Rows of a batch."""
    bytes: int = 0
    """Decoded bytes that are read at a time; 0: no limit."""


WHOLE = Cut((), 1000, (), 1000, 1000)


@st.composite
def cuts(draw: st.DrawFn, rows: int) -> Cut:
    edges = st.lists(st.integers(1, max(1, rows - 1)), max_size=4, unique=True).map(lambda found: tuple(sorted(found)))
    size = st.integers(1, rows)
    limit = st.one_of(st.just(0), st.integers(1, 4000))
    return Cut(draw(edges), draw(size), draw(edges), draw(size), draw(size), draw(limit))


def spans(edges: Sequence[int], rows: int) -> list[tuple[int, int]]:
    return [(start, stop) for start, stop in pairwise([0, *(edge for edge in edges if edge < rows), rows])]


def fragments_of(paths: list[Path], files: list[tuple[int, int]], start: int, stop: int, group: int) -> list[Fragment]:
    fragments = []
    for path, (first, last) in zip(paths, files, strict=True):
        a, b = max(start, first) - first, min(stop, last) - first
        if a < b:
            fragments.append(Fragment(str(path), a, b, a // group, -(-b // group), 1))
    return fragments


def run(table: pa.Table, cut: Cut, steps: tuple[Step, ...], version: ModelVersion, folder: Path) -> list[pa.Table]:
    """Plan, read and score the rows of ``table`` in that cut. Return output and rejects."""
    files, paths = spans(cut.files, table.num_rows), list[Path]()
    for number, (start, stop) in enumerate(files):
        paths.append(folder / f"{number:03}.parquet")
        pq.write_table(table.slice(start, stop - start), paths[-1], row_group_size=cut.groups)
    found = discover(Source(path=str(folder)), count_nulls=True)
    sample = sample_batch(found, columns=found.schema.names, schema=found.schema)
    assert sample is not None
    frames = plan_steps(steps, sample.table, never_null=found.never_null).schemas
    recipe = make_recipe(
        version,
        found.schema,
        maps=[
            MapRecipe(step.entrypoint, frame=schema.serialize().to_pybytes())
            for step, schema in zip(steps, frames, strict=True)
        ],
        frame=pa.schema([field.with_nullable(True) for field in frames[-1]]),
        features=["n"],
        never_null=tuple(found.never_null),
    )
    tables, rejects = [pa.ipc.read_schema(pa.py_buffer(recipe.output_schema)).empty_table()], []
    for start, stop in spans(cut.partitions, table.num_rows):
        partition = Partition("0", tuple(fragments_of(paths, files, start, stop, cut.groups)))
        scorer = Scorer(recipe, [Predictor()], steps)
        batches = read_batches(
            partition, columns=recipe.columns, schema=found.schema, batch_rows=cut.read, batch_bytes=cut.bytes
        )
        for batch in rebatch(batches, partition.fragments, lambda: cut.batch):
            scored = scorer.score_batch(batch)
            tables.append(scored.table)
            rejects += [] if scored.rejects is None else [scored.rejects]
    kept = [name for name in [*table.column_names, "_reason"] if name != "_row"]
    rejected = pa.concat_tables(rejects).select(kept) if rejects else found.schema.empty_table()
    return [pa.concat_tables(tables), rejected]


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    model = resolve(ModelRef.parse(str(train_model(tmp_path_factory.mktemp("model") / "m.ubj"))))
    return replace(model, features=(Feature("n", "number"),))


@pytest.mark.fault(81)
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=choose(15, of=2500))
@given(st.data())
def test_every_cut_gives_the_same_output(version: ModelVersion, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 24), label="rows")
    table = make_table(data.draw(st.integers(0, 2**32 - 1)), rows, has_nulls=data.draw(st.booleans()))
    backend = data.draw(st.sampled_from(["numpy", "pyarrow"]))
    names = data.draw(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=1), label="steps")
    if backend == "pyarrow" and VALUE_BOUND.intersection(names):
        return
    steps = tuple(Step(f"f:{name}", STEPS[name], backend) for name in names)
    results = []
    for cut in (WHOLE, data.draw(cuts(rows), label="cut")):
        with tempfile.TemporaryDirectory() as folder:
            results.append(run(table, cut, steps, version, Path(folder)))
    for one, other in zip(*results, strict=True):
        assert one.schema.equals(other.schema)
        assert one.num_rows == other.num_rows
        for name in one.column_names:
            row = first_difference(one_array(one.column(name)), one_array(other.column(name)))
            assert row is None, (name, one.column(name)[row], other.column(name)[row])
