"""An alias that changes while a job runs, or before its resume: the output is of one version, by the policy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.driver import driver, fan_out
from pipeline.errors import ChildrenFailed, ModelChanged, ModelError, PipelineError, SpecError, StorageError
from pipeline.events import Callback, PartitionEnded
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.listing import find_job
from pipeline.models.registry import alias_watch
from pipeline.models.registry.alias_watch import MAX_RESTARTS
from pipeline.models.registry.file_registry import BuiltInRegistry, VersionMetadata
from pipeline.report.report import Report
from pipeline.report.verify import verify
from pipeline.runner import resume, run
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.oracle import FEATURES, Lake, make_lake, make_table, oracle, train_model

CHAMPION = "models:/churn@champion"
Make = Callable[..., JobSpec]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models over the same features, and one that needs fewer."""
    from pipeline.models.flavors.xgboost_train import train

    folder = tmp_path_factory.mktemp("models")
    frame = make_table(3000, seed=9).select(FEATURES[:2]).to_pandas()
    settings = {"objective": "binary:logistic", "max_depth": 3, "seed": 1}
    return [
        train_model(folder / "one.ubj", rounds=4),
        train_model(folder / "two.ubj", rounds=7),
        train(frame, (frame["age"] > 40).astype("float32"), path=folder / "few.ubj", params=settings, rounds=5),
    ]


@pytest.fixture
def registry(tmp_path: Path, models: list[Path]) -> BuiltInRegistry:
    """``churn`` in three versions; ``champion`` is the first."""
    registry = BuiltInRegistry(str(tmp_path / "models"))
    for model in models:
        registry.register("churn", model.read_bytes(), VersionMetadata())
    registry.set_alias("churn", "champion", 1)
    return registry


@pytest.fixture
def settings(settings: Settings, registry: BuiltInRegistry) -> Settings:
    return replace(settings, registry=registry.root, alias_poll=0.001)


@pytest.fixture
def six_file_lake(tmp_path: Path) -> Lake:
    return make_lake(tmp_path / "lake", rows=(4000, 3000, 3000, 2000, 1000, 3000), row_group=500)


@pytest.fixture
def make_spec(make_spec: Make, six_file_lake: Lake) -> Make:
    """A job over `six_file_lake`."""
    return partial(make_spec, lake=six_file_lake)


@pytest.fixture
def spec(make_spec: Make) -> Callable[[str], JobSpec]:
    return lambda policy: make_spec(on_alias_change=policy, score={"model": CHAMPION})


class Mover(Callback):
    """Does something when that many partitions are done."""

    def __init__(self, *moves: Callable[[], object], after: int = 2) -> None:
        self.moves = list(moves)
        self.after = after
        self.done = 0

    def on_partition(self, event: PartitionEnded) -> None:
        self.done += event.outcome == "done"
        if self.moves and self.done >= self.after:
            self.done = 0
            self.moves.pop(0)()


def to(registry: BuiltInRegistry, number: int) -> Callable[[], object]:
    return lambda: registry.set_alias("churn", "champion", number)


def versions(folder: Path) -> set[str]:
    """The model versions that published files name."""
    found = [json.loads(pq.read_schema(file).metadata[b"pipeline.model"]) for file in folder.glob("*.parquet")]
    assert all(one["uri"] == f"models:/churn/{one['version']}" for one in found)
    return {one["version"] for one in found}


def assert_is_of(
    report: Report, job: JobDirectory, version: int, six_file_lake: Lake, model: Path, **options: Any
) -> None:
    out = Path(report.output)
    assert versions(out) == {str(version)}
    found = pd.concat([pq.read_table(file).to_pandas() for file in sorted(out.glob("*.parquet"))], ignore_index=True)
    expected = oracle(six_file_lake.files, model, **options)
    pd.testing.assert_frame_equal(found.sort_values("id", ignore_index=True), expected, check_exact=True)
    assert report.rows.to_dict() == {"in": six_file_lake.rows, "out": six_file_lake.rows, "rejected": 0, "filtered": 0}
    assert report.model.version == str(version)
    manifest = job.manifests.last()
    assert manifest is not None
    assert manifest.model.version == str(version)
    proof = verify(job)
    assert proof.ok, proof.checks


