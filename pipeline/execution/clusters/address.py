"""Connect to a running scheduler. The scheduler is not stopped at the end."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import dask.config
from distributed import Client
from distributed.comm.addressing import get_address_host_port

from pipeline.common.units import format_seconds
from pipeline.errors import NoWorkers, SchedulerLost, SpecError
from pipeline.execution.clusters.security import certificates_from, host_of, is_loopback
from pipeline.jobs.cancellation import wait_in_slices
from pipeline.plan.plan import Limits
from pipeline.settings import Settings

logger = logging.getLogger(__name__)
REFUSED_SECONDS = 3.0
"""Seconds for which connections are refused until the scheduler counts as absent: one that starts now is found."""
REFUSED_PAUSE = 0.2
"""Seconds between two connections that are refused."""
_UNKNOWN = {"memory_limit": 0, "nthreads": 1}


def limits_of(client: Any) -> Limits:
    """Return the limits of a client's current workers."""
    # The last worker may leave after the wait for it; planning then assumes one.
    workers = list(client.scheduler_info(n_workers=-1)["workers"].values()) or [_UNKNOWN]
    # A worker without a limit reports 0; planning then assumes 4 GiB.
    limits = [int(worker["memory_limit"] or 0) or 4 << 30 for worker in workers]
    threads = [int(worker["nthreads"]) for worker in workers]
    return Limits(workers=len(workers), threads=max(1, sum(threads) // len(threads)), memory=min(limits))


@dataclass(frozen=True)
class ExistingScheduler:
    """``type: address``."""

    owns_workers: ClassVar[bool] = False
    settings: Settings
    address: str
    """Address of the scheduler, such as ``tls://10.0.0.1:8786``."""
    ca: str | None = None
    """Certificate of the authority for ``tls://``: path, ``file:PATH`` or ``env:NAME``. ``ca``, ``cert`` and ``key``
    override the settings, which override Dask's own configuration (``distributed.comm.tls``)."""
    cert: str | None = None
    """Certificate of this client."""
    key: str | None = None
    """Private key of ``cert``."""

    def limits(self) -> Limits:
        """Return the limits of the current workers."""
        with self._connect() as client:
            return limits_of(client)

    def describe_start(self) -> str:
        """Return the address, and the longest wait for a worker."""
        return f"those of {self.address}, at most {format_seconds(self.settings.no_workers_timeout)}"

    def preload(self, *, has_steps: bool) -> None:
        """Do nothing: the workers are running."""

    @contextmanager
    def open(self, *, directory: str = "") -> Iterator[Client]:
        """Yield a client, and close it on leaving."""
        is_safe = self.address.startswith("tls://") or is_loopback(host_of(self.address))
        if not (is_safe or self.settings.insecure_network):
            logger.warning(
                "the connection to %s is neither encrypted nor authenticated: "
                "use tls://, or --insecure-network to silence this warning",
                self.address,
            )
        with self._connect() as client:
            yield client

    @contextmanager
    def _connect(self) -> Iterator[Client]:
        security = self._security()
        self._check_listens()
        try:
            client = Client(
                self.address, set_as_default=False, security=security, timeout=self.settings.scheduler_timeout
            )
        except (ValueError, TypeError) as error:
            raise SpecError(
                "invalid address of a scheduler",
                where=self.address,
                found=str(error),
                expected="such as tcp://host:8786 or tls://host:8786",
                next_step="fix cluster, or --cluster",
            ) from error
        except (OSError, TimeoutError) as error:
            # A scheduler gives no reason for rejecting a certificate.
            tls = ", or give the certificates it accepts" if security is not None else ""
            raise SchedulerLost(
                "no scheduler at this address",
                where=self.address,
                found=str(error) or str(error.__cause__ or type(error).__name__),
                next_step=f"start one (dask scheduler), or fix the address{tls}",
            ) from error
        with client:
            try:
                wait_in_slices(
                    lambda piece: client.wait_for_workers(1, timeout=piece), timeout=self.settings.no_workers_timeout
                )
            except TimeoutError as error:
                raise NoWorkers(
                    "the scheduler has no workers",
                    where=self.address,
                    found=f"0 after {self.settings.no_workers_timeout:.0f} s",
                    next_step="start workers (dask worker ADDRESS), then resume",
                ) from error
            yield client

    def _check_listens(self) -> None:
        """Fail soon where nothing listens: Dask's client tries for as long as a busy scheduler may take to answer.

        :raises SchedulerLost: when connections have been refused for `REFUSED_SECONDS`, or the host is unknown.
        """
        if not self.address.startswith(("tcp://", "tls://")):
            return
        try:
            host, port = get_address_host_port(self.address)
        except ValueError:
            return  # the client says what is wrong with it
        deadline = time.monotonic() + min(REFUSED_SECONDS, self.settings.scheduler_timeout)
        while (error := _connection_error(host, port, timeout=self.settings.scheduler_timeout)) is not None:
            if time.monotonic() >= deadline:
                raise SchedulerLost(
                    "no scheduler at this address",
                    where=self.address,
                    found=error,
                    expected="a scheduler that listens there",
                    next_step="start one (dask scheduler), or fix the address",
                )
            time.sleep(REFUSED_PAUSE)

    def _security(self) -> Any:
        """Return the certificates for the connection; None: use the certificates of Dask's configuration.

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


def _connection_error(host: str, port: int, *, timeout: float) -> str | None:
    """Return why nothing can listen there: connections are refused, or the host is unknown. None for all else."""
    try:
        socket.create_connection((host, port), timeout=timeout).close()
    except (ConnectionRefusedError, socket.gaierror) as error:
        return f"{host}:{port}: {error.strerror or error}"
    except OSError:
        return None  # such as a timeout: the client's own attempts decide
    return None
