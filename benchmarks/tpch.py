"""Join, group and score TPC-H tables in one job, and compare every row with DuckDB and xgboost.

    python -m benchmarks.tpch [--scale 1] [--workers 2] [--kill]

lineitem is joined with orders and customer and grouped by customer, kept as a stage, and scored with two models. The
data comes from ``tpchgen-cli`` (PyPI), DuckDB gives the right answer: ``pip install tpchgen-cli duckdb``. With
``--kill`` the driver and its workers get SIGKILL when a third of the partitions of the stage are kept; the job is then
resumed, and what was kept is counted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import xgboost

import pipeline.runner
from pipeline.jobs.listing import find_job
from pipeline.report.verify import verify
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.processes import start_command, wait_until

FEATURES = ["lines", "quantity", "revenue", "returned", "c_nationkey"]
PARTS = 4
ANSWER = """
select o_custkey as c_custkey, count(*) as lines, sum(l_quantity)::bigint as quantity,
       sum((l_extendedprice * 100)::bigint * (100 - (l_discount * 100)::bigint))::bigint as revenue,
       sum(case when l_returnflag = 'R' then 1 else 0 end)::bigint as returned, c_nationkey, c_mktsegment
from '{data}/lineitem/*.parquet' join '{data}/orders/*.parquet' on l_orderkey = o_orderkey
     join '{data}/customer/*.parquet' on o_custkey = c_custkey
group by all order by c_custkey
"""


def make_data(scale: str) -> Path:
    """Write the three tables once; return their folder."""
    folder = Path(__file__).parent / "data" / f"tpch-{scale}"
    if not (folder / "customer").exists():
        generator = shutil.which("tpchgen-cli", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if generator is None:
            sys.exit("tpchgen-cli is not installed: pip install tpchgen-cli")
        words = ["parquet", "-s", scale, "-T", "lineitem,orders,customer", "--parts", str(PARTS), "-o", str(folder)]
        if os.spawnv(os.P_WAIT, generator, [generator, *words]):
            sys.exit("tpchgen-cli failed")
    return folder


def answer(data: Path) -> pd.DataFrame:
    """Return the joined and grouped rows by DuckDB, sorted by customer."""
    import duckdb

    rows: pd.DataFrame = duckdb.sql(ANSWER.format(data=data)).df()
    return rows


def train(folder: Path, rows: pd.DataFrame) -> list[Path]:
    """Train two models on made-up targets; return their files."""
    random, paths = np.random.default_rng(1), []
    for name, target in (("value", rows["revenue"] / 1e9), ("returns", rows["returned"] / rows["lines"])):
        noisy = target + random.normal(0, 0.01, len(rows))
        booster = xgboost.train({"max_depth": 6}, xgboost.DMatrix(rows[FEATURES], noisy), num_boost_round=60)
        paths.append(folder / f"{name}.ubj")
        booster.save_model(paths[-1])
    return paths


def expected(rows: pd.DataFrame, models: list[Path]) -> pd.DataFrame:
    """Return the rows with the scores of xgboost's own predict."""
    for path in models:
        booster = xgboost.Booster(model_file=path)
        rows = rows.assign(**{path.stem: booster.predict(xgboost.DMatrix(rows[FEATURES]))})
    return rows


def make_spec(data: Path, out: Path, models: list[Path]) -> JobSpec:
    """Return the job."""
    columns = ["l_orderkey", "l_quantity", "l_extendedprice", "l_discount", "l_returnflag"]
    inputs = {
        "orders": {"path": str(data / "orders"), "columns": ["o_orderkey", "o_custkey"]},
        "customer": {"path": str(data / "customer"), "columns": ["c_custkey", "c_nationkey", "c_mktsegment"]},
    }
    return JobSpec.build(
        name="tpch",
        source={"path": str(data / "lineitem"), "columns": columns},
        steps=[
            {"dask": "benchmarks.tpch_steps:customers", "inputs": inputs, "partition_bytes": "64 MiB"},
            *({"score": {"model": str(path), "features": FEATURES, "output": path.stem}} for path in models),
        ],
        sink={"path": str(out), "mode": "overwrite"},
    )


def run_killed(home: Path, spec: JobSpec, options: list[str]) -> None:
    """Run the job until some partitions of the stage are kept, and kill driver and workers."""
    (home / "job.yaml").write_text(spec.to_yaml())
    driver = start_command(home, "run", "job.yaml", *options, import_paths=[str(Path(__file__).parents[1])])

    def kept() -> list[Path]:
        return list(home.glob("jobs/*/steps/*/rounds/0/receipts/*.json"))

    wait_until(lambda: len(kept()) >= 2 or driver.poll() is not None, seconds=600)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    print(f"driver and workers killed with {len(kept())} partitions of the stage kept")


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="1")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory-limit", default="3 GiB")
    parser.add_argument("--kill", action="store_true")
    options: Any = parser.parse_args()
    data = make_data(options.scale)
    started = time.perf_counter()
    rows = answer(data)
    print(f"DuckDB: {len(rows):,} customers in {time.perf_counter() - started:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        models = train(home, rows)
        spec = make_spec(data, home / "out", models)
        paths = [str(Path(__file__).parents[1])]
        settings = Settings.load(
            directory=str(home / "jobs"),
            workers=options.workers,
            threads=1,
            memory_limit=options.memory_limit,
            import_paths=paths,
            lease_seconds=3,
        )
        started = time.perf_counter()
        if options.kill:
            flags = ["--workers", str(options.workers), "--threads", "1", "--directory", settings.directory]
            run_killed(home, spec, [*flags, "--memory-limit", options.memory_limit])
            job = find_job(settings.directory, "@last")
            report = pipeline.runner.resume(job.id, settings=settings)
        else:
            report = pipeline.runner.run(spec, settings=settings)
        print(report)
        print(f"{time.perf_counter() - started:.1f} s")
        found = pq.read_table(home / "out").to_pandas().sort_values("c_custkey").reset_index(drop=True)
        right = expected(rows, models)
        pd.testing.assert_frame_equal(found[list(right.columns)], right, check_dtype=False, check_exact=True)
        print(f"equal to DuckDB and xgboost in every bit: {len(found):,} rows, {len(right.columns)} columns")
        print(verify(find_job(settings.directory, report.job)))


if __name__ == "__main__":
    main()
