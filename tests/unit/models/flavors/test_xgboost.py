"""The xgboost flavor: detection, inspection, refusals, and predictions with the bits of xgboost."""

from __future__ import annotations

import decimal
import gzip
import io
import json
import pickle
import signal
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import xgboost

from pipeline.common import forkserver as forks
from pipeline.errors import ModelDigestMismatch, ModelError, RefusedForSafety, SchemaDrift, SpecError
from pipeline.models import cache
from pipeline.models.flavors import detect, detect_bytes, find_flavor, xgboost_probe
from pipeline.models.flavors import xgboost as flavor
from pipeline.models.flavors.limits import Limits
from pipeline.models.flavors.matrix import encode
from pipeline.models.model import Feature, ModelVersion
from pipeline.models.registry import resolve
from pipeline.scoring.outputs import prediction_schema
from pipeline.spec.model_ref import ModelRef
from pipeline.spec.score import Output

ROWS = 300
RNG = np.random.default_rng(3)
FRAME = pd.DataFrame(
    {
        "amount": RNG.normal(size=ROWS).astype("float32"),
        "visits": RNG.integers(0, 9, ROWS),
        "is_new": RNG.integers(0, 2, ROWS).astype(bool),
        "country": pd.Categorical(RNG.choice(["de", "fr", "us"], ROWS), categories=["us", "de", "fr"]),
        "tier": pd.Categorical(RNG.choice([10, 20, 30], ROWS)),
    }
)
FRAME.loc[::7, "amount"] = np.nan
FRAME.loc[::11, "country"] = None
CLASSES = RNG.integers(0, 3, ROWS)
BINARY = (FRAME["amount"].fillna(1) > 0).astype(int).to_numpy()
NUMERIC = ["amount", "visits"]

