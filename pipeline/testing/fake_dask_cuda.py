"""A stand-in for the package ``dask_cuda``: its cluster, as far as it starts workers and names devices."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from distributed import LocalCluster


class LocalCUDACluster(LocalCluster):
    """A worker for each device; a worker's name is its device, which comes first in its ``CUDA_VISIBLE_DEVICES``."""

    def __init__(
        self,
        CUDA_VISIBLE_DEVICES: Sequence[str],  # noqa: N803
        *,
        device_memory_limit: None,
        **options: Any,
    ) -> None:
        self.cuda_visible_devices = list(CUDA_VISIBLE_DEVICES)
        super().__init__(n_workers=0, processes=True, **options)  # type: ignore[no-untyped-call]
        added = self.new_spec["options"]
        # As dask-cuda does: its own preload opens the device.
        added["preload_argv"] = ["--create-cuda-context"]
        added["plugins"] = set()
        self.scale(len(self.cuda_visible_devices))  # type: ignore[no-untyped-call]
        self.sync(self._correct_state)  # type: ignore[no-untyped-call]

    def new_worker_spec(self) -> dict[str, Any]:
        """Return the description of the worker of the next device."""
        devices = self.cuda_visible_devices
        name = min(set(devices) - set(self.worker_spec))
        first = devices.index(name)
        spec = copy.deepcopy(self.new_spec)
        spec["options"]["env"] = {"CUDA_VISIBLE_DEVICES": ",".join(devices[first:] + devices[:first])}
        return {name: spec}


@contextmanager
def installed(cluster: Any = LocalCUDACluster) -> Iterator[None]:
    """Let this process import ``dask_cuda`` inside the block, with a cluster of your choice; None: the import fails."""
    before = sys.modules.get("dask_cuda")
    module = None
    if cluster is not None:
        module = ModuleType("dask_cuda")
        module.LocalCUDACluster = cluster  # type: ignore[attr-defined]
    sys.modules["dask_cuda"] = module  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del sys.modules["dask_cuda"]
        else:
            sys.modules["dask_cuda"] = before
