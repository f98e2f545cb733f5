"""Every error this package raises on purpose.

The tree is grouped by what somebody who handles the error does next; the number is the exit code::

    PipelineError                      1   internal: a defect of this package
    ├── SpecError                      2   mend the job spec or the command line
    │   └── EnvMismatch                2   make driver and workers run the same versions
    ├── InputError                     4   mend the input data
    │   ├── MissingInput               4
    │   ├── CorruptInput               4
    │   ├── SchemaDrift                4
    │   ├── InputChanged               4
    │   └── TooManyRejects             4
    ├── UserCodeError                  5   mend the step or the model
    │   ├── StepFailed                 5
    │   ├── BadPrediction             5
    │   ├── OutOfMemory                5
    │   ├── PartitionFailed            5
    │   ├── PartitionTimeout           5
    │   ├── PartitionStuck             5
    │   ├── InsufficientMemory                 5
    │   └── ModelError                 5
    │       ├── ModelDigestMismatch         5
    │       └── ModelChanged           5
    ├── ChildrenFailed                 5   children of a fan-out did not end well: resume
    ├── ConflictError                  6   somebody or something else holds the place; decide which one stays
    │   ├── JobLocked                  6
    │   ├── Fenced                     6
    │   ├── PlanMismatch               6
    │   ├── OutputExists               6
    │   ├── OutputConflict             6
    │   ├── StateCorrupt               6
    │   └── UnsafeStore                6
    ├── RefusedForSafety               7   say explicitly that it is wanted, or don't
    ├── StorageError                  74   mend the storage, then resume
    │   ├── DiskFull                  74
    │   └── ReconciliationFailed      74
    ├── InfrastructureError           75   try again: resume
    │   ├── NoWorkers                 75
    │   ├── SchedulerLost             75
    │   ├── SchedulerUnresponsive     75
    │   └── DriverLost                75
    ├── Cancelled                      8   somebody did not want it any more; resume if that was a mistake
    └── Interrupted              128 + n   a signal ended it: resume

Every one of them survives pickling, because workers send them to the driver.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class PipelineError(Exception):
    """Something this package found wrong, said so that a person can act on it.

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
        """File, field or partition that is concerned."""
        self.found = found
        self.expected = expected
        self.next_step = next_step

    @staticmethod
    def of(error: BaseException) -> PipelineError:
        """``error`` itself, or one that names it where it is of another kind."""
        return error if isinstance(error, PipelineError) else PipelineError(f"{type(error).__name__}: {error}")

    @property
    def kind(self) -> str:
        """Stable name of the class, as written to events and reports."""
        return type(self).__name__

    def details(self) -> dict[str, Any]:
        """What JSON output shows of this error."""
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


def error_from_details(details: Mapping[str, Any], *, default: str) -> PipelineError:
    """The error that `PipelineError.details` told of; one of a class that is unknown here has that exit code, too.

    :param default: the message, when ``details`` has none.
    """
    found = globals().get(str(details.get("kind", "")))
    kind = found if isinstance(found, type) and issubclass(found, PipelineError) else PipelineError
    names = ("message", "where", "found", "expected")
    state = {name: str(details.get(name, "")) for name in names} | {"next_step": str(details.get("next", ""))}
    state["message"] = state["message"] or default
    if isinstance(details.get("exit_code"), int):
        state["exit_code"] = details["exit_code"]
    return _rebuild(kind, state["message"], state)


class SpecError(PipelineError):
    """The job spec, a flag or an argument is wrong."""

    exit_code = 2


class EnvMismatch(SpecError):
    """Driver and workers run different versions."""


class InputError(PipelineError):
    """The input data is not what the job needs."""

    exit_code = 4


class MissingInput(InputError):
    """Nothing is where the source points to."""


class CorruptInput(InputError):
    """An input file cannot be read as Parquet."""


class SchemaDrift(InputError):
    """An input file's columns or types differ from what the job needs."""


class InputChanged(InputError):
    """An input file is not the one that was planned."""


class TooManyRejects(InputError):
    """More rows were rejected than ``errors.max_fraction`` allows."""


class UserCodeError(PipelineError):
    """A step or the model of the user failed."""

    exit_code = 5


class StepFailed(UserCodeError):
    """A step cannot be loaded, or broke its contract."""


class BadPrediction(UserCodeError):
    """A predictor returned something else than one finite-shaped result a row."""


class OutOfMemory(UserCodeError):
    """A partition needs more memory than a worker has, however small it is cut."""


class PartitionFailed(UserCodeError):
    """A partition failed on every attempt it was given."""


class PartitionTimeout(UserCodeError):
    """A partition ran past its deadline."""


class PartitionStuck(UserCodeError):
    """A partition keeps killing or freezing its workers."""


class InsufficientMemory(UserCodeError):
    """The plan needs more than the limits allow; refused before anything ran."""


class ModelError(UserCodeError):
    """The model cannot be found, read or used."""


class ModelDigestMismatch(ModelError):
    """The model's bytes are not the ones that were pinned."""


class ModelChanged(ModelError):
    """The model reference resolves to another version than the one that was pinned."""


class ChildrenFailed(PipelineError):
    """Children of a fan-out did not end well. Its exit code is that of the first of them."""

    exit_code = 5


class ConflictError(PipelineError):
    """Two things want the same place."""

    exit_code = 6


class JobLocked(ConflictError):
    """Another driver works on this job."""


class Fenced(ConflictError):
    """Another driver has taken this job over."""


class PlanMismatch(ConflictError):
    """The job directory belongs to another plan."""


class OutputExists(ConflictError):
    """The sink's path holds data already and ``sink.mode`` is ``error``."""


class OutputConflict(ConflictError):
    """Another job published to the same sink in between."""


class StateCorrupt(ConflictError):
    """A file in the job directory is not what this package wrote."""


class UnsafeStore(ConflictError):
    """The storage does not give the guarantees a commit needs."""


class RefusedForSafety(PipelineError):
    """What was asked for could do harm."""

    exit_code = 7


class StorageError(PipelineError):
    """Storage failed."""

    exit_code = 74


class DiskFull(StorageError):
    """There is no space left."""


class ReconciliationFailed(StorageError):
    """Rows in are not rows out + rejected + filtered; nothing was published."""


class InfrastructureError(PipelineError):
    """The cluster failed; the job can be resumed."""

    exit_code = 75


class NoWorkers(InfrastructureError):
    """No worker was there for longer than the limit."""


class SchedulerLost(InfrastructureError):
    """The scheduler is gone."""


class SchedulerUnresponsive(InfrastructureError):
    """The scheduler does not answer."""


class DriverLost(InfrastructureError):
    """The process that drove a job is gone, and nothing starts another one."""


class Cancelled(PipelineError):
    """The job was cancelled; nothing was published."""

    exit_code = 8


class Interrupted(PipelineError):
    """A signal ended the run in good order."""

    def __init__(self, message: str, *, signal_number: int = 2, next_step: str = "") -> None:
        super().__init__(message, next_step=next_step)
        self.exit_code = 128 + signal_number
