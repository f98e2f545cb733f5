"""xgboost's binary model form, read as its JSON is."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import xgboost

from pipeline.errors import ModelError
from pipeline.models.trees.xgboost import read_ubj


def assert_same(found: Any, wanted: Any, place: str = "") -> None:
    if isinstance(wanted, dict):
        assert list(found) == list(wanted), place
        for name in wanted:
            assert_same(found[name], wanted[name], f"{place}.{name}")
    elif isinstance(found, np.ndarray):
        np.testing.assert_array_equal(found, np.asarray(wanted, dtype=found.dtype), err_msg=place)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), place
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other, place)
    elif isinstance(wanted, float):
        assert np.float32(found) == np.float32(wanted), place
    else:
        assert found == wanted, place


@pytest.fixture(scope="module")
def booster() -> xgboost.Booster:
    rng = np.random.default_rng(0)
    values = np.c_[rng.normal(size=(500, 3)), rng.integers(0, 6, 500)]
    data = xgboost.DMatrix(values, rng.random(500), feature_types=["float"] * 3 + ["c"], enable_categorical=True)
    return xgboost.train({"max_depth": 4, "booster": "dart", "rate_drop": 0.5, "nthread": 1, "seed": 1}, data, 5)


def test_it_is_what_the_json_says(booster: xgboost.Booster) -> None:
    found = read_ubj(booster.save_raw("ubj"))
    assert_same(found, json.loads(booster.save_raw("json")))
    tree = found["learner"]["gradient_booster"]["gbtree"]["model"]["trees"][0]
    assert tree["split_conditions"].dtype == np.float32
    assert tree["split_conditions"].dtype.isnative


def test_every_cut_is_refused(booster: xgboost.Booster) -> None:
    data = bytes(booster.save_raw("ubj"))
    for length in [*range(200), *range(200, len(data), 97)]:
        with pytest.raises(ModelError, match="not whole UBJSON"):
            read_ubj(data[:length])


@pytest.mark.parametrize(
    "data", [b"Z", b"[#U\x01T", b"{L" + b"\xff" * 8, b"{U\x01a?}", b"[$U]", b"{U\x01aSd\x00\x00\x00\x00}"]
)
def test_what_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(ModelError):
        read_ubj(data)


def test_every_kind_of_value() -> None:
    data = (
        b"{U\x01ai\xffU\x01bU\xffU\x01cI\x01\x00U\x01dl\x00\x01\x00\x00U\x01eD\x3f\xf8\x00\x00\x00\x00\x00\x00"
        b"U\x01fTU\x01gFU\x01hZU\x01i[SU\x01xU\x07]U\x01j[#U\x02TFU\x01k[$I#U\x02\x00\x01\xff\xff}"
    )
    found = read_ubj(data)
    assert found.pop("k").tolist() == [1, -1]
    assert found == {
        "a": -1, "b": 255, "c": 256, "d": 65536, "e": 1.5, "f": True, "g": False, "h": None, "i": ["x", 7],
        "j": [True, False],
    }  # fmt: skip
