"""Two hundred triggers over a simulated year, with servers that stop, are killed at every step, and race each other.

Per commit twenty of them: each policy, each pair of times and each zone; ``HYPOTHESIS_PROFILE=long`` takes them all.

Whatever happens: each instant of a schedule has one fate, which is the one that ``missed`` and ``overlap`` promise, and
no firing has two jobs; each file is scored once.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest

from pipeline.service.triggers.arrivals import ArrivedFile
from pipeline.service.triggers.decide import SUCCEEDED
from pipeline.service.triggers.log import from_text, to_text
from pipeline.service.triggers.schedule import firing_id, instants
from pipeline.spec.triggers import ArrivalTrigger, Trigger
from pipeline.testing.examples import choose
from pipeline.testing.memory_store import MemoryDisk
from pipeline.testing.trigger_world import World

BEGIN = datetime(2026, 1, 1, 0, 0, 30, tzinfo=UTC)
END = BEGIN + timedelta(days=365)
ZONES = ("Europe/Berlin", "America/New_York", "Asia/Kolkata")
SHARDS = choose(1, of=10)
CRONS_A_SHARD = 12
ARRIVALS_A_SHARD = 8


def wall_clock_oracle(zone: str) -> dict[str, list[datetime]]:
    """The instants of each daily schedule, minute by minute: what a person with a clock on the wall would do.

    A time that is leapt over is made up for at once; one that comes twice counts the first time.
    """
    due: dict[tuple[int, int], list[str]] = {}
    for minutes, hours in DAILY:
        for hour in hours:
            for minute in minutes:
                due.setdefault((hour, minute), []).append(cron_text(minutes, hours))
    local, step = ZoneInfo(zone), timedelta(minutes=1)
    found: dict[str, list[datetime]] = {cron_text(*one): [] for one in DAILY}
    moment = BEGIN.replace(second=0)
    before = (moment - step).astimezone(local).replace(tzinfo=None)
    while moment <= END:
        here = moment.astimezone(local)
        wall, passed = here.replace(tzinfo=None), before + step
        if passed > wall or here.fold:
            passed = wall + step
        while passed <= wall:
            for cron in due.get((passed.hour, passed.minute), ()):
                if moment > BEGIN and moment not in found[cron][-1:]:
                    found[cron].append(moment)
            passed += step
        before, moment = wall, moment + step
    return found


# Around both changes of both zones (2:00 -> 3:00 and back), and at quiet times.
DAILY = [({30}, {2}), ({0, 30}, {1, 2, 3}), ({59}, {1}), ({0}, {3}), ({15}, {12}), ({5, 35}, {2, 14})]


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str], list[datetime]]:
    """Cron expression and zone -> its instants, from the oracle."""
    return {(cron, zone): known for zone in ZONES for cron, known in wall_clock_oracle(zone).items()}


def cron_text(minutes: set[int], hours: set[int]) -> str:
    return f"{','.join(map(str, sorted(minutes)))} {','.join(map(str, sorted(hours)))} * * *"


def test_the_schedule_is_that_of_the_wall_clock(expected: dict[tuple[str, str], list[datetime]]) -> None:
    for (cron, zone), known in expected.items():
        assert list(instants(Trigger(cron=cron, time_zone=zone), after=BEGIN, until=END)) == known, (cron, zone)


def test_the_year_has_the_changes_it_is_about(expected: dict[tuple[str, str], list[datetime]]) -> None:
    offsets = {
        zone: {one.astimezone(ZoneInfo(zone)).utcoffset() for one in expected["30 2 * * *", zone]} for zone in ZONES
    }
    assert [len(offsets[zone]) for zone in ZONES] == [2, 2, 1]
    leapt = datetime(2026, 3, 29, 1, 0, tzinfo=UTC)
    assert leapt in expected["30 2 * * *", "Europe/Berlin"], "2:30 is made up for at 3:00 summer time"
    assert len(expected["30 2 * * *", "Europe/Berlin"]) == 365


def live_through(world: World, watched: Iterator[datetime]) -> None:
    """Let servers evaluate the trigger at each of the times, until they are killed; then nobody does until the next."""
    servers = [world.server(), world.server()]
    chance = world.random
    for moment in watched:
        world.now = max(world.now, moment)
        _bring_files(world, moment)
        disk = world.disk
        if chance.random() < 0.4:
            disk.steps_left = chance.randrange(60)
        if chance.random() < 0.3:
            other = chance.choice(servers)
            steps = chance.randrange(25)
            disk.before_step = _after(steps, lambda other=other: other.evaluate(), disk)
        chance.choice(servers).evaluate()
        disk.before_step = None
        if disk.is_dark:
            # A killed process loses nothing that it did, a power cut whatever was not made durable.
            is_power_cut = chance.random() < 0.5
            disk.restart(survives=(lambda _: chance.random() < 0.5) if is_power_cut else (lambda _: True))
            servers = [world.server(), world.server()]
        disk.steps_left = None


def _after(steps: int, act: Callable[[], object], disk: MemoryDisk) -> Callable[[], None]:
    """Do something before the step that comes after so many others."""

    def wait() -> None:
        nonlocal steps
        if steps == 0:
            left, disk.steps_left = disk.steps_left, None
            if not disk.is_dark:
                act()
            disk.steps_left = left
        else:
            steps -= 1
            disk.before_step = wait

    return wait


def settle(world: World) -> None:
    """Nothing goes wrong any more: everything that is open comes to its end."""
    server = world.server()
    world.job_seconds = 60.0
    for _ in range(2000):
        world.now += timedelta(minutes=20)
        server.evaluate()
        if not server._log.read().open:
            return
    raise AssertionError("it never comes to rest")


def watched_times(chance: random.Random, *, upto: datetime, often: timedelta) -> Iterator[datetime]:
    """Looks every now and then, with a day or a week in between when nobody is there."""
    moment = BEGIN
    while moment < upto:
        yield moment
        away = chance.random() < 0.03
        moment += timedelta(days=chance.uniform(0.5, 8)) if away else often * chance.uniform(0.05, 1.95)


def _bring_files(world: World, moment: datetime) -> None:
    arrival = world.trigger.arrival
    if arrival is None:
        return
    chance = world.random
    for _ in range(chance.choice([0, 0, 1, 2, 5])):
        path = f"/landing/{chance.randrange(400):03d}.parquet"
        # Some names come again with other content, after a while.
        age = timedelta(seconds=chance.choice([0, 3, 40, 4000]))
        version = f"mtime:{moment.timestamp()}:{chance.random()}"
        marked = chance.random() < 0.9
        world.files[path] = ArrivedFile(
            path, 100 + chance.randrange(900), version, (moment - age).timestamp(), marked, 10
        )
    for path in [path for path, file in world.files.items() if not file.is_marked]:
        if chance.random() < 0.5:
            old = world.files[path]
            world.files[path] = ArrivedFile(old.path, old.size, old.version, old.modified, True, old.rows)


# Schedules


def cron_world(seed: int) -> World:
    chance = random.Random(seed)
    minutes, hours = DAILY[seed % len(DAILY)]
    missed = ("skip", "once", "each")[seed % 3]
    overlap = "queue" if missed == "each" else chance.choice(["queue", "forbid", "cancel"])
    trigger = Trigger(
        cron=cron_text(minutes, hours),
        time_zone=ZONES[(seed // 2) % len(ZONES)],
        missed=missed,
        overlap=overlap,
        grace="45 min",
    )
    return World(trigger, BEGIN, chance, job_seconds=chance.choice([600.0, 5 * 3600.0]))


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_schedules(shard: int, expected: dict[tuple[str, str], list[datetime]]) -> None:
    crashes = 0
    for seed in range(shard * CRONS_A_SHARD, (shard + 1) * CRONS_A_SHARD):
        world = cron_world(seed)
        trigger = world.trigger
        live_through(world, watched_times(world.random, upto=END, often=timedelta(hours=30)))
        world.now = END
        settle(world)
        dealt = check_fates(world, expected[trigger.cron, trigger.time_zone])
        check_missed(world, dealt)
        check_jobs(world)
        crashes += world.crashes
    assert crashes > CRONS_A_SHARD * 10


def check_fates(
    world: World, known: list[datetime]
) -> list[tuple[datetime, list[datetime], list[datetime], list[datetime]]]:
    """Each instant was fired or skipped, once. Gives, per record: its time, and what it fired, missed, overlapped."""
    fates: Counter[datetime] = Counter()
    dealt = []
    history = world.history()
    assert [record["number"] for record in history] == list(range(1, len(history) + 1))
    since = from_text(history[0]["time"])
    for record in history:
        fired, missed, overlapped = [], [], []
        for entry in record["entries"]:
            if entry["what"] == "fired":
                fired.append(from_text(entry["firing"]["time"]))
                assert entry["firing"]["id"] == firing_id(fired[-1])
            elif entry["what"] == "skipped":
                those = [one for one in known if entry["first"] <= to_text(one) <= entry["last"]]
                assert len(those) == entry["count"]
                (missed if entry["reason"] == "missed" else overlapped).extend(those)
        fates.update([*fired, *missed, *overlapped])
        if fired or missed or overlapped:
            dealt.append((from_text(record["time"]), fired, missed, overlapped))
    past = [one for one in known if since < one <= world.evaluations[-1] and one <= END]
    assert [one for one in past if fates[one] != 1] == []
    assert set(fates) <= {one for one in known if one > since} | {one for one in fates if one > END}
    return dealt


def check_missed(world: World, dealt: list[tuple[datetime, list[datetime], list[datetime], list[datetime]]]) -> None:
    trigger, grace = world.trigger, timedelta(seconds=world.trigger.grace_seconds)
    for time, fired, missed, overlapped in dealt:
        late = [one for one in (*fired, *missed, *overlapped) if time - one > grace]
        # It was late because no server evaluated it, not because one did and left it.
        assert not [
            one for one in late if any(one < start < time - timedelta(minutes=1) for start in world.evaluations)
        ]
        if trigger.missed == "each":
            assert not missed
        elif trigger.missed == "skip":
            assert all(time - one > grace for one in missed)
            assert not [one for one in (*fired, *overlapped) if time - one > grace]
        elif late:
            assert len(fired) + len(overlapped) == 1, "one makes up for all"
            assert (fired or overlapped)[0] == max((*fired, *missed, *overlapped))
        if trigger.overlap == "queue":
            assert not overlapped


def check_jobs(world: World) -> None:
    """Each firing that was not dropped has one job, jobs follow each other, and only ``cancel`` cancels."""
    fired, dropped, refused = [], set(), set()
    for record in world.history():
        for entry in record["entries"]:
            fired += [entry["firing"]["id"]] if entry["what"] == "fired" else []
            dropped |= {entry["id"]} if entry["what"] == "dropped" else set()
            refused |= {entry["id"]} if entry.get("status") == "REFUSED" else set()
    assert len(fired) == len(set(fired))
    assert set(world.jobs) == set(fired) - dropped - refused
    assert not dropped or world.trigger.overlap == "cancel"
    runs = sorted(world.jobs.values(), key=lambda job: job.begin)
    assert all(first.end <= second.begin for first, second in pairwise(runs))
    if world.trigger.overlap != "cancel":
        assert not [job for job in runs if job.cancelled]
    if world.trigger.kind in ("cron", "every"):
        times = [job.firing.time for job in runs]
        assert times == sorted(times)


# Files


def arrival_world(seed: int) -> World:
    chance = random.Random(seed)
    overlap = ("queue", "forbid", "cancel")[seed % 3]
    arrival = ArrivalTrigger(
        path="/landing/",
        marker="_SUCCESS" if seed % 2 else None,
        quiet=chance.choice([None, "5 s", "10 min"]),
        files=chance.choice([None, 1, 20]),
        rows=chance.choice([None, 50]),
        bytes=chance.choice([None, "2 KB"]),
        at_latest=chance.choice([None, "2 d"]),
    )
    trigger = Trigger(arrival=arrival, overlap=overlap)
    return World(trigger, BEGIN, chance, job_seconds=chance.choice([600.0, 5 * 3600.0]))


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_arrivals(shard: int) -> None:
    crashes = 0
    for seed in range(shard * ARRIVALS_A_SHARD, (shard + 1) * ARRIVALS_A_SHARD):
        world = arrival_world(seed)
        came: set[str] = set()
        live_through(world, noting(world, came, watched_times(world.random, upto=END, often=timedelta(hours=30))))
        world.now = END
        came |= {file.key for file in world.files.values()}
        settle(world)
        check_files(world, came)
        check_jobs(world)
        crashes += world.crashes
    assert crashes > ARRIVALS_A_SHARD * 10


def noting(world: World, came: set[str], watched: Iterator[datetime]) -> Iterator[datetime]:
    """``watched``, while the keys of all files that ever were there are noted."""
    for moment in watched:
        yield moment
        came |= {file.key for file in world.files.values()}


def check_files(world: World, came: set[str]) -> None:
    """No file was scored twice; every one that is there and may be taken was taken."""
    scored: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    for job in world.jobs.values():
        keys = [file.key for file in job.firing.files]
        assert keys
        tried.update(keys)
        if job.status in SUCCEEDED:
            scored.update(keys)
    refused = set()
    for record in world.history():
        for entry in record["entries"]:
            if entry["what"] == "fired":
                keys = {file["key"] for file in entry["firing"]["files"]}
                refused |= keys if entry["firing"]["id"] not in world.jobs else set()
    assert set(tried) <= came
    assert [key for key, times in scored.items() if times > 1] == []
    if world.trigger.overlap != "cancel":
        assert [key for key, times in tried.items() if times > 1] == []
    arrival = world.trigger.arrival
    assert arrival is not None
    if not arrival.has_threshold:
        marked = {file.key for file in world.files.values() if file.is_marked or arrival.marker is None}
        assert marked <= set(tried) | refused
