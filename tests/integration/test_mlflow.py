"""Jobs whose model comes from a real MLflow: an sqlite database, and a tracking server that hides its artefacts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InfrastructureError, ModelChanged
from pipeline.events import Callback, PartitionEnded
from pipeline.models.registry import open_registry
from pipeline.runner import resume, run
from pipeline.scoring.isolated_process import die_with_parent
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.model_ref import ModelRef
from pipeline.testing.oracle import Lake, make_lake, oracle, train_model
from pipeline.testing.processes import wait_until

# What MLflow and what it stands on warn of is theirs to fix.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
NAME = "Churn Model"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [train_model(folder / f"m{number}.ubj", rounds=4 + 3 * number) for number in range(2)]


def log(uri: str, models: list[Path], **options: Any) -> None:
    """Log both models to MLflow, as two versions of one registered model; ``champion`` is the first."""
    xgboost = pytest.importorskip("xgboost")
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("mlflow.xgboost")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        experiment = mlflow.create_experiment("tests", **options)
        for model in models:
            with mlflow.start_run(experiment_id=experiment):
                mlflow.xgboost.log_model(
                    xgboost.Booster(model_file=str(model)),
                    name="model",
                    registered_model_name=NAME,
                    pip_requirements=["xgboost"],
                )
        mlflow.MlflowClient().set_registered_model_alias(NAME, "champion", "1")
    finally:
        mlflow.set_tracking_uri(before)


@pytest.fixture
def database(tmp_path: Path, models: list[Path]) -> str:
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    log(uri, models, artifact_location=str(tmp_path / "artifacts"))
    return uri


@pytest.fixture
def four_file_lake(tmp_path: Path) -> Lake:
    return make_lake(tmp_path / "lake", rows=(3000, 3000, 2000, 2000), row_group=500)


class Mover(Callback):
    """Moves the alias when the first partition is done."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.has_moved = False

    def on_partition(self, event: PartitionEnded) -> None:
        if not self.has_moved:
            self.has_moved = True
            open_registry(self.uri).set_alias(NAME, "champion", 2)


def assert_published(out: Path, four_file_lake: Lake, model: Path, version: str) -> None:
    files = sorted(out.glob("*.parquet"))
    named = [json.loads(pq.read_schema(file).metadata[b"pipeline.model"]) for file in files]
    assert {(one["name"], one["version"], one["uri"]) for one in named} == {
        (NAME, version, f"models:/{NAME}/{version}")
    }
    found = pd.concat([pq.read_table(file).to_pandas() for file in files], ignore_index=True)
    expected = oracle(four_file_lake.files, model)
    pd.testing.assert_frame_equal(found.sort_values("id", ignore_index=True), expected, check_exact=True)


@pytest.mark.parametrize(("policy", "version"), [("pin", 1), ("restart", 2)])
def test_a_job_with_a_model_of_mlflow(
    policy: str,
    version: int,
    make_spec: Callable[..., JobSpec],
    settings: Settings,
    database: str,
    four_file_lake: Lake,
    models: list[Path],
    tmp_path: Path,
) -> None:
    spec = make_spec(lake=four_file_lake, on_alias_change=policy, score={"model": f"models:/{NAME}@champion"})
    report = run(spec, settings=replace(settings, registry=database, alias_poll=0.001), callbacks=[Mover(database)])
    assert_published(tmp_path / "out", four_file_lake, models[version - 1], str(version))
    assert any("version 1" in text for text in report.warnings)
    assert not (Path(settings.directory) / ".models").exists(), "a file that workers can read is not copied"


@pytest.fixture
def server(tmp_path: Path, models: list[Path]) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A tracking server whose artefacts only itself can read."""
    for package in ("mlflow", "flask", "uvicorn", "sqlalchemy"):
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"--backend-store-uri": f"sqlite:///{tmp_path}/server.db", "--artifacts-destination": str(tmp_path / "a")}
    where = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with open(tmp_path / "server.log", "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *where, *(word for pair in options.items() for word in pair)],
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: is_up(uri) or process.poll() is not None, seconds=240, what="no MLflow server")
        assert process.poll() is None, (tmp_path / "server.log").read_text()
        log(uri, models)
        yield uri, process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)


def is_up(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.slow
def test_a_tracking_server_that_comes_and_goes(
    make_spec: Callable[..., JobSpec],
    settings: Settings,
    server: tuple[str, subprocess.Popen[bytes]],
    four_file_lake: Lake,
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri, process = server
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    root = f"mlflow+{uri}"
    spec = make_spec(lake=four_file_lake, on_alias_change="fail", score={"model": f"models:/{NAME}@champion"})
    settings = replace(settings, registry=root, alias_poll=0.001)
    with pytest.raises(ModelChanged):
        run(spec, settings=settings, callbacks=[Mover(root)])
    version = open_registry(root, cache=settings.directory).resolve(ModelRef(f"models:/{NAME}/1"))
    assert Path(version.uri) == Path(settings.directory, ".models", version.digest), "kept where workers read it"
    open_registry(root).set_alias(NAME, "champion", 1)
    stop(process)
    with pytest.raises(InfrastructureError, match="MLflow cannot be asked"):
        resume("@last", settings=settings)
    assert not (tmp_path / "out").exists(), "fail does not commit without an answer"
    with pytest.raises(InfrastructureError):
        run(spec, settings=settings)
