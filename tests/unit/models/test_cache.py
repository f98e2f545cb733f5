"""The cache of models: loaded once, limited by bytes, and never without the models of the job at work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pipeline.models import cache
from pipeline.models.cache import forget_models, get_predictor, is_cached, keep_models, limit_bytes
from pipeline.models.flavors.xgboost import loaded_factor
from pipeline.models.model import Feature, ModelVersion
from pipeline.models.process import ProcessFacts, set_process_facts
from pipeline.testing.processes import ROOT

VERSION = ModelVersion("m", "1", "/m.ubj", "0" * 64, "xgboost", 10, (Feature("a"),), "regression", 1)


def versions(count: int) -> list[ModelVersion]:
    return [replace(VERSION, uri=f"/{number}.ubj", digest=f"{number:064d}") for number in range(count)]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The files that were loaded, in order; each takes 10 bytes in memory for 1 in its file."""
    loaded: list[str] = []

    def load(version: ModelVersion, data: bytes) -> object:
        loaded.append(version.uri)
        return SimpleNamespace(version=version, data=data)

    flavor = SimpleNamespace(load=load, loaded_factor=None, has_file=True)
    monkeypatch.setattr(cache, "find_flavor", lambda name: flavor)
    monkeypatch.setattr(cache, "read_version", lambda version: b"x" * 10)
    forget_models()
    yield loaded
    forget_models()
    set_process_facts(ProcessFacts())


def use(*models: ModelVersion) -> None:
    for version in models:
        assert get_predictor(version)[0].version == version


def test_more_than_four_models_are_loaded_once(loads: list[str]) -> None:
    many = versions(50)
    use(*many, *many)
    assert len(loads) == 50


def test_the_model_used_longest_ago_is_dropped_when_all_take_too_much(loads: list[str]) -> None:
    set_process_facts(ProcessFacts(memory=1500))  # 300 bytes for models, 100 each
    first, second, third, fourth = versions(4)
    use(first, second, third, first, fourth)
    assert [is_cached(version) for version in (first, second, third, fourth)] == [True, False, True, True]
    use(first, third, fourth)
    assert len(loads) == 4
    use(second)
    assert loads[4:] == ["/1.ubj"]


def test_models_of_the_job_at_work_are_kept_whatever_they_take(loads: list[str]) -> None:
    set_process_facts(ProcessFacts(memory=1500))
    *job, other = versions(7)
    keep_models(job)
    use(*job, *job, other, *job)
    assert len(loads) == 7
    keep_models([other])
    use(other, *versions(8)[7:])
    assert sum(map(is_cached, job)) == 1  # 300 bytes for the other one, the new one and one more


def test_the_newest_model_is_kept_even_if_it_takes_too_much(loads: list[str]) -> None:
    set_process_facts(ProcessFacts(memory=1))
    first, second = versions(2)
    use(first, second)
    assert (is_cached(first), is_cached(second)) == (False, True)


def test_who_depends_on_a_model_is_told_that_it_is_dropped(loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[object] = []
    monkeypatch.setattr(cache, "_on_drop", [dropped.append])
    set_process_facts(ProcessFacts(memory=1))
    first, second = versions(2)
    use(first, second)
    assert dropped == [first.key]


@pytest.mark.parametrize(("memory", "limit"), [(1 << 30, (1 << 30) // 5), (0, 1 << 30)])
def test_the_limit_is_a_share_of_the_memory(memory: int, limit: int) -> None:
    assert limit_bytes(memory) == limit


@pytest.mark.parametrize(("head", "factor"), [(b'{"learner"', 10), (b"{L\x00\x00", 3)])
def test_models_as_json_take_more_memory_than_as_ubj(head: bytes, factor: int) -> None:
    assert loaded_factor(head) == factor


AT_EXIT = """
import atexit
atexit.register(print, "the interpreter ends")
from pipeline.models import cache

class Model:
    def __del__(self):
        print("freed")

cache._models["key"] = cache._Loaded(Model(), 1)
"""


def test_models_are_freed_before_the_interpreter_ends() -> None:
    """Boosters need the functions of their library for that."""
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.splitlines() == ["freed", "the interpreter ends"], done.stderr
