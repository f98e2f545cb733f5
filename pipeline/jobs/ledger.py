"""`Ledger`: the partitions and receipts that count over all rounds of a job, and the counts of its rows. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from pipeline.common.rows import InputFile, QuarantinedFile, RowCounts
from pipeline.common.sketch import Sketches
from pipeline.jobs import layout
from pipeline.jobs.receipts import Receipt, Receipts, ReceiptView, Totals
from pipeline.jobs.rounds import Round, RoundReason, model_details
from pipeline.jobs.splits import current_partitions, partition_key
from pipeline.plan.plan import Partition
from pipeline.plan.stages import SealedInput


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
        first = max(round_.number for round_ in rounds if round_.rescore_all)
        self.rounds = tuple(round_ for round_ in rounds if round_.number >= first)
        """Rounds that count: the last round that did all the work, and all later rounds."""
        self._receipts = receipts if isinstance(receipts, Receipts) else Receipts(receipts)
        self._sorted = self._receipts.sorted(partition_key).names
        self._superseded = {
            round_.number: {
                name
                for later in self.rounds
                if later.number > round_.number
                for name in later.supersedes(round_.number)
            }
            for round_ in self.rounds
        }

    @property
    def base(self) -> Round:
        """The round that planned all the work. Later rounds repair its result."""
        return self.rounds[0]

    @property
    def last(self) -> Round:
        """The last round. No other round has partitions left: the last supersedes those pending before."""
        return self.rounds[-1]

    def partitions(self, round_: Round) -> tuple[Partition, ...]:
        """Return the partitions of a round that no later round superseded. Parts replace split partitions."""
        have, splits = self._receipts.partitions(round_.number), self._receipts.splits(round_.number)
        partitions = current_partitions(round_.plan, have, splits=splits)
        return tuple(partition for partition in partitions if not self._is_superseded(partition.id, round_.number))

    def _is_superseded(self, partition: str, round: int) -> bool:
        """True if a later round superseded this partition, or one that it was split from.

        A worker that lost its connection may still split a superseded partition.
        """
        superseded, parts = self._superseded[round], partition.split(".")
        return bool(superseded) and any(".".join(parts[: count + 1]) in superseded for count in range(len(parts)))

    @cached_property
    def done(self) -> ReceiptView:
        """Receipts that count, by round and source order. Receipts of split partitions are left out."""
        return ReceiptView(self._receipts, {round_.number: tuple(self._done(round_.number)) for round_ in self.rounds})

    def _done(self, round: int) -> Iterator[str]:
        for partition in self._sorted.get(round, ()):
            if not self._receipts.is_split(round, partition) and not self._is_superseded(partition, round):
                yield partition

    @cached_property
    def todo(self) -> tuple[Partition, ...]:
        """Partitions that have no receipt yet."""
        return tuple(partition for round_ in self.rounds for partition in self._pending(round_))

    @property
    def pending(self) -> dict[int, tuple[str, ...]]:
        """Ids of partitions that have no receipt yet, per round."""
        return {round_.number: tuple(partition.id for partition in self._pending(round_)) for round_ in self.rounds}

    def _pending(self, round_: Round) -> Iterator[Partition]:
        have = self._receipts.partitions(round_.number)
        return (partition for partition in self.partitions(round_) if partition.id not in have)

    def receipts(self, round: int) -> ReceiptView:
        """Return all receipts of a round in source order, of superseded and split partitions, too.

        Empty for a round that does not count.
        """
        names = self._sorted.get(round, ()) if round in self._superseded else ()
        return ReceiptView(self._receipts, {round: names})

    def settled(self, round: int) -> set[str] | None:
        """Return the ids of partitions whose outcome is final; None: all partitions of the round.

        Of the files of such a partition, only those that its receipt names count.
        """
        if round not in self._superseded:
            return None
        return {*self._receipts.partitions(round), *self._superseded[round]}

    @property
    def planned(self) -> int:
        """Number of partitions that count."""
        return len(self.done) + len(self.todo)

    @cached_property
    def files(self) -> dict[str, InputFile]:
        """Input files whose rows count, by path, as described by the last plan that reads them."""
        files: dict[str, InputFile] = {}
        for round_ in self.rounds:
            for file in round_.record.quarantined_files if round_.record else ():
                files.pop(file.path, None)
            files |= {file.path: file for file in round_.plan.files if not is_rejects(file.path)}
        return files

    @cached_property
    def quarantined_files(self) -> tuple[QuarantinedFile, ...]:
        """Quarantined input files, sorted by path."""
        files: dict[str, QuarantinedFile] = {}
        for round_ in self.rounds:
            for path in round_.record.repaired_files if round_.record else ():
                files.pop(path, None)
            added = (
                *(round_.plan.quarantined_files if round_.rescore_all else ()),
                *(round_.record.quarantined_files if round_.record else ()),
            )
            files |= {file.path: file for file in added}
        return tuple(files[path] for path in sorted(files))

    @property
    def inputs(self) -> tuple[SealedInput, ...]:
        """Manifests of earlier stages whose files count, as the last round has them; none for a job."""
        role = self.last.plan.role
        return role.inputs if role else ()

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

    def sketches(self) -> Sketches:
        """Return the distributions of scores and features over the receipts that count, from a pass over them."""
        sketches = Sketches()
        for receipt in self.done:
            sketches.add_packed(receipt.sketches)
        return sketches

    @cached_property
    def rows(self) -> RowCounts:
        """Counts of the rows so far. A row that was rejected first and output later counts as output."""
        total, retried, pruned = self.totals.rows, self.totals.retried_rows, self.pruned_rows
        if self.base.plan.dask is not None:  # no partition has rows of its own: each may have rows of all
            read = self.base.plan.dask.main.rows
            return RowCounts(read, total.output, made=total.output - read)
        return RowCounts(
            total.input - retried + pruned, total.output, total.rejected - retried, total.filtered + pruned, total.made
        )

    @cached_property
    def reasons(self) -> dict[str, int]:
        """Number of rows that are still rejected, per reason, most frequent first."""
        counts = sorted(self.totals.reasons.items(), key=lambda pair: (-pair[1], pair[0]))
        return {reason: count for reason, count in counts if count}

    @cached_property
    def _retried_ranges(self) -> dict[str, list[tuple[int, int]]]:
        """Retried row ranges of each file of rejects, by its path in the job directory."""
        ranges: dict[str, list[tuple[int, int]]] = {}
        for receipt in self.done if self.totals.retried_rows else ():
            for part in receipt.files if receipt.before else ():
                ranges.setdefault(part.path, []).append((part.row_start, part.row_stop))
        return ranges

    def retried_ranges(self, receipt: Receipt) -> list[tuple[int, int]]:
        """Return the row ranges of the receipt's file of rejects that a later round scored again, sorted."""
        return sorted(self._retried_ranges.get(rejects_path(receipt), ()))

    def still_rejected_ranges(self, receipt: Receipt) -> list[tuple[int, int]]:
        """Return the row ranges of the receipt's file of rejects that no later round scored again."""
        ranges, start = [], 0
        rows = receipt.rejects.rows if receipt.rejects else 0
        for begin, end in (*self.retried_ranges(receipt), (rows, rows)):
            if begin > start:
                ranges.append((start, begin))
            start = end
        return ranges

    def model_of(self, receipt: Receipt) -> dict[str, str]:
        """Return name, version and digest of the model version that scored the receipt's partition."""
        return model_details(self.round(receipt.round).plan)

    def round(self, number: int) -> Round:
        """Return the round with that number."""
        return next(round_ for round_ in self.rounds if round_.number == number)

    def summaries(self) -> tuple[RoundSummary, ...]:
        """Return the result of each round that counts, except the first."""
        return tuple(self._summary(round_) for round_ in self.rounds[1:])

    def _summary(self, round_: Round) -> RoundSummary:
        receipts = tuple(ReceiptView(self._receipts, {round_.number: self.done.names[round_.number]}))
        again = [receipt for receipt in receipts if receipt.before]
        return RoundSummary(
            round=round_.number,
            reason=round_.reason,
            model=model_details(round_.plan),
            changes=round_.record.changes if round_.record else (),
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
