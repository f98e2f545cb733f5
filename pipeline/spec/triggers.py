"""Triggers: parts of a job spec, and of a ``triggers.yaml``, that say when jobs are submitted."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, Field, model_validator

from pipeline.common.units import parse_seconds
from pipeline.errors import SpecError
from pipeline.spec.diagnostics import did_you_mean
from pipeline.spec.fields import JobName, Name, PathText, SpecModel, Value, check_size, spec_error

KINDS = ("cron", "every", "arrival", "after")
"""Fields of a trigger of which at most one is given; without one, the trigger fires by hand only."""
_CRON_FIELDS = 5
_FINEST = 1.0


def _check_cron(text: str) -> str:
    example = 'such as "30 2 * * *" (minute hour day month weekday)'
    if len(text.split()) != _CRON_FIELDS:
        raise spec_error(
            "is not a cron expression of five fields",
            expected=example,
            next_step="for seconds, write every: 30 s" if len(text.split()) == _CRON_FIELDS + 1 else "",
        )
    try:
        next(CronSim(text, datetime(2026, 1, 1, tzinfo=UTC)))
    except CronSimError as error:
        raise spec_error(
            f"is not a cron expression: {str(error)[:1].lower()}{str(error)[1:]}", expected=example
        ) from error
    except StopIteration:
        raise spec_error("is a cron expression that never fires", expected=example) from None
    return text


@cache
def _zones() -> frozenset[str]:
    return frozenset(available_timezones())


def _check_zone(text: str) -> str:
    try:
        ZoneInfo(text)
    except (KeyError, ValueError, OSError) as error:
        raise spec_error(
            "is not a time zone",
            expected="a name of the IANA database, such as Europe/Berlin or UTC",
            next_step=did_you_mean(text, _zones()),
        ) from error
    return text


def _check_duration(value: float | str) -> float | str:
    try:
        parse_seconds(value)
    except SpecError as error:
        raise spec_error("is not a valid duration", expected=error.expected) from error
    return value


def _check_interval(value: float | str) -> float | str:
    if parse_seconds(_check_duration(value)) < _FINEST:
        raise spec_error("is too short", expected="at least 1 s")
    return value


def _check_marker(text: str) -> str:
    if "/" in text or "\0" in text or text in ("", ".", ".."):
        raise spec_error("is not the name of a file", expected="a name without folders, such as _SUCCESS")
    return text


Duration = Annotated[int | float | str, AfterValidator(_check_duration)]
Size = Annotated[int | str, AfterValidator(check_size)]


class ArrivalTrigger(SpecModel):
    """Files whose arrival fires a trigger, and thresholds for them."""

    path: PathText
    """Directory, glob, or a file; any fsspec URL. As in ``source.path``, names that begin with ``.`` or ``_`` are
    ignored."""
    quiet: Duration | None = None
    """Time without a change after which a file counts. Without a threshold, the trigger also waits until no file has
    arrived for this time. Default: 10 s; with a ``marker`` 0."""
    marker: Annotated[str, AfterValidator(_check_marker)] | None = None
    """Name of a file, such as ``_SUCCESS``. Input files count only if it exists in their folder or in one above."""
    files: Annotated[int, Field(ge=1)] | None = None
    """Fire when this many files have arrived."""
    rows: Annotated[int, Field(ge=1)] | None = None
    """Fire when their footers add up to this many rows."""
    bytes: Size | None = None
    """Fire when they add up to this many bytes, such as ``1 GiB``."""
    at_latest: Duration | None = None
    """Longest time between the arrival of the first file and the job, regardless of thresholds and ``quiet``."""

    @property
    def quiet_seconds(self) -> float:
        """``quiet`` with its default, in seconds."""
        if self.quiet is not None:
            return parse_seconds(self.quiet)
        return 0.0 if self.marker else 10.0

    @property
    def has_threshold(self) -> bool:
        """True if the trigger waits for a number of files, rows or bytes."""
        return self.files is not None or self.rows is not None or self.bytes is not None


class Trigger(SpecModel):
    """Event that submits a job: a cron schedule, an interval, arriving files, another job's success, or a person."""

    name: JobName | None = None
    """Unique among all triggers of a root of job directories. Default: the job's name; required if it has several."""
    cron: Annotated[str, AfterValidator(_check_cron)] | None = None
    """``minute hour day month weekday``, such as ``"30 2 * * *"``."""
    time_zone: Annotated[str, AfterValidator(_check_zone)] = "UTC"
    """Time zone of ``cron``. A time skipped by daylight saving fires right after the change; a time that occurs twice
    fires the first time."""
    every: Annotated[int | float | str, AfterValidator(_check_interval)] | None = None
    """Interval, such as ``15 min``; fires at its multiples since 1970-01-01 UTC."""
    arrival: ArrivalTrigger | None = None
    """Fires when files arrive; the job's source is then exactly these files."""
    after: JobName | None = None
    """Name of another job; fires at each of its successes."""
    missed: Literal["skip", "once", "each"] = "once"
    """Action for times (and successes) that passed while no server ran: nothing, one job for all of them, or one job
    each. Files that arrived in the meantime are never skipped."""
    grace: Duration = "5 min"
    """Delay after which a time counts as missed."""
    overlap: Literal["queue", "forbid", "cancel"] = "queue"
    """Action if the trigger fires while its last job is unfinished: queue the new job, skip it (files wait for the next
    one), or cancel the older job."""
    params: dict[Name, Value] = Field(default_factory=dict)
    """Values for parameters of the job, ``${params.x}`` in its spec."""

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) > 1:
            raise spec_error(f"has more than one of {', '.join(given)}", expected=f"one of {', '.join(KINDS)}")
        if self.missed == "each" and self.overlap != "queue":
            raise spec_error(
                f"runs each missed time, and has overlap: {self.overlap}", expected="overlap: queue beside it"
            )
        if self.time_zone != "UTC" and self.cron is None:
            raise spec_error("has a time_zone without cron", expected="time_zone beside cron")
        return self

    @property
    def kind(self) -> str:
        """``cron``, ``every``, ``arrival``, ``after``, or ``by hand``."""
        return next((kind for kind in KINDS if getattr(self, kind) is not None), "by hand")

    @property
    def grace_seconds(self) -> float:
        """``grace`` in seconds."""
        return parse_seconds(self.grace)


class JobTrigger(Trigger):
    """A trigger of a ``triggers.yaml``."""

    job: PathText
    """The job spec to submit; a relative path starts from the folder of the ``triggers.yaml``."""


class TriggerList(SpecModel):
    """A ``triggers.yaml``."""

    triggers: Annotated[tuple[JobTrigger, ...], Field(min_length=1, strict=False)]
