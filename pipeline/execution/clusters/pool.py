"""Decide about a pool of batch jobs that hold workers: what to submit, when to ask, when to give up. Pure.

A job of the pool is queued, starts, joins with its workers, leaves before its walltime, and is gone. `Pool` records
what the batch system and the scheduler tell, with the time as an argument. The commands are run by
`pipeline.execution.clusters.worker_pool`.

A replacement is submitted as soon as a job is gone, and before its workers leave: earlier by the median of the time
that jobs have needed from submission to their first worker. A batch system that does not answer is tried again at
growing intervals. A request that it refuses is an error at once, unless workers are there, or another shape is left;
see `pipeline.execution.clusters.requests`. A node on which jobs end before they join, while others work, is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from statistics import median
from typing import Any

from pipeline.common.units import plural
from pipeline.execution.clusters.requests import FIRST, Request, Requests, Shape

POLL_SECONDS = 15.0
"""Seconds between two questions about all jobs of a pool."""
POLL_SECONDS_MANY = 60.0
"""The same, for pools of more than `MANY_JOBS` jobs."""
MANY_JOBS = 200
POLL_SECONDS_SOON = 2.0
"""The same, while the state of a job is needed to explain the loss of a worker."""
FIRST_DELAY = 1.0
LAST_DELAY = 300.0
"""Seconds between two attempts to submit: the first delay doubles up to the last one."""
MISSING_POLLS = 2
"""Answers in a row that do not list a job, after which the job is gone."""
EARLY_DEATHS = 3
"""Jobs in a row that end before a worker has joined, after which the pool gives up if it has no worker."""
VERDICT_SECONDS = 20.0
"""Seconds in which the loss of a worker must be explained; then nobody is blamed."""
EARLY_DEATHS_OF_NODE = 2
"""Jobs that end on a node before a worker has joined, after which the node is left out if other nodes work."""
RECENT = 16
"""Number of last jobs from which the time from submission to the first worker is computed."""


class Phase(StrEnum):
    """Phases of a job of the pool."""

    QUEUED = "queued"
    STARTING = "starting"
    """The batch system runs the job; no worker has joined yet."""
    JOINED = "joined"
    LEAVING = "leaving"
    """All workers that had joined are gone; the job has not ended yet."""
    GONE = "gone"


class JobEnd(StrEnum):
    """Why a job ended, as far as the batch system tells."""

    UNKNOWN = "ended"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PREEMPTED = "preempted"
    TIMEOUT = "out of walltime"
    NODE_FAILED = "lost with its node"
    OUT_OF_MEMORY = "out of memory"
    COMPLETED = "completed"


BLAMELESS = frozenset({JobEnd.CANCELLED, JobEnd.PREEMPTED, JobEnd.TIMEOUT, JobEnd.NODE_FAILED})
"""Ends for which no partition and no node is to blame."""


@dataclass(frozen=True)
class JobStatus:
    """State of a job as the batch system tells it."""

    is_running: bool = False
    is_ending: bool = False
    """True if its processes are about to end; the next answer tells why."""
    end: JobEnd | None = None
    """Why it ended; None: it has not ended."""
    reason: str = ""
    """Why it waits, in the words of the batch system."""
    is_impossible: bool = False
    """True if no node fits its request, so that it would wait forever."""
    expected: str = ""
    """Expected start, in the words of the batch system."""
    node: str = ""
    name: str = ""
    """Name of the job, if the batch system tells it."""


@dataclass(frozen=True)
class PoolPolicy:
    """Limits of a pool."""

    jobs: int
    """Jobs at work at a time."""
    minimum: int
    """Jobs at work even if little work is left."""
    shapes: tuple[Shape, ...]
    """Sizes of jobs, in the order in which they are tried."""
    lead: float
    """Least seconds between the submission of a replacement and the end of the job that it replaces."""
    patience: float
    """Seconds without any worker, while jobs wait in the queue, after which the pool gives up."""
    shape_wait: float = 600.0
    """Seconds in the queue after which a job of the next shape is submitted in its place."""


@dataclass(frozen=True)
class PoolJob:
    """A job of the pool. Times are those of the driver's clock."""

    number: int
    id: str
    """Id that the batch system gave it."""
    submitted: float
    request: Request = FIRST
    phase: Phase = Phase.QUEUED
    started: float | None = None
    joined: float | None = None
    status: JobStatus = field(default_factory=JobStatus)
    missing: int = 0
    """Answers in a row that did not list the job."""
    workers: frozenset[str] = frozenset()
    """Addresses of its workers that are connected."""

    @property
    def is_alive(self) -> bool:
        """True if the batch system may still have the job."""
        return self.phase is not Phase.GONE


