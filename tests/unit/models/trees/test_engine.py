"""`TreeEngine` against a plain loop over nodes; accepted and rejected models."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from pipeline.errors import BadPrediction, ModelError
from pipeline.models.trees import TreeEngine, TreeTables, engine, kernel_name, library, unavailable
from pipeline.models.trees.tables import AS_IT_IS, TRUNCATED, VECTOR_LEAVES, ZERO, ZERO_IS_MISSING


def make_tables(
    *,
    splits: int = 30,
    trees: int = 9,
    outputs: int = 1,
    vector: bool = False,
    seed: int = 0,
    readings: tuple[int, ...] = (AS_IT_IS,),
    **types: Any,
) -> TreeTables:
    """Random trees on 5 features, the last one of categories.

    :param types: `TreeTables.value_type` and `TreeTables.sum_type`.
    """
    rng = np.random.default_rng(seed)
    left, right = [], []
    for _ in range(trees):
        first, tops, bottoms, leaves = len(left), [-1], [-1], [0]
        for _ in range(splits):
            node = leaves.pop(int(rng.integers(len(leaves))))
            tops[node], bottoms[node] = len(tops), len(tops) + 1
            leaves += [len(tops), len(tops) + 1]
            tops += [-1, -1]
            bottoms += [-1, -1]
        assert first + len(tops) == len(left) + 2 * splits + 1
        left += tops
        right += bottoms
    nodes = len(left)
    feature = rng.integers(0, 5, nodes)
    category = (feature == 4) & (np.array(left) >= 0)
    sets = [np.unique(rng.integers(0, 9, 4)) if is_category else np.zeros(0, int) for is_category in category]
    pool = np.append(rng.standard_normal(20), [np.inf, -np.inf, 0.0, -0.0]).astype(np.float32)
    return TreeTables(
        start=np.arange(trees + 1) * (2 * splits + 1),
        output=np.full(trees, VECTOR_LEAVES) if vector else np.arange(trees) % outputs,
        feature=feature,
        threshold=rng.choice(pool, nodes),
        left=np.array(left),
        right=np.array(right),
        default_left=rng.random(nodes) < 0.5,
        is_category=category,
        category_start=np.cumsum([0, *map(len, sets)]),
        categories=np.concatenate(sets),
        leaf=rng.standard_normal((nodes, outputs if vector else 1)),
        base=rng.standard_normal(outputs),
        n_features=5,
        reading=rng.choice(readings, nodes),
        **types,
    )


def make_matrix(rows: int, *, seed: int = 1, dtype: type = np.float32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, 5)).astype(dtype)
    matrix[:, 4] = rng.integers(-1, 12, rows)
    matrix[rng.random(matrix.shape) < 0.1] = np.nan
    matrix[rng.random(matrix.shape) < 0.02] = np.inf
    matrix[rng.random(matrix.shape) < 0.02] = -np.inf
    return matrix


def goes_left(tables: TreeTables, node: int, value: np.floating) -> bool:
    if tables.reading[node] == ZERO_IS_MISSING and abs(value) <= ZERO:
        value = np.float32(np.nan)
    elif tables.reading[node] == TRUNCATED:
        value = np.trunc(value)
    if np.isnan(value):
        return bool(tables.default_left[node])
    if not tables.is_category[node]:
        return bool(value < tables.threshold[node])
    members = tables.categories[tables.category_start[node] : tables.category_start[node + 1]]
    return bool(value < 0 or value >= 1e6 or int(value) not in members)


def plain_margin(tables: TreeTables, matrix: np.ndarray) -> np.ndarray:
    found = np.tile(tables.base, (len(matrix), 1))
    for i, row in enumerate(matrix):
        for tree in range(tables.trees):
            first = node = int(tables.start[tree])
            while tables.left[node] >= 0:
                left = goes_left(tables, node, row[tables.feature[node]])
                node = first + int(tables.left[node] if left else tables.right[node])
            if tables.output[tree] == VECTOR_LEAVES:
                found[i] += tables.leaf[node]
            else:
                found[i, tables.output[tree]] += tables.leaf[node, 0]
    return found[:, 0] if tables.outputs == 1 else found


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"splits": 0},
        {"trees": 1, "splits": 1},
        {"trees": 17, "outputs": 3},
        {"trees": 5, "outputs": 3, "vector": True},
        {"trees": 3, "splits": 400},
        {"trees": 3, "splits": 400, "outputs": 2, "vector": True},
    ],
    ids=str,
)
def test_margin_is_that_of_a_plain_loop(form: dict[str, Any]) -> None:
    tables = make_tables(**form)
    matrix = make_matrix(200)
    found = TreeEngine(tables).margin(matrix)
    assert found.dtype == np.float32
    assert found.tobytes() == plain_margin(tables, matrix).tobytes()


@pytest.mark.parametrize("value_type", [np.float32, np.float64])
@pytest.mark.parametrize("sum_type", [np.float32, np.float64])
@pytest.mark.parametrize(
    "form", [{}, {"trees": 17, "outputs": 3}, {"trees": 3, "splits": 400, "outputs": 2, "vector": True}]
)
def test_values_and_sums_of_each_precision(value_type: type, sum_type: type, form: dict[str, Any]) -> None:
    tables = make_tables(value_type=value_type, sum_type=sum_type, **form)
    matrix = make_matrix(200, dtype=value_type)
    found = TreeEngine(tables).margin(matrix)
    assert found.dtype == sum_type
    assert found.tobytes() == plain_margin(tables, matrix).tobytes()


@pytest.mark.parametrize("value_type", [np.float32, np.float64])
def test_zeros_may_be_missing_and_fractions_cut_off(value_type: type) -> None:
    tables = make_tables(readings=(AS_IT_IS, ZERO_IS_MISSING, TRUNCATED), value_type=value_type)
    matrix = make_matrix(600, dtype=value_type)
    near = np.array([ZERO, -ZERO, *np.nextafter(ZERO, np.float32([0, 1])), *np.nextafter(-ZERO, np.float32([0, -1]))])
    matrix[:, :4] = np.random.default_rng(2).choice([0.0, -0.0, 0.7, -0.7, 1.0, np.nan, *near], (600, 4))
    matrix[:, 4] += np.random.default_rng(3).choice([0, 0.5, -0.5], 600)
    assert TreeEngine(tables).margin(matrix).tobytes() == plain_margin(tables, matrix).tobytes()


def test_set_without_categories_is_never_entered() -> None:
    names = {name: getattr(make_tables(splits=1, trees=1), name) for name in TreeTables.__dataclass_fields__}
    none = {"is_category": [True, False, False], "category_start": [0, 0, 0, 0], "categories": [], "feature": [1, 0, 0]}
    tables = TreeTables(**names | none | {"default_left": [False] * 3, "leaf": [[0], [1], [2]], "base": [0]})
    matrix = np.zeros((5, 5), np.float32)
    matrix[:, 1] = [np.inf, -np.inf, 0, 1e9, np.nan]
    assert TreeEngine(tables).margin(matrix).tolist() == [1, 1, 1, 1, 2]


def test_one_output_may_mix_narrow_and_wide_trees() -> None:
    small, big = make_tables(trees=9), make_tables(trees=2, splits=300, seed=5)
    names = ("feature", "threshold", "left", "right", "default_left", "is_category", "categories", "leaf", "output")
    order = [big, small, big]
    joined = {name: np.concatenate([getattr(part, name) for part in order]) for name in names}
    starts = [np.concatenate([np.diff(getattr(part, name)) for part in order]) for name in ("start", "category_start")]
    tables = TreeTables(
        **joined,
        start=np.cumsum([0, *starts[0]]),
        category_start=np.cumsum([0, *starts[1]]),
        base=np.ones(1),
        n_features=5,
    )
    matrix = make_matrix(150)
    assert TreeEngine(tables).margin(matrix).tobytes() == plain_margin(tables, matrix).tobytes()


def test_sum_of_minus_zeros_stays_minus_zero() -> None:
    tables = make_tables(splits=0, trees=3)
    state = {name: getattr(tables, name) for name in TreeTables.__dataclass_fields__}
    zeros = TreeTables(**state | {"leaf": -np.zeros((3, 1)), "base": np.array([-0.0])})
    assert np.signbit(TreeEngine(zeros).margin(make_matrix(3))).all()


def test_layouts_give_the_same() -> None:
    scorer = TreeEngine(make_tables(outputs=2))
    matrix = make_matrix(1300)
    wanted = scorer.margin(matrix).tobytes()
    wide = np.zeros((2600, 10), np.float32)
    wide[::2, ::2] = matrix
    for same in (np.asfortranarray(matrix), wide[::2, ::2], np.asfortranarray(wide)[::2, ::2], matrix[::-1][::-1]):
        assert scorer.margin(same).tobytes() == wanted
        assert scorer.margin(same, threads=3).tobytes() == wanted


@pytest.mark.parametrize(("start", "stop"), [(0, 700), (300, 301), (813, 1300), (1299, 1300), (500, 500)])
def test_some_rows_of_columns_side_by_side_are_not_copied(start: int, stop: int) -> None:
    scorer = TreeEngine(make_tables(outputs=2))
    matrix = make_matrix(1300)
    some = np.asfortranarray(matrix)[start:stop]
    assert scorer.margin(some, threads=2).tobytes() == scorer.margin(matrix[start:stop]).tobytes()
    flat, _, _ = scorer._lay_out(some)
    assert np.shares_memory(flat, some) or len(some) == 0
    assert flat.size <= some.base.size if some.base is not None else len(some) == 0


@pytest.mark.parametrize("rows", [0, 1, 511, 512, 513, 1024])
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_rows_and_threads(rows: int, threads: int) -> None:
    scorer = TreeEngine(make_tables())
    matrix = make_matrix(2000)
    assert scorer.margin(matrix[:rows], threads=threads).tobytes() == scorer.margin(matrix)[:rows].tobytes()


def test_out_is_written_and_returned() -> None:
    scorer = TreeEngine(make_tables(outputs=2))
    matrix = make_matrix(40)
    out = np.empty((40, 2), np.float32)
    assert scorer.margin(matrix, out=out) is out
    assert out.tobytes() == scorer.margin(matrix).tobytes()


@pytest.mark.parametrize("out", [np.empty(40, np.float32), np.empty((40, 2)), np.empty((2, 40), np.float32).T])
def test_out_of_another_form_is_refused(out: np.ndarray) -> None:
    with pytest.raises(BadPrediction, match="out"):
        TreeEngine(make_tables(outputs=2)).margin(make_matrix(40), out=out)


@pytest.mark.parametrize("matrix", [np.zeros((3, 5)), np.zeros((3, 4), np.float32), np.zeros(5, np.float32)])
def test_matrix_of_another_form_is_refused(matrix: np.ndarray) -> None:
    with pytest.raises(BadPrediction, match=r"float32 \[rows, 5\]"):
        TreeEngine(make_tables()).margin(matrix)


def test_threads_may_share_an_engine_that_nobody_prepared() -> None:
    scorer = TreeEngine(make_tables(trees=40))
    matrices = [make_matrix(1500, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(scorer.margin, matrices))
    assert all(found[i].tobytes() == scorer.margin(matrix).tobytes() for i, matrix in enumerate(matrices))


def test_pickling_sends_the_tables_only() -> None:
    scorer = TreeEngine(make_tables(), transform="sigmoid")
    fresh = len(pickle.dumps(scorer))
    scorer.prepare()
    assert len(pickle.dumps(scorer)) == fresh
    copy = pickle.loads(pickle.dumps(scorer))
    matrix = make_matrix(30)
    assert copy.predict(matrix).tobytes() == scorer.predict(matrix).tobytes()
    assert not copy.tables.leaf.flags.writeable


def test_transformations_without_the_c_library() -> None:
    matrix = make_matrix(50)
    margin = TreeEngine(make_tables(outputs=3)).margin(matrix)
    assert TreeEngine(make_tables(outputs=3), transform="argmax").predict(matrix).tolist() == margin.argmax(1).tolist()
    hinge = TreeEngine(make_tables(outputs=3), transform="hinge").predict(matrix)
    assert hinge.tolist() == (margin > 0).astype(float).tolist()


def test_unknown_transformation_is_refused() -> None:
    with pytest.raises(ModelError, match="the transformation cube"):
        TreeEngine(make_tables(), transform="cube")


def test_without_a_library_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "unavailable", lambda: "no C compiler was found")
    assert kernel_name() == ""
    with pytest.raises(ModelError, match="no C compiler was found") as caught:
        TreeEngine(make_tables()).margin(make_matrix(3))
    assert "install a C compiler" in str(caught.value)


def test_kernel_is_named(kind: str) -> None:
    assert not unavailable()
    assert kernel_name() == kind
    assert kind in library.kinds()


def test_importing_the_package_does_not_import_xgboost() -> None:
    code = "import sys, pipeline.models.trees; print(sorted({'xgboost'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
