"""The batch size saved across jobs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.execution.task_set import TaskSet, WorkerClass, file_name, load_batch_size, save_batch_size
from pipeline.jobs.directory import JobDirectory
from pipeline.models.model import ModelVersion
from pipeline.storage.local import LocalStore
from pipeline.testing.jobs import small_job

SMALL = WorkerClass(700 << 20, 2)


@pytest.fixture
def model(tmp_path: Path) -> ModelVersion:
    return small_job(tmp_path / "lake", sink=str(tmp_path / "out")).plan.model


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "jobs")


class TestSavedBatchSize:
    def test_is_loaded_for_the_same_model_and_worker_class(self, store: LocalStore, model: ModelVersion) -> None:
        assert load_batch_size(store, model, SMALL) is None
        save_batch_size(store, model, SMALL, rows=4096, job="one")
        save_batch_size(store, model, SMALL, rows=2048, job="two")
        assert load_batch_size(store, model, SMALL) == 2048
        assert load_batch_size(store, model, WorkerClass(701 << 20, 2)) is None
        assert load_batch_size(store, model, WorkerClass(700 << 20, 1)) is None

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "null", '{"batch_rows": 5}', '{"schema_version": 2, "batch_rows": 5, "model": {}}']
    )
    def test_damaged_file_is_ignored(self, store: LocalStore, model: ModelVersion, text: str) -> None:
        store.replace(file_name(model, SMALL), text.encode())
        assert load_batch_size(store, model, SMALL) is None

    @pytest.mark.parametrize(
        "wrong", [{"batch_rows": 0}, {"batch_rows": -4}, {"batch_rows": None}, {"schema_version": 2}]
    )
    def test_invalid_value_is_ignored(self, store: LocalStore, model: ModelVersion, wrong: dict[str, object]) -> None:
        save_batch_size(store, model, SMALL, rows=4096, job="one")
        record = json.loads(store.read(file_name(model, SMALL)))
        store.replace(file_name(model, SMALL), json.dumps({**record, **wrong}).encode())
        assert load_batch_size(store, model, SMALL) is None

    def test_unwritable_root_is_ignored(self, tmp_path: Path, model: ModelVersion) -> None:
        (tmp_path / "jobs").write_text("no folder")
        save_batch_size(LocalStore(tmp_path / "jobs"), model, SMALL, rows=4096, job="one")
        assert load_batch_size(LocalStore(tmp_path / "jobs"), model, SMALL) is None


class TestBatchOfTheNextPartitions:
    def test_bytes_shrink_with_the_rows(self, tmp_path: Path) -> None:
        """Rows that are wider than planned are limited by bytes: fewer rows alone would change nothing."""
        plan = small_job(tmp_path / "lake", sink=str(tmp_path / "out")).plan
        plan = replace(plan, batch_rows=8192, batch_bytes=1 << 20)
        job = JobDirectory.create(tmp_path / "jobs", plan, job="j")
        tasks = TaskSet(job, job.ledger().rounds[-1])
        assert (tasks.recipe.batch_rows, tasks.recipe.batch_bytes) == (8192, 1 << 20)
        tasks.batch = tasks.batch.after_split()
        assert (tasks.recipe.batch_rows, tasks.recipe.batch_bytes) == (4096, 1 << 19)


class TestWorkerClass:
    def test_least_memory_and_most_threads(self) -> None:
        workers = [
            {"memory_limit": 4 << 30, "nthreads": 1},
            {"memory_limit": 0, "nthreads": 4},
            {"memory_limit": 2 << 30, "nthreads": 2},
        ]
        assert WorkerClass.from_scheduler(workers) == WorkerClass(2 << 30, 4)
        assert WorkerClass.from_scheduler([]) == WorkerClass(0, 1)
