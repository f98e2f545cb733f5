"""Make a table, a model and a job spec to try everything with, offline from a seed: ``python -m pipeline demo``."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.demo import features as demo_features
from pipeline.demo.features import NOW
from pipeline.errors import EnvMismatch, OutputExists, RefusedForSafety
from pipeline.report.report import Report
from pipeline.storage.urls import as_storage_error

SEED = 20240229
COUNTRIES = {"DE": 0.52, "FR": 0.14, "IT": 0.11, "NL": 0.08, "PL": 0.07, "SE": 0.05, "AT": 0.03}
"""Share of the rows per country; one file has half of the rows."""
PLANS = ("basic", "standard", "premium")
FEATURES = ["age", "tenure_months", "monthly_charges", "support_calls", "days_since_login", "charge_per_month", "plan"]
BAD_ROWS = 48
TRAINING_ROWS = 20_000
_MARK = "# Made by: python -m pipeline demo"

JOB_YAML = f"""\
{_MARK}
name: churn-demo

# One folder a country; country is a column of every row. The file of DE is larger than all the others together.
source: {{path: lake/customers/}}

steps:
  # A function in features.py beside this file: pandas DataFrame -> pandas DataFrame.
  - map: features:build
  - score:
      model: churn.ubj
      output: churn
      keep: [customer_id, country, plan, monthly_charges, last_login]

# A second run replaces the output of the first in one step.
sink: {{path: scored/, mode: overwrite}}

# Up to 1 % of the rows may be rejected. With the default, 0, one bad row fails the job.
errors: {{max_fraction: 0.01}}

# What must hold beside what the model asks for; python -m pipeline rejects shows the rows that break it.
contract:
  age: {{min: 18, max: 110, nullable: false}}
  monthly_charges: {{min: 0}}

cluster: local
"""

README = f"""\
{_MARK}

    lake/customers/   the table: {len(COUNTRIES)} files, one of them with half the rows, {BAD_ROWS} malformed rows
    churn.ubj         an xgboost model
    features.py       the map step
    job.yaml          the job spec
    scored/           the output, after the job ran
    .pipeline/jobs/   a directory for every job: plan, receipts, rejects, report

Try, in this folder:

    python -m pipeline plan job.yaml
    python -m pipeline run job.yaml
    python -m pipeline rejects @last
    python -m pipeline verify @last
