"""One process cluster for all integration tests: every worker costs seconds of imports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from pipeline.execution.clusters.local import LocalProcesses
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.oracle import Lake


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Two worker processes with one thread each."""
    settings = Settings.load(workers=2, threads=1, memory_limit="2 GiB")
    with LocalProcesses(settings).open() as client:
        yield client


@pytest.fixture
def settings(client: Client, tmp_path: Path) -> Settings:
    """Settings that run on the shared cluster, with job directories of the test's own."""
    return Settings.load(
        directory=str(tmp_path / "jobs"), cluster=client.scheduler.address, import_paths=[str(Path(__file__).parent)]
    )


@pytest.fixture
def make_spec(lake: Lake, model_path: Path, tmp_path: Path) -> Callable[..., JobSpec]:
    """A job over `lake`; keyword arguments override top-level fields, ``score`` the fields of the score step."""

    def make(*, score: dict[str, Any] | None = None, maps: tuple[str, ...] = (), **fields: Any) -> JobSpec:
        steps = [*({"map": name} for name in maps), {"score": {"model": str(model_path), **(score or {})}}]
        defaults = {
            "name": "test",
            "source": {"path": str(lake.path)},
            "steps": steps,
            "sink": {"path": str(tmp_path / "out")},
        }
        return JobSpec.build(**{**defaults, **fields})

    return make
