"""Losses of a GPU are counted on its machine, and a worker ends once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.execution import device_loss
from pipeline.execution.device_loss import (
    count_losses,
    leave_after_loss,
    prepare_process,
    record_loss,
    without_lost_device,
)
from pipeline.models.process import ProcessFacts, process_facts, set_process_facts
from pipeline.testing.recipes import make_recipe


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A worker of a scheduler on this machine, which records what its loop is asked for."""
    asked: list[Any] = []
    made = SimpleNamespace(
        local_directory=str(tmp_path / "scratch" / "worker-1"),
        scheduler=SimpleNamespace(address="tcp://1:2"),
        state=SimpleNamespace(nthreads=3),
        loop=SimpleNamespace(add_callback=lambda *_, **options: asked.append(options["is_final"])),
        asked=asked,
    )
    monkeypatch.setattr(device_loss, "get_worker", lambda: made)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = process_facts()
    yield made
    set_process_facts(before)
    if device_loss._leaving.locked():
        device_loss._leaving.release()


@pytest.fixture
def recipe(model_version: Any) -> Any:
    import pyarrow as pa

    schema = pa.schema([(name, pa.float32()) for name in model_version.feature_names])
    return lambda device: make_recipe(model_version, schema, device=device)


@pytest.fixture
def model_version() -> Any:
    from pipeline.models.model import Feature, ModelVersion

    return ModelVersion("m", "1", "m.ubj", "d" * 64, "xgboost", 1, (Feature("a"),), "binary", 1)


def test_facts_of_the_worker_reach_models(worker: Any, tmp_path: Path) -> None:
    prepare_process()
    assert process_facts() == ProcessFacts(3, str(tmp_path / "scratch" / "models"))


def test_process_without_a_worker_is_left_alone(recipe: Any) -> None:
    before = process_facts()
    prepare_process()
    leave_after_loss(recipe("cuda"))
    assert process_facts() == before
    assert without_lost_device(recipe("auto")).device == "auto"


def test_losses_of_several_processes_add_up(tmp_path: Path) -> None:
    path = tmp_path / "lost" / "gpu"
    assert count_losses(path) == 0
    with ThreadPoolExecutor(8) as pool:
        counted = list(pool.map(lambda _: record_loss(path), range(16)))
    assert max(counted) == count_losses(path) == 16


def test_folder_that_cannot_be_written_counts_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert record_loss(tmp_path / "file" / "gpu") == 1


@pytest.mark.parametrize(("device", "second"), [("auto", False), ("cuda", True)])
def test_worker_restarts_first_and_leaves_after_the_second_loss_if_gpus_are_required(
    device: str, second: bool, worker: Any, recipe: Any
) -> None:
    leave_after_loss(recipe(device))
    leave_after_loss(recipe(device))
    assert worker.asked == [False]
    device_loss._leaving.release()
    leave_after_loss(recipe(device))
    assert worker.asked == [False, second]


def test_gpu_that_is_struck_off_is_not_used_again(worker: Any, recipe: Any) -> None:
    assert without_lost_device(recipe("auto")).device == "auto"
    for _ in range(2):
        leave_after_loss(recipe("auto"))
        device_loss._leaving.release()
    assert without_lost_device(recipe("auto")).device == "cpu"
    assert without_lost_device(recipe("cuda")).device == "cuda"
    worker.scheduler = SimpleNamespace(address="tcp://3:4")
    assert without_lost_device(recipe("auto")).device == "auto"


def test_gpus_of_one_machine_are_counted_apart(worker: Any, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        leave_after_loss(recipe("auto"))
        device_loss._leaving.release()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert without_lost_device(recipe("auto")).device == "auto"
