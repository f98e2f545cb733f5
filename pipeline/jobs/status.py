"""`Status` of a job and the table of its transitions."""

from __future__ import annotations

from enum import StrEnum

from pipeline.errors import BudgetExhausted, Cancelled, Interrupted, StateCorrupt


class Status(StrEnum):
    """Status of a job."""

    PLANNED = "PLANNED"
    """The plan is stored; nothing runs."""
    QUEUED = "QUEUED"
    """Submitted; waits for a driver."""
    PROVISIONING = "PROVISIONING"
    """Waiting for workers."""
    RUNNING = "RUNNING"
    """Partitions are being scored."""
    SCORED = "SCORED"
    """A child of a fan-out: every partition is done. The parent publishes the child once all children are scored."""
    PUBLISHING = "PUBLISHING"
    """Every partition is done. The manifest is committed next, then the sink publishes the output."""
    SUCCEEDED = "SUCCEEDED"
    SUCCEEDED_WITH_WARNINGS = "SUCCEEDED_WITH_WARNINGS"
    """Every row is accounted for, and some were rejected, within ``errors.max_fraction``."""
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    """Cancelled by a user; a resume is still possible."""
    INTERRUPTED = "INTERRUPTED"
    """Stopped by a signal; the driver shut down cleanly. A resume continues."""
    INCOMPLETE = "INCOMPLETE"
    """Stopped because the budget is used up. A resume with a larger budget continues."""

    @property
    def is_success(self) -> bool:
        """True if the output was published."""
        return self in (Status.SUCCEEDED, Status.SUCCEEDED_WITH_WARNINGS)

    @property
    def is_final(self) -> bool:
        """True if no driver runs the job, and none will until a user asks for one."""
        return self.is_success or self in _ENDS or self is Status.SCORED

    @property
    def is_active(self) -> bool:
        """True if a driver runs the job, or did until the driver died."""
        return self in _ACTIVE


_ACTIVE = frozenset({Status.PROVISIONING, Status.RUNNING, Status.PUBLISHING})
_ENDS = frozenset({Status.FAILED, Status.CANCELLED, Status.INTERRUPTED, Status.INCOMPLETE})
_GOES_ON = _ACTIVE | _ENDS | {Status.SCORED}

# A killed driver leaves its status behind. The next driver starts over at PROVISIONING, or at PUBLISHING if the
# manifest exists. Every active status may therefore change to each of these. A job that ended without success
# continues when it is resumed, and returns to QUEUED when it is submitted again. A job that succeeded with warnings
# continues when its rejected rows or quarantined files are retried.
TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.PLANNED: _GOES_ON | {Status.QUEUED},
    Status.QUEUED: _GOES_ON,
    Status.PROVISIONING: _GOES_ON,
    # A probe scores a few partitions, and leaves the job planned.
    Status.RUNNING: _GOES_ON | {Status.PLANNED},
    Status.SCORED: _GOES_ON,
    Status.PUBLISHING: _GOES_ON | {Status.SUCCEEDED, Status.SUCCEEDED_WITH_WARNINGS},
    Status.FAILED: _GOES_ON | {Status.QUEUED},
    Status.CANCELLED: _GOES_ON | {Status.QUEUED},
    Status.INTERRUPTED: _GOES_ON | {Status.QUEUED},
    Status.INCOMPLETE: _GOES_ON | {Status.QUEUED},
    Status.SUCCEEDED: frozenset(),
    Status.SUCCEEDED_WITH_WARNINGS: _GOES_ON,
}


def check_transition(before: Status, after: Status, *, is_open: bool = False) -> Status:
    """Return ``after`` if the table allows it after ``before``.

    :param is_open: True for a job that succeeded and has a round, or a child, that has not ended since.

    :raises StateCorrupt: when it does not.
    """
    allowed = _GOES_ON if is_open else TRANSITIONS[before]
    if after not in allowed:
        raise StateCorrupt(
            "invalid status transition",
            found=f"{before} -> {after}",
            expected=" or ".join(sorted(allowed)) or "no further change",
        )
    return after


def status_after(error: BaseException) -> Status:
    """Return the status of a job whose run raised ``error``."""
    if isinstance(error, Cancelled):
        return Status.CANCELLED
    if isinstance(error, BudgetExhausted):
        return Status.INCOMPLETE
    return Status.INTERRUPTED if isinstance(error, (Interrupted, KeyboardInterrupt)) else Status.FAILED
