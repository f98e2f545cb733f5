"""The process of an isolated partition: what it inherits."""

from __future__ import annotations

import subprocess
from typing import Any

import pyarrow as pa
import pytest

from pipeline.models.model import Feature, ModelVersion
from pipeline.scoring import isolation
from pipeline.testing.recipes import make_recipe

VERSION = ModelVersion("m", "1", "/m.ubj", "0" * 64, "xgboost", 10, (Feature("a"),), "regression", 1)


def test_process_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It scores on the CPU, and may be killed; a context on a GPU would cost memory there, and time."""
    seen: dict[str, str] = {}

    def start(command: list[str], *, env: dict[str, str], **_: Any) -> None:
        seen.update(env)
        raise OSError("not started")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(OSError, match="not started"):
        isolation._Child(make_recipe(VERSION, pa.schema([("a", pa.float32())])), memory=0)
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
