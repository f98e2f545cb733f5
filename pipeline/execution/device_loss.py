"""End a worker whose GPU is lost: a process cannot use a device again after its context broke.

The first time a nanny restarts the process, with a new context. The second time the GPU is struck off for as long as
the scheduler runs: the worker leaves for good where GPUs are required, and its share goes to the others; else it scores
on the CPU. Losses are counted in a folder of the worker's machine, because a process that ends cannot count its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from distributed import get_worker

from pipeline.devices.inventory import VISIBLE
from pipeline.execution.worker_events import memory_limit
from pipeline.models.process import ProcessFacts, set_process_facts
from pipeline.plan.recipe import StageRecipe

logger = logging.getLogger(__name__)
MAX_LOSSES = 2
"""Losses of a GPU after which it is struck off."""
_leaving = threading.Lock()
"""Held from the first loss on: other tasks of this process fail for the same reason."""
CLOSE_SECONDS = 0.5
"""Seconds until a worker whose GPU is lost closes: the error of its task must have been sent."""


def prepare_process() -> None:
    """Tell this process what its worker knows: threads, memory, and the folder that workers of this machine share."""
    worker = _worker()
    if worker is not None:
        folder = str(_shared_folder(worker) / "models")
        set_process_facts(ProcessFacts(worker.state.nthreads, folder, memory_limit()))


def without_lost_device(recipe: StageRecipe) -> StageRecipe:
    """Return ``recipe`` for a worker whose GPU may be struck off: on the CPU, unless GPUs are required."""
    worker = _worker() if recipe.device == "auto" else None
    if worker is None or count_losses(_record_of(worker)) < MAX_LOSSES:
        return recipe
    return replace(recipe, device="cpu")


def leave_after_loss(recipe: StageRecipe) -> None:
    """Record that the GPU of this process is lost, once, and let the worker end soon.

    If GPUs are required and this one is struck off, the worker leaves for good.
    """
    worker = _worker()
    if worker is None or not _leaving.acquire(blocking=False):
        return
    losses = record_loss(_record_of(worker))
    is_final = losses >= MAX_LOSSES and recipe.device == "cuda"
    ending = "leaves" if is_final else "restarts"
    logger.error("the GPU of this worker is lost, %d times: the worker %s", losses, ending)
    worker.loop.add_callback(_close_later, worker, is_final=is_final)


async def _close_later(worker: Any, *, is_final: bool) -> None:
    await asyncio.sleep(CLOSE_SECONDS)
    # Without its nanny only the process ends, and the nanny starts another one.
    await worker.close(nanny=is_final, executor_wait=False, reason="its GPU is lost")


def record_loss(path: Path) -> int:
    """Add a loss to the record of a GPU, and return their number. Processes may do so at the same time."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(b".")
    except OSError:
        logger.warning("the loss of a GPU could not be recorded", exc_info=True)
        return 1
    return count_losses(path)


def count_losses(path: Path) -> int:
    """Return the number of losses of a GPU."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _worker() -> Any:
    try:
        return get_worker()
    except ValueError:
        return None


def _shared_folder(worker: Any) -> Path:
    """Return the folder that holds the folders of the workers of one machine."""
    return Path(worker.local_directory).parent


def _record_of(worker: Any) -> Path:
    """Return the record of the GPU of this process on this cluster."""
    first = os.environ.get(VISIBLE, "0").split(",")[0].strip()
    name = sha256(f"{worker.scheduler.address} {first}".encode()).hexdigest()[:16]
    return _shared_folder(worker) / "lost-gpus" / name
