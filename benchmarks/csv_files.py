"""Compare planning and reading a CSV file with pyarrow.csv alone, in one process: ``python -m benchmarks.csv_files``.

The file has quoted newlines, commas and quotes, so that no reader may cut it at any newline. Both read with one thread;
CPU seconds are compared, of the run with the least. The peak of memory is that of planning and reading.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.csv as pcsv

from pipeline.sources import Discovery, discover, read_batches, selected_fragments
from pipeline.spec.parts import Source

TEXTS = ("plain text", "two\nlines", 'a ""quoted"" word', "commas, here", "")
BLOCK_ROWS = 200_000


def write(path: Path, size: int) -> None:
    """Write a file of at least ``size`` bytes, unless it exists."""
    if path.exists() and path.stat().st_size >= size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    values, kinds = rng.normal(size=(BLOCK_ROWS, 6)), rng.integers(0, len(TEXTS), BLOCK_ROWS)
    rows = [
        f'{number},"{TEXTS[kind]}",' + ",".join(f"{value:.6f}" for value in row)
        for number, (kind, row) in enumerate(zip(kinds.tolist(), values.tolist(), strict=True))
    ]
    block = "\n".join(rows) + "\n"
    with path.open("w") as file:
        file.write("id,text,a,b,c,d,e,f\n")
        while file.tell() < size:
            file.write(block)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of this process during ``work``."""
    start = time.process_time()
    work()
    return time.process_time() - start


def read_with_pyarrow(path: Path) -> int:
    """Read the file with pyarrow.csv in blocks. Return the number of rows."""
    reader = pcsv.open_csv(
        path,
        read_options=pcsv.ReadOptions(use_threads=False, block_size=4 << 20),
        parse_options=pcsv.ParseOptions(newlines_in_values=True),
    )
    return sum(batch.num_rows for batch in reader)


def read_planned(found: Discovery) -> int:
    """Read all row groups of the planned file. Return the number of rows."""
    fragments = tuple(part for file in found.files for part in selected_fragments(file))
    batches = read_batches(
        fragments,
        columns=found.physical,
        schema=found.schema,
        batch_rows=65_536,
        batch_bytes=64 << 20,
        versions=found.versions,
        format=found.format,
    )
    return sum(batch.table.num_rows for batch in batches)


def main() -> None:
    """Print the CPU seconds of each and their ratios."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mib", type=int, default=2048, help="size of the file")
    options.add_argument("--repeat", type=int, default=3)
    given = options.parse_args()
    path = Path(__file__).parent / "data" / f"quoted-{given.mib}.csv"
    write(path, given.mib << 20)
    source = Source(path=path, format="csv")
    found = discover(source)
    rows = read_planned(found)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    plans, reads, theirs = [], [], []
    for _ in range(given.repeat):
        theirs.append(cpu_seconds(lambda: read_with_pyarrow(path)))
        plans.append(cpu_seconds(lambda: discover(source)))
        reads.append(cpu_seconds(lambda: read_planned(found)))
    if read_with_pyarrow(path) != rows:
        raise SystemExit("pyarrow.csv reads another number of rows")
    plan, read, pyarrow = min(plans), min(reads), min(theirs)
    print(f"{os.path.getsize(path) >> 20:,} MiB, {rows:,} rows; peak memory {peak:,} MiB")
    print(f"pyarrow.csv {pyarrow:.2f} s, plan {plan:.2f} s, read {read:.2f} s of CPU")
    print(f"speed against pyarrow.csv: read {pyarrow / read:.2f}, plan and read {pyarrow / (plan + read):.2f}")


if __name__ == "__main__":
    main()
