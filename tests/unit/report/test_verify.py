"""Verification: a correct job passes, and each kind of damage is found by its check."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.receipts import Receipt
from pipeline.jobs.rounds import RoundReason, make_record
from pipeline.jobs.status import Status
from pipeline.models.model import Promise
from pipeline.models.registry import resolve
from pipeline.plan.plan import Limits
from pipeline.plan.planner import make_plan
from pipeline.report.same_values import noise_of, same_values, within_noise
from pipeline.report.verify import Verification, verify
from pipeline.scoring.outputs import prediction_schema
from pipeline.scoring.partition import score_partition
from pipeline.sinks import publish
from pipeline.sources import discover
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.model_ref import ModelRef
from pipeline.testing.jobs import open_retry
from pipeline.testing.oracle import Lake, oracle


def make_job(tmp_path: Path, lake: Lake, model_path: Path, **fields: object) -> JobDirectory:
    """A job, done by hand up to its published output."""
    spec = JobSpec.model_validate(
        {
            "name": "churn",
            "source": {"path": str(lake.path), **({"filter": fields["filter"]} if "filter" in fields else {})},
            "steps": [{"score": {"model": str(model_path), "output": "churn"}}],
            "sink": {"path": str(tmp_path / "out")},
            "errors": {"max_fraction": 1.0},
            "contract": fields.get("contract", {}),
        }
    )
    version = resolve(ModelRef.parse(str(model_path)))
    found = discover(spec.source)
    plan = make_plan(
        spec,
        model=version,
        discovery=found,
        predictions=prediction_schema(version, output=spec.score.output_spec),
        limits=Limits(workers=2, threads=2, memory=4 << 30),
    )
    job = JobDirectory.create(tmp_path / "jobs", plan, job="churn-1", options=JobOptions(fsync=False))
    job.set_status(Status.RUNNING)
    for partition in plan.partitions:
        score_partition(job.recipe, partition, plan.versions, worker="w")
    job.set_status(Status.PUBLISHING)
    publish(job.manifests.commit(job.manifests.prepare(job.ledger())).manifest, job)
    job.set_status(Status.SUCCEEDED)
    return job


@pytest.fixture
def job(tmp_path: Path, lake: Lake, model_path: Path) -> JobDirectory:
    return make_job(tmp_path, lake, model_path)


def failed(result: Verification) -> dict[str, str]:
    return {check.name: check.detail for check in result.checks if not check.ok}


def test_a_sound_job(job: JobDirectory, lake: Lake) -> None:
    result = verify(job, sample=500, seed=1)
    assert failed(result) == {}
    assert result.ok
    details = json.loads(json.dumps(result.to_dict()))
    names = [check["name"] for check in details["checks"]]
    assert names == ["partitions", "rows", "input", "checkpoint", "rejects", "manifest", "output", "sample"]
    assert f"{lake.rows:,} in" in details["checks"][1]["detail"]


@pytest.mark.parametrize("seed", range(5))
def test_a_sound_job_with_rejected_and_filtered_rows(tmp_path: Path, lake: Lake, model_path: Path, seed: int) -> None:
    contract = {"age": {"max": 60}}
    job = make_job(tmp_path, lake, model_path, contract=contract, filter="visits >= 2")
    rows = [receipt.rows for receipt in job.receipts.all()]
    assert sum(one.rejected for one in rows) > 0
    assert sum(one.filtered for one in rows) > 0
    result = verify(job, sample=300, seed=seed)
    assert failed(result) == {}


def _edit(job: JobDirectory, change: Callable[[Receipt], Receipt], number: int = 0) -> None:
    receipt = job.receipts.all()[number]
    job.store.replace(f"rounds/0/receipts/{receipt.partition}.json", change(receipt).to_json_bytes())


@pytest.mark.fault(72)
@pytest.mark.parametrize(
    ("spoil", "detail"),
    [
        (
            lambda out: (out / "part-99999-deadbeef-1.parquet").write_bytes(b"PAR1"),
            "1 Parquet file that no publication",
        ),
        (lambda out: (out / "_SUCCESS").unlink(), "no _SUCCESS"),
        (lambda out: (out / "_SUCCESS").write_text("{}"), "_SUCCESS is of another state"),
    ],
)
def test_files_that_readers_would_count_wrongly_are_found(
    tmp_path: Path, job: JobDirectory, spoil: Callable[[Path], object], detail: str
) -> None:
    """A stray file, and a mark of success that is missing or of another state, fail the check of the output."""
    spoil(tmp_path / "out")
    wrong = failed(verify(job, sample=10, seed=1))
    assert wrong.keys() == {"output"}
    assert detail in wrong["output"]


def test_missing_receipt(job: JobDirectory) -> None:
    job.store.remove(f"rounds/0/receipts/{job.receipts.all()[0].partition}.json")
    assert {"partitions", "rows", "manifest"} <= set(failed(verify(job, sample=10, seed=1)))


def test_receipt_for_other_rows(job: JobDirectory) -> None:
    def shifted(receipt: Receipt) -> Receipt:
        first = receipt.files[0]
        return replace(receipt, files=(replace(first, row_start=first.row_start + 1), *receipt.files[1:]))

    _edit(job, shifted)
    assert "other rows" in failed(verify(job, sample=0))["partitions"]


def test_lost_row(job: JobDirectory) -> None:
    def lost(receipt: Receipt) -> Receipt:
        return replace(receipt, rows=replace(receipt.rows, output=receipt.rows.output - 1))

    _edit(job, lost)
    assert {"rows", "checkpoint"} <= set(failed(verify(job, sample=0)))


def test_receipt_of_another_model(job: JobDirectory) -> None:
    _edit(job, lambda receipt: replace(receipt, model="0" * 64))
    assert "another model" in failed(verify(job, sample=0))["partitions"]


def test_flipped_bit_in_a_checkpoint(job: JobDirectory) -> None:
    receipt = job.receipts.all()[0]
    assert receipt.data
    name = f"rounds/0/{receipt.data.name}"
    data = bytearray(job.store.read(name))
    data[len(data) // 2] ^= 1
    job.store.replace(name, bytes(data))
    assert "checksum xxh3-128:" in failed(verify(job, sample=0))["checkpoint"]


def test_missing_checkpoint(job: JobDirectory) -> None:
    receipt = job.receipts.all()[0]
    assert receipt.data
    job.store.remove(f"rounds/0/{receipt.data.name}")
    assert "missing" in failed(verify(job, sample=0))["checkpoint"]


def test_removed_and_damaged_output(job: JobDirectory, tmp_path: Path) -> None:
    files = sorted((tmp_path / "out").glob("*.parquet"))
    data = files[0].read_bytes()
    files[0].unlink()
    assert "missing" in failed(verify(job, sample=0))["output"]
    files[0].write_bytes(data[:-9] + b"X" + data[-8:])
    assert "checksum xxh3-128:" in failed(verify(job, sample=0))["output"]
    (tmp_path / "out" / "_manifest.json").unlink()
    assert "does not list" in failed(verify(job, sample=0))["output"]


def test_other_scores_are_found_by_the_sample(job: JobDirectory) -> None:
    """Receipts and checksums agree; only scoring again tells that a score is wrong."""
    receipt = job.receipts.all()[0]
    assert receipt.data
    name = f"rounds/0/{receipt.data.name}"
    table = pq.read_table(job.store.url(name))
    score = pa.array(1 - table.column("churn").to_numpy(), pa.float32())
    pq.write_table(table.set_column(table.schema.get_field_index("churn"), "churn", score), job.store.url(name))
    assert "churn" in failed(verify(job, sample=2000, seed=1))["sample"]


def test_changed_model_is_found(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    from pipeline.models.cache import forget_models

    own = tmp_path / "own.ubj"
    own.write_bytes(model_path.read_bytes())
    job = make_job(tmp_path, lake, own)
    own.write_bytes(model_path.read_bytes() + b" ")
    forget_models()
    assert "sample" in failed(verify(job, sample=10, seed=1))


def test_changed_input_is_said_and_not_compared(job: JobDirectory, lake: Lake) -> None:
    os.utime(lake.files[0], ns=(1, 1))
    result = verify(job, sample=200, seed=1)
    assert failed(result) == {}
    assert "1 have been changed" in {check.name: check.detail for check in result.checks}["input"]
    for file in lake.files:
        os.utime(file, ns=(1, 1))
    assert set(failed(verify(job, sample=200, seed=1))) == {"sample"}


def test_an_unfinished_job(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    made = make_job(tmp_path, lake, model_path)
    job = JobDirectory.create(tmp_path / "jobs", made.plan, job="new-1", options=JobOptions(fsync=False))
    wrong = failed(verify(job, sample=10, seed=1))
    assert {"partitions", "rows", "manifest", "output"} <= set(wrong)
    assert "not done" in wrong["partitions"]


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        (pa.array([1.0, None, float("nan")]), pa.array([1.0, None, float("nan")]), True),
        (pa.array([1.0, None]), pa.array([None, 1.0]), False),
        (pa.array([0.0]), pa.array([-0.0]), False),
        (pa.array([1], pa.int32()), pa.array([1], pa.int64()), False),
        (pa.array([[1.0, float("nan")]]), pa.array([[1.0, float("nan")]]), True),
        (pa.array(["b", "a"]).dictionary_encode(), pa.array(["a", "b"]).dictionary_encode().take([1, 0]), True),
    ],
)
def test_same_values(one: pa.Array, other: pa.Array, is_same: bool) -> None:
    assert same_values(pa.chunked_array([one]), pa.chunked_array([other])) is is_same


def retry_without_contract(job: JobDirectory) -> None:
    """A round by hand that tries the rejected rows again with nothing asked of them."""
    opened = open_retry(job)
    plan = replace(opened.plan, score_rules=())
    supersedes = {1: [partition.id for partition in opened.plan.partitions]}
    made = make_record(plan, number=2, reason=RoundReason.RETRY, epoch=1, created="", supersedes=supersedes)
    recipe = job.recipe_of(job.rounds.open(made, plan))
    for partition in plan.partitions:
        score_partition(recipe, partition, plan.versions, worker="w")
    job.manifests.commit(job.manifests.prepare(job.ledger()))


def test_rows_that_were_rejected_and_came_out_later(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    job = make_job(tmp_path, lake, model_path, contract={"age": {"max": 60}}, filter="id >= 5")
    before = job.ledger().rows
    assert before.rejected > 1000
    retry_without_contract(job)
    assert job.ledger().rows == replace(before, output=before.output + before.rejected, rejected=0)
    result = verify(job, sample=5000, seed=1)
    assert set(failed(result)) <= {"output"}
    assert f"{before.rejected:,} rejected rows were retried" in result.checks[0].detail
    manifest = job.manifests.last()
    assert manifest is not None
    found = pa.concat_tables([pq.read_table(job.store.url(file.name)) for file in manifest.files]).sort_by("id")
    expected = oracle(lake.files, model_path, output="churn").query("id >= 5").reset_index(drop=True)
    pd.testing.assert_frame_equal(found.to_pandas(ignore_metadata=True), expected)


def test_row_retried_twice_is_found(tmp_path: Path, lake: Lake, model_path: Path) -> None:
    job = make_job(tmp_path, lake, model_path, contract={"age": {"max": 60}})
    retry_without_contract(job)
    place = job.store.list("rounds/2/receipts")[0]
    receipt = next(one for one in job.receipts.all() if one.round == 2)
    part = receipt.files[0]
    twice = replace(part, row_stop=part.row_stop + 1)
    job.store.replace(f"rounds/2/receipts/{place}", replace(receipt, files=(twice, *receipt.files[1:])).to_json_bytes())
    assert "partitions" in failed(verify(job, sample=0))


@pytest.mark.parametrize(
    ("one", "other", "noise", "expected"),
    [
        ([1.0, None], [1.0 + 1e-7, None], 1e-6, True),
        ([1.0, None], [1.0 + 1e-5, None], 1e-6, False),
        ([1.0, None], [1.0, 2.0], 1e-6, False),
        ([1.0, 2.0], [1.0 + 1e-7, 2.0], 0.0, False),
        ([1, 2], [1, 3], 5.0, False),
        (["a"], ["b"], 1.0, False),
        ([[1.0, 2.0], None], [[1.0, 2.0 + 1e-7], None], 1e-6, True),
        ([[1.0, 2.0], None], [[1.0, 2.1], None], 1e-6, False),
    ],
)
def test_within_noise(one: list, other: list, noise: float, expected: bool) -> None:
    is_list = isinstance(one[0], list)
    kind = pa.list_(pa.float64(), 2) if is_list else None
    columns = [pa.chunked_array([pa.array(values, type=kind)]) for values in (one, other)]
    assert within_noise(*columns, noise) is expected


def test_noise_is_that_of_models_without_a_promise() -> None:
    def score(output: str, *promise: Any) -> Any:
        return SimpleNamespace(model=SimpleNamespace(promise=Promise(*promise) if promise else None), outputs=(output,))

    scores = [score("a"), score("b", "fixed", 32, 1e-3), score("c", "code", 0, 1e-6), score("c", "code", 0, 1e-5)]
    assert noise_of(SimpleNamespace(scores=scores)) == {"c": 1e-5}  # type: ignore[arg-type]
