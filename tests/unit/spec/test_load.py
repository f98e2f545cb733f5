"""The file of a job spec: strict YAML, positions of errors, JSON, and overrides of the command line."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import PipelineError, RefusedForSafety, SpecError
from pipeline.spec.diagnostics import SpecIssues
from pipeline.spec.document import dump_text, read_document
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.load import load_spec
from pipeline.spec.yaml import MAX_BYTES

JOB = """\
name: churn
source: {path: lake/}
steps:
  - map: features:build
  - score: {model: model.json}
sink:
  path: out/
"""


def read(text: str) -> Any:
    document = read_document(text if "\n" in text else text + "\n")
    assert document.issues == []
    return document.data


def issues_in(text: str) -> list[dict[str, Any]]:
    return [issue.to_dict() for issue in read_document(text + "\n").issues]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: true", True),
        ("a: False", False),
        ("a: ~", None),
        ("a:", None),
        ("a: 10", 10),
        ("a: -7", -7),
        ("a: 0", 0),
        ("a: 1e3", 1000.0),
        ("a: 0.5", 0.5),
        ("a: .5", 0.5),
        ("a: 1.5e-3", 0.0015),
        ('a: "no"', "no"),
        ("a: 'yes'", "yes"),
        ('a: "010"', "010"),
        ("a: y", "y"),
        ("a: country == 'DE'", "country == 'DE'"),
        ("a: 2024-01-01/part", "2024-01-01/part"),
        ("a: 10.0.0.1:8786", "10.0.0.1:8786"),
        ("a: 1.2.3", "1.2.3"),
        ("a: s3://bucket/key", "s3://bucket/key"),
        ("a: |\n  two\n  lines\n", "two\nlines\n"),
    ],
)
def test_a_value_means_one_thing(text: str, value: Any) -> None:
    found = read(text)["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("value", "instead"),
    [
        ("no", 'write "no" for the text, or false'),
        ("Yes", 'write "Yes" for the text, or true'),
        ("NO", 'write "NO" for the text, or false'),
        ("off", 'write "off" for the text, or false'),
        ("on", 'write "on" for the text, or true'),
        ("010", 'write "010" for the text, or 10'),
        ("-007", 'write "-007" for the text, or -7'),
        ("0o17", 'write "0o17" for the text, or the number in decimal'),
        ("0x1F", 'write "0x1F" for the text, or the number in decimal'),
        ("1_000", 'write "1_000" for the text, or 1000'),
        ("1:30", 'write "1:30" for the text, or the number in full'),
        ("190:20:30.5", 'write "190:20:30.5" for the text, or the number in full'),
        ("2024-01-01", 'write "2024-01-01"'),
        ("2024-01-01T10:00:00Z", 'write "2024-01-01T10:00:00Z"'),
        (".inf", 'write ".inf" for the text; a number must be finite'),
        (".NaN", 'write ".NaN" for the text; a number must be finite'),
    ],
)
def test_a_trap_is_refused_with_what_to_write(value: str, instead: str) -> None:
    (found,) = issues_in(f"first: 1\nkey: {value}")
    assert found["where"] == "the job spec:2:6"
    assert found["found"] == value
    assert found["next"] == instead


def test_a_trap_as_a_key_is_refused() -> None:
    (found,) = issues_in("contract:\n  on: {min: 1}")
    assert found["where"] == "the job spec:2:3"
    assert found["next"] == 'write "on" for the text, or true'


@pytest.mark.parametrize("key", ["1", "true", "~", "1.5"])
def test_a_key_is_a_name(key: str) -> None:
    (found,) = issues_in(f"{key}: x")
    assert found["message"] == "a key is not a name"


def test_a_number_that_is_not_finite_is_refused() -> None:
    (found,) = issues_in("a: 1e999")
    assert found["message"] == "a number is too large"


def test_a_key_that_is_there_twice_is_refused_with_both_lines() -> None:
    (found,) = issues_in("a: 1\nb: 2\na: 3")
    assert found["where"] == "the job spec:3:1"
    assert found["found"] == "a, first in line 1"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a: !!python/object/apply:os.system [echo hi]\n", "1:4"),
        ("a: 1\nb: !!python/name:os.system\n", "2:4"),
        ("a: &x 1\nb: *x\n", "1:4"),
        ("a: &x [1]\n", "1:4"),
        ("a: 1\n<<: {b: 2}\n", "2:1"),
    ],
)
def test_harmful_yaml_is_refused_for_safety(text: str, where: str) -> None:
    with pytest.raises(RefusedForSafety) as caught:
        read_document(text)
    assert caught.value.where == f"the job spec:{where}"
    assert caught.value.exit_code == 7


def test_an_alias_bomb_is_refused_before_it_grows() -> None:
    levels = ["a0: &a0 [lol]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(RefusedForSafety):
        read_document("\n".join(levels) + "\n")


@pytest.mark.parametrize("text", ["a: !!int '3'\n", "a: !custom x\n", "a: ! x\n"])
def test_other_tags_are_issues(text: str) -> None:
    with pytest.raises(SpecError, match="tags are not allowed") as caught:
        read_document(text)
    assert caught.value.exit_code == 2


def test_a_python_tag_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    with pytest.raises(RefusedForSafety):
        read_document(f"a: !!python/object/apply:os.system ['touch {trace}']\n")
    assert not trace.exists()


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(RefusedForSafety, match="nested too deep"):
        read_document("a:\n  " + "[" * 5000 + "]" * 5000 + "\n")


def test_an_over_large_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"# " + b"x" * MAX_BYTES + b"\n" + JOB.encode())
    with pytest.raises(SpecError, match="too large"):
        JobSpec.load(path)
    with pytest.raises(SpecError, match="too large"):
        JobSpec.load("# " + "x" * MAX_BYTES + "\n" + JOB)


@pytest.mark.parametrize(
    ("text", "where", "hint"),
    [
        ("a:\n\tb: 1\n", "2:1", "spaces"),
        ("a: b: c\n", "1:5", "indentation"),
        ("a: 1\n b: 2\n", "2:3", "indentation"),
        ("a: [1, 2\nb: 3\n", "2:2", "bracket"),
        ("a: 'x\n", "2:1", "quotes"),
        ("a: @x\n", "1:4", "quotes"),
        ("a: 1\n---\nb: 2\n", "2:1", "one job"),
    ],
)
def test_invalid_yaml_is_refused_with_place_and_advice(text: str, where: str, hint: str) -> None:
    with pytest.raises(SpecIssues) as caught:
        read_document(text)
    assert caught.value.where == f"the job spec:{where}"
    assert hint in caught.value.next_step


def test_forbidden_character_is_refused() -> None:
    with pytest.raises(SpecIssues) as caught:
        read_document("a: 1\nb: \x07\n")
    assert caught.value.found == "U+0007"
    assert caught.value.where == "the job spec:2:1"


@pytest.mark.parametrize("text", ["\n", "# nothing\n", "---\n...\n"])
def test_an_empty_spec_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        JobSpec.load(text)


def test_bytes_that_are_no_utf8_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"name: x\nsource: {path: caf\xe9}\n")
    with pytest.raises(SpecError, match="UTF-8") as caught:
        JobSpec.load(path)
    assert caught.value.where == f"{path}:2"


def test_a_byte_order_mark_is_no_issue(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + JOB.encode())
    assert JobSpec.load(path).name == "churn"


def test_missing_file_shows_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        JobSpec.load(tmp_path / "job.yaml")
    assert caught.value.where == str(tmp_path / "job.yaml")
    assert "init" in caught.value.next_step


def test_a_url_is_read_through_fsspec() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/specs/job.yaml", JOB.encode())
    assert JobSpec.load("memory://specs/job.yaml").name == "churn"


def test_issues_of_reading_and_of_meaning_come_together_in_order_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(JOB + "  mode: overwite\ncluster: no\nname: again\n")
    with pytest.raises(SpecIssues) as caught:
        JobSpec.load(path)
    assert [str(issue.place) for issue in caught.value.issues] == [f"{path}:{at}" for at in ("8:9", "9:10", "10:1")]
    assert str(caught.value).startswith(f"{path} has 3 issues")


def test_ambiguous_value_is_reported_once() -> None:
    with pytest.raises(SpecIssues) as caught:
        JobSpec.load(JOB + "errors: {max_fraction: 1:30}\n")
    assert len(caught.value.issues) == 1


def test_an_unindented_field_is_sent_home() -> None:
    text = JOB.replace("  - score: {model: model.json}\n", "  - score:\n    model: model.json\n")
    with pytest.raises(SpecIssues) as caught:
        JobSpec.load(text)
    steps = {issue.next_step for issue in caught.value.issues}
    assert "it belongs under steps.score: indent it below" in steps


def test_json_is_read_with_the_same_rules(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    spec = JobSpec.load(JOB)
    path.write_text(json.dumps(spec.to_dict(), indent="\t"))
    assert JobSpec.load(path) == spec
    path.write_text(json.dumps({**spec.to_dict(), "nmae": "\U0001f600"}, indent=1))
    with pytest.raises(SpecIssues) as caught:
        JobSpec.load(path)
    assert caught.value.where.startswith(f"{path}:")
    assert caught.value.next_step == "did you mean name?"


def test_json_keeps_every_character(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"a": '\U0001f600 \\ / " \n é'}))
    assert read_document(path).data == {"a": '\U0001f600 \\ / " \n é'}


@pytest.mark.parametrize("text", ['{"a": 1,}', '{"a": NaN}', "a: 1", '{"a": 01}', "[" * 20000])
def test_invalid_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.json"
    path.write_text(text)
    with pytest.raises(SpecError, match="not JSON"):
        read_document(path)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("sink.path=s3://bucket/out/", ("sink", "path"), "s3://bucket/out/"),
        ("sink.mode=append", ("sink", "mode"), "append"),
        ("errors.max_fraction=0.5", ("errors", "max_fraction"), 0.5),
        ("steps.1.score.model=other.json", ("steps", 1, "score", "model"), "other.json"),
        ("steps[1].score.keep=[a, b]", ("steps", 1, "score", "keep"), ["a", "b"]),
        ('contract."a.b".min=3', ("contract", "a.b", "min"), 3),
        ("source.filter=country == 'DE'", ("source", "filter"), "country == 'DE'"),
        ("source.filter=", ("source", "filter"), None),
        ('cluster="12"', ("cluster",), "12"),
    ],
)
def test_an_override_sets_any_field(override: str, path: tuple[Any, ...], value: Any) -> None:
    data = read_document(JOB, overrides=[override]).data
    for part in path:
        data = data[part]
    assert data == value
    JobSpec.load(JOB, overrides=[override])


def test_an_override_wins_over_an_issue_in_the_file() -> None:
    text = JOB + "cluster: no\n"
    with pytest.raises(SpecIssues):
        JobSpec.load(text)
    assert JobSpec.load(text, overrides=["cluster=local"]).cluster == "local"


@pytest.mark.parametrize(
    "override",
    [
        "sink.path",
        "=x",
        "sink..path=x",
        "steps.7.score.model=x",
        "steps.first.score=x",
        "name.first=x",
        "sink.pth=x",
        "sink.mode=overwite",
        "cluster=no",
        "cluster=[1",
        "sink.path=&a x",
    ],
)
def test_an_override_that_fits_nowhere_names_the_flag(override: str) -> None:
    with pytest.raises(PipelineError) as caught:
        JobSpec.load(JOB, overrides=[override])
    assert caught.value.where.startswith(f"--set {override}")
    assert caught.value.exit_code in (2, 7)


def test_an_override_of_a_field_that_is_unknown_gets_the_nearest() -> None:
    with pytest.raises(SpecError) as caught:
        JobSpec.load(JOB, overrides=["sink.pth=x"])
    assert caught.value.next_step == "did you mean path?"


PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=("Cs",)))


@settings(deadline=None)
@given(
    st.dictionaries(
        TEXT, st.recursive(PLAIN | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=8)
    )
)
def test_spec_round_trip(data: dict[str, Any]) -> None:
    document = read_document(dump_text(data) + "\n")
    assert document.issues == []
    assert document.data == data


@given(st.text(max_size=60))
def test_no_text_at_all_breaks_the_reader(text: str) -> None:
    with suppress(SpecError, RefusedForSafety):
        JobSpec.load(text + "\n")


def test_a_spec_knows_its_file_and_where_modules_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "job.yaml").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    loaded = load_spec("jobs/job.yaml", overrides=["sink.mode=append"])
    assert loaded.path == str(tmp_path / "jobs" / "job.yaml")
    assert loaded.folders == (str(tmp_path / "jobs"), str(tmp_path))
    assert loaded.spec.sink.mode == "append"
    assert loaded.spec.source.path == "lake/"
    assert load_spec(JOB).folders == (str(tmp_path),)
