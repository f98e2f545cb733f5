"""The measurement of promises, on models that depend on the rows of a call in known ways."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.models.flavors import measure as module
from pipeline.models.flavors.library import LibraryPredictor, predict_in_chunks
from pipeline.models.flavors.measure import measure, sample_table
from pipeline.models.model import Feature, ModelVersion, OutputType, Promise
from pipeline.spec.model_ref import OutputKind

FEATURES = (Feature("x"),)


class Fake(LibraryPredictor):
    """A model whose result depends on its call as a function says."""

    def __init__(self, depends: Any, promise: Promise | None = None) -> None:
        outputs = (OutputType("prediction", "float64", 1),)
        version = ModelVersion("m", "1", "", "0", "f", 1, FEATURES, "other", 1, output_types=outputs, promise=promise)
        super().__init__(version, threads=1)
        self.depends = depends
        self.sizes: list[int] = []

    def encode(self, table: pa.Table, *, order: str = "C") -> np.ndarray:
        return table.column(0).to_numpy()

    def example(self) -> np.ndarray:
        return np.zeros(1)

    def call(self, rows: np.ndarray, kind: OutputKind) -> np.ndarray:
        self.sizes.append(len(rows))
        return np.asarray(rows + self.depends(rows), np.float64)


def in_place(rows: np.ndarray) -> np.ndarray:
    return np.arange(len(rows)) % 2 * 1e-9


CASES = {
    "of nothing": (lambda rows: 0.0, "exact", 0),
    "of the number of rows": (lambda rows: len(rows) * 1e-9, "fixed", 1024),
    "of the place": (in_place, "fixed", 1),
    "of the other rows": (lambda rows: float(rows.mean()) * 1e-9, "fixed", 1),
}


@pytest.mark.parametrize("name", CASES)
def test_the_strongest_promise_that_holds(name: str) -> None:
    depends, kind, chunk = CASES[name]
    found = measure(Fake(depends), sample_table(FEATURES, 400), ["prediction"])
    assert (found.kind, found.chunk, found.rows) == (kind, chunk, 400)
    assert (found.noise > 0) == (kind != "exact")


def test_what_changes_from_call_to_call_is_code() -> None:
    random = np.random.default_rng(0)
    found = measure(Fake(lambda rows: random.random()), sample_table(FEATURES, 200), ["prediction"])
    assert found.kind == "code"
    assert found.noise > 0


def test_what_two_threads_disturb_is_code() -> None:
    at_work: set[int] = set()
    barrier = threading.Barrier(2)

    def disturbed(rows: np.ndarray) -> float:
        if threading.current_thread() is threading.main_thread():
            return 0.0
        at_work.add(threading.get_ident())
        barrier.wait(10)
        return 1e-9

    assert measure(Fake(disturbed), sample_table(FEATURES, 200), ["prediction"]).kind == "code"


def test_smaller_calls_are_preferred_where_large_ones_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLOW_CHUNK", -1.0)
    found = measure(Fake(lambda rows: len(rows) * 1e-9), sample_table(FEATURES, 200), ["prediction"])
    assert (found.kind, found.chunk) == ("fixed", 32)


def test_a_fixed_predictor_makes_calls_of_one_size() -> None:
    predictor = Fake(lambda rows: len(rows) * 1.0, Promise("fixed", 32))
    found = predictor.predict(np.arange(70.0), kind="prediction")
    np.testing.assert_array_equal(found, np.arange(70.0) + 32)
    assert predictor.sizes == [32, 32, 32]


def test_the_last_call_is_filled_up_with_its_first_row() -> None:
    seen: list[np.ndarray] = []
    predictor = Fake(lambda rows: seen.append(rows) or 0.0)
    predict_in_chunks(predictor, np.array([1.0, 2.0, 3.0]), "prediction", chunk=2)
    assert [rows.tolist() for rows in seen] == [[1.0, 2.0], [3.0, 3.0]]


def test_made_up_rows_have_the_kinds_of_the_features() -> None:
    features = (
        Feature("n"),
        Feature("i", "integer"),
        Feature("flag", "indicator"),
        Feature("c", "category", ("a", "b")),
        Feature("t", "text"),
        Feature("v", "any"),
    )
    table = sample_table(features, 50, values={"v": ["u", "w"]})
    assert table.column_names == ["n", "i", "flag", "c", "t", "v"]
    assert set(table["c"].to_pylist()) == {"a", "b"}
    assert set(table["v"].to_pylist()) == {"u", "w"}
    assert set(table["flag"].to_pylist()) == {0, 1}
    assert pa.types.is_string(table["t"].type)
    assert table.equals(sample_table(features, 50, values={"v": ["u", "w"]}))
