"""Take a finished local job back to the state that a killed driver leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.status import Status


def rewind(job: JobDirectory, *, receipts: int) -> tuple[str, ...]:
    """Remove what ``job`` wrote after its first receipts, as if its driver had been killed there.

    Receipts beyond the first ones, manifests, the report, the published output and the events after the start of the
    run are removed; data files stay, as those of an attempt without a receipt would. The job must be on local disk.

    :param receipts: number of receipts of round 0 to keep, in the order of partitions.
    :return: ids of the partitions that are to be scored again.
    """
    done = sorted(receipt.partition for receipt in job.receipts.all())
    lost = tuple(done[receipts:])
    for partition in lost:
        job.store.remove(f"rounds/0/receipts/{partition}.json")
    folder = Path(job.root)
    for path in (*(folder / "manifests").iterdir(), folder / "report.json"):
        path.unlink()
    events = folder / "events.jsonl"
    lines = events.read_text(encoding="utf-8").splitlines(keepends=True)
    running = next(n for n, line in enumerate(lines) if json.loads(line).get("after") == Status.RUNNING)
    events.write_text("".join(lines[: running + 1]), encoding="utf-8")
    shutil.rmtree(job.record.sink)
    return lost
