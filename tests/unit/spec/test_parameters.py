"""Parameters, placeholders, and the precedence of values."""

from __future__ import annotations

import itertools
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RefusedForSafety, SpecError
from pipeline.spec.diagnostics import SpecIssues
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.load import LoadedSpec, load_spec
from pipeline.spec.parameters import GivenValues, Values, convert, escape, given_on_command_line, names_in, render_text
from pipeline.spec.precedence import Precedence, SettingSource, resolve_setting
from pipeline.spec.score import Score, ScoreStep

JOB = """\
name: churn-${params.country}
source:
  path: lake/day=${params.day}/
  filter: country == '${params.country}' and age >= ${params.age}
steps:
  - map: features:${params.step}
  - score: {model: "models:/${params.model}@champion", output: "${params.output}", keep: "${params.keep}"}
sink: {path: "out/${run.date}/${params.day}/", mode: "${params.mode}"}
errors: {max_fraction: "${params.limit}"}
contract:
  age: {min: "${params.age}", nullable: "${params.nullable}"}
params:
  day:
  country: de
  age: 18
  step: build
  model: churn
  output: churn
  keep: [customer_id, country]
  mode: overwrite
  limit: 0.25
  nullable: false
"""


def load(text: str = JOB, *flags: str, environ: dict[str, str] | None = None, **options: Any) -> LoadedSpec:
    options.setdefault("params", given_on_command_line(flags))
    return load_spec(text, environ=environ or {}, **options)


def issue(text: str, *flags: str, **options: Any) -> SpecError:
    with pytest.raises(SpecError) as caught:
        load(text, *flags, **options)
    return caught.value


def test_parameters_work_in_every_field_and_keep_their_types() -> None:
    spec = load(JOB, "day=2026-01-01", "age=21", "country=no", run_date="2026-02-03").spec
    assert spec.name == "churn-no"
    assert spec.source.path == "lake/day=2026-01-01/"
    assert spec.source.filter == "country == 'no' and age >= 21"
    assert spec.maps[0].map == "features:build"
    assert (spec.score.model, spec.score.output, spec.score.keep) == (
        "models:/churn@champion",
        "churn",
        ("customer_id", "country"),
    )
    assert (spec.sink.path, spec.sink.mode) == ("out/2026-02-03/2026-01-01/", "overwrite")
    assert spec.errors.max_fraction == 0.25
    assert (spec.contract["age"].min, spec.contract["age"].nullable) == (21, False)
    assert spec.params["day"] == "2026-01-01"
    assert spec.run.date == "2026-02-03"


def test_a_stored_spec_is_filled_in_and_reads_back_to_itself() -> None:
    spec = load(JOB, "day=2026-01-01", run_date="2026-02-03").spec
    again = JobSpec.load(spec.to_yaml())
    assert again == spec
    assert "${" not in spec.to_yaml()
    assert JobSpec.model_validate(spec.to_dict()) == spec


def test_a_spec_without_any_has_the_digest_it_had_before() -> None:
    spec = JobSpec.build(name="c", source={"path": "a"}, steps=[{"score": {"model": "m.ubj"}}], sink={"path": "o"})
    assert spec.digest == "3ad3367632061af7e83c73efddae19345e721f2ad6a87a636221dd6ea1f33944"


def test_from_python_values_are_typed() -> None:
    spec = load(params={"day": date(2026, 1, 1), "age": 30, "keep": ("a", "b")}).spec
    assert spec.source.path == "lake/day=2026-01-01/"
    assert spec.contract["age"].min == 30
    assert spec.score.keep == ("a", "b")
    built = JobSpec.build(
        name="c",
        params={"m": "model.ubj"},
        source={"path": "a"},
        steps=[ScoreStep(score=Score(model="${params.m}"))],
        sink={"path": "o"},
    )
    assert built.score.model == "model.ubj"


