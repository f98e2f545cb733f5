"""The children of a fan-out: values, names, specs, plans. No cluster."""

from __future__ import annotations

import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.driver.prepare import prepare
from pipeline.errors import InputError, OutputExists, PipelineError, SpecError
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.listing import find_job, list_jobs, parent_of
from pipeline.jobs.status import Status
from pipeline.plan.describe import plan_summary
from pipeline.plan.fan_out import HIVE_NULL, LONGEST_SLUG, SEVERAL, child_spec, condition, folder_of, slugs
from pipeline.plan.table import plan_from_table, plan_to_table
from pipeline.settings import Settings
from pipeline.sources import parse_filter
from pipeline.sources.locate import locate
from pipeline.spec.diagnostics import SpecIssues
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.oracle import make_table, train_model

VALUES = st.one_of(st.text(max_size=60), st.integers(-(10**9), 10**9), st.booleans(), st.none())


def spec(**fields: Any) -> JobSpec:
    base: dict[str, Any] = {
        "name": "churn",
        "source": {"path": "lake/"},
        "steps": [{"score": {"model": "model.ubj"}}],
        "sink": {"path": "out/"},
        "fan_out": {"by": "country"},
    }
    return JobSpec.build(**{**base, **fields})


def issue(**fields: Any) -> SpecIssues:
    with pytest.raises(SpecIssues) as caught:
        spec(**fields)
    return caught.value


@given(st.lists(VALUES, min_size=1, max_size=20, unique_by=lambda value: (type(value), value)))
def test_every_child_has_a_name_of_its_own_that_can_be_a_folder(values: list[Any]) -> None:
    found = slugs(values)
    assert len(set(found)) == len(values)
    for name in found:
        assert name
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-")
        assert name[0] not in "._-"
        assert len(name) <= LONGEST_SLUG
    assert slugs(values) == found


def test_names_are_plain_where_they_can_be() -> None:
    assert slugs(["DE", "at", 7, True, None]) == ("de", "at", "7", "true", "null")
    assert slugs(["a b", "a/b"])[0].startswith("a-b-")
    assert slugs(["DE", "de"])[0] != slugs(["DE", "de"])[1]


@given(VALUES)
def test_a_value_is_the_name_of_one_folder(value: Any) -> None:
    name = folder_of(value)
    assert name
    assert "/" not in name
    assert "\0" not in name
    assert name not in (".", "..")


@given(st.one_of(st.text(max_size=20), st.integers(-(10**12), 10**12), st.booleans()))
def test_the_condition_of_a_child_keeps_the_rows_with_its_value(value: Any) -> None:
    others = [value, None]
    table = pa.table({"odd name": pa.array(others)})
    assert parse_filter(condition("odd name", value)).mask(table).to_pylist() == [True, False]
    assert parse_filter(condition("odd name", None)).mask(table).to_pylist() == [False, True]


def test_a_child_has_its_value_in_every_text() -> None:
    parent = spec(
        params={"keep": "id"},
        source={"path": "lake/", "filter": "age > 3 and kind == '${fan_out.value}'"},
        steps=[
            {"map": "features:for_${fan_out.value}"},
            {"score": {"model": "models:/churn-${fan_out.value}@champion", "keep": ["${params.keep}"]}},
        ],
        sink={"path": "out/${fan_out.value}/x"},
        contract={"age": {"allowed": ["${fan_out.value}"]}},
        fan_out={"by": ["de", 7]},
    )
    child = child_spec(parent, "de", column=None)
    assert child.fan_out is None
    assert child.maps[0].map == "features:for_de"
    assert child.score.model == "models:/churn-de@champion"
    assert child.source.filter == "age > 3 and kind == 'de'"
    assert child.sink.path == "out/de/x"
    assert child_spec(parent, 7, column=None).contract["age"].allowed == (7,)
    assert JobSpec.load(parent.to_yaml()) == parent


