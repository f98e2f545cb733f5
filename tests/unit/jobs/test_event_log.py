"""Events: one object a driver on object stores, and no word of a driver that has lost the job."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import Fenced
from pipeline.jobs.event_log import EventLog, last_status
from pipeline.jobs.lease import acquire_lease
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import unique_name


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A job directory on a file system, and one on an object store."""
    return open_store(str(tmp_path / "job") if request.param == "file" else f"memory://{unique_name()}/job")


def status(after: str, **fields: object) -> dict[str, object]:
    return {"event": "status", "after": after, **fields}


@pytest.mark.fault(62)
class TestEventLog:
    def test_two_drivers_lose_nothing(self, store: Store) -> None:
        """The older driver writes between two events of the newer one; an object store replaces whole objects."""
        first, second = EventLog(store), EventLog(store)
        first.append("status", after="PLANNED")
        old = acquire_lease(store)
        first.acquired(old)
        first.append("status", after="RUNNING")
        old.release()
        second.acquired(acquire_lease(store))
        second.append("status", after="SUCCEEDED")
        assert [(event["after"], event.get("epoch")) for event in EventLog(store).read()] == [
            ("PLANNED", None),
            ("RUNNING", 1),
            ("SUCCEEDED", 2),
        ]

    def test_a_driver_that_has_lost_the_job_writes_nothing(self, store: Store) -> None:
        """Not even that a round has started."""
        log = EventLog(store)
        old = acquire_lease(store)
        log.acquired(old)
        old.release()
        acquire_lease(store)
        with pytest.raises(Fenced):
            log.append("round_started", round=1)
        assert log.read() == []


@pytest.mark.fault(62)
@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], None),
        ([{"event": "driver", "epoch": 1}], None),
        ([status("PLANNED"), status("RUNNING", epoch=1)], "RUNNING"),
        # A paused driver that passed its check writes after its successor.
        ([status("RUNNING", epoch=1), status("SUCCEEDED", epoch=2), status("RUNNING", epoch=1)], "SUCCEEDED"),
        ([status("RUNNING", epoch=1), {"event": "driver", "epoch": 2}, status("FAILED", epoch=1)], "RUNNING"),
        ([status("FAILED", epoch=1), status("QUEUED", epoch=2), status("CANCELLED", epoch=3)], "CANCELLED"),
        ([status("SUCCEEDED", epoch=1), status("nonsense", epoch=1)], "SUCCEEDED"),
    ],
)
def test_last_status_is_of_the_highest_epoch(events: list[dict[str, object]], expected: str | None) -> None:
    last = last_status(events)
    assert (last["after"] if last else None) == expected
