"""The instants of triggers, and the log that makes each firing unique."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CorruptInput, SpecError, StateCorrupt, StorageError
from pipeline.service.triggers import decide
from pipeline.service.triggers.arrivals import ArrivedFile, decide_arrival
from pipeline.service.triggers.decide import REFUSED, Success, View, decide_trigger
from pipeline.service.triggers.definitions import find_trigger, load_triggers
from pipeline.service.triggers.evaluate import BadFiles, evaluate_trigger, explain, scan_in_process
from pipeline.service.triggers.log import Entry, Firing, Log, State, from_text, open_log, to_text
from pipeline.service.triggers.schedule import InstantRange, firing_id, instants, next_instant
from pipeline.spec.triggers import ArrivalTrigger, Trigger
from pipeline.storage.local import LocalStore
from pipeline.testing.stores import Faults, FaultyStore, io_error

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


@dataclass
class Jobs:
    """Jobs that start when submitted and end when the test sets their status."""

    made: dict[str, Firing] = field(default_factory=dict)
    statuses: dict[str, str] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    others: tuple[Success, ...] = ()
    error: Exception | None = None
    bad: set[str] = field(default_factory=set)
    """Paths of files for which no job can be created."""

    def submit(self, firing: Firing) -> str:
        if self.error is not None:
            raise self.error
        bad = {seen: "a damaged file" for seen in firing.files if seen.path in self.bad}
        if bad:
            raise BadFiles(CorruptInput("a damaged file"), bad)
        self.made.setdefault(firing.id, firing)
        return f"job-{firing.id}"

    def ended(self, job: str) -> str:
        return self.statuses.get(job, "")

    def cancel(self, job: str) -> None:
        self.cancelled.append(job)

    def successes(self, name: str) -> Sequence[Success]:
        return self.others


@dataclass
class Watch:
    """One trigger, evaluated by the test."""

    trigger: Trigger
    log: Log
    jobs: Jobs = field(default_factory=Jobs)
    files: tuple[ArrivedFile, ...] = ()

    def at(self, moment: datetime) -> list[str]:
        seen = evaluate_trigger(
            self.trigger, self.log, jobs=self.jobs, clock=lambda: moment, scan=lambda arrival, seen: self.files
        )
        return [firing.id for firing in seen.fired]

    def end(self, status: str = "SUCCEEDED") -> None:
        self.jobs.statuses.update({f"job-{id}": status for id in self.jobs.made})


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return open_log(tmp_path, "t", fsync=False)


def watch(log: Log, **fields: object) -> Watch:
    made = Watch(Trigger(**fields), log)
    made.at(NOON)
    return made


# Schedules


@pytest.mark.parametrize(
    ("cron", "zone", "day", "expected"),
    [
        ("30 2 * * *", "Europe/Berlin", "2026-03-29", ["01:00"]),  # leapt over: at once
        ("30 2 * * *", "Europe/Berlin", "2026-10-25", ["00:30"]),  # twice: the first
        ("0 * * * *", "America/New_York", "2026-03-08", [f"{hour:02d}:00" for hour in range(24)]),
        ("0 9 * * *", "America/New_York", "2026-03-08", ["13:00"]),
        ("0 9 * * *", "America/New_York", "2026-03-07", ["14:00"]),
        ("0 12 * * *", "Asia/Kolkata", "2026-03-08", ["06:30"]),
        ("0 0 * * FRI", "Africa/Cairo", "2026-04-23", ["22:00"]),  # midnight does not exist there
    ],
)
def test_instants(cron: str, zone: str, day: str, expected: list[str]) -> None:
    """Instants follow the time zone: a skipped time fires at once, a repeated time only the first time."""
    begin = datetime.fromisoformat(day).replace(tzinfo=UTC)
    until = begin + timedelta(days=1, seconds=-1)
    found = instants(Trigger(cron=cron, time_zone=zone), after=begin - timedelta(seconds=1), until=until)
    assert [f"{one:%H:%M}" for one in found] == expected


def test_intervals_are_multiples_since_the_epoch() -> None:
    """Instants of ``every`` are multiples of the interval since the epoch."""
    trigger = Trigger(every="15 min")
    found = list(instants(trigger, after=NOON, until=NOON + timedelta(hours=1)))
    assert [one.minute for one in found] == [15, 30, 45, 0]
    assert next_instant(trigger, after=NOON) == NOON + timedelta(minutes=15)
    assert next_instant(Trigger(), after=NOON) is None


def test_instants_do_not_depend_on_where_one_begins() -> None:
    """Polling in small steps gives the same instants as one long range."""
    trigger = Trigger(cron="*/20 0-4 * * *", time_zone="America/New_York")
    begin, until = datetime(2026, 10, 30, tzinfo=UTC), datetime(2026, 11, 3, tzinfo=UTC)
    whole = list(instants(trigger, after=begin, until=until))
    moment, parts = begin, []
    while moment < until:
        step = min(until, moment + timedelta(minutes=7, seconds=13))
        parts += instants(trigger, after=moment, until=step)
        moment = step
    assert parts == whole


@pytest.mark.parametrize(("missed", "expected"), [("skip", ["12"]), ("once", ["12"]), ("each", ["10", "11", "12"])])
def test_missed(log: Log, missed: str, expected: list[str]) -> None:
    """After an outage, ``skip`` and ``once`` fire the last instant, ``each`` fires all; the rest counts as skipped."""
    one = Watch(Trigger(cron="0 * * * *", missed=missed), log)
    one.at(NOON.replace(hour=9, minute=30))
    assert one.at(NOON) == [f"20260301T{hour}0000Z" for hour in expected]
    assert one.log.read().skipped == 3 - len(expected)


def test_missed_altogether(log: Log) -> None:
    """With ``skip``, instants that are all in the past are skipped."""
    skip = Watch(Trigger(cron="0 * * * *", missed="skip"), log)
    skip.at(NOON.replace(hour=9, minute=30))
    assert skip.at(NOON.replace(minute=30)) == []
    assert skip.log.read().skipped == 3


def test_queue_runs_one_after_the_other(log: Log) -> None:
    """With ``queue``, the next job starts after the previous job has ended."""
    one = watch(log, cron="0 * * * *")
    first, second = one.at(NOON.replace(hour=13)), one.at(NOON.replace(hour=14))
    assert first
    assert second
    assert list(one.jobs.made) == first
    one.end()
    one.at(NOON.replace(hour=14, minute=1))
    assert list(one.jobs.made) == first + second


def test_forbid_skips(log: Log) -> None:
    """With ``forbid``, an instant during a running job is skipped for good."""
    one = watch(log, cron="0 * * * *", overlap="forbid")
    assert one.at(NOON.replace(hour=13))
    assert one.at(NOON.replace(hour=14)) == []
    one.end("FAILED")
    assert one.at(NOON.replace(hour=14, minute=30)) == []
    assert one.at(NOON.replace(hour=15))


def test_cancel_gives_up_the_older(log: Log) -> None:
    """With ``cancel``, a new firing cancels the running job and replaces a waiting firing."""
    one = watch(log, cron="0 * * * *", overlap="cancel")
    (first,) = one.at(NOON.replace(hour=13))
    assert one.at(NOON.replace(hour=14))
    (third,) = one.at(NOON.replace(hour=15))
    assert set(one.jobs.cancelled) == {f"job-{first}"}
    one.end("CANCELLED")
    one.at(NOON.replace(hour=15, minute=1))
    assert list(one.jobs.made) == [first, third], "the one in between never began"


@pytest.mark.fault(107)
class TestChangedDefinition:
    def test_due_instants_fire_by_the_definition_before(self, log: Log) -> None:
        """Instants before the change follow the old schedule, instants after the change the new one."""
        one = watch(log, cron="0 * * * *", missed="each")
        one.trigger = Trigger(cron="30 * * * *", missed="each")
        assert one.at(NOON.replace(hour=15)) == [f"20260301T{hour}0000Z" for hour in (13, 14, 15)]
        assert one.at(NOON.replace(hour=16)) == ["20260301T153000Z"]

    def test_two_servers_with_two_definitions_erase_no_instant(self, log: Log) -> None:
        """Servers that read two versions of a trigger in turn fire every instant that both have, once, and warn."""
        one = watch(log, cron="*/5 * * * *")
        versions = (one.trigger, Trigger(cron="*/5 * * * *", grace="6 min"))
        fired: list[str] = []
        warnings = 0
        for second in range(5, 3600, 5):
            now = NOON + timedelta(seconds=second)
            trigger = versions[second // 5 % 2]
            result = evaluate_trigger(trigger, log, jobs=one.jobs, clock=lambda now=now: now)  # type: ignore[misc]
            fired += [firing.id for firing in result.fired]
            warnings += bool(result.warning)
        assert fired == [firing_id(NOON + timedelta(minutes=minute)) for minute in range(5, 60, 5)]
        assert warnings > 400

    def test_instants_without_room_are_skipped_and_counted(self, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
        """A change never waits for more firings than may be open."""
        monkeypatch.setattr(decide, "MOST_OPEN", 2)
        one = watch(log, cron="0 * * * *", missed="each")
        one.trigger = Trigger(cron="30 * * * *", missed="each")
        assert one.at(NOON.replace(hour=17)) == ["20260301T130000Z", "20260301T140000Z"]
        state = one.log.read()
        assert (state.skipped, state.upto) == (3, to_text(NOON.replace(hour=17)))


@pytest.mark.fault(106)
class TestLongDowntime:
    """Memory and time of a look do not grow with the time that no server ran."""

    @pytest.mark.parametrize("schedule", [{"every": "1 s"}, {"cron": "* * * * *", "time_zone": "Europe/Berlin"}])
    @pytest.mark.parametrize("missed", ["once", "skip", "each"])
    def test_look_after_a_year(self, log: Log, schedule: dict[str, str], missed: str) -> None:
        """After a year without a server, one look takes less than 20 MiB and fires no more than it may."""
        one = watch(log, missed=missed, grace="30 s", **schedule)
        end = NOON + timedelta(days=365, seconds=10)
        step = 1 if "every" in schedule else 60
        tracemalloc.start()
        try:
            decision = decide_trigger(one.trigger, log.read(), now=end, view=View())
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 20 << 20
        fired = [entry.firing.time for entry in decision.entries if entry.firing is not None]
        skipped = sum(entry.count for entry in decision.entries)
        instants_of_a_year = (365 * 86400 + 10) // step
        if missed == "each":
            assert (len(fired), skipped) == (decide.MOST_AT_ONCE, 0)
        else:
            late = instants_of_a_year - (31 if step == 1 else 1)
            assert skipped == (late if missed == "skip" else instants_of_a_year - 1)
            assert len(fired) == (instants_of_a_year - skipped)
            assert fired[-1] == to_text(end if step == 1 else end.replace(second=0))

    def test_each_fires_no_more_than_may_be_open(self, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
        """With ``each``, instants wait in the schedule, not in the log, until firings have ended."""
        monkeypatch.setattr(decide, "MOST_OPEN", 3)
        one = watch(log, every="1 min", missed="each")
        fired = one.at(NOON + timedelta(minutes=10))
        assert len(fired) == 3
        while len(fired) < 10:
            one.end()
            fired += one.at(NOON + timedelta(minutes=10, seconds=30))
        assert fired == [firing_id(NOON + timedelta(minutes=minute)) for minute in range(1, 11)]
        assert one.log.read().skipped == 0


SCHEDULES = st.one_of(
    st.sampled_from(["7 s", "1 min", "90 min", "1 d"]).map(lambda every: {"every": every}),
    st.tuples(
        st.sampled_from(["*", "0", "*/20", "5,35"]),
        st.sampled_from(["*", "2", "1-3", "*/2", "0,12", "23"]),
        st.sampled_from(["*", "1", "25-31", "L"]),
        st.sampled_from(["Europe/Berlin", "Australia/Lord_Howe", "Africa/Cairo", "Pacific/Apia", "UTC"]),
    ).map(lambda of: {"cron": f"{of[0]} {of[1]} {of[2]} * *", "time_zone": of[3]}),
)


@pytest.mark.fault(106)
@given(
    schedule=SCHEDULES,
    begin=st.datetimes(datetime(2026, 1, 1), datetime(2026, 12, 31)),
    length=st.sampled_from([1, 100, 5_000, 90_000, 700_000, 5_000_000]),
    left_out=st.integers(0, 5),
)
def test_range_counts_what_it_would_list(schedule: dict[str, str], begin: datetime, length: int, left_out: int) -> None:
    """First, last and number of the instants of a range equal those of their list, in odd zones too."""
    trigger, after = Trigger(**schedule), begin.replace(tzinfo=UTC)
    until = after + timedelta(seconds=length if "cron" in schedule else min(length, 90_000))
    every = list(instants(trigger, after=after, until=until))
    those = InstantRange(trigger, after, until, frozenset(every[-left_out:] if left_out else ()))
    expected = every[: max(0, len(every) - left_out)]
    assert those.count() == len(expected)
    assert (those.first(), those.last()) == ((expected[0], expected[-1]) if expected else (None, None))


# Files


def file(name: str, *, age: float, size: int = 10, marked: bool = True, rows: int | None = None) -> ArrivedFile:
    return ArrivedFile(name, size, "v1", NOON.timestamp() - age, marked, rows)


@pytest.mark.parametrize(
    ("fields", "files", "expected"),
    [
        ({}, [file("a", age=11)], "a"),
        ({}, [file("a", age=11), file("b", age=3)], ""),  # more is coming
        ({"at_latest": "10 s"}, [file("a", age=11), file("b", age=3)], "a"),
        ({"quiet": 0}, [file("a", age=0)], "a"),
        ({"marker": "_SUCCESS"}, [file("a", age=0, marked=False)], ""),
        ({"marker": "_SUCCESS"}, [file("a", age=0), file("b", age=9, marked=False)], "a"),
        ({"files": 2}, [file("a", age=11), file("b", age=3)], ""),
        ({"files": 2}, [file("a", age=11), file("b", age=11), file("c", age=1)], "ab"),
        ({"files": 3, "bytes": "20 B"}, [file("a", age=11), file("b", age=11)], "ab"),
        ({"rows": 100}, [file("a", age=11, rows=40), file("b", age=11, rows=59)], ""),
        ({"rows": 100}, [file("a", age=11, rows=40), file("b", age=11, rows=60)], "ab"),
        ({"files": 9, "at_latest": "1 h"}, [file("a", age=3601)], "a"),
    ],
)
def test_files_that_are_due(fields: dict[str, object], files: list[ArrivedFile], expected: str) -> None:
    """Files are due by quiet time, marker, number, rows, bytes and ``at_latest``."""
    due = decide_arrival(ArrivalTrigger(path="in/", **fields), files, seen=(), now=NOON)
    assert "".join(one.path for one in due.files) == expected
    assert due.reason
    assert len(due.files) + due.waiting == len(files)


def test_a_file_fires_once_and_again_when_it_changes(log: Log) -> None:
    """A file fires once, and again only with a new version."""
    one = watch(log, arrival=ArrivalTrigger(path="in/"))
    one.files = (file("a", age=60), file("b", age=60))
    assert len(one.at(NOON)) == 1
    assert one.at(NOON) == []
    one.files = (file("a", age=60), replace(file("b", age=20), version="v2"))
    one.end()
    (again,) = one.at(NOON)
    assert [seen.path for seen in one.jobs.made[again].files] == ["b"]


def test_files_wait_for_the_end_of_the_job_under_forbid(log: Log) -> None:
    """With ``forbid``, new files wait until the running job has ended."""
    one = watch(log, arrival=ArrivalTrigger(path="in/"), overlap="forbid")
    one.files = (file("a", age=60),)
    one.at(NOON)
    one.files = (*one.files, file("b", age=50), file("c", age=50))
    assert one.at(NOON) == []
    one.end()
    (again,) = one.at(NOON)
    assert [seen.path for seen in one.jobs.made[again].files] == ["b", "c"]


@pytest.mark.parametrize(("status", "expected"), [("CANCELLED", ["a", "b"]), ("SUCCEEDED", ["b"])])
def test_a_cancelled_job_gives_its_files_to_the_next(log: Log, status: str, expected: list[str]) -> None:
    """With ``cancel``, the next job also gets the files of a job that was cancelled."""
    one = watch(log, arrival=ArrivalTrigger(path="in/"), overlap="cancel")
    one.files = (file("a", age=60),)
    one.at(NOON)
    one.files = (*one.files, file("b", age=50))
    assert one.at(NOON) == []
    assert one.jobs.cancelled
    one.end(status)
    (again,) = one.at(NOON)
    assert [seen.path for seen in one.jobs.made[again].files] == expected


def test_looking_at_real_files(tmp_path: Path) -> None:
    """A scan finds visible Parquet files with markers and rows; a preserved modification time does not count."""
    for name in ("day=1/a.parquet", "day=1/deep/b.parquet", "day=2/c.parquet"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"x": [1, 2, 3]}), path)
        os.utime(path, (1, 1))
    (tmp_path / "in/day=1/_SUCCESS").touch()
    (tmp_path / "in/.hidden").touch()
    found = scan_in_process(ArrivalTrigger(path=str(tmp_path / "in"), marker="_SUCCESS", rows=1), seen=())
    assert [Path(one.path).name for one in found] == ["a.parquet", "b.parquet", "c.parquet"]
    assert [one.is_marked for one in found] == [True, True, False]
    assert [one.rows for one in found] == [3, 3, 3]
    assert all(one.modified > NOON.timestamp() - 1e7 for one in found), "a copy that keeps its times has come now"
    (tmp_path / "in/_SUCCESS").touch()
    assert all(
        one.is_marked for one in scan_in_process(ArrivalTrigger(path=str(tmp_path / "in"), marker="_SUCCESS"), seen=())
    )
    seen = [found[0].key]
    rest = scan_in_process(ArrivalTrigger(path=str(tmp_path / "in/*/*.parquet"), rows=1), seen=seen)
    assert [(Path(one.path).name, one.rows) for one in rest] == [("a.parquet", None), ("c.parquet", 3)]
    assert scan_in_process(ArrivalTrigger(path=str(tmp_path / "nothing/*.parquet")), seen=()) == ()


def test_a_listing_that_leaves_a_file_out_does_not_forget_it(log: Log) -> None:
    """A file missing from a listing is remembered, and forgotten only after a month."""
    one = watch(log, arrival=ArrivalTrigger(path="in/"))
    both = (file("a", age=60), file("b", age=60))
    one.files = both
    one.at(NOON)
    one.end()
    one.files = both[:1]
    later = NOON + timedelta(days=40)
    one.at(later)
    one.files = both
    assert one.at(later) == []
    one.files = both[:1]
    one.at(later)
    assert len(one.log.read().seen) == 2
    one.at(later + timedelta(days=31))
    assert len(one.log.read().seen) == 1


# Other jobs, and by hand


def test_after_another_job(log: Log) -> None:
    """Each later success of the other job fires once, and so does a retry that repairs."""
    one = Watch(Trigger(after="first"), log)
    old = Success("first-1", 1, NOON - timedelta(days=1))
    one.jobs.others = (old,)
    assert one.at(NOON) == []
    assert one.at(NOON) == []
    one.jobs.others = (old, Success("first-2", 1, NOON))
    assert one.at(NOON) == ["first-2.1"]
    one.end()
    one.jobs.others = (*one.jobs.others, Success("first-2", 2, NOON))
    assert one.at(NOON) == ["first-2.2"], "a retry that repairs is another success"
    assert one.at(NOON) == []


def test_a_refused_job_ends_its_firing(log: Log) -> None:
    """An invalid job ends its firing as REFUSED, and the next instant fires."""
    one = watch(log, cron="0 * * * *")
    one.jobs.error = SpecError("no such model")
    (first,) = one.at(NOON.replace(hour=13))
    one.jobs.error = None
    (second,) = one.at(NOON.replace(hour=14))
    assert [(past.id, past.status) for past in one.log.read().recent] == [(first, REFUSED)]
    assert list(one.jobs.made) == [second]


@pytest.mark.fault(108)
def test_bad_file_does_not_take_good_files_with_it(log: Log) -> None:
    """The good files of a refused firing fire again at once; a bad file fires again when it changes."""
    one = watch(log, arrival=ArrivalTrigger(path="in/"))
    one.files = (file("good", age=60), file("half", age=60), file("other", age=60))
    one.jobs.bad = {"half"}
    first, second = one.at(NOON)
    assert [seen.path for seen in one.jobs.made[second].files] == ["good", "other"]
    assert first not in one.jobs.made
    (past,) = one.log.read().recent
    assert (past.id, past.status) == (first, REFUSED)
    assert "half: a damaged file" in past.reason
    one.end()
    assert one.at(NOON) == []
    one.jobs.bad = set()
    one.files = (*one.files[::2], replace(file("half", age=20), version="v2"))
    (third,) = one.at(NOON)
    assert [seen.path for seen in one.jobs.made[third].files] == ["half"]


def test_temporary_failure_is_retried(log: Log) -> None:
    """After a temporary error, the same firing is retried at the next poll."""
    one = watch(log, cron="0 * * * *")
    one.jobs.error = StorageError("not now")
    (first,) = one.at(NOON.replace(hour=13))
    one.jobs.error = None
    assert one.at(NOON.replace(hour=13, minute=1)) == []
    assert list(one.jobs.made) == [first]


def test_explain_writes_nothing(log: Log) -> None:
    """`explain` gives a reason and leaves the log unchanged."""
    trigger = Trigger(cron="0 * * * *")
    _, decision = explain(trigger, log, jobs=Jobs(), now=NOON)
    assert decision.reason
    assert log.read() == State()


# The log


def fired(number: int) -> list[Entry]:
    return [Entry("fired", firing=Firing(firing_id(NOON + timedelta(hours=number)), "cron", to_text(NOON)))]


def test_writers_with_the_same_state_have_one_winner(tmp_path: Path) -> None:
    """If two writers read the same state, one appends, and the other gets False."""
    one, other = open_log(tmp_path, "t"), open_log(tmp_path, "t")
    before = one.read()
    assert other.append(fired(1), after=other.read(), now=NOON)
    assert not one.append(fired(2), after=before, now=NOON)
    assert [open_.firing.id for open_ in one.read().open] == ["20260301T130000Z"]


def test_snapshots_stand_for_what_is_removed(tmp_path: Path) -> None:
    """Snapshots replace removed records: a new reader gets the same state."""
    one = Log(LocalStore(tmp_path, fsync=False), snapshot_every=5)
    for number in range(23):
        assert one.append(fired(number), after=one.read(), now=NOON)
    assert len(list((tmp_path / "log").iterdir())) < 12
    fresh = Log(LocalStore(tmp_path, fsync=False), snapshot_every=5)
    assert fresh.read() == one.read()
    assert len(fresh.read().open) == 23


def test_a_writer_who_slept_for_long_writes_nothing_that_counts(tmp_path: Path) -> None:
    """A writer whose state is older than the snapshot appends nothing."""
    sleeper = Log(LocalStore(tmp_path, fsync=False), snapshot_every=5)
    before = sleeper.read()
    one = Log(LocalStore(tmp_path, fsync=False), snapshot_every=5)
    for number in range(20):
        one.append(fired(number), after=one.read(), now=NOON)
    assert not (tmp_path / "log/00000001.json").exists()
    assert not sleeper.append(fired(99), after=before, now=NOON)
    assert sleeper.read() == one.read()


def test_a_damaged_record_is_no_reason_to_fire(tmp_path: Path) -> None:
    """A damaged or missing record raises `StateCorrupt`."""
    log = open_log(tmp_path, "t")
    log.append(fired(1), after=log.read(), now=NOON)
    Path(log.store.url("log/00000001.json")).write_bytes(b"{}")
    with pytest.raises(StateCorrupt, match="damaged"):
        open_log(tmp_path, "t").read()
    log.append(fired(2), after=log.read(), now=NOON)
    log.append(fired(3), after=log.read(), now=NOON)
    Path(log.store.url("log/00000002.json")).unlink()
    with pytest.raises(StateCorrupt, match="missing"):
        open_log(tmp_path, "t").read()


@pytest.mark.parametrize("is_reply_lost", [False, True])
def test_every_storage_operation_may_fail(tmp_path: Path, is_reply_lost: bool) -> None:
    """After an error at any operation, done or not, the next poll continues, and there is one job."""
    for number in range(60):
        folder, faults = tmp_path / str(number), Faults(number, fault=io_error)
        one = Watch(Trigger(cron="0 * * * *"), Log(LocalStore(folder, fsync=False)))
        one.at(NOON)
        one.log = Log(FaultyStore(LocalStore(folder, fsync=False), faults, is_reply_lost=is_reply_lost))
        try:
            one.at(NOON.replace(hour=13))
        except (OSError, StorageError):
            one.log = Log(LocalStore(folder, fsync=False))
            one.at(NOON.replace(hour=13))
        assert list(one.jobs.made) == ["20260301T130000Z"]
        if not faults.has_failed:
            return
    raise AssertionError("it never came through")


def test_texts_of_times_sort_as_times_do() -> None:
    """Times as text sort in time order, are read back exactly, and give distinct firing ids."""
    times = [NOON + timedelta(microseconds=step) for step in (0, 1, 10, 500_000, 1_000_000)]
    assert sorted(map(to_text, times)) == [to_text(one) for one in times]
    assert [from_text(to_text(one)) for one in times] == times
    assert len({firing_id(one) for one in times}) == len(times)


# As people write them


def test_triggers_of_a_file(tmp_path: Path) -> None:
    """Job paths in a trigger file are relative to the file; an unknown name raises `SpecError`."""
    path = tmp_path / "triggers.yaml"
    path.write_text(
        'triggers:\n  - {name: a, job: jobs/a.yaml, cron: "0 2 * * *", params: {day: monday}}\n'
        "  - {name: b, job: s3://bucket/b.yaml, after: a}\n"
    )
    a, b = load_triggers([path])
    assert (a.name, a.job, a.trigger.params) == ("a", f"{tmp_path}/jobs/a.yaml", {"day": "monday"})
    assert (b.trigger.kind, b.job) == ("after", "s3://bucket/b.yaml")
    with pytest.raises(SpecError) as caught:
        find_trigger((a, b), "A1")
    assert "unknown trigger" in str(caught.value)


def test_triggers_of_a_job_spec(tmp_path: Path) -> None:
    """A trigger without a name in a job spec has the job's name; two of one name raise `SpecError`."""
    path = tmp_path / "job.yaml"
    path.write_text('name: churn\nsource: {path: "${params.where}"}\nsteps: []\ntriggers:\n  - every: 5 min\n')
    (only,) = load_triggers([path])
    assert (only.name, only.job, only.trigger.every) == ("churn", str(path), "5 min")
    with pytest.raises(SpecError, match="same name"):
        load_triggers([path, path])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{cron: 1 2 3}", "five fields"),
        ('{cron: "0 0 30 2 *"}', "day-of-month"),
        ('{cron: "61 2 * * *"}', "minute"),
        ('{cron: "0 2 * * *", time_zone: Europe/Berln}', "Europe/Berlin"),
        ('{cron: "0 2 * * *", every: 5 min}', "more than one of"),
        ("{every: soon}", "valid duration"),
        ("{every: 0.1 s}", "too short"),
        ("{arrival: {path: in/, marker: a/b}}", "name of a file"),
        ("{arrival: {}}", "path is missing"),
        ("{every: 5 min, missed: each, overlap: forbid}", "queue"),
        ("{evry: 5 min}", "every"),
    ],
)
def test_issues(tmp_path: Path, text: str, said: str) -> None:
    """An invalid trigger raises `SpecError` with the reason and the file."""
    path = tmp_path / "job.yaml"
    path.write_text(f"name: churn\nsource: {{path: lake/}}\ntriggers:\n  - {text}\n")
    with pytest.raises(SpecError) as caught:
        load_triggers([path])
    assert said in str(caught.value)
    assert "job.yaml" in str(caught.value)


def test_a_view_without_anything_is_no_reason_to_fire() -> None:
    """An empty view fires nothing."""
    trigger = Trigger(arrival=ArrivalTrigger(path="in/"))
    state = State(
        definition=decide_trigger(trigger, State(), now=NOON, view=View()).entries[0].definition, upto=to_text(NOON)
    )
    assert decide_trigger(trigger, state, now=NOON, view=View()).entries == ()
