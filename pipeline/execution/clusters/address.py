"""A scheduler that runs already. It is used, and left as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dask.config
from distributed import Client

from pipeline.errors import NoWorkers, SchedulerLost, SpecError
from pipeline.execution.clusters.security import certificates_from, host_of, is_loopback
from pipeline.jobs.cancellation import wait_in_slices
from pipeline.plan.plan import Limits
from pipeline.settings import Settings

logger = logging.getLogger(__name__)
_UNKNOWN = {"memory_limit": 0, "nthreads": 1}


@dataclass(frozen=True)
class ExistingScheduler:
    """``type: address``."""

    settings: Settings
    address: str
    """Such as ``tls://10.0.0.1:8786``."""
    ca: str | None = None
    """Certificate of the authority for ``tls://``: path, ``file:PATH`` or ``env:NAME``. These three override the
    settings, and those Dask's own configuration (``distributed.comm.tls``)."""
    cert: str | None = None
    """Certificate to show."""
    key: str | None = None
    """Its private key."""

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
    def open(self, *, directory: str = "") -> Iterator[Client]:
        """A client of it; closed on leaving."""
        is_known = self.address.startswith("tls://") or is_loopback(host_of(self.address))
        if not (is_known or self.settings.insecure_network):
            logger.warning(
                "the connection to %s is not encrypted, and nobody there is asked who they are: "
                "use tls://, or say --insecure-network",
                self.address,
            )
        with self._connect() as client:
            yield client

    @contextmanager
    def _connect(self) -> Iterator[Client]:
        security = self._security()
        try:
            client = Client(
                self.address, set_as_default=False, security=security, timeout=self.settings.scheduler_timeout
            )
        except (OSError, TimeoutError) as error:
            # The other end gives no reason for a certificate that it does not take.
            tls = ", or give the certificates that it takes" if security is not None else ""
            raise SchedulerLost(
                "there is no scheduler at that address",
                where=self.address,
                found=str(error) or str(error.__cause__ or type(error).__name__),
                next_step=f"start one (dask scheduler), or mend the address{tls}",
            ) from error
        with client:
            try:
                wait_in_slices(
                    lambda some: client.wait_for_workers(1, timeout=some), timeout=self.settings.no_workers_timeout
                )
            except TimeoutError as error:
                raise NoWorkers(
                    "the scheduler has no workers",
                    where=self.address,
                    found=f"0 after {self.settings.no_workers_timeout:.0f} s",
                    next_step="start workers (dask worker ADDRESS), then resume",
                ) from error
            yield client

    def _security(self) -> Any:
        """What Dask needs to connect; None: what its configuration says.

        :raises SpecError: for a ``tls://`` address without certificates.
        """
        if not self.address.startswith("tls://"):
            return None
        settings = self.settings
        named = (self.ca or settings.tls_ca, self.cert or settings.tls_cert, self.key or settings.tls_key)
        certificates = certificates_from(*named, where=self.address)
        if certificates is not None:
            return certificates.security()
        if dask.config.get("distributed.comm.tls.client.cert", None):
            return None
        raise SpecError(
            "a tls:// address needs certificates",
            where=self.address,
            found="none",
            expected="ca, cert and key, in the cluster file or in the settings tls-ca, tls-cert and tls-key",
            next_step="docs/security.md#clusters-that-span-hosts shows both",
        )
