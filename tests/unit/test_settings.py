"""Settings: flags, variables, the cluster's file, ``dask.config``, built-in values, in this order."""

from __future__ import annotations

import inspect
import itertools
import logging
from pathlib import Path
from typing import Any

import dask.config
import pytest

from pipeline.errors import SpecError
from pipeline.execution.clusters import cluster_choice, find_cluster, settings_of, site_settings
from pipeline.execution.clusters.local import LocalProcesses
from pipeline.settings import Settings, device_choice, setting_names, with_cluster_file
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
def test_setting_has_the_value_of_the_highest_source(sources: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if "environment" in sources:
        monkeypatch.setenv("PIPELINE_WORKERS", "4")
    with dask.config.set({"pipeline": {"workers": 2} if "dask.config" in sources else {}}):
        settings = Settings.load(workers=5 if "flag" in sources else None)
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
        ("drain_timeout", "2m", 120.0),
        ("import_paths", "/a:/b", ("/a", "/b")),
        ("directory", "s3://bucket/jobs", "s3://bucket/jobs"),
        ("workers", "", None),
    ],
)
def test_a_variable_is_read_by_the_type_of_its_setting(
    name: str, text: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"PIPELINE_{name.upper()}", text)
    assert getattr(Settings.load(), name) == value


@pytest.mark.parametrize(
    ("name", "text"), [("WORKERS", "many"), ("WORKERS", "0"), ("FSYNC", "maybe"), ("DRAIN_TIMEOUT", "x")]
)
def test_a_wrong_variable_is_named(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"PIPELINE_{name}", text)
    with pytest.raises(SpecError) as caught:
        Settings.load()
    assert caught.value.where == f"PIPELINE_{name}"
    assert text in caught.value.found


def test_variables_of_other_programs_are_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PIPELINE_WORKSPACE", "/agent/work")
    monkeypatch.setenv("PIPELINE_ID", "17")
    monkeypatch.setenv("PIPELINE_MEMORY_LIMITS", "4GiB")
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        assert Settings.load() == Settings(import_paths=Settings.load().import_paths)
    said = {record.getMessage() for record in caplog.records}
    assert said == {"unknown setting PIPELINE_MEMORY_LIMITS in the environment; did you mean PIPELINE_MEMORY_LIMIT?"}


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
        settings = Settings.load()
    cluster = find_cluster("big", settings=settings)
    assert isinstance(cluster, LocalProcesses)
    limits = cluster.limits()
    assert (limits.workers, limits.threads, limits.memory) == (3, 2, 2 << 30)
    found = site_settings("big", settings=settings)
    assert (found.attempts, found.lease_seconds) == (9, 5.0)
    assert site_settings("big", settings=Settings.load(attempts=1)).attempts == 1
    assert find_cluster("big", settings=Settings.load(workers=1)).limits().workers == 1
    assert settings_of(spec(cluster="big"), settings=settings).attempts == 9


def test_a_wrong_value_in_a_cluster_file_names_the_file(site: Path) -> None:
    (site / "cluster_configs" / "big.yaml").write_text("type: local\nattempts: none\n")
    with pytest.raises(SpecError) as caught:
        find_cluster("big", settings=Settings())
    assert caught.value.where.endswith("cluster_configs/big.yaml")
    (site / "cluster_configs" / "big.yaml").write_text("type: local\nworkes: 3\n")
    with pytest.raises(SpecError, match="unknown field in a cluster file"):
        find_cluster("big", settings=Settings())


