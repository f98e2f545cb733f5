"""Set up a nanny of a batch job (``distributed.nanny.preload``): SIGTERM leaves its worker the time to commit.

``dask worker`` ends its workers at once. Here it passes SIGTERM on, which starts `pipeline.execution.clusters.
worker_drain`, and does so only after `GRACE` seconds; before, it ends by itself when its workers have left.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from contextlib import suppress
from typing import Any

from pipeline.execution.clusters.worker_drain import SIGNAL_SECONDS

GRACE = SIGNAL_SECONDS + 4.0
_nannies: list[Any] = []


async def dask_setup(nanny: Any) -> None:
    """Pass on SIGTERM to the worker of ``nanny``. Dask calls this."""
    _nannies.append(nanny)
    if len(_nannies) > 1 or threading.current_thread() is not threading.main_thread():
        return
    before, loop = signal.getsignal(signal.SIGTERM), asyncio.get_running_loop()

    def on_signal(signum: int, frame: Any) -> None:
        for known in _nannies:
            if known.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(known.pid, signal.SIGTERM)
        if callable(before):
            loop.call_soon_threadsafe(loop.call_later, GRACE, before, signum, frame)

    signal.signal(signal.SIGTERM, on_signal)
