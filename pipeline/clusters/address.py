"""A scheduler that runs already. It is used, and left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from distributed import Client

from pipeline.errors import NoWorkers, SchedulerLost
from pipeline.plan import Limits
from pipeline.settings import Settings

_UNKNOWN = {"memory_limit": 0, "nthreads": 1}


@dataclass(frozen=True)
class ExistingScheduler:
    """``type: address``."""

    settings: Settings
    address: str
    """Such as ``tcp://10.0.0.1:8786``."""

    def limits(self) -> Limits:
        """What the workers that are there now offer."""
        with self._connect() as client:
            # The last one may leave between the wait for it and this question; planning then reckons with one.
            workers = list(client.scheduler_info(n_workers=-1)["workers"].values()) or [_UNKNOWN]
        # A worker without a limit of its own reports 0; 4 GiB is what planning then reckons with.
        limits = [int(worker["memory_limit"] or 0) or 4 << 30 for worker in workers]
        threads = [int(worker["nthreads"]) for worker in workers]
        return Limits(workers=len(workers), threads=max(1, sum(threads) // len(threads)), memory=min(limits))

    @contextmanager
    def open(self) -> Iterator[Client]:
        """A client of it; closed on leaving."""
        with self._connect() as client:
            yield client

    @contextmanager
    def _connect(self) -> Iterator[Client]:
        try:
            client = Client(self.address, set_as_default=False, timeout=self.settings.scheduler_timeout)
        except (OSError, TimeoutError) as error:
            raise SchedulerLost(
                "there is no scheduler at that address",
                where=self.address,
                found=str(error),
                next_step="start one (dask scheduler), or mend the address",
            ) from error
        with client:
            try:
                client.wait_for_workers(1, timeout=self.settings.no_workers_timeout)
            except TimeoutError as error:
                raise NoWorkers(
                    "the scheduler has no workers",
                    where=self.address,
                    found=f"0 after {self.settings.no_workers_timeout:.0f} s",
                    next_step="start workers (dask worker ADDRESS), then resume",
                ) from error
            yield client