def test_values_of_the_data_cannot_escape_paths_or_filters() -> None:
    evil = "../../x' or age > 0 or '"
    parent = spec(
        source={"path": "lake/", "filter": "kind == '${fan_out.value}'"},
        steps=[{"score": {"model": "models/${fan_out.value}.ubj"}}],
    )
    child = child_spec(parent, evil, column="country")
    assert "/../" not in child.sink.path
    assert child.sink.path.count("/") == 2
    assert child.score.model.count("/") == 1
    table = pa.table({"kind": ["a", evil], "country": [evil, evil], "age": [1, 1]})
    assert parse_filter(child.source.filter or "").mask(table).to_pylist() == [False, True]


def test_escaped_text_stays_text_in_children() -> None:
    parent = spec(source={"path": "lake/", "filter": "kind == '$${fan_out.value}'"}, fan_out={"by": ["a"]})
    assert child_spec(parent, "a", column=None).source.filter == "kind == '${fan_out.value}'"
    assert JobSpec.load(parent.to_yaml()) == parent


def test_issues_in_a_fan_out() -> None:
    assert "remove it" in issue(name="churn-${fan_out.value}").issues[0].next_step
    assert issue(fan_out={"by": []}).issues[0].path == ("fan_out", "by")
    assert "twice: a" in issue(fan_out={"by": ["a", "a"]}).issues[0].message
    assert issue(fan_out={"by": "c", "publish": "some"}).issues[0].path == ("fan_out", "publish")
    assert issue(fan_out={"by": "c", "max_parallel": 0}).issues[0].path == ("fan_out", "max_parallel")
    with pytest.raises(SpecError, match="unknown placeholder"):
        spec(sink={"path": "out/${fan_out.value}/"}, fan_out=None)


