"""The choice of the engine of a model, the detection of a wrong engine, and the evidence in the report."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xgboost

from pipeline.errors import ModelError, SpecError
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.receipts import Receipt
from pipeline.models import engines as module
from pipeline.models import engines as outlook
from pipeline.models.cache import forget_models
from pipeline.models.engines import (
    EngineSelection,
    EngineUse,
    Evaluator,
    check_engine,
    engine_blockers,
    engine_options,
    forget_selections,
    get_evaluator,
)
from pipeline.models.flavors import xgboost as flavor
from pipeline.models.flavors import xgboost_probe
from pipeline.models.model import ModelVersion, Predict
from pipeline.models.registry import resolve
from pipeline.models.trees import engine, kernel_name
from pipeline.plan.describe import plan_summary
from pipeline.plan.plan import Limits
from pipeline.plan.recipe import ScoreRecipe
from pipeline.report.build import make_report
from pipeline.report.same_values import _near
from pipeline.scoring.partition import score_partition
from pipeline.spec.job_spec import JobSpec, json_schema
from pipeline.spec.model_ref import ModelRef, OutputKind
from pipeline.testing.fake_clock import FakeClock
from pipeline.testing.jobs import small_job, write_receipts
from pipeline.testing.oracle import FEATURES, Lake, make_table, train_model
from pipeline.testing.recipes import make_partition, make_recipe

ROWS = module.SLICE_ROWS * module.ROUNDS + 5000


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No selection of another test, and a tree engine that starts at once."""
    forget_selections()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "START_SECONDS_PER_TREE", 0.0)
        yield
    forget_selections()


@pytest.fixture(scope="module")
def models(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelVersion]:
    folder = tmp_path_factory.mktemp("models")
    paths = {
        "binary": model_path,
        "softmax": train_model(folder / "softmax.ubj", rounds=4, objective="multi:softmax", num_class=2),
        "softprob": train_model(folder / "softprob.ubj", rounds=4, objective="multi:softprob", num_class=2),
        "linear": folder / "linear.ubj",
    }
    data = xgboost.DMatrix(np.eye(4, dtype=np.float32), [0, 1, 0, 1], feature_names=list(FEATURES))
    xgboost.train({"booster": "gblinear", "nthread": 1}, data, 2).save_model(paths["linear"])

    def probe(data: bytes, *, where: str) -> dict[str, Any]:
        return xgboost_probe.facts(xgboost.Booster(model_file=bytearray(data)), data)

    with pytest.MonkeyPatch.context() as patch:
        # A child process takes a second.
        patch.setattr(flavor, "probe", probe)
        return {name: resolve(ModelRef(str(path))) for name, path in paths.items()}


def predictor_of(version: ModelVersion) -> flavor.XGBoostPredictor:
    return flavor.load(version, Path(version.uri).read_bytes())


def matrix_of(predictor: flavor.XGBoostPredictor, rows: int = ROWS) -> np.ndarray:
    return predictor.encode(make_table(rows, seed=3).select(FEATURES))


def score_of(version: ModelVersion, **fields: Any) -> ScoreRecipe:
    return ScoreRecipe(version, version.feature_names, "prediction", ("prediction",), (), **fields)


def timed(clock: FakeClock, predict: Predict, *, seconds: float) -> Predict:
    def call(matrix: np.ndarray, *, kind: OutputKind) -> np.ndarray:
        clock.now += seconds * len(matrix)
        return predict(matrix, kind=kind)

    return call


def broken(predict: Predict, *, after: int = 0, kinds: tuple[str, ...] = ("prediction", "margin")) -> Predict:
    """``predict``, but the last bit of one row is wrong in every call after some."""
    calls = iter(range(10**9))

    def call(matrix: np.ndarray, *, kind: OutputKind) -> np.ndarray:
        scores = predict(matrix, kind=kind).copy()
        if next(calls) >= after and kind in kinds:
            scores[0] = np.nextafter(scores[0], np.float32(9))
        return scores

    return call


