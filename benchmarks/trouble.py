"""Measure the cost of trouble: a slow worker, a frozen one, a partition that needs 10 × a worker's memory. As ratios.

    python -m benchmarks.trouble [--workers 4] [--repeat 3] [--nap 0.15] [--only slow,frozen,memory]

Workers are separate processes. Steps sleep instead of computing, so that other work on the machine counts little. A
slow worker gets SIGSTOP and SIGCONT in turn and runs a tenth of the time. Each run uses the same table and the same
workers, and the contenders take turns. Seconds are measured between the first task and the last receipt.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.events import Callback, PartitionEnded, RoundStarted
from pipeline.execution.task_set import WorkerClass, save_batch_size
from pipeline.models.registry import resolve
from pipeline.runner import run
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.model_ref import ModelRef
from pipeline.storage.store import open_store
from pipeline.testing.oracle import Lake, make_lake, train_model
from pipeline.testing.processes import ProcessCluster

MEMORY = 700 << 20
BATCH_ROWS = 250
HOG = f'Fault("memory", ids=range(11000, 11100), bytes={10 * MEMORY})'


@dataclass
class Measured:
    seconds: float
    report: Any


class Watch(Callback):
    """A callback that measures the seconds of scoring, and starts the trouble after the third partition."""

    def __init__(self, trouble: Callable[[], None]) -> None:
        self.trouble, self.done = trouble, 0
        self.start = self.end = 0.0

    def on_round(self, event: RoundStarted) -> None:
        self.start = self.end = time.perf_counter()

    def on_partition(self, event: PartitionEnded) -> None:
        self.end = time.perf_counter()
        self.done += event.outcome == "done"
        if self.done == 3:
            self.trouble()


@contextmanager
def stopping(pid: int, *, stop: float, go: float) -> Iterator[Callable[[], None]]:
    """Yield a function that starts the trouble: the process stops for ``stop`` seconds, runs for ``go``, and so on."""
    ended, threads = threading.Event(), []

    def run() -> None:
        while not ended.is_set():
            os.kill(pid, signal.SIGSTOP)
            ended.wait(stop)
            os.kill(pid, signal.SIGCONT)
            ended.wait(go)

    def begin() -> None:
        if not threads:
            threads.append(threading.Thread(target=run, daemon=True))
            threads[0].start()

    try:
        yield begin
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        os.kill(pid, signal.SIGCONT)


class Bench:
    def __init__(self, folder: Path, cluster: ProcessCluster, lake: Lake, model: Path) -> None:
        self.folder, self.cluster, self.lake, self.model = folder, cluster, lake, model
        self.count = 0

    def measure(self, *faults: str, trouble: Any = None, **settings: Any) -> Measured:
        attempts = self.folder / f"attempts-{self.count}"
        return self.measure_step(
            "from pipeline.testing.faults import Fault, FaultTable\n"
            f"step = FaultTable({str(attempts)!r}, ({' '.join(f'{fault},' for fault in faults)}))\n",
            trouble=trouble,
            **settings,
        )

    def measure_step(self, code: str, *, trouble: Any = None, **settings: Any) -> Measured:
        """Run once with the step that ``code`` defines."""
        self.count += 1
        folder = self.folder / f"run-{self.count}"
        folder.mkdir()
        (folder / f"faults_{self.count}.py").write_text(code)
        # As if learned by an earlier job: a partition must have several batches, or it cannot be split.
        version = resolve(ModelRef(str(self.model)))
        save_batch_size(open_store(folder / "jobs"), version, WorkerClass(MEMORY, 1), rows=BATCH_ROWS, job="benchmark")
        with trouble or nullcontext(lambda: None) as begin:
            watch = Watch(begin)
            report = run(
                JobSpec.build(
                    name="trouble",
                    source={"path": str(self.lake.path)},
                    steps=[{"map": f"faults_{self.count}:step"}, {"score": {"model": str(self.model)}}],
                    sink={"path": str(folder / "out")},
                    errors={"max_fraction": 0.2},
                ),
                settings=Settings.load(
                    directory=str(folder / "jobs"),
                    cluster=self.cluster.address,
                    import_paths=[str(folder)],
                    fsync=False,
                    **settings,
                ),
                callbacks=[watch],
            )
        out = sum(pq.read_metadata(file).num_rows for file in (folder / "out").glob("*.parquet"))
        assert out + report.rows.rejected == self.lake.rows
        print(f"  {watch.end - watch.start:.1f} s, {report.stragglers}", file=sys.stderr, flush=True)
        return Measured(watch.end - watch.start, report)

    def slow(self) -> Any:
        return stopping(self.cluster.worker_pids()[0], stop=0.45, go=0.05)

    def frozen(self) -> Any:
        return stopping(self.cluster.worker_pids()[0], stop=10**6, go=0.0)


def show(name: str, runs: list[Measured], clean: list[Measured], *, off: list[Measured] | None = None) -> None:
    def middle(some: list[Measured]) -> float:
        return statistics.median(one.seconds for one in some)

    against = f"{middle(runs) / middle(off):.2f}" if off else "–"
    records = [one.report.stragglers for one in runs]
    keys = ("backups", "split_slow", "split_frozen")
    helped = ", ".join(f"{key} {statistics.mean(getattr(record, key) for record in records):.1f}" for key in keys)
    again = statistics.mean(one.report.rows.rejected for one in runs)
    print(
        f"| {name} | {middle(runs) / middle(clean):.2f} | {against} | {helped} | {again:.0f} | {len(runs)} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--nap", type=float, default=0.15, help="seconds a batch takes; 20 batches a partition")
    parser.add_argument("--only", default="slow,frozen,memory")
    options = parser.parse_args()
    wanted, nap = options.only.split(","), f'Fault("nap", ids=range(0), seconds={options.nap})'
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = 5000 * 4 * options.workers
        lake = make_lake(folder / "lake", rows=(rows // 2, rows // 4, rows // 4), row_group=5000)
        model = train_model(folder / "churn.ubj")
        with ProcessCluster(folder / "cluster", workers=options.workers, memory=f"{MEMORY} B") as cluster:
            bench = Bench(folder, cluster, lake, model)
            bench.measure(nap)  # imports
            runs: dict[str, list[Measured]] = {}
            for _ in range(options.repeat):
                runs.setdefault("clean", []).append(bench.measure(nap))
                if "slow" in wanted:
                    runs.setdefault("slow off", []).append(bench.measure(nap, trouble=bench.slow(), stragglers="off"))
                    runs.setdefault("slow on", []).append(bench.measure(nap, trouble=bench.slow()))
                if "frozen" in wanted:
                    runs.setdefault("frozen on", []).append(bench.measure(nap, trouble=bench.frozen()))
                if "memory" in wanted:
                    runs.setdefault("memory", []).append(bench.measure(nap, HOG))
    print("| trouble | makespan / clean | / without help | help | rows rejected | runs |")
    print("| --- | --- | --- | --- | --- | --- |")
    clean = runs["clean"]
    if "slow" in wanted:
        show("one worker 10 × slower, `stragglers: off`", runs["slow off"], clean)
        show("one worker 10 × slower", runs["slow on"], clean, off=runs["slow off"])
    if "frozen" in wanted:
        show("one worker frozen for good", runs["frozen on"], clean)
    if "memory" in wanted:
        show("one partition needs 10 × a worker's memory", runs["memory"], clean)


if __name__ == "__main__":
    main()
