"""Let a nanny fork its workers, as the nannies of a local cluster do (``dask worker --preload-nanny``).

The nanny starts a process with the imports of a worker, once. A worker that replaces one that died then takes a tenth
of a second, where a new interpreter takes one to two.
"""

from __future__ import annotations

from typing import Any

import dask
import distributed.utils

from pipeline.common import forkserver
from pipeline.common.forkserver import thread_environment


def dask_setup(nanny: Any) -> None:
    """Start the fork server of this process. Dask calls this once for each nanny."""
    if forkserver.start(thread_environment(1, 1)):
        # Else Dask gives the server a list of imports of its own.
        distributed.utils._forkserver_preload_set = True
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
