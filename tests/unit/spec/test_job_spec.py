"""`JobSpec`: accepted and rejected specs, and the messages."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.errors import SpecError
from pipeline.spec.diagnostics import SpecIssues
from pipeline.spec.job_spec import JobSpec, json_schema
from pipeline.spec.parts import ColumnContract, MapStep, SelectStep
from pipeline.spec.score import Score, ScoreStep

README_EXAMPLE = """\
name: churn-nightly
source:
  path: lake/customers/
  columns: [customer_id, age, plan, country]
  filter: country == 'DE' and age >= 18
steps:
  - map: features:build
  - score:
      model: models/churn.json
      output: churn
      keep: [customer_id]
sink:
  path: out/churn/
  mode: overwrite
  target_file_size: 256 MiB
errors:
  max_fraction: 0.001
contract:
  age: {dtype: int64, nullable: false, min: 0, max: 120}
  plan: {allowed: [basic, standard, premium]}
cluster: local
"""


def fields(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "churn",
        "source": {"path": "lake/"},
        "steps": [{"score": {"model": "model.json"}}],
        "sink": {"path": "out/"},
    }
    return {**base, **changes}


def issues(**changes: Any) -> list[dict[str, Any]]:
    with pytest.raises(SpecIssues) as caught:
        JobSpec.build(**fields(**changes))
    return [issue.to_dict() for issue in caught.value.issues]


def only_issue(**changes: Any) -> dict[str, Any]:
    found = issues(**changes)
    assert len(found) == 1, found
    return found[0]


def test_the_readme_example_loads_whole() -> None:
    spec = JobSpec.load(README_EXAMPLE)
    assert spec.name == "churn-nightly"
    assert spec.source.columns == ("customer_id", "age", "plan", "country")
    assert [step.map for step in spec.maps] == ["features:build"]
    assert spec.score.output_spec.column == "churn"
    assert spec.score.output_spec.kind == "prediction"
    assert spec.sink.target_bytes == 256 << 20
    assert spec.errors.max_fraction == 0.001
    assert spec.contract["age"] == ColumnContract(dtype="int64", nullable=False, min=0, max=120)


def test_python_values_may_be_lists_mappings_or_parts() -> None:
    from_dicts = JobSpec.build(
        name="churn",
        source={"path": ["a.parquet", "b.parquet"], "columns": ["x", "y"]},
        steps=[{"map": "features:build"}, {"score": {"model": "m.json", "keep": ["x"]}}],
        sink={"path": "out/"},
    )
    from_parts = JobSpec.build(
        name="churn",
        source={"path": ("a.parquet", "b.parquet"), "columns": ("x", "y")},
        steps=[MapStep(map="features:build"), ScoreStep(score=Score(model="m.json", keep=("x",)))],
        sink={"path": "out/"},
    )
    assert from_dicts == from_parts
    assert from_dicts.source.path == ("a.parquet", "b.parquet")
    assert JobSpec(**from_dicts.to_dict()) == from_dicts


def test_a_spec_is_frozen() -> None:
    spec = JobSpec.build(**fields())
    with pytest.raises(ValidationError):
        spec.name = "other"


def test_every_issue_is_reported_at_once() -> None:
    found = issues(
        name="Churn Nightly",
        sink={"path": "out/", "mode": "overwite"},
        errors={"max_fraction": 2},
        eror=1,
    )
    assert {item["field"] for item in found} == {"name", "sink.mode", "errors.max_fraction", "eror"}


def test_an_unknown_field_is_answered_with_the_nearest() -> None:
    found = only_issue(source={"path": "lake/", "colums": ["a"]})
    assert found["field"] == "source.colums"
    assert found["expected"].startswith("path, format, csv, types, columns, filter")
    assert found["next"] == "did you mean columns?"


def test_a_field_in_the_wrong_place_is_sent_home() -> None:
    found = only_issue(max_fraction=0.1)
    assert found["next"] == "it belongs under errors: indent it below"


def test_an_unknown_value_is_answered_with_the_nearest() -> None:
    found = only_issue(sink={"path": "out/", "mode": "overwite"})
    assert found["found"] == "overwite"
    assert found["expected"] == "error, overwrite, append, replace, merge"
    assert found["next"] == "did you mean overwrite?"


def test_a_missing_field_is_described() -> None:
    found = only_issue(sink={})
    assert found["message"] == "sink has no path"
    assert "directory" in found["expected"]


def test_a_kind_of_step_that_is_not_there_is_answered_with_the_nearest() -> None:
    found = only_issue(steps=[{"mpa": "features:build"}, {"score": {"model": "m.json"}}])
    assert found["message"] == "unknown kind of step"
    assert found["next"] == "did you mean map?"


@pytest.mark.parametrize(
    ("step", "message", "step_next"),
    [
        ("features:build", "a step is a single text", "write map: before it"),
        (
            {"map": "a:b", "score": {"model": "m"}},
            "a step has both map and score",
            "start each with a dash of its own",
        ),
        ({"model": "m.json"}, "a step has neither map nor score", "put score: above model, and indent them below it"),
        (None, "unknown kind of step", ""),
    ],
)
def test_invalid_step_is_explained(step: Any, message: str, step_next: str) -> None:
    found = issues(steps=[step, {"score": {"model": "m.json"}}])
    assert [(item["message"], item.get("next", "")) for item in found] == [(message, step_next)]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "steps has no step"),
        ([{"score": {"model": "m"}}, {"score": {"model": "n"}}], "steps names an output column twice: prediction"),
        (
            [{"score": {"model": "m", "keep": ["a"]}}, {"score": {"model": "n", "output": "p"}}],
            "steps has keep at a score step that is not the last",
        ),
        (
            [{"score": {"model": "m", "keep": ["a"]}}, {"select": ["prediction"]}],
            "steps has keep at the score step, and a select step at the end",
        ),
    ],
)
def test_steps_that_contradict_each_other_are_refused(steps: list[Any], message: str) -> None:
    assert only_issue(steps=steps)["message"] == message


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ({"model": ["m", "n"]}, "has a list of models without combine"),
        ({"model": "m", "combine": "mean"}, "has combine for one model"),
        ({"model": ["m", "n"], "combine": [1.0, 2.0, 3.0]}, "has another number of weights than of models"),
        ({"model": ["m", "n"], "combine": [0.0, 0.0]}, "has invalid weights"),
        ({"model": ["m", "n"], "combine": "vote"}, "cannot combine the output prediction so"),
        ({"model": ["m", "n"], "combine": "mean", "output": {"column": "p", "kind": "label"}}, "the output label so"),
        ({"model": ["m", "n"], "combine": "mean", "output": {"column": "p", "kind": "leaf"}}, "the output leaf so"),
        ({"model": ["m", "n"], "combine": [-1.0, 2.0]}, "has invalid weights"),
    ],
)
def test_a_list_of_models_that_cannot_be_combined_is_refused(score: dict[str, Any], message: str) -> None:
    found = issues(steps=[{"score": score}])
    assert any(message in item["message"] for item in found), found


def test_a_list_of_models_is_combined() -> None:
    (score,) = JobSpec.build(**fields(steps=[{"score": {"model": ["m", "n"], "combine": [1, 2.5]}}])).scores
    assert (score.references, score.combine) == (("m", "n"), (1.0, 2.5))
    assert JobSpec.build(**fields(steps=[{"score": {"model": "m"}}])).references == ("m",)


def test_steps_come_in_any_number_and_order() -> None:
    steps = [
        {"filter": "a > 1"},
        {"map": "a:b"},
        {"score": {"model": "m"}},
        {"select": {"new": "old"}},
        {"score": {"model": "m", "output": "p", "where": "new is None"}},
        {"select": ["new", "p"]},
    ]
    spec = JobSpec.build(**fields(steps=steps))
    assert spec.to_dict()["steps"] == steps
    assert [step.columns for step in spec.steps if isinstance(step, SelectStep)] == [
        {"new": "old"},
        {"new": "new", "p": "p"},
    ]
    assert not spec.is_plain
    assert JobSpec.build(**fields(steps=[{"map": "a:b"}])).scores == ()


def test_only_map_steps_and_one_score_of_all_rows_are_plain() -> None:
    score: dict[str, Any] = {"score": {"model": "m"}}
    assert JobSpec.build(**fields(steps=[{"map": "a:b"}, score])).is_plain
    for steps in ([{"map": "a:b"}], [score, {"map": "a:b"}], [{"score": {"model": "m", "where": "a > 1"}}]):
        assert not JobSpec.build(**fields(steps=steps)).is_plain


def test_no_alternative_of_a_union_makes_noise() -> None:
    found = only_issue(steps=[{"score": {"model": "m", "output": {"column": "x", "kind": "lable"}}}])
    assert found["field"] == "steps.0.score.output.kind"
    assert found["next"] == "did you mean label?"
    both = only_issue(source={"path": 3})
    assert both["expected"] == "text or a list"


@pytest.mark.parametrize(
    ("entry", "advice"),
    [
        ("features.py:build", "write features:build"),
        ("lib/features.py:build", "write lib.features:build"),
        ("features.build", "write features:build"),
        ("features", "write features:function"),
        ("features:", "write features:function"),
        ("a b:c", ""),
    ],
)
def test_an_entrypoint_is_module_and_function(entry: str, advice: str) -> None:
    found = only_issue(steps=[{"map": entry}, {"score": {"model": "m"}}])
    assert found["expected"] == "module:function, such as features:build"
    assert found.get("next", "") == advice


@pytest.mark.parametrize("name", ["../x", "/abs", "", "A", "x" * 65, "a/b", "a\0b", "%2e", ".hidden"])
def test_a_name_cannot_lead_anywhere(name: str) -> None:
    assert only_issue(name=name)["field"] == "name"


def test_a_malformed_model_reference_shows_the_grammar() -> None:
    found = only_issue(steps=[{"score": {"model": "models:/churn"}}])
    assert "models:/name@alias" in found["expected"]


@pytest.mark.parametrize("value", ["3 florins", "0 MiB", 0, -5, "-1"])
def test_a_size_must_be_one(value: Any) -> None:
    assert only_issue(sink={"path": "o", "target_file_size": value})["field"] == "sink.target_file_size"


@pytest.mark.parametrize("value", [-0.1, 1.5, "0.1", True])
def test_max_fraction_is_a_fraction(value: Any) -> None:
    assert only_issue(errors={"max_fraction": value})["field"] == "errors.max_fraction"


@pytest.mark.parametrize("contract", [{"min": 3, "max": 2}, {"min": "a", "max": 3}, {"allowed": []}, {"mni": 3}])
def test_a_contract_must_make_sense(contract: dict[str, Any]) -> None:
    assert only_issue(contract={"age": contract})["field"].startswith("contract.age")


def test_a_contract_keeps_the_kind_of_its_values() -> None:
    allowed = JobSpec.build(**fields(contract={"x": {"allowed": [True, 1, 1.5, "a"]}})).contract["x"].allowed
    assert allowed is not None
    assert [type(value) for value in allowed] == [bool, int, float, str]


@pytest.mark.parametrize("path", ["", "  ", "a\0b", []])
def test_a_path_must_be_one(path: Any) -> None:
    assert only_issue(source={"path": path})["field"].startswith("source.path")


def test_columns_are_named_once() -> None:
    assert only_issue(source={"path": "a", "columns": ["x", "y", "x"]})["message"].endswith("names a column twice: x")


def test_a_number_where_text_must_be_is_to_be_quoted() -> None:
    assert only_issue(cluster=12)["next"] == 'put it in quotes: "12"'


def test_error_survives_pickling_with_all_issues() -> None:
    with pytest.raises(SpecError) as caught:
        JobSpec.build(**fields(eror=1, name="X"))
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(error) == str(caught.value)
    assert error.exit_code == 2
    assert error.to_dict()["kind"] == "SpecError"
    assert {item["field"] for item in error.to_dict()["issues"]} == {"eror", "name"}


def test_a_document_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(SpecError, match="is invalid") as caught:
        JobSpec.load("- a\n- b\n")
    assert caught.value.expected == "a mapping of names to values"


def test_the_digest_follows_what_decides_the_rows_only() -> None:
    spec = JobSpec.load(README_EXAMPLE)
    assert JobSpec.load(README_EXAMPLE, overrides=["cluster=tcp://10.0.0.1:8786"]).digest == spec.digest
    assert JobSpec.load(README_EXAMPLE, overrides=["source.filter="]).digest != spec.digest
    assert JobSpec.load(README_EXAMPLE.replace("mode: overwrite", "mode: error")).digest != spec.digest


def test_a_spec_written_as_yaml_reads_back_the_same() -> None:
    spec = JobSpec.load(README_EXAMPLE)
    assert JobSpec.load(spec.to_yaml()) == spec


@given(st.text(min_size=1).filter(lambda text: text.strip() and "\0" not in text))
def test_any_path_and_filter_survive_being_written(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    spec = JobSpec.build(**fields(source={"path": text, "filter": text}))
    assert JobSpec.load(spec.to_yaml()) == spec


SCHEMA = json_schema()


def test_the_json_schema_accepts_what_the_reader_accepts() -> None:
    import yaml

    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    assert list(validator.iter_errors(yaml.safe_load(README_EXAMPLE))) == []
    assert list(validator.iter_errors(fields())) == []


@pytest.mark.parametrize(
    "change",
    [
        {"eror": 1},
        {"name": "Churn Nightly"},
        {"steps": []},
        {"steps": [{"select": []}]},
        {"steps": [{"mpa": "a:b"}, {"score": {"model": "m"}}]},
        {"steps": [{"filter": "a > 1", "select": ["a"]}]},
        {"sink": {"path": "o", "mode": "overwite"}},
        {"errors": {"max_fraction": 2}},
    ],
)
def test_the_json_schema_refuses_what_the_reader_refuses(change: dict[str, Any]) -> None:
    data = copy.deepcopy(fields(**change))
    assert list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(data)) != []
    with pytest.raises(SpecError):
        JobSpec.build(**data)


def test_the_json_schema_explains_every_field() -> None:
    def undescribed(part: Any, path: str) -> list[str]:
        missing = []
        for name, value in part.get("properties", {}).items():
            if "description" not in value and "$ref" not in value:
                missing.append(f"{path}.{name}")
        return missing

    parts = [("job", SCHEMA), *SCHEMA["$defs"].items()]
    assert [name for path, part in parts for name in undescribed(part, path)] == []


class TestRenamedFields:
    def test_model_drift(self) -> None:
        issue = only_issue(model_drift="fail")
        assert issue["message"] == "model_drift is now named on_alias_change"
        assert issue["next"] == "rename it to on_alias_change"

    def test_model_drift_in_an_override(self) -> None:
        with pytest.raises(SpecError, match="model_drift is now named on_alias_change"):
            JobSpec.load(README_EXAMPLE, overrides=["model_drift=fail"])

    def test_files_reject(self) -> None:
        issue = only_issue(errors={"files": "reject"})
        assert issue["message"] == "the value reject of errors.files is now named quarantine"
        assert issue["next"] == "write files: quarantine"
