"""docs/job-directory.md describes every field of every file of a real job, and no other field."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.common.rows import RowCounts
from pipeline.common.sketch import Sketches
from pipeline.events import PartitionEnded, ProgressMade, notify
from pipeline.execution.task_set import WorkerClass, file_name, save_batch_size
from pipeline.jobs.cancellation import CancelRequest
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.fan_out import FanOutCommit
from pipeline.jobs.layout import GATE_RESULT
from pipeline.jobs.progress_file import ProgressRecord, write_progress
from pipeline.jobs.status import TRANSITIONS, Status
from pipeline.plan.recipe import REJECT_COLUMNS
from pipeline.report.build import make_report
from pipeline.report.distributions import write_sketches
from pipeline.report.estimate import make_estimate, write_estimate
from pipeline.report.gate import GateCheck, GateResult
from pipeline.report.html.page import write_page
from pipeline.report.job_log import record_log
from pipeline.service.queue import Submission, claim_key, claim_start, put_submission
from pipeline.service.servers import ServerRecord
from pipeline.sinks import publish
from pipeline.testing.jobs import open_retry, small_job, write_receipts

PAGE = Path(__file__).parents[2] / "docs" / "job-directory.md"


def documented(heading: str) -> set[str]:
    """First column of the table under ``heading``."""
    _, _, rest = PAGE.read_text().partition(f"# {heading}\n")
    section = re.split(r"^#+ ", rest, maxsplit=1, flags=re.MULTILINE)[0]
    return set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))


@pytest.fixture
def directory(tmp_path: Path) -> JobDirectory:
    job = small_job(tmp_path / "lake", sink=str(tmp_path / "out"), bad_every=10)
    directory = JobDirectory.create(tmp_path / "jobs", job.plan, job="small-1")
    with directory.hold():
        directory.set_status(Status.RUNNING)
        receipts = write_receipts(directory, job)
        directory.set_status(Status.PUBLISHING)
        directory.events.append("published", manifest=1, rows=67)
        publish(directory.manifests.commit(directory.manifests.prepare(directory.ledger(receipts))).manifest, directory)
        directory.set_status(Status.SUCCEEDED_WITH_WARNINGS)
        report = make_report(directory)
        directory.write_report(report.to_dict())
        write_page(directory, report)
        sketches = Sketches()
        sketches.add(pa.table({"score": [0.5], "plan": ["basic"]}))
        write_sketches(directory, sketches)
        result = GateResult("", (GateCheck("score", "mean", 0.5, "from 0 to 1", ok=True),))
        directory.store.replace(GATE_RESULT, json.dumps({"schema_version": 1, **result.to_dict()}).encode())
    with suppress(ValueError), record_log(directory.store, epoch=1) as log:
        notify((log,), PartitionEnded("small-1", 0, "00000", "done", worker="node7:1"))
        raise ValueError("for its traceback")
    put_submission(directory.store, Submission(1, "2026-01-01T12:00:00.000Z", "you@node7", "by hand", "a key"))
    assert claim_start(directory.store, number=1, submission=1, by="submit")
    directory.store.replace("starts/1.out", b"")
    open_retry(directory)
    done = {receipt.partition: receipt for receipt in receipts}
    made = ProgressMade(directory.id, 0, 1, 0, 1, 0)
    write_progress(directory.store, ProgressRecord.make(made, epoch=1, rows_per_second=0.0, seconds_left=None))
    write_estimate(directory, make_estimate(job.plan, done, workers=1, threads=1, start_seconds=1.0, projected=1 << 30))
    directory.store.replace("cancel/1.json", CancelRequest(1, "2026-01-01T12:00:00.000Z", "you@node7").to_json_bytes())
    return directory


@pytest.mark.parametrize(
    ("heading", "name"),
    [
        ("job.json", "job.json"),
        ("rounds/0/receipts/&lt;partition&gt;.json", "rounds/0/receipts/00000.json"),
        ("manifests/&lt;n&gt;.json", "manifests/1.json"),
        ("lease/&lt;epoch&gt;.json", "lease/1.json"),
        ("cancel/&lt;epoch&gt;.json", "cancel/1.json"),
        ("submissions/&lt;n&gt;.json", "submissions/1.json"),
        ("starts/&lt;n&gt;.json", "starts/1.json"),
        (".submitted/&lt;digest of the key&gt;/&lt;n&gt;.json", "key.json"),
        ("rounds/&lt;n&gt;.json", "rounds/1.json"),
        (".batch-rows-&lt;model&gt;-&lt;memory&gt;-&lt;threads&gt;.json", "batch.json"),
        ("report.json", "report.json"),
        ("progress.json", "progress.json"),
        ("sketches.json", "sketches.json"),
        ("gate/result.json", "gate/result.json"),
        ("probe.json", "probe.json"),
    ],
)
def test_fields_of_state(directory: JobDirectory, heading: str, name: str) -> None:
    if name == "key.json":
        directory.store.replace(name, claim_key(directory.store, "a key", directory.id)[0].to_json_bytes())
    if name == "batch.json":
        model, workers = directory.plan.model, WorkerClass(1 << 30, 1)
        save_batch_size(directory.store, model, workers, rows=4096, job=directory.id)
        name = file_name(model, workers)
    assert documented(heading) == set(json.loads(directory.store.read(name)))


@pytest.mark.parametrize("name", ["_manifest.json", "_SUCCESS"])
def test_fields_of_the_output(directory: JobDirectory, name: str) -> None:
    output = Path(directory.plan.spec.sink.path)
    assert documented(name) == set(json.loads((output / name).read_text()))


def test_fields_of_events(directory: JobDirectory) -> None:
    assert documented("events.jsonl") == {field for event in directory.events.read() for field in event}


def test_fields_of_servers(directory: JobDirectory) -> None:
    record = ServerRecord("s", "h", 1, "", "", "", jobs=1)
    assert documented(".servers/&lt;name&gt;.json") == set(json.loads(record.to_json_bytes()))


def test_fields_of_commits_of_fan_outs() -> None:
    record = FanOutCommit(1, "a", RowCounts(), (), "")
    assert documented("commits/&lt;n&gt;.json") == set(json.loads(record.to_json_bytes()))


def test_fields_of_logs(directory: JobDirectory) -> None:
    lines = [json.loads(line) for line in directory.store.read("logs/1.jsonl").splitlines()]
    assert documented("logs/&lt;epoch&gt;.jsonl") == {field for line in lines for field in line}


def test_columns_of_rejects(directory: JobDirectory) -> None:
    assert documented("rounds/0/rejects/*.parquet") == set(REJECT_COLUMNS)
    name = directory.store.list("rounds/0/rejects")[0]
    assert set(REJECT_COLUMNS) < set(pq.read_schema(directory.store.url(f"rounds/0/rejects/{name}")).names)


def test_layout(directory: JobDirectory) -> None:
    drawn = {line.split()[1] for line in PAGE.read_text().splitlines() if line.startswith(("    ├── ", "    └── "))}
    root = Path(directory.root)
    found = {
        str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.parent.parent.name != "0"
    }
    found = {re.sub("[0-9a-f]{16}", "<digest>", name) for name in found}
    found |= {f"{path.relative_to(root)}/" for path in root.glob("rounds/*/*")}
    assert found == drawn


def test_the_table_of_statuses_is_the_one_that_decides() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    drawn = {Status(status): {Status(one) for one in re.findall(r"`([A-Z_]+)`", after)} for status, after in rows}
    assert drawn == TRANSITIONS


def test_every_status_is_explained() -> None:
    page = PAGE.with_name("concepts.md").read_text()
    assert re.findall(r"^\| `([A-Z_]+)` \|", page, re.MULTILINE) == list(Status)
