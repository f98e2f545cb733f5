"""Requests to stop: the reason that counts, and the error with which a stopped run ends."""

from __future__ import annotations

import pytest

from pipeline.errors import Cancelled, Interrupted, ModelChanged, PipelineError
from pipeline.jobs.cancellation import Stop, StopReason, partitions_left, stop_checks, wait_in_slices


@pytest.mark.parametrize(
    ("asked", "counts"),
    [
        ([StopReason.SIGNAL], StopReason.SIGNAL),
        ([StopReason.ALIAS_CHANGE, StopReason.SIGNAL], StopReason.SIGNAL),
        ([StopReason.SIGNAL, StopReason.ALIAS_CHANGE], StopReason.SIGNAL),
        ([StopReason.CANCEL, StopReason.SIGNAL], StopReason.CANCEL),
        ([StopReason.SIGNAL, StopReason.CANCEL], StopReason.CANCEL),
        ([StopReason.ALIAS_CHANGE, StopReason.CANCEL], StopReason.CANCEL),
    ],
)
def test_the_weightiest_reason_counts(asked: list[StopReason], counts: StopReason) -> None:
    """A cancel outweighs a signal, and a signal outweighs an alias change, in any order."""
    stop = Stop()
    assert not stop.is_requested
    for why in asked:
        stop.request(why, reason=str(why))
    assert stop.is_requested
    assert (stop.why, stop.reason) == (counts, str(counts))
    assert stop.is_cancel is (counts is StopReason.CANCEL)


def test_a_second_signal_means_at_once() -> None:
    """The first signal drains, the second stops at once."""
    stop = Stop()
    stop.request(StopReason.SIGNAL, signal_number=2)
    assert not stop.now
    stop.request(StopReason.SIGNAL, signal_number=2)
    assert stop.now


def test_a_signal_after_another_reason_drains_still() -> None:
    """A first signal after a cancel still drains; a cancel with ``now`` stops at once."""
    stop = Stop()
    stop.request(StopReason.CANCEL)
    stop.request(StopReason.SIGNAL, signal_number=15)
    assert not stop.now
    stop.request(StopReason.CANCEL, now=True)
    assert stop.now


@pytest.mark.parametrize(
    ("why", "kind", "code"),
    [
        (StopReason.SIGNAL, Interrupted, 143),
        (StopReason.CANCEL, Cancelled, 8),
        (StopReason.ALIAS_CHANGE, ModelChanged, 5),
    ],
)
def test_each_reason_has_its_end(why: StopReason, kind: type[PipelineError], code: int) -> None:
    """Each reason has its error, exit code and next command."""
    stop = Stop()
    stop.request(why, signal_number=15 if why is StopReason.SIGNAL else None)
    error = stop.error("job-1", left=3)
    assert type(error) is kind
    assert error.exit_code == code
    assert "3 partitions are left" in str(error)
    assert "resume job-1" in error.next_step


def test_who_waits_for_workers_looks_whether_to_stop() -> None:
    """A wait for workers checks for a stop every second."""
    stop, waits = Stop(), []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            stop.request(StopReason.CANCEL, now=True)
        raise TimeoutError

    def check() -> None:
        if stop.is_requested:
            raise stop.error("job-1", left=1)

    with stop_checks(check), pytest.raises(Cancelled):
        wait_in_slices(wait, timeout=1e9)
    assert waits == [1.0] * 3


def test_a_wait_has_its_end_and_its_success() -> None:
    """A wait in slices returns on success, and raises `TimeoutError` at exactly its timeout."""
    now = [0.0]

    def wait(seconds: float) -> None:
        now[0] += seconds
        if now[0] < 2.5:
            raise TimeoutError

    wait_in_slices(wait, timeout=5.0, clock=lambda: now[0])
    now[0] = 0.0
    with pytest.raises(TimeoutError):
        wait_in_slices(wait, timeout=1.5, clock=lambda: now[0])
    assert now[0] == 1.5


def test_partitions_that_are_left_are_counted_in_english() -> None:
    """One partition is left, two are left."""
    assert (partitions_left(1), partitions_left(2000)) == ("1 partition is left", "2,000 partitions are left")
