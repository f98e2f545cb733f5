"""Run a small sample of a job repeatedly while its processes are killed, stopped and resumed.

Per seed: the output published before must stay until the new output is complete. In the end, each row and each reject
of a run without faults must be there once, and `verify` must hold. Only processes started here are harmed.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import errors as error_kinds
from pipeline.errors import InfrastructureError, PipelineError, StateCorrupt
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.report.verify import verify
from pipeline.sources.types import empty_table
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.processes import ProcessCluster
from pipeline.testing.row_check import Reader, RowDifference, check_rows, read_folder
from pipeline.testing.sample import sample_job
from pipeline.testing.strikes import draw_script
from pipeline.testing.trial import DRIVER_TIMEOUT, FINISHED, Struck, Trial, TrialAttempt, run_plainly, settle

ROWS = 40_000
"""Rows of the sample; with two workers, eight partitions."""
LEASE_SECONDS = 3.0
SCHEDULER_SECONDS = 8.0
_ENVIRONMENT = {
    # Processes are killed here, not the machine.
    "DASK_PIPELINE__FSYNC": "False",
    "DASK_PIPELINE__LEASE_SECONDS": str(LEASE_SECONDS),
    "DASK_PIPELINE__SCHEDULER_TIMEOUT": str(SCHEDULER_SECONDS),
    "DASK_PIPELINE__NO_WORKERS_TIMEOUT": "180",
    "DASK_PIPELINE__DRAIN_TIMEOUT": "5",
}
_CONFIG = {"distributed.scheduler.worker-ttl": "10s"}
"""Seconds of silence after which the scheduler counts a worker as dead.

