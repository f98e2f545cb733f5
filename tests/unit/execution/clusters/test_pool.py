"""Decisions about a pool of batch jobs, against a batch system that refuses, forgets, delays and loses jobs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.execution.clusters.pool import (
    EARLY_DEATHS,
    LAST_DELAY,
    POLL_SECONDS,
    JobEnd,
    JobStatus,
    Phase,
    Pool,
    PoolPolicy,
    Verdict,
)
from pipeline.execution.clusters.requests import FIRST, Request, Shape

POLICY = PoolPolicy(jobs=3, minimum=3, shapes=(Shape(slots=2, lifetimes=(1000.0,)),), lead=60.0, patience=3600.0)
RUNNING = JobStatus(is_running=True)


def joined(pool: Pool, *, count: int, now: float = 0.0) -> None:
    """Submit ``count`` jobs, each of which joins at once with a worker ``w<number>``."""
    for _ in range(count):
        job = pool.job_submitted(str(100 + pool.count), now=now)
        pool.worker_joined(job.number, f"w{job.number}", now=now)


def listing(pool: Pool, **states: JobStatus) -> dict[str, JobStatus]:
    """All jobs run, except those of ``states``, by their number: ``j2=...``."""
    return {job.id: states.get(f"j{job.number}", RUNNING) for job in pool.jobs.values()}


class TestSubmission:
    def test_fills_the_pool_at_once(self) -> None:
        pool = Pool(POLICY)
        assert pool.jobs_to_submit(now=0) == 3
        joined(pool, count=3)
        assert pool.jobs_to_submit(now=1) == 0

    def test_replaces_a_job_before_its_workers_leave(self) -> None:
        """Earlier by the median of what jobs have needed until now, if that is more than the stagger."""
        pool = Pool(POLICY)
        joined(pool, count=3)
        assert pool.jobs_to_submit(now=939) == 0
        assert pool.jobs_to_submit(now=940) == 3
        slow = Pool(POLICY)
        job = slow.job_submitted("1", now=0)
        slow.worker_joined(job.number, "w", now=300)
        assert slow.lead == 300
        assert slow.jobs_to_submit(now=999) == 2
        assert slow.jobs_to_submit(now=1000) == 3, "1000 s after its start, less 300"

    @pytest.mark.parametrize("number", [1, 2])
    def test_replaces_a_job_that_is_gone_whether_or_not_it_joined(self, number: int) -> None:
        """Also one of several workers, and one that died in the queue."""
        pool = Pool(POLICY)
        joined(pool, count=2)
        pool.job_submitted("queued", now=0)
        gone = pool.asked(listing(pool, **{f"j{number + 1}": JobStatus(end=JobEnd.CANCELLED)}), now=15)
        assert [job.number for job in gone] == [number + 1]
        assert pool.jobs_to_submit(now=15) == 1

    def test_counts_a_job_as_gone_after_two_answers_without_it(self) -> None:
        pool = Pool(POLICY)
        joined(pool, count=3)
        known = listing(pool)
        del known["101"]
        assert pool.asked(known, now=15) == []
        assert pool.jobs_to_submit(now=15) == 0
        assert [job.id for job in pool.asked(known, now=30)] == ["101"]
        assert pool.jobs_to_submit(now=30) == 1

    def test_backs_off_from_a_batch_system_that_does_not_answer(self) -> None:
        pool = Pool(POLICY)
        now, delays = 0.0, []
        for _ in range(12):
            assert pool.jobs_to_submit(now=now) == 3
            pool.submission_failed("unable to contact", is_refused=False, now=now)
            delays.append(pool.submit_from - now)
            now = pool.submit_from
        assert delays[:4] == [1, 2, 4, 8]
        assert delays[-1] == LAST_DELAY
        assert "unable to contact" in pool.describe()
        assert pool.give_up(now=now) is None, "it waits as long as for a queue"

    def test_follows_the_work_that_is_left(self) -> None:
        pool = Pool(replace(POLICY, minimum=1))
        pool.demand = 3
        assert pool.jobs_to_submit(now=0) == 2, "two partitions a job"
        pool.demand = 1
        assert pool.jobs_to_submit(now=0) == 1
        pool.demand = 100
        joined(pool, count=2)
        pool.job_submitted("queued", now=0)
        assert pool.surplus(now=0) == []
        pool.demand = 4
        assert [job.id for job in pool.surplus(now=0)] == ["queued"], "joined jobs have room for all partitions"

    def test_a_preempted_job_that_comes_back_replaces_its_replacement(self) -> None:
        """It has waited longer. Never more jobs stay than are asked for."""
        pool = Pool(POLICY)
        joined(pool, count=3)
        pool.worker_left("w1", is_expected=True, now=10)
        assert pool.jobs_to_submit(now=10) == 1
        pool.job_submitted("new", now=10)
        assert pool.surplus(now=10) == []
        pool.asked({"100": JobStatus(reason="Priority"), "101": RUNNING, "102": RUNNING, "new": JobStatus()}, now=15)
        assert [job.id for job in pool.surplus(now=15)] == ["new"]
        pool.job_cancelled(4)
        assert pool.jobs_to_submit(now=15) == 0


class TestRequests:
    TWO = replace(POLICY, shapes=(Shape(2, (1000.0, 1500.0), memory_steps=1), Shape(4, (5000.0,))), shape_wait=100)

    @pytest.mark.parametrize(
        ("end", "request_"),
        [
            (JobEnd.OUT_OF_MEMORY, Request(memory=1)),
            (JobEnd.TIMEOUT, Request(walltime=1)),
            (JobEnd.PREEMPTED, FIRST),
            (JobEnd.FAILED, FIRST),
        ],
    )
    def test_a_job_killed_for_its_size_is_followed_by_larger_ones(self, end: JobEnd, request_: Request) -> None:
        pool = Pool(self.TWO)
        joined(pool, count=3)
        pool.asked(listing(pool, j1=JobStatus(end=end), j2=JobStatus(end=end)), now=15)
        assert pool.next_request(now=15) == request_
        job = pool.job_submitted("grown", request_, now=15)
        pool.worker_joined(job.number, "grown", now=20)
        pool.demand = 100
        assert pool.jobs_to_submit(now=20) == 1

    def test_a_refused_shape_is_no_error_while_there_is_another(self) -> None:
        pool = Pool(self.TWO)
        pool.submission_failed("invalid partition", FIRST, is_refused=True, now=0)
        assert pool.give_up(now=0) is None
        assert (pool.jobs_to_submit(now=0), pool.next_request(now=0)) == (3, Request(1))
        pool.submission_failed("invalid account", Request(1), is_refused=True, now=0)
        reason = pool.give_up(now=0)
        assert reason is not None
        assert reason.found == "invalid account"
        assert pool.jobs_to_submit(now=0) == 0

    @pytest.mark.parametrize("status", [JobStatus(reason="Priority"), JobStatus(is_impossible=True)])
    def test_jobs_that_wait_long_have_jobs_of_the_next_shape_beside_them(self, status: JobStatus) -> None:
        pool = Pool(self.TWO)
        for count in range(3):
            pool.job_submitted(f"a{count}", now=0)
        pool.asked({f"a{count}": status for count in range(3)}, now=10)
        now = 10 if status.is_impossible else 101
        if not status.is_impossible:
            assert pool.jobs_to_submit(now=100) == 0
        assert pool.give_up(now=now) is None
        assert (pool.jobs_to_submit(now=now), pool.next_request(now=now)) == (3, Request(1))
        for count in range(3):
            pool.job_submitted(f"b{count}", Request(1), now=now)
        assert pool.jobs_to_submit(now=now + 99) == 0
        # Both wait now: no third set of jobs. Then the second shape starts, and the first is not needed any more.
        assert pool.jobs_to_submit(now=now + 1000) == 0
        for number in (4, 5, 6):
            pool.worker_joined(number, f"w{number}", now=now)
        pool.demand = 12
        assert {job.id for job in pool.surplus(now=now)} == {"a0", "a1", "a2"}

    def test_a_node_on_which_jobs_die_is_left_out_once_others_work(self) -> None:
        pool = Pool(POLICY)
        for count in range(2):
            job = pool.job_submitted(f"x{count}", now=0)
            pool.asked({**listing(pool), job.id: JobStatus(end=JobEnd.FAILED, node="n3")}, now=1)
        assert not pool.excluded, "it may be the job's own fault"
        joined(pool, count=1)
        job = pool.job_submitted("x2", now=2)
        pool.asked({**listing(pool), job.id: JobStatus(end=JobEnd.FAILED, node="n3")}, now=3)
        assert pool.excluded == {"n3"}


class TestGivingUp:
    def test_a_refusal_is_quoted_at_once(self) -> None:
        pool = Pool(POLICY)
        pool.submission_failed("invalid partition", is_refused=True, now=0)
        reason = pool.give_up(now=0)
        assert reason is not None
        assert reason.is_refused
        assert reason.found == "invalid partition"

    def test_a_refusal_waits_while_workers_are_there(self) -> None:
        pool = Pool(POLICY)
        joined(pool, count=1)
        pool.submission_failed("invalid partition", is_refused=True, now=0)
        assert pool.give_up(now=1) is None

    def test_a_request_that_no_node_fits(self) -> None:
        pool = Pool(POLICY)
        pool.job_submitted("7", now=0)
        pool.asked({"7": JobStatus(reason="PartitionTimeLimit", is_impossible=True)}, now=1)
        reason = pool.give_up(now=1)
        assert reason is not None
        assert "job 7 waits for what no node has: PartitionTimeLimit" in reason.found

    def test_jobs_that_die_before_they_join(self) -> None:
        """A cancelled job is nobody's fault, and one that joins begins the count anew."""
        pool = Pool(POLICY)
        for count in range(EARLY_DEATHS):
            assert pool.give_up(now=0) is None
            job = pool.job_submitted(f"x{count}", now=0)
            pool.asked({job.id: JobStatus(end=JobEnd.FAILED)}, now=1)
        reason = pool.give_up(now=1)
        assert reason is not None
        assert "x0, x1, x2" in reason.found
        cancelled = Pool(POLICY)
        for count in range(EARLY_DEATHS):
            job = cancelled.job_submitted(f"x{count}", now=0)
            cancelled.asked({job.id: JobStatus(end=JobEnd.CANCELLED)}, now=1)
        assert cancelled.give_up(now=1) is None

    def test_patience_holds_for_every_wait_in_the_queue(self) -> None:
        """Not only for the first one: workers that were preempted come back as late as the first ones came."""
        pool = Pool(POLICY)
        joined(pool, count=1)
        pool.worker_left("w1", is_expected=False, now=500)
        pool.asked({"100": JobStatus(reason="Priority", expected="15:14")}, now=501)
        assert pool.jobs[1].phase is Phase.QUEUED
        assert pool.describe() == "1 queued (Priority), first expected 15:14"
        assert pool.give_up(now=500 + 3600) is None
        reason = pool.give_up(now=500 + 3601)
        assert reason is not None
        assert "1 queued (Priority)" in reason.found


