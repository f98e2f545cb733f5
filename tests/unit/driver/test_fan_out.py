"""The driver of a fan-out: stops, events, and children that fail."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pipeline.driver.fan_out import FanOutDriver, FanOutStop, _ChildEvents, _ChildPool
from pipeline.errors import InfrastructureError, InputError
from pipeline.events import Callback, PartitionEnded
from pipeline.jobs.cancellation import StopReason
from pipeline.settings import Settings


def child(name: str) -> Any:
    return SimpleNamespace(id=f"churn-1.{name}", record=SimpleNamespace(publishes_itself=False))


def failures_of(errors: dict[str, Exception], *names: str) -> tuple[list[str], dict[str, BaseException]]:
    """Run children one after the other. Return those that were run, and the errors by job id."""
    ran: list[str] = []

    def run_child(job: Any, /, **_: Any) -> Any:
        ran.append(job.id)
        if job.id in errors:
            raise errors[job.id]

    parent: Any = SimpleNamespace(id="churn-1")
    lease: Any = SimpleNamespace(is_lost=False)
    driver = FanOutDriver(parent, lease, Settings.load(), (), run_child=run_child)
    pool = _ChildPool(driver, _ChildEvents("churn-1", ()), None)
    return ran, pool.run([child(name) for name in names], width=1)


class TestFanOutStop:
    """A request to stop is forwarded from the fan-out to its children, never back."""

    def test_request_reaches_running_and_later_children(self) -> None:
        stop = FanOutStop()
        first = stop.child_stop()
        assert not first.is_requested
        stop.request(StopReason.SIGNAL, signal_number=15)
        later = stop.child_stop()
        for of_child in (first, later):
            assert of_child.is_requested
            assert (of_child.reason, of_child.signal_number, of_child.now) == (StopReason.SIGNAL, 15, False)
        stop.request(StopReason.SIGNAL, signal_number=15)
        assert first.now
        assert later.now

    def test_request_of_a_child_stays_with_it(self) -> None:
        stop = FanOutStop()
        stop.child_stop().request(StopReason.CANCEL)
        assert not stop.is_requested


class TestChildPool:
    """One thread runs the children one after the other."""

    def test_failed_child_does_not_stop_the_others(self) -> None:
        error = InputError("a column is gone")
        ran, failures = failures_of({"churn-1.at": error}, "at", "de")
        assert ran == ["churn-1.at", "churn-1.de"]
        assert failures == {"churn-1.at": error}

    def test_lost_infrastructure_stops_the_others(self) -> None:
        """Without a cluster, every further child would fail in the same way."""
        ran, failures = failures_of({"churn-1.at": InfrastructureError("no workers")}, "at", "de")
        assert ran == ["churn-1.at"]
        assert list(failures) == ["churn-1.at"]


class TestChildEvents:
    """Callbacks of the fan-out are notified of partitions of its children."""

    def test_partition_is_named_by_child_and_partition(self) -> None:
        events: list[PartitionEnded] = []

        class Recorder(Callback):
            def on_partition(self, event: PartitionEnded) -> None:
                events.append(event)

        ended = PartitionEnded("churn-1.de", 0, "00003", "done", seconds=1.5)
        _ChildEvents("churn-1", (Recorder(),)).on_partition(ended)
        (event,) = events
        assert (event.job, event.partition, event.outcome, event.seconds) == ("churn-1", "de/00003", "done", 1.5)
