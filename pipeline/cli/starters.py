"""Folders that ``python -m pipeline init --template NAME`` makes: a job spec that runs as it is, and a script for its
data and its model, to be replaced by one's own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cli import endpoint_starter
from pipeline.errors import EnvMismatch, OutputExists
from pipeline.storage.urls import storage_errors

SCRIPT = "make_data_and_model.py"
_DATA = '''\
"""Makes what job.yaml reads: data/ and the model. Replace both by your own."""

from pathlib import Path

import numpy as np
import pandas as pd

random = np.random.default_rng(7)
table = pd.DataFrame(
    {
        "id": np.arange(20_000),
        "amount": random.gamma(2.0, 30.0, 20_000).round(2),
        "visits": random.integers(0, 30, 20_000),
    }
)
chance = 1 / (1 + np.exp(3 - 0.02 * table["amount"] - 0.1 * table["visits"]))
bought = (random.random(len(table)) < chance).astype(int)
features = table[["amount", "visits"]]

Path("data").mkdir(exist_ok=True)
for part in range(4):
    table[part::4].to_parquet(f"data/part-{part}.parquet", index=False)

'''
_SKLEARN = """\
import skops.io
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

model = make_pipeline(StandardScaler(), LogisticRegression()).fit(features, bought)
skops.io.dump(model, "model.skops")
"""
_LIGHTGBM = """\
import lightgbm

settings = {"objective": "binary", "num_leaves": 15, "seed": 7, "verbose": -1}
model = lightgbm.train(settings, lightgbm.Dataset(features, bought), num_boost_round=50)
model.save_model("model.txt")
"""
_XGBOOST = """\
import xgboost

settings = {"objective": "binary:logistic", "max_depth": 4, "seed": 7}
model = xgboost.train(settings, xgboost.DMatrix(features, bought), num_boost_round=50)
model.save_model("model.ubj")
"""
_ONNX = """\
# A logistic regression as an ONNX file. Yours comes from a converter, such as skl2onnx or torch.onnx.
from base64 import b64decode

MODEL = (
    "CAkSADqPAQoSCgF4CgF3EgJ4dyIGTWF0TXVsCg8KAnh3CgFiEgF6IgNBZGQKDwoBehIBcCIHU2lnbW9pZBIBZyoTCAIIARABQgF3"
    "SggK16M8zczMPSoNCAEQAUIBYkoEAABAwFoXCgF4EhIKEAgBEgwKBhIEcm93cwoCCAJiFwoBcBISChAIARIMCgYSBHJvd3MKAggB"
    "QgQKABAR"
)
Path("model.onnx").write_bytes(b64decode(MODEL))
"""
_JOB = """\
# Runs as it is: python -m pipeline run job.yaml
# Every field is explained in docs/job-spec.md, and in the file that python -m pipeline init writes without --template.
name: {name}

# Parquet: a file, a folder, a glob, or a URL.
source: {{path: data/}}

steps:
  # Derive features with a function of yours, pandas DataFrame -> pandas DataFrame, in features.py beside this file:
  # - map: features:build
  - score:
      model: {model}
      features: [amount, visits]
      output: {output}
      keep: [id]

sink: {{path: scored/, mode: overwrite}}

# Up to 1 % of the rows may be rejected, such as those that break this contract.
errors: {{max_fraction: 0.01}}
contract:
  amount: {{min: 0, nullable: false}}

cluster: {cluster}
"""
_SLURM = """\
# Workers as Slurm jobs (the extra jobqueue). Fill in the partition of your site, then: python -m pipeline run job.yaml
type: slurm
cores: 8               # of one job
memory: 32 GiB         # of one job
processes: 4           # worker processes of one job; each has its share of cores and memory
jobs: 4                # at a time, the most
walltime: 1 hour       # of one job; a run may take longer
# queue: main
# account: project123
"""


@dataclass(frozen=True)
class Starter:
    """A folder to start from."""

    text: str
    """Its purpose, for --help."""
    train: str
    """Code that makes the model, after the data."""
    model: str
    """File of the model."""
    extra: str
    """Extra of this distribution that has the library."""
    output: str = "bought"
    cluster: str = "local"
    more: str = ""
    """Lines at the end of the job spec."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Further files."""
    first: str = "run"
    """Command that works on any machine; a program of the folder must run first where it ends in ``.py``."""
    job: str = _JOB
    data: str = _DATA


STARTERS = {
    "scikit-learn": Starter("a scikit-learn pipeline", _SKLEARN, "model.skops", "sklearn"),
    "lightgbm": Starter("a LightGBM model", _LIGHTGBM, "model.txt", "lightgbm"),
    "onnx": Starter("an ONNX model", _ONNX, "model.onnx", "onnx"),
    "slurm": Starter(
        "workers as Slurm jobs",
        _XGBOOST,
        "model.ubj",
        "xgboost-cpu",
        cluster="slurm",
        files={"cluster_configs/slurm.yaml": _SLURM},
        first="plan",
    ),
    "endpoint": Starter(
        "a language model behind a service",
        "",
        "stand-in",
        "xgboost-cpu",
        output="rating",
        files={"stand_in.py": endpoint_starter.STAND_IN},
        first="stand_in.py",
        job=endpoint_starter.JOB,
        data=endpoint_starter.DATA,
    ),
    "gpu": Starter(
        "the GPUs of this machine",
        _XGBOOST,
        "model.ubj",
        "xgboost-cpu",
        cluster="local-cuda",
        more="\n# With the bits of the CPU. auto: the GPU where there is one.\ndevice: cuda\n",
        first="validate",
    ),
}


def write_starter(folder: Path, name: str) -> list[str]:
    """Write the files of a starter into a folder that exists, and make data and model.

    :returns: the files, the job spec first.
    :raises OutputExists: when one of them exists.
    :raises EnvMismatch: when the library of the model is not installed.
    """
    starter = STARTERS[name]
    job = starter.job.format(name=f"my-{name}", model=starter.model, output=starter.output, cluster=starter.cluster)
    files = {"job.yaml": job + starter.more, SCRIPT: starter.data + starter.train, **starter.files}
    model = [starter.model] if starter.train else []
    for path in (*files, "data", *model):
        if (folder / path).exists():
            raise OutputExists(
                "a file of the template exists already", where=str(folder / path), next_step="choose another folder"
            )
    with storage_errors(str(folder)):
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    # In a process of its own: it is the user's script from now on, and imports a library for training.
    done = subprocess.run([sys.executable, SCRIPT], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvMismatch(
            "the data and the model of the template could not be made",
            where=str(folder / SCRIPT),
            found=(done.stderr.strip().splitlines() or ["no message"])[-1],
            next_step=f'pip install "dask-batch-pipeline[{starter.extra}]", then run the script in its folder',
        )
    return [*files, "data/", *model]
