"""docs/extending.md: its sink keeps the contract of sinks; its names exist."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import extend
from pipeline.errors import EnvMismatch, SpecError
from pipeline.sinks import SinkRequest, check, find_sink
from pipeline.sinks.transactional import TransactionalSink
from pipeline.spec.sink import Sink
from pipeline.testing.examples import IS_LONG, choose
from pipeline.testing.processes import ROOT
from pipeline.testing.sink_contract import sweep_crashes, sweep_two_drivers, worlds

TEXT = (ROOT / "docs/extending.md").read_text(encoding="utf-8")


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import the page's test of its sink."""
    files = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in files] == ["json_sink.py", "test_json_sink.py"]
    for name, content in files:
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("test_json_sink")
    for name, _ in files:
        sys.modules.pop(name.removesuffix(".py"))


def test_the_sink_keeps_the_contract(example: Any, tmp_path: Path) -> None:
    chosen = [*worlds(example.CASE), *worlds(example.CASE, repairs=True)]
    for number, world in enumerate(chosen if IS_LONG else chosen[1:9:3]):
        assert sweep_crashes(world, tmp_path / f"crash-{number}", first=1 + number, step=choose(3, of=1)) >= 5
    for number, world in enumerate(worlds(example.CASE) if IS_LONG else worlds(example.CASE)[2:3]):
        assert sweep_two_drivers(world, tmp_path / f"two-{number}", step=choose(3, of=1)) >= 5


def test_a_job_spec_names_the_sink(example: Any, tmp_path: Path) -> None:
    sink = Sink.model_validate(
        {"format": "json_sink:JsonSink", "path": str(tmp_path / "a.json"), "mode": "merge", "key": ["a"]}
    )
    assert isinstance(find_sink(sink.format), TransactionalSink)
    with pytest.raises(SpecError, match="know error, append and overwrite"):
        check(sink, SinkRequest())


def test_every_method_is_in_the_table() -> None:
    told = set(re.findall(r"^\| `(\w+)\(", TEXT, re.MULTILINE))
    own = {name for name, value in vars(TransactionalSink).items() if callable(value) and not name.startswith("_")}
    base = {"publish", "read_published", "verify", "read_file", "find_strays", "leftovers", "remove_leftover"}
    assert told == own - base - {"check_storage", "stage_file", "reached", "has_staged"}


def test_names_for_plug_ins() -> None:
    assert extend.__all__ == sorted(extend.__all__)
    assert all(hasattr(extend, name) for name in extend.__all__)
    extend.require_api(extend.API)
    with pytest.raises(EnvMismatch, match="another version") as caught:
        extend.require_api(extend.API + 1)
    assert (caught.value.found, caught.value.next_step) == ("API 2", "upgrade this package")
