"""Sketches of parts add up to the sketch of the whole, and their quantiles are right to the width of a bucket."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.common.sketch import (
    KEPT_VALUES,
    MOST_VALUES,
    NumberSketch,
    Sketches,
    ValueSketch,
    is_in_sample,
    is_sketched,
    sample_every,
    sample_keys,
    slot_edges,
)

NAN, INF = float("nan"), float("inf")


def sketched(table: pa.Table) -> Sketches:
    sketches = Sketches()
    sketches.add(table)
    return sketches


def number(values: Any, **options: Any) -> NumberSketch:
    sketch = NumberSketch()
    sketch.add(np.asarray(values), **options)
    return sketch


def some_table(rows: int = 20_000) -> pa.Table:
    numbers = np.random.default_rng(7)
    amounts = numbers.lognormal(sigma=3, size=rows)
    amounts[::997] = NAN
    return pa.table(
        {
            "normal": numbers.normal(size=rows),
            "amount": pa.array(amounts, mask=np.arange(rows) % 91 == 0),
            "count": numbers.integers(-(2**40), 2**62, size=rows),
            "flag": numbers.random(rows) < 0.3,
            "text": pa.array([f"name {n}" for n in numbers.integers(0, 3000, rows)]),
            "plan": pa.array(np.array(["basic", "gold"])[numbers.integers(0, 2, rows)]).dictionary_encode(),
        }
    )


def test_any_cut_and_order_packs_to_the_same_bytes() -> None:
    table = some_table()
    whole = sketched(table).pack()
    for seed in range(5):
        numbers = np.random.default_rng(seed)
        order = numbers.permutation(table.num_rows)
        parts = [sketched(table.take(pa.array(rows))).pack() for rows in np.array_split(order, 37)]
        joined = Sketches()
        for part in parts[::-1]:
            # As receipts store them: with sorted keys.
            joined.add_packed(json.loads(json.dumps(part, sort_keys=True)))
        assert json.dumps(joined.pack(), sort_keys=True) == json.dumps(whole, sort_keys=True)


def test_objects_add_up_like_packed_parts() -> None:
    table = some_table(3000)
    joined = sketched(table.slice(0, 1000))
    joined += pickle.loads(pickle.dumps(sketched(table.slice(1000, 5))))
    joined += sketched(table.slice(1005))
    assert joined.pack() == sketched(table).pack()


def test_figures_of_numbers() -> None:
    found = number([1.5, NAN, -INF, INF, -0.0, 0.0, 1e300, -1e300], nulls=2)
    assert (found.rows, found.nulls, found.nans, found.infinite, found.finite) == (10, 2, 1, 2, 5)
    assert (found.least, found.most) == (-1e300, 1e300)
    assert found.counts.sum() == 5
    assert found.counts[np.searchsorted(slot_edges(), 0.0)] == 2  # both signs of zero
    assert number([1.5, 2.5]).mean == 2.0


def test_sums_do_not_overflow() -> None:
    large = number(np.full(3000, 2.0**41))
    assert large.mean == 2.0**41
    assert number([1e300, -1e300, 3.0]).total == 3 << 20


@pytest.mark.parametrize("shape", ["normal", "lognormal", "uniform", "beta"])
def test_quantiles_are_right_to_a_bucket(shape: str) -> None:
    numbers = np.random.default_rng(3)
    draws = {
        "normal": numbers.normal(size=50_000),
        "lognormal": numbers.lognormal(sigma=2, size=50_000),
        "uniform": numbers.random(50_000),
        "beta": numbers.beta(2, 30, 50_000),
    }[shape]
    shares = (0.01, 0.1, 0.5, 0.9, 0.99)
    found = number(draws).quantiles(shares)
    assert found == pytest.approx(np.quantile(draws, shares), rel=1 / 32, abs=0.005 * draws.std())


def test_quantiles_of_whole_numbers_are_whole() -> None:
    assert number(np.array([0, 0, 1, 2, 2, 3])).quantiles((0.05, 0.5, 0.95)) == [0, 1, 3]
    assert number(np.zeros(9)).quantiles((0.5,)) == [0.0]
    assert np.isnan(NumberSketch().quantiles((0.5,))[0])


def test_histogram_counts_what_lies_between_its_edges() -> None:
    draws = np.random.default_rng(3).normal(size=100_000)
    edges = np.linspace(-2, 2, 9)
    assert number(draws).histogram(edges) == pytest.approx(np.histogram(draws, edges)[0], rel=0.02)
    assert number(np.full(10, 3.0)).histogram(np.array([2.5, 3.5])).tolist() == [10]
    assert NumberSketch().histogram(edges).sum() == 0


def test_texts_are_counted_one_by_one_up_to_a_limit() -> None:
    few = sketched(pa.table({"plan": ["a", "b", "a", None]})).columns["plan"]
    assert isinstance(few, ValueSketch)
    assert (few.rows, few.nulls, few.others, few.counts) == (4, 1, 0, {"a": 2, "b": 1})
    names = [f"name {n}" for n in range(MOST_VALUES + 1)] * 2
    many = sketched(pa.table({"plan": names})).columns["plan"]
    assert isinstance(many, ValueSketch)
    assert len(many.counts) == KEPT_VALUES
    assert set(many.counts.values()) == {2}
    assert many.rows == len(names) == many.others + sum(many.counts.values())


def test_a_long_text_is_shortened_and_stays_apart() -> None:
    texts = ["x" * 500 + str(n) for n in range(3)]
    sketch = sketched(pa.table({"text": texts})).columns["text"]
    assert isinstance(sketch, ValueSketch)
    assert len(sketch.counts) == 3
    assert max(map(len, sketch.counts)) <= 80


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_any_form_of_text_even_broken(kind: pa.DataType) -> None:
    values = pa.array([b"a", b"\xff", b"a", None]).cast(pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 4, values.buffers())
    column = broken.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else broken.cast(kind)
    sketch = sketched(pa.table({"text": column})).columns["text"]
    assert isinstance(sketch, ValueSketch)
    assert (sketch.counts, sketch.nulls) == ({"a": 2, "\ufffd": 1}, 1)


def test_without_rows() -> None:
    table = some_table(100).slice(0, 0)
    sketches = sketched(pa.concat_tables([table, table]))
    sketches += sketched(table.schema.empty_table())
    assert {one.rows for one in sketches.columns.values()} == {0}
    again = Sketches()
    again.add_packed(sketches.pack())
    assert again.pack() == sketches.pack()


def test_other_types_have_none() -> None:
    table = pa.table({"list": [[1.0]], "time": pa.array([0], pa.timestamp("us")), "date": pa.array([0], pa.date32())})
    assert sketched(table).pack() == {}
    assert [is_sketched(kind) for kind in table.schema.types] == [False] * 3
    decimals = pa.table({"price": pa.array([1, 2], pa.decimal128(9, 2))})
    assert sketched(decimals).columns["price"].rows == 2


def test_a_column_of_another_kind_is_an_error() -> None:
    joined = sketched(pa.table({"x": [1.0]}))
    with pytest.raises(TypeError, match="x: numbers in one part"):
        joined.add_packed(sketched(pa.table({"x": ["a"]})).pack())


def test_a_sample_depends_on_row_numbers_alone() -> None:
    assert [sample_every(rows) for rows in (0, 1, 20_000, 2**15 - 1, 2**15, 5_000_000)] == [1, 1, 1, 1, 2, 256]
    rows = np.arange(200_000)
    for every in (1, 2, 16, 256):
        whole = is_in_sample(sample_keys(rows), every=every)
        assert whole.sum() == pytest.approx(len(rows) / every, rel=0.02)
        assert np.array_equal(
            np.concatenate([is_in_sample(sample_keys(part), every=every) for part in np.split(rows, 8)]), whole
        )
        # Tables are often periodic.
        assert whole[::24].sum() == pytest.approx(len(rows) / every / 24, rel=0.1)


def test_columns_counted_together_are_those_counted_one_by_one() -> None:
    random = np.random.default_rng(5)
    columns: dict[str, np.ndarray] = {
        "float32": random.normal(size=500).astype(np.float32),
        "float64": random.lognormal(sigma=4.0, size=500),
        "int32": random.integers(-9, 9, 500).astype(np.int32),
        "zeros": np.array([0.0, -0.0] * 250),
        "with_nan": np.where(np.arange(500) % 7 == 0, np.nan, 1.5),
        "with_infinity": np.where(np.arange(500) % 7 == 0, -np.inf, 1.5),
        "huge": np.full(500, 1e300),
        "beyond": np.full(500, 2.0**45),
    }
    together = Sketches()
    together.add(pa.table(columns))
    for name, values in columns.items():
        alone = NumberSketch()
        alone.add(values)
        found = together.columns[name]
        assert isinstance(found, NumberSketch)
        assert found._header() == alone._header(), name
        assert [part.tolist() for part in found.sparse()] == [part.tolist() for part in alone.sparse()], name
        assert np.array_equal(found.counts, alone.counts), name


def test_few_values_become_many() -> None:
    values = np.random.default_rng(6).normal(size=6000)
    parts, whole = NumberSketch(), NumberSketch()
    whole.add(values)
    for part in np.array_split(values, 7):
        one = NumberSketch()
        one.add(part)
        parts += one
        assert int(one.sparse()[1].sum()) == len(part)
    assert parts._header() == whole._header()
    assert np.array_equal(parts.counts, whole.counts)
