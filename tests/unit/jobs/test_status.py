"""The transition table: the successors of each status, and an end for every job."""

from __future__ import annotations

import itertools

import pytest

from pipeline.errors import StateCorrupt
from pipeline.jobs.status import TRANSITIONS, Status, check_transition


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Status, Status)))
def test_table_decides(before: Status, after: Status) -> None:
    """A transition in the table is allowed; any other raises `StateCorrupt`."""
    if after in TRANSITIONS[before]:
        assert check_transition(before, after) is after
    else:
        with pytest.raises(StateCorrupt, match=f"{before} -> {after}"):
            check_transition(before, after)


def test_every_status_is_in_the_table() -> None:
    assert set(TRANSITIONS) == set(Status)


def test_success_follows_publishing_only_and_is_left_for_repairs_only() -> None:
    """Only PUBLISHING leads to success, SUCCEEDED is final, and SUCCEEDED_WITH_WARNINGS needs a new run."""
    assert not TRANSITIONS[Status.SUCCEEDED]
    assert not any(after.is_success for after in TRANSITIONS[Status.SUCCEEDED_WITH_WARNINGS])
    for status in Status:
        if status.is_success:
            assert [before for before in Status if status in TRANSITIONS[before]] == [Status.PUBLISHING]


def test_every_unfinished_status_can_be_resumed() -> None:
    for status in Status:
        if not status.is_success:
            assert {Status.PROVISIONING, Status.PUBLISHING, Status.FAILED, Status.INTERRUPTED} <= TRANSITIONS[status]


def test_only_a_probe_goes_back_to_planned() -> None:
    assert [before for before, after in TRANSITIONS.items() if Status.PLANNED in after] == [Status.RUNNING]


def test_final_statuses_are_not_active() -> None:
    """Each status is final, active, PLANNED or QUEUED."""
    final = {status for status in Status if status.is_final}
    ends = {Status.FAILED, Status.CANCELLED, Status.INTERRUPTED, Status.INCOMPLETE, Status.SCORED}
    assert final == ends | {Status.SUCCEEDED, Status.SUCCEEDED_WITH_WARNINGS}
    active = {status for status in Status if status.is_active}
    assert active | final == set(Status) - {Status.PLANNED, Status.QUEUED}


def test_only_what_no_driver_works_on_can_be_queued() -> None:
    """PLANNED, FAILED, CANCELLED, INTERRUPTED and INCOMPLETE jobs can be queued, and no others."""
    assert {before for before in Status if Status.QUEUED in TRANSITIONS[before]} == {
        Status.PLANNED,
        Status.FAILED,
        Status.CANCELLED,
        Status.INTERRUPTED,
        Status.INCOMPLETE,
    }
