"""The CatBoost flavor: files that are refused, and rows that the library refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.common.digest import digest_bytes
from pipeline.errors import ModelError
from pipeline.models.flavors import catboost as flavor
from pipeline.models.flavors import detect_bytes
from pipeline.models.flavors.first_load import complete
from pipeline.models.model import ModelVersion
from pipeline.models.outputs import output_type

BLANK = ModelVersion("m", "", "m.cbm", "", "catboost", 0, (), "other", 1)
OPTIONS: dict[str, Any] = {
    "iterations": 4,
    "depth": 2,
    "thread_count": 1,
    "allow_writing_files": False,
    "verbose": False,
}


def test_a_file_is_known_by_its_bytes() -> None:
    assert detect_bytes(b"CBM1\x08\0\0\0" + bytes(8)) == "catboost"


@pytest.mark.parametrize("data", [b"CBM1", b"CBM1\xff\xff\0\0abc", b"CBM2\0\0\0\0"])
def test_a_file_that_is_cut_off_is_damaged(data: bytes) -> None:
    with pytest.raises(ModelError, match="the CatBoost model is damaged"):
        flavor.describe(BLANK, data)


@pytest.fixture(scope="module")
def catboost() -> Any:
    return pytest.importorskip("catboost", reason="not in the extra dev: its wheel has 97 MB")


def saved(model: Any, folder: Path) -> bytes:
    model.save_model(folder / "m.cbm")
    return (folder / "m.cbm").read_bytes()


def test_a_null_category_is_the_rows_fault(catboost: Any, tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": np.arange(40.0), "c": np.take(["a", "b"], np.arange(40) % 2)})
    data = saved(catboost.CatBoostRegressor(cat_features=["c"], **OPTIONS).fit(frame, frame["x"]), tmp_path)
    version = complete(flavor.describe(replace(BLANK, digest=digest_bytes(data)), data))
    predictor = flavor.load(version, data)
    table = pa.table({"x": [1.0, None, 2.0], "c": pa.array(["a", "zebra", None]).dictionary_encode()})
    assert predictor.predict(predictor.encode(table.slice(0, 2)), kind="prediction").shape == (2,)
    with pytest.raises((TypeError, catboost.CatBoostError)):
        predictor.predict(predictor.encode(table.slice(2, 1)), kind="prediction")


def test_counts_are_exponentials(catboost: Any, tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": np.arange(40.0)})
    model = catboost.CatBoostRegressor(loss_function="Poisson", **OPTIONS).fit(frame, frame["x"])
    data = saved(model, tmp_path)
    version = complete(flavor.describe(replace(BLANK, digest=digest_bytes(data)), data))
    predictor = flavor.load(version, data)
    encoded = predictor.encode(pa.Table.from_pandas(frame))
    np.testing.assert_array_equal(predictor.predict(encoded, kind="prediction"), model.predict(frame))
    margins = predictor.predict(encoded, kind="margin")
    np.testing.assert_array_equal(margins, model.predict(frame, prediction_type="RawFormulaVal"))
    assert output_type(version, "label") is None
