"""Connect triggers and jobs: submit the job of a firing, find its outcome, evaluate all triggers of a server."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

from pipeline.common.units import utc_now
from pipeline.driver.outcome import cancel_job, has_output
from pipeline.errors import InputError, PipelineError, SpecError
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.status import Status
from pipeline.service.queue import LeaseWatch, Need, RestartPolicy, find_key, next_need, view_job
from pipeline.service.servers import is_served
from pipeline.service.submit import start_driver, submit
from pipeline.service.triggers.arrivals import RowCounter, scan_arrivals
from pipeline.service.triggers.child import ChildDied, count_rows, count_rows_in_child, run_in_child
from pipeline.service.triggers.decide import COMMITTED, GONE, Success
from pipeline.service.triggers.definitions import DEFAULT_FILE, WatchedTrigger, load_triggers
from pipeline.service.triggers.evaluate import BadFiles, ScanArrivals, Seen, evaluate_trigger
from pipeline.service.triggers.log import Firing, Log, SeenFile, from_text, open_log
from pipeline.settings import Settings
from pipeline.sources.locate import fixed_part
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.load import load_spec
from pipeline.spec.triggers import Trigger
from pipeline.storage.store import open_store
from pipeline.storage.urls import is_local_path, local_path

logger = logging.getLogger(__name__)
WARN_SECONDS = 600.0
"""Seconds between two equal warnings about a trigger."""
_PLACEHOLDER = re.compile(r"\$\{trigger\.([^{}]*)\}")


def submission_key(trigger: str, firing: str) -> str:
    """Return the key under which the job of a firing is submitted. One key gives one job."""
    return f"trigger:{trigger}:{firing}"


def trigger_files(settings: Settings, files: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the files with triggers: ``files``, else the files of the settings, else an existing ``triggers.yaml``."""
    named = tuple(files) or settings.triggers
    return named or ((DEFAULT_FILE,) if os.path.isfile(DEFAULT_FILE) else ())


