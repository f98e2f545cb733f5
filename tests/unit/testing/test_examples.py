"""The long profile of property tests and sweeps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_a_whole_sweep_has_hours_before_it_is_timed_out(pytestconfig: pytest.Config) -> None:
    assert int(pytestconfig.getini("timeout")) == 600
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_TIMEOUT"}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", __file__]
    environment["HYPOTHESIS_PROFILE"] = "long"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "timeout: 14400.0s" in done.stdout, done.stdout + done.stderr
