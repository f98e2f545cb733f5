"""Compare two tables as multisets of rows, and poll an output as a reader."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sinks.parquet.layout import SUCCESS

_POLL_SECONDS = 0.03
_TRIES = 50


@dataclass(frozen=True)
class RowDifference:
    """Difference between the expected rows and the actual rows."""

    expected: int
    """Number of expected rows."""
    lost: int = 0
    duplicated: int = 0
    changed: int = 0
    """Rows with another value than expected."""
    foreign: int = 0
    """Unknown rows that replace no missing row."""

    @property
    def is_none(self) -> bool:
        """True if every expected row is there once, unchanged, and no other row."""
        return not (self.lost or self.duplicated or self.changed or self.foreign)

    def to_dict(self) -> dict[str, int]:
        """Return the difference as JSON output shows it."""
        return asdict(self)


def check_rows(
    expected: pa.Table, found: pa.Table, *, outputs: Sequence[str] = (), tolerance: float = 0.0
) -> RowDifference:
    """Compare two tables as multisets of rows: order does not matter, and NaN equals NaN.

    :param outputs: columns of floats that may differ by ``tolerance`` where all other columns agree, in order.
    """
    if found.schema.names != expected.schema.names or found.schema.types != expected.schema.types:
        return RowDifference(expected.num_rows, lost=expected.num_rows, foreign=found.num_rows)
    if tolerance and _agree(expected, found, outputs=outputs, tolerance=tolerance):
        return RowDifference(expected.num_rows)
    wanted, there = Counter(row_keys(expected)), Counter(row_keys(found))
    missing, extra = wanted - there, there - wanted
    duplicated = sum(count for key, count in extra.items() if key in wanted)
    unknown, gone = extra.total() - duplicated, missing.total()
    return RowDifference(
        expected.num_rows,
        lost=max(0, gone - unknown),
        duplicated=duplicated,
        changed=min(gone, unknown),
        foreign=max(0, unknown - gone),
    )


def row_keys(table: pa.Table) -> list[str]:
    """Return a text per row; two rows have the same text only if they are equal."""
    columns = [column.to_pylist() for column in table.columns]
    return [repr(row) for row in zip(*columns, strict=True)] if columns else [""] * table.num_rows


def _agree(expected: pa.Table, found: pa.Table, *, outputs: Sequence[str], tolerance: float) -> bool:
    others = [name for name in expected.schema.names if name not in outputs]
    if expected.num_rows != found.num_rows or row_keys(expected.select(others)) != row_keys(found.select(others)):
        return False
    pairs = ((expected[name].to_numpy(), found[name].to_numpy()) for name in outputs)
    return all(np.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True) for one, other in pairs)


def read_folder(path: Path) -> pa.Table:
    """Read every Parquet file of a folder in name order, as a reader without knowledge of manifests does."""
    names = sorted(name for name in os.listdir(path) if name.endswith(".parquet"))
    return pa.concat_tables([pq.read_table(path / name) for name in names]).replace_schema_metadata(None)


@dataclass
class Reader:
    """Poll an output from a separate thread until closed, and record what no reader may see."""

    path: Path
    allowed: Mapping[str, pa.Table]
    """Allowed content by word; once the content of the second word was seen, that of the first must not reappear."""
    reads: int = 0
    """Number of reads that gave a consistent state of the output."""
    wrong: list[str] = field(default_factory=list)
    seen: str = ""
    """Word of the content seen last."""

    def __post_init__(self) -> None:
        self._keys = {word: row_keys(table) for word, table in self.allowed.items()}
        self._last: object = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.poll()

    def poll(self) -> None:
        """Read everything once; a read during which the folder is exchanged or changed in place does not count."""
        problem = ""
        for _ in range(_TRIES):
            try:
                before = self._identity()
                if before is None:
                    return
                if before == self._last:
                    self.reads += 1
                    return
                keys = row_keys(read_folder(self.path))
                if before == self._identity():
                    self.reads += 1
                    self._last = before
                    self._judge(keys)
                    return
            except (OSError, pa.ArrowInvalid) as error:
                problem = str(error)
        self.wrong.append(f"the output cannot be read: {problem}")

    def _judge(self, keys: list[str]) -> None:
        word = next((word for word, known in self._keys.items() if known == keys), "")
        words = list(self._keys)
        if not word:
            self.wrong.append(f"{len(keys):,} rows, which are those of no commit")
        elif self.seen and words.index(word) < words.index(self.seen):
            self.wrong.append(f"the {word} output came back")
        self.seen = word or self.seen

    def _identity(self) -> object:
        """Return a value that changes with the content; None while files are changed in place, without ``_SUCCESS``.

        :raises OSError: if the folder is gone, or disappears meanwhile.
        """
        entries = tuple(sorted((one.name, one.inode()) for one in os.scandir(self.path)))
        return (self.path.stat().st_ino, entries) if (self.path / SUCCESS).exists() else None

    def _run(self) -> None:
        while not self._end.wait(_POLL_SECONDS):
            self.poll()
