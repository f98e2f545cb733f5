"""Every test of the tree engine runs on the kernels of each kind of processor that this machine can run."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest

from pipeline.models.trees import library

KINDS = ("x86-64-v2", "x86-64-v3", "x86-64-v4") if platform.machine() in {"x86_64", "AMD64"} else ("baseline",)


@pytest.fixture(autouse=True, params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force the kernels of one kind of processor."""
    if request.param not in library.kinds():
        pytest.skip(f"this machine has no kernels for {request.param}")
    with library.force(request.param):
        yield request.param
