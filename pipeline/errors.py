"""Errors that this package raises on purpose.

The tree is grouped by what a handler does next; the number is the exit code::

    PipelineError                      1   internal: a defect of this package
    ├── SpecError                      2   fix the job spec or the command line
    │   ├── EnvMismatch                2   run the same versions on driver and workers
    │   └── NoDevice                   2   run it where there is a GPU, or with device: auto
    ├── InputError                     4   fix the input data
    │   ├── MissingInput               4
    │   ├── CorruptInput               4
    │   ├── SchemaDrift                4
    │   ├── InputChanged               4
    │   ├── TooManyRejects             4
    │   └── GateFailed                 4
    ├── UserCodeError                  5   fix the step or the model
    │   ├── StepFailed                 5
    │   │   └── StepChanged            5
    │   ├── BadPrediction              5
    │   ├── OutOfMemory                5
    │   │   └── DeviceOutOfMemory      5
    │   ├── PartitionFailed            5
    │   ├── PartitionTimeout           5
    │   ├── PartitionStuck             5
    │   ├── InsufficientMemory         5
    │   └── ModelError                 5
    │       ├── ModelDigestMismatch    5
    │       └── ModelChanged           5
    ├── ChildrenFailed                 5   children of a fan-out failed: resume
    ├── ConflictError                  6   another process or job owns the path; decide which one stays
    │   ├── JobLocked                  6
    │   ├── Fenced                     6
    │   ├── PlanMismatch               6
    │   ├── OutputExists               6
    │   ├── OutputConflict             6
    │   ├── StateCorrupt               6
    │   └── UnsafeStore                6
    ├── RefusedForSafety               7   allow it explicitly, or leave it
    ├── StorageError                  74   fix the storage, then resume
    │   ├── DiskFull                  74
    │   └── ReconciliationFailed      74
    ├── InfrastructureError           75   resume
    │   ├── NoWorkers                 75
    │   ├── SchedulerLost             75
    │   ├── SchedulerUnresponsive     75
    │   ├── DriverLost                75
    │   ├── EndpointUnavailable       75
    │   └── DeviceLost                75
    ├── BudgetExhausted                9   raise the budget, then resume
    ├── Cancelled                      8   a user cancelled the job; resume if that was a mistake
    └── Interrupted              128 + n   a signal stopped the driver: resume

Some are also the builtin that fits: `SpecError`, `SchemaDrift` and `BadPrediction` are ValueErrors, `MissingInput` is a
FileNotFoundError and `OutputExists` a FileExistsError. None is a TimeoutError: that is kept for ``JobHandle.wait``,
whose job is still running.

All errors survive pickling, because workers send them to the driver.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class PipelineError(Exception):
    """Base of all errors of this package: a problem, its place, and the next step.

    ``str(error)`` is the message, then one indented line each for where, found, expected and next.
    """

    exit_code = 1
    """Exit status of the command line."""

    def __init__(
        self, message: str, *, where: str = "", found: str = "", expected: str = "", next_step: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        """File, field or partition with the problem."""
        self.found = found
        self.expected = expected
        self.next_step = next_step

    @staticmethod
    def of(error: BaseException) -> PipelineError:
        """Return ``error``; an exception of another kind is wrapped, with its name in the message."""
        return error if isinstance(error, PipelineError) else PipelineError(f"{type(error).__name__}: {error}")

    @property
    def kind(self) -> str:
        """Name of the class, as written to events and reports."""
        return type(self).__name__

    def to_dict(self) -> dict[str, Any]:
        """Return the error as JSON output shows it."""
        named = {
            "kind": self.kind,
            "message": self.message,
            "where": self.where,
            "found": self.found,
            "expected": self.expected,
            "next": self.next_step,
            "exit_code": self.exit_code,
        }
        return {name: value for name, value in named.items() if value != ""}

    def __str__(self) -> str:
        rows = [("where", self.where), ("found", self.found), ("expected", self.expected), ("next", self.next_step)]
        return "\n".join([self.message, *(f"  {name + ':':<10}{text}" for name, text in rows if text)])

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, dict(self.__dict__))


def _rebuild(kind: type[PipelineError], message: str, state: dict[str, Any]) -> PipelineError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


def error_from_dict(record: Mapping[str, Any], *, default: str) -> PipelineError:
    """Return the error that `PipelineError.to_dict` recorded. An unknown class becomes a PipelineError, and keeps its
    exit code.

    :param default: the message, if ``record`` has none.
    """
    named = globals().get(str(record.get("kind", "")))
    kind = named if isinstance(named, type) and issubclass(named, PipelineError) else PipelineError
    names = ("message", "where", "found", "expected")
    state = {name: str(record.get(name, "")) for name in names} | {"next_step": str(record.get("next", ""))}
    state["message"] = state["message"] or default
    if isinstance(record.get("exit_code"), int):
        state["exit_code"] = record["exit_code"]
    return _rebuild(kind, state["message"], state)


class SpecError(PipelineError, ValueError):
    """The job spec, a flag or an argument is invalid."""

    exit_code = 2


class EnvMismatch(SpecError):
    """Driver and workers run different versions."""


class NoDevice(SpecError):
    """A GPU was requested, and there is none that can be used; no partition ran."""


class InputError(PipelineError):
    """The input data is not what the job needs."""

    exit_code = 4
    place = ""
    """The file, for code: never masked, and never shown. ``where`` is for people."""

    def __init__(
        self, message: str, *, where: str = "", found: str = "", expected: str = "", next_step: str = ""
    ) -> None:
        super().__init__(message, where=where, found=found, expected=expected, next_step=next_step)
        self.place = where


class MissingInput(InputError, FileNotFoundError):
    """The source matches no file."""


class CorruptInput(InputError):
    """An input file cannot be read as Parquet."""


class SchemaDrift(InputError, ValueError):
    """An input file's columns or types differ from what the job needs."""


