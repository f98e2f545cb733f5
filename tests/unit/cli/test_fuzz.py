"""Random job specs and command lines: a documented exit code, no traceback, nothing called a bug, within a minute.

``HYPOTHESIS_PROFILE=long`` runs thousands of examples.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.cli import main
from pipeline.testing.examples import choose
from pipeline.testing.oracle import make_lake

DOCUMENTED = {0, 2, 3, 4, 5, 6, 7, 8, 74, 75}
"""Exit codes of docs/errors.md without 1, a bug, and without signals."""
LONGEST = timedelta(seconds=60)
MEMORY = 1 << 30
"""Growth of this process that no invalid input may cause, in bytes."""

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30),
    st.sampled_from(["", " ", "~nosuchuser/x", "9" * 400, "-1GiB", "1e400", "²", "${params.x}", "${", "$${env:A}"]),
    st.sampled_from(
        ["http://127.0.0.1:1/x", "x://y", "a" * 5000, "[" * 50, "a: b: c", "é" * 300, "\u202e", "no", "010"]
    ),
)
NUMBERS = st.one_of(
    st.integers(), st.sampled_from([0, -1, 2**63, 10**29, -(2**70)]), st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda values: st.one_of(st.lists(values, max_size=3), st.dictionaries(TEXTS, values, max_size=3)),
    max_leaves=8,
)

FULL: dict[str, Any] = {
    "name": "small",
    "params": {"day": "2026-01-01", "count": 3},
    "run": {"date": "2026-01-01"},
    "source": {"path": "lake/", "format": "parquet", "columns": ["id", "age"], "filter": "age > 3", "base": "lake/"},
    "steps": [
        {"map": "features:build"},
        {"score": {"model": "model.ubj", "output": "p", "keep": ["id"], "features": ["age"], "engine": "auto"}},
    ],
    "sink": {"path": "out/", "mode": "error", "format": "parquet", "target_file_size": "256 MiB"},
    "errors": {"max_fraction": 0.1, "max_files": 1, "files": "fail"},
    "contract": {"age": {"min": 0, "max": 120, "nullable": True, "allowed": [1, 2]}},
    "hooks": [{"url": "https://hooks.example/x", "when": ["failure"], "timeout": 10}],
    "fan_out": {"by": "country", "max_parallel": 4, "publish": "all"},
    "cluster": "local",
    "storage": {"s3://lake": {"key": "env:LAKE_KEY"}},
    "triggers": [
        {"name": "a", "cron": "30 2 * * *", "time_zone": "Europe/Berlin", "missed": "once", "overlap": "queue"},
        {"name": "b", "arrival": {"path": "in/", "quiet": "10 s", "marker": "_SUCCESS", "rows": 3, "bytes": "1 GiB"}},
        {"name": "c", "every": "1 h", "grace": "5 min", "params": {"day": "${trigger.date}"}},
    ],
}
"""A spec that gives every section, of which a field is replaced."""


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every section and field."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths_in(item, (*path, key))


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a spec with up to three sections left out, and up to three fields replaced, added or removed."""
    spec = deepcopy(FULL)
    for section in draw(st.sets(st.sampled_from([*FULL]), min_size=4, max_size=9)) - {"source", "steps", "sink"}:
        del spec[section]
    for path in draw(st.lists(st.sampled_from([*paths_in(spec)]), min_size=1, max_size=3)):
        parent: Any = spec
        try:
            for key in path[:-1]:
                parent = parent[key]
            how = draw(st.sampled_from(["replace", "replace", "add", "remove"]))
            if how == "remove":
                del parent[path[-1]]
            elif how == "add" and isinstance(parent, dict):
                parent[draw(TEXTS)] = draw(VALUES)
            else:
                parent[path[-1]] = draw(VALUES)
        except (LookupError, TypeError):
            continue
    return spec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[Path]:
    """A folder with a table, a model and a module, in which the tests of this module run."""
    place = tmp_path_factory.mktemp("fuzz")
    make_lake(place / "lake")
    (place / "model.ubj").write_bytes(model_path.read_bytes())
    (place / "features.py").write_text("def build(frame):\n    return frame\n")
    (place / "job.yaml").write_text(yaml.safe_dump({name: FULL[name] for name in ("name", "source", "sink")}))
    before = os.getcwd()
    os.chdir(place)
    yield place
    os.chdir(before)


