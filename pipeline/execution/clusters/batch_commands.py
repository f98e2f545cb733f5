"""Commands of batch systems: submit a script, ask about all jobs at once, cancel.

Each command has a time limit: those of a busy batch system may hang. An answer is parsed by a function of its own.
"""

from __future__ import annotations

import getpass
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.execution.clusters.pool import JobEnd, JobStatus

TIMEOUT = 30.0
"""Seconds a command may take."""
_PASSING = re.compile(
    r"unable to contact|timed? ?out|connection (refused|reset)|cannot connect|can't connect|could not connect|"
    r"communication (failure|connection)|temporar|try again|unavailable|zero bytes|not responding|no route|"
    r"MaxSubmit|submit limit|maximum number of jobs|would exceed .*limit|too many jobs|"
    r"unable to contact|daemon is not|master batch daemon|mbatchd",
    re.IGNORECASE,
)
"""Texts of commands that fail for a time: the batch system is away or busy, or the user has as many jobs as allowed."""


class CommandFailed(Exception):
    """A command of the batch system failed.

    :param text: what the command said.
    :param is_refused: True if it would fail again: the batch system refused the request itself.
    """

    def __init__(self, text: str, *, is_refused: bool = False) -> None:
        super().__init__(text)
        self.text = text
        self.is_refused = is_refused


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Error output in one line; without any, the output."""
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return "; ".join(line.strip() for line in lines if line.strip())[:600] or f"exit status {self.code}"


Run = Callable[[Sequence[str], str], Answer]
"""Runs a command with a text on its standard input."""


def run_command(command: Sequence[str], stdin: str = "", *, timeout: float = TIMEOUT) -> Answer:
    """Run a command, and end it with all its children at its time limit.

    :raises CommandFailed: when there is no such program, or the command takes too long.
    """
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise CommandFailed(f"{command[0]}: {error}") from error
    try:
        out, err = process.communicate(stdin, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(f"{command[0]} did not answer within {timeout:.0f} s") from error
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return Answer(process.returncode, out, err)


@dataclass(frozen=True)
class BatchCommands:
    """The commands of one batch system."""

    submit_command: str
    cancel_command: str
    id_pattern: str
    """Pattern with a group ``job_id``, found in the output of the submission."""
    list_command: Callable[[Sequence[str]], list[str]]
    """Command that lists jobs by their ids."""
    parse: Callable[[str], dict[str, JobStatus]]
    """States by id, from the output of that command."""
    is_script_on_stdin: bool = False
    run: Run = run_command

    def submit(self, script: Path) -> str:
        """Submit a script; return the id of the job.

        :raises CommandFailed: when it was not accepted.
        """
        command = shlex.split(self.submit_command)
        if self.is_script_on_stdin:
            answer = self.run(command, script.read_text(encoding="utf-8"))
        else:
            answer = self.run([*command, str(script)], "")
        match = re.search(self.id_pattern, answer.out)
        if answer.code or match is None:
            raise CommandFailed(answer.text, is_refused=not _PASSING.search(answer.out + answer.err))
        return match["job_id"]

    def states(self, ids: Iterable[str]) -> dict[str, JobStatus]:
        """Return the states of jobs; one that the batch system does not know is not in them.

        :raises CommandFailed: when there was no answer.
        """
        ids = list(ids)
        answer = self.run(self.list_command(ids), "")
        found = self.parse(answer.out)
        if answer.code and not found and (_PASSING.search(answer.err) or not _UNKNOWN_JOB.search(answer.err)):
            raise CommandFailed(answer.text)
        known = set(ids)
        return {id: status for id, status in found.items() if id in known}

    def cancel(self, ids: Iterable[str]) -> None:
        """Cancel jobs.

        :raises CommandFailed: when the command failed, for another reason than that a job is gone.
        """
        answer = self.run([*shlex.split(self.cancel_command), *ids], "")
        if answer.code and not _UNKNOWN_JOB.search(answer.err + answer.out):
            raise CommandFailed(answer.text)


_UNKNOWN_JOB = re.compile(
    r"invalid job id|unknown job|not found|does not exist|no matching job|finished|already complet|not find",
    re.IGNORECASE,
)
"""Texts about a job that the batch system does not know any more."""

_SLURM_ENDS = {
    "BOOT_FAIL": JobEnd.NODE_FAILED,
    "CANCELLED": JobEnd.CANCELLED,
    "COMPLETED": JobEnd.COMPLETED,
    "DEADLINE": JobEnd.TIMEOUT,
    "FAILED": JobEnd.FAILED,
    "NODE_FAIL": JobEnd.NODE_FAILED,
    "OUT_OF_MEMORY": JobEnd.OUT_OF_MEMORY,
    "PREEMPTED": JobEnd.PREEMPTED,
    "REVOKED": JobEnd.CANCELLED,
    "TIMEOUT": JobEnd.TIMEOUT,
}
_SLURM_RUNNING = frozenset({"RUNNING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"})

_SLURM_IMPOSSIBLE = frozenset(
    (
        "AccountNotAllowed",
        "BadConstraints",
        "InvalidAccount",
        "InvalidQOS",
        "PartitionConfig",
        "PartitionNodeLimit",
        "PartitionTimeLimit",
    )
)
"""Reasons for which a queued job never starts, unless an administrator changes the partition."""


def parse_squeue(text: str) -> dict[str, JobStatus]:
    """Return the states in the output of ``squeue --format=%A|%T|%r|%S|%N|%j``."""
    found = {}
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) < 6:
            continue
        (id, state, reason, expected, node), name = fields[:5], "|".join(fields[5:])
        if state == "COMPLETING":
            found[id] = JobStatus(is_ending=True, node=node, name=name)
        elif state in _SLURM_ENDS:
            found[id] = JobStatus(end=_SLURM_ENDS[state], node=node, name=name)
        elif state in _SLURM_RUNNING or state == "CONFIGURING":
            found[id] = JobStatus(is_running=True, node=node, name=name)
        else:
            starts = expected if expected not in ("N/A", "") else ""
            shown, never = "" if reason == "None" else reason, reason in _SLURM_IMPOSSIBLE
            found[id] = JobStatus(reason=shown, is_impossible=never, expected=starts, name=name)
    return found


def _squeue(ids: Sequence[str]) -> list[str]:
    return ["squeue", "--noheader", "--states=all", "--format=%A|%T|%r|%S|%N|%j", f"--jobs={','.join(ids)}"]


def parse_pbs(text: str) -> dict[str, JobStatus]:
    """Return the states in the table of ``qstat`` of PBS or Torque."""
    found = {}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 5 or not fields[0][0].isdigit():
            continue
        id, state = fields[0].partition(".")[0], fields[-2]
        if state in ("R", "S"):
            found[id] = JobStatus(is_running=True)
        elif state == "E":
            found[id] = JobStatus(is_ending=True)
        elif state in ("F", "X", "C"):
            found[id] = JobStatus(end=JobEnd.UNKNOWN)
        else:
            found[id] = JobStatus(reason={"H": "held"}.get(state, ""))
    return found


def parse_sge(text: str) -> dict[str, JobStatus]:
    """Return the states in the table of ``qstat -u USER`` of Grid Engine."""
    found = {}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 7 or not fields[0].isdigit():
            continue
        state = fields[4]
        if "E" in state:
            found[fields[0]] = JobStatus(end=JobEnd.FAILED, reason=f"state {state}")
        elif "r" in state or "t" in state:
            found[fields[0]] = JobStatus(is_running=True, node=fields[7].partition("@")[2] if "@" in line else "")
        else:
            found[fields[0]] = JobStatus(reason="held" if "h" in state else "")
    return found


def parse_bjobs(text: str) -> dict[str, JobStatus]:
    """Return the states in the output of ``bjobs -noheader -o "jobid stat exec_host delimiter='|'"``."""
    found = {}
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) != 3 or not fields[0].isdigit():
            continue
        id, state, node = fields
        if state in ("DONE", "EXIT", "ZOMBI"):
            found[id] = JobStatus(end=JobEnd.COMPLETED if state == "DONE" else JobEnd.UNKNOWN)
        elif state in ("RUN", "USUSP", "SSUSP"):
            found[id] = JobStatus(is_running=True, node="" if node == "-" else node)
        else:
            found[id] = JobStatus(reason="suspended" if state == "PSUSP" else "")
    return found


def parse_condor(text: str) -> dict[str, JobStatus]:
    """Return the states in the output of ``condor_q -autoformat ClusterId ProcId JobStatus``."""
    found = {}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) != 3 or not all(field.isdigit() for field in fields):
            continue
        id, state = fields[0], fields[2]
        if state in ("3", "4"):
            found[id] = JobStatus(end=JobEnd.CANCELLED if state == "3" else JobEnd.COMPLETED)
        elif state == "5":
            found[id] = JobStatus(end=JobEnd.FAILED, reason="held")
        else:
            found[id] = JobStatus(is_running=state in ("2", "6", "7"))
    return found


_DIGITS = r"(?P<job_id>\d+)"
SYSTEMS: Mapping[str, BatchCommands] = {
    "SLURM": BatchCommands("sbatch", "scancel", _DIGITS, _squeue, parse_squeue),
    "PBS": BatchCommands("qsub", "qdel", _DIGITS, lambda ids: ["qstat", *ids], parse_pbs),
    "SGE": BatchCommands("qsub", "qdel", _DIGITS, lambda ids: ["qstat", "-u", getpass.getuser()], parse_sge),
    "LSF": BatchCommands(
        "bsub",
        "bkill",
        _DIGITS,
        lambda ids: ["bjobs", "-noheader", "-o", "jobid stat exec_host delimiter='|'", *ids],
        parse_bjobs,
        is_script_on_stdin=True,
    ),
    "HTCondor": BatchCommands(
        "condor_submit",
        "condor_rm",
        r"submitted to cluster (?P<job_id>\d+)",
        lambda ids: ["condor_q", *ids, "-autoformat", "ClusterId", "ProcId", "JobStatus"],
        parse_condor,
    ),
}
"""Commands by the name of dask-jobqueue's class."""