class InputChanged(InputError):
    """An input file changed after the job was planned."""


class TooManyRejects(InputError):
    """More rows were rejected than ``errors.max_fraction`` allows."""


class GateFailed(InputError):
    """The output does not pass the publish gate of its job."""


class UserCodeError(PipelineError):
    """A step or the model of the user failed."""

    exit_code = 5


class StepFailed(UserCodeError):
    """A step cannot be loaded, or broke its contract."""


class StepChanged(StepFailed):
    """The code of a step is not the code that the job was planned with."""


class BadPrediction(UserCodeError, ValueError):
    """A predictor did not return one result per row."""


class OutOfMemory(UserCodeError):
    """A partition needs more memory than a worker has, even in its smallest pieces."""


class DeviceOutOfMemory(OutOfMemory):
    """The smallest batch needs more memory than the GPU of a worker has."""


class PartitionFailed(UserCodeError):
    """A partition failed on every attempt."""


class PartitionTimeout(UserCodeError):
    """An attempt at a partition exceeded ``partition-timeout``."""


class PartitionStuck(UserCodeError):
    """A partition repeatedly kills or freezes its workers."""


class InsufficientMemory(UserCodeError):
    """The plan needs more memory than the limits allow; nothing ran."""


class ModelError(UserCodeError):
    """The model cannot be found, read or used."""


class ModelDigestMismatch(ModelError):
    """The model file changed after it was pinned."""


class ModelChanged(ModelError):
    """The model reference now resolves to another version than the pinned one."""


class ChildrenFailed(PipelineError):
    """Children of a fan-out failed. The exit code is that of the first failed child."""

    exit_code = 5


class ConflictError(PipelineError):
    """Another process or job owns the path."""

    exit_code = 6


class JobLocked(ConflictError):
    """Another driver is running this job."""


class Fenced(ConflictError):
    """Another driver has taken over this job."""


class PlanMismatch(ConflictError):
    """The job directory belongs to another plan."""


class OutputExists(ConflictError, FileExistsError):
    """The output path already contains data, and ``sink.mode`` is ``error``."""


class OutputConflict(ConflictError):
    """Another job has published to the same sink in the meantime, or is publishing to it."""


class StateCorrupt(ConflictError):
    """A file in the job directory is damaged, or was not written by this package."""


class UnsafeStore(ConflictError):
    """The storage lacks the guarantees that a commit needs."""


class RefusedForSafety(PipelineError):
    """The request could do harm and was refused."""

    exit_code = 7


class StorageError(PipelineError):
    """The storage failed."""

    exit_code = 74


class DiskFull(StorageError):
    """The storage has no space left."""


class ReconciliationFailed(StorageError):
    """Input rows differ from output + rejected + filtered rows; nothing was published."""


class InfrastructureError(PipelineError):
    """The cluster failed; the job can be resumed."""

    exit_code = 75


class NoWorkers(InfrastructureError):
    """The cluster had no worker for longer than ``no-workers-timeout``."""


class SchedulerLost(InfrastructureError):
    """The scheduler cannot be reached."""


class SchedulerUnresponsive(InfrastructureError):
    """The scheduler did not answer within ``scheduler-timeout``."""


class DriverLost(InfrastructureError):
    """The driver of a job died, and no server restarts it."""


class EndpointUnavailable(InfrastructureError):
    """The service that scores rows does not answer. What it has answered is kept."""


class DeviceLost(InfrastructureError):
    """The GPU of a worker failed while the worker used it. The partition is retried elsewhere."""


class BudgetExhausted(PipelineError):
    """The job has spent its budget; nothing was published, and everything is kept."""

    exit_code = 9


class Cancelled(PipelineError):
    """The job was cancelled; nothing was published."""

    exit_code = 8


class Interrupted(PipelineError):
    """A signal stopped the run; the driver shut down cleanly."""

    def __init__(self, message: str, *, signal_number: int = 2, next_step: str = "") -> None:
        super().__init__(message, next_step=next_step)
        self.exit_code = 128 + signal_number
