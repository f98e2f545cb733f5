"""Dispatchers that share a cluster: what each must know of what the others have executing there."""

from __future__ import annotations

import threading

from pipeline.execution.worker_events import Ledger


class Neighbours:
    """The ledgers of all dispatchers on one cluster, each written by one thread and read by all."""

    def __init__(self) -> None:
        self._ledgers: list[Ledger] = []
        self._lock = threading.Lock()

    def join(self, ledger: Ledger) -> None:
        """``ledger`` is one of them from now on."""
        with self._lock:
            self._ledgers.append(ledger)

    def leave(self, ledger: Ledger) -> None:
        """It is not any more."""
        with self._lock:
            self._ledgers = [one for one in self._ledgers if one is not ledger]

    def busy_workers(self) -> set[str]:
        """Addresses where something executes, of whichever of them."""
        # A copy of a dict's values is made in one step, whatever its owner does meanwhile.
        return {execution.worker for ledger in self._all() for execution in list(ledger.executing.values())}

    def will_recycle(self, worker: str) -> None:
        """One of them is about to have that worker restarted; nobody of the others is to blame for that."""
        for ledger in self._all():
            ledger.will_recycle(worker)

    def _all(self) -> list[Ledger]:
        with self._lock:
            return list(self._ledgers)
