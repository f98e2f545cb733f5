"""Partitions of a round after splits of partitions that were too large for a worker, or too slow on one. Pure.

The receipt of a split partition names the parts. Each part has its own receipt, or is split in turn. The receipt and
the partition alone determine the split points, so every driver splits at the same rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from pipeline.common.rows import Fragment, InputFile, RowCounts
from pipeline.errors import StateCorrupt
from pipeline.jobs import layout
from pipeline.jobs.receipts import Receipt
from pipeline.plan.plan import Partition, Plan

MIN_SPLIT_ROWS = 1024
"""Number of rows up to which a partition is not split."""


def partition_key(partition: str) -> tuple[int, ...]:
    """Return a sort key that puts ids of partitions, parts of split ones included, in source order.

    :raises StateCorrupt: for an invalid id.
    """
    try:
        return tuple(int(part) for part in partition.split("."))
    except ValueError:
        raise StateCorrupt("invalid id of a partition", found=repr(partition), expected="such as 00042") from None


def sub_fragment(fragment: Fragment, file: InputFile, *, row_start: int, row_stop: int) -> Fragment:
    """Return the rows ``row_start`` to ``row_stop`` (of the file) of ``fragment``."""
    ends = list(accumulate(group.rows for group in file.row_groups))
    group_start = sum(end <= row_start for end in ends)
    group_stop = sum(end < row_stop for end in ends) + 1
    share = (row_stop - row_start) / max(1, fragment.rows)
    return replace(
        fragment,
        row_start=row_start,
        row_stop=row_stop,
        group_start=group_start,
        group_stop=group_stop,
        bytes=round(fragment.bytes * share),
        span=file.span(group_start, group_stop),
    )


def halves(partition: Partition, files: Mapping[str, InputFile]) -> tuple[Partition, Partition] | None:
    """Return the two (nearly) equal halves that replace ``partition``; None for fewer than 2 rows.

    :param files: Input files of the plan by path.
    """
    if partition.rows < 2:
        return None
    head, tail = pieces(partition, (partition.rows // 2,), files)
    return head, tail


def pieces(partition: Partition, split_points: Sequence[int], files: Mapping[str, InputFile]) -> tuple[Partition, ...]:
    """Return the parts that replace ``partition`` when it is split before the rows ``split_points``.

    :param split_points: Row numbers, counted over all fragments; ascending, and none at either end.
    :param files: Input files of the plan by path.
    :raises StateCorrupt: when the partition cannot be split there.
    """
    edges = (0, *split_points, partition.rows)
    if any(low >= high for low, high in pairwise(edges)):
        raise StateCorrupt(
            "a partition was split at rows where it cannot be",
            found=f"{partition.id} at {tuple(split_points)}",
            expected=f"ascending row numbers between 1 and {partition.rows - 1}",
            next_step="remove its receipt and resume: the partition is scored again",
        )
    return tuple(
        Partition(f"{partition.id}.{number}", tuple(_between(partition, files, start=low, stop=high)))
        for number, (low, high) in enumerate(pairwise(edges))
    )


def _between(partition: Partition, files: Mapping[str, InputFile], *, start: int, stop: int) -> Iterable[Fragment]:
    begin = 0
    for fragment in partition.fragments:
        low, high = max(start, begin) - begin, min(stop, begin + fragment.rows) - begin
        if low < high:
            first = fragment.row_start
            yield sub_fragment(fragment, files[fragment.path], row_start=first + low, row_stop=first + high)
        begin += fragment.rows


def even_split_points(start: int, stop: int, *, parts: int, smallest: int = 1) -> tuple[int, ...]:
    """Return the split points that divide the rows ``start`` to ``stop`` into ``parts`` nearly equal parts.

    Neither end is a split point. There are fewer parts if one would have fewer than ``smallest`` rows.
    """
    count = max(1, min(parts, (stop - start) // max(1, smallest)))
    return tuple(start + (stop - start) * number // count for number in range(1, count))


def split_receipt(
    partition: str, split_points: Sequence[int], *, plan: str, model: str, attempt: str, round: int = 0
) -> Receipt:
    """Make the receipt of a partition that is split before the rows ``split_points``, with no rows and no files.

    :param partition: Id of the partition.
    :param plan: Digest of the plan.
    :param model: Digest of the model version.
    :param attempt: Unique name of the attempt, or of the driver, that split the partition.
    :param round: Number of the round.
    """
    return Receipt(
        partition=partition,
        plan=plan,
        model=model,
        attempt=attempt,
        data=None,
        rejects=None,
        rows=RowCounts(),
        files=(),
        splits=tuple(f"{partition}.{number}" for number in range(len(split_points) + 1)),
        split_points=tuple(split_points),
        round=round,
    )


def parts_of(partition: Partition, receipt: Receipt, files: Mapping[str, InputFile]) -> tuple[Partition, ...]:
    """Return the parts that replace ``partition`` according to the ``receipt`` of its split.

    :raises StateCorrupt: when the partition cannot be split like that.
    """
    if len(receipt.split_points) + 1 == len(receipt.splits):
        parts = pieces(partition, receipt.split_points, files)
        if tuple(part.id for part in parts) == receipt.splits:
            return parts
    raise StateCorrupt(
        "the receipt of a split partition names other parts than its split points make",
        found=f"{partition.id}: parts {receipt.splits} at {receipt.split_points}",
        expected=f"{partition.id}.0, {partition.id}.1, …, one more than split points",
        next_step="remove the receipt and resume: the partition is scored again",
    )


def files_of_split_attempts(receipts: Iterable[Receipt]) -> set[str]:
    """Return names of files that garbage collection must keep, relative to the round's folder.

    The attempt that split a partition may still commit part 0, in files named for the whole partition.
    """
    by_id = {receipt.partition: receipt for receipt in receipts}
    open_splits = [receipt for receipt in by_id.values() if receipt.splits and receipt.splits[0] not in by_id]
    names = (layout.data_name, layout.rejects_name)
    return {name(receipt.partition, receipt.attempt) for receipt in open_splits for name in names}


def effective_partitions(plan: Plan, receipts: Iterable[Receipt]) -> tuple[Partition, ...]:
    """Return the partitions of the round in source order. Parts replace split partitions.

    :raises StateCorrupt: for a receipt of an unknown partition.
    """
    by_id = {receipt.partition: receipt for receipt in receipts}
    return current_partitions(plan, by_id, splits={name: receipt for name, receipt in by_id.items() if receipt.splits})


def current_partitions(plan: Plan, have: Collection[str], *, splits: Mapping[str, Receipt]) -> tuple[Partition, ...]:
    """Return `effective_partitions`, from the receipts of split partitions only.

    :param have: Ids of partitions that have a receipt.
    :param splits: Receipts of split partitions, by id of the partition.
    """
    files: dict[str, InputFile] = {}
    partitions: list[Partition] = []
    waiting = list(reversed(plan.partitions))
    known: set[str] = set()
    while waiting:
        partition = waiting.pop()
        known.add(partition.id)
        receipt = splits.get(partition.id)
        if receipt is None:
            partitions.append(partition)
            continue
        files = files or {file.path: file for file in plan.files}
        waiting.extend(reversed(parts_of(partition, receipt, files)))
    if strangers := sorted(name for name in have if name not in known):
        raise StateCorrupt(
            "there is a receipt of a partition that the plan does not have",
            found=", ".join(strangers[:5]),
            expected=f"{len(plan.partitions):,} partitions, or halves of those that were split",
            next_step="remove these receipts and resume",
        )
    return tuple(partitions)


def done_partitions(plan: Plan, receipts: Iterable[Receipt]) -> set[str]:
    """Return the ids of the effective partitions that are done."""
    receipts = tuple(receipts)
    done = {receipt.partition for receipt in receipts if not receipt.splits}
    return done & {partition.id for partition in effective_partitions(plan, receipts)}
