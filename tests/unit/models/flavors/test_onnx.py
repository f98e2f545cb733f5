"""The ONNX flavor: files that are refused, inputs of every type, fixed numbers of rows, and want of memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import pipeline
from pipeline.common.digest import digest_bytes
from pipeline.errors import ModelError, RefusedForSafety, SchemaDrift
from pipeline.models.flavors import detect_bytes
from pipeline.models.flavors import onnx as flavor
from pipeline.models.flavors.first_load import complete
from pipeline.models.flavors.onnx_file import has_external_data
from pipeline.models.model import ModelVersion
from pipeline.testing.flavor_cases import save_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

BLANK = ModelVersion("m", "", "m.onnx", "", "onnx", 0, (), "other", 1)
SUM = [("ReduceSum", ["x", "w0"], ["p"], {"keepdims": 0})]
AXES = {0: np.array([1], np.int64)}


def sum_model(folder: Path, rows: Any = "rows", width: Any = 3) -> bytes:
    return save_onnx(folder, SUM, {"x": ("FLOAT", [rows, width])}, {"p": ("FLOAT", [rows])}, AXES).read_bytes()


def predictor_of(data: bytes) -> flavor.OnnxPredictor:
    version = complete(flavor.describe(replace(BLANK, digest=digest_bytes(data)), data))
    return flavor.load(version, data)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASK_PIPELINE__DIRECTORY", str(tmp_path / "jobs"))
    monkeypatch.chdir(tmp_path)


class TestRefusals:
    @pytest.mark.parametrize("place", ["initializer", "attribute"])
    def test_tensors_in_other_files_are_refused(self, tmp_path: Path, place: str) -> None:
        model = onnx.load_from_string(sum_model(tmp_path))
        tensor = onnx.TensorProto(name="far", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="/etc/passwd")
        if place == "initializer":
            model.graph.initializer.append(tensor)
        else:
            inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["far"], value=tensor)], "g", [], [])
            model.graph.node.append(onnx.helper.make_node("If", ["w0"], ["q"], then_branch=inner, else_branch=inner))
        data = model.SerializeToString()
        assert has_external_data(data)
        with pytest.raises(RefusedForSafety, match="tensors in other files"):
            flavor.describe(BLANK, data)

    def test_a_whole_model_has_none(self, tmp_path: Path) -> None:
        assert not has_external_data(sum_model(tmp_path))

    def test_unknown_operators_are_refused(self, tmp_path: Path) -> None:
        nodes = [("Launch", ["x"], ["p"], {"domain": "evil"})]
        path = save_onnx(tmp_path, nodes, {"x": ("FLOAT", ["rows", 3])}, {"p": ("FLOAT", ["rows"])}, {})
        with pytest.raises(ModelError, match="ONNX Runtime cannot read the model") as caught:
            flavor.describe(BLANK, path.read_bytes())
        assert "evil" in caught.value.found

    @pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
    def test_a_file_that_is_cut_off_is_damaged(self, tmp_path: Path, share: float) -> None:
        data = sum_model(tmp_path)
        with pytest.raises(ModelError):
            flavor.describe(BLANK, data[: int(share * len(data))])

    def test_pictures_are_no_columns(self, tmp_path: Path) -> None:
        nodes = [("Flatten", ["x"], ["p"])]
        inputs = {"x": ("FLOAT", ["rows", 3, 4])}
        path = save_onnx(tmp_path, nodes, inputs, {"p": ("FLOAT", ["rows", 12])}, {})
        with pytest.raises(ModelError, match="inputs of the ONNX model are not columns") as caught:
            flavor.describe(BLANK, path.read_bytes())
        assert "x: tensor(float)" in caught.value.found

    def test_a_width_that_the_file_does_not_tell_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="are not columns"):
            flavor.describe(BLANK, sum_model(tmp_path, width="k"))


def test_a_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    assert detect_bytes(sum_model(tmp_path)) == "onnx"


def test_a_model_for_a_fixed_number_of_rows_gets_that_many(tmp_path: Path) -> None:
    predictor = predictor_of(sum_model(tmp_path, rows=4))
    rows = np.arange(33, dtype=np.float32).reshape(11, 3)
    found = predictor.predict(rows, kind="prediction")
    np.testing.assert_array_equal(found, rows.sum(axis=1))


def test_columns_without_names_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(sum_model(tmp_path))
    frame = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, None], "c": [5.0, 6.0]})
    with pytest.raises(SchemaDrift):
        pipeline.score(frame, path)
    scored = pipeline.score(frame, path, features=["a", "b", "c"])
    np.testing.assert_array_equal(scored["prediction"], np.array([9.0, np.nan], np.float32))


def test_texts_flags_and_integers_are_inputs(tmp_path: Path) -> None:
    nodes = [("Equal", ["city", "w0"], ["same"]), ("Cast", ["same"], ["s"], {"to": 7})]
    nodes += [("Cast", ["flag"], ["f"], {"to": 7}), ("Add", ["s", "f"], ["a"]), ("Add", ["a", "n"], ["p"])]
    inputs = {"city": ("STRING", ["rows"]), "flag": ("BOOL", ["rows"]), "n": ("INT64", ["rows"])}
    model = onnx.load_from_string(
        save_onnx(tmp_path, nodes, inputs, {"p": ("INT64", ["rows"])}, {0: np.array(["Ulm"], object)}).read_bytes()
    )
    model.opset_import[0].version = 19
    data = model.SerializeToString()
    predictor = predictor_of(data)
    kinds = {feature.name: feature.kind for feature in predictor.version.features}
    assert kinds == {"city": "text", "flag": "indicator", "n": "integer"}
    table = pa.table(
        {
            "city": pa.array(["Ulm", "Bonn", None, "Ulm"]).dictionary_encode(),
            "flag": [True, False, True, False],
            "n": pa.array([1, 2, 3, None]),
        }
    )
    found = predictor.predict(predictor.encode(table.slice(0, 2)), kind="prediction")
    assert (found.dtype, found.tolist()) == (np.int64, [3, 2])
    # The row at fault is found by halving, as for any model.
    for row, name in ((2, "city"), (3, "n")):
        with pytest.raises(ValueError, match=f"null for the input {name}"):
            predictor.predict(predictor.encode(table.slice(row, 1)), kind="prediction")


def test_want_of_memory_is_told_by_the_message(tmp_path: Path) -> None:
    predictor = predictor_of(sum_model(tmp_path))
    assert predictor.is_out_of_memory(RuntimeError("... bfc_arena.cc:359 Failed to allocate memory"))
    assert not predictor.is_out_of_memory(RuntimeError("invalid dimensions"))
