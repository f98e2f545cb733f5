"""The job spec that ``python -m pipeline init`` writes. A test keeps it in step with `pipeline.spec.job_spec`.

Templates that let systemd, cron or Kubernetes run the server.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable

import yaml

JOB_TEMPLATE = """\
# A batch inference job. Lines that begin with "# " and a field name are optional; they show the default or an example.
# Relative paths start from the folder in which the command is run.
#
#   python -m pipeline validate job.yaml    check this file, the steps and the model
#   python -m pipeline plan job.yaml        show what would run; writes nothing
#   python -m pipeline run job.yaml         run it
#   python -m pipeline run job.yaml --set sink.path=out/test/    with another value for any field

# Names the job: lower-case letters, digits, dots, underscores, dashes.
name: my-job

source:
  # Parquet: a file, a directory (hive folders such as country=DE/ become columns), a glob, or a list of these. Any
  # fsspec URL will do.
  path: data/input/
  # Or CSV or JSON Lines, with options and the types of columns:
  # {path: data/*.csv, format: csv, csv: {delimiter: ";"}, types: {age: int64}}
  # Columns to read. Default: all of them.
  # columns: [customer_id, age, plan]
  # Keep only rows for which this holds. Comparisons, and, or, not, in, is None.
  # filter: country == 'DE' and age >= 18
  # Where hive folders begin, when path names single files. Default: then there are none.
  # base: data/
  # Score only what has come since the last success; needs mode: append (see docs/incremental.md).
  # incremental: true

# map, filter, select and score steps, in any number and order.
steps:
  # A function of yours, pandas DataFrame -> pandas DataFrame, row by row in effect: def build(frame): ... in
  # features.py beside this file. It may drop rows. dtype_backend is numpy (pandas' defaults) or pyarrow.
  # Planning checks on a sample that it is row by row, unless row_wise is unchecked.
  # - map: features:build
  #   dtype_backend: numpy
  #   row_wise: checked
  #   # By class of an exception: reject its rows, fail the job, or call the step again after a pause.
  #   on_error: {KeyError: fail, TimeoutError: {retry: 3}}
  #   # For an async def function: calls that wait at a time, and rows of each.
  #   concurrency: 16
  #   rows_per_call: 100
  #   # Reject rows that take too long, for a batch and for a row; the job then scores in child processes.
  #   timeout: 2 min
  #   row_timeout: 5 s
  # Drop rows, and select or rename columns; at the beginning, files are read with it.
  # - filter: total > 0
  # - select: {id: customer_id, age: age}

  - score:
      # A model file (xgboost, LightGBM, scikit-learn, ONNX), or a registered model: models:/churn@champion
      model: model.json
      # Several models for one result: mean, median, max, min, vote for labels, weights, or stack with one more model:
      # - score: {model: [one.json, other.json], combine: stack, meta: meta.json, meta_input: prediction}
      # model: [one.json, other.json]
      # combine: mean
      # Or, in place of model, one for each value of a column; rows with other values: reject, null, or a model.
      # - score: {by: country, models: "models/{}.json", other: reject}
      # Column for each feature of the model, in its order. Default: the model's own feature names.
      # features: [age, plan]
      # Name of the output column. The long form also says which result: prediction, label, probabilities,
      # margin, leaf, contributions.
      output: prediction
      # output: {column: prediction, kind: prediction}
      # Score only rows for which this holds; others get null.
      # where: age >= 18
      # Compare with the output of an earlier score step; the report says how far both agree.
      # shadow: churn
      # Columns passed through to the output. Default: every input column.
      # keep: [customer_id]
      # auto: each worker times the library and the tree engine on its first rows and takes the faster; or
      # library, or trees. Results are compared; they count as equal when margins differ by no more than the tolerance.
      # engine: auto
      # tolerance: 0.0
      # Boosting rounds to score with: [0, 100], or best. Default: all rounds.
      # iteration_range: best
      # Or a class of your own, and the files that it loads:
      # - score: {model: "my_models:Churn", model_files: weights/}
      # Or a service with the interface of OpenAI (see docs/endpoints.md, and init --template endpoint):
      # - score: {endpoint: {url: "http://localhost:8000/v1", model: my-model, messages: "Sum up: {{text}}"}}
      # Demand one format of the file: xgboost, lightgbm, sklearn, onnx or catboost. Default: recognised by its bytes.
      # flavor: xgboost
      # Permit a model file that runs code when it is loaded. Only for files of people you trust.
      # allow_code: false
      # Threads of one call of the library. Default: OMP_NUM_THREADS of the worker, or 1.
      # threads: 1
      # Categories per feature in training order, where the model file has lost them.
      # categories: {plan: [basic, family, premium]}