def choose(
    version: ModelVersion, *, xgboost: float, trees: float, change: Callable[[Predict], Predict] = lambda one: one
) -> tuple[Evaluator, flavor.XGBoostPredictor]:
    """An evaluator whose engines take that many seconds a row, by its own clock."""
    clock, predictor = FakeClock(), predictor_of(version)
    plain = predictor_of(version)
    predictor.predict = timed(clock, plain.predict, seconds=xgboost)  # type: ignore[method-assign]
    made = EngineSelection(predictor, "prediction", clock=clock)
    build = flavor.tree_predict(predictor, "prediction")
    made.start(lambda: timed(clock, change(build), seconds=trees), is_requested=False)
    return Evaluator(made), plain


@pytest.mark.parametrize(("xgb", "trees", "chosen"), [(8e-6, 1e-6, "trees"), (1e-6, 2e-6, "library")])
def test_the_faster_engine_is_chosen(models: dict[str, ModelVersion], xgb: float, trees: float, chosen: str) -> None:
    evaluator, plain = choose(models["binary"], xgboost=xgb, trees=trees)
    matrix = matrix_of(plain)
    scores = evaluator.predict(matrix, kind="prediction")
    assert scores.tobytes() == plain.predict(matrix, kind="prediction").tobytes()
    assert evaluator.choice.engine == chosen
    use = evaluator.engine_use()
    timed_rows = module.SLICE_ROWS * module.ROUNDS
    assert use.timed_rows == timed_rows
    assert use.compared_rows == timed_rows + (module.SAMPLE_ROWS if chosen == "trees" else 0)
    assert use.mismatches == 0
    assert use.rows == {"xgboost": timed_rows, "trees": 5000} if chosen == "trees" else {"xgboost": ROWS}
    assert use.speedup == pytest.approx(xgb / trees)
    assert use.seconds["trees"] == pytest.approx(trees * timed_rows)
    assert use.reasons == (() if chosen == "trees" else ("xgboost was faster on the timed rows",))
    assert use.kernels == (kernel_name(),)


def test_one_slow_round_does_not_decide(models: dict[str, ModelVersion]) -> None:
    made = EngineSelection(predictor_of(models["binary"]), "prediction")
    made.engine = "both"
    for trees in (9.0, 0.1, 0.1, 0.1):
        assert made.engine == "both"
        made.add_times(1.0, trees, rows=1024)
    assert made.engine == "trees"


def test_few_rows_are_timed_and_compared(models: dict[str, ModelVersion]) -> None:
    evaluator, plain = choose(models["binary"], xgboost=8e-6, trees=1e-6)
    small = matrix_of(plain, 3)
    assert evaluator.predict(small[:0], kind="prediction").shape == (0,)
    for _ in range(module.ROUNDS):
        assert evaluator.choice.engine == "both"
        evaluator.predict(small, kind="prediction")
    assert evaluator.choice.engine == "trees"
    assert evaluator.use.timed_rows == evaluator.use.compared_rows == 3 * module.ROUNDS
    assert evaluator.use.rows == {"xgboost": 3 * module.ROUNDS}


@pytest.mark.parametrize(("engine", "xgb"), [("trees", 8e-6), ("library", 1e-7)])
def test_a_selection_on_few_rows_holds_for_few_rows(models: dict[str, ModelVersion], engine: str, xgb: float) -> None:
    evaluator, plain = choose(models["binary"], xgboost=xgb, trees=1e-6)
    small, large = matrix_of(plain, 3), matrix_of(plain, module.SLICE_ROWS)
    for _ in range(module.ROUNDS + 5):
        evaluator.predict(small, kind="prediction")
    assert evaluator.choice.engine == engine
    timed_rows = evaluator.use.timed_rows
    for _ in range(module.ROUNDS + 5):
        evaluator.predict(large, kind="prediction")
    assert evaluator.choice.engine == engine
    assert evaluator.use.timed_rows == timed_rows + module.ROUNDS * module.SLICE_ROWS
    assert len(evaluator.engine_use().reasons) == (1 if engine == "library" else 0)


@pytest.mark.parametrize("after", [0, 2])
def test_a_wrong_engine_is_given_up_while_it_is_timed(models: dict[str, ModelVersion], after: int) -> None:
    # Two calls are made before anything is timed; from then on, one to time and one for the margins each.
    evaluator, plain = choose(
        models["binary"], xgboost=8e-6, trees=1e-6, change=lambda one: broken(one, after=2 + after)
    )
    matrix = matrix_of(plain)
    scores = evaluator.predict(matrix, kind="prediction")
    assert scores.tobytes() == plain.predict(matrix, kind="prediction").tobytes()
    assert evaluator.choice.engine == "library"
    use = evaluator.engine_use()
    assert (use.rows, use.mismatches) == ({"xgboost": ROWS}, 1)
    assert use.timed_rows == module.SLICE_ROWS * after // 2
    assert use.reasons == ()
    assert module.MISMATCH in use.disabled[0]


