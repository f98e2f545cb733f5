"""Chaos: a small sample of a job runs again and again while its processes are killed, stopped and woken.

Per seed: what was published before must stay until the new output is whole; in the end each row of a run without faults
must be there once, rejects too, and `verify` must hold. Only processes that were started here are harmed.
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
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.processes import ProcessCluster
from pipeline.testing.row_check import Reader, RowDifference, check_rows, read_folder
from pipeline.testing.sample import sample_job
from pipeline.testing.strikes import draw_script
from pipeline.testing.trial import FINISHED, PATIENCE, Attempt, Struck, Trial, run_plainly, settle

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
"""Seconds of silence after which a worker is taken for dead; less than what some freezes last, and more than a busy
machine makes a worker wait."""
_ROUNDING = 1e-5
"""Relative; for models whose scores depend, in the last bits, on how rows are cut into batches."""


@dataclass(frozen=True)
class TrialResult:
    """What came of one seed."""

    seed: int
    ok: bool
    detail: str
    """What is wrong; empty when all held."""
    exit_code: int
    """0, or what the command line ends with."""
    faults: tuple[Struck, ...]
    attempts: tuple[Attempt, ...]
    rows: RowDifference
    rejects: RowDifference
    reads: int
    """Times the output was read while the job ran."""
    lifetime: float | None = None
    """Seconds the workers had to live."""
    seconds: float = 0.0

    def details(self) -> dict[str, Any]:
        """As JSON output shows it."""
        return {
            "seed": self.seed,
            "ok": self.ok,
            "detail": self.detail,
            "faults": [one.details() for one in self.faults],
            "worker_lifetime": self.lifetime,
            "attempts": [one.__dict__ for one in self.attempts],
            "rows": self.rows.details(),
            "rejects": self.rejects.details(),
            "reads": self.reads,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class ChaosReport:
    """All trials."""

    name: str
    rows: int
    """Of the sample."""
    partitions: int
    asked: int
    """Seeds that were asked for; fewer were tried when the time was over."""
    trials: tuple[TrialResult, ...]
    folder: str
    """Where everything of it lies; empty when all held, as it was removed then."""
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether everything held."""
        return all(trial.ok for trial in self.trials)

    @property
    def exit_code(self) -> int:
        """0, or that of the first trial that did not hold."""
        return next((trial.exit_code for trial in self.trials if not trial.ok), 0)

    def details(self) -> dict[str, Any]:
        """As JSON output shows it."""
        return {
            "ok": self.ok,
            "name": self.name,
            "rows": self.rows,
            "partitions": self.partitions,
            "asked": self.asked,
            "tried": len(self.trials),
            "lost": sum(trial.rows.lost + trial.rejects.lost for trial in self.trials),
            "duplicated": sum(trial.rows.duplicated + trial.rejects.duplicated for trial in self.trials),
            "trials": [trial.details() for trial in self.trials],
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

    :param rows: of the sample at most.
    :param minutes: no trial is begun after so many.
    :param memory: bytes of a worker.
    :param import_paths: folders in which the modules of steps are found.
    :param on_trial: called with each result as it comes.
    :raises PipelineError: when the sample does not run even without faults.
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
    """The sample, what it must come to, and a cluster for the next trial."""

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

    # Before

    def prepare(self, spec: JobSpec, *, rows: int, seed: int) -> None:
        """Take the sample; run it without faults, and another one whose output is there before each trial."""
        self._sample = sample_job(spec, self.folder / "sample", rows=rows, seed=seed)
        earlier = sample_job(spec, self.folder / "other", rows=max(1, rows // 4), seed=seed + 1)
        self.earlier, cold = self._plainly("earlier", earlier)
        self.expected, clean = self._plainly("clean", self._sample)
        directory = self._directory("clean")
        self.rejected, self.seconds, self.cold_seconds = _rejects(directory), clean.seconds, cold.seconds
        self.rows, self.partitions = directory.plan.rows, len(directory.plan.partitions)
        self.outputs = directory.plan.outputs
        self.tolerance = 0.0 if directory.plan.model.flavor == "xgboost" else _ROUNDING

    def _plainly(self, name: str, spec: JobSpec) -> tuple[pa.Table, Attempt]:
        place = self._place(name, spec)
        attempt = run_plainly(place, self.cluster(), environment=self.environment, import_paths=self.import_paths)
        if attempt.exit_code not in FINISHED:
            raise self._broken(name, attempt)
        return read_folder(place / "out"), attempt

    def _broken(self, name: str, attempt: Attempt) -> PipelineError:
        kinds = (kind for kind in vars(error_kinds).values() if isinstance(kind, type))
        same = [one for one in kinds if issubclass(one, PipelineError) and one.exit_code == attempt.exit_code]
        return (same[0] if same else PipelineError)(
            "the sample does not run, even without faults",
            where=str(self.folder / name),
            found=f"exit code {attempt.exit_code}: {attempt.message}",
            next_step="mend the job until python -m pipeline run works, then try again",
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
        """The one that is there, or a new one when its scheduler is gone."""
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
        """Drive the sample to its end under the seed's script, and look at what came out."""
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
                patience=max(PATIENCE, 20 * self.cold_seconds),
                on_end=reader.look,
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
                problems.append("what had been published before is not there any more, and nothing was committed")
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
            reads=reader.looks,
            lifetime=trial.script.lifetime,
        )


def _lifetime_options(seconds: float) -> tuple[str, ...]:
    return ("--lifetime", f"{seconds:.1f}s", "--lifetime-stagger", "2s", "--lifetime-restart")


def _problems(rows: RowDifference, rejects: RowDifference, directory: JobDirectory) -> list[str]:
    """What is not as it should be in a job that succeeded."""
    found = []
    for what, difference in (("rows", rows), ("rejects", rejects)):
        if not difference.is_none:
            counts = ", ".join(f"{count:,} {name}" for name, count in difference.details().items() if count)
            found.append(f"{what}: {counts}")
    found += [f"verify: {check.name}: {check.detail}" for check in verify(directory, sample=0).checks if not check.ok]
    return found


def _code_of(trial: Trial) -> int:
    code = trial.attempts[-1].exit_code
    return code if code > 0 else InfrastructureError.exit_code


def _rejects(directory: JobDirectory) -> pa.Table:
    """Which rows were rejected, and why; messages are left out, as a traceback names places that may differ."""
    schema = pa.schema([("_file", pa.string()), ("_row", pa.int64()), ("_reason", pa.string())])
    tables = [schema.empty_table()]
    for receipt in directory.receipts.all():
        if receipt.rejects is not None and not receipt.splits:
            with directory.store.open_input(layout.round_file(0, receipt.rejects.name)) as file:
                tables.append(pq.read_table(file, columns=schema.names).cast(schema))
    return pa.concat_tables(tables)