def last(settings: Settings) -> JobDirectory:
    return find_job(settings.directory, "@last")


def test_pin_continues_with_a_warning(
    spec: Callable[[str], JobSpec],
    settings: Settings,
    registry: BuiltInRegistry,
    six_file_lake: Lake,
    models: list[Path],
) -> None:
    report = run(spec("pin"), settings=settings, callbacks=[Mover(to(registry, 2))])
    assert_is_of(report, last(settings), 1, six_file_lake, models[0])
    assert report.status == "SUCCEEDED"
    assert [text for text in report.warnings if "moved" in text] == [
        f"{CHAMPION} moved from version 1 to version 2 while the job ran: every row was scored with version 1 "
        "(on_alias_change: pin)"
    ]
    (event,) = [one for one in last(settings).events.read() if one["event"] == "alias_change"]
    assert (event["reference"], event["pinned"], event["current"]) == (CHAMPION, "1", "2")
    assert len(last(settings).rounds.all()) == 1


def test_fail_publishes_nothing_until_the_alias_is_back(
    spec: Callable[[str], JobSpec],
    settings: Settings,
    registry: BuiltInRegistry,
    six_file_lake: Lake,
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ModelChanged) as caught:
        run(spec("fail"), settings=settings, callbacks=[Mover(to(registry, 2))])
    assert caught.value.exit_code == 5
    assert (caught.value.found, caught.value.expected[:9]) == ("version 2", "version 1")
    assert not (tmp_path / "out").exists()
    job = last(settings)
    assert job.status() == "FAILED"
    before = {receipt.partition: receipt.attempt for receipt in job.receipts.all()}
    with monkeypatch.context() as patch:
        patch.setattr(driver, "open_cluster", lambda *_, **__: pytest.fail("workers were asked for"))
        with pytest.raises(ModelChanged):
            resume("@last", settings=settings)
    registry.rollback("churn", "champion")
    report = resume("@last", settings=settings)
    assert_is_of(report, job, 1, six_file_lake, models[0])
    after = {receipt.partition: receipt.attempt for receipt in job.receipts.all()}
    assert {name: after[name] for name in before} == before, "what was done is not done again"


def test_restart_scores_everything_with_the_new_version(
    spec: Callable[[str], JobSpec],
    settings: Settings,
    registry: BuiltInRegistry,
    six_file_lake: Lake,
    models: list[Path],
) -> None:
    def move() -> None:
        registry.set_alias("churn", "champion", 2)
        # What comes in the meantime is none of this job's.
        pq.write_table(make_table(100, seed=1, start=1_000_000), six_file_lake.path / "part-late.parquet")

    report = run(spec("restart"), settings=settings, callbacks=[Mover(move)])
    job = last(settings)
    assert_is_of(report, job, 2, six_file_lake, models[1])
    assert "the job started over: models:/churn@champion: version 1 -> 2 (on_alias_change: restart)" in report.warnings
    assert [one.reason for one in job.rounds.all()] == ["plan", "alias change"]
    assert job.store.list("rounds/0/receipts"), "something had been scored with the old version"
    assert {receipt.model for receipt in job.receipts.all(round=1)} == {job.rounds.all()[1].plan.model.digest}


def test_an_alias_that_comes_back(
    spec: Callable[[str], JobSpec],
    settings: Settings,
    registry: BuiltInRegistry,
    six_file_lake: Lake,
    models: list[Path],
) -> None:
    report = run(spec("restart"), settings=settings, callbacks=[Mover(to(registry, 2), to(registry, 1))])
    assert_is_of(report, last(settings), 1, six_file_lake, models[0])
    assert len(last(settings).rounds.all()) == 3


