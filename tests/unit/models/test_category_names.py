"""Names of categories that are not ASCII: right, or refused by name; never the score of another category."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import xgboost
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ModelError, SpecError
from pipeline.models.cache import forget_models, get_predictor
from pipeline.models.category_names import are_stored, could_be_cut, likely_names, split_names
from pipeline.models.flavors import xgboost as flavor
from pipeline.models.flavors import xgboost_file, xgboost_probe
from pipeline.models.model import ModelVersion
from pipeline.models.options import apply_options
from pipeline.models.registry import resolve
from pipeline.spec.model_ref import ModelRef

LISTS: dict[str, list[str]] = {
    "cities": ["Berlin", "München", "Köln", "Ulm"],
    "cut inside a character": ["Aä", "Bö", "Cü"],
    "cut to another valid value": ["über", "S", "M", "L"],
    "emoji": ["🐍", "🐍🐍", "x"],
    "equal in prefix": ["Köln", "Kölner", "Kölnerin"],
    "the last is lost": ["äöüß", "a", "b"],
    "the last is empty": ["ä", "b", ""],
}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read models without a child process, which would take a second each."""

    def probe(data: bytes, *, where: str) -> dict[str, Any]:
        return xgboost_probe.facts(xgboost.Booster(model_file=bytearray(data)), data)

    monkeypatch.setattr(flavor, "probe", probe)


def train(names: list[str], *, rows: int = 300) -> tuple[xgboost.Booster, pd.DataFrame]:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, len(names), rows)
    frame = pd.DataFrame({"city": pd.Categorical.from_codes(codes, names), "a": rng.normal(size=rows).astype("f4")})
    data = xgboost.DMatrix(frame, codes + frame["a"], enable_categorical=True)
    return xgboost.train({"nthread": 1, "max_depth": 4, "eta": 1.0, "max_cat_to_onehot": 1}, data, 6), frame


def saved(booster: xgboost.Booster, path: Path, *, version: list[int], whole: list[str] | None = None) -> ModelVersion:
    """Save the model as ``version`` of xgboost would, with ``whole`` names where they are given."""
    booster.save_model(path.with_suffix(".json"))
    model = json.loads(path.with_suffix(".json").read_text())
    model["version"] = version
    if whole is not None:
        encoded = [name.encode() for name in whole]
        entry = model["learner"]["gradient_booster"]["model"]["cats"]["enc"][0]
        entry["offsets"] = [0, *accumulate(map(len, encoded))]
        entry["values"] = np.frombuffer(b"".join(encoded), np.int8).tolist()
    path.with_suffix(".json").write_text(json.dumps(model))
    xgboost.Booster(model_file=path.with_suffix(".json"))
    return resolve(ModelRef(str(path.with_suffix(".json"))))


def scores(version: ModelVersion, frame: pd.DataFrame) -> np.ndarray:
    forget_models()
    predictor, _ = get_predictor(version)
    table = pa.table({"city": frame["city"].astype(str).tolist(), "a": frame["a"].to_numpy()})
    return predictor.predict(predictor.encode(table), kind="prediction")


@pytest.fixture
def cuts() -> bool:
    """Return True if the installed xgboost cuts names that are not ASCII."""
    return tuple(int(part) for part in xgboost.__version__.split(".")[:2]) < (3, 4)


@pytest.mark.fault(103)
@pytest.mark.parametrize("kind", LISTS)
class TestTrainedHere:
    def test_names_that_may_be_cut_are_refused_by_name(self, kind: str, tmp_path: Path, cuts: bool) -> None:
        if not cuts:
            pytest.skip("this xgboost stores names whole")
        booster, _ = train(LISTS[kind])
        booster.save_model(tmp_path / "m.ubj")
        version = resolve(ModelRef(str(tmp_path / "m.ubj")))
        assert version.features[0].categories is None
        with pytest.raises(ModelError, match="may have lost names of categories of 'city'") as caught:
            apply_options(version)
        assert "score.categories: {city: […]}" in caught.value.next_step
        assert "3.4" in caught.value.expected
        assert f"they are {LISTS[kind][0][:1]!r}"[:-1] in caught.value.found

    def test_listed_names_have_the_scores_of_predict(self, kind: str, tmp_path: Path) -> None:
        booster, frame = train(LISTS[kind])
        booster.save_model(tmp_path / "m.ubj")
        version = apply_options(resolve(ModelRef(str(tmp_path / "m.ubj"))), categories={"city": tuple(LISTS[kind])})
        wanted = booster.predict(xgboost.DMatrix(frame, enable_categorical=True))
        assert scores(version, frame).tobytes() == wanted.tobytes()
        assert apply_options(version, categories={"city": tuple(LISTS[kind])}) == version

    def test_other_lists_are_refused(self, kind: str, tmp_path: Path) -> None:
        names = LISTS[kind]
        booster, _ = train(names)
        booster.save_model(tmp_path / "m.ubj")
        version = resolve(ModelRef(str(tmp_path / "m.ubj")))
        for other in (names[:-1], [*names, "more"], names[::-1], [names[0] + "x", *names[1:]]):
            with pytest.raises(SpecError, match="not those of the model") as caught:
                apply_options(version, categories={"city": other})
            assert caught.value.where == "score.categories.city"


