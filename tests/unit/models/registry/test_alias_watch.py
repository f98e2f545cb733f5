"""A changed alias: detection, messages, and requests to the registry."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from pipeline.errors import ModelError
from pipeline.jobs.cancellation import Stop, StopReason
from pipeline.models.model import Feature, ModelVersion
from pipeline.models.registry import alias_watch
from pipeline.models.registry.alias_watch import (
    LONGEST_WAIT,
    AliasChange,
    AliasWatch,
    alias_change_of,
    alias_change_warnings,
    hard_coded,
)
from pipeline.models.registry.records import VersionRecord
from pipeline.spec.model_ref import ModelRef
from pipeline.testing.fake_clock import FakeClock

CHAMPION = "models:/churn@champion"


def pinned(version: int = 3, digest: str = "d3") -> ModelVersion:
    return ModelVersion(
        "churn", str(version), "uri", digest, "xgboost", 1, (Feature("x"),), "binary", 1, registry="somewhere"
    )


def record(version: int, digest: str = "") -> VersionRecord:
    return VersionRecord("churn", version, digest, 1, "file", "xgboost", "binary", "", 1, 1, ())


@dataclass
class Registry:
    """One whose alias the test moves, or that is out of order."""

    version: int = 3
    digest: str = "d3"
    is_down: bool = False
    asked: int = 0
    opened: list[str] = field(default_factory=list)

    def open(self, root: str, **options: Any) -> Registry:
        self.opened.append(root)
        return self

    def lookup(self, ref: ModelRef) -> VersionRecord:
        self.asked += 1
        if self.is_down:
            raise ModelError("out of order")
        return record(self.version, self.digest)


def watch(registry: Registry, clock: FakeClock, *, seconds: float = 30.0) -> AliasWatch:
    return AliasWatch(CHAMPION, seconds=seconds, clock=clock, open=registry.open)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "moved"),
    [
        (record(3, "d3"), False),
        (record(4, "d4"), True),
        (record(4, "d3"), False),
        (record(3, ""), False),
        (record(4, ""), True),
        (record(2, "d2"), True),
    ],
)
def test_a_move_is_to_another_version_with_other_bytes(found: VersionRecord, moved: bool) -> None:
    change = alias_change_of(pinned(), found, reference=CHAMPION)
    assert (change is not None) == moved
    if change is not None:
        assert change == AliasChange(CHAMPION, "3", str(found.version))
        assert change.description == f"{CHAMPION} moved from version 3 to version {found.version}"


def test_the_registry_is_asked_when_it_is_time_to() -> None:
    registry, clock = Registry(), FakeClock(100.0)
    alias = watch(registry, clock)
    for seconds, asked in [(0, 0), (29, 0), (1, 1), (1, 1), (29, 2)]:
        clock.now += seconds
        assert alias.poll(pinned()) is None
        assert registry.asked == asked
    registry.version, registry.digest = 4, "d4"
    clock.now += 30
    assert alias.poll(pinned()) == AliasChange(CHAMPION, "3", "4")
    assert registry.opened == ["somewhere"], "where the version was resolved, whatever the settings say now"


def test_without_polling_it_is_looked_at_only_on_demand() -> None:
    registry, clock = Registry(version=4, digest="d4"), FakeClock(100.0)
    alias = watch(registry, clock, seconds=0)
    clock.now += 1e6
    assert alias.poll(pinned()) is None
    assert alias.check(pinned()) is not None


def test_a_registry_that_is_down_is_asked_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(alias_watch.logger, "warning", lambda text, *values: said.append(text % values))
    registry, clock = Registry(is_down=True), FakeClock(100.0)
    alias = watch(registry, clock)
    times = []
    for _ in range(3600):
        clock.now += 1
        before = registry.asked
        assert alias.poll(pinned()) is None
        times += [clock.now] if registry.asked > before else []
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert gaps == sorted(gaps)
    assert (gaps[0], gaps[-1]) == (60, LONGEST_WAIT)
    assert set(said) == {f"cannot find out where {CHAMPION} points: out of order"}
    with pytest.raises(ModelError):
        alias.check(pinned())
    registry.is_down = False
    clock.now += LONGEST_WAIT
    assert alias.poll(pinned()) is None
    clock.now += 30
    asked = registry.asked
    alias.poll(pinned())
    assert registry.asked == asked + 1, "as often as before, once it answers"


def test_report_warns_of_ignored_alias_changes() -> None:
    event = {"event": "alias_change", "reference": CHAMPION, "pinned": "3", "current": "4"}
    assert alias_change_warnings([{"event": "status"}, event, event]) == (
        f"{CHAMPION} moved from version 3 to version 4 while the job ran: every row was scored with version 3 "
        "(on_alias_change: pin)",
    )


def test_error_shows_how_to_move_the_alias_back() -> None:
    error = AliasChange(CHAMPION, "3", "4").error()
    assert error.exit_code == 5
    assert "python -m pipeline models alias churn champion 3" in error.next_step


def test_a_registry_that_knows_no_digests_is_asked_for_the_file_once() -> None:
    registry, clock = Registry(version=4, digest=""), FakeClock(100.0)
    resolved: list[str] = []

    def resolve(ref: ModelRef, *, allow_code: bool = False) -> ModelVersion:
        resolved.append(ref.text)
        return pinned(4, "d3" if ref.version == 4 else "d5")

    registry.resolve = resolve  # type: ignore[attr-defined]
    alias = watch(registry, clock)
    assert alias.check(pinned()) is None, "the same bytes under another number"
    assert alias.check(pinned()) is None
    registry.version = 5
    assert alias.check(pinned()) == AliasChange(CHAMPION, "3", "5")
    assert resolved == ["models:/churn/4", "models:/churn/5"]


@pytest.mark.parametrize(
    ("reference", "has_registry", "word"),
    [
        ("models:/churn/3", False, "version 3 by its number"),
        ("models:/churn@champion", True, ""),
        ("churn.ubj", True, "is a file"),
        ("churn.ubj", False, ""),
    ],
)
def test_a_hard_coded_version_is_worth_a_warning(reference: str, has_registry: bool, word: str) -> None:
    warning = hard_coded(reference, has_registry=has_registry)
    assert word in warning
    assert bool(warning) == bool(word)


def test_a_request_to_stop_is_taken_back_unless_it_was_outranked() -> None:
    stop = Stop()
    stop.request(StopReason.ALIAS_CHANGE, message="moved", now=True)
    stop.settle(StopReason.ALIAS_CHANGE)
    assert not stop.is_requested
    assert not stop.now
    stop.request(StopReason.ALIAS_CHANGE)
    stop.request(StopReason.SIGNAL, signal_number=15)
    stop.settle(StopReason.ALIAS_CHANGE)
    assert stop.reason is StopReason.SIGNAL