@pytest.mark.parametrize(
    ("default", "text", "value"),
    [
        ("de", "no", "no"),
        ("de", "010", "010"),
        ("de", "", ""),
        ("a", "[1, 2]", "[1, 2]"),
        (1, "7", 7),
        (0.5, "7", 7.0),
        (0.5, "1e-3", 0.001),
        (True, "false", False),
        (["a"], "[b, c]", ["b", "c"]),
        (None, "2026-01-01", "2026-01-01"),
        (None, "2026-01-01T10:00:00Z", "2026-01-01T10:00:00Z"),
        (None, "5", 5),
        (None, "true", True),
        (None, "DE", "DE"),
        (None, '"5"', "5"),
    ],
)
def test_a_text_takes_the_type_of_the_default(default: Any, text: str, value: Any) -> None:
    found = convert(GivenValues("x", text, "-p x", is_text=True), default)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("default", "text"),
    [(1, "x"), (1, "1.5"), (1, "true"), (True, "1"), (0.5, "half"), (["a"], "b"), (None, "no"), (None, "{a: 1}"),
     (None, "[[1]]"), (1, ""), (None, "010")],
)  # fmt: skip
def test_a_text_of_another_type_is_refused(default: Any, text: str) -> None:
    with pytest.raises(SpecError):
        convert(GivenValues("x", text, "-p x", is_text=True), default)


def test_unknown_or_missing_parameters_are_reported_with_their_place() -> None:
    unknown = issue(JOB, "day=x", "cuontry=se")
    assert (unknown.where, unknown.next_step) == ("-p cuontry=se", "did you mean country?")
    missing = issue(JOB)
    assert missing.message == "the parameter day has no value"
    assert missing.next_step.startswith("-p day=VALUE")
    assert missing.where.endswith(":13:3")
    undeclared = issue(JOB.replace("${params.step}", "${params.stepp}"), "day=x")
    assert (undeclared.found, undeclared.next_step) == ("${params.stepp}", "did you mean step?")
    assert undeclared.where.endswith(":6:10")
    nothing = issue("name: c\nsource: {path: '${params.x}'}\nsteps: [{score: {model: m}}]\nsink: {path: o}\n")
    assert nothing.next_step == "declare it: params: {x: …}"
    assert issue(JOB, "day").where == "-p day"


def test_all_issues_are_reported_at_once() -> None:
    found = issue(JOB.replace("mode: overwrite", "mode: reset"), "age=old", "cuontry=se")
    assert isinstance(found, SpecIssues)
    messages = " ".join(str(one.as_error()) for one in found.issues)
    for part in (
        "-p age=old",
        "-p cuontry=se",
        "the parameter day has no value",
        "sink.mode is not one of the allowed values",
    ):
        assert part in messages


def test_rendered_text_is_not_rendered_again() -> None:
    text = JOB.replace("step: build", "step: build\n  evil: x")
    spec = load(text.replace("path: lake/", 'path: "lake/${params.evil}/'). replace("day}/\n", 'day}/"\n'),
                "day=a", "evil=${params.day}").spec  # fmt: skip
    assert spec.source.path == "lake/${params.day}/day=a/"
    assert JobSpec.load(spec.to_yaml()) == spec


def test_a_default_may_name_date_and_environment_but_no_parameter() -> None:
    text = JOB.replace("day:\n", 'day: "${run.date}"\n')
    spec = load(text, run_date="2026-03-04").spec
    assert (spec.source.path, spec.run.date) == ("lake/day=2026-03-04/", "2026-03-04")
    text = JOB.replace("day:\n", 'day: "${env:DAY}"\n')
    assert load(text, environ={"DAY": "x"}).spec.source.path == "lake/day=x/"
    assert issue(JOB.replace("day:\n", 'day: "${params.country}"\n')).message.startswith("the default of a parameter")


