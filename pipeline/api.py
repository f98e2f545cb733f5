"""Jobs from Jupyter and Python: `Job` and `score`."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import pandas as pd

from pipeline.driver.prepare import Prepared, prepare, resolve_model
from pipeline.errors import SpecError
from pipeline.events import Callback, JobEnded
from pipeline.execution import graph
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.listing import find_job
from pipeline.models.model import ModelVersion
from pipeline.plan.describe import PlanSummary, plan_summary
from pipeline.report.progress import PlainProgress, show_progress
from pipeline.report.report import Report
from pipeline.runner import resume, retry, run
from pipeline.scoring.frames import score_pandas, scored_meta
from pipeline.scoring.outputs import prediction_schema
from pipeline.scoring.steps import prepended_sys_path
from pipeline.service.handle import Handle
from pipeline.service.submit import submit
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.load import absolute_path, load_spec
from pipeline.spec.model_ref import ModelRef
from pipeline.spec.parts import Output


class JobHandle(Handle):
    """A job that goes on by itself: ``.status``, ``.wait()`` or ``await``, ``.observe()``, ``.cancel()``, ``.logs()``,
    ``.report()``."""

    def _repr_html_(self) -> str:
        return _html(repr(self))


def _handle(directory: JobDirectory, settings: Settings, callbacks: Sequence[Callback]) -> JobHandle:
    handle = JobHandle(directory, lease_seconds=settings.lease_seconds)
    if callbacks:
        handle.observe(*callbacks)
    return handle


class Job:
    """A job spec that can be planned, run, and looked at lazily.

    ``Job(name=…, source=…, steps=[…], sink=…)`` takes the fields of the YAML file, by the same names. ``settings`` says
    how it runs here; default: ``dask.config`` (see `pipeline.settings`).
    """

    def __init__(self, *, settings: Settings | None = None, **fields: Any) -> None:
        self.spec = JobSpec.build(**fields)
        self.settings = settings or Settings.load()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        overrides: Sequence[str] = (),
        params: Mapping[str, Any] | None = None,
        settings: Settings | None = None,
    ) -> Job:
        """The job of a YAML or JSON file.

        :param overrides: such as ``sink.path=out/``.
        :param params: values for parameters that the file declares.
        """
        loaded = load_spec(path, overrides=overrides, params=params or {})
        job = cls.__new__(cls)
        job.spec = loaded.spec
        job.settings = settings or Settings.load(import_paths=loaded.folders)
        return job

    def plan(self) -> PlanSummary:
        """What would run, in figures; nothing is written."""
        prepared = self._prepare()
        return plan_summary(prepared.plan, prepared.limits)

    def run(self, *, job_id: str | None = None, callbacks: Sequence[Callback] | None = None) -> Report:
        """Run it to its end, with a progress display.

        :param job_id: goes on with that job when it is there.
        :param callbacks: observers instead of the display.
        """
        with _observers(callbacks) as observers:
            return run(self.spec, settings=self.settings, job_id=job_id, callbacks=observers)

    def resume(self, job: str = "@last", *, callbacks: Sequence[Callback] | None = None) -> Report:
        """Go on with an unfinished job of this or another spec."""
        with _observers(callbacks) as observers:
            return resume(job, settings=self.settings, callbacks=observers)

    def retry(
        self,
        job: str = "@last",
        *,
        model: str | None = None,
        overrides: Sequence[str] = (),
        callbacks: Sequence[Callback] | None = None,
    ) -> Report:
        """Score again what a job left out: rejected rows, unfinished partitions, files that were mended.

        :param model: a model reference or file to score them with. Default: what was used last.
        :param overrides: such as ``steps.0.map=features:mended``; steps, contract and errors may be changed.
        """
        with _observers(callbacks) as observers:
            return retry(job, model=model, overrides=overrides, settings=self.settings, callbacks=observers)

    def submit(
        self,
        *,
        job_id: str | None = None,
        key: str | None = None,
        force: bool = False,
        priority: int = 0,
        start: bool = True,
        callbacks: Sequence[Callback] = (),
    ) -> JobHandle:
        """Plan it, and let it run by itself: it goes on when this kernel dies. The same again is the same job.

        :param job_id: id of the job, where it is a new one.
        :param key: what makes two submissions one. Default: spec, input and model.
        :param force: a new job all the same.
        :param priority: of several that wait for a server, higher ones start first.
        :param start: start a driver now; else a server does.
        :param callbacks: are told what happens, for as long as this process lives.
        """
        made = submit(
            self.spec,
            settings=self.settings,
            key=key,
            force=force,
            job_id=job_id,
            priority=priority,
            start=start,
        )
        return _handle(JobDirectory.open(made.directory), self.settings, callbacks)

    @staticmethod
    def attach(
        job: str = "@last", *, settings: Settings | None = None, callbacks: Sequence[Callback] = ()
    ) -> JobHandle:
        """Take up a job from anywhere that sees its directory, whoever drives it.

        :param job: id, unique prefix of one, ``@last``, or the path of a job directory.
        """
        settings = settings or Settings.load()
        return _handle(find_job(settings.directory, job), settings, callbacks)

    def to_dask(self) -> Any:
        """The scored rows as a lazy Dask DataFrame, one Dask partition per partition of the plan, in source order.

        Nothing is written; rows that a job would reject are left out.
        """
        if self.spec.fan_out is not None:
            raise SpecError(
                "a fan-out has no rows of its own",
                where="fan_out",
                expected="a job over one of its values",
                next_step="leave fan_out out, with a filter for the value",
            )
        prepared = self._prepare()
        plan = prepared.plan
        recipe = plan.recipe(job=self.spec.name, directory="", import_paths=self.settings.import_paths)
        return graph.scored(recipe, plan.partitions, plan.versions, meta=scored_meta(recipe))

    def _prepare(self) -> Prepared:
        with prepended_sys_path(self.settings.import_paths):
            return prepare(self.spec, settings=self.settings)

    def __repr__(self) -> str:
        return self.spec.to_yaml()

    def _repr_html_(self) -> str:
        return _html(self.spec.to_yaml())


def score(
    frame: Any,
    model: str,
    *,
    features: Sequence[str] | None = None,
    output: str | dict[str, Any] = "prediction",
) -> Any:
    """A Dask or pandas DataFrame with the scores of ``model`` as further columns; a Dask one stays lazy.

    The model travels as its path and digest; each worker process loads it once.

    :param model: path of a model file, or a model reference.
    :param features: column for each feature of the model, in its order. Default: the model's own names.
    :param output: output column, or ``{"column": …, "kind": …}`` as in a job spec.
    :raises InputError: while computing, when a row breaks the model's contract.
    """
    reference = absolute_path(model) if ModelRef.parse(model).is_file else model
    version = resolve_model(reference, settings=Settings.load())
    wanted = Output(column=output) if isinstance(output, str) else Output(**output)
    columns = tuple(features) if features is not None else None
    if isinstance(frame, pd.DataFrame):
        return score_pandas(frame, version, features=columns, output=wanted)
    return frame.map_partitions(
        _score_part, version, columns, wanted, meta=_scored_meta(frame._meta, version, wanted), enforce_metadata=False
    )


def _score_part(
    frame: pd.DataFrame, version: ModelVersion, features: tuple[str, ...] | None, output: Output
) -> pd.DataFrame:
    return score_pandas(frame, version, features=features, output=output)


def _scored_meta(frame: pd.DataFrame, version: ModelVersion, output: Output) -> pd.DataFrame:
    schema = prediction_schema(version, output)
    return frame.assign(**{field.name: pd.Series([], dtype=field.type.to_pandas_dtype()) for field in schema})


def _html(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


class _Cell(io.StringIO):
    """A place in a notebook that shows the last line written to it."""

    def __init__(self, handle: Any) -> None:
        super().__init__()
        self._handle = handle

    def write(self, text: str) -> int:
        self._handle.update({"text/plain": text.rstrip(), "text/html": _html(text.rstrip())}, raw=True)
        return len(text)


class _CellProgress(PlainProgress):
    """One line that changes, and at last says how the job ended. Rich would need ipywidgets for as much."""

    def on_end(self, event: JobEnded) -> None:
        self._write(f"{event.status}  {event.job}")


@contextmanager
def _observers(callbacks: Sequence[Callback] | None) -> Iterator[Sequence[Callback]]:
    """``callbacks``, or without any the display that fits: one line that changes in Jupyter, else as `run` shows it."""
    if callbacks is not None:
        yield callbacks
        return
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None or not hasattr(shell, "kernel"):
        with show_progress() as shown:
            yield shown
        return
    display: Any = sys.modules["IPython"].display.display
    yield [_CellProgress(stream=_Cell(display({"text/plain": "planning"}, raw=True, display_id=True)))]
