"""Triggers and jobs together: what a firing submits, how its job ended, and the look at all triggers of a server."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from pipeline.common.units import utc_now
from pipeline.errors import PipelineError, SpecError
from pipeline.jobs import layout
from pipeline.jobs.cancellation import cancel_job
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.status import Status
from pipeline.service.queue import LeaseWatch, Need, RestartPolicy, find_key, next_need, view_job
from pipeline.service.servers import is_served
from pipeline.service.submit import start_driver, submit
from pipeline.service.triggers.decide import GONE, Success
from pipeline.service.triggers.definitions import DEFAULT_FILE, WatchedTrigger, load_triggers
from pipeline.service.triggers.evaluate import Seen, evaluate_trigger
from pipeline.service.triggers.log import Firing, Log, from_text, open_log
from pipeline.settings import Settings
from pipeline.sources.locate import fixed_part
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.load import load_spec
from pipeline.spec.triggers import Trigger
from pipeline.storage.store import open_store
from pipeline.storage.urls import is_local_path, local_path

logger = logging.getLogger(__name__)
_PLACEHOLDER = re.compile(r"\$\{trigger\.([^{}]*)\}")


def submission_key(trigger: str, firing: str) -> str:
    """The key under which the job of a firing is submitted: one job, however often."""
    return f"trigger:{trigger}:{firing}"


def trigger_files(settings: Settings, files: Sequence[str] = ()) -> tuple[str, ...]:
    """The files with triggers: those named, else those of the settings, else ``triggers.yaml`` if it is there."""
    named = tuple(files) or settings.triggers
    return named or ((DEFAULT_FILE,) if os.path.isfile(DEFAULT_FILE) else ())


def filled_params(trigger: Trigger, firing: Firing, *, name: str) -> dict[str, Any]:
    """The parameters of a firing's job, with ``${trigger.time}``, ``${trigger.date}`` and ``${trigger.name}`` put in.

    :raises SpecError: for another one.
    """
    values = {
        "time": f"{from_text(firing.time):%Y-%m-%dT%H:%M:%SZ}",
        "date": trigger_date(trigger, firing),
        "name": name,
        "firing": firing.id,
    }

    def put_in(found: re.Match[str]) -> str:
        if found[1] not in values:
            raise SpecError(
                "a parameter of a trigger has a placeholder that stands for nothing",
                where=f"trigger {name}",
                found=found[0],
                expected=", ".join(f"${{trigger.{one}}}" for one in values),
            )
        return values[found[1]]

    return {
        param: _PLACEHOLDER.sub(put_in, value) if isinstance(value, str) else value
        for param, value in trigger.params.items()
    }


def trigger_date(trigger: Trigger, firing: Firing) -> str:
    """The day of a firing where its schedule is meant, as ``2026-01-01``."""
    return f"{from_text(firing.time).astimezone(ZoneInfo(trigger.time_zone)):%Y-%m-%d}"


def spec_of(watched: WatchedTrigger, firing: Firing) -> tuple[JobSpec, tuple[str, ...]]:
    """The job spec that a firing submits, and the folders its modules are in. Of files that fired it, it scores exactly
    these, unless it is incremental.

    :raises SpecError: for anything wrong in it.
    """
    loaded = load_spec(
        watched.job,
        params=filled_params(watched.trigger, firing, name=watched.name),
        run_date=trigger_date(watched.trigger, firing),
    )
    spec = loaded.spec
    if firing.files:
        record = spec.to_dict()
        arrival = watched.trigger.arrival
        base = _base(arrival.path) if arrival is not None else None
        record["source"] |= {"path": [file.path for file in firing.files], "base": spec.source.base or base}
        spec = JobSpec.model_validate(record)
    return spec, loaded.folders


def _base(path: str) -> str:
    place = str(local_path(path)) if is_local_path(path) else path
    return fixed_part(place)


@dataclass
class TriggerJobs:
    """`pipeline.service.triggers.evaluate.Jobs` of one trigger, over real job directories."""

    watched: WatchedTrigger
    settings: Settings
    start: bool = False
    """Whether jobs are started at once; else a server does."""
    _names: dict[str, str] = field(default_factory=dict)
    """Folder below the root -> name of the job in it."""
    _leases: LeaseWatch = field(default_factory=LeaseWatch)

    def submit(self, firing: Firing) -> str:
        """See `pipeline.service.triggers.evaluate.Jobs`. A job that is there is left as it is, however it ended."""
        root = open_store(self.settings.directory, private=True, fsync=self.settings.fsync)
        key = submission_key(self.watched.name, firing.id)
        known = find_key(root, key)
        if known is not None and root.exists(f"{known.job}/{layout.JOB_FILE}"):
            if self.start:
                self._start(JobDirectory.open(f"{root.root}/{known.job}"))
            return known.job
        spec, folders = spec_of(self.watched, firing)
        made = submit(
            spec,
            settings=replace(self.settings, import_paths=folders),
            key=key,
            trigger=f"by trigger {self.watched.name} ({firing.kind})",
            start=self.start,
            resume_existing=False,
        )
        return made.job

    def _start(self, job: JobDirectory) -> None:
        """Whoever submitted it may have died before it started a driver."""
        if job.status() is Status.QUEUED:
            start_driver(job, by=f"trigger {self.watched.name}", settings=self.settings)

    def ended(self, job: str) -> str:
        """See `pipeline.service.triggers.evaluate.Jobs`. What a server is about to start again has not ended."""
        root = open_store(self.settings.directory, private=True)
        if not root.exists(f"{job}/{layout.JOB_FILE}"):
            return GONE
        directory = JobDirectory.open(f"{root.root}/{job}")
        status = directory.status()
        if not status.is_final:
            return ""
        if not status.is_success and status is not Status.CANCELLED and is_served(root, now=utc_now()):
            view = view_job(directory, self._leases, now=utc_now())
            if view is not None and next_need(view, RestartPolicy()) in (Need.DRIVER, Need.PATIENCE):
                return ""
        return str(status)

    def cancel(self, job: str) -> None:
        """See `pipeline.service.triggers.evaluate.Jobs`."""
        directory = JobDirectory.open(f"{self.settings.directory.rstrip('/')}/{job}")
        cancel_job(directory, reason=f"a newer firing of trigger {self.watched.name}")

    def successes(self, name: str) -> list[Success]:
        """See `pipeline.service.triggers.evaluate.Jobs`."""
        root = open_store(self.settings.directory, private=True)
        folders = set(root.list_folders())
        for folder in folders - self._names.keys():
            if not folder.startswith(".") and root.exists(f"{folder}/{layout.JOB_FILE}"):
                self._names[folder] = JobDirectory.open(f"{root.root}/{folder}").record.name
        found = []
        for folder in sorted(folder for folder in folders if self._names.get(folder) == name):
            directory = JobDirectory.open(f"{root.root}/{folder}")
            numbers = directory.manifests.numbers()
            if numbers and directory.status().is_success:
                found.append(Success(folder, numbers[-1], _ended_at(directory)))
        return sorted(found, key=lambda one: (one.time, one.job))


def _ended_at(directory: JobDirectory) -> datetime:
    times = [str(event["time"]) for event in directory.events.read() if event["event"] == "status"]
    return datetime.fromisoformat(times[-1]) if times else datetime.fromisoformat(directory.record.created)


@dataclass
class TriggerWatch:
    """Looks at all triggers of some files. It holds nothing that is not on disk, but for what it has read."""

    settings: Settings
    files: tuple[str, ...]
    start: bool = False
    """Whether jobs are started at once; else a server does."""
    _open: dict[str, tuple[WatchedTrigger, Log, TriggerJobs]] = field(default_factory=dict)

    def tick(self, now: datetime) -> None:
        """Do what is due. A trigger, or a file, that fails is told of and does not keep the others."""
        try:
            watched = load_triggers(self.files)
        except PipelineError as error:
            logger.error("the triggers cannot be read, and none is looked at: %s", error)
            return
        for one in watched:
            try:
                self.look(one)
            except (PipelineError, OSError) as error:
                logger.error("trigger %s: %s", one.name, error)

    def look(self, watched: WatchedTrigger) -> Seen:
        """Do what is due of one trigger."""
        known = self._open.get(watched.name)
        if known is None or known[0] != watched:
            log = open_log(self.settings.directory, watched.name, fsync=self.settings.fsync)
            known = watched, log, TriggerJobs(watched, self.settings, start=self.start)
            self._open[watched.name] = known
        _, log, jobs = known
        seen = evaluate_trigger(watched.trigger, log, jobs=jobs, clock=utc_now)
        for firing in seen.fired:
            logger.info("trigger %s fired: %s (%s)", watched.name, firing.id, firing.reason)
        for firing_id, job in seen.submitted:
            logger.info("trigger %s: %s is job %s", watched.name, firing_id, job)
        return seen


def trigger_hook(settings: Settings) -> TriggerWatch | None:
    """What a server does about triggers in each of its rounds; None where no file has any."""
    files = trigger_files(settings)
    return TriggerWatch(settings, files) if files else None