def test_spec_can_fix_the_date() -> None:
    text = JOB + 'run: {date: "2026-05-06"}\n'
    assert load(text, "day=a", run_date="2026-02-03").spec.sink.path == "out/2026-05-06/a/"
    assert load(JOB, "day=a").spec.run.date == load(JOB, "day=a").spec.sink.path.split("/")[1]
    plain = JOB.replace("${run.date}", "x")
    assert load(plain, "day=a").spec.run.date is None
    assert issue(JOB + "run: {date: today}\n", "day=a").message == "run.date is not a valid date"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("GITHUB_TOKEN", "x"),
        ("db_password", "x"),
        ("API_KEY", "x"),
        ("SIGNING_KEY", "x"),
        ("STORE", "postgres://me:hunter2@host/db"),
        ("SOMETHING", "ghp_0123456789abcdefghijABCDEFGHIJ012345"),
        ("SOMETHING", "AKIAIOSFODNN7EXAMPLE"),
        ("MISSING_TOKEN", None),
    ],
)
def test_a_variable_that_looks_like_a_secret_is_refused(name: str, value: str | None) -> None:
    with pytest.raises(RefusedForSafety) as caught:
        load(JOB.replace("lake/", f"${{env:{name}}}/"), "day=a", environ={name: value} if value else {})
    assert f"env:{name}" in caught.value.next_step
    assert value is None or value == "x" or value not in str(caught.value)
    assert "source.path" in caught.value.where


@pytest.mark.parametrize("name", ["HOME", "PWD", "REGION", "PARTITION", "MONKEY", "SORT_BY", "TOKENIZER", "BUCKET"])
def test_other_variables_are_put_in(name: str) -> None:
    spec = load(JOB.replace("lake/", f"${{env:{name}}}/"), "day=a", environ={name: "s3://b"}).spec
    assert spec.source.path == "s3://b/day=a/"


def test_a_variable_that_is_not_set_is_an_issue() -> None:
    found = issue(JOB.replace("lake/", "${env:REGION}/"), "day=a")
    assert found.found == "${env:REGION}"


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("$${params.x}", "${params.x}"),
        ("$$${params.x}", "$${params.x}"),
        ("$5 and ${ params.x }", "$5 and 1"),
        ("a${params.x}b${params.y}", "a1btrue"),
        ("${params.x}", 1),
        ("${params.z}", ["a"]),
        ("{params.x}", "{params.x}"),
        ("$", "$"),
    ],
)
def test_placeholders(text: str, filled: Any) -> None:
    assert render_text(text, Values({"x": 1, "y": True, "z": ["a"]})) == filled


@pytest.mark.parametrize("text", ["${params.x", "${}", "${what}", "a${params.z}", "${params.n}!", "${fan_out.value}"])
def test_meaningless_placeholder_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        render_text(text, Values({"x": 1, "z": ["a"], "n": None}))


@given(st.text(alphabet="${}ab.:", max_size=30))
def test_escaping_is_undone_by_filling_in(text: str) -> None:
    assert render_text(escape(text), Values()) == text
    assert names_in(escape(text)) == ()


# Which value counts


@given(st.permutations([SettingSource(rank.name, rank) for rank in Precedence]), st.integers(1, len(Precedence)))
def test_the_highest_rank_wins_whatever_the_order(candidates: list[SettingSource], count: int) -> None:
    choice = resolve_setting(candidates[:count])
    ranks = sorted((one.rank for one in candidates[:count]), reverse=True)
    assert choice.rank is ranks[0]
    assert [one.rank for one in choice.over] == ranks[1:]


def test_of_one_rank_the_last_wins() -> None:
    assert resolve_setting([SettingSource(1, Precedence.SET), SettingSource(2, Precedence.SET)]).value == 2
    with pytest.raises(ValueError, match="nothing"):
        resolve_setting([])


SOURCES = ["default", "file", "environment", "set"]


@pytest.mark.parametrize(
    "sources", [one for count in range(5) for one in itertools.combinations(SOURCES, count)], ids=" ".join
)
def test_field_has_the_value_of_the_highest_source(sources: tuple[str, ...]) -> None:
    text = "name: c\nsource: {path: a}\nsteps: [{score: {model: m}}]\nsink: {path: o}\n"
    text += "errors: {max_fraction: 0.1}\n" if "file" in sources else ""
    environ = {"PIPELINE_SPEC__ERRORS__MAX_FRACTION": "0.2"} if "environment" in sources else {}
    overrides = ["errors.max_fraction=0.3"] if "set" in sources else []
    loaded = load_spec(text, overrides=overrides, environ=environ)
    value, rank = {
        "default": (0.0, Precedence.BUILT_IN),
        "file": (0.1, Precedence.JOB_FILE),
        "environment": (0.2, Precedence.ENVIRONMENT),
        "set": (0.3, Precedence.SET),
    }[([one for one in SOURCES if one in sources] or ["default"])[-1]]
    origin = loaded.origins["errors.max_fraction"]
    assert (loaded.spec.errors.max_fraction, origin.value, origin.rank) == (value, value, rank)


