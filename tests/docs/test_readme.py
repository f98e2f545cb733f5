"""README.md is true: Python, make targets, the job, extras. Its commands are run by test_docs.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipeline.demo import JOB_YAML, make_demo
from pipeline.spec.job_spec import JobSpec

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_readme_is_short() -> None:
    assert len(TEXT) < 9500


@pytest.mark.slow
def test_python_runs(tmp_path: Path) -> None:
    (script,) = blocks("python")
    folder = make_demo(tmp_path / "demo", rows=20_000).folder
    (folder / "script.py").write_text(script)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "DASK_PIPELINE__WORKERS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for expected in ("SUCCEEDED_WITH_WARNINGS", "contract:plan:allowed", "VERIFIED", "churn"):
        assert expected in done.stdout


def test_make_targets_exist() -> None:
    (commands,) = blocks("sh")
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = re.findall(r"^make (\w+)", commands, re.MULTILINE)
    assert named == ["demo", "test"]
    assert set(named) <= targets
    if make := shutil.which("make"):
        # These tests may themselves be run by make, whose variables the inner one must not see.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        recipe = subprocess.check_output([make, "--dry-run", "demo"], cwd=ROOT, text=True, env=environment)
        assert recipe.splitlines()[-1].endswith("python -m pipeline demo")


def test_job_is_that_of_the_demo() -> None:
    (shown,) = blocks("yaml")
    assert JobSpec.load(shown) == JobSpec.load(JOB_YAML)


def test_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    _, _, install = TEXT.partition("## Install")
    cells = re.findall(r"^\| ([^|]*`[^|]*) \|", install, re.MULTILINE)
    named = set(re.findall(r"`([\w-]+)`", " ".join(cells))) | set(re.findall(r'"\.\[([\w-]+)\]"', install))
    assert len(named) >= 7
    assert named <= set(extras)
