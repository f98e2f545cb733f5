"""A job on S3: source, job directory and sink are URLs, and credentials are in the environment alone."""

from __future__ import annotations

import io
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client

import pipeline
from pipeline.errors import InputChanged, OutputExists, PipelineError, StorageError, UnsafeStore
from pipeline.events import Callback, PartitionEnded
from pipeline.execution.tasks import make_tasks
from pipeline.jobs.cancellation import CancelOutcome
from pipeline.jobs.listing import find_job, list_jobs
from pipeline.jobs.status import Status
from pipeline.models.registry.file_registry import BuiltInRegistry, VersionMetadata
from pipeline.report.verify import verify
from pipeline.runner import resume, retry, run
from pipeline.service.queue import queued_marks
from pipeline.service.server import Server
from pipeline.service.submit import submit
from pipeline.settings import Settings
from pipeline.sinks import publish
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.oracle import Lake, oracle, train_model
from pipeline.testing.processes import wait_until
from pipeline.testing.s3 import S3, SECRET
from pipeline.testing.s3_proxy import proxy_s3

Make = Callable[..., JobSpec]


def reach(environment: dict[str, str | None]) -> None:
    """On a worker: what a site's environment does when the worker is started with it."""
    import fsspec

    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    fsspec.config.conf.pop("s3", None)
    fsspec.config.set_conf_env(fsspec.config.conf)


@pytest.fixture
def on_s3(client: Client, job_s3: S3) -> Iterator[S3]:
    """The server, reached by driver and workers, and empty."""
    client.run(reach, job_s3.environment)
    yield job_s3
    client.run(reach, dict.fromkeys(job_s3.environment))
    for key in job_s3.names():
        job_s3.client().delete_object(Bucket=job_s3.bucket, Key=key)


@pytest.fixture
def s3_settings(settings: Settings, on_s3: S3) -> Settings:
    return replace(settings, directory=on_s3.url("jobs"))


@pytest.fixture
def s3_spec(on_s3: S3, make_spec: Make, lake: Lake, model_path: Path) -> Make:
    """Make a spec like `make_spec` does, with everything on S3."""
    for file in lake.files:
        on_s3.client().upload_file(str(file), on_s3.bucket, f"lake/day=1/{file.name}")
    on_s3.client().upload_file(str(model_path), on_s3.bucket, "models/churn.ubj")

    def make(**fields: Any) -> JobSpec:
        score = {"model": on_s3.url("models/churn.ubj")}
        places = {"source": {"path": on_s3.url("lake/")}, "sink": {"path": on_s3.url("out/")}}
        return make_spec(score=score, **{**places, **fields})

    return make


def published(server: S3) -> pd.DataFrame:
    """The output as boto3 and pyarrow see it, in the order of its files."""
    keys = [key for key in server.names("out/") if key.endswith(".parquet")]
    bodies = [server.client().get_object(Bucket=server.bucket, Key=key)["Body"].read() for key in keys]
    return pa.concat_tables([pq.read_table(io.BytesIO(body)) for body in bodies]).to_pandas()


def expected(lake: Lake, model_path: Path) -> pd.DataFrame:
    everything = oracle(lake.files, model_path)
    everything.insert(len(everything.columns) - 1, "day", 1)
    return everything


def everything_stored(server: S3) -> bytes:
    client = server.client()
    return b"\n".join(
        key.encode() + b"\n" + client.get_object(Bucket=server.bucket, Key=key)["Body"].read() for key in server.names()
    )


def test_rejects_on_s3_are_repaired(
    s3_spec: Make, s3_settings: Settings, on_s3: S3, lake: Lake, model_path: Path
) -> None:
    spec = s3_spec(maps=("steps_for_tests:fail_on_few",), errors={"max_fraction": 0.02})
    first = run(spec, settings=s3_settings)
    assert first.status == "SUCCEEDED_WITH_WARNINGS"
    repaired = retry("@last", overrides=["steps.0.map=steps_for_tests:as_it_is"], settings=s3_settings)
    assert (repaired.status, repaired.published) == ("SUCCEEDED", 2)
    found = published(on_s3).sort_values("id", ignore_index=True)
    pd.testing.assert_frame_equal(found, expected(lake, model_path), check_exact=True)
    checks = verify(find_job(s3_settings.directory, "@last"))
    assert checks.ok, checks.to_dict()
    assert on_s3.pending_uploads() == []