MODELS: dict[str, tuple[dict[str, Any], Any, list[str]]] = {
    "binary": ({"objective": "binary:logistic"}, BINARY, list(FRAME)),
    "logitraw": ({"objective": "binary:logitraw"}, BINARY, list(FRAME)),
    "softprob": ({"objective": "multi:softprob", "num_class": 3}, CLASSES, list(FRAME)),
    "softmax": ({"objective": "multi:softmax", "num_class": 3}, CLASSES, list(FRAME)),
    "regression": ({}, FRAME["visits"], list(FRAME)),
    "ranking": ({"objective": "rank:ndcg"}, BINARY, list(FRAME)),
    "targets": ({}, np.c_[FRAME["visits"], -FRAME["visits"]], list(FRAME)),
    "forest": ({"num_parallel_tree": 2}, FRAME["visits"], list(FRAME)),
    "dart": ({"booster": "dart"}, FRAME["visits"], list(FRAME)),
    "linear": ({"booster": "gblinear"}, FRAME["visits"], NUMERIC),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, (params, target, columns) in MODELS.items():
        data = xgboost.DMatrix(FRAME[columns], target, enable_categorical=True)
        if name == "ranking":
            data.set_group([ROWS // 3] * 3)
        depth = {} if name == "linear" else {"max_depth": 3}
        booster = xgboost.train({"nthread": 1, "seed": 1, **depth, **params}, data, 4)
        booster.save_model(folder / f"{name}.ubj")
        booster.save_model(folder / f"{name}.json")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def versions(models: dict[str, Path]) -> dict[str, ModelVersion]:
    def probe(data: bytes, *, where: str) -> dict[str, Any]:
        return xgboost_probe.facts(xgboost.Booster(model_file=bytearray(data)), data)

    with pytest.MonkeyPatch.context() as patch:
        # A child process takes a second; the tests below that name no version go through it.
        patch.setattr(flavor, "probe", probe)
        return {name: resolve(ModelRef(str(models[f"{name}.ubj"]))) for name in MODELS}


def loaded(version: ModelVersion) -> flavor.XGBoostPredictor:
    return flavor.load(version, Path(version.uri).read_bytes())


def table_of(columns: list[str]) -> pa.Table:
    return pa.Table.from_pandas(FRAME[columns], preserve_index=False)


def test_inspect_reads_the_facts_of_the_model(versions: dict[str, ModelVersion], models: dict[str, Path]) -> None:
    version = versions["binary"]
    assert version.features == (
        Feature("amount", "number"),
        Feature("visits", "integer"),
        Feature("is_new", "indicator"),
        Feature("country", "category", ("us", "de", "fr")),
        Feature("tier", "category", (10, 20, 30)),
    )
    assert (version.task, version.outputs, version.margins, version.trees) == ("binary", 1, 1, 4)
    assert version.objective == "binary:logistic"
    assert version.name == "binary"
    assert version.nbytes == models["binary.ubj"].stat().st_size
    assert version.version == version.digest[:12]
    shapes = {name: (v.task, v.outputs, v.margins, v.trees) for name, v in versions.items()}
    assert shapes["softprob"] == ("multiclass", 3, 3, 12)
    assert shapes["softmax"] == ("multiclass", 1, 3, 12)
    assert shapes["targets"] == ("regression", 2, 2, 8)
    assert shapes["ranking"] == ("ranking", 1, 1, 4)
    assert shapes["forest"] == ("regression", 1, 1, 8)
    assert shapes["linear"] == ("regression", 1, 1, 0)


def test_json_and_ubj_are_detected_by_bytes_and_give_one_model(
    models: dict[str, Path], versions: dict[str, ModelVersion], tmp_path: Path
) -> None:
    misnamed = tmp_path / "model.txt"
    misnamed.write_bytes(models["binary.json"].read_bytes())
    version = resolve(ModelRef(str(misnamed)))
    other = versions["binary"]
    assert (version.name, version.features, version.trees) == ("model", other.features, other.trees)
    assert version.digest != other.digest


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["prediction", "margin", "leaf", "contributions"])
def test_every_output_has_the_bits_of_xgboost(versions: dict[str, ModelVersion], name: str, kind: str) -> None:
    version, columns = versions[name], MODELS[name][2]
    if kind == "leaf" and name == "linear":
        with pytest.raises(SpecError, match="no output of the kind 'leaf'"):
            prediction_schema(version, Output(column="out", kind=kind))
        return
    options = {"prediction": {}, "margin": {"output_margin": True}, "leaf": {"pred_leaf": True}}
    wanted = xgboost.Booster(model_file=version.uri).predict(
        xgboost.DMatrix(FRAME[columns], enable_categorical=True), **options.get(kind, {"pred_contribs": True})
    )
    predictor = loaded(version)
    matrix = predictor.encode(table_of(columns))
    found = predictor.predict(matrix, kind=kind)  # type: ignore[arg-type]
    schema = prediction_schema(version, Output(column="out", kind=kind))
    assert found.dtype == (np.int32 if kind == "leaf" else np.float32)
    assert len(schema) == (1 if found.ndim == 1 else found.shape[1])
    assert schema.field(0).type == pa.from_numpy_dtype(found.dtype)
    np.testing.assert_array_equal(found.reshape(ROWS, -1), wanted.reshape(ROWS, -1).astype(found.dtype))


def test_columns_side_by_side_give_the_same(versions: dict[str, ModelVersion]) -> None:
    predictor = loaded(versions["binary"])
    table = table_of(list(FRAME))
    rows, columns = predictor.encode(table), predictor.encode(table, order="F")
    assert columns.flags.f_contiguous
    assert not columns.flags.c_contiguous
    for kind in ("prediction", "margin", "leaf", "contributions"):
        assert predictor.predict(columns, kind=kind).tobytes() == predictor.predict(rows, kind=kind).tobytes()


@pytest.mark.parametrize(
    ("name", "column"), [("binary", None), ("logitraw", None), ("softprob", None), ("softmax", None)]
)
def test_labels_are_classes(versions: dict[str, ModelVersion], name: str, column: None) -> None:
    predictor = loaded(versions[name])
    matrix = predictor.encode(table_of(list(FRAME)))
    margin = predictor.predict(matrix, kind="margin")
    wanted = margin.argmax(axis=1) if margin.ndim == 2 else margin > 0
    found = predictor.predict(matrix, kind="label")
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, wanted.astype(np.int32))
    assert prediction_schema(versions[name], Output(column="out", kind="label")).names == ["out"]


def test_a_regression_has_no_labels(versions: dict[str, ModelVersion]) -> None:
    with pytest.raises(SpecError, match="no output of the kind 'label'"):
        prediction_schema(versions["regression"], Output(column="out", kind="label"))


def test_several_values_a_row_are_numbered_columns(versions: dict[str, ModelVersion]) -> None:
    assert prediction_schema(versions["softprob"], Output(column="p")).names == ["p_0", "p_1", "p_2"]
    assert prediction_schema(versions["binary"], Output(column="p", kind="contributions")).names[-1] == "p_5"


def test_predictor_serves_many_threads(versions: dict[str, ModelVersion]) -> None:
    predictor = loaded(versions["softprob"])
    matrix = predictor.encode(table_of(list(FRAME)))
    kinds = ["prediction", "margin", "leaf", "contributions"]
    wanted = {kind: predictor.predict(matrix, kind=kind) for kind in kinds}  # type: ignore[arg-type]
    wrong: list[str] = []

    def work(kind: str) -> None:
        for _ in range(20):
            if not np.array_equal(predictor.predict(matrix, kind=kind), wanted[kind]):  # type: ignore[arg-type]
                wrong.append(kind)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in kinds * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_encode_casts_as_numpy_does() -> None:
    big = [2**53 + 1, 16777217, -3, None]
    table = pa.table(
        {
            "int64": pa.array(big, pa.int64()),
            "full": pa.array([2**62 + 1, 16777217, -3, 4], pa.int64()),
            "uint8": pa.array([1, 255, 0, None], pa.uint8()),
            "bool": pa.array([True, False, None, True]),
            "float64": pa.array([0.1, 1e300, None, float("nan")]),
            "float16": pa.array(np.array([0.5, 1, 2, 3], np.float16)),
            "float32": pa.array([0.1, -0.0, None, float("-inf")], pa.float32()),
            "decimal": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("-2.25"), None], pa.decimal128(9, 2)),
            "null": pa.nulls(4),
        }
    )
    features = tuple(Feature(name) for name in table.column_names)
    nan = np.nan
    wanted = np.array(
        [
            np.array([2**53 + 1, 16777217, -3, 0]).astype("f4"),
            np.array([2**62 + 1, 16777217, -3, 4]).astype("f4"),
            [1, 255, 0, nan],
            [1, 0, nan, 1],
            [np.float32(0.1), np.inf, nan, nan],
            [0.5, 1, 2, 3],
            [np.float32(0.1), -0.0, nan, -np.inf],
            [np.float32(1.1), nan, -2.25, nan],
            [nan] * 4,
        ],
        dtype="f4",
    ).T
    wanted[3, 0] = nan
    for pieces in (table, pa.concat_tables([table.slice(0, 1), table.slice(1)]), table.slice(1, 2)):
        rows = wanted[1:3] if pieces.num_rows == 2 else wanted
        for order in ("C", "F"):
            found = encode(pieces, features, order=order)
            assert found.dtype == np.float32
            assert found.flags.c_contiguous if order == "C" else found.flags.f_contiguous
            np.testing.assert_array_equal(found, rows)
            assert np.array_equal(np.signbit(found), np.signbit(rows))


