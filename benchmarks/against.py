"""Compare this project with the tools a user would pick instead: same input, same model, outputs checked equal.

    python -m benchmarks.against --sets even,skewed,tiny --repeat 3
    python -m benchmarks.against --first --sets even    # each run as the first job on a machine (Linux, as root)
    python -m benchmarks.against --list                 # the contenders and their environments
    python -m benchmarks.against --show                 # the runs stored in benchmarks/against.json, as a table
    python -m benchmarks.plot                           # plots of the stored runs

The contenders run in turns, each in a separate process and environment (``benchmarks/data/environments/``, made by uv
if missing). The measurements are taken from the outside and include the start-up: wall time, CPU time of the process
tree, the largest sum of its memory (shared memory counts once), and the time until the first output file is complete.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.data import HOME, make_data, make_model
from benchmarks.tree import ProcessTree

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = HOME / "environments"
XGBOOST = "xgboost-cpu==3.2.0"
STORED = Path(__file__).with_name("against.json")
GAVE_UP = 900.0
"""Seconds after which a contender is killed."""


@dataclass(frozen=True)
class Contender:
    module: str
    packages: tuple[str, ...] = ()
    """Packages of the contender's own environment; none: this environment."""
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def python(self) -> str:
        return str(ENVIRONMENTS / self.module / "bin" / "python") if self.packages else sys.executable


CONTENDERS = {
    "floor": Contender("floor"),
    "ours": Contender("peers.this_project"),
    "ours (xgboost)": Contender("peers.this_project", variables={"BENCHMARK_ENGINE": "xgboost"}),
    "Polars": Contender("peers.polars_batches", ("polars", "numpy", "pyarrow", XGBOOST)),
    "DuckDB": Contender("peers.duckdb_arrow", ("duckdb", "numpy", "pyarrow", XGBOOST)),
    "Dask threads": Contender("peers.dask_frame", variables={"DASK_PLACE": "threads", "OMP_NUM_THREADS": "1"}),
    "Dask processes": Contender("peers.dask_frame", variables={"DASK_PLACE": "processes"}),
    "xgboost.dask": Contender("peers.xgboost_dask"),
    "Daft": Contender("peers.daft_udf", ("daft", "numpy", "pyarrow", XGBOOST)),
    "Ray Data": Contender("peers.ray_data", ("ray[data]", "pandas", "pyarrow", XGBOOST)),
    "Spark": Contender("peers.spark_pandas", ("pyspark", "pandas", "pyarrow", XGBOOST)),
}


@dataclass(frozen=True)
class Run:
    wall: float
    cpu: float
    peak: int
    first: float
    """Seconds until the first file of the output is complete."""


def prepare(contender: Contender) -> None:
    if contender.packages and not Path(contender.python).exists():
        home = ENVIRONMENTS / contender.module
        subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, str(home)], check=True)
        command = ["uv", "pip", "install", "--quiet", "--python", contender.python, *contender.packages]
        subprocess.run(command, check=True)


def first_job(scratch: Path) -> dict[str, str]:
    """Make the next run the first job of its machine: no file is in memory, and home and caches are empty.

    Return the variables for that run. Bytecode stays, as an installation by pip compiles it.
    """
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
    home = scratch / "home"
    home.mkdir()
    places = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")
    return dict.fromkeys(places, str(home))


