"""Compare compressions of the output: CPU time and size of one row group, against none, in one process and thread.

python -m benchmarks.compression [--rows 125000] [--repeat 5]
"""

from __future__ import annotations

import argparse
import io
import time
from statistics import median

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.data import table
from pipeline.scoring.checkpoint import dictionary_columns

CODECS: tuple[tuple[str, int | None], ...] = (
    ("none", None),
    ("snappy", None),
    ("lz4", None),
    ("zstd", 1),
    ("zstd", 3),
    ("zstd", 9),
    ("gzip", 6),
)


def measure(rows: pa.Table, codec: str, level: int | None) -> tuple[float, float, int]:
    """Return CPU seconds of writing and of reading back, and the size in bytes."""
    out, begin = io.BytesIO(), time.process_time()
    options = {"compression": codec, "compression_level": level, "write_page_checksum": True}
    pq.write_table(rows, out, use_dictionary=dictionary_columns(rows.schema), **options)
    written, size = time.process_time(), out.tell()
    pq.ParquetFile(pa.BufferReader(out.getvalue()), pre_buffer=False).read(use_threads=False)
    return written - begin, time.process_time() - written, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=125_000)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    print("| rows | compression | size / none | CPU of writing / none | CPU of reading / none |")
    print("| --- | --- | --- | --- | --- |")
    for kind in ("even", "mixed"):
        made = table(options.rows, seed=1, kind=kind)
        runs: dict[tuple[str, int | None], list[tuple[float, float, int]]] = {codec: [] for codec in CODECS}
        for _ in range(options.repeat):
            for codec in CODECS:
                runs[codec].append(measure(made, *codec))
        base = [median(run[part] for run in runs["none", None]) for part in range(3)]
        for (codec, level), some in runs.items():
            write, read, size = (median(run[part] for run in some) / base[part] for part in range(3))
            print(f"| {kind} | {codec}{f' {level}' if level else ''} | {size:.2f} | {write:.2f} | {read:.2f} |")


if __name__ == "__main__":
    main()
