"""Triggers with files, and their log, in a bucket."""

from __future__ import annotations

import io
import time
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.service.triggers.arrivals import decide_arrival
from pipeline.service.triggers.evaluate import evaluate_trigger, scan_in_process
from pipeline.service.triggers.log import Firing, open_log
from pipeline.spec.triggers import ArrivalTrigger, Trigger
from pipeline.testing.s3 import S3


class Jobs:
    """Jobs that are done at once."""

    def __init__(self) -> None:
        self.made: dict[str, Firing] = {}

    def submit(self, firing: Firing) -> str:
        self.made.setdefault(firing.id, firing)
        return f"job-{firing.id}"

    def ended(self, job: str) -> str:
        return "SUCCEEDED"

    def cancel(self, job: str) -> None:
        raise AssertionError("nothing is cancelled")

    def successes(self, name: str) -> list:
        return []


def put(s3: S3, key: str) -> None:
    content = io.BytesIO()
    pq.write_table(pa.table({"x": [1, 2, 3]}), content)
    s3.client().put_object(Bucket=s3.bucket, Key=key, Body=content.getvalue())


def test_objects_that_arrive(s3: S3) -> None:
    before = time.time()
    put(s3, "landing/day=1/a.parquet")
    put(s3, "landing/day=2/b.parquet")
    s3.client().put_object(Bucket=s3.bucket, Key="landing/day=1/_SUCCESS", Body=b"")
    arrival = ArrivalTrigger(path=s3.url("landing/"), marker="_SUCCESS", rows=3)
    found = scan_in_process(arrival, seen=())
    assert [(one.path.rpartition("/")[2], one.is_marked, one.rows) for one in found] == [
        ("a.parquet", True, 3),
        ("b.parquet", False, 3),
    ]
    assert all(before - 5 < one.modified < time.time() + 5 for one in found)
    assert all(one.version.startswith("etag:") for one in found)
    due = decide_arrival(arrival, found, seen=(), now=datetime.now(UTC))
    assert [one.path for one in due.files] == [s3.url("landing/day=1/a.parquet")]


def test_a_log_in_a_bucket(s3: S3) -> None:
    root, jobs = s3.url("jobs"), Jobs()
    trigger = Trigger(every="1 h")
    begin = datetime(2026, 1, 1, 0, 30, tzinfo=UTC)
    for hours in (0, 1, 1, 2):
        moment = begin + timedelta(hours=hours)
        # Another server every time.
        evaluate_trigger(trigger, open_log(root, "hourly"), jobs=jobs, clock=lambda moment=moment: moment)
    assert list(jobs.made) == ["20260101T010000Z", "20260101T020000Z"]
    assert open_log(root, "hourly").read().fired == 2
