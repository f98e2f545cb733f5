"""The number of cores, counted without Dask as Dask counts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from dask.system import cpu_count

from pipeline.common import cores


def test_count_is_that_of_dask() -> None:
    cores.core_count.cache_clear()
    assert cores.core_count() == cpu_count()


def test_counting_imports_no_dask() -> None:
    code = "import sys; from pipeline.common import forkserver as f; f.likely_environment(2, 1); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pipeline.common.cores" in done.stdout.split()
    assert not {"dask", "numpy", "yaml"} & set(done.stdout.split())


class TestQuota:
    @pytest.mark.parametrize(
        ("text", "quota"), [("150000 100000\n", 1.5), ("max 100000\n", 0.0), ("200000 0\n", 0.0), ("", 0.0)]
    )
    def test_second_version(self, tmp_path: Path, text: str, quota: float) -> None:
        _write(tmp_path / "proc/self/cgroup", "0::/jobs/mine\n")
        _write(tmp_path / "sys/fs/cgroup/jobs/mine/cpu.max", text)
        assert cores._quota(tmp_path) == quota

    @pytest.mark.parametrize(("micros", "quota"), [("50000\n", 0.5), ("-1\n", 0.0)])
    def test_first_version(self, tmp_path: Path, micros: str, quota: float) -> None:
        _write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", micros)
        _write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
        assert cores._quota(tmp_path) == quota

    def test_none(self, tmp_path: Path) -> None:
        assert cores._quota(tmp_path) == 0.0


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