def test_encode_gives_the_codes_of_the_model_whatever_the_order_in_the_file() -> None:
    feature = Feature("country", "category", ("us", "de", "fr"))
    values = ["fr", None, "us", "de"]
    wanted = [[2], [np.nan], [0], [1]]
    text = pa.array(values)
    columns = [text, text.cast(pa.large_string()), text.dictionary_encode(), text.cast(pa.string_view())]
    dictionary = pa.DictionaryArray.from_arrays(pa.array([1, 2, 0, 3]), pa.array(["us", "fr", None, "de"]))
    columns.append(dictionary)
    for column in columns:
        np.testing.assert_array_equal(encode(pa.table({"country": column}), (feature,)), np.array(wanted, "f4"))
    several = pa.chunked_array([text[:2].dictionary_encode(), text[2:].dictionary_encode()])
    np.testing.assert_array_equal(encode(pa.table({"country": several}), (feature,)), np.array(wanted, "f4"))
    integers = encode(pa.table({"tier": [30, None, 10]}), (Feature("tier", "category", (10, 20, 30)),))
    np.testing.assert_array_equal(integers, np.array([[2], [np.nan], [0]], "f4"))
    codes = encode(pa.table({"tier": [3, None]}), (Feature("tier", "category"),))
    np.testing.assert_array_equal(codes, np.array([[3], [np.nan]], "f4"))