class TestVerdict:
    @pytest.mark.parametrize(
        ("status", "verdict"),
        [
            (JobStatus(end=JobEnd.CANCELLED), Verdict(JobEnd.CANCELLED)),
            (JobStatus(end=JobEnd.OUT_OF_MEMORY), Verdict(JobEnd.OUT_OF_MEMORY)),
            (JobStatus(reason="Priority"), Verdict(JobEnd.PREEMPTED)),
            (JobStatus(is_ending=True), None),
            (RUNNING, Verdict(None)),
        ],
    )
    def test_follows_the_state_of_the_job(self, status: JobStatus, verdict: Verdict | None) -> None:
        pool = Pool(POLICY)
        joined(pool, count=2)
        pool.worker_left("w1", is_expected=False, now=10)
        assert pool.verdict("w1", now=10) is None
        assert pool.poll_due(now=12), "sooner than otherwise"
        pool.asked(listing(pool, j1=status), now=12)
        assert pool.verdict("w1", now=12) == verdict

    def test_is_unknown_without_an_answer(self) -> None:
        pool = Pool(POLICY)
        joined(pool, count=1)
        pool.worker_left("w1", is_expected=False, now=10)
        pool.asked(None, now=12, text="hangs")
        assert pool.verdict("w1", now=29) is None
        assert pool.verdict("w1", now=30) == Verdict(JobEnd.UNKNOWN)