def check(*arguments: str) -> int:
    """Run a command in this process; return its exit code."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = CliRunner().invoke(main, list(arguments))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert "bug in the pipeline package" not in result.output, (arguments, result.output[-2000:])
    assert "Traceback" not in result.output, (arguments, result.output[-2000:])
    assert result.exit_code in DOCUMENTED, (arguments, result.exit_code, result.output[-2000:], result.exception)
    assert after - before < MEMORY
    return result.exit_code


fuzz = settings(
    max_examples=choose(25, of=1500), deadline=LONGEST, suppress_health_check=list(HealthCheck), derandomize=True
)


@pytest.mark.fault(113)
class TestSpec:
    @fuzz
    @given(spec=specs(), is_json=st.booleans(), command=st.sampled_from(["validate", "validate", "plan", "config"]))
    def test_random_fields(self, folder: Path, spec: dict[str, Any], is_json: bool, command: str) -> None:
        """Values of any type, size and language at any field."""
        name = "fuzz.json" if is_json else "fuzz.yaml"
        Path(name).write_text(json.dumps(spec) if is_json else yaml.safe_dump(spec, allow_unicode=True))
        arguments = ["plan", name, "--show-config"] if command == "config" else [command, name]
        check(*arguments)

    @fuzz
    @given(
        text=st.one_of(st.text(max_size=200), st.binary(max_size=200), TEXTS), suffix=st.sampled_from(["yaml", "json"])
    )
    def test_random_bytes(self, folder: Path, text: str | bytes, suffix: str) -> None:
        """A file that is no spec at all."""
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        Path(f"fuzz.{suffix}").write_bytes(data)
        check("validate", f"fuzz.{suffix}")

    @fuzz
    @given(field=st.one_of(TEXTS, st.sampled_from([".".join(map(str, path)) for path in paths_in(FULL)])), value=VALUES)
    def test_random_overrides(self, folder: Path, field: str, value: Any) -> None:
        """``--set`` and ``-p`` with any field and value."""
        Path("full.json").write_text(json.dumps(FULL))
        check("validate", "full.json", "--set", f"{field}={json.dumps(value)}")
        check("validate", "full.json", "-p", f"{field}={value}")

    @fuzz
    @given(text=TEXTS, name=st.sampled_from(["memory_limit", "workers", "hooks", "lease_seconds", "cluster", "tls"]))
    def test_random_settings(self, folder: Path, text: str, name: str) -> None:
        """Variables of any text, and the same under ``pipeline:`` of Dask's configuration."""
        import dask.config

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(f"PIPELINE_{name.upper()}", text)
            check("plan", "job.yaml", "--show-config")
        with dask.config.set({f"pipeline.{name}": text}):
            check("plan", "job.yaml", "--show-config")


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield every command with its words."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


ENDLESS = {("demo",), ("serve",), ("chaos",)}
"""Commands that run a job or never end."""
COMMANDS = [(words, command) for words, command in commands(main) if words not in ENDLESS]
INSIDE = TEXTS.filter(lambda text: not text.startswith(("/", "~")) and ".." not in text)
"""Texts that, as a path, lead to no other folder."""


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Draw a command with random options and arguments, of which no job file is valid."""
    words, command = draw(st.sampled_from(COMMANDS))
    line = [*words]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            if parameter.name in ("follow", "verbose") or draw(st.integers(0, 3)):
                continue
            line.append(max(parameter.opts, key=len))
            if not (parameter.is_flag or parameter.count):
                line.append(draw(st.one_of(INSIDE, st.integers(-1, 3).map(str))))
        else:
            line += draw(st.lists(INSIDE, min_size=0, max_size=2))
    return line


@pytest.mark.fault(113)
@settings(fuzz, max_examples=choose(60, of=4000))
@given(line=command_lines())
def test_random_command_lines(folder: Path, line: list[str]) -> None:
    """Options and arguments of any text: a documented exit code, and no traceback."""
    check(*line)


@pytest.mark.fault(113)
@pytest.mark.parametrize(
    "line", [["plan", "\udcff"], ["validate", "fuzz\udcff.yaml", "--json"], ["list", "--name", "\udcff"]]
)
def test_arguments_that_are_no_text(folder: Path, line: list[str]) -> None:
    """Bytes that are no UTF-8, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *line],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in DOCUMENTED, done.stderr
    assert b"Traceback" not in done.stderr
