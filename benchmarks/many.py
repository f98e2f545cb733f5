"""Run many workers of one thread in one process, without work for their partitions; see `benchmarks.control`.

    python -m benchmarks.many SCHEDULER-FILE COUNT

The workers are real: each has its own connection to the scheduler of the scheduler file, and its own heartbeat.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import benchmarks.nothing  # noqa: F401  (what they do with a partition)


async def serve(file: str, count: int) -> None:
    from distributed import Worker

    while not Path(file).exists():
        await asyncio.sleep(0.05)
    workers = [Worker(scheduler_file=file, nthreads=1, memory_limit=0, dashboard=False) for _ in range(count)]
    for start in range(0, count, 50):
        await asyncio.gather(*workers[start : start + 50])
    await asyncio.gather(*(worker.finished() for worker in workers))


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