@pytest.mark.parametrize(
    ("column", "feature"),
    [
        (pa.array(["a"]), Feature("x")),
        (pa.array([[1]]), Feature("x")),
        (pa.array([1], pa.timestamp("s")), Feature("x")),
        (pa.array([1]), Feature("x", "category", ("a", "b"))),
        (pa.array(["a"]), Feature("x", "category", (1, 2))),
        (pa.array(["a"]).dictionary_encode(), Feature("x", "category")),
    ],
)
def test_encode_refuses_what_cannot_be_the_feature(column: pa.Array, feature: Feature) -> None:
    with pytest.raises(SchemaDrift, match="the model cannot take a column") as caught:
        encode(pa.table({"x": column}), (feature,))
    assert caught.value.where == "x"


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the payload ran",))


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("wrap", [bytes, zlib.compress, gzip.compress])
def test_pickles_are_refused_whatever_their_name(tmp_path: Path, protocol: int, wrap: Any) -> None:
    path = tmp_path / "model.json"
    path.write_bytes(wrap(pickle.dumps(Payload(), protocol=protocol)))
    with pytest.raises(RefusedForSafety, match="pickle") as caught:
        resolve(ModelRef(str(path)))
    assert caught.value.exit_code == 7


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.arange(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "an empty file"),
        (b"tree\nversion=v4\n", "LightGBM model's, without its fields"),
        (b'{"tree_info": [], "name": 1}', "'tree_info', 'name'"),
        (b'{"a": ', "begins like JSON"),
        (b"{i\x01a}", "UBJSON"),
        (b"PAR1....", "Parquet"),
        (b"x,y\n1,2\n", "text that begins with 'x,y"),
        (bytes(range(200, 256)), "unknown bytes"),
        (zip_bytes(), "zip archive"),
    ],
)
def test_other_formats_are_named(data: bytes, found: str) -> None:
    with pytest.raises(ModelError, match="unknown format") as caught:
        detect_bytes(data)
    assert found in caught.value.found


def test_the_old_binary_format_is_refused_with_advice() -> None:
    old = np.float32(0.5).tobytes() + np.uint32(28).tobytes() + bytes(128) + b"\x0f\0\0\0\0\0\0\0binary:logistic"
    for data in (old, b"binf" + old):
        with pytest.raises(ModelError, match="old binary format") as caught:
            detect_bytes(data)
        assert "save_model" in caught.value.next_step