def test_classes_do_not_hide_wrong_margins(models: dict[str, ModelVersion]) -> None:
    evaluator, plain = choose(
        models["softmax"], xgboost=8e-6, trees=1e-6, change=lambda one: broken(one, kinds=("margin",))
    )
    evaluator.predict(matrix_of(plain), kind="prediction")
    assert evaluator.choice.engine == "library"
    assert evaluator.use.mismatches == 1


def test_a_sample_is_compared_later(models: dict[str, ModelVersion]) -> None:
    calls = 2 + 2 * module.ROUNDS + 2  # to start; to time, with margins; the first sample, with margins
    evaluator, plain = choose(models["binary"], xgboost=8e-6, trees=1e-6, change=lambda one: broken(one, after=calls))
    matrix = matrix_of(plain)
    evaluator.predict(matrix, kind="prediction")
    assert evaluator.choice.engine == "trees"
    small = matrix[:2000]
    for _ in range(module.SAMPLE_EVERY - 1):
        evaluator.predict(small, kind="prediction")
    assert evaluator.use.mismatches == 0
    scores = evaluator.predict(small, kind="prediction")
    assert scores.tobytes() == plain.predict(small, kind="prediction").tobytes()
    assert evaluator.use.mismatches == 1
    assert evaluator.choice.engine == "library"
    assert evaluator.use.rows["xgboost"] == module.SLICE_ROWS * module.ROUNDS + 2000


def test_tolerance_is_of_margins(models: dict[str, ModelVersion]) -> None:
    for shift, mismatches in ((1e-4, 0), (1e-2, 4096)):
        predictor = predictor_of(models["binary"])
        made = EngineSelection(predictor, "prediction", tolerance=1e-3)
        right = flavor.tree_predict(predictor, "prediction")
        made.start(lambda s=shift, r=right: lambda m, *, kind: r(m, kind=kind) + np.float32(s), is_requested=True)  # type: ignore[misc]
        evaluator = Evaluator(made)
        evaluator.predict(matrix_of(predictor, 4096), kind="prediction")
        assert evaluator.use.mismatches == min(mismatches, module.SAMPLE_ROWS)


def test_an_engine_that_fails_is_given_up(models: dict[str, ModelVersion]) -> None:
    def fails(predict: Predict) -> Predict:
        calls = iter(range(99))

        def call(matrix: np.ndarray, *, kind: OutputKind) -> np.ndarray:
            if next(calls) >= 2:
                raise RuntimeError("no kernel")
            return predict(matrix, kind=kind)

        return call

    evaluator, plain = choose(models["binary"], xgboost=8e-6, trees=1e-6, change=fails)
    matrix = matrix_of(plain)
    assert evaluator.predict(matrix, kind="prediction").tobytes() == plain.predict(matrix, kind="prediction").tobytes()
    assert evaluator.engine_use().disabled == ("call failed: RuntimeError: no kernel",)


def test_out_of_memory_is_no_failure(models: dict[str, ModelVersion]) -> None:
    evaluator, plain = choose(models["binary"], xgboost=8e-6, trees=1e-6)

    def full(matrix: np.ndarray, *, kind: OutputKind) -> np.ndarray:
        raise MemoryError

    evaluator.choice.trees = full
    with pytest.raises(MemoryError):
        evaluator.predict(matrix_of(plain), kind="prediction")
    assert evaluator.choice.engine == "both"


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ("binary", "softmax", "softprob") for kind in ("prediction", "label", "margin")],
)
def test_every_kind_has_the_bits_and_the_shape_of_xgboost(
    models: dict[str, ModelVersion], name: str, kind: OutputKind
) -> None:
    recipe = replace(score_of(models[name], engine="trees"), kind=kind)
    evaluator, seconds = get_evaluator(recipe)
    assert seconds > 0
    plain = predictor_of(models[name])
    matrix = matrix_of(plain, 1500)
    found, wanted = evaluator.predict(matrix, kind=kind), plain.predict(matrix, kind=kind)
    assert (found.dtype, found.shape, found.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())
    assert evaluator.use.rows == {"trees": 1500}
    assert evaluator.use.compared_rows == module.SAMPLE_ROWS


