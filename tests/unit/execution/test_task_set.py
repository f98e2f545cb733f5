"""The batch size saved across jobs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.common.rows import RowCounts
from pipeline.devices.inventory import Gpu
from pipeline.events import AttemptOutcome, SplitReason
from pipeline.execution.protocols import AttemptResult
from pipeline.execution.task_set import TaskSet, WorkerClass, file_name, load_batch_size, save_batch_size
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.receipts import Receipt
from pipeline.models.model import ModelVersion
from pipeline.storage.local import LocalStore
from pipeline.testing.jobs import small_job

SMALL = WorkerClass(700 << 20, 2)
H200 = Gpu("GPU-1", "NVIDIA H200", 141 << 30, 0)
WORKER = {"memory_limit": 2 << 30, "nthreads": 4}


def ended(tasks: TaskSet, **fields: Any) -> AttemptResult:
    """Return the end of an attempt with a receipt of these fields."""
    partition = tasks.round.plan.partitions[0]
    receipt = Receipt(partition.id, "p", "m", "a", None, None, RowCounts(), (), **fields)
    return AttemptResult(partition, 1, AttemptOutcome.DONE, receipt)


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


class TestBatchOfGpus:
    @pytest.fixture
    def tasks(self, tmp_path: Path) -> TaskSet:
        plan = small_job(tmp_path / "lake", sink=str(tmp_path / "out")).plan
        plan = replace(plan, batch_rows=8192, batch_bytes=1 << 20, device_batch_rows=65_536)
        job = JobDirectory.create(tmp_path / "jobs", plan, job="j")
        return TaskSet(job, job.ledger().rounds[-1], device="auto", device_memory="4 GiB", gpu=H200)

    def test_recipe_has_memory_and_batch_of_the_device(self, tasks: TaskSet) -> None:
        """They change no row: the digest is the same."""
        recipe = tasks.recipe
        assert (recipe.device, recipe.device_memory, recipe.device_batch_rows) == ("auto", "4 GiB", 65_536)
        on_cpu = replace(tasks, device="cpu").recipe
        assert on_cpu.device_batch_rows == 0
        assert on_cpu.digest == recipe.digest

    def test_receipts_of_gpus_and_cpus_are_learned_apart(self, tasks: TaskSet) -> None:
        tasks.adapt_batch(ended(tasks, batch_rows=16_384, device="GPU-1"))
        assert (tasks.recipe.batch_rows, tasks.recipe.device_batch_rows) == (8192, 16_384)
        tasks.adapt_batch(ended(tasks, batch_rows=2048))
        assert (tasks.recipe.batch_rows, tasks.recipe.device_batch_rows) == (2048, 16_384)

    def test_split_for_memory_halves_both(self, tasks: TaskSet) -> None:
        """Which worker died does not say on what it scored."""
        tasks.adapt_batch(replace(ended(tasks), outcome=AttemptOutcome.SPLIT, split_reason=SplitReason.MEMORY))
        assert (tasks.recipe.batch_rows, tasks.recipe.device_batch_rows) == (4096, 32_768)

    def test_next_job_on_such_gpus_remembers_it(self, tasks: TaskSet) -> None:
        client = SimpleNamespace(scheduler_info=lambda n_workers: {"workers": {"a": WORKER}})
        with tasks.learned_batches(client):
            assert tasks.recipe.device_batch_rows == 65_536
            tasks.adapt_batch(ended(tasks, batch_rows=16_384, device="GPU-1"))
        root = Path(tasks.job.root).parent
        assert [path.name for path in root.glob(".batch-rows-*")] == [
            f".batch-rows-{tasks.round.plan.model.digest[:16]}-2048MiB-4-NVIDIA-H200-144384MiB.json"
        ]
        again = replace(tasks)
        with again.learned_batches(client):
            assert (again.recipe.batch_rows, again.recipe.device_batch_rows) == (8192, 16_384)
        other = replace(tasks, gpu=replace(H200, memory=80 << 30))
        with other.learned_batches(client):
            assert other.recipe.device_batch_rows == 65_536

    def test_tasks_wait_in_one_queue_for_workers_with_and_without_gpus(self, tasks: TaskSet) -> None:
        """Else workers get the first ones at once: a fast one has none left while a slow one has two."""
        partitions = tasks.round.plan.partitions[:1]
        for device, is_queued in (("auto", True), ("cuda", False), ("cpu", False)):
            (task,) = replace(tasks, device=device).submit(partitions)
            assert task.dask[task.key].data_producer is is_queued


class TestWorkerClass:
    def test_of_a_gpu_is_a_class_of_its_own(self) -> None:
        on_gpu = SMALL.with_gpu(H200)
        assert on_gpu == WorkerClass(700 << 20, 2, "NVIDIA H200", 141 << 30)
        assert on_gpu.to_dict() == {"memory": 700 << 20, "threads": 2, "gpu": "NVIDIA H200", "gpu_memory": 141 << 30}
        assert SMALL.to_dict() == {"memory": 700 << 20, "threads": 2}

    def test_least_memory_and_most_threads(self) -> None:
        workers = [
            {"memory_limit": 4 << 30, "nthreads": 1},
            {"memory_limit": 0, "nthreads": 4},
            {"memory_limit": 2 << 30, "nthreads": 2},
        ]
        assert WorkerClass.from_scheduler(workers) == WorkerClass(2 << 30, 4)
        assert WorkerClass.from_scheduler([]) == WorkerClass(0, 1)
