"""`ReceiptFolder`: the receipts of a job as files. They decide which partitions are done."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from pipeline.errors import StateCorrupt
from pipeline.jobs import layout
from pipeline.jobs.receipts import Receipt
from pipeline.jobs.round_log import RoundLog
from pipeline.jobs.rounds import Round
from pipeline.jobs.splits import partition_key
from pipeline.storage.local import LocalStore
from pipeline.storage.store import Store

_READERS = 32
"""Threads that read receipts if each read is a request to a service."""


class ReceiptFolder:
    """The receipts of a job, of all its rounds."""

    def __init__(self, store: Store, rounds: RoundLog) -> None:
        self._store = store
        self._rounds = rounds

    def all(self, *, round: int | None = None) -> tuple[Receipt, ...]:
        """Return all receipts in source order, those of split partitions, too.

        :param round: Number of the round. Default: all rounds.
        :raises StateCorrupt: for a receipt that is damaged, misnamed or of another plan.
        """
        receipts = self.each(round=round)
        return tuple(sorted(receipts, key=lambda receipt: (receipt.round, partition_key(receipt.partition))))

    def each(self, *, round: int | None = None) -> Iterator[Receipt]:
        """Yield the receipts of `all`, in any order."""
        for opened in self._rounds.all():
            if round in (None, opened.number):
                yield from _read_receipts(self._store, opened)

    def find(self, round: int, partition: str) -> Receipt | None:
        """Return the receipt of a partition; None while it has none."""
        path = layout.receipt_path(round, partition)
        try:
            return Receipt.from_json(self._store.read(path), where=self._store.url(path))
        except FileNotFoundError:
            return None

    def put(self, receipt: Receipt) -> Receipt:
        """Put ``receipt`` unless its partition has one. Return the receipt that counts."""
        if self._store.put_if_absent(layout.receipt_path(receipt.round, receipt.partition), receipt.to_json_bytes()):
            return receipt
        return self.find(receipt.round, receipt.partition) or receipt


def _read_receipts(store: Store, round: Round) -> Iterator[Receipt]:
    folder = layout.receipts_folder(round.number)
    paths = [f"{folder}/{name}" for name in store.list(folder) if name.endswith(".json")]
    if isinstance(store, LocalStore):
        yield from (_read_receipt(store, path, round) for path in paths)
    else:
        with ThreadPoolExecutor(_READERS) as pool:
            yield from pool.map(lambda path: _read_receipt(store, path, round), paths)


def _read_receipt(store: Store, path: str, round: Round) -> Receipt:
    url = store.url(path)
    receipt = Receipt.from_json(store.read(path), where=url)
    is_named = path == layout.receipt_path(round.number, receipt.partition) and receipt.round == round.number
    if receipt.plan != round.digest or not is_named:
        raise StateCorrupt(
            "a receipt does not belong to this job",
            where=url,
            found=f"partition {receipt.partition} of plan {receipt.plan[:12]}",
            expected=f"a partition named like the file, of plan {round.digest[:12]}",
            next_step="remove the file and resume: its partition is scored again",
        )
    return receipt