def test_the_matrix_lies_as_the_engine_reads_it(models: dict[str, ModelVersion]) -> None:
    table = make_table(600, seed=3).select(FEATURES)
    scores = []
    for wanted, lies in (("trees", "F_CONTIGUOUS"), ("xgboost", "C_CONTIGUOUS"), ("auto", "C_CONTIGUOUS")):
        evaluator, _ = get_evaluator(score_of(models["binary"], engine=wanted))
        matrix = evaluator.encode(table)
        assert matrix.flags[lies]
        assert matrix.flags.c_contiguous != matrix.flags.f_contiguous
        scores.append(evaluator.predict(matrix, kind="prediction").tobytes())
    # The choice may fall between the two calls.
    evaluator.choice.engine = "trees"
    scores.append(evaluator.predict(matrix, kind="prediction").tobytes())
    assert len(set(scores)) == 1


def test_the_engine_starts_when_xgboost_has_scored_as_long_as_the_start_takes(models: dict[str, ModelVersion]) -> None:
    clock, predictor, plain = FakeClock(), predictor_of(models["binary"]), predictor_of(models["binary"])
    predictor.predict = timed(clock, plain.predict, seconds=1e-5)  # type: ignore[method-assign]
    build = timed(clock, flavor.tree_predict(plain, "prediction"), seconds=1e-6)
    made = EngineSelection(predictor, "prediction", clock=clock, build=lambda: build, start_seconds=0.0995)
    evaluator, matrix = Evaluator(made), matrix_of(plain, 5000)
    for scored in (5000, 10000):
        assert not made.is_due()
        evaluator.predict(matrix, kind="prediction")
        assert evaluator.engine_use() == EngineUse({"xgboost": scored}, reasons=(module.too_little_work("xgboost"),))
    scores = evaluator.predict(matrix, kind="prediction")
    assert scores.tobytes() == plain.predict(matrix, kind="prediction").tobytes()
    use = evaluator.engine_use()
    assert (use.rows, use.reasons) == ({"xgboost": 10000 + 4096, "trees": 904}, ())
    assert use.timed_rows == module.SLICE_ROWS * module.ROUNDS