@pytest.mark.parametrize(
    "sources", [one for count in range(5) for one in itertools.combinations(SOURCES, count) if one], ids=" ".join
)
def test_parameter_has_the_value_of_the_highest_source(sources: tuple[str, ...]) -> None:
    text = JOB.replace("lake/day=", "lake/").replace("country: de", 'country: "file"')
    environ = {"PIPELINE_PARAMS__COUNTRY": "environment"} if "environment" in sources else {}
    flags = ["country=set"] if "set" in sources else []
    origin = load(text, "day=a", *flags, environ=environ).origins["params.country"]
    expected = [one for one in ("file", "environment", "set") if one in (*sources, "file")][-1]
    assert origin.value == expected
    assert (
        origin.rank
        is {"file": Precedence.JOB_FILE, "environment": Precedence.ENVIRONMENT, "set": Precedence.SET}[expected]
    )


def test_set_of_a_parameter_wins_over_the_environment_and_loses_to_p() -> None:
    environ = {"PIPELINE_PARAMS__COUNTRY": "environment"}
    by_set = load(JOB, "day=a", environ=environ, overrides=["params.country=by-set"])
    assert by_set.spec.params["country"] == "by-set"
    by_flag = load(JOB, "day=a", "country=by-flag", environ=environ, overrides=["params.country=by-set"])
    assert by_flag.spec.params["country"] == "by-flag"
    assert [one.value for one in by_flag.origins["params.country"].over] == ["by-set", "environment"]


def test_origins_name_file_line_and_placeholders(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    loaded = load_spec(
        path,
        overrides=["sink.mode=append"],
        params=given_on_command_line(["day=2026-01-01"]),
        environ={"PIPELINE_SPEC__CONTRACT__AGE__MAX": "99"},
    )
    origins = loaded.origins
    assert re.fullmatch(r".*job\.yaml:3:9 with \$\{params\.day\}", origins["source.path"].origin)
    assert origins["params.day"].origin == "-p day=2026-01-01"
    assert (origins["sink.mode"].rank, origins["sink.mode"].origin) == (Precedence.SET, "--set sink.mode=append")
    assert origins["sink.mode"].over[0].value == "${params.mode}"
    assert origins["contract.age.max"].origin == "PIPELINE_SPEC__CONTRACT__AGE__MAX"
    assert origins["steps.1.score.engine"].rank is Precedence.BUILT_IN
    assert origins["run.date"].origin == "the date of submission, UTC"


def test_variables_of_the_environment_find_names_whatever_their_case() -> None:
    text = JOB.replace("  age: {min", "  Age: {min").replace("country: de", "Country: de").replace(
        "params.country", "params.Country"
    )  # fmt: skip
    environ = {
        "PIPELINE_SPEC__CONTRACT__AGE__MAX": "99",
        "PIPELINE_PARAMS__COUNTRY": "se",
        "PIPELINE_SPEC__STEPS__1__SCORE__MODEL": "m.ubj",
        "PIPELINE_SPEC__SINK__MODE": "",
    }
    spec = load(text, "day=a", environ=environ).spec
    assert spec.contract["Age"].max == 99
    assert spec.params["Country"] == "se"
    assert spec.score.model == "m.ubj"
    assert spec.sink.mode == "overwrite"
    wrong = issue(JOB, "day=a", environ={"PIPELINE_SPEC__SINK__MODUS": "x"})
    assert wrong.where == "PIPELINE_SPEC__SINK__MODUS"
    unknown = issue(JOB, "day=a", environ={"PIPELINE_PARAMS__DAYS": "x"})
    assert unknown.where == "PIPELINE_PARAMS__DAYS"
