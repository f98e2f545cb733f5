"""One running cluster for several jobs at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distributed import Client

from pipeline.execution.clusters.client import shake_hands
from pipeline.execution.neighbours import Neighbours


class SharedCluster:
    """Lends each of the jobs on it a client of its own, because a client hears the cluster's events for one of them."""

    def __init__(self, client: Any, *, timeout: float) -> None:
        self.neighbours = Neighbours()
        self._client = client
        self._timeout = timeout
        self._greeted: set[str] = set()
        self._lock = threading.Lock()

    @contextmanager
    def client(self, flavor: str) -> Iterator[Any]:
        """A client of the cluster, closed on leaving.

        :param flavor: what its workers must be able to import.
        :raises EnvMismatch: when they run other versions than this process.
        """
        with self._lock:
            if flavor not in self._greeted:
                shake_hands(self._client, flavor=flavor, timeout=self._timeout)
                self._greeted.add(flavor)
        address, security = self._client.scheduler.address, self._client.security
        with Client(address, security=security, set_as_default=False, timeout=self._timeout) as client:
            yield client