@dataclass(frozen=True)
class Loss:
    """A worker that left without a word."""

    number: int
    """Number of its job."""
    at: float


@dataclass(frozen=True)
class Verdict:
    """Explanation of the loss of a worker."""

    end: JobEnd | None
    """End of its job; None: the job runs on, so that the worker has died by itself."""


@dataclass(frozen=True)
class GiveUp:
    """Why the pool gives up."""

    message: str
    found: str
    is_refused: bool = False
    """True if the batch system refused the request: a retry would be refused, too."""


@dataclass
class Pool:
    """The jobs of a pool, and what to do about them."""

    policy: PoolPolicy
    jobs: dict[int, PoolJob] = field(default_factory=dict)
    """Jobs that are not gone, by number."""
    count: int = 0
    """Number of jobs that were submitted in all."""
    demand: int | None = None
    """Partitions that are not done; None: not known."""
    polled: float = float("-inf")
    """Time of the last question to the batch system."""
    failures: int = 0
    """Attempts to submit, or to ask, that failed in a row."""
    submit_from: float = float("-inf")
    """Time from which on the next job may be submitted."""
    refusal: str = ""
    """Text with which the last request was refused; empty: it was accepted."""
    trouble: str = ""
    """Text of the last command that failed in passing; empty: the last one worked."""
    early: list[str] = field(default_factory=list)
    """Ids of the jobs in a row that ended before a worker had joined."""
    excluded: set[str] = field(default_factory=set)
    """Nodes that are left out."""
    last_worker: float | None = None
    """Time at which a worker was connected last; None: never."""
    opened: float | None = None
    """Time of the first decision."""
    _requests: Requests = field(init=False)
    _early_nodes: Counter[str] = field(default_factory=Counter)
    """Jobs that ended before a worker had joined, by node."""
    _delays: list[float] = field(default_factory=list)
    _losses: dict[str, Loss] = field(default_factory=dict)
    """Losses that are not explained yet, by the address of the worker."""
    _verdicts: dict[str, Verdict] = field(default_factory=dict)
    _addresses: dict[str, int] = field(default_factory=dict)
    """Number of the job of each worker that is or was connected."""

    def __post_init__(self) -> None:
        self._requests = Requests(self.policy.shapes)

    # What happened

    def job_submitted(self, id: str, request: Request = FIRST, *, now: float) -> PoolJob:
        """Record a job that the batch system has accepted."""
        self.count += 1
        job = self.jobs[self.count] = PoolJob(self.count, id, now, request)
        self._requests.accepted(request)
        self.failures, self.refusal, self.trouble = 0, "", ""
        return job

    def submission_failed(self, text: str, request: Request = FIRST, *, is_refused: bool, now: float) -> None:
        """Record a job that was not submitted.

        :param text: what the batch system said.
        :param is_refused: True if the same request would be refused again.
        """
        if is_refused and self._requests.refused(request, now=now):
            self.trouble = text
            return
        self.failures += 1
        self.submit_from = now + min(LAST_DELAY, FIRST_DELAY * 2.0 ** (self.failures - 1))
        if is_refused:
            self.refusal, self.submit_from = text, now + LAST_DELAY
        else:
            self.trouble = text

    def asked(self, listing: Mapping[str, JobStatus] | None, *, now: float, text: str = "") -> list[PoolJob]:
        """Record the answer of the batch system about all jobs; return the jobs that are gone since.

        :param listing: states by id; None: there was no answer.
        :param text: what the command said where there was none.
        """
        self.polled = now
        if listing is None:
            self.trouble = text
            return []
        self.trouble = ""
        gone = []
        for job in list(self.jobs.values()):
            after = _after_poll(job, listing.get(job.id), now=now)
            self.jobs[job.number] = after
            if not after.is_alive:
                gone.append(after)
                self._job_gone(after, now=now)
        self._explain(listing, gone, now=now)
        return gone

    def job_cancelled(self, number: int) -> None:
        """Forget a job that this driver has cancelled."""
        self.jobs.pop(number, None)

    def worker_joined(self, number: int, address: str, *, now: float) -> None:
        """Record a worker that the scheduler has accepted."""
        self.last_worker, self._addresses[address] = now, number
        self.early.clear()
        job = self.jobs.get(number)
        if job is None:
            return
        if job.joined is None:
            self._delays = [*self._delays, now - job.submitted][-RECENT:]
        self.jobs[number] = replace(
            job,
            phase=Phase.JOINED,
            started=now if job.started is None else job.started,
            joined=now if job.joined is None else job.joined,
            missing=0,
            workers=job.workers | {address},
        )

    def worker_left(self, address: str, *, is_expected: bool, now: float) -> None:
        """Record a worker that the scheduler has removed.

        :param is_expected: True if the worker had announced that it would leave.
        """
        number = self._addresses.get(address)
        if number is None:
            return
        self.last_worker = now
        if not is_expected:
            self._losses[address] = Loss(number, now)
        job = self.jobs.get(number)
        if job is None:
            if not is_expected:
                self._verdicts[address] = Verdict(JobEnd.UNKNOWN)
                del self._losses[address]
            return
        workers = job.workers - {address}
        is_leaving = is_expected and not workers
        self.jobs[number] = replace(job, workers=workers, phase=Phase.LEAVING if is_leaving else job.phase)

    def _job_gone(self, job: PoolJob, *, now: float) -> None:
        del self.jobs[job.number]
        self._requests.grow(
            job.request,
            memory=job.status.end is JobEnd.OUT_OF_MEMORY,
            walltime=job.status.end is JobEnd.TIMEOUT,
        )
        if job.joined is not None or job.status.end in BLAMELESS:
            return
        if node := job.status.node:
            self._early_nodes[node] += 1
            if self._early_nodes[node] >= EARLY_DEATHS_OF_NODE and self.last_worker is not None:
                self.excluded.add(node)
        self.early.append(job.id)
        self.submit_from = max(self.submit_from, now + min(LAST_DELAY, FIRST_DELAY * 2.0 ** len(self.early)))

    def _explain(self, listing: Mapping[str, JobStatus], gone: Iterable[PoolJob], *, now: float) -> None:
        ends = {job.number: job.status.end or JobEnd.UNKNOWN for job in gone}
        for address, loss in list(self._losses.items()):
            job = self.jobs.get(loss.number)
            status = listing.get(job.id) if job else None
            if loss.number in ends:
                verdict = Verdict(ends[loss.number])
            elif status is not None and status.end is not None:
                verdict = Verdict(status.end)
            elif status is None or status.is_ending:
                continue
            elif not status.is_running:
                verdict = Verdict(JobEnd.PREEMPTED)  # it waits in the queue again
            elif now - loss.at >= POLL_SECONDS_SOON:
                verdict = Verdict(None)
            else:
                continue
            self._verdicts[address] = verdict
            del self._losses[address]

    # What to do

    def jobs_to_submit(self, *, now: float) -> int:
        """Return how many jobs to submit now."""
        if self.opened is None:
            self.opened = now
        if now < self.submit_from:
            return 0
        late = self._late_shapes(now=now)
        request = self._requests.next(late=late, now=now)
        # A job that waits long has a job of another shape beside it, until one of them starts.
        late = late if request is not None and request.shape not in late else frozenset()
        staying = [
            job
            for job in self.jobs.values()
            if not self._is_due(job, now=now) and not (job.phase is Phase.QUEUED and job.request.shape in late)
        ]
        return max(0, self.wanted - len(staying)) if request is not None else 0

    def next_request(self, *, now: float) -> Request:
        """Return what the next job requests."""
        return self._requests.next(late=self._late_shapes(now=now), now=now) or FIRST

    def _late_shapes(self, *, now: float) -> frozenset[int]:
        """Return the shapes of which no job runs, and one waits long or forever."""
        running = {job.request.shape for job in self.jobs.values() if job.phase is not Phase.QUEUED}
        waiting = (
            job.request.shape
            for job in self.jobs.values()
            if job.phase is Phase.QUEUED and (job.status.is_impossible or now - job.submitted > self.policy.shape_wait)
        )
        return frozenset(waiting) - running

    @property
    def wanted(self) -> int:
        """Jobs that the remaining partitions can use."""
        policy = self.policy
        if self.demand is None:
            return policy.jobs
        return min(policy.jobs, max(policy.minimum, -(-self.demand // max(1, policy.shapes[0].slots))))

    def surplus(self, *, now: float) -> list[PoolJob]:
        """Return queued jobs that are not needed any more, the newest first.

        A job that was preempted comes back to the queue, with its age, after its replacement was submitted.
        """
        queued = [job for job in self.jobs.values() if job.phase is Phase.QUEUED]
        staying = sum(not self._is_due(job, now=now) for job in self.jobs.values())
        spare = len(self.jobs) - max(1, self.wanted) if self._has_work_to_spare() else staying - self.policy.jobs
        return sorted(queued, key=lambda job: -job.number)[: max(0, spare)]

    def _has_work_to_spare(self) -> bool:
        """True if all partitions that are not done already have a place: queued jobs would start for nothing."""
        joined = [job for job in self.jobs.values() if job.phase is Phase.JOINED]
        slots = sum(self._requests.slots(job.request) for job in joined)
        return self.demand is not None and slots >= self.demand and len(joined) >= self.policy.minimum

    def _is_due(self, job: PoolJob, *, now: float) -> bool:
        """True if a replacement for the job must be on its way."""
        if job.phase is Phase.LEAVING:
            return True
        if job.started is None or job.phase is not Phase.JOINED:
            return False
        return now >= job.started + self._requests.lifetime(job.request) - self.lead

    @property
    def lead(self) -> float:
        """Seconds from submission to the first worker, by the last jobs; at least that of the policy."""
        return max(self.policy.lead, median(self._delays) if self._delays else 0.0)

    def poll_due(self, *, now: float) -> bool:
        """True if the batch system must be asked about all jobs."""
        if not self.jobs:
            return False
        if self._losses or any(job.status.is_ending for job in self.jobs.values()):
            return now - self.polled >= POLL_SECONDS_SOON
        return now - self.polled >= (POLL_SECONDS_MANY if len(self.jobs) > MANY_JOBS else POLL_SECONDS)

    def verdict(self, address: str, *, now: float) -> Verdict | None:
        """Return why a worker was lost; None: not known yet.

        :param address: address of a worker that left without a word.
        """
        loss = self._losses.get(address)
        if loss is not None and now - loss.at < VERDICT_SECONDS:
            return None
        if loss is not None:
            del self._losses[address]
            return Verdict(JobEnd.UNKNOWN)
        return self._verdicts.get(address)

    def is_ours(self, address: str) -> bool:
        """True if the worker belongs to a job of this pool."""
        return address in self._addresses

    @property
    def has_workers(self) -> bool:
        """True if a worker is connected."""
        return any(job.workers for job in self.jobs.values())

    def give_up(self, *, now: float) -> GiveUp | None:
        """Return why no worker is to be expected; None while there are workers, or jobs that may bring some."""
        if self.has_workers:
            return None
        if self.refusal and not self.jobs:
            return GiveUp("the batch system refused a job", self.refusal, is_refused=True)
        impossible = [job for job in self.jobs.values() if job.phase is Phase.QUEUED and job.status.is_impossible]
        is_last = self.next_request(now=now).shape in {job.request.shape for job in impossible}
        if impossible and len(impossible) == len(self.jobs) and is_last:
            found = f"job {impossible[0].id} waits for what no node has: {impossible[0].status.reason}"
            return GiveUp("no node fits the request for a job", found, is_refused=True)
        if len(self.early) >= EARLY_DEATHS and not self.jobs:
            found = (
                f"{plural(len(self.early), 'job')} in a row ended before a worker had joined: {', '.join(self.early)}"
            )
            return GiveUp("jobs of the batch system end before their workers start", found)
        since = self.last_worker if self.last_worker is not None else self.opened
        if since is None or now - since <= self.policy.patience:
            return None
        found = f"no worker for {now - since:.0f} s; {self.describe()}"
        return GiveUp("no job of the batch system started", found)

    def describe(self) -> str:
        """Return the state of the pool in a line, such as ``2 joined, 4 queued (Priority), first expected 15:14``."""
        phases = Counter(job.phase for job in self.jobs.values())
        reasons = Counter(job.status.reason for job in self.jobs.values() if job.phase is Phase.QUEUED)
        named = [reason for reason, _ in reasons.most_common() if reason]
        parts = []
        for phase in (Phase.JOINED, Phase.STARTING, Phase.QUEUED, Phase.LEAVING):
            if phases[phase]:
                waits = f" ({', '.join(named[:2])})" if phase is Phase.QUEUED and named else ""
                parts.append(f"{phases[phase]} {phase}{waits}")
        expected = min((job.status.expected for job in self.jobs.values() if job.status.expected), default="")
        text = ", ".join(parts) or f"no job of {self.wanted} submitted"
        text += f", first expected {expected}" if expected else ""
        trouble = self.trouble or self.refusal
        return f"{text}; the batch system said: {trouble}" if trouble else text


def _after_poll(job: PoolJob, status: JobStatus | None, *, now: float) -> PoolJob:
    """Return a job after an answer of the batch system."""
    if status is None:
        missing = job.missing + 1
        is_gone = missing >= MISSING_POLLS
        return replace(job, missing=missing, phase=Phase.GONE if is_gone else job.phase)
    if status.end is not None:
        return replace(job, status=status, phase=Phase.GONE)
    if status.is_ending:
        phase = job.phase if job.joined is None else Phase.LEAVING
        return replace(job, status=status, missing=0, phase=phase)
    if not status.is_running:
        # A job that was preempted waits again, with the same id.
        return replace(job, status=status, missing=0, phase=Phase.QUEUED, started=None, joined=None)
    phase = Phase.STARTING if job.phase is Phase.QUEUED else job.phase
    return replace(job, status=status, missing=0, phase=phase, started=now if job.started is None else job.started)


def to_record(job: PoolJob) -> dict[str, Any]:
    """Return the fields of a job for ``cluster/<driver>.json``."""
    status = job.status
    known = {
        "number": job.number,
        "id": job.id,
        "phase": str(job.phase),
        "reason": status.reason,
        "expected": status.expected,
        "node": status.node,
        "end": str(status.end) if status.end else "",
        "workers": len(job.workers),
    }
    return {name: value for name, value in known.items() if value != ""}
