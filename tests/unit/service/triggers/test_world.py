"""Random downtime, redefinitions and two servers: every instant has one fate, every good file is scored once."""

from __future__ import annotations

import random
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.service.triggers.arrivals import ArrivedFile
from pipeline.service.triggers.decide import MOST_OPEN
from pipeline.service.triggers.log import from_text
from pipeline.service.triggers.schedule import instants
from pipeline.spec.triggers import ArrivalTrigger, Trigger
from pipeline.testing.examples import choose
from pipeline.testing.trigger_world import World

BEGIN = datetime(2026, 3, 27, 0, 0, 30, tzinfo=UTC)
"""Two days before the clocks change in Europe."""
DOWNTIMES = st.sampled_from([1.0, 2.0, 30.0, 400.0, 4_000.0, 40_000.0, 700_000.0])
"""Seconds between two evaluations."""
EVALUATIONS = st.lists(st.tuples(DOWNTIMES, st.integers(0, 1), st.integers(0, 2)), min_size=5, max_size=25)
"""Downtime, server and version of the definition of each evaluation."""
SCHEDULES = st.sampled_from(
    [
        {"cron": "*/5 * * * *", "time_zone": "Europe/Berlin"},
        {"cron": "30 2 * * *", "time_zone": "Europe/Berlin"},
        {"cron": "0 1-3 * * *"},
        {"every": "7 min"},
        {"every": "2 s"},
    ]
)
POLICIES = st.fixed_dictionaries(
    {"missed": st.sampled_from(["once", "skip"]), "overlap": st.sampled_from(["queue", "forbid", "cancel"])}
) | st.just({"missed": "each", "overlap": "queue"})
VERSIONS = st.lists(
    st.tuples(POLICIES, st.sampled_from(["1 min", "5 min", "2 h"])).map(lambda of: {**of[0], "grace": of[1]}),
    min_size=3,
    max_size=3,
)


def fates_of(world: World) -> tuple[Counter[str], int]:
    """Return how often each instant fired, and the number of instants that fired or were skipped."""
    fired: Counter[str] = Counter()
    skipped = 0
    for record in world.history():
        for entry in record["entries"]:
            if entry["what"] == "fired":
                fired[entry["firing"]["time"]] += 1
            elif entry["what"] == "skipped":
                skipped += entry["count"]
    return fired, skipped + fired.total()


@pytest.mark.fault(107)
@settings(max_examples=choose(8, of=500), deadline=None)
@given(schedule=SCHEDULES, versions=VERSIONS, evaluations=EVALUATIONS, seed=st.integers(0, 10**6))
def test_each_instant_has_one_fate(
    schedule: dict[str, str], versions: list[dict[str, str]], evaluations: list[tuple[float, int, int]], seed: int
) -> None:
    """Whatever versions of a definition the servers read, an instant of all of them fires or is skipped once."""
    if schedule.get("every") == "2 s":
        # With ``each``, thousands of firings fit in no test.
        versions = [{**version, "missed": "once"} if version["missed"] == "each" else version for version in versions]
        evaluations = [(min(downtime, 4_000.0), server, version) for downtime, server, version in evaluations]
    world = World(Trigger(**schedule, **versions[0]), BEGIN, random.Random(seed), job_seconds=1.0)
    servers = [world.server(), world.server()]
    for downtime, server, version in evaluations:
        world.now += timedelta(seconds=downtime)
        world.trigger = Trigger(**schedule, **versions[version])
        servers[server].evaluate()
    state = servers[0]._log.read()
    fired, dealt_with = fates_of(world)
    due = list(instants(world.trigger, after=from_text(state.since), until=from_text(state.upto)))
    assert [time for time, times in fired.items() if times > 1] == []
    assert {from_text(time) for time in fired} <= set(due)
    assert dealt_with == len(due)
    late = list(instants(world.trigger, after=from_text(state.upto), until=world.evaluations[-1]))
    assert not late or len(state.open) >= MOST_OPEN


@pytest.mark.fault(108)
@settings(max_examples=choose(25, of=2000), deadline=None)
@given(
    evaluations=st.lists(st.tuples(DOWNTIMES, st.integers(0, 1), st.integers(0, 3)), min_size=3, max_size=20),
    bad=st.sets(st.integers(0, 59)),
    seed=st.integers(0, 10**6),
)
def test_each_good_file_is_scored_once(evaluations: list[tuple[float, int, int]], bad: set[int], seed: int) -> None:
    """Bad files among good ones keep no good file from its job, and none is scored twice."""
    world = World(Trigger(arrival=ArrivalTrigger(path="/landing/")), BEGIN, random.Random(seed), job_seconds=1.0)
    servers = [world.server(), world.server()]
    names = [f"/landing/{number:02d}" for number in range(60)]
    world.bad = {names[number] for number in bad}
    for downtime, server, arriving in evaluations:
        for _ in range(arriving):
            path = names[len(world.files)]
            world.files[path] = ArrivedFile(path, 10, "v1", world.now.timestamp())
        world.now += timedelta(seconds=downtime)
        servers[server].evaluate()
    for _ in range(50):
        world.now += timedelta(minutes=20)
        servers[0].evaluate()
    tried = Counter(file.path for job in world.jobs.values() for file in job.firing.files)
    scored = {path for path, times in tried.items() if times == 1}
    refused = {
        file["path"]
        for record in world.history()
        for entry in record["entries"]
        if entry["what"] == "fired" and entry["firing"]["id"] not in world.jobs
        for file in entry["firing"]["files"]
    }
    assert all(times == 1 for times in tried.values())
    assert not scored & world.bad
    lost = world.files.keys() - scored - world.bad
    # The world refuses some firings for a reason that names no file.
    assert lost <= refused
    assert not lost or any(firing["id"].endswith("7") for firing in _firings(world))


def _firings(world: World) -> list[dict[str, str]]:
    return [entry["firing"] for record in world.history() for entry in record["entries"] if entry["what"] == "fired"]
