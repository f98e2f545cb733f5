"""How many rows a batch had at last, remembered for a model version on a class of workers, across jobs.

One small file for each pair, beside the job directories. It is a cache: it may be deleted at any time, of several
drivers that write it the last one wins, and what cannot be read or written is passed over.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.errors import PipelineError
from pipeline.models.model import ModelVersion
from pipeline.storage.store import Store

logger = logging.getLogger(__name__)
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class WorkerClass:
    """Workers on which the same batches fit."""

    memory: int
    """Bytes a worker may use; 0: no limit."""
    threads: int
    """Tasks that run beside each other in one."""

    @staticmethod
    def of(workers: Iterable[Mapping[str, Any]]) -> WorkerClass:
        """The class of a cluster: that of its poorest worker.

        :param workers: as the scheduler describes them.
        """
        found = list(workers)
        limits = [int(one["memory_limit"] or 0) for one in found]
        return WorkerClass(
            memory=min((limit for limit in limits if limit), default=0),
            threads=max((int(one["nthreads"]) for one in found), default=1),
        )


def file_name(model: ModelVersion, workers: WorkerClass) -> str:
    """Where the size for that pair is kept, in the root of the job directories."""
    return f".batch-rows-{model.digest[:16]}-{workers.memory >> 20}MiB-{workers.threads}.json"


def recall(store: Store, model: ModelVersion, workers: WorkerClass) -> int | None:
    """Rows that fitted last time; None when that is not known.

    :param store: root of the job directories.
    """
    try:
        record = json.loads(store.read(file_name(model, workers)))
        rows = int(record["batch_rows"])
        known = record["schema_version"] == SCHEMA_VERSION and record["model"]["digest"] == model.digest
    except (OSError, PipelineError, ValueError, KeyError, TypeError):
        return None
    return rows if known and rows > 0 else None


def remember(store: Store, model: ModelVersion, workers: WorkerClass, *, rows: int, job: str) -> None:
    """Keep ``rows`` for the next job.

    :param job: id of the job that found out; for people.
    """
    record = {
        "schema_version": SCHEMA_VERSION,
        "model": {"name": model.name, "version": model.version, "digest": model.digest},
        "workers": asdict(workers),
        "batch_rows": rows,
        "job": job,
    }
    try:
        store.replace(file_name(model, workers), json.dumps(record, indent=1).encode() + b"\n")
    except (OSError, PipelineError):
        logger.warning("the batch size of %s could not be remembered", model.name, exc_info=True)
