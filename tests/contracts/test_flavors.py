"""One suite for all flavors: every model gives its library's own results, whatever the batch, and refuses what it must.

xgboost has a suite of its own (tests/unit/models/flavors/test_xgboost.py), which is older.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline.errors import (
    InputError,
    ModelDigestMismatch,
    ModelError,
    PipelineError,
    RefusedForSafety,
    SchemaDrift,
)
from pipeline.models.engines import engine_blockers, forget_selections
from pipeline.models.flavors import detect, find_flavor
from pipeline.models.folders import open_folder
from pipeline.models.model import ModelData, ModelVersion
from pipeline.models.outputs import output_type
from pipeline.models.record import model_from_record, model_to_record
from pipeline.models.registry import resolve
from pipeline.plan.recipe import ScoreRecipe
from pipeline.scoring.frames import score_pandas
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.model_ref import ModelRef, OutputKind
from pipeline.spec.score import Output
from pipeline.testing.flavor_cases import CASES, FlavorCase
from pipeline.testing.inline import plan_inline, publish_inline, score_inline


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FlavorCase:
    if request.param == "catboost":
        pytest.importorskip("catboost", reason="not in the extra dev: its wheel has 97 MB")
    if request.param.startswith("torch"):
        pytest.importorskip("torch", reason="not in the extra dev: its wheel has 550 MB")
    return CASES[request.param](tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def version(case: FlavorCase) -> ModelVersion:
    files = case.options.get("model_files")
    return resolve(
        ModelRef(case.reference),
        allow_code=bool(case.options.get("allow_code")),
        model_files=[files] if files else [],
    )


@pytest.fixture(scope="module")
def predictor(case: FlavorCase, version: ModelVersion) -> Any:
    return find_flavor(case.flavor).load(version, data_of(case, version))


def data_of(case: FlavorCase, version: ModelVersion) -> ModelData:
    return case.path.read_bytes() if case.is_file else open_folder(version)


def table_of(frame: pd.DataFrame, version: ModelVersion) -> pa.Table:
    return pa.Table.from_pandas(frame[list(version.feature_names)], preserve_index=False).replace_schema_metadata(None)


def equal(found: np.ndarray, expected: np.ndarray, promise: str) -> bool:
    if found.shape != expected.shape or found.dtype.kind != np.asarray(expected).dtype.kind.replace("U", "O"):
        return False
    if promise in ("exact", "code") or found.dtype.kind != "f":
        return bool(np.array_equal(found, expected))
    return bool(np.allclose(found, expected, rtol=1e-5 if found.dtype == np.float32 else 1e-6, atol=1e-12))


def skip_unless_file(case: FlavorCase) -> None:
    if not case.is_file:
        pytest.skip("the model is not one file")


def test_the_file_is_known_by_its_bytes(case: FlavorCase, tmp_path: Path) -> None:
    skip_unless_file(case)
    if case.options.get("allow_code"):
        pytest.skip("what runs code is refused by its bytes; see the tests of the flavor")
    other = tmp_path / "model.json"
    other.write_bytes(case.path.read_bytes())
    assert detect(str(other)) == case.flavor


def test_the_version_tells_features_outputs_and_promise(case: FlavorCase, version: ModelVersion) -> None:
    assert version.flavor == case.flavor
    assert set(version.feature_names) <= set(case.frame)
    assert version.promise is not None
    assert version.promise.kind in case.promise
    assert version.promise.rows > 0
    for kind in case.expected:
        assert output_type(version, kind) is not None, kind  # type: ignore[arg-type]


def test_results_are_those_of_the_library(case: FlavorCase, version: ModelVersion, predictor: Any) -> None:
    encoded = predictor.encode(table_of(case.frame, version))
    for kind, expected in case.expected.items():
        found = predictor.predict(encoded, kind=kind)
        planned = output_type(version, kind)  # type: ignore[arg-type]
        assert planned is not None
        assert (found.dtype, found.reshape(len(found), -1).shape[1]) == (planned.dtype, planned.width), kind
        assert equal(found, expected, case.promise), kind


def test_rows_have_the_same_bits_in_any_cut(case: FlavorCase, version: ModelVersion, predictor: Any) -> None:
    table, random = table_of(case.frame, version), np.random.default_rng(8)
    kinds: list[OutputKind] = [kind for kind in ("prediction", "probabilities", "label") if kind in case.expected]
    for kind in kinds:
        whole = predictor.predict(predictor.encode(table), kind=kind)
        for pieces in (2, 5, 40):
            edges = [0, *sorted(random.choice(np.arange(1, len(table)), pieces, replace=False)), len(table)]
            parts = [table.slice(a, b - a) for a, b in pairwise(edges)]
            found = np.concatenate([predictor.predict(predictor.encode(part), kind=kind) for part in parts])
            assert np.array_equal(found, whole), (kind, pieces)


def test_no_row_and_one_row(case: FlavorCase, version: ModelVersion, predictor: Any) -> None:
    table = table_of(case.frame, version)
    for kind in case.expected:
        whole = predictor.predict(predictor.encode(table), kind=kind)
        none = predictor.predict(predictor.encode(table.slice(0, 0)), kind=kind)
        assert (none.shape, none.dtype) == ((0, *whole.shape[1:]), whole.dtype)
        one = predictor.predict(predictor.encode(table.slice(3, 1)), kind=kind)
        assert np.array_equal(one, whole[3:4])


def test_two_threads_share_a_predictor(case: FlavorCase, version: ModelVersion, predictor: Any) -> None:
    encoded = predictor.encode(table_of(case.frame, version))
    whole = predictor.predict(encoded, kind="prediction")
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: predictor.predict(encoded, kind="prediction"), range(6)))
    assert all(np.array_equal(one, whole) for one in found)


def test_other_bytes_are_refused_before_they_are_parsed(case: FlavorCase, version: ModelVersion) -> None:
    data = data_of(case, version)
    with pytest.raises(ModelDigestMismatch):
        find_flavor(case.flavor).load(replace(version, digest="0" * 64), data)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(case: FlavorCase, version: ModelVersion, share: float) -> None:
    skip_unless_file(case)
    if share > 0.9 and (version.runs_code or case.flavor == "catboost"):
        pytest.skip("the library does not read the last bytes of its file")
    data = case.path.read_bytes()
    describe = find_flavor(case.flavor).describe
    assert describe is not None
    with pytest.raises(PipelineError):
        describe(replace(version, features=()), data[: int(share * len(data))], allow_code=True)


def test_random_bytes_behind_the_head_are_a_model_error(case: FlavorCase, tmp_path: Path) -> None:
    skip_unless_file(case)
    path = tmp_path / case.path.name
    data = bytearray(case.path.read_bytes())
    data[len(data) // 3 :: 7] = bytes(len(data[len(data) // 3 :: 7]))
    path.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        resolve(ModelRef(str(path)), allow_code=bool(case.options.get("allow_code")))
    assert caught.value.next_step


def test_the_library_is_imported_by_load_only(case: FlavorCase, version: ModelVersion) -> None:
    code = (
        "import json, sys; from pipeline.models.record import model_from_record; "
        "from pipeline.models.flavors import find_flavor; from pipeline.scoring.scorer import Scorer; "
        "version = model_from_record(json.load(sys.stdin)); flavor = find_flavor(version.flavor); "
        "assert flavor.libraries or flavor.is_own_code; "
        "print([name for name in flavor.libraries if name in sys.modules])"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(model_to_record(version)),
        text=True,
        capture_output=True,
        check=True,
    )
    assert child.stdout.strip() == "[]"


def test_the_description_travels_small(version: ModelVersion) -> None:
    assert model_from_record(json.loads(json.dumps(model_to_record(version)))) == version
    recipe = ScoreRecipe(version, version.feature_names, "prediction", ("p",))
    assert len(pickle.dumps(recipe)) < 4000


def test_a_registered_model_is_the_same(case: FlavorCase, version: ModelVersion, tmp_path: Path) -> None:
    skip_unless_file(case)
    registry = pipeline.Registry(tmp_path / "models")
    if version.runs_code:
        with pytest.raises(RefusedForSafety):
            registry.register(case.path, name="m")
        return
    assert registry.register(case.path, name="m", alias="best").flavor == case.flavor
    found = registry.resolve("models:/m@best")
    assert (found.digest, found.features, found.promise) == (version.digest, version.features, version.promise)
    assert found.output_types == version.output_types


def test_score_gives_frames_of_pandas_and_dask_the_same(case: FlavorCase, version: ModelVersion) -> None:
    options = {"output": "p", **case.options}
    frame = case.frame.head(60)
    scored = pipeline.score(frame, case.reference, **options)
    expected = np.asarray(case.expected["prediction"])[:60].reshape(60, -1)
    names = [name for name in scored if name not in frame]
    assert equal(scored[names].to_numpy(), expected, case.promise)
    lazy = pipeline.score(dd.from_pandas(frame, npartitions=3), case.reference, **options)
    found = lazy.compute(scheduler="synchronous")
    assert dict(lazy.dtypes) == dict(found.dtypes)
    pd.testing.assert_frame_equal(found[names], scored[names])


def test_a_missing_feature_is_named(case: FlavorCase, version: ModelVersion) -> None:
    name = version.feature_names[0]
    with pytest.raises(SchemaDrift) as caught:
        score_pandas(case.frame.drop(columns=name), version, output=Output(column="p"))
    assert name in caught.value.expected


def test_an_unknown_category_is_rejected_by_name(case: FlavorCase, version: ModelVersion) -> None:
    if not case.unknown_category:
        pytest.skip("the model takes any value")
    frame = case.frame.head(3).astype({case.unknown_category: "str"})
    frame.loc[1, case.unknown_category] = "Atlantis"
    with pytest.raises(InputError, match="cannot be scored") as caught:
        score_pandas(frame, version, output=Output(column="p"))
    assert "Atlantis" in caught.value.found


@pytest.fixture
def fresh() -> None:
    forget_selections()


def read(folder: Path) -> pa.Table:
    return pq.read_table(folder).sort_by("id")


@pytest.mark.parametrize("engine", ["library", "auto"])
def test_a_whole_job_equals_the_library(
    case: FlavorCase, version: ModelVersion, tmp_path: Path, engine: str, fresh: None
) -> None:
    frame = case.frame.assign(id=range(len(case.frame)))
    bad = [] if case.takes_nulls else [3, 400]
    frame.loc[bad, version.feature_names[0]] = None
    lake = tmp_path / "in"
    lake.mkdir()
    for number, start in enumerate(range(0, len(frame), 300)):
        pq.write_table(
            pa.Table.from_pandas(frame.iloc[start : start + 300], preserve_index=False), lake / f"{number}.parquet"
        )
    kind = "probabilities" if "probabilities" in case.expected else "prediction"
    score = {"model": case.reference, "output": {"column": "p", "kind": kind}, "keep": ["id"], "engine": engine}
    spec = JobSpec.model_validate(
        {
            "name": "flavor",
            "source": {"path": str(lake)},
            "steps": [{"score": {**score, **case.options}}],
            "sink": {"path": str(tmp_path / "out")},
            "errors": {"max_fraction": 1.0},
        }
    )
    plan = plan_inline(spec, directory=tmp_path / "jobs")
    job = score_inline(plan, directory=tmp_path / "jobs", job="flavor-1")
    publish_inline(job)
    found = read(tmp_path / "out")
    columns = [name for name in found.column_names if name == "p" or name.startswith("p_")]
    values = np.stack([found[name].to_numpy() for name in columns], axis=1)
    expected = np.asarray(case.expected[kind]).reshape(len(frame), -1)
    rows = found["id"].to_numpy()
    assert sorted({*range(len(frame))} - {*rows.tolist()}) == bad
    assert equal(values, expected[rows], case.promise)


def test_the_tree_engine_gives_the_bits_where_it_is_offered(
    case: FlavorCase, version: ModelVersion, predictor: Any
) -> None:
    kinds: tuple[OutputKind, ...] = ("prediction", "label", "probabilities", "margin")
    offered = [kind for kind in kinds if kind in case.expected and not engine_blockers(version, kind)]
    if not offered:
        pytest.skip("no output on the tree engine")
    build: Callable[..., Any] | None = find_flavor(case.flavor).trees
    assert build is not None
    encoded = predictor.encode(table_of(case.frame, version))
    for kind in offered:
        trees = build(predictor, kind)
        assert np.array_equal(trees(predictor.example(), kind=kind), predictor.predict(predictor.example(), kind=kind))
        assert np.array_equal(trees(encoded, kind=kind), predictor.predict(encoded, kind=kind)), kind