Some freezes last longer; a worker on a busy machine stays below.
"""
_ROUNDING = 1e-5
"""Relative tolerance, for models whose last bits depend on the batch boundaries."""


@dataclass(frozen=True)
class TrialResult:
    """The result of one seed."""

    seed: int
    ok: bool
    detail: str
    """Description of the problems; empty if there are none."""
    exit_code: int
    """Exit code of the command line; 0 if nothing is wrong."""
    faults: tuple[Struck, ...]
    attempts: tuple[TrialAttempt, ...]
    rows: RowDifference
    rejects: RowDifference
    reads: int
    """Times the output was read while the job ran."""
    lifetime: float | None = None
    """Seconds the workers had to live."""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON output shows it."""
        return {
            "seed": self.seed,
            "ok": self.ok,
            "detail": self.detail,
            "faults": [one.to_dict() for one in self.faults],
            "worker_lifetime": self.lifetime,
            "attempts": [one.__dict__ for one in self.attempts],
            "rows": self.rows.to_dict(),
            "rejects": self.rejects.to_dict(),
            "reads": self.reads,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class ChaosReport:
    """The results of all trials."""

    name: str
    rows: int
    """Rows of the sample."""
    partitions: int
    asked: int
    """Number of requested seeds; fewer are tried if the time is over."""
    trials: tuple[TrialResult, ...]
    folder: str
    """Folder of all files of the run; empty if all trials passed, since it is removed then."""
    seconds: float

    @property
    def ok(self) -> bool:
        """True if all trials passed."""
        return all(trial.ok for trial in self.trials)

    @property
    def exit_code(self) -> int:
        """0, or the exit code of the first trial that failed."""
        return next((trial.exit_code for trial in self.trials if not trial.ok), 0)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON output shows it."""
        return {
            "ok": self.ok,
            "name": self.name,
            "rows": self.rows,
            "partitions": self.partitions,
            "asked": self.asked,
            "tried": len(self.trials),
            "lost": sum(trial.rows.lost + trial.rejects.lost for trial in self.trials),
            "duplicated": sum(trial.rows.duplicated + trial.rejects.duplicated for trial in self.trials),
            "trials": [trial.to_dict() for trial in self.trials],
            "folder": self.folder,
            "seconds": self.seconds,
        }


def chaos(
    spec: JobSpec,
    *,
    seeds: int = 5,
    first_seed: int = 0,
    rows: int = ROWS,
    minutes: float | None = None,
    workers: int = 2,
    memory: str = "2 GiB",
    import_paths: Sequence[str] = (),
    on_trial: Callable[[TrialResult], None] = lambda trial: None,
) -> ChaosReport:
    """Run ``spec`` on a sample of its rows, once per seed, while its processes are harmed. For the main thread only.

    :param rows: maximum number of rows of the sample.
    :param minutes: time after which no trial is started.
    :param memory: memory per worker, with its unit.
    :param import_paths: folders in which the modules of steps are found.
    :param on_trial: called with each result as it arrives.
    :raises PipelineError: if the sample fails even without faults.
    """
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="pipeline-chaos-"))
    trials: list[TrialResult] = []
    try:
        with _Arena(folder, workers, memory, tuple(import_paths)) as arena:
            arena.prepare(spec, rows=rows, seed=first_seed)
            for seed in range(first_seed, first_seed + seeds):
                if minutes is not None and time.monotonic() - began > minutes * 60:
                    break
                trials.append(arena.try_seed(seed))
                on_trial(trials[-1])
    except BaseException as error:
        if not getattr(error, "where", "").startswith(str(folder)):
            shutil.rmtree(folder)
        raise
    is_held = all(trial.ok for trial in trials)
    if is_held:
        shutil.rmtree(folder)
    return ChaosReport(
        name=spec.name,
        rows=arena.rows,
        partitions=arena.partitions,
        asked=seeds,
        trials=tuple(trials),
        folder="" if is_held else str(folder),
        seconds=round(time.monotonic() - began, 1),
    )


@dataclass
class _Arena:
    """The sample, its expected output, and a cluster for the next trial."""

    folder: Path
    workers: int
    memory: str
    import_paths: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=lambda: dict(_ENVIRONMENT))

    def __post_init__(self) -> None:
        self._cluster: ProcessCluster | None = None
        self._clusters = 0
        self._lifetime: float | None = None
        self.rows = self.partitions = 0

    def __enter__(self) -> _Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()

    # Preparation

    def prepare(self, spec: JobSpec, *, rows: int, seed: int) -> None:
        """Run the sample without faults, and another sample for the output that exists before each trial."""
        self._sample = sample_job(spec, self.folder / "sample", rows=rows, seed=seed)
        earlier = sample_job(spec, self.folder / "other", rows=max(1, rows // 4), seed=seed + 1)
        self.earlier, cold = self._plainly("earlier", earlier)
        self.expected, clean = self._plainly("clean", self._sample)
        directory = self._directory("clean")
        self.rejected, self.seconds, self.cold_seconds = _rejects(directory), clean.seconds, cold.seconds
        self.rows, self.partitions = directory.plan.rows, len(directory.plan.partitions)
        self.outputs = directory.plan.outputs
        self.tolerance = 0.0 if set(directory.plan.flavors) <= {"xgboost"} else _ROUNDING

    def _plainly(self, name: str, spec: JobSpec) -> tuple[pa.Table, TrialAttempt]:
        place = self._place(name, spec)
        attempt = run_plainly(place, self.cluster(), environment=self.environment, import_paths=self.import_paths)
        if attempt.exit_code not in FINISHED:
            raise self._broken(name, attempt)
        return read_folder(place / "out"), attempt

    def _broken(self, name: str, attempt: TrialAttempt) -> PipelineError:
        kinds = (kind for kind in vars(error_kinds).values() if isinstance(kind, type))
        same = [one for one in kinds if issubclass(one, PipelineError) and one.exit_code == attempt.exit_code]
        return (same[0] if same else PipelineError)(
            "the sample does not run, even without faults",
            where=str(self.folder / name),
            found=f"exit code {attempt.exit_code}: {attempt.message}",
            next_step="fix the job until python -m pipeline run works, then try again",
        )

    def _place(self, name: str, spec: JobSpec) -> Path:
        place = self.folder / name
        place.mkdir()
        record = spec.to_dict()
        record["sink"] = {**record["sink"], "path": str(place / "out")}
        (place / "job.yaml").write_text(JobSpec.model_validate(record).to_yaml())
        return place

    def _directory(self, name: str) -> JobDirectory:
        return JobDirectory.open(next((self.folder / name / "jobs").glob("chaos-*")))

    # Clusters

    def cluster(self) -> ProcessCluster:
        """Return the current cluster, or a new one if its scheduler has exited."""
        if self._cluster is not None and self._cluster.scheduler.poll() is not None:
            self._drop()
        if self._cluster is None:
            options = () if self._lifetime is None else _lifetime_options(self._lifetime)
            self._clusters += 1
            self._cluster = ProcessCluster(
                self.folder / f"cluster-{self._clusters}",
                workers=self.workers,
                memory=self.memory,
                config=_CONFIG,
                options=options,
                import_paths=self.import_paths,
            )
            self._cluster.wait()
        return self._cluster

    def _drop(self) -> None:
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None

    def _set_lifetime(self, seconds: float | None) -> None:
        if seconds != self._lifetime:
            self._lifetime = seconds
            self._drop()

    # One seed

    def try_seed(self, seed: int) -> TrialResult:
        """Run the sample to its end under the script of the seed, and check the output."""
        began = time.monotonic()
        script = draw_script(seed, partitions=self.partitions, seconds=self.seconds, cold_seconds=self.cold_seconds)
        self._set_lifetime(script.lifetime)
        name = f"seed-{seed}"
        place = self._place(name, self._sample)
        shutil.copytree(self.folder / "earlier" / "out", place / "out")
        with Reader(place / "out", {"earlier": self.earlier, "new": self.expected}) as reader:
            trial = Trial(
                place,
                script,
                self.cluster,
                self.environment,
                self.import_paths,
                driver_timeout=max(DRIVER_TIMEOUT, 20 * self.cold_seconds),
                on_end=reader.poll,
            )
            problem = trial.drive()
            settle(self.cluster())
        result = self._judge(name, trial, reader, problem)
        if result.ok:
            shutil.rmtree(place)
        return replace(result, seconds=round(time.monotonic() - began, 1))

    def _judge(self, name: str, trial: Trial, reader: Reader, problem: str) -> TrialResult:
        rows = rejects = RowDifference(0)
        problems = [problem] if problem else []
        code = _code_of(trial) if problem else StateCorrupt.exit_code
        with suppress(PipelineError, OSError):
            directory = self._directory(name)
            if not problem:
                rows = check_rows(
                    self.expected,
                    read_folder(trial.folder / "out"),
                    outputs=self.outputs,
                    tolerance=self.tolerance,
                )
                rejects = check_rows(self.rejected, _rejects(directory))
                problems += _problems(rows, rejects, directory)
            elif not directory.manifests.numbers() and reader.seen != "earlier":
                problems.append("the earlier output is missing, and nothing was committed")
        problems += reader.wrong[:1]
        return TrialResult(
            seed=trial.script.seed,
            ok=not problems,
            detail="; ".join(problems),
            exit_code=code if problems else 0,
            faults=tuple(trial.struck),
            attempts=tuple(trial.attempts),
            rows=rows,
            rejects=rejects,
            reads=reader.reads,
            lifetime=trial.script.lifetime,
        )


def _lifetime_options(seconds: float) -> tuple[str, ...]:
    return ("--lifetime", f"{seconds:.1f}s", "--lifetime-stagger", "2s", "--lifetime-restart")


def _problems(rows: RowDifference, rejects: RowDifference, directory: JobDirectory) -> list[str]:
    """Return the problems of a job that succeeded."""
    found = []
    for what, difference in (("rows", rows), ("rejects", rejects)):
        if not difference.is_none:
            counts = ", ".join(f"{count:,} {name}" for name, count in difference.to_dict().items() if count)
            found.append(f"{what}: {counts}")
    found += [f"verify: {check.name}: {check.detail}" for check in verify(directory, sample=0).checks if not check.ok]
    return found


def _code_of(trial: Trial) -> int:
    code = trial.attempts[-1].exit_code
    return code if code > 0 else InfrastructureError.exit_code


def _rejects(directory: JobDirectory) -> pa.Table:
    """Return the rejected rows and their reasons, without messages: tracebacks name paths that may differ."""
    schema = pa.schema([("_file", pa.string()), ("_row", pa.int64()), ("_reason", pa.string())])
    tables = [empty_table(schema)]
    for receipt in directory.receipts.all():
        if receipt.rejects is not None and not receipt.splits:
            with directory.store.open_input(layout.round_file(0, receipt.rejects.name)) as file:
                tables.append(pq.read_table(file, columns=schema.names).cast(schema))
    return pa.concat_tables(tables)