@pytest.mark.parametrize(
    "sources",
    [one for n in range(5) for one in itertools.combinations(["dask.config", "job file", "environment", "flag"], n)],
    ids=" ".join,
)
def test_cluster_is_from_the_highest_source(
    sources: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if "environment" in sources:
        monkeypatch.setenv("PIPELINE_CLUSTER", "environment")
    with dask.config.set({"pipeline": {"cluster": "dask.config"} if "dask.config" in sources else {}}):
        settings = Settings.load(cluster="flag" if "flag" in sources else None)
    choice = cluster_choice(spec(cluster="job file" if "job file" in sources else None), settings=settings)
    assert choice.value == (["local", *sources])[-1]
    assert settings_of_names(settings, sources) == choice.value


@pytest.mark.parametrize(
    "sources",
    [
        one
        for n in range(6)
        for one in itertools.combinations(["dask.config", "cluster file", "job file", "environment", "flag"], n)
    ],
    ids=" ".join,
)
def test_device_is_from_the_highest_source(
    sources: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each source in turn says another device than the source below it."""
    devices = dict(zip(["dask.config", "cluster file", "job file", "environment", "flag"], DEVICES, strict=True))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster_configs").mkdir()
    line = f"device: {devices['cluster file']}\n" if "cluster file" in sources else ""
    (tmp_path / "cluster_configs" / "site.yaml").write_text(f"type: local\n{line}")
    if "environment" in sources:
        monkeypatch.setenv("PIPELINE_DEVICE", devices["environment"])
    with dask.config.set({"pipeline": {"device": devices["dask.config"]} if "dask.config" in sources else {}}):
        settings = Settings.load(device=devices["flag"] if "flag" in sources else None)
    job = spec(cluster="site", device=devices["job file"] if "job file" in sources else None)
    choice = device_choice(job, settings=settings_of(job, settings=settings))
    assert choice.value == (["auto", *(devices[source] for source in sources)])[-1]
    assert choice.rank.words == (["built-in", *sources])[-1]


DEVICES = ("cpu", "cuda", "auto", "cpu", "cuda")


def test_unknown_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_DEVICE", "gpu")
    with pytest.raises(SpecError, match="invalid value of a setting") as caught:
        Settings.load()
    assert caught.value.expected == "auto, cpu or cuda"


def settings_of_names(settings: Settings, sources: tuple[str, ...]) -> str | None:
    """The cluster that settings name once it was chosen; what is submitted with them is driven there."""
    job = spec(cluster="job file" if "job file" in sources else None)
    folder = Path("cluster_configs")
    folder.mkdir(exist_ok=True)
    for name in ("dask.config", "job file", "environment", "flag"):
        (folder / f"{name}.yaml").write_text("type: local\n")
    chosen = settings_of(job, settings=settings)
    return cluster_choice(job, settings=Settings.load(cluster=chosen.cluster)).value


@pytest.mark.parametrize(
    ("value", "found"), [("on", True), ("off", False), (True, True), (False, False), ("OFF", False)]
)
def test_stragglers_are_switched_on_or_off(value: object, found: bool) -> None:
    with dask.config.set({"pipeline.stragglers": value}):
        assert Settings.load().stragglers is found


@pytest.mark.parametrize("value", ["perhaps", 2, []])
def test_another_value_for_a_switch_is_refused(value: object) -> None:
    with (
        dask.config.set({"pipeline.stragglers": value}),
        pytest.raises(SpecError, match="invalid value of a setting") as caught,
    ):
        Settings.load()
    assert "stragglers" in str(caught.value)


RENAMED = [("drift-poll", "alias-poll"), ("grace", "drain-timeout"), ("hook-grace", "hook-timeout")]


class TestRenamedSettings:
    @pytest.mark.parametrize(("old", "new"), RENAMED)
    def test_dask_config(self, old: str, new: str) -> None:
        with dask.config.set({"pipeline": {old: 5}}), pytest.raises(SpecError) as caught:
            Settings.load()
        assert caught.value.message == f"the setting {old} is now named {new}"
        assert caught.value.where == f"pipeline.{old}"
        assert caught.value.next_step == f"rename it to {new}"

    @pytest.mark.parametrize(("old", "new"), RENAMED)
    def test_environment(self, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def variable(name: str) -> str:
            return "PIPELINE_" + name.upper().replace("-", "_")

        monkeypatch.setenv(variable(old), "5")
        with pytest.raises(SpecError) as caught:
            Settings.load()
        assert caught.value.where == variable(old)
        assert caught.value.next_step == f"rename it to {variable(new)}"

    @pytest.mark.parametrize(("old", "new"), RENAMED)
    def test_cluster_file(self, old: str, new: str, site: Path) -> None:
        (site / "cluster_configs" / "big.yaml").write_text(f"type: local\n{old}: 5\n")
        with pytest.raises(SpecError, match=f"{old} is now named {new}") as caught:
            find_cluster("big", settings=Settings())
        assert caught.value.where.endswith("big.yaml")


class TestLoad:
    def test_has_a_keyword_for_every_setting(self) -> None:
        assert tuple(inspect.signature(Settings.load).parameters) == setting_names()

    def test_units_are_converted(self) -> None:
        settings = Settings.load(drain_timeout="2 min", hook_timeout=5, memory_limit="4 GiB", stragglers="off")
        assert (settings.drain_timeout, settings.hook_timeout) == (120.0, 5.0)
        assert (settings.memory_limit, settings.stragglers) == ("4 GiB", False)

    def test_invalid_size_names_the_keyword(self) -> None:
        with pytest.raises(SpecError, match="invalid value of a setting") as caught:
            Settings.load(memory_limit="plenty")
        assert (caught.value.where, caught.value.found) == ("--memory-limit", "'plenty'")

    def test_unknown_setting_lists_the_known_ones(self) -> None:
        with dask.config.set({"pipeline.workes": 3}), pytest.raises(SpecError, match="unknown setting") as caught:
            Settings.load()
        assert "workers" in caught.value.expected

    def test_repr_shows_what_differs_from_the_defaults(self) -> None:
        assert repr(Settings(workers=2, tls=True)) == "Settings(workers=2, tls=True)"