@pytest.mark.fault(49)
def test_a_job_on_s3_equals_the_oracle_and_keeps_its_secrets(
    s3_spec: Make,
    s3_settings: Settings,
    on_s3: S3,
    lake: Lake,
    model_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG, logger="pipeline")
    events: list[Any] = []
    report = run(s3_spec(), settings=s3_settings, callbacks=[events.append])
    assert report.status == "SUCCEEDED"
    assert report.rows.to_dict() == {"in": lake.rows, "out": lake.rows, "rejected": 0, "filtered": 0}
    pd.testing.assert_frame_equal(published(on_s3), expected(lake, model_path), check_exact=True)
    assert on_s3.pending_uploads() == []
    job = find_job(s3_settings.directory, "@last")
    assert [one.record.job for one in list_jobs(s3_settings.directory)] == [job.id]
    assert {"out/_SUCCESS", "out/_manifest.json"} < set(on_s3.names("out/"))
    checks = verify(job)
    assert checks.ok, checks.to_dict()
    tasks = make_tasks(job.recipe, job.plan.partitions, job.plan.versions)
    artefacts = {
        "storage": everything_stored(on_s3),
        "graph": cloudpickle.dumps(tasks),
        "store": pickle.dumps(job.plan) + cloudpickle.dumps(job.recipe),
        "report": repr(report.to_dict()).encode(),
        "events": repr(events).encode(),
        "log": caplog.text.encode(),
        "output": "".join(capfd.readouterr()).encode(),
    }
    for name, artefact in artefacts.items():
        assert SECRET.encode() not in artefact, f"the secret is in the {name}"


def test_a_registry_on_s3_whose_alias_moves(
    s3_settings: Settings, s3_spec: Make, on_s3: S3, lake: Lake, model_path: Path, tmp_path: Path
) -> None:
    registry = BuiltInRegistry(on_s3.url("models"))
    other = train_model(tmp_path / "other.ubj", rounds=5)
    for path in (model_path, other):
        registry.register("churn", path.read_bytes(), VersionMetadata())
    registry.set_alias("churn", "champion", 1)

    class Mover(Callback):
        def on_partition(self, event: PartitionEnded) -> None:
            registry.set_alias("churn", "champion", 2)

    spec = s3_spec(steps=[{"score": {"model": "models:/churn@champion"}}], on_alias_change="restart")
    settings = replace(s3_settings, registry=registry.root, alias_poll=0.01)
    report = run(spec, settings=settings, callbacks=[Mover()])
    assert report.model.version == "2"
    found = published(on_s3).sort_values("id", ignore_index=True)
    pd.testing.assert_frame_equal(found, expected(lake, other), check_exact=True)
    assert verify(find_job(settings.directory, "@last")).ok
    assert SECRET.encode() not in everything_stored(on_s3)


