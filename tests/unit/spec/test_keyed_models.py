"""``score.by`` and ``models``: what a spec may say, what is refused, and the references in order."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import SpecError
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.load import absolute
from pipeline.spec.score import Score


def build(**score: Any) -> JobSpec:
    return JobSpec.build(name="j", source={"path": "in"}, sink={"path": "out"}, steps=[{"score": score}])


def test_references_are_in_the_order_of_the_keys_then_that_of_others() -> None:
    score = build(by="country", models={"FR": "f.ubj", "DE": "d.ubj"}, other="rest.ubj").score
    assert score.references == ("d.ubj", "f.ubj", "rest.ubj")
    assert (score.keyed_models, score.other_model) == ({"DE": "d.ubj", "FR": "f.ubj"}, "rest.ubj")


@pytest.mark.parametrize(("other", "given"), [({}, "reject"), ({"other": None}, None)])
def test_other_rows_are_rejected_unless_null_is_said(other: dict[str, Any], given: str | None) -> None:
    spec = build(by="country", models={"DE": "d.ubj"}, **other)
    assert (spec.score.other, spec.score.other_model) == (given, None)
    assert spec.score.references == ("d.ubj",)
    assert JobSpec.load(spec.to_yaml()) == spec


def test_a_listing_has_no_references_before_it_is_resolved() -> None:
    spec = build(by="country", models="m/{}.ubj")
    assert (spec.has_listing, spec.score.references, spec.is_plain) == (True, (), False)
    assert not build(model="m.ubj").has_listing


def test_integers_and_booleans_as_keys_are_texts() -> None:
    score = Score(by="n", models={49: "a.ubj", True: "b.ubj"})  # type: ignore[dict-item]
    assert score.keyed_models == {"49": "a.ubj", "true": "b.ubj"}


def test_paths_become_absolute_but_reject_and_registries_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    named = absolute(build(by="n", models={"a": "a.ubj", "b": "models:/b@x"}, other="rest.ubj")).score
    assert named.models == {"a": f"{tmp_path}/a.ubj", "b": "models:/b@x"}
    assert named.other == f"{tmp_path}/rest.ubj"
    listed = absolute(build(by="n", models="m/{}.ubj")).score
    assert (listed.models, listed.other) == (f"{tmp_path}/m/{{}}.ubj", "reject")
    assert absolute(build(by="n", models="models:/m-{}@x")).score.models == "models:/m-{}@x"


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ({}, "has no model"),
        ({"by": "n"}, "has by without models"),
        ({"models": "m/{}.ubj"}, "has models without by"),
        ({"model": "m.ubj", "by": "n", "models": "m/{}.ubj"}, "has both model and models"),
        ({"model": "m.ubj", "by": "n"}, "has both model and by"),
        ({"model": "m.ubj", "other": None}, "has other without by"),
        ({"by": "n", "models": {"a": "a.ubj"}, "combine": "mean"}, "has combine beside by"),
        ({"by": "n", "models": "m.ubj"}, "is not a listing of models"),
        ({"by": "n", "models": "{}/{}.ubj"}, "is not a listing of models"),
        ({"by": "n", "models": "models:/{}"}, "is not a valid model reference"),
        ({"by": "n", "models": {"a": "models:/"}}, "is not a valid model reference"),
    ],
)
def test_what_is_refused(score: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        build(**score)
    assert message in str(caught.value)
