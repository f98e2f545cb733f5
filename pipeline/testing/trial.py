"""Run one trial of chaos: drive a job to its end while a script strikes workers, scheduler and drivers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.jobs import layout
from pipeline.testing.processes import ProcessCluster, send, start_command, wait_until
from pipeline.testing.strikes import FOREVER, Moment, Script, Strike

FINISHED = frozenset({0, 3})
RESUMABLE = frozenset({74, 75, 130, 143, -signal.SIGTERM, -signal.SIGINT})
"""Exit codes after which the job is resumed, as its message says."""
_TICK = 0.005
DRIVER_TIMEOUT = 300.0
"""Minimum seconds after which a driver counts as hanging."""
_LEFT_ALONE = 3
"""Number of drivers after the last strike, of which one must finish."""
_TERM_SECONDS = 2.0


@dataclass(frozen=True)
class TrialAttempt:
    """One driver, from its start to its end."""

    command: str
    """Name of the command: ``run`` or ``resume``."""
    exit_code: int
    """Exit code; negative: the signal that ended the driver."""
    seconds: float
    message: str = ""
    """Last line on stderr, or the error of the JSON output, if the driver failed."""


@dataclass(frozen=True)
class Struck:
    """A strike and when it happened."""

    strike: Strike
    seconds: float | None
    """Seconds after the start of the trial; None if the job ended before the moment of the strike."""

    def to_dict(self) -> dict[str, Any]:
        """Return the strike as JSON output shows it."""
        return {"kind": self.strike.kind, "moment": str(self.strike.moment), "seconds": self.seconds}


@dataclass
class Trial:
    """A trial of the job in a folder with ``job.yaml``."""

    folder: Path
    script: Script
    cluster: Callable[[], ProcessCluster]
    """Returns the cluster to use next: the current one while it is healthy, else a new one."""
    environment: Mapping[str, str] = field(default_factory=dict)
    import_paths: Sequence[str] = ()
    driver_timeout: float = DRIVER_TIMEOUT
    """Seconds a driver may take."""
    on_end: Callable[[], None] = lambda: None
    """Called after each driver; the published output must be correct then."""
    attempts: list[TrialAttempt] = field(default_factory=list)
    struck: list[Struck] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._waiting = list(self.script.strikes)
        self._began = time.monotonic()
        self._due: list[tuple[float, Callable[[], None]]] = []
        """Actions at a later time: wake stopped processes, kill processes that did not exit."""
        self._paused: subprocess.Popen[str] | None = None
        self._expected_end = False

    @property
    def id(self) -> str:
        """Id of the job, unique per trial: a sink treats jobs with one id as the same job."""
        return f"chaos-{self.folder.name}"

    @property
    def job(self) -> Path:
        """Directory of the job."""
        return self.folder / "jobs" / self.id

    def drive(self) -> str:
        """Start drivers until one succeeds. Return the problem; empty if there is none."""
        alone = 0
        try:
            while True:
                code = self._attempt()
                if code in FINISHED:
                    return self._wake_all()
                if code not in RESUMABLE and not self._expected_end:
                    return f"a driver ended with exit code {code}: {self.attempts[-1].message}"
                alone = alone + 1 if not self._waiting else 0
                if alone > _LEFT_ALONE:
                    return f"{alone} drivers did not finish it: {self.attempts[-1].message}"
        finally:
            self._mark_missed()
            for _, action in self._due:
                action()
            if self._paused is not None:
                _end(self._paused)

    # One driver

    def _attempt(self) -> int:
        cluster = self.cluster()
        cluster.replace_workers()
        command = "resume" if (self.job / layout.JOB_FILE).exists() else "run"
        driver = self._start(command, cluster)
        begin, self._expected_end, has_hung = time.monotonic(), False, False
        while True:
            with suppress(subprocess.TimeoutExpired):
                output, errors = driver.communicate(timeout=_TICK)
                break
            driver = self._tick(driver, begin, cluster)
            if not has_hung and time.monotonic() - begin > self.driver_timeout:
                has_hung, self._expected_end = True, False
                driver.kill()
        code = driver.returncode
        message = "" if code in FINISHED else "it hung" if has_hung else _message(output, errors)
        self.attempts.append(TrialAttempt(command, code, round(time.monotonic() - begin, 2), message))
        self.on_end()
        return code

    def _start(self, command: str, cluster: ProcessCluster) -> subprocess.Popen[str]:
        target = (self.id,) if command == "resume" else ("job.yaml", "--job", self.id)
        flags = ("--directory", str(self.folder / "jobs"), "--cluster", cluster.address, "--json", "-q")
        # The cluster is the trial's own.
        environment = {"PIPELINE_RESTART_WORKERS": "on", **self.environment}
        return start_command(
            self.folder, command, *target, *flags, environment=environment, import_paths=self.import_paths
        )

    def _tick(self, driver: subprocess.Popen[str], begin: float, cluster: ProcessCluster) -> subprocess.Popen[str]:
        now = time.monotonic()
        for one in [one for one in self._due if one[0] <= now]:
            self._due.remove(one)
            one[1]()
        if not self._waiting or not self._has_come(self._waiting[0].moment, now - begin):
            return driver
        strike = self._waiting.pop(0)
        self.struck.append(Struck(strike, round(now - self._began, 2)))
        return self._carry_out(strike, driver, cluster)

    def _has_come(self, moment: Moment, seconds: float) -> bool:
        if moment.mark == "seconds":
            return seconds >= moment.count
        if moment.mark == "job":
            return (self.job / layout.JOB_FILE).exists()
        places = {"data": layout.data_folder(0), "receipts": layout.receipts_folder(0), "manifest": layout.MANIFESTS}
        try:
            names = os.listdir(self.job / places[moment.mark])
        except FileNotFoundError:
            return False
        return sum(not name.startswith(".") for name in names) >= moment.count

    # Strikes

    def _carry_out(
        self, strike: Strike, driver: subprocess.Popen[str], cluster: ProcessCluster
    ) -> subprocess.Popen[str]:
        kind, nannies = strike.kind, [nanny for nanny in cluster.nannies if nanny.poll() is None]
        nanny = nannies[strike.choice % len(nannies)] if nannies else None
        worker = cluster.worker_pid(nanny) if nanny else None
        if kind == "take over":
            return self._take_over(driver, cluster)
        if kind in ("kill driver", "end driver", "interrupt driver"):
            self._expected_end = kind == "kill driver"
            number = {"kill driver": signal.SIGKILL, "end driver": signal.SIGTERM}.get(kind, signal.SIGINT)
            send(number, driver.pid)
        elif kind == "kill scheduler":
            cluster.scheduler.kill()
        elif kind == "kill all workers":
            send(signal.SIGKILL, *cluster.worker_pids())
        elif kind == "kill worker":
            send(signal.SIGKILL, worker)
        elif kind == "kill nanny" and nanny is not None:
            nanny.kill()
            nanny.wait(20)
            cluster.replace_workers()
        elif kind == "end worker" and nanny is not None:
            self._end_worker(nanny, worker, cluster)
        elif kind == "freeze scheduler":
            self._freeze(strike.seconds, cluster.scheduler.pid)
        elif kind == "freeze worker" and nanny is not None:
            self._freeze(strike.seconds, nanny.pid, worker)
        return driver

    def _freeze(self, seconds: float, *pids: int | None) -> None:
        send(signal.SIGSTOP, *pids)
        wake = time.monotonic() + seconds if seconds < FOREVER else FOREVER
        self._due.append((wake, lambda: send(signal.SIGCONT, *pids)))

    def _end_worker(self, nanny: subprocess.Popen[bytes], worker: int | None, cluster: ProcessCluster) -> None:
        """End a worker as a batch scheduler does at its time limit: SIGTERM, then SIGKILL, and the next job starts."""
        send(signal.SIGTERM, nanny.pid, worker)

        def kill() -> None:
            # Only the nanny's own worker: by now another process may have the number.
            if nanny.poll() is None:
                send(signal.SIGKILL, cluster.worker_pid(nanny), nanny.pid)
                nanny.wait(20)
            cluster.replace_workers()

        self._due.append((time.monotonic() + _TERM_SECONDS, kill))

    def _take_over(self, driver: subprocess.Popen[str], cluster: ProcessCluster) -> subprocess.Popen[str]:
        """Stop the driver; start another one that waits until the lease expires, and drives."""
        if self._paused is not None:
            return driver
        send(signal.SIGSTOP, driver.pid)
        self._paused = driver
        return self._start("resume" if (self.job / layout.JOB_FILE).exists() else "run", cluster)

    # The end

    def _wake_all(self) -> str:
        """Wake every frozen process; none may change anything any more. Return the problem, or an empty text."""
        frozen = [action for _, action in self._due]
        self._due.clear()
        for action in frozen:
            action()
        if self._paused is None:
            return ""
        driver, self._paused = self._paused, None
        send(signal.SIGCONT, driver.pid)
        try:
            output, errors = driver.communicate(timeout=self.driver_timeout)
        except subprocess.TimeoutExpired:
            _end(driver)
            return "a driver that was taken over from did not end after it woke"
        if driver.returncode in {6, *FINISHED, *RESUMABLE}:
            return ""
        return f"a driver that woke ended with exit code {driver.returncode}: {_message(output, errors)}"

    def _mark_missed(self) -> None:
        self.struck += [Struck(strike, None) for strike in self._waiting]
        self._waiting.clear()


def run_plainly(
    folder: Path, cluster: ProcessCluster, *, environment: Mapping[str, str], import_paths: Sequence[str]
) -> TrialAttempt:
    """Run the job in ``folder`` without any strike."""
    trial = Trial(folder, Script(0, ()), lambda: cluster, environment, import_paths)
    trial.drive()
    return trial.attempts[0]


def _end(process: subprocess.Popen[str]) -> None:
    send(signal.SIGKILL, process.pid)
    process.communicate()


def _message(output: str, errors: str) -> str:
    with suppress(ValueError, KeyError, TypeError):
        error = json.loads(output)["error"]
        return ": ".join(str(error[part]) for part in ("message", "found") if error.get(part))
    return errors.strip().splitlines()[-1] if errors.strip() else ""


def settle(cluster: ProcessCluster, *, seconds: float = 10.0) -> None:
    """Wait until late writers had time to write: every nanny has a running worker again."""
    with suppress(TimeoutError):
        wait_until(lambda: len(cluster.worker_pids()) >= len(cluster.nannies), seconds=seconds)
