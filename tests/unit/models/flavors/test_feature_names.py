"""Feature names as users have them: right, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xgboost

from pipeline.api.frames import score
from pipeline.errors import ModelError
from pipeline.models.flavors import xgboost as flavor
from pipeline.models.flavors import xgboost_probe
from pipeline.models.registry import resolve
from pipeline.spec.model_ref import ModelRef

RNG = np.random.default_rng(0)
MATRIX = RNG.normal(size=(120, 3)).astype("f4")

NAMES: dict[str, list[Any]] = {
    "brackets": ["a[0]", "b]", "[c"],
    "less than": ["a<b", "<", "a<=1"],
    "integers": [0, 1, 2],
    "spaces and dots": ["a b", "a.b", " c "],
    "unicode": ["größe", "城市", "🐍"],
    "very long": ["x" * 5000, "y" * 5000, "z"],
    "quotes and newlines": ['"a"', "b\nc", "d\te"],
}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read models without a child process, which would take a second each."""

    def probe(data: bytes, *, where: str) -> dict[str, Any]:
        return xgboost_probe.facts(xgboost.Booster(model_file=bytearray(data)), data)

    monkeypatch.setattr(flavor, "probe", probe)


def save(path: Path, names: list[Any]) -> xgboost.Booster:
    """Save a model with these names, which training may refuse and a file may have all the same."""
    booster = xgboost.train({"nthread": 1, "max_depth": 3}, xgboost.DMatrix(MATRIX, MATRIX[:, 0]), 3)
    booster.save_model(path.with_suffix(".json"))
    model = json.loads(path.with_suffix(".json").read_text())
    model["learner"]["feature_names"] = [str(name) for name in names]
    model["learner"]["feature_types"] = ["float"] * len(names)
    path.with_suffix(".json").write_text(json.dumps(model, ensure_ascii=False), encoding="utf-8")
    return booster


@pytest.mark.parametrize("kind", NAMES)
def test_columns_are_found_by_such_names(kind: str, tmp_path: Path) -> None:
    names = [str(name) for name in NAMES[kind]]
    booster = save(tmp_path / "m", names)
    version = resolve(ModelRef(str(tmp_path / "m.json")))
    assert version.feature_names == tuple(names)
    frame = pd.DataFrame(MATRIX, columns=names)[names[::-1]]
    scored = score(frame, tmp_path / "m.json")["prediction"].to_numpy()
    assert scored.tobytes() == booster.predict(xgboost.DMatrix(MATRIX)).tobytes()


def test_two_features_of_one_name_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "m", ["a", "b", "a"])
    with pytest.raises(ModelError, match="two features of one name") as caught:
        resolve(ModelRef(str(tmp_path / "m.json")))
    assert caught.value.found == "'a', 2 times among 3 features"
    assert "feature_names" in caught.value.next_step
    assert caught.value.expected


def test_names_for_another_number_of_features_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "m", ["a", "b"])
    with pytest.raises((ModelError, ValueError, xgboost.core.XGBoostError)):
        resolve(ModelRef(str(tmp_path / "m.json")))
