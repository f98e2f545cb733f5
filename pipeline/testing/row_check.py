"""Whether two tables hold the same rows, each as often; and a reader who looks at an output all the time."""

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

_LOOK_SECONDS = 0.03
_TRIES = 50


@dataclass(frozen=True)
class RowDifference:
    """How rows that were found differ from those that were expected."""

    expected: int
    """Rows that there should be."""
    lost: int = 0
    duplicated: int = 0
    changed: int = 0
    """Rows that are there with another value."""
    foreign: int = 0
    """Rows that are nobody's."""

    @property
    def is_none(self) -> bool:
        """Whether every row is there, once, as it should be."""
        return not (self.lost or self.duplicated or self.changed or self.foreign)

    def details(self) -> dict[str, int]:
        """As JSON output shows it."""
        return asdict(self)


def check_rows(
    expected: pa.Table, found: pa.Table, *, outputs: Sequence[str] = (), tolerance: float = 0.0
) -> RowDifference:
    """Compare two tables row for row, as multisets: the order does not count. NaN equals NaN.

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
    """Every row as a text that only an equal row has."""
    columns = [column.to_pylist() for column in table.columns]
    return [repr(row) for row in zip(*columns, strict=True)] if columns else [""] * table.num_rows


def _agree(expected: pa.Table, found: pa.Table, *, outputs: Sequence[str], tolerance: float) -> bool:
    others = [name for name in expected.schema.names if name not in outputs]
    if expected.num_rows != found.num_rows or row_keys(expected.select(others)) != row_keys(found.select(others)):
        return False
    pairs = ((expected[name].to_numpy(), found[name].to_numpy()) for name in outputs)
    return all(np.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True) for one, other in pairs)


def read_folder(path: Path) -> pa.Table:
    """What somebody who knows nothing of manifests reads: every Parquet file of a folder, in name order."""
    names = sorted(name for name in os.listdir(path) if name.endswith(".parquet"))
    return pa.concat_tables([pq.read_table(path / name) for name in names]).replace_schema_metadata(None)


@dataclass
class Reader:
    """Looks at an output from a thread of its own until it is closed, and notes what no reader may see."""

    path: Path
    allowed: Mapping[str, pa.Table]
    """Word -> content that is allowed; once the second word was seen, the first must not be seen any more."""
    looks: int = 0
    """Times that something new could be read."""
    wrong: list[str] = field(default_factory=list)
    seen: str = ""
    """Word of what was seen last."""

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
        self.look()

    def look(self) -> None:
        """Read everything, once; a look during which the folder is exchanged or changed in place does not count."""
        problem = ""
        for _ in range(_TRIES):
            try:
                before = self._identity()
                if before is None:
                    return
                if before == self._last:
                    self.looks += 1
                    return
                keys = row_keys(read_folder(self.path))
                if before == self._identity():
                    self.looks += 1
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
        """What changes with the content; None while files are changed in place, which ``_SUCCESS`` tells.

        :raises OSError: when the folder is gone, or going.
        """
        entries = tuple(sorted((one.name, one.inode()) for one in os.scandir(self.path)))
        return (self.path.stat().st_ino, entries) if (self.path / SUCCESS).exists() else None

    def _run(self) -> None:
        while not self._end.wait(_LOOK_SECONDS):
            self.look()