@dataclass
class _World:
    """A batch system that does as a list of numbers says, and a pool on it."""

    pool: Pool
    choices: list[int]
    now: float = 0.0
    states: dict[str, JobStatus] = field(default_factory=dict)
    is_chaos: bool = True

    def choose(self, most: int) -> int:
        """Return the next choice, from 0 to ``most``; 0 once all is well."""
        return self.choices.pop() % (most + 1) if self.choices and self.is_chaos else 0

    def turn(self) -> None:
        """Let a few seconds pass."""
        self.now += 5
        for job in list(self.pool.jobs.values()):
            self._play(job.number, job.id)
        if self.pool.poll_due(now=self.now):
            # It does not answer, or forgets all jobs for once.
            lie = self.choose(8)
            self.pool.asked(None if lie == 1 else {} if lie == 2 else dict(self.states), now=self.now, text="away")
        for _ in range(self.pool.jobs_to_submit(now=self.now)):
            if self.choose(3) == 1:
                self.pool.submission_failed("away", is_refused=False, now=self.now)
                break
            job = self.pool.job_submitted(str(self.pool.count + 1), now=self.now)
            self.states[job.id] = JobStatus(reason="Priority")

    def _play(self, number: int, id: str) -> None:
        job, state = self.pool.jobs[number], self.states[id]
        event = self.choose(9)
        if state.end is None and event == 1:
            self.states[id] = JobStatus(end=JobEnd.FAILED if self.choose(1) else JobEnd.CANCELLED)
            for worker in job.workers:
                self.pool.worker_left(worker, is_expected=False, now=self.now)
        elif job.phase is Phase.JOINED and event == 2:
            for worker in job.workers:
                self.pool.worker_left(worker, is_expected=True, now=self.now)
            self.states[id] = JobStatus(end=JobEnd.COMPLETED)
        elif state.end is None and not state.is_running:
            self.states[id] = RUNNING
        elif state.is_running and not job.workers and job.phase is not Phase.LEAVING:
            self.pool.worker_joined(number, f"w{id}", now=self.now)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=120))
def test_every_loss_is_replaced_and_never_too_many_are_alive(choices: list[int]) -> None:
    """Whatever the batch system does: once it works again, all jobs are back within minutes."""
    world = _World(Pool(replace(POLICY, shapes=(Shape(2, (1e6,)),))), choices)
    while world.choices:
        world.turn()
        assert sum(job.phase is not Phase.LEAVING for job in world.pool.jobs.values()) <= POLICY.jobs
        assert world.pool.describe()
    world.is_chaos = False
    for _ in range(int((LAST_DELAY + 4 * POLL_SECONDS) / 5)):
        world.turn()
    alive = [job for job in world.pool.jobs.values() if job.phase is Phase.JOINED]
    assert len(alive) == POLICY.jobs
    assert all(world.states[job.id].is_running for job in alive)