def test_an_alias_that_never_rests(
    spec: Callable[[str], JobSpec], settings: Settings, registry: BuiltInRegistry, tmp_path: Path
) -> None:
    def move() -> None:
        version = last(settings).rounds.all()[-1].plan.model.version
        registry.set_alias("churn", "champion", 2 if version == "1" else 1)

    with pytest.raises(ModelChanged, match="moved too often while the job ran"):
        run(spec("restart"), settings=settings, callbacks=[Mover(*[move] * 1000, after=1)])
    assert not (tmp_path / "out").exists()
    assert len(last(settings).rounds.all()) == 1 + MAX_RESTARTS


def test_a_new_version_may_need_other_columns(
    make_spec: Make, settings: Settings, registry: BuiltInRegistry, six_file_lake: Lake, models: list[Path]
) -> None:
    spec = make_spec(on_alias_change="restart", score={"model": CHAMPION})
    report = run(spec, settings=settings, callbacks=[Mover(to(registry, 3))])
    assert_is_of(report, last(settings), 3, six_file_lake, models[2], features=FEATURES[:2])


def test_a_new_version_that_does_not_fit_the_input(
    make_spec: Make,
    settings: Settings,
    registry: BuiltInRegistry,
    six_file_lake: Lake,
    models: list[Path],
    tmp_path: Path,
) -> None:
    spec = make_spec(
        source={"path": str(six_file_lake.path), "columns": ["id", "age", "balance"]},
        on_alias_change="restart",
        score={"model": CHAMPION},
    )
    registry.set_alias("churn", "champion", 3)
    with pytest.raises(SpecError, match="leaves out a column"):
        run(spec, settings=settings, callbacks=[Mover(to(registry, 1))])
    assert not (tmp_path / "out").exists()
    registry.set_alias("churn", "champion", 3)
    report = resume("@last", settings=settings)
    assert versions(tmp_path / "out") == {"3"}
    assert report.rows.output == six_file_lake.rows
    assert len(last(settings).rounds.all()) == 1


