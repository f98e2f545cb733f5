"""Settings: flags, variables, the cluster's file, ``dask.config``, built-in values, in this order."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import dask.config
import pytest

from pipeline.errors import SpecError
from pipeline.execution.clusters import cluster_choice, find_cluster, settings_of, site_settings
from pipeline.execution.clusters.local import LocalProcesses
from pipeline.settings import Settings, load_settings, with_cluster_file
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.precedence import Precedence

SOURCES = ["dask.config", "cluster file", "environment", "flag"]
VALUES = {
    "dask.config": (2, Precedence.DASK_CONFIG, "pipeline.workers"),
    "cluster file": (3, Precedence.CLUSTER_FILE, "big.yaml"),
    "environment": (4, Precedence.ENVIRONMENT, "PIPELINE_WORKERS"),
    "flag": (5, Precedence.FLAG, "--workers"),
}


def spec(**fields: Any) -> JobSpec:
    return JobSpec.build(
        name="c", source={"path": "a"}, steps=[{"score": {"model": "m.ubj"}}], sink={"path": "o"}, **fields
    )


@pytest.mark.parametrize(
    "sources", [one for count in range(5) for one in itertools.combinations(SOURCES, count)], ids=" ".join
)
def test_a_setting_is_from_the_highest_that_says_something(
    sources: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "environment" in sources:
        monkeypatch.setenv("PIPELINE_WORKERS", "4")
    with dask.config.set({"pipeline": {"workers": 2} if "dask.config" in sources else {}}):
        settings = load_settings(workers=5 if "flag" in sources else None)
    if "cluster file" in sources:
        settings = with_cluster_file(settings, {"workers": 3}, where="big.yaml")
        assert with_cluster_file(settings, {"workers": 3}, where="big.yaml").candidates == settings.candidates
    choice = settings.choice("workers")
    if not sources:
        assert (settings.workers, choice.rank) == (None, Precedence.BUILT_IN)
        return
    ordered = [VALUES[one] for one in SOURCES if one in sources]
    assert (settings.workers, choice.rank, choice.origin) == ordered[-1]
    assert [(one.value, one.rank) for one in choice.over[:-1]] == [one[:2] for one in reversed(ordered[:-1])]
    assert choice.over[-1].rank is Precedence.BUILT_IN


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("memory_limit", "4GiB", "4GiB"),
        ("fsync", "false", False),
        ("fsync", "TRUE", True),
        ("attempts", "7", 7),
        ("grace", "2m", 120.0),
        ("import_paths", "/a:/b", ("/a", "/b")),
        ("directory", "s3://bucket/jobs", "s3://bucket/jobs"),
        ("workers", "", None),
    ],
)
def test_a_variable_is_read_by_the_type_of_its_setting(
    name: str, text: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"PIPELINE_{name.upper()}", text)
    assert getattr(load_settings(), name) == value


@pytest.mark.parametrize(("name", "text"), [("WORKERS", "many"), ("WORKERS", "0"), ("FSYNC", "maybe"), ("GRACE", "x")])
def test_a_wrong_variable_is_named(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"PIPELINE_{name}", text)
    with pytest.raises(SpecError) as caught:
        load_settings()
    assert caught.value.where == f"PIPELINE_{name}"
    assert text in caught.value.found


def test_variables_of_other_programs_are_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PIPELINE_WORKSPACE", "/agent/work")
    monkeypatch.setenv("PIPELINE_ID", "17")
    monkeypatch.setenv("PIPELINE_MEMORY_LIMITS", "4GiB")
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        assert load_settings() == Settings(import_paths=load_settings().import_paths)
    said = {record.getMessage() for record in caplog.records}
    assert said == {"the variable PIPELINE_MEMORY_LIMITS is no setting; did you mean PIPELINE_MEMORY_LIMIT?"}


def test_settings_made_in_python_count_as_flags() -> None:
    settings = Settings(workers=7)
    assert settings.choice("workers").rank is Precedence.FLAG
    assert with_cluster_file(settings, {"workers": 3, "threads": 2}, where="f").workers == 7
    assert with_cluster_file(settings, {"workers": 3, "threads": 2}, where="f").threads == 2


@pytest.mark.parametrize("name", ["directory", "cluster"])
def test_a_cluster_file_cannot_set_what_is_needed_to_find_it(name: str) -> None:
    with pytest.raises(SpecError) as caught:
        with_cluster_file(Settings(), {name: "x"}, where="big.yaml")
    assert caught.value.where == "big.yaml"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster_configs").mkdir()
    (tmp_path / "cluster_configs" / "big.yaml").write_text(
        "type: local\nworkers: 3\nthreads: auto\nmemory-limit: 2 GiB\nattempts: 9\nlease-seconds: 5\n"
    )
    return tmp_path


def test_a_cluster_file_holds_site_settings(site: Path) -> None:
    with dask.config.set({"pipeline": {"workers": 2, "threads": 2, "memory-limit": "8 GiB"}}):
        settings = load_settings()
    cluster = find_cluster("big", settings=settings)
    assert isinstance(cluster, LocalProcesses)
    limits = cluster.limits()
    assert (limits.workers, limits.threads, limits.memory) == (3, 2, 2 << 30)
    found = site_settings("big", settings=settings)
    assert (found.attempts, found.lease_seconds) == (9, 5.0)
    assert site_settings("big", settings=load_settings(attempts=1)).attempts == 1
    assert find_cluster("big", settings=load_settings(workers=1)).limits().workers == 1
    assert settings_of(spec(cluster="big"), settings=settings).attempts == 9


def test_a_wrong_value_in_a_cluster_file_names_the_file(site: Path) -> None:
    (site / "cluster_configs" / "big.yaml").write_text("type: local\nattempts: none\n")
    with pytest.raises(SpecError) as caught:
        find_cluster("big", settings=Settings())
    assert caught.value.where.endswith("cluster_configs/big.yaml")
    (site / "cluster_configs" / "big.yaml").write_text("type: local\nworkes: 3\n")
    with pytest.raises(SpecError, match="a field its type does not know"):
        find_cluster("big", settings=Settings())


@pytest.mark.parametrize(
    "sources",
    [one for n in range(5) for one in itertools.combinations(["dask.config", "job file", "environment", "flag"], n)],
    ids=" ".join,
)
def test_the_cluster_is_from_the_highest_that_says_something(
    sources: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if "environment" in sources:
        monkeypatch.setenv("PIPELINE_CLUSTER", "environment")
    with dask.config.set({"pipeline": {"cluster": "dask.config"} if "dask.config" in sources else {}}):
        settings = load_settings(cluster="flag" if "flag" in sources else None)
    choice = cluster_choice(spec(cluster="job file" if "job file" in sources else None), settings=settings)
    assert choice.value == (["local", *sources])[-1]
    assert settings_of_names(settings, sources) == choice.value


def settings_of_names(settings: Settings, sources: tuple[str, ...]) -> str | None:
    """The cluster that settings name once it was chosen; what is submitted with them is driven there."""
    job = spec(cluster="job file" if "job file" in sources else None)
    folder = Path("cluster_configs")
    folder.mkdir(exist_ok=True)
    for name in ("dask.config", "job file", "environment", "flag"):
        (folder / f"{name}.yaml").write_text("type: local\n")
    chosen = settings_of(job, settings=settings)
    return cluster_choice(job, settings=load_settings(cluster=chosen.cluster)).value


@pytest.mark.parametrize(
    ("value", "found"), [("on", True), ("off", False), (True, True), (False, False), ("OFF", False)]
)
def test_stragglers_are_switched_on_or_off(value: object, found: bool) -> None:
    with dask.config.set({"pipeline.stragglers": value}):
        assert load_settings().stragglers is found


@pytest.mark.parametrize("value", ["perhaps", 2, []])
def test_another_value_for_a_switch_is_refused(value: object) -> None:
    with dask.config.set({"pipeline.stragglers": value}), pytest.raises(SpecError, match="wrong value") as caught:
        load_settings()
    assert "stragglers" in str(caught.value)
