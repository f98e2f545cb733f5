"""Tests on a GPU. Where there is none they are skipped, with the reason that NVML gives.

``PIPELINE_TESTING_GPU='{}' pytest tests/gpu`` runs those that need no cupy on a fake GPU, to try the tests themselves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from pipeline.devices.inventory import Gpu
from pipeline.models.flavors.xgboost_cuda import device_report
from pipeline.testing.fake_device import VARIABLE, FakeGpu, installed


@pytest.fixture(scope="session", autouse=True)
def gpu() -> Iterator[Gpu]:
    """The GPU of this process, on which a row was scored."""
    if VARIABLE in os.environ:
        with installed(FakeGpu(**json.loads(os.environ[VARIABLE]))):
            yield Gpu("GPU-fake-1", "fake", 1 << 30, 0)
        return
    report = device_report()
    if report.gpu is None or report.problem is not None:
        pytest.skip(f"no GPU that can be used: {report.found}")
    yield report.gpu