@pytest.mark.parametrize(("policy", "version"), [("pin", 1), ("restart", 2)])
def test_an_alias_that_moved_before_the_resume(
    policy: str,
    version: int,
    spec: Callable[[str], JobSpec],
    settings: Settings,
    registry: BuiltInRegistry,
    six_file_lake: Lake,
    models: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(driver, "decide_status", _raise(StorageError("on purpose")))
        with pytest.raises(StorageError):
            run(spec(policy), settings=settings, job_id="moved")
    registry.set_alias("churn", "champion", 2)
    report = run(spec(policy), settings=settings, job_id="moved")
    assert_is_of(report, last(settings), version, six_file_lake, models[version - 1])
    assert any("version 1 " in text and " 2" in text for text in report.warnings)


def test_a_commit_is_final(
    spec: Callable[[str], JobSpec],
    settings: Settings,
    registry: BuiltInRegistry,
    six_file_lake: Lake,
    models: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(driver, "publish", _raise(StorageError("on purpose")))
        with pytest.raises(StorageError):
            run(spec("restart"), settings=settings)
    registry.set_alias("churn", "champion", 2)
    assert_is_of(resume("@last", settings=settings), last(settings), 1, six_file_lake, models[0])


def test_the_same_bytes_under_another_number_are_no_move(
    spec: Callable[[str], JobSpec],
    settings: Settings,
    registry: BuiltInRegistry,
    six_file_lake: Lake,
    models: list[Path],
) -> None:
    again = registry.register("churn", models[0].read_bytes(), VersionMetadata(), again=True).record.version
    report = run(spec("fail"), settings=settings, callbacks=[Mover(to(registry, again))])
    assert_is_of(report, last(settings), 1, six_file_lake, models[0])


@pytest.fixture
def broken(registry: BuiltInRegistry) -> Iterator[Callable[[], None]]:
    """Takes the records of the alias away; they are back afterwards."""
    records = {name: registry.store.read(f"churn/aliases/champion/{name}") for name in ("1.json",)}

    def take() -> None:
        for name in records:
            registry.store.remove(f"churn/aliases/champion/{name}")

    yield take
    for name, data in records.items():
        registry.store.put_if_absent(f"churn/aliases/champion/{name}", data)


def test_a_registry_that_is_gone_does_not_stop_what_is_pinned(
    spec: Callable[[str], JobSpec],
    settings: Settings,
    broken: Callable[[], None],
    six_file_lake: Lake,
    models: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(alias_watch.logger, "warning", lambda text, *values: said.append(text % values))
    report = run(spec("pin"), settings=settings, callbacks=[Mover(broken)])
    assert_is_of(report, last(settings), 1, six_file_lake, models[0])
    assert any("cannot find out where" in text for text in said)


def test_a_registry_that_is_gone_stops_a_commit_that_depends_on_it(
    spec: Callable[[str], JobSpec],
    settings: Settings,
    registry: BuiltInRegistry,
    broken: Callable[[], None],
    six_file_lake: Lake,
    models: list[Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(ModelError):
        run(spec("fail"), settings=settings, callbacks=[Mover(broken)])
    assert not (tmp_path / "out").exists()
    registry.set_alias("churn", "champion", 1)
    report = resume("@last", settings=settings, callbacks=[Mover(lambda: pytest.fail("scored again"), after=1)])
    assert_is_of(report, last(settings), 1, six_file_lake, models[0])


def _raise(error: PipelineError) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> Any:
        raise error

    return call


@pytest.mark.fault(74)
class TestFanOut:
    """A fan-out that publishes together: one version for all children, decided before the first publication."""

    @pytest.fixture
    def family(self, make_spec: Make, tmp_path: Path) -> Callable[[str], JobSpec]:
        for number, key in enumerate("ab"):
            folder = tmp_path / "hive" / f"key={key}"
            folder.mkdir(parents=True)
            pq.write_table(make_table(60, seed=number, start=60 * number), folder / "x.parquet")
        return lambda policy: make_spec(
            source={"path": str(tmp_path / "hive")},
            score={"model": CHAMPION},
            fan_out={"by": "key"},
            on_alias_change=policy,
        )

    @staticmethod
    def versions(folder: Path) -> list[set[str]]:
        return [versions(place) for place in sorted(folder.glob("key=*"))]

    @pytest.mark.parametrize("policy", ["restart", "fail", "pin"])
    def test_alias_that_moves_between_two_publications_changes_nothing(
        self,
        policy: str,
        family: Callable[[str], JobSpec],
        settings: Settings,
        registry: BuiltInRegistry,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Children that are only published do not check the alias: all are of one version, and none is left out."""
        publish = driver.publish

        def move_after(*arguments: Any, **options: Any) -> Any:
            published = publish(*arguments, **options)
            registry.set_alias("churn", "champion", 2)
            return published

        monkeypatch.setattr(driver, "publish", move_after)
        report = run(family(policy), settings=replace(settings, alias_poll=0.0))
        assert report.status == "SUCCEEDED"
        assert self.versions(tmp_path / "out") == [{"1"}, {"1"}]

    @pytest.mark.parametrize("policy", ["restart", "fail"])
    def test_alias_that_moves_before_the_first_publication_concerns_all_children(
        self,
        policy: str,
        family: Callable[[str], JobSpec],
        settings: Settings,
        registry: BuiltInRegistry,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """``restart`` scores all children again; ``fail`` publishes none of them."""
        find_outdated = fan_out.find_outdated

        def move_before(jobs: Any, **options: Any) -> Any:
            registry.set_alias("churn", "champion", 2)
            return find_outdated(jobs, **options)

        monkeypatch.setattr(fan_out, "find_outdated", move_before)
        if policy == "restart":
            assert run(family(policy), settings=replace(settings, alias_poll=0.0)).status == "SUCCEEDED"
            assert self.versions(tmp_path / "out") == [{"2"}, {"2"}]
            return
        with pytest.raises(ChildrenFailed, match="nothing was published"):
            run(family(policy), settings=replace(settings, alias_poll=0.0))
        assert not (tmp_path / "out").exists()
        registry.set_alias("churn", "champion", 1)
        monkeypatch.undo()
        assert resume("@last", settings=settings).status == "SUCCEEDED"
        assert self.versions(tmp_path / "out") == [{"1"}, {"1"}]
