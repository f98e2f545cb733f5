"""The server: the jobs it starts and their order, several servers at one root, and a restart."""

from __future__ import annotations

import configparser
import errno
import os
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from cronsim import CronSim

from pipeline.cli import main
from pipeline.driver.outcome import cancel_job
from pipeline.errors import DiskFull, StorageError
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.lease import identify
from pipeline.jobs.status import Status
from pipeline.service import queue
from pipeline.service.queue import (
    QUEUE,
    STARTING_SECONDS,
    RestartPolicy,
    Start,
    Submission,
    find_starts,
    mark_queued,
    note_start,
    put_submission,
    queued_marks,
)
from pipeline.service.server import Server, serve
from pipeline.service.servers import BEAT_SECONDS, ServerRecord, find_servers, is_served
from pipeline.settings import Settings
from pipeline.storage.store import Store, open_store
from pipeline.testing.jobs import small_job

DEAD = identify(os.getpid()).rpartition("/")[0] + "/0"


class Root:
    """A root of job directories, with its own clock; drivers are only recorded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.small = small_job(folder / "lake", sink=str(folder / "out"))
        self.settings = Settings(directory=str(folder / "jobs"))
        self.seconds = 0.0
        self.started: list[str] = []
        self.launch_errors: list[Exception] = []
        self._lock = threading.Lock()

    def add(self, name: str, *, priority: int = 0, created: str = "2026-01-01T00:00:00.000Z") -> JobDirectory:
        """Create a job as `submit` does with ``start=False``."""
        job = JobDirectory.create(
            self.settings.directory,
            self.small.plan,
            job=name,
            options=JobOptions(first_status=Status.QUEUED, fsync=False, now=lambda: datetime.fromisoformat(created)),
        )
        put_submission(job.store, Submission(1, created, "me", "by hand", name, priority=priority))
        mark_queued(open_store(self.settings.directory), name)
        return job

    def server(self, *, limit: int = 1, starts: int = 3, **options: object) -> Server:
        return Server(
            self.settings,
            limit=limit,
            restart_policy=RestartPolicy(starts=starts, delay=10.0),
            clock=lambda: self.seconds,
            now=lambda: datetime(2026, 1, 2, tzinfo=UTC) + timedelta(seconds=self.seconds),
            start=self.launch,
            **options,  # type: ignore[arg-type]
        )

    def launch(self, job: JobDirectory, start: Start) -> None:
        """Record a driver with the id of this process, which never acquires the lease; or raise the next error."""
        if self.launch_errors:
            raise self.launch_errors.pop()
        note_start(job.store, start, pid=os.getpid())
        with self._lock:
            self.started.append(job.id)

    def kill(self, job: JobDirectory) -> None:
        """Record that the driver of ``job`` has ended."""
        last = find_starts(job.store)[-1]
        moment = (datetime(2026, 1, 2, tzinfo=UTC) + timedelta(seconds=self.seconds)).isoformat()
        job.store.replace(f"starts/{last.number}.json", replace(last, process=DEAD, time=moment).to_json_bytes())


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def test_the_most_urgent_start_first_then_the_oldest_up_to_the_limit(root: Root) -> None:
    """Jobs start by priority, then by age, up to the limit."""
    root.add("late", created="2026-01-01T03:00:00.000Z")
    root.add("early", created="2026-01-01T01:00:00.000Z")
    root.add("urgent", created="2026-01-01T04:00:00.000Z", priority=5)
    served = root.server(limit=2).serve_once()
    assert root.started == ["urgent", "early"]
    assert (served.started, served.waiting) == (["urgent", "early"], ["late"])


def test_a_place_that_becomes_free_is_taken(root: Root) -> None:
    """When a job ends, the next queued job starts."""
    first = root.add("a")
    root.add("b")
    server = root.server()
    server.serve_once()
    server.serve_once()
    assert root.started == ["a"]
    root.kill(first)
    first.set_status(Status.FAILED)
    assert server.serve_once().started == ["b"]
    assert queued_marks(open_store(root.settings.directory)) == ["b"]


def test_a_job_whose_driver_died_is_started_again_later_and_not_for_ever(root: Root) -> None:
    """A dead driver is restarted after 10 s, then 20 s; after the third death the job fails."""
    job, server = root.add("a"), root.server(starts=3)
    delays = []
    for _ in range(3):
        begin = root.seconds
        while not server.serve_once().started:
            root.seconds += 1
        delays.append(root.seconds - begin)
        job.set_status(Status.RUNNING)
        root.kill(job)
    assert delays == [0, 10, 20]
    assert server.serve_once().failed == ["a"]
    last = job.events.read()[-1]
    assert last["after"] == "FAILED"
    assert "its driver died 3 times" in last["reason"]
    assert root.started == ["a"] * 3
    assert queued_marks(open_store(root.settings.directory)) == []


@pytest.mark.fault(104)
class TestFailedLaunch:
    """A launch that fails once blocks neither its job nor the queue."""

    @pytest.mark.parametrize("error", [OSError(errno.EAGAIN, "fork"), DiskFull("no space"), MemoryError()])
    def test_job_starts_later_and_other_jobs_at_once(self, root: Root, error: Exception) -> None:
        """A day of rounds after one failed launch: job a starts 10 s later, job b is not held up."""
        first, server = root.add("a"), root.server()
        root.launch_errors = [error]
        assert server.serve_once().waiting == ["a"]
        assert find_starts(first.store) == ()
        second = root.add("b", created="2026-01-01T00:00:01.000Z")
        assert server.serve_once().started == ["b"]
        root.kill(second)
        second.set_status(Status.CANCELLED)
        started_at = {}
        for seconds in (*range(0, 600, 5), *range(600, 24 * 3600, 600)):
            root.seconds = float(seconds)
            started_at |= dict.fromkeys(server.serve_once().started, seconds)
        assert started_at == {"a": 10}

    def test_attempts_back_off(self, root: Root) -> None:
        """Launches that keep failing are repeated after 10 s, 20 s, 40 s, and count as no start of the job."""
        job, server = root.add("a"), root.server(starts=2)
        root.launch_errors = [OSError(errno.EAGAIN, "fork") for _ in range(4)]
        attempts = []
        while not root.started:
            before = len(root.launch_errors)
            server.serve_once()
            attempts += [root.seconds] * (len(root.launch_errors) < before)
            root.seconds += 1
        assert attempts == [0, 10, 30, 70]
        assert [start.number for start in find_starts(job.store)] == [1]

    def test_record_that_stays_is_ignored_later(self, root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
        """If the storage also refuses to remove the claim, the job starts after `STARTING_SECONDS`."""

        def refuse(store: Store, start: Start) -> None:
            raise StorageError("read-only file system")

        monkeypatch.setattr(queue, "withdraw_start", refuse)
        root.add("a")
        server = root.server()
        root.launch_errors = [OSError(errno.EAGAIN, "fork")]
        server.serve_once()
        root.seconds = STARTING_SECONDS - 1
        assert server.serve_once().started == []
        root.seconds = STARTING_SECONDS
        assert server.serve_once().started == ["a"]


def test_submitted_again_it_has_all_its_starts_again(root: Root) -> None:
    """A new submission of a failed job has all its starts again."""
    job, server = root.add("a"), root.server(starts=1)
    server.serve_once()
    root.kill(job)
    assert server.serve_once().failed == ["a"]
    job.set_status(Status.QUEUED)
    put_submission(job.store, Submission(2, "", "me", "by hand", "a"))
    mark_queued(open_store(root.settings.directory), "a")
    assert server.serve_once().started == ["a"]


def test_a_server_that_comes_back_finds_everything_on_disk(root: Root) -> None:
    """A new server knows running and waiting jobs from disk, and starts none twice."""
    root.add("a")
    root.add("b")
    root.server().serve_once()
    served = root.server().serve_once()
    assert (served.running, served.waiting, root.started) == (["a"], ["b"], ["a"])


def test_a_cancelled_job_is_not_started(root: Root) -> None:
    """A cancelled job is not started, and its mark is removed."""
    cancel_job(root.add("a"))
    assert root.server().serve_once().started == []
    assert queued_marks(open_store(root.settings.directory)) == []


@pytest.mark.fault(44)
@pytest.mark.parametrize("damage", ["deleted", "overwritten"])
def test_marks_are_a_cache(root: Root, damage: str) -> None:
    """Deleted or overwritten marks are rebuilt from the job directories."""
    root.add("a")
    done = root.add("done")
    cancel_job(done)
    JobDirectory.create(root.settings.directory, root.small.plan, job="by-hand")
    store = open_store(root.settings.directory)
    for name in store.list(QUEUE):
        if damage == "deleted":
            store.remove(f"{QUEUE}/{name}")
        else:
            store.replace(f"{QUEUE}/{name}", b"\0\0")
    assert root.server().serve_once().started == ["a"]
    assert queued_marks(store) == ["a"]


def test_a_job_that_cannot_be_read_keeps_no_other_from_running(root: Root, caplog: pytest.LogCaptureFixture) -> None:
    """An unreadable job is skipped with a log line, and other jobs start."""
    root.add("a").store.replace("job.json", b"{")
    root.add("b")
    assert root.server(limit=2).serve_once().started == ["b"]
    assert "job a is skipped" in caplog.text


def test_server_tasks_come_first_and_a_failing_task_is_logged(root: Root, caplog: pytest.LogCaptureFixture) -> None:
    """Tasks run before the queue is served; a task that raises is logged."""

    class Broken:
        def tick(self, now: datetime) -> None:
            raise RuntimeError("this trigger is broken")

    class Due:
        def tick(self, now: datetime) -> None:
            if not root.started:
                root.add("by-trigger")

    assert root.server(tasks=[Broken(), Due()]).serve_once().started == ["by-trigger"]
    assert "this trigger is broken" in caplog.text


def test_servers_that_race_start_each_job_once_and_never_too_many(root: Root) -> None:
    """Four servers that race start each job once, and at most two at a time."""
    for number in range(6):
        root.add(f"job-{number}")
    servers = [root.server(limit=2) for _ in range(4)]
    for server in servers:
        server.beat()
    most, ended = 0, 0
    while ended < 6:
        barrier = threading.Barrier(4)

        def round_of(server: Server, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            server.serve_once()

        threads = [threading.Thread(target=round_of, args=(server,)) for server in servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Where all have withdrawn, the next round of one of them, at another moment, takes the place.
        servers[0].serve_once()
        running = [name for name in queued_marks(servers[0].root) if _is_driven(root, name)]
        most = max(most, len(running))
        for name in running:
            job = JobDirectory.open(f"{root.settings.directory}/{name}")
            root.kill(job)
            job.set_status(Status.CANCELLED)
            ended += 1
    assert most == 2
    assert sorted(root.started) == [f"job-{number}" for number in range(6)]


def _is_driven(root: Root, name: str) -> bool:
    job = JobDirectory.open(f"{root.settings.directory}/{name}")
    return bool(find_starts(job.store)) and not job.status().is_final


def test_signs_of_life(root: Root) -> None:
    """A server is alive by its process on this machine, and by its beat on another machine."""
    server = root.server()
    store, now = open_store(root.settings.directory), datetime(2026, 1, 2, tzinfo=UTC)
    assert not is_served(store, now=now)
    server.beat()
    assert is_served(store, now=now)
    (record,) = find_servers(store)
    far = replace(record, process="elsewhere/pid:[1]/5")
    assert far.is_alive(now=now + timedelta(seconds=BEAT_SECONDS))
    assert not far.is_alive(now=now + timedelta(seconds=20 * BEAT_SECONDS))
    assert not replace(record, process=DEAD).is_alive(now=now)
    server.beat(state="stopped")
    assert not is_served(store, now=now)
    assert ServerRecord.from_json(b"{") is None


def test_server_polls_until_told_to_end(root: Root) -> None:
    """`serve` polls about every 10 s until told to end, then records ``stopped``."""
    root.add("a")
    rounds: list[float] = []

    def is_over(seconds: float) -> bool:
        rounds.append(seconds)
        return len(rounds) == 3

    server = root.server()
    serve(server, wait=is_over, seconds=10)
    assert root.started == ["a"]
    assert all(8 <= seconds <= 12 for seconds in rounds)
    assert find_servers(server.root)[0].state == "stopped"


def call(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["serve", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_unit_of_systemd_is_one(in_folder: Path) -> None:
    """The printed unit is valid, and drivers outlive the server."""
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(call("--print", "systemd", "--jobs", "3"))
    assert unit["Service"]["KillMode"] == "process", "drivers outlive the server"
    assert unit["Service"]["WorkingDirectory"] == str(in_folder)
    assert unit["Service"]["ExecStart"].endswith("-m pipeline serve --jobs 3")
    assert os.access(unit["Service"]["ExecStart"].split()[0], os.X_OK)
    assert unit["Install"]["WantedBy"] == "default.target"


def test_the_line_of_cron_is_one(in_folder: Path) -> None:
    """The printed crontab line runs ``serve --once`` every minute in the current folder."""
    (line,) = [one for one in call("--print", "cron").splitlines() if not one.startswith("#")]
    *fields, command = line.split(maxsplit=5)
    first = next(CronSim(" ".join(fields), datetime(2026, 1, 1, tzinfo=UTC)))
    assert first == datetime(2026, 1, 1, 0, 1, tzinfo=UTC)
    assert command.startswith(f"cd {in_folder} && ")
    assert "serve --once" in command


def test_the_manifests_of_kubernetes_are_two(in_folder: Path) -> None:
    """The printed manifests are a valid Deployment and CronJob."""
    server, rounds = yaml.safe_load_all(call("--print", "kubernetes", "--directory", "s3://jobs/x"))
    assert (server["apiVersion"], server["kind"]) == ("apps/v1", "Deployment")
    assert server["spec"]["selector"]["matchLabels"] == server["spec"]["template"]["metadata"]["labels"]
    assert (rounds["apiVersion"], rounds["kind"]) == ("batch/v1", "CronJob")
    assert rounds["spec"]["concurrencyPolicy"] == "Forbid"
    next(CronSim(rounds["spec"]["schedule"], datetime(2026, 1, 1, tzinfo=UTC)))
    pod = rounds["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] in ("Never", "OnFailure"), "all that a Job may have"
    for spec in (pod, server["spec"]["template"]["spec"]):
        (container,) = spec["containers"]
        assert all(isinstance(word, str) for word in container["command"])
        assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in spec["volumes"]}
    assert {"--once", "--wait"} <= set(pod["containers"][0]["command"])


def test_servers_are_shown(in_folder: Path) -> None:
    """``serve --status`` shows if a server is alive or has stopped."""
    settings = Settings(directory=str(in_folder / ".pipeline/jobs"))
    assert "No server was ever here" in call("--status")
    server = Server(settings)
    server.beat()
    assert "alive" in call("--status")
    server.beat(state="stopped")
    assert "stopped" in call("--status")
