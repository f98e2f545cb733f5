"""`Ledger`: the partitions and receipts that count over all rounds of a job, and the counts of its rows. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from pipeline.common.rows import InputFile, QuarantinedFile, RowCounts
from pipeline.jobs import layout
from pipeline.jobs.receipts import Receipt, Receipts, ReceiptView, Totals
from pipeline.jobs.rounds import Round, RoundReason, model_details
from pipeline.jobs.splits import current_partitions, partition_key
from pipeline.plan.plan import Partition


@dataclass(frozen=True)
class RoundSummary:
    """Result of one round."""

    round: int
    reason: RoundReason
    model: dict[str, str]
    changes: tuple[str, ...]
    rows: RowCounts
    retried: int
    """Input rows that earlier rounds had rejected."""
    recovered: int
    """Retried rows that were output."""

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON output shows it."""
        return {**asdict(self), "changes": list(self.changes), "rows": self.rows.to_dict()}


class Ledger:
    """The partitions and receipts that count, over all rounds of a job."""

    def __init__(self, rounds: Sequence[Round], receipts: Iterable[Receipt]) -> None:
        """:param receipts: Receipts of all rounds, in any order."""
        first = max(one.number for one in rounds if one.rescore_all)
        self.rounds = tuple(one for one in rounds if one.number >= first)
        """Rounds that count: the last round that did all the work, and all later rounds."""
        self._receipts = receipts if isinstance(receipts, Receipts) else Receipts(receipts)
        self._sorted = self._receipts.sorted(partition_key).names
        self._taken = {
            one.number: {
                name for later in self.rounds if later.number > one.number for name in later.supersedes(one.number)
            }
            for one in self.rounds
        }

    @property
    def base(self) -> Round:
        """The round that planned all the work. Later rounds repair its result."""
        return self.rounds[0]

    @property
    def last(self) -> Round:
        """The last round. No other round has partitions left: the last supersedes those left undone before."""
        return self.rounds[-1]

    def partitions(self, of: Round) -> tuple[Partition, ...]:
        """Return the partitions of a round that no later round superseded. Parts replace split partitions."""
        have, splits = self._receipts.partitions(of.number), self._receipts.splits(of.number)
        found = current_partitions(of.plan, have, splits=splits)
        return tuple(partition for partition in found if not self._is_taken(partition.id, of.number))

    def _is_taken(self, partition: str, round: int) -> bool:
        """True if a later round superseded this partition, or one that it was split from.

        A worker that lost its connection may still split a superseded partition.
        """
        taken, parts = self._taken[round], partition.split(".")
        return bool(taken) and any(".".join(parts[: count + 1]) in taken for count in range(len(parts)))

    @cached_property
    def done(self) -> ReceiptView:
        """Receipts that count, by round and source order. Receipts of split partitions are left out."""
        return ReceiptView(self._receipts, {one.number: tuple(self._done(one.number)) for one in self.rounds})

    def _done(self, round: int) -> Iterator[str]:
        for partition in self._sorted.get(round, ()):
            if not self._receipts.is_split(round, partition) and not self._is_taken(partition, round):
                yield partition

    @cached_property
    def todo(self) -> tuple[Partition, ...]:
        """Partitions that have no receipt yet."""
        return tuple(partition for one in self.rounds for partition in self._left(one))

    @property
    def undone(self) -> dict[int, tuple[str, ...]]:
        """Ids of partitions that have no receipt yet, per round."""
        return {one.number: tuple(partition.id for partition in self._left(one)) for one in self.rounds}

    def _left(self, of: Round) -> Iterator[Partition]:
        have = self._receipts.partitions(of.number)
        return (partition for partition in self.partitions(of) if partition.id not in have)

    def receipts(self, round: int) -> ReceiptView:
        """Return all receipts of a round in source order, of superseded and split partitions, too.

        Empty for a round that does not count.
        """
        names = self._sorted.get(round, ()) if round in self._taken else ()
        return ReceiptView(self._receipts, {round: names})

    def settled(self, round: int) -> set[str] | None:
        """Return the ids of partitions whose outcome is final; None: all partitions of the round.

        Of the files of such a partition, only those that its receipt names count.
        """
        if round not in self._taken:
            return None
        return {*self._receipts.partitions(round), *self._taken[round]}

    @property
    def planned(self) -> int:
        """Number of partitions that count."""
        return len(self.done) + len(self.todo)

    @cached_property
    def files(self) -> dict[str, InputFile]:
        """Input files whose rows count, by path, as described by the last plan that reads them."""
        found: dict[str, InputFile] = {}
        for one in self.rounds:
            for file in one.record.quarantined_files if one.record else ():
                found.pop(file.path, None)
            found |= {file.path: file for file in one.plan.files if not is_rejects(file.path)}
        return found

    @cached_property
    def quarantined_files(self) -> tuple[QuarantinedFile, ...]:
        """Quarantined input files, sorted by path."""
        found: dict[str, QuarantinedFile] = {}
        for one in self.rounds:
            for path in one.record.repaired_files if one.record else ():
                found.pop(path, None)
            added = (
                *(one.plan.quarantined_files if one.rescore_all else ()),
                *(one.record.quarantined_files if one.record else ()),
            )
            found |= {file.path: file for file in added}
        return tuple(found[path] for path in sorted(found))

    @property
    def planned_rows(self) -> int:
        """Number of rows of the input files that count."""
        return sum(file.rows for file in self.files.values())

    @property
    def pruned_rows(self) -> int:
        """Number of rows that statistics ruled out. No partition has these rows; they count as filtered."""
        groups = (group for file in self.files.values() for group in file.input_groups)
        return sum(group.rows for group in groups if not group.selected)

    @cached_property
    def totals(self) -> Totals:
        """Sums over the receipts that count."""
        return Totals.of(self.done)

    @cached_property
    def rows(self) -> RowCounts:
        """Counts of the rows so far. A row that was rejected first and output later counts as output."""
        total, retried, pruned = self.totals.rows, self.totals.retried_rows, self.pruned_rows
        return RowCounts(
            total.input - retried + pruned, total.output, total.rejected - retried, total.filtered + pruned
        )

    @cached_property
    def reasons(self) -> dict[str, int]:
        """Number of rows that are still rejected, per reason, most frequent first."""
        found = sorted(self.totals.reasons.items(), key=lambda pair: (-pair[1], pair[0]))
        return {reason: count for reason, count in found if count}

    @cached_property
    def _tried_again(self) -> dict[str, list[tuple[int, int]]]:
        """Retried row ranges of each file of rejects, by its path in the job directory."""
        found: dict[str, list[tuple[int, int]]] = {}
        for receipt in self.done if self.totals.retried_rows else ():
            for part in receipt.files if receipt.before else ():
                found.setdefault(part.path, []).append((part.row_start, part.row_stop))
        return found

    def tried_again(self, receipt: Receipt) -> list[tuple[int, int]]:
        """Return the row ranges of the receipt's file of rejects that a later round scored again, sorted."""
        return sorted(self._tried_again.get(rejects_path(receipt), ()))

    def left(self, receipt: Receipt) -> list[tuple[int, int]]:
        """Return the row ranges of the receipt's file of rejects that no later round scored again."""
        found, start = [], 0
        rows = receipt.rejects.rows if receipt.rejects else 0
        for begin, end in (*self.tried_again(receipt), (rows, rows)):
            if begin > start:
                found.append((start, begin))
            start = end
        return found

    def model_of(self, receipt: Receipt) -> dict[str, str]:
        """Return name, version and digest of the model version that scored the receipt's partition."""
        return model_details(self.round(receipt.round).plan)

    def round(self, number: int) -> Round:
        """Return the round with that number."""
        return next(one for one in self.rounds if one.number == number)

    def summaries(self) -> tuple[RoundSummary, ...]:
        """Return the result of each round that counts, except the first."""
        return tuple(self._summary(one) for one in self.rounds[1:])

    def _summary(self, one: Round) -> RoundSummary:
        receipts = tuple(ReceiptView(self._receipts, {one.number: self.done.names[one.number]}))
        again = [receipt for receipt in receipts if receipt.before]
        return RoundSummary(
            round=one.number,
            reason=one.reason,
            model=model_details(one.plan),
            changes=one.record.changes if one.record else (),
            rows=RowCounts.total(receipt.rows for receipt in receipts),
            retried=sum(receipt.rows.input for receipt in again),
            recovered=sum(receipt.rows.output for receipt in again),
        )


def is_rejects(path: str) -> bool:
    """True if ``path`` of a fragment is a file of rejects.

    Paths of rejects are relative to the job directory; paths of input files are absolute.
    """
    return path.startswith(f"{layout.ROUNDS}/")


def rejects_path(receipt: Receipt) -> str:
    """Return the path of the receipt's file of rejects in the job directory; empty if there is none."""
    return layout.round_file(receipt.round, receipt.rejects.name) if receipt.rejects else ""
