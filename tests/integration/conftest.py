"""One process cluster for all integration tests: every worker costs seconds of imports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client

from pipeline.execution.clusters.local import LocalProcesses
from pipeline.settings import Settings


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