def run_once(contender: Contender, data: Path, model: Path, out: Path, variables: dict[str, str]) -> Run:
    command = [contender.python, "-m", f"benchmarks.{contender.module}", str(data), str(model), str(out)]
    environment = {**os.environ, **contender.variables, **variables, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile() as log:
        begin = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        tree, first = ProcessTree(root=process.pid), 0.0
        while process.poll() is None and time.perf_counter() - begin < GAVE_UP:
            first = first or (time.perf_counter() - begin if _has_output(out) else 0.0)
            time.sleep(0.02)
        wall = time.perf_counter() - begin
        process.kill()
        tree.close()
        if process.wait() != 0:
            log.seek(0)
            raise RuntimeError(log.read().decode(errors="replace")[-1500:])
    return Run(wall, tree.sample(), tree.peak, first or wall)


def _has_output(out: Path) -> bool:
    """Return True if a Parquet file has its footer, including unpublished files in the folders beside the output."""
    for folder in (out, *out.parent.glob("tmp*")):
        for path in folder.glob("**/*.parquet") if folder.exists() else ():
            if path.name != "plan.parquet" and _ends(path):
                return True
    return False


def _ends(path: Path) -> bool:
    """Return True if the file ends like a Parquet file. Only its end is read, since the contender is running."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4))
        return size > 8 and file.read() == b"PAR1"


def digest(out: Path, names: list[str]) -> tuple[int, int]:
    """Return the number of rows, and the sum of a bitwise hash of their features and prediction, in any order."""
    rows, total = 0, 0
    for batch in _batches(out, [*names, "prediction"]):
        mixed = np.zeros(batch.num_rows, np.uint64)
        for name in (*names, "prediction"):
            column = pc.fill_null(batch.column(name).cast(pa.float32()), float("nan")).to_numpy(zero_copy_only=False)
            bits = np.where(np.isnan(column), np.uint32(0x7FC00000), column.view(np.uint32)).astype(np.uint64)
            mixed = (mixed ^ bits) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        rows += batch.num_rows
        total = (total + int(mixed.sum(dtype=np.uint64))) % (1 << 64)
    return rows, total


def _batches(out: Path, names: list[str]) -> Iterator[pa.RecordBatch]:
    folder = out / "published" if (out / "published").exists() else out
    for path in sorted(folder.glob("**/*.parquet")):
        yield from pq.ParquetFile(path).iter_batches(100_000, columns=names)


def measure(kind: str, rows: int, options: argparse.Namespace) -> dict[str, list[Run]]:
    trees, depth = (int(part) for part in options.model.split("x"))
    data, model = make_data(kind, rows), make_model(trees, depth, kind=kind)
    names = [f"f{number:02d}" for number in range(0, 2000 if kind == "wide" else 28)][:28]
    runs: dict[str, list[Run]] = {}
    wanted: tuple[int, int] | None = None
    for number in range(options.repeat):
        for name in options.contenders.split(","):
            if number and name in options.once.split(","):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "out"
                variables = first_job(Path(scratch)) if options.first else {}
                try:
                    run = run_once(CONTENDERS[name], data, model, out, variables)
                except RuntimeError as error:
                    print(f"  {kind} {name} failed: {error}", file=sys.stderr, flush=True)
                    continue
                found = digest(out, names)
            wanted = wanted or found
            if found != wanted:
                sys.exit(f"{name} gave another output on {kind}: {found} instead of {wanted}")
            runs.setdefault(name, []).append(run)
            print(f"  {kind} {name}: {json.dumps(asdict(run))}", file=sys.stderr, flush=True)
    return runs


def store(name: str, runs: dict[str, list[Run]], chosen: dict[str, Contender]) -> None:
    """Replace the earlier runs of a set in ``against.json``."""
    known: dict[str, Any] = json.loads(STORED.read_text()) if STORED.exists() else {"sets": {}, "versions": {}}
    known["sets"][name] = {contender: [asdict(run) for run in some] for contender, some in runs.items()}
    known["versions"] |= {name: versions(one) for name, one in chosen.items()}
    STORED.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def read_stored() -> dict[str, dict[str, list[Run]]]:
    """Return the runs in ``against.json``, by set and contender."""
    sets = json.loads(STORED.read_text())["sets"]
    return {kind: {name: [Run(**one) for one in some] for name, some in runs.items()} for kind, runs in sets.items()}


def show(results: dict[str, dict[str, list[Run]]]) -> None:
    print("| set | contender | wall / ours | CPU / ours | memory / ours | first file / ours | runs |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for kind, runs in results.items():
        for name, some in runs.items():
            keys = ("wall", "cpu", "peak", "first")
            each = [median(getattr(run, key) for run in some) for key in keys]
            ours = [median(getattr(run, key) for run in runs["ours"]) for key in keys]
            cells = " | ".join(f"{one / other:.2f}" for one, other in zip(each, ours, strict=True))
            print(f"| {kind} | {name} | {cells} | {len(some)} |")


def versions(contender: Contender) -> str:
    code = (
        "import importlib.metadata as m; print(', '.join(f'{n} {m.version(n)}' for n in "
        "('polars','duckdb','daft','ray','pyspark','dask','xgboost-cpu','pyarrow') "
        "if any(d.name == n for d in m.distributions())))"
    )
    return subprocess.run([contender.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--tiny-rows", type=int, default=1_000_000)
    parser.add_argument("--wide-rows", type=int, default=100_000)
    parser.add_argument("--model", default="300x6", help="trees x depth")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--sets", default="even,skewed,tiny", help="of even, skewed, tiny, mixed, wide")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--once", default="Ray Data,Spark", help="contenders that run in the first round only")
    parser.add_argument("--first", action="store_true", help="empty home and caches, no file in memory, for each run")
    parser.add_argument("--show", action="store_true", help="what was stored, as a table")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.show:
        show(read_stored())
        return
    chosen = {name: CONTENDERS[name] for name in options.contenders.split(",")}
    if options.list:
        for name, one in chosen.items():
            print(f"{name}: benchmarks.{one.module}; {', '.join(one.packages) or 'this environment'}")
        return
    if shutil.which("uv") is None and any(not Path(one.python).exists() for one in chosen.values()):
        sys.exit("uv is needed to make the environments of the peers: pip install uv")
    for one in chosen.values():
        prepare(one)
    sizes = {"tiny": options.tiny_rows, "wide": options.wide_rows}
    results = {}
    for kind in options.sets.split(","):
        rows = sizes.get(kind, options.rows)
        results[kind] = measure(kind, rows, options)
        store(f"{kind}, {rows / 1e6:g} M rows{', first job' if options.first else ''}", results[kind], chosen)
    show(results)
    for name, one in chosen.items():
        print(f"- {name}: {versions(one)}")


if __name__ == "__main__":
    main()