sink:
  # Directory or URL for the scored rows.
  path: data/output/
  # What to do when there is data already: error, overwrite (in one step), append.
  mode: error
  # format: parquet
  # Or a table of a database; job_column names the job of each row, so that a retry can repair what was appended:
  # {format: postgres, url: env:WAREHOUSE, table: ml.scores, mode: merge, key: [customer_id], job_column: job}
  # Merge small files up to this size. Default: one file per partition.
  # target_file_size: 256 MiB
  # snappy, zstd, lz4, gzip or none.
  # compression: snappy

errors:
  # Rejected rows / input rows up to which the job succeeds, with warnings. At 0 one bad row fails it; rejected rows
  # are kept with file, row number and reason either way.
  max_fraction: 0.0
  # Most rejected rows, as a number.
  # max_rows: 100
  # fail | quarantine: leave out an input file as a whole that is damaged, has other columns than most, or changes.
  # files: quarantine
  # Input files that may be quarantined; with more the job is refused, or fails.
  # max_files: 3
  # Columns of rejected rows that are stored; the others' values are written nowhere.
  # keep_columns: [age]
  # Columns of which a keyed hash is stored, and the key: a reference, at least 16 bytes.
  # hash_columns: [plan]
  # hash_key: env:REJECTS_KEY
  # Time after which `gc` removes the rows of rejects.
  # retain: 30 days

# What must hold for the values of a column, beside what the model's features ask for. A row that breaks it is rejected.
# contract:
#   age: {dtype: int64, nullable: false, finite: true, min: 0, max: 120}
#   plan: {allowed: [basic, standard, premium]}

# Parameters: ${params.day} puts one into any text above; -p day=2026-02-01 gives another value than the one here.
# ${run.date} is the date of submission, UTC (or as run says); ${env:NAME} a variable of the environment.
# params: {day: "2026-01-01"}
# run: {date: "2026-01-01"}

# Publish only what is like the output of the job before: here by the population stability index, and by its rows.
# gate: {psi: 0.2, rows: {min: 0.5, max: 2}}

# End the job, and keep everything, when all its runs together have spent so much: money for services by the prices of
# their endpoints, hours of the machines with workers (see docs/budgets.md).
# budget: {cost: 25, node_hours: 40}

# When the model's alias moves before the job has ended: pin (go on with the version it began with, and say so), fail,
# or restart (score every row again with the new version).
# on_alias_change: pin

# When the code of a step changes before the job has ended: fail, pin (go on with the code it was planned with), or
# restart (score every row again with the new code).
# step_change: fail

# Who is told when the job begins or ends: a program (a list, no shell), or a web server (JSON, signed by the secret).
# when: start, success, warnings, failure, cancelled, interrupted. Default: every end.
# hooks:
#   - {when: [failure], command: [notify-send, it failed]}
#   - {url: https://hooks.example.com/jobs, secret: env:HOOK_SECRET, timeout: 10, attempts: 5}
#   - {openlineage: my-namespace}

# Content of the report: whether to count distributions of scores and features, and to show values of rejected rows.
# report: {distributions: true, show_values: false}

# One job for each value of a partition key or column of the source, or of a list. ${fan_out.value} puts the value into
# any text above. publish: all (once every job is ready to) or each.
# fan_out: {by: country, max_parallel: 4, publish: all, max_children: 1000}

# Where it runs: local (processes of this machine), a name in cluster_configs/, a file, or the address of a scheduler.
cluster: local

