"""`Status` of a job and the table of its transitions."""

from __future__ import annotations

from enum import StrEnum

from pipeline.errors import StateCorrupt


class Status(StrEnum):
    """Where a job is in its life."""

    PLANNED = "PLANNED"
    """The plan is stored; nothing runs."""
    PROVISIONING = "PROVISIONING"
    """Waiting for workers."""
    RUNNING = "RUNNING"
    """Partitions are being scored."""
    PUBLISHING = "PUBLISHING"
    """The manifest is committed; the sink takes the output over."""
    SUCCEEDED = "SUCCEEDED"
    SUCCEEDED_WITH_WARNINGS = "SUCCEEDED_WITH_WARNINGS"
    """Every row is accounted for, and some were rejected, within ``errors.max_fraction``."""
    FAILED = "FAILED"
    INTERRUPTED = "INTERRUPTED"
    """A signal ended the driver in good order; resume goes on."""

    @property
    def is_success(self) -> bool:
        """Whether the output was published."""
        return self in (Status.SUCCEEDED, Status.SUCCEEDED_WITH_WARNINGS)

    @property
    def is_final(self) -> bool:
        """Whether no driver works on the job."""
        return self in (Status.SUCCEEDED, Status.SUCCEEDED_WITH_WARNINGS, Status.FAILED, Status.INTERRUPTED)


_ACTIVE = {Status.PROVISIONING, Status.RUNNING, Status.PUBLISHING}
_ENDS = {Status.FAILED, Status.INTERRUPTED}

# A driver that was killed leaves the status it was in; the next one starts over at PROVISIONING (or PUBLISHING, when
# the manifest is there), which is why every active status may go to each of these.
TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.PLANNED: frozenset({Status.PROVISIONING, Status.RUNNING, Status.PUBLISHING, *_ENDS}),
    Status.PROVISIONING: frozenset({Status.PROVISIONING, Status.RUNNING, Status.PUBLISHING, *_ENDS}),
    Status.RUNNING: frozenset({Status.PROVISIONING, Status.RUNNING, Status.PUBLISHING, *_ENDS}),
    Status.PUBLISHING: frozenset({*_ACTIVE, Status.SUCCEEDED, Status.SUCCEEDED_WITH_WARNINGS, *_ENDS}),
    Status.FAILED: frozenset({Status.PROVISIONING, Status.RUNNING, Status.PUBLISHING, *_ENDS}),
    Status.INTERRUPTED: frozenset({Status.PROVISIONING, Status.RUNNING, Status.PUBLISHING, *_ENDS}),
    Status.SUCCEEDED: frozenset(),
    Status.SUCCEEDED_WITH_WARNINGS: frozenset(),
}


def check_transition(before: Status, after: Status) -> Status:
    """``after``, when the table allows to go there from ``before``.

    :raises StateCorrupt: when it does not.
    """
    if after not in TRANSITIONS[before]:
        raise StateCorrupt(
            "a job cannot change its status like that",
            found=f"{before} -> {after}",
            expected=" or ".join(sorted(TRANSITIONS[before])) or "no further change",
        )
    return after