def render_params(trigger: Trigger, firing: Firing, *, name: str) -> dict[str, Any]:
    """Render the placeholders ``${trigger.…}`` in the parameters of a firing's job.

    :raises SpecError: for an unknown placeholder.
    """
    values = {
        "time": f"{from_text(firing.time):%Y-%m-%dT%H:%M:%SZ}",
        "date": trigger_date(trigger, firing),
        "name": name,
        "firing": firing.id,
    }

    def render(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise SpecError(
                "unknown placeholder in a parameter of a trigger",
                where=f"trigger {name}",
                found=match[0],
                expected=", ".join(f"${{trigger.{value}}}" for value in values),
            )
        return values[match[1]]

    return {
        param: _PLACEHOLDER.sub(render, value) if isinstance(value, str) else value
        for param, value in trigger.params.items()
    }


def trigger_date(trigger: Trigger, firing: Firing) -> str:
    """Return the day of a firing in the time zone of its schedule, as ``2026-01-01``."""
    return f"{from_text(firing.time).astimezone(ZoneInfo(trigger.time_zone)):%Y-%m-%d}"


def spec_of(watched: WatchedTrigger, firing: Firing) -> tuple[JobSpec, tuple[str, ...]]:
    """Return the job spec that a firing submits, and the folders of its modules.

    A firing for files scores exactly these files.

    :raises SpecError: for an invalid spec.
    """
    loaded = load_spec(
        watched.job,
        params=render_params(watched.trigger, firing, name=watched.name),
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
    location = str(local_path(path)) if is_local_path(path) else path
    return fixed_part(location)


@dataclass
class TriggerJobs:
    """`pipeline.service.triggers.evaluate.Jobs` of one trigger, over real job directories."""

    watched: WatchedTrigger
    settings: Settings
    start: bool = False
    """Start jobs at once. False: a server starts them."""
    is_isolated: bool = False
    """True if jobs are planned in a process of its own: a damaged file, or a step, may end it."""
    _names: dict[str, str] = field(default_factory=dict)
    """Folder below the root -> name of its job."""
    _leases: LeaseWatch = field(default_factory=LeaseWatch)

    def submit(self, firing: Firing) -> str:
        """Submit the job; see `pipeline.service.triggers.evaluate.Jobs`. A job that has ended is not resumed."""
        try:
            if self.is_isolated:
                job: str = run_in_child(f"{__name__}:submit_firing", self.watched, self.settings, firing, self.start)
                return job
            return self._submit(firing)
        except (InputError, ChildDied) as error:
            files = bad_files(firing, error)
            if files:
                raise BadFiles(error, files) from error
            raise

    def _submit(self, firing: Firing) -> str:
        root = open_store(self.settings.directory, private=True, fsync=self.settings.fsync)
        key = submission_key(self.watched.name, firing.id)
        known = find_key(root, key)
        if known is not None and root.exists(f"{known.job}/{layout.JOB_FILE}"):
            if self.start:
                self._start(JobDirectory.open(f"{root.root}/{known.job}"))
            return known.job
        spec, folders = spec_of(self.watched, firing)
        result = submit(
            spec,
            settings=replace(self.settings, import_paths=folders),
            key=key,
            trigger=f"by trigger {self.watched.name} ({firing.kind})",
            start=self.start,
            resume_existing=False,
        )
        return result.job

    def _start(self, job: JobDirectory) -> None:
        """Start the driver of a submitted job, whose submitter may have died before the start."""
        if job.status() is Status.QUEUED:
            start_driver(job, by=f"trigger {self.watched.name}", settings=self.settings)

    def ended(self, job: str) -> str:
        """Return the final status; see `pipeline.service.triggers.evaluate.Jobs`.

        A job that a server is about to restart has not ended.
        """
        root = open_store(self.settings.directory, private=True)
        if not root.exists(f"{job}/{layout.JOB_FILE}"):
            return GONE
        directory = JobDirectory.open(f"{root.root}/{job}")
        status = directory.status()
        if not status.is_final:
            return ""
        if not status.is_success and status is not Status.CANCELLED and is_served(root, now=utc_now()):
            view = view_job(directory, self._leases, now=utc_now())
            if view is not None and next_need(view, RestartPolicy()) in (Need.DRIVER, Need.TIME):
                return ""
        return COMMITTED if not status.is_success and has_output(directory) else str(status)

    def cancel(self, job: str) -> None:
        """Cancel the job; see `pipeline.service.triggers.evaluate.Jobs`."""
        directory = JobDirectory.open(f"{self.settings.directory.rstrip('/')}/{job}")
        trigger = f"trigger {self.watched.name}"
        # The files of an arrival join the newer firing. Firings by time have no files of their own.
        owner = trigger if self.watched.trigger.kind == "arrival" else ""
        cancel_job(directory, reason=f"a newer firing of {trigger}", superseded_by=owner)

    def successes(self, name: str) -> list[Success]:
        """Return all successes; see `pipeline.service.triggers.evaluate.Jobs`."""
        root = open_store(self.settings.directory, private=True)
        folders = set(root.list_folders())
        for folder in folders - self._names.keys():
            if not folder.startswith(".") and root.exists(f"{folder}/{layout.JOB_FILE}"):
                self._names[folder] = JobDirectory.open(f"{root.root}/{folder}").record.name
        successes = []
        for folder in sorted(folder for folder in folders if self._names.get(folder) == name):
            directory = JobDirectory.open(f"{root.root}/{folder}")
            numbers = directory.manifests.numbers()
            if numbers and directory.status().is_success:
                successes.append(Success(folder, numbers[-1], _ended_at(directory)))
        return sorted(successes, key=lambda success: (success.time, success.job))


def submit_firing(watched: WatchedTrigger, settings: Settings, firing: Firing, start: bool) -> str:
    """Submit the job of a firing from this process; see `TriggerJobs.submit`."""
    return TriggerJobs(watched, settings, start=start)._submit(firing)


def bad_files(firing: Firing, error: PipelineError) -> dict[SeenFile, str]:
    """Return the files of ``firing`` because of which its job cannot be created, with the reason.

    ``error`` names the file; else the footers of all files are read, in a process of their own.
    """
    named = [file for file in firing.files if file.path in error.where]
    if named:
        return {max(named, key=lambda file: len(file.path)): f"{error.message}: {error.found}"}
    counts = count_rows_in_child(file.path for file in firing.files)
    reasons = {file: counts.get(file.path) for file in firing.files}
    return {
        file: f"{reason.message}: {reason.found}"
        for file, reason in reasons.items()
        if isinstance(reason, PipelineError)
    }


def _ended_at(directory: JobDirectory) -> datetime:
    times = [str(event["time"]) for event in directory.events.read() if event["event"] == "status"]
    return datetime.fromisoformat(times[-1]) if times else datetime.fromisoformat(directory.record.created)


@dataclass
class TriggerWatch:
    """Evaluator of all triggers of some files. A cache is the only state that is not on disk."""

    settings: Settings
    files: tuple[str, ...]
    start: bool = False
    """Start jobs at once. False: a server starts them."""
    is_isolated: bool = False
    """True if jobs are planned, and unknown files read, in processes of their own."""
    clock: Callable[[], float] = time.monotonic
    _warned: dict[str, float] = field(default_factory=dict)
    """Trigger -> time of its last warning, by ``clock``."""
    _open: dict[str, tuple[WatchedTrigger, Log, TriggerJobs, ScanArrivals]] = field(default_factory=dict)

    def tick(self, now: datetime) -> None:
        """Do what is due. A failing trigger or file is logged and does not stop the others."""
        for trigger in self._load():
            try:
                self.evaluate(trigger)
            except Exception as error:
                # An error of one trigger ends this evaluation of this trigger only; the next one tries again.
                is_known = isinstance(error, (PipelineError, OSError))
                logger.error("trigger %s: %s", trigger.name, error, exc_info=None if is_known else error)

    def _load(self) -> list[WatchedTrigger]:
        """Return the triggers of all files that can be read. Of two triggers with one name, the first counts."""
        triggers: dict[str, WatchedTrigger] = {}
        for file in self.files:
            try:
                loaded = load_triggers([file])
            except (PipelineError, OSError) as error:
                logger.error("the triggers of %s cannot be read, and are not evaluated: %s", file, error)
                continue
            for trigger in loaded:
                first = triggers.setdefault(trigger.name, trigger)
                if first is not trigger:
                    logger.error("trigger %s of %s has the name of one of %s", trigger.name, file, first.file)
        return list(triggers.values())

    def evaluate(self, watched: WatchedTrigger) -> Seen:
        """Do what is due for one trigger."""
        known = self._open.get(watched.name)
        if known is None or known[0] != watched:
            log = open_log(self.settings.directory, watched.name, fsync=self.settings.fsync)
            jobs = TriggerJobs(watched, self.settings, start=self.start, is_isolated=self.is_isolated)
            counter = RowCounter(count_rows_in_child if self.is_isolated else count_rows)
            known = watched, log, jobs, partial(scan_arrivals, count_rows=counter)
            self._open[watched.name] = known
        _, log, jobs, scan = known
        seen = evaluate_trigger(watched.trigger, log, jobs=jobs, clock=utc_now, scan=scan)
        if seen.warning and self.clock() - self._warned.get(watched.name, float("-inf")) >= WARN_SECONDS:
            self._warned[watched.name] = self.clock()
            logger.warning("trigger %s: %s", watched.name, seen.warning)
        for firing in seen.fired:
            logger.info("trigger %s fired: %s (%s)", watched.name, firing.id, firing.reason)
        for firing_id, job in seen.submitted:
            logger.info("trigger %s: %s is job %s", watched.name, firing_id, job)
        return seen


def trigger_task(settings: Settings) -> TriggerWatch | None:
    """Return the task of a server that evaluates triggers; None without a file with triggers."""
    files = trigger_files(settings)
    return TriggerWatch(settings, files, is_isolated=True) if files else None
