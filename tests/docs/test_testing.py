"""docs/testing.md: its example runs as described; every action of the fault table is described; names exist."""

from __future__ import annotations

import importlib
import re
import typing
from pathlib import Path

import pytest

from pipeline.testing import faults
from pipeline.testing.processes import ROOT, start_command

TEXT = (ROOT / "docs/testing.md").read_text(encoding="utf-8")
MODULES = (
    "chaos",
    "faults",
    "held",
    "jobs",
    "memory_store",
    "oracle",
    "processes",
    "row_check",
    "s3",
    "s3_proxy",
    "stores",
)


@pytest.mark.slow
@pytest.mark.fault(21)
def test_the_example_runs(tmp_path: Path) -> None:
    files = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in files] == ["my_steps.py", "check_my_steps.py"]
    for name, content in files:
        (tmp_path / name).write_text(content)
    environment = {"DASK_PIPELINE__WORKERS": "1"}
    process = start_command(tmp_path, program=("check_my_steps.py",), environment=environment)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.splitlines()[-1].startswith("6,999 rows equal the oracle; row 5000 took ")


def test_every_action_is_documented() -> None:
    told = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert sorted(told) == sorted(typing.get_args(faults.Action))


def test_documented_names_exist() -> None:
    places = [vars(importlib.import_module(f"pipeline.testing.{name}")) for name in MODULES]
    called = set(re.findall(r"\b([A-Z]\w+|[a-z]+_\w+)\(", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)))
    words = called - {"sort_by"}
    assert "ProcessCluster" in TEXT
    assert {"FaultTable", "FaultyStore", "check_rows", "serve_s3", "proxy_s3"} <= words
    assert [word for word in sorted(words) if not any(word in place for place in places)] == []


def test_the_modules_the_package_lists_are_there() -> None:
    listed = set(re.findall(r"`(\w+)`", importlib.import_module("pipeline.testing").__doc__ or ""))
    there = {path.stem for path in (ROOT / "pipeline/testing").glob("*.py")}
    assert set(MODULES) <= listed <= there