# What evaluates the model: auto (the GPU of a worker that has one, with the CPU's bits), cpu, or cuda.
# device: auto

# How storage is reached: options of fsspec file systems by how URLs begin. Secrets only as env:NAME or file:PATH, which
# driver and workers look up themselves. Default: what the client library finds (see docs/storage.md).
# storage:
#   s3://lake: {key: env:LAKE_KEY, secret: env:LAKE_SECRET}

# When a server (python -m pipeline serve) submits it: cron, every, arrival, after (see docs/triggers.md).
# triggers:
#   - {cron: "30 2 * * *", time_zone: Europe/Berlin, missed: once, overlap: queue}
"""


NAME = "pipeline-serve"


def systemd_unit(*, python: str, arguments: tuple[str, ...], folder: str) -> str:
    """A unit for ``~/.config/systemd/user`` or ``/etc/systemd/system``.

    Only the server itself is ended with the unit: its drivers go on, and the next server finds them.
    """
    command = shlex.join([python, "-m", "pipeline", "serve", *arguments])
    return f"""\
# Save as ~/.config/systemd/user/{NAME}.service, then:
#   systemctl --user daemon-reload && systemctl --user enable --now {NAME} && loginctl enable-linger
[Unit]
Description=Runs queued batch inference jobs
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type=exec
WorkingDirectory={folder}
ExecStart={command}
Restart=on-failure
RestartSec=10
# The drivers of jobs are to outlive the server.
KillMode=process
TimeoutStopSec=30

[Install]
WantedBy=default.target
"""


def cron_table(*, python: str, arguments: tuple[str, ...], folder: str) -> str:
    """A line for ``crontab -e`` that runs ``serve --once`` every minute; the drivers it starts survive it."""
    command = shlex.join([python, "-m", "pipeline", "serve", "--once", *arguments])
    # In a crontab a percent sign is a line break.
    line = f"cd {shlex.quote(folder)} && {command}".replace("%", r"\%")
    return f"""\
# Add with: crontab -e
* * * * * {line} >> .pipeline-serve.log 2>&1
"""


def kubernetes_manifests(*, python: str, arguments: tuple[str, ...], folder: str) -> str:
    """A Deployment of one server, and, as an alternative, a CronJob that runs ``serve --once`` every minute.

    In a container a driver lives no longer than its pod: the next pod resumes what was killed, from its
    checkpoints. The pod of the CronJob stays until the jobs that it started have ended.
    """
    serve = [python, "-m", "pipeline", "serve", *arguments]
    head = "# Put in your image and the claim that holds the job directories, and keep one of the two.\n"
    return head + yaml.safe_dump_all([_deployment(serve, folder), _cron_job(serve, folder)], sort_keys=False)


def _deployment(serve: list[str], folder: str) -> dict[str, object]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": NAME},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": {"app": NAME}},
            "template": {
                "metadata": {"labels": {"app": NAME}},
                "spec": {
                    "containers": [_container(serve, folder)],
                    "volumes": _volumes(),
                },
            },
        },
    }


def _cron_job(serve: list[str], folder: str) -> dict[str, object]:
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": f"{NAME}-once"},
        "spec": {
            "schedule": "* * * * *",
            "concurrencyPolicy": "Forbid",
            "jobTemplate": {
                "spec": {
                    "backoffLimit": 0,
                    "template": {
                        "spec": {
                            "restartPolicy": "Never",
                            "containers": [_container([*serve, "--once", "--wait"], folder)],
                            "volumes": _volumes(),
                        }
                    },
                }
            },
        },
    }


def _container(command: list[str], folder: str) -> dict[str, object]:
    return {
        "name": "serve",
        "image": "registry.example/pipeline:latest",
        "command": command,
        "workingDir": folder,
        "volumeMounts": [{"name": "jobs", "mountPath": folder}],
    }


def _volumes() -> list[dict[str, object]]:
    return [{"name": "jobs", "persistentVolumeClaim": {"claimName": "pipeline-jobs"}}]


TEMPLATES: dict[str, Callable[..., str]] = {
    "systemd": systemd_unit,
    "cron": cron_table,
    "kubernetes": kubernetes_manifests,
}