"""


@dataclass(frozen=True)
class Demo:
    """A folder with a table, a model and a job spec."""

    folder: Path
    rows: int
    is_new: bool
    """False if the table and the model existed already."""

    def story(self) -> str:
        """Describe the created files."""
        made = "Made" if self.is_new else "Found"
        return (
            f"{made} a table of {self.rows:,} customers in {len(COUNTRIES)} files, an xgboost model and job.yaml in "
            f"{self.folder}/\nRunning: python -m pipeline run job.yaml"
        )

    def ending(self, report: Report) -> str:
        """Return the summary of the job, with next commands for the folder where the demo was started."""
        commands = (
            f"cd {self.folder}",
            "python -m pipeline rejects @last    # the malformed rows: file, row number, reason",
            "python -m pipeline verify @last     # proof that every row was scored once",
        )
        return replace(report, next=commands).text()


def make_demo(folder: Path, *, rows: int, seed: int = SEED) -> Demo:
    """Create the demo in ``folder``, or reuse an existing one; the same seed gives the same files.

    :raises OutputExists: when the folder holds something else.
    :raises StorageError: when the folder cannot be created or written.
    :raises EnvMismatch: when xgboost is not installed.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise RefusedForSafety("the demo needs a folder of its own", where=str(folder), found="a link or a file")
    table = folder / "lake" / "customers"
    if folder.is_dir() and any(folder.iterdir()):
        return _found(folder, table)
    unfinished = folder.absolute().with_name(f".{folder.absolute().name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _make(folder, unfinished=unfinished, rows=rows, seed=seed)
    except OSError as error:
        # Also for a folder that cannot exist, such as one below /proc.
        raise as_storage_error(error, where=str(folder)) from error
    return Demo(folder, rows, is_new=True)


def _make(folder: Path, *, unfinished: Path, rows: int, seed: int) -> None:
    # A folder that cannot be created is noticed before minutes of work.
    unfinished.mkdir(parents=True)
    customers = make_customers(rows, seed=seed)
    train_model(customers, path=unfinished / "churn.ubj", seed=seed)
    write_table(spoil(customers, seed=seed), unfinished / "lake" / "customers")
    shutil.copyfile(demo_features.__file__, unfinished / "features.py")
    for name, text in (("README.md", README), ("job.yaml", JOB_YAML)):
        (unfinished / name).write_text(text, encoding="utf-8")
    # job.yaml comes last: a folder that has it is complete. An empty folder is filled, not replaced: a shell may be in
    # the folder.
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("lake", "churn.ubj", "features.py", "README.md", "job.yaml"):
        (unfinished / name).replace(folder / name)
    unfinished.rmdir()


def _found(folder: Path, table: Path) -> Demo:
    spec = folder / "job.yaml"
    if not spec.is_file() or not spec.read_text(encoding="utf-8", errors="replace").startswith(_MARK):
        raise OutputExists(
            "the folder is neither empty nor a demo",
            where=str(folder),
            next_step="choose another folder: python -m pipeline demo DIR",
        )
    rows = sum(pq.read_metadata(path).num_rows for path in sorted(table.glob("*/*.parquet")))
    return Demo(folder, rows, is_new=False)


def make_customers(rows: int, *, seed: int) -> pd.DataFrame:
    """Return a well-formed table of customers in random order, with ``country`` and the label ``churned``."""
    rng = np.random.default_rng(seed)
    tenure = rng.gamma(2.0, 18.0, rows).astype("int32")
    calls = rng.poisson(1.2, rows).astype("int16")
    plan = rng.choice(PLANS, rows, p=[0.5, 0.35, 0.15])
    charges = np.round(rng.normal(30, 8, rows).clip(5) * np.where(plan == "premium", 2.2, 1.0), 2)
    days = rng.exponential(21, rows)
    frame = pd.DataFrame(
        {
            "customer_id": np.arange(1, rows + 1, dtype="int64"),
            "name": [f"Customer {number:07d}" for number in range(1, rows + 1)],
            "age": rng.normal(46, 15, rows).clip(18, 98).astype("int32"),
            "tenure_months": tenure,
            "plan": plan,
            "monthly_charges": np.where(rng.random(rows) < 0.02, np.nan, charges),
            "support_calls": calls,
            "last_login": NOW - pd.to_timedelta((days * 86400).astype("int64"), unit="s"),
            "country": rng.choice(list(COUNTRIES), rows, p=list(COUNTRIES.values())),
        }
    )
    pull = -1.2 - 0.03 * tenure + 0.45 * calls + 0.02 * days + 0.5 * (plan == "basic") + 0.01 * (charges - 30)
    frame["churned"] = rng.random(rows) < 1 / (1 + np.exp(-pull))
    return frame


def spoil(customers: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Return ``customers`` with `BAD_ROWS` malformed rows: infinite, out of range, or of an unknown plan."""
    spoiled = customers.copy()
    bad = np.random.default_rng(seed + 1).choice(len(spoiled), BAD_ROWS, replace=False)
    infinite, young, unknown = np.array_split(bad, 3)
    spoiled.loc[infinite, "monthly_charges"] = np.inf
    spoiled.loc[young, "age"] = np.where(np.arange(len(young)) % 2 == 0, -1, 999).astype("int32")
    spoiled.loc[unknown, "plan"] = "gold"
    return spoiled


def write_table(customers: pd.DataFrame, folder: Path) -> None:
    """Write one Parquet file per country, ``country=DE/part-0.parquet``, without the label."""
    for country, part in customers.groupby("country", sort=True):
        path = folder / f"country={country}" / "part-0.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pandas(part.drop(columns=["country", "churned"]), preserve_index=False)
        pq.write_table(table, path, row_group_size=25_000)


def train_model(customers: pd.DataFrame, *, path: Path, seed: int) -> None:
    """Train a small binary classifier on the first `TRAINING_ROWS` customers.

    :raises EnvMismatch: when xgboost is not installed.
    """
    try:
        from pipeline.models.flavors.xgboost_train import train
    except ImportError as error:
        raise EnvMismatch(
            "the demo needs xgboost, and it is not installed",
            found=str(error),
            next_step='pip install "dask-batch-pipeline[xgboost-cpu]"',
        ) from error
    sample = customers.head(TRAINING_ROWS)
    frame = demo_features.build(sample)[FEATURES].assign(plan=pd.Categorical(sample["plan"], categories=PLANS))
    params = {"objective": "binary:logistic", "max_depth": 4, "eta": 0.2, "tree_method": "hist", "seed": seed}
    train(frame, sample["churned"].to_numpy(), path=path, params=params, rounds=60)