# Plans


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three countries as folders, and a column ``kind`` of two values and nulls."""
    monkeypatch.chdir(tmp_path)
    train_model(tmp_path / "model.ubj")
    for number, country in enumerate(("AT", "DE", HIVE_NULL)):
        table = make_table(300, seed=number, start=1000 * number)
        kinds = pa.array([("a", "b'\\", None)[(i + number) % 3] for i in range(300)])
        days = pa.array([datetime.date(2026, 1, 1 + i // 150) for i in range(300)])
        folder = tmp_path / "lake" / f"country={country}"
        folder.mkdir(parents=True)
        table = table.append_column("kind", kinds).append_column("day", days)
        pq.write_table(table.append_column("part", pa.array([number] * 300)), folder / "x.parquet", row_group_size=100)
    return tmp_path


def plan_of(made: JobSpec) -> Any:
    return prepare(made, settings=Settings(workers=1, threads=1, memory_limit="4 GiB"))


def test_children_of_a_hive_key_read_only_their_files(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listings = []

    def counted(path: Any, **options: Any) -> Any:
        listings.append(path)
        return locate(path, **options)

    monkeypatch.setattr("pipeline.sources.parquet.discover.locate", counted)
    prepared = plan_of(spec())
    assert len(listings) == 1
    plan = prepared.plan
    assert [child.value for child in plan.children] == ["AT", "DE", None]
    assert [child.slug for child in plan.children] == ["at", "de", "null"]
    for child in plan.children:
        assert len(child.planned.files) == 1
        assert child.planned.rows == child.rows == child.matching == 300
        assert child.planned.pruned_rows == 0
    assert plan.rows == 900
    sinks = [child.planned.spec.sink.path.removeprefix(str(lake)) for child in plan.children]
    assert sinks == ["/out/country=AT", "/out/country=DE", f"/out/country={HIVE_NULL}"]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("kind", ["a", "b'\\", None]),
        ("day", ["2026-01-01", "2026-01-02"]),
        ("part", [0, 1, 2]),
        ("segment", ["gold", "silver", None]),
    ],
)
def test_children_of_a_column_have_its_values(lake: Path, column: str, values: list[Any]) -> None:
    plan = plan_of(spec(fan_out={"by": column})).plan
    assert [child.value for child in plan.children] == values
    assert sum(child.matching or 0 for child in plan.children) == 900
    table = pa.concat_tables([pq.read_table(file, partitioning=None) for file in sorted(lake.glob("lake/*/*"))])
    for child in plan.children:
        kept = table.filter(parse_filter(child.planned.spec.source.filter or "").mask(table))
        assert kept.num_rows == child.matching
        wanted = sum(group.rows for file in child.planned.files for group in file.row_groups if group.selected)
        assert kept.num_rows <= wanted <= 900
    if column == "part":
        assert [child.rows for child in plan.children] == [300, 300, 300]
    if column == "day":
        assert all(child.planned.pruned_rows == 300 for child in plan.children)


def test_a_column_that_is_not_read_can_be_fanned_out_by(lake: Path) -> None:
    source = {"path": "lake/", "columns": ["id", "age", "balance", "visits", "tenure"], "filter": "id >= 100"}
    plan = plan_of(spec(source=source, fan_out={"by": "kind"})).plan
    assert len(plan.children) == 3
    assert all("kind" not in child.planned.outputs + child.planned.keep for child in plan.children)


def test_children_of_a_list_follow_the_list(lake: Path) -> None:
    source = {"path": "lake/country=${fan_out.value}/"}
    plan = plan_of(spec(source=source, fan_out={"by": ["AT", "DE"]})).plan
    assert [child.planned.files[0].path.split("/")[-2] for child in plan.children] == ["country=AT", "country=DE"]
    assert plan.children[0].matching is None
    assert plan.children[0].planned.spec.sink.path.endswith("/out/value=AT")
    with pytest.raises(InputError, match="does not exist"):
        plan_of(spec(source=source, fan_out={"by": ["AT", "XX"]}))


def test_a_model_for_each_child(lake: Path) -> None:
    for name in ("AT", "DE", HIVE_NULL):
        train_model(lake / f"model-{name}.ubj", rounds=3 + len(name))
    plan = plan_of(spec(steps=[{"score": {"model": "model-${fan_out.value}.ubj"}}])).plan
    assert plan.model.name == SEVERAL
    assert len({child.planned.model.digest for child in plan.children}) == 2
    assert len({child.planned.model.name for child in plan.children}) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fan_out": {"by": "contry"}}, "did you mean country"),
        ({"fan_out": {"by": "balance"}}, "cannot be fanned out by"),
        ({"fan_out": {"by": "id", "max_children": 10}}, "too many children"),
        ({"fan_out": {"by": "country", "max_children": 2}}, "too many children"),
        ({"fan_out": {"by": "country"}, "source": {"path": "lake/country=${fan_out.value}/"}}, "cannot depend on"),
        ({"fan_out": {"by": ["1", 1]}}, "one place"),
    ],
)
def test_a_fan_out_that_does_not_go_with_its_source_is_refused(
    lake: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(PipelineError) as caught:
        plan_of(spec(**fields))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "append"}, ""),
        ({"mode": "replace", "where": "id > 0"}, "append or merge"),
        ({"mode": "error"}, "append or merge"),
        ({"mode": "error", "table": "scores_${fan_out.value}"}, ""),
    ],
)
def test_children_that_share_a_table(lake: Path, fields: dict[str, Any], message: str) -> None:
    sink = {"format": "sql", "url": "duckdb:///scores.db", "table": "scores", **fields}
    if not message:
        assert len(plan_of(spec(sink=sink)).plan.children) == 3
        return
    with pytest.raises(SpecError, match=message):
        plan_of(spec(sink=sink))


def test_output_that_is_there_is_found_in_each_child(lake: Path) -> None:
    (lake / "out/country=DE").mkdir(parents=True)
    (lake / "out/country=DE/x.parquet").write_bytes(b"x")
    with pytest.raises(OutputExists):
        plan_of(spec())


def test_the_plan_of_a_fan_out_is_stored_and_shown(lake: Path) -> None:
    prepared = plan_of(spec())
    stored = plan_from_table(plan_to_table(prepared.plan))
    assert (stored.digest, stored.work_digest) == (prepared.plan.digest, prepared.plan.work_digest)
    assert stored.children == prepared.plan.children
    assert plan_of(spec(fan_out={"by": ["a"]})).plan.work_digest != stored.work_digest
    text = plan_summary(prepared.plan, prepared.limits).text()
    assert "3: at, de, null" in text
    assert "900" in text


def test_fields_without_the_value_are_validated(lake: Path) -> None:
    from click.testing import CliRunner

    from pipeline.cli import main

    def problems(made: JobSpec) -> list[str]:
        (lake / "job.yaml").write_text(made.to_yaml())
        result = CliRunner().invoke(main, ["validate", "job.yaml", "--json"])
        return [one["message"] for one in json.loads(result.stdout)["problems"]]

    assert problems(spec()) == []
    assert problems(spec(steps=[{"score": {"model": "m-${fan_out.value}.ubj"}}])) == []
    filtered = {"path": "lake/", "filter": "country == ${fan_out.value}"}
    assert problems(spec(source=filtered)) == []
    assert len(problems(spec(source=filtered, fan_out={"by": ["'", 1]}))) == 1
    assert len(problems(spec(steps=[{"score": {"model": "m-${fan_out.value}.ubj"}}], fan_out={"by": [1, 2]}))) == 2
    assert len(problems(spec(steps=[{"map": "nowhere:f"}, {"score": {"model": "model.ubj"}}]))) == 1


def test_children_are_cleaned_with_their_parent(lake: Path) -> None:
    from click.testing import CliRunner

    from pipeline.cli import main

    job = JobDirectory.create(lake / "jobs", plan_of(spec()).plan, job="churn-1")
    lost = Path(job.root) / "children/de/.job.json-lost.tmp"
    lost.write_bytes(b"x" * 1000)
    week_ago = time.time() - 7 * 86_400
    os.utime(lost, (week_ago, week_ago))
    shown = json.loads(CliRunner().invoke(main, ["gc", "churn-1", "--directory", "jobs", "--json"]).stdout)
    assert [one["path"] for sweep in shown["jobs"] for one in sweep["leftovers"]] == [str(lost)]
    CliRunner().invoke(main, ["gc", "churn-1", "--directory", "jobs", "--yes"])
    assert not lost.exists()
    assert (Path(job.root) / "children/de/job.json").is_file()


# The job directory


def test_parent_and_children_are_job_directories(lake: Path) -> None:
    plan = plan_of(spec()).plan
    job = JobDirectory.create(lake / "jobs", plan, job="churn-1")
    again = JobDirectory.open_or_create(lake / "jobs", plan_of(spec()).plan, job="churn-1")
    assert again.record == job.record
    children = job.children()
    assert [child.id for child in children] == ["churn-1.at", "churn-1.de", "churn-1.null"]
    assert [child.record.publishes_itself for child in children] == [False] * 3
    assert (job.record.children, job.record.rows, job.record.partitions) == (3, 900, 3)
    assert parent_of(children[1]).id == "churn-1"
    assert (lake / "jobs/churn-1/children/de/plan.parquet").is_file()
    assert not job.is_ended
    (listed,) = list_jobs(lake / "jobs")
    assert [child.record.job for child in listed.children] == ["churn-1.at", "churn-1.de", "churn-1.null"]


@pytest.mark.parametrize("name", ["churn-1.de", "churn.de", "@last.de", "churn-1.d", "ch.de", "churn-1.null"])
def test_a_child_is_found_by_its_parent_and_its_name(lake: Path, name: str) -> None:
    JobDirectory.create(lake / "jobs", plan_of(spec()).plan, job="churn-1")
    assert find_job(lake / "jobs", name).id == ("churn-1.null" if "null" in name else "churn-1.de")


def test_names_that_mean_no_child_or_several_are_refused(lake: Path) -> None:
    JobDirectory.create(lake / "jobs", plan_of(spec(fan_out={"by": ["aa", "ab"]})).plan, job="churn-1")
    for name in ("churn-1.a", "churn-1.x", "other.aa"):
        with pytest.raises(SpecError):
            find_job(lake / "jobs", name)
    assert find_job(lake / "jobs", "@last").id == "churn-1"
    assert find_job(lake / "jobs", "chu").id == "churn-1"


def test_cancelling_a_fan_out_without_driver_cancels_its_children(lake: Path) -> None:
    from pipeline.driver.outcome import cancel_job
    from pipeline.jobs.cancellation import CancelOutcome

    job = JobDirectory.create(lake / "jobs", plan_of(spec()).plan, job="churn-1")
    assert cancel_job(job) is CancelOutcome.CANCELLED
    assert {child.status() for child in job.children()} == {Status.CANCELLED}
