"""The real dask-cuda on a machine without a GPU, by its own switches for tests: `.ci/gpu-packages` runs these.

The whole job on it is in tests/integration/test_fake_gpu.py, which takes the real package where it is installed.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.devices.inventory import read_inventory
from pipeline.execution.clusters import open_cluster
from pipeline.execution.clusters.batch_systems import Slurm
from pipeline.execution.clusters.local_cuda import LocalGpus
from pipeline.settings import Settings
from pipeline.testing.fake_nvml import Card, FakeNvml, nvml

pytest.importorskip("dask_cuda")
SWITCHES = {"DASK_CUDA_TEST_DISABLE_DEVICE_SPECIFIC": "1", "DASK_CUDA_TEST_SINGLE_GPU": "1"}
ROOT = Path(__file__).parents[2]


class TestLocalCluster:
    def test_workers_are_as_planned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each sees its GPU first; the worker on the CPU sees none, and has nothing of dask-cuda."""

        def facts(dask_worker: Any) -> dict[str, Any]:
            # Of this function, so that workers do not import this module, and dask-cuda with it.
            return {
                "name": dask_worker.name,
                "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
                "threads": dask_worker.state.nthreads,
                "data": type(dask_worker.data).__name__,
                "is_set_up": "pipeline.execution.clusters.worker_setup" in sys.modules,
                "openmp": os.environ["OMP_NUM_THREADS"],
                "gpu_packages": sorted({"cupy", "cudf", "dask_cuda"} & sys.modules.keys()),
            }

        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in SWITCHES.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("RAPIDS_NO_INITIALIZE", raising=False)
        with nvml(FakeNvml([Card("GPU-a"), Card("GPU-b")]), cupy=False):
            adapter = LocalGpus(Settings.load(), threads=2, cpu_workers=1, memory_limit="2 GiB")
            with open_cluster(adapter) as client:
                workers = client.scheduler_info(n_workers=-1)["workers"].values()
                found = {answer["name"]: answer for answer in client.run(facts).values()}
        assert {worker["name"]: worker["resources"] for worker in workers} == {
            "GPU-a": {"GPU": 2},
            "GPU-b": {"GPU": 2},
            "cpu-0": {"CPU": 1},
        }
        assert {name: answer["visible"] for name, answer in found.items()} == {
            "GPU-a": "GPU-a,GPU-b",
            "GPU-b": "GPU-b,GPU-a",
            "cpu-0": "",
        }
        assert {name: answer["threads"] for name, answer in found.items()} == {"GPU-a": 2, "GPU-b": 2, "cpu-0": 1}
        assert {answer["data"] for answer in found.values()} == {"dict"}
        assert all(answer["is_set_up"] for answer in found.values())
        assert {answer["openmp"] for answer in found.values()} == {"1"}
        assert found["cpu-0"]["gpu_packages"] == []
        assert "RAPIDS_NO_INITIALIZE" not in os.environ, "dask-cuda sets it for good"


class TestCommandLine:
    def test_takes_the_arguments_of_a_slurm_job(self) -> None:
        """All but one are taken; then it asks NVML, which is not there."""
        pytest.importorskip("dask_jobqueue")
        system = Slurm(Settings.load(), cores=4, memory="8 GiB", processes=2, gpus=2, interface="lo")
        cluster = system.make(None)
        try:
            command = shlex.split(cluster.job_script().splitlines()[-1])
        finally:
            cluster.close(timeout=20)
        assert command[1:3] == ["-m", "dask_cuda.cli"]
        done = _run([sys.executable, *command[1:]])
        assert done.returncode == 1
        assert "NVML Shared Library Not Found" in done.stderr
        refused = _run([sys.executable, *command[1:], "--lifetime", "100s"])
        assert refused.returncode == 2

    def test_two_gpus_of_a_job_start_two_workers(self) -> None:
        """Names with a number at the end are those that dask-jobqueue counts as one job."""
        script = (
            "from dask_cuda.cuda_worker import CUDAWorker\n"
            "import asyncio\n"
            "async def main():\n"
            "    made = CUDAWorker('tcp://127.0.0.1:1', nthreads=3, name='X', resources='GPU=3')\n"
            "    for nanny in made.nannies:\n"
            "        print(nanny.name, nanny.resources if hasattr(nanny, 'resources') else nanny.worker_kwargs)\n"
            "asyncio.run(main())\n"
        )
        done = _run([sys.executable, "-c", script], CUDA_VISIBLE_DEVICES="0,1", **SWITCHES)
        assert done.stdout.splitlines() == ["X-0 {'GPU': 3.0}", "X-1 {'GPU': 3.0}"], done.stderr


def test_no_gpu_is_reported_in_the_words_of_nvml() -> None:
    inventory = read_inventory()
    if inventory.gpus:
        pytest.skip("this machine has a GPU")
    assert inventory.reason == "NVML Shared Library Not Found"


def _run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