@pytest.mark.parametrize("data", [b'{"learner": 3}', b'{"learner": {}}', b"{L\0\0\0\0\0\0\0\x07learner{"])
def test_a_file_that_only_looks_like_a_model_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.ubj"
    path.write_bytes(data)
    with pytest.raises(ModelError, match="xgboost cannot read the model") as caught:
        resolve(ModelRef(str(path)))
    assert "/workspace" not in caught.value.found


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are first loaded in a process that was started for it."""
    monkeypatch.setattr(forks, "is_running", lambda: False)


def test_fork_and_new_process_give_the_same_facts(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, alone: None
) -> None:
    data = models["binary.ubj"].read_bytes()
    expected = xgboost_probe.probe(data)
    monkeypatch.setattr(forks, "is_running", lambda: True)
    assert xgboost_probe.probe(data) == expected
    with pytest.raises(ModelError, match="cannot read the model"):
        xgboost_probe.probe(b"no model")


def test_a_crash_while_reading_stays_in_the_fork() -> None:
    assert xgboost_probe._in_fork(signal.raise_signal, signal.SIGSEGV, limits=Limits.for_file(0)) == "signal SIGSEGV"


def test_a_crash_while_reading_stays_in_the_child(monkeypatch: pytest.MonkeyPatch, alone: None) -> None:
    monkeypatch.setattr(xgboost_probe, "_CHILD", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(ModelError, match="ended the process") as caught:
        xgboost_probe.probe(b"{}")
    assert caught.value.found == "signal SIGSEGV"


def test_a_missing_package_names_both_extras(monkeypatch: pytest.MonkeyPatch, alone: None) -> None:
    child = xgboost_probe._CHILD.replace("from pipeline", "sys.modules['xgboost'] = None; from pipeline")
    monkeypatch.setattr(xgboost_probe, "_CHILD", child)
    with pytest.raises(ModelError, match="not installed") as caught:
        xgboost_probe.probe(b"{}")
    assert "xgboost-cpu" in caught.value.next_step
    assert "or xgboost (" in caught.value.next_step


def test_missing_model_file_names_the_nearest(models: dict[str, Path]) -> None:
    path = models["binary.ubj"]
    with pytest.raises(ModelError, match="model file not found") as caught:
        detect(str(path.with_name("binray.ubj")))
    assert str(path) in caught.value.next_step or "binary.json" in caught.value.next_step
    with pytest.raises(ModelError, match="a folder"):
        detect(str(path.parent))


def test_reference_to_an_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model named"):
        resolve(ModelRef.parse("models:/churn@champion"), registry=str(tmp_path))


def test_the_digest_is_verified_before_anything_is_parsed(versions: dict[str, ModelVersion]) -> None:
    version = versions["binary"]
    with pytest.raises(ModelDigestMismatch, match="not the one that was pinned") as caught:
        flavor.load(version, b"not even a model")
    assert version.digest in caught.value.expected
    assert len(caught.value.found) == len("SHA-256 ") + 64


def test_the_cache_loads_once_for_all_threads(
    versions: dict[str, ModelVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.forget_models()
    loads: list[str] = []
    real = find_flavor("xgboost")

    def load(version: ModelVersion, data: bytes) -> Any:
        loads.append(version.digest)
        return real.load(version, data)

    monkeypatch.setattr(cache, "find_flavor", lambda name: replace(real, load=load))
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(cache.get_predictor(versions["binary"]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert len({id(predictor) for predictor, _ in found}) == 1
    assert sum(seconds > 0 for _, seconds in found) == 1
    cache.forget_models()


def test_a_swapped_file_is_not_loaded(versions: dict[str, ModelVersion], tmp_path: Path) -> None:
    cache.forget_models()
    path = tmp_path / "model.ubj"
    path.write_bytes(Path(versions["softmax"].uri).read_bytes())
    with pytest.raises(ModelDigestMismatch):
        cache.get_predictor(replace(versions["binary"], uri=str(path)))


def test_threads_follow_the_environment(monkeypatch: pytest.MonkeyPatch, versions: dict[str, ModelVersion]) -> None:
    for text, count in (("3", 3), ("2,1", 2), ("", 1), ("all", 1), ("0", 1)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert flavor.threads_wanted() == count
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    config = json.loads(loaded(versions["binary"]).booster.save_config())
    assert config["learner"]["generic_param"]["nthread"] == "2"