def test_an_engine_without_a_price_starts_at_once(
    models: dict[str, ModelVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    version, built = models["binary"], []
    monkeypatch.setattr(EngineSelection, "start", lambda self, build, *, is_requested: built.append(1) or 0.25)
    evaluator, seconds = get_evaluator(score_of(version))
    assert (built, evaluator.use.seconds_start) == ([1], 0.25)
    assert seconds >= 0.25
    get_evaluator(score_of(version, engine="trees"))
    get_evaluator(score_of(version, engine="xgboost"))
    assert built == [1, 1]


def test_it_starts_once_and_others_do_not_wait(models: dict[str, ModelVersion]) -> None:
    predictor = predictor_of(models["binary"])
    made = EngineSelection(predictor, "prediction")
    started, may_go, built = threading.Event(), threading.Event(), []

    def build() -> Predict:
        built.append(1)
        started.set()
        assert may_go.wait(60)
        return flavor.tree_predict(predictor, "prediction")

    thread = threading.Thread(target=made.start, args=(build,), kwargs={"is_requested": False})
    thread.start()
    assert started.wait(60)
    other = Evaluator(made, seconds_start=made.start(build, is_requested=False))
    other.predict(matrix_of(predictor, 5000), kind="prediction")
    assert other.use == EngineUse(rows={"xgboost": 5000})
    may_go.set()
    thread.join()
    made.start(build, is_requested=False)
    assert (built, made.engine) == ([1], "both")


def test_a_start_that_fails_is_told(models: dict[str, ModelVersion]) -> None:
    def build() -> Predict:
        raise OSError("no cache\nhere")

    made = EngineSelection(predictor_of(models["binary"]), "prediction")
    made.start(build, is_requested=False)
    assert (made.engine, made.disabled) == ("library", ("start failed: OSError: no cache",))
    with pytest.raises(ModelError, match="does not start"):
        EngineSelection(made.reference, "prediction").start(build, is_requested=True)


def test_what_is_unsupported_is_named(models: dict[str, ModelVersion], monkeypatch: pytest.MonkeyPatch) -> None:
    binary = models["binary"]
    assert engine_blockers(binary, "prediction") == ()
    assert engine_blockers(binary, "leaf") == ("the output leaf",)
    assert engine_blockers(models["linear"], "prediction") == ("the booster gblinear",)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        assert "checked with glibc" in engine_blockers(binary, "prediction")[0]
        assert engine_blockers(binary, "margin") == ()
    with pytest.raises(ModelError, match="gblinear") as caught:
        check_engine("trees", models["linear"], kind="prediction")
    assert "C compiler" not in str(caught.value)
    check_engine("auto", models["linear"], kind="prediction")
    monkeypatch.setattr(outlook, "unavailable", lambda: "no C compiler was found")
    with pytest.raises(ModelError, match="install a C compiler"):
        check_engine("trees", binary, kind="prediction")
    with pytest.raises(ModelError, match="no C compiler was found"):
        get_evaluator(score_of(binary, engine="trees"))
    assert engine_options("auto", binary, kind="prediction").possible == ("xgboost",)


def test_the_plan_says_what_is_possible(tmp_path: Path, models: dict[str, ModelVersion]) -> None:
    plan = replace(small_job(tmp_path / "in", sink=str(tmp_path / "out")).plan, model=models["binary"])
    found = plan_summary(plan, Limits(2, 1, 0))
    assert found.to_dict()["engine"] == {"requested": "auto", "possible": ["xgboost", "trees"], "reasons": []}
    assert "engine     trees or xgboost, whichever is faster on the first rows" in found.text()
    linear = plan_summary(replace(plan, model=models["linear"]), Limits(2, 1, 0))
    assert "engine     xgboost; the tree engine is not used: the booster gblinear" in linear.text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outlook, "unavailable", lambda: "no C compiler was found")
        without = plan_summary(plan, Limits(2, 1, 0)).text()
    assert "engine     xgboost; the tree engine is not used: no C compiler was found" in without
    assert replace(plan, workers=2).digest == plan.digest


def test_the_spec_knows_engines() -> None:
    fields = {"name": "a", "source": {"path": "x"}, "sink": {"path": "y"}}
    spec = JobSpec.build(**fields, steps=[{"score": {"model": "m", "engine": "trees", "tolerance": 1e-6}}])
    assert (spec.score.engine, spec.score.tolerance) == ("trees", 1e-6)
    plain = JobSpec.build(**fields, steps=[{"score": {"model": "m"}}])
    assert (plain.score.engine, plain.score.tolerance) == ("auto", 0.0)
    assert "engine" not in plain.to_yaml()
    for wrong in ({"engine": "tree"}, {"tolerance": -1.0}):
        with pytest.raises(SpecError):
            JobSpec.build(**fields, steps=[{"score": {"model": "m", **wrong}}])
    assert json_schema()["$defs"]["Score"]["properties"]["engine"]["enum"] == ["auto", "library", "xgboost", "trees"]


def test_the_receipt_has_the_evidence(models: dict[str, ModelVersion], lake: Lake, tmp_path: Path) -> None:
    version = models["binary"]
    schema = pq.read_schema(lake.files[0]).remove_metadata()
    recipe = make_recipe(version, schema, directory=str(tmp_path / "job"), batch_rows=1 << 16)
    receipt = score_partition(recipe, make_partition(*lake.files))
    assert receipt.engine is not None
    assert sum(receipt.engine.rows.values()) == lake.rows
    assert receipt.engine.timed_rows == module.SLICE_ROWS * module.ROUNDS
    assert receipt.engine.compared_rows == receipt.engine.timed_rows + (
        module.SAMPLE_ROWS if "trees" in receipt.engine.rows else 0
    )
    assert set(receipt.engine.seconds) == {"trees", "xgboost"}
    assert receipt.engine.seconds_start > 0
    assert receipt.seconds.model_load >= receipt.engine.seconds_start
    assert Receipt.from_json(receipt.to_json_bytes()) == receipt


def test_the_report_sums_it_up(tmp_path: Path) -> None:
    job = small_job(tmp_path / "in", sink=str(tmp_path / "out"))
    directory = JobDirectory.create(str(tmp_path / "jobs"), job.plan, job="j")
    receipts = write_receipts(directory, job)
    assert make_report(directory, ledger=directory.ledger(receipts)).engines is None
    use = EngineUse({"trees": 10, "xgboost": 5}, {"trees": 1.0, "xgboost": 7.8}, 4, 6, 0, 0.5, ("x86-64-v3",), ("few",))
    good = [replace(receipt, engine=use) for receipt in receipts]
    report = make_report(directory, ledger=directory.ledger(good))
    details = report.to_dict()
    assert details["engines"] == {
        "rows": {"trees": 30, "xgboost": 15},
        "seconds": {"trees": 3.0, "xgboost": 23.4},
        "timed_rows": 12,
        "compared_rows": 18,
        "mismatches": 0,
        "seconds_start": 1.5,
        "kernels": ["x86-64-v3"],
        "reasons": ["few"],
        "disabled": [],
        "speedup": 7.8,
        "tolerance": 0.0,
    }
    line = "engine     trees 7.8 × xgboost's predictor on 12 timed rows, bit-equal on all 18 compared rows"
    assert line in report.text()
    assert not any("engine" in warning for warning in details["warnings"])
    bad = replace(use, mismatches=2, disabled=(f"{module.MISMATCH} (model x)",))
    report = make_report(directory, ledger=directory.ledger([replace(good[0], engine=bad), *good[1:]]))
    assert "different on 2 of 18 compared rows" in report.text()
    assert any(w.startswith("the tree engine was disabled: its results differ") for w in report.warnings)
    assert any("score again with engine: library" in warning for warning in report.warnings)


def test_a_model_that_differed_is_not_tried_again(
    models: dict[str, ModelVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = models["binary"]
    right = flavor.tree_predict
    wrong = replace(flavor.FLAVOR, trees=lambda predictor, kind: broken(right(predictor, kind)))
    monkeypatch.setattr(module, "find_flavor", lambda name: wrong)
    evaluator, _ = get_evaluator(score_of(version, engine="trees"))
    matrix = matrix_of(predictor_of(version), 2000)
    wanted = predictor_of(version).predict(matrix, kind="prediction")
    assert evaluator.predict(matrix, kind="prediction").tobytes() == wanted.tobytes()
    for recipe in (score_of(version, engine="trees"), score_of(version)):
        again, _ = get_evaluator(recipe)
        assert again.choice.engine == "library"
        assert again.engine_use().disabled[0].startswith(module.MISMATCH)


def test_it_has_as_many_threads_as_xgboost(models: dict[str, ModelVersion], monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    cut = engine._cut
    monkeypatch.setattr(engine, "_cut", lambda rows, *, threads: used.append(threads) or cut(rows, threads=1))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    predictor = predictor_of(models["binary"])
    trees = flavor.tree_predict(predictor, "prediction")
    for kind in ("prediction", "margin", "label"):
        trees(matrix_of(predictor, 10), kind=kind)  # type: ignore[arg-type]
    assert used == [3, 3, 3]
    assert "'nthread': '3'" in str(predictor.booster.save_config()).replace('"', "'").replace("':'", "': '")


def test_verify_allows_what_the_tolerance_allows() -> None:
    import pyarrow as pa

    one, near, far = (pa.chunked_array([np.array([value], np.float32)]) for value in (0.5, 0.5005, 0.51))
    assert _near(one, near, 1e-3)
    assert not _near(one, far, 1e-3)
    assert not _near(one, near, 0.0)
    assert not _near(pa.chunked_array([[1]]), pa.chunked_array([[2]]), 1.0)


def test_a_selection_goes_with_its_model(models: dict[str, ModelVersion]) -> None:
    score = score_of(models["binary"])
    assert get_evaluator(score)[0].choice is get_evaluator(score)[0].choice
    forget_models()
    assert not module._selections


def test_the_libraries_of_a_report_are_those_that_were_timed() -> None:
    assert EngineUse().libraries == "xgboost"
    assert EngineUse({"onnx": 5, "lightgbm": 3}).libraries == "lightgbm and onnx"
    use = EngineUse({"trees": 9, "onnx": 5}, {"trees": 1.0, "sklearn": 3.0, "lightgbm": 5.0})
    assert (use.libraries, use.speedup) == ("lightgbm and sklearn", 8.0)