def test_complete_names_of_a_newer_xgboost_are_used(tmp_path: Path) -> None:
    for number, names in enumerate(LISTS.values()):
        booster, frame = train(names)
        version = saved(booster, tmp_path / f"{number}", version=[3, 4, 0], whole=names)
        assert version.features[0].categories == tuple(names)
        wanted = booster.predict(xgboost.DMatrix(frame, enable_categorical=True))
        assert scores(apply_options(version), frame).tobytes() == wanted.tobytes()


def test_a_cut_file_that_a_newer_xgboost_saved_again_is_refused_where_that_shows(tmp_path: Path, cuts: bool) -> None:
    if not cuts:
        pytest.skip("this xgboost stores names whole")
    booster, _ = train(LISTS["cut inside a character"])
    version = saved(booster, tmp_path / "m", version=[3, 4, 1])
    with pytest.raises(ModelError, match="may have lost names"):
        apply_options(version)


def test_ascii_names_and_numbers_are_always_certain(tmp_path: Path) -> None:
    booster, frame = train(["a", "bb", "", "c[<"])
    booster.save_model(tmp_path / "m.ubj")
    version = apply_options(resolve(ModelRef(str(tmp_path / "m.ubj"))))
    assert version.features[0].categories == ("a", "bb", "", "c[<")
    wanted = booster.predict(xgboost.DMatrix(frame, enable_categorical=True))
    assert scores(version, frame).tobytes() == wanted.tobytes()


def test_a_slice_without_categories_takes_a_list(tmp_path: Path) -> None:
    booster, frame = train(["a", "b", "c"])
    booster[:3].save_model(tmp_path / "m.ubj")
    version = resolve(ModelRef(str(tmp_path / "m.ubj")))
    if version.features[0].categories is None:
        version = apply_options(version, categories={"city": ("a", "b", "c")})
    wanted = booster.predict(xgboost.DMatrix(frame, enable_categorical=True), iteration_range=(0, 3))
    assert scores(version, frame).tobytes() == wanted.tobytes()


def test_lists_for_other_features_are_refused(tmp_path: Path) -> None:
    booster, _ = train(["a", "b"])
    booster.save_model(tmp_path / "m.ubj")
    version = resolve(ModelRef(str(tmp_path / "m.ubj")))
    with pytest.raises(SpecError, match="not a feature of the model") as caught:
        apply_options(version, categories={"cty": ("a", "b")})
    assert caught.value.next_step == "did you mean city?"
    with pytest.raises(SpecError, match="has no categories"):
        apply_options(version, categories={"a": ("a", "b")})
    with pytest.raises(SpecError, match="not those of the model"):
        apply_options(version, categories={"city": ("b", "a")})


def test_the_version_of_a_file_is_read_in_both_formats(tmp_path: Path) -> None:
    booster, _ = train(["a", "b"])
    expected = tuple(int(part) for part in xgboost.__version__.split(".")[:3])
    for name in ("m.ubj", "m.json"):
        booster.save_model(tmp_path / name)
        assert xgboost_file.saved_version((tmp_path / name).read_bytes()) == expected
    assert xgboost_file.saved_version(b'{"version": [3, 10, 1], "learner": {}}') == (3, 10, 1)
    assert xgboost_file.saved_version(b"{}") is None
    assert xgboost_file.saved_version(b"{" + b"L" + (7).to_bytes(8, "big") + b"version[$") is None


NAMES = st.lists(st.text(st.characters(codec="utf-8"), max_size=6), min_size=1, max_size=8, unique=True)


@pytest.mark.fault(103)
@given(NAMES)
def test_cut_names_are_never_taken_for_others(names: list[str]) -> None:
    """Names stored by xgboost 3.1 to 3.3 are either told as they are, or as names that may be cut."""
    joined = "".join(names).encode()
    offsets = [0, *accumulate(map(len, names))]
    values = joined[: offsets[-1]]
    if joined.isascii():
        assert split_names(offsets, values) == names
        assert not could_be_cut(offsets, values)
    else:
        assert could_be_cut(offsets, values)
        known = likely_names(offsets, values)
        assert [name for name in known if not name.endswith("…")] == names[
            : len(names) - sum(name.endswith("…") for name in known)
        ] or any(name.endswith("…") for name in names)
    assert are_stored(names, offsets, values)


@given(NAMES)
def test_complete_names_are_split_as_they_were_joined(names: list[str]) -> None:
    encoded = [name.encode() for name in names]
    offsets = [0, *accumulate(map(len, encoded))]
    assert split_names(offsets, b"".join(encoded)) == names
    assert are_stored(names, offsets, b"".join(encoded))


@pytest.mark.parametrize("offsets", [[1, 3], [0, 2], [0, 4], [0, 3, 2, 3]])
def test_offsets_outside_the_names_are_refused(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="offsets of category names"):
        split_names(offsets, b"abc")
