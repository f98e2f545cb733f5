"""Which partitions a stage really has, once some were split because they were too large for a worker. Pure.

A split takes the place of the partition's receipt: that one names the halves, and each half has a receipt of its own,
or is split in turn. What the halves are follows from the partition alone, so that every driver cuts at the same row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import accumulate

from pipeline.errors import StateCorrupt
from pipeline.plan import Partition, Plan
from pipeline.receipt import Receipt
from pipeline.rows import Fragment, InputFile, RowCounts

SPLIT_FLOOR_ROWS = 1024
"""A partition of so few rows is not split again."""


def partition_key(partition: str) -> tuple[int, ...]:
    """Sorts ids of partitions in source order, halves of split ones too.

    :raises StateCorrupt: for something that is no such id.
    """
    try:
        return tuple(int(part) for part in partition.split("."))
    except ValueError:
        raise StateCorrupt("that is no id of a partition", found=repr(partition), expected="such as 00042") from None


def sub_fragment(fragment: Fragment, file: InputFile, *, row_start: int, row_stop: int) -> Fragment:
    """The rows ``row_start`` to ``row_stop`` (of the file) of ``fragment``."""
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
    )


def halves(partition: Partition, files: Mapping[str, InputFile]) -> tuple[Partition, Partition] | None:
    """The two partitions that take the place of one, with equally many rows; None when it has one row only.

    :param files: input files of the plan by path.
    """
    if partition.rows < 2:
        return None
    left: list[Fragment] = []
    right: list[Fragment] = []
    wanted = partition.rows // 2
    for fragment in partition.fragments:
        take = min(max(0, wanted), fragment.rows)
        wanted -= take
        cut, file = fragment.row_start + take, files[fragment.path]
        if take:
            left.append(sub_fragment(fragment, file, row_start=fragment.row_start, row_stop=cut))
        if take < fragment.rows:
            right.append(sub_fragment(fragment, file, row_start=cut, row_stop=fragment.row_stop))
    return Partition(f"{partition.id}.0", tuple(left)), Partition(f"{partition.id}.1", tuple(right))


def split_receipt(partition: Partition, pair: tuple[Partition, ...], *, plan: str, model: str, attempt: str) -> Receipt:
    """The receipt that says ``pair`` takes the place of ``partition``. It has no rows and no files.

    :param plan: digest of the plan.
    :param model: digest of the model version.
    :param attempt: unique name of whoever split it.
    """
    return Receipt(
        partition=partition.id,
        plan=plan,
        model=model,
        attempt=attempt,
        data=None,
        rejects=None,
        rows=RowCounts(),
        files=(),
        splits=tuple(half.id for half in pair),
    )


def effective_partitions(plan: Plan, receipts: Iterable[Receipt]) -> tuple[Partition, ...]:
    """The partitions of the stage in source order, the halves in place of those that were split.

    :raises StateCorrupt: for a receipt of no partition.
    """
    by_id = {receipt.partition: receipt for receipt in receipts}
    files: dict[str, InputFile] = {}
    found: list[Partition] = []
    waiting = list(reversed(plan.partitions))
    known: set[str] = set()
    while waiting:
        partition = waiting.pop()
        known.add(partition.id)
        receipt = by_id.get(partition.id)
        if receipt is None or not receipt.splits:
            found.append(partition)
            continue
        files = files or {file.path: file for file in plan.files}
        pair = halves(partition, files)
        if pair is None or tuple(half.id for half in pair) != receipt.splits:
            raise StateCorrupt("a partition was split in a way it cannot be", found=f"{partition.id} {receipt.splits}")
        waiting.extend(reversed(pair))
    if strangers := sorted(set(by_id) - known):
        raise StateCorrupt(
            "there is a receipt of a partition that the plan does not have",
            found=", ".join(strangers[:5]),
            expected=f"{len(plan.partitions):,} partitions, or halves of those that were split",
            next_step="remove these receipts and resume",
        )
    return tuple(found)


def done_partitions(plan: Plan, receipts: Iterable[Receipt]) -> set[str]:
    """Ids of the effective partitions that are done."""
    receipts = tuple(receipts)
    done = {receipt.partition for receipt in receipts if not receipt.splits}
    return done & {partition.id for partition in effective_partitions(plan, receipts)}