def test_an_interrupted_job_on_s3_is_gone_on_with(
    s3_spec: Make, s3_settings: Settings, on_s3: S3, lake: Lake, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.driver.driver.publish", die)
    with pytest.raises(KeyboardInterrupt):
        run(s3_spec(), settings=s3_settings)
    monkeypatch.setattr("pipeline.driver.driver.publish", publish)
    assert on_s3.names("out/") == []
    report = resume("@last", settings=s3_settings)
    assert report.status == "SUCCEEDED"
    pd.testing.assert_frame_equal(published(on_s3), expected(lake, model_path), check_exact=True)
    before = on_s3.names("out/")
    with pytest.raises(OutputExists):
        run(s3_spec(), settings=s3_settings)
    assert on_s3.names("out/") == before
    run(s3_spec(sink={"path": on_s3.url("out"), "mode": "overwrite"}), settings=s3_settings)
    pd.testing.assert_frame_equal(published(on_s3), expected(lake, model_path), check_exact=True)


@pytest.mark.fault(32, 33)
def test_a_job_gets_over_an_s3_that_is_not_well(
    s3_spec: Make, s3_settings: Settings, on_s3: S3, client: Client, lake: Lake, model_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Replies of commits are lost, connections are reset, SlowDown is said: every row is there once."""
    spec = s3_spec()
    with proxy_s3(on_s3.endpoint) as proxy:
        monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", proxy.endpoint)
        reach(on_s3.environment | {"FSSPEC_S3_ENDPOINT_URL": proxy.endpoint})
        client.run(reach, on_s3.environment | {"FSSPEC_S3_ENDPOINT_URL": proxy.endpoint})
        rules = [
            proxy.add("lose reply", "PUT", "/receipts/", times=3),
            proxy.add("lose reply", "PUT", "/manifests/1.json"),
            proxy.add("lose reply", "PUT", "/job.json"),
            proxy.add("lose reply", "PUT", "/data/", times=2),
            proxy.add("lose reply", "PUT", "/out/", times=2),
            proxy.add("slow down", "GET", "/lake/", times=2),
            proxy.add("reset", "GET", "/lake/day", times=2),
            proxy.add("slow down", "PUT", "/events/", times=2),
        ]
        report = run(spec, settings=s3_settings)
        assert verify(find_job(s3_settings.directory, "@last")).ok
    assert report.status == "SUCCEEDED"
    assert [rule for rule in rules if rule.done < rule.times] == []
    pd.testing.assert_frame_equal(published(on_s3), expected(lake, model_path), check_exact=True)
    data = [name for name in on_s3.names("jobs/") if "/data/" in name]
    assert len(data) == sum(
        receipt.data is not None for receipt in find_job(s3_settings.directory, "@last").receipts.all()
    )


@pytest.mark.fault(40)
def test_an_object_that_changed_since_the_plan_is_refused(
    s3_spec: Make, s3_settings: Settings, on_s3: S3, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipeline.runner as runner

    def prepare_then_change(*args: Any, **named: Any) -> Any:
        prepared = prepare(*args, **named)
        on_s3.client().upload_file(str(lake.files[1]), on_s3.bucket, f"lake/day=1/{lake.files[2].name}")
        return prepared

    prepare = runner.prepare
    monkeypatch.setattr(runner, "prepare", prepare_then_change)
    with pytest.raises(InputChanged) as caught:
        run(s3_spec(), settings=s3_settings)
    assert caught.value.where.endswith(lake.files[2].name)
    assert on_s3.names("out/") == []


@pytest.mark.fault(34)
def test_a_store_that_ignores_the_condition_is_refused_before_anything_is_scored(
    s3_spec: Make, s3_settings: Settings, settings: Settings, on_s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the job directory, and for the sink of a job whose directory is elsewhere."""
    if on_s3.ignored is None:
        pytest.skip("SeaweedFS cannot be told to ignore a condition")
    monkeypatch.setattr("pipeline.storage.object_store._proven", set())
    before = on_s3.names()
    on_s3.ignored.add("HTTP_IF_NONE_MATCH")
    try:
        for chosen in (s3_settings, settings):
            with pytest.raises(UnsafeStore) as caught:
                run(s3_spec(), settings=chosen)
            assert caught.value.where.startswith(on_s3.url("out"))
        local = s3_spec(sink={"path": settings.directory + "-out"})
        with pytest.raises(UnsafeStore) as caught:
            run(local, settings=s3_settings)
        assert caught.value.where.startswith(on_s3.url("jobs/"))
    finally:
        on_s3.ignored.clear()
    assert on_s3.names() == before


@pytest.mark.parametrize(
    ("fields", "kind", "says"),
    [
        ({"source": {"path": "s3://test-bucket/lak/"}}, "MissingInput", "did you mean lake?"),
        ({"source": {"path": "s3://no-such-bucket/lake/"}}, "MissingInput", "does not exist"),
        ({"sink": {"path": "s3://no-such-bucket/out"}}, "StorageError", "bucket"),
        ({"sink": {"path": "s3://test-bucket/lake/out"}}, "RefusedForSafety", "overlaps with the source"),
        ({"source": {"path": f"s3://me:{SECRET}@test-bucket/lake"}}, "RefusedForSafety", "password"),
        ({"sink": {"path": f"s3://me:{SECRET}@test-bucket/out"}}, "RefusedForSafety", "password"),
    ],
)
def test_spec_issues_are_reported_and_nothing_is_written(
    s3_spec: Make, s3_settings: Settings, on_s3: S3, fields: dict[str, Any], kind: str, says: str
) -> None:
    before = on_s3.names()
    with pytest.raises(PipelineError, match=says) as caught:
        run(s3_spec(**fields), settings=s3_settings)
    assert caught.value.kind == kind
    assert SECRET not in repr(caught.value.to_dict())
    assert on_s3.names() == before


def test_credentials_that_are_refused_are_no_damaged_input(
    s3_spec: Make, s3_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    fetch = s3fs.core.S3File._fetch_range

    def denied(file: Any, start: int, end: int) -> Any:
        if "/lake/" in file.path:
            raise PermissionError("Access Denied")
        return fetch(file, start, end)

    spec = s3_spec()
    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", denied)
    with pytest.raises(StorageError, match="an input file cannot be read") as caught:
        run(spec, settings=s3_settings)
    assert "Access Denied" in caught.value.found


def test_a_job_on_s3_is_queued_served_and_followed(
    s3_spec: Make, s3_settings: Settings, on_s3: S3, lake: Lake, model_path: Path
) -> None:
    queued = submit(s3_spec(), settings=s3_settings, start=False)
    assert submit(s3_spec(), settings=s3_settings, start=False).job == queued.job
    server = Server(s3_settings)
    assert server.serve_once().started == [queued.job]
    assert Server(s3_settings).serve_once().running == [queued.job], "another server sees that it is driven"
    handle = pipeline.attach(queued.job, settings=s3_settings)
    assert handle.wait(timeout=300).status == "SUCCEEDED"
    pd.testing.assert_frame_equal(published(on_s3), expected(lake, model_path), check_exact=True)
    done = [line.partition for line in handle.logs() if "done" in line.message and line.partition]
    assert sorted(done) == [one.id for one in handle.directory.plan.partitions]
    wait_until(lambda: handle.directory.store.exists("starts/1.out"), what="the driver's output was not copied")
    assert server.serve_once().started == []
    assert queued_marks(server.root) == []


def test_job_on_s3_without_driver_is_cancelled(s3_spec: Make, s3_settings: Settings) -> None:
    queued = submit(s3_spec(), settings=s3_settings, start=False)
    handle = pipeline.attach(queued.job, settings=s3_settings)
    assert handle.cancel(reason="no more") is CancelOutcome.CANCELLED
    assert Server(s3_settings).serve_once().started == []
    again = submit(s3_spec(), settings=s3_settings, start=False)
    assert (again.job, again.is_resumed, again.status) == (queued.job, True, Status.QUEUED)
