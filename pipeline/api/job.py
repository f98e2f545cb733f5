"""`Job`: plan, run or submit a job spec from Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.api.clusters import AnyCluster, cluster_name, on_client, refuse_inproc
from pipeline.api.display import html_table, show_observers
from pipeline.api.frames import with_stored_models
from pipeline.api.preview import first_rows
from pipeline.api.tracebacks import interruptible
from pipeline.common.step_modules import StepModules
from pipeline.driver.prepare import draft, prepare
from pipeline.errors import SpecError
from pipeline.events import Callback
from pipeline.jobs.code_archive import packed_sources
from pipeline.jobs.directory import JobDirectory
from pipeline.plan.describe import PlanSummary, plan_summary, step_text
from pipeline.plan.outline import Stage
from pipeline.plan.plan import Plan
from pipeline.plan.planner import plan_lazy_stage
from pipeline.plan.recipe import StageRecipe
from pipeline.report.report import Report
from pipeline.runner import run
from pipeline.scoring.steps import prepended_sys_path
from pipeline.service.handle import JobHandle
from pipeline.service.submit import submit
from pipeline.settings import Settings
from pipeline.spec.budget import Budget
from pipeline.spec.fields import OnAliasChange, StepChange
from pipeline.spec.gate import Gate
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.load import load_spec, source_paths
from pipeline.spec.model_ref import Device
from pipeline.spec.parts import (
    CheckpointStep,
    ColumnContract,
    DaskStep,
    Errors,
    FanOut,
    FilterStep,
    Hook,
    MapStep,
    ReportOptions,
    RunOptions,
    SelectStep,
    Source,
)
from pipeline.spec.score import Score, ScoreStep
from pipeline.spec.sink import Sink
from pipeline.spec.triggers import Trigger
from pipeline.storage.urls import own_storage_options

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.execution.graph import DaskFrame

Fields = Mapping[str, Any]
"""The fields of a part of a job spec, as YAML holds them."""
AnyStepInput = (
    MapStep | FilterStep | SelectStep | Score | ScoreStep | CheckpointStep | DaskStep | Fields | Callable[..., Any]
)
"""A step as `Job` takes it."""


class Job:
    """Plan, run or submit a batch inference job.

    The arguments are the fields of a job spec (docs/job-spec.md). Each part is an object such as ``Source(...)``, or a
    dict as in the YAML file.

    Parameters
    ----------
    name : str
        Lower-case letters, digits, ``._-``; at most 64.
    source : Source or dict
        Input files, columns and filter.
    steps : sequence of MapStep, FilterStep, SelectStep, Score, ScoreStep, CheckpointStep, DaskStep, dict or function
        In any number and order, with a checkpoint between two stages. A job without a ``score`` step only prepares
        data. A function is a ``map`` step: what workers can import travels by name; any other, such as one of a
        notebook's cell, a lambda or an instance with ``__call__``, is stored with the job. In a dict, ``model`` may be
        a fitted model, which is stored below the job directory's root, as by ``score``.
    sink : Sink or dict
        Output path and mode.
    errors : Errors or dict, optional
        Limits for rejected rows and files. Default: no rejected row is allowed.
    contract : dict of str to ColumnContract or dict, optional
        Conditions per column, beside those of the model's features.
    on_alias_change : {"pin", "fail", "restart"}, default "pin"
        Action when the model's alias moves while the job runs.
    step_change : {"fail", "pin", "restart"}, default "fail"
        Action when the code of a step changes before the job has ended.
    cluster : str, Client or cluster, optional
        A name in ``cluster_configs/``, a file, or a scheduler address; or your own ``distributed.Client``,
        ``LocalCluster``, ``SLURMCluster`` and the like, which is used as it is and left as it was.
    device : {"auto", "cpu", "cuda"}, optional
        Device that evaluates the model. Default: the GPU of a worker that has one, if the bits are the same.
    storage : dict, optional
        fsspec options per URL prefix.
    params : dict, optional
        Values for ``${params.NAME}`` in any text of the spec.
    run : RunOptions or dict, optional
        Date of the run.
    report : ReportOptions or dict, optional
        Content of the report.
    gate : Gate or dict, optional
        Conditions on the output that must hold before it is published.
    budget : Budget or dict, optional
        Most money or node-hours that all runs of the job together may spend.
    triggers : sequence of Trigger or dict, optional
        Schedules, used by a server.
    hooks : sequence of Hook or dict, optional
        Programs and web servers to notify.
    fan_out : FanOut or dict, optional
        One job per value of a key, a column or a list.
    settings : Settings, optional
        Default: ``Settings.load()``.
    directory, workers, threads, memory_limit : optional
        Shortcuts for the settings of these names.

    Raises
    ------
    SpecError
        With every invalid field.

    Examples
    --------
    >>> from pipeline import Job, Score, Sink, Source
    >>> job = Job(
    ...     "churn",
    ...     source=Source(path="lake/customers/"),
    ...     steps=[{"map": "features:build"}, Score(model="churn.ubj", output="churn", keep=["customer_id"])],
    ...     sink=Sink(path="out/", mode="overwrite"),
    ...     errors={"max_fraction": 0.01},
    ...     workers=1,
    ... )
    >>> job
    <Job churn: lake/customers/ → out/>
    >>> job.plan().rows
    5000
    """

    def __init__(
        self,
        name: str,
        source: Source | Fields,
        steps: Sequence[AnyStepInput],
        sink: Sink | Fields,
        *,
        errors: Errors | Fields | None = None,
        contract: Mapping[str, ColumnContract | Fields] | None = None,
        on_alias_change: OnAliasChange = "pin",
        step_change: StepChange = "fail",
        cluster: str | AnyCluster | None = None,
        device: Device | None = None,
        storage: Mapping[str, Fields] | None = None,
        params: Fields | None = None,
        run: RunOptions | Fields | None = None,
        report: ReportOptions | Fields | None = None,
        gate: Gate | Fields | None = None,
        budget: Budget | Fields | None = None,
        triggers: Sequence[Trigger | Fields] = (),
        hooks: Sequence[Hook | Fields] = (),
        fan_out: FanOut | Fields | None = None,
        settings: Settings | None = None,
        directory: str | os.PathLike[str] | None = None,
        workers: int | None = None,
        threads: int | None = None,
        memory_limit: int | str | None = None,
    ) -> None:
        fields = {field: value for field, value in locals().items() if field in JobSpec.model_fields}
        fields["cluster"] = cluster_name(cluster)
        given = Settings.load(directory=directory, workers=workers, threads=threads, memory_limit=memory_limit)
        if settings is not None:
            flags = {"directory": directory, "workers": workers, "threads": threads, "memory_limit": memory_limit}
            given = replace(settings, **{key: getattr(given, key) for key, value in flags.items() if value is not None})
        self.settings = given
        fields["steps"] = [with_stored_models(_step_fields(step), given) for step in steps]
        self.spec = JobSpec.build(**{field: value for field, value in fields.items() if value is not None})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        overrides: Sequence[str] = (),
        params: Mapping[str, Any] | None = None,
        settings: Settings | None = None,
    ) -> Job:
        """Load a job from a YAML or JSON file.

        Modules of its steps are imported from the folder of the file, then from the working directory.

        Parameters
        ----------
        path : str or PathLike
            Path or URL of the file.
        overrides : sequence of str, optional
            ``field=value`` each, such as ``"sink.path=out/"``.
        params : dict, optional
            Values for parameters that the file declares.
        settings : Settings, optional
            Default: ``Settings.load()``.

        Raises
        ------
        SpecError
            With every invalid field, its line and column.

        Examples
        --------
        >>> pipeline.Job.load("job.yaml", overrides=["sink.path=elsewhere/"])
        <Job churn-demo: lake/customers/ → elsewhere/>
        """
        loaded = load_spec(path, overrides=overrides, params=params or {})
        return cls._of(loaded.spec, settings or Settings.load(import_paths=loaded.folders))

    @classmethod
    def _of(cls, spec: JobSpec, settings: Settings) -> Job:
        job = cls.__new__(cls)
        job.spec, job.settings = spec, settings
        return job

    def plan(self) -> PlanSummary:
        """Plan the job: read the footers of its input and check that it fits the workers. Nothing is written.

        Returns
        -------
        PlanSummary
            Rows, bytes, partitions, memory and model; ``print`` shows one screen.

        Raises
        ------
        PipelineError
            If the job cannot run, such as MissingInput, SchemaDrift, ModelError or InsufficientMemory.
        """
        with (
            interruptible("the job was planned"),
            own_storage_options(),
            prepended_sys_path(self.settings.import_paths),
        ):
            prepared = prepare(self.spec, settings=self.settings)
        return plan_summary(prepared.plan, prepared.limits, device=prepared.device)

    def preview(self, n: int = 20) -> pd.DataFrame:
        """Score the first rows of the source through all steps, in this process. Nothing is written or started.

        Parameters
        ----------
        n : int, default 20
            Number of input rows.

        Returns
        -------
        pandas.DataFrame
            Their output. Rows that a job would reject are left out; ``frame.attrs["reasons"]`` has their number by
            reason, and ``frame.attrs["rows"]`` the counts.

        Raises
        ------
        PipelineError
            The error that a job would end with before its first partition, such as SchemaDrift or StepFailed.

        Examples
        --------
        >>> frame = pipeline.Job.load("job.yaml").preview(5)
        >>> len(frame), frame.attrs["rows"]["in"]
        (5, 5)
        """
        with interruptible("the first rows were scored"):
            return first_rows(self.spec, settings=self.settings, rows=n)

    def run(
        self,
        *,
        job_id: str | None = None,
        client: AnyCluster | None = None,
        callbacks: Sequence[Callback] | None = None,
    ) -> Report:
        """Run the job to its end, with a progress display, and publish its output in one commit.

        Parameters
        ----------
        job_id : str, optional
            Id of the job. If a job with this id and the same plan exists, it is resumed. Default: a new id.
        client : distributed.Client or cluster, optional
            Your own client, to run on instead of ``cluster``.
        callbacks : sequence of Callback, optional
            Observers to call instead of the progress display.

        Returns
        -------
        Report

        Raises
        ------
        PipelineError
            If the job failed or was interrupted. ``pipeline.resume`` continues it.

        Examples
        --------
        >>> report = pipeline.Job.load("job.yaml").run(callbacks=[])
        >>> report.ok, report.rows.input
        (True, 5000)

        See Also
        --------
        Job.submit : Run it in the background.
        """
        settings = on_client(self.settings, client)
        with interruptible("the job was planned or run"), show_observers(callbacks) as observers:
            return run(self.spec, settings=settings, job_id=job_id, callbacks=observers)

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
        """Plan the job and run it in the background; it survives this process.

        Submitting the same spec, input and model again returns the same job. If that job failed, it is resumed.

        Parameters
        ----------
        job_id : str, optional
            Id of a new job.
        key : str, optional
            Submissions with one key are one job. Default: a digest of spec, input and model.
        force : bool, default False
            Make a new job even if one with the key exists.
        priority : int, default 0
            Queued jobs with a higher priority start first.
        start : bool, default True
            Start a driver now. False: leave the job to a server.
        callbacks : sequence of Callback, optional
            Observers, called as long as this process lives.

        Returns
        -------
        JobHandle

        See Also
        --------
        attach : Take up a submitted job from another process.
        """
        refuse_inproc(self.spec, self.settings)
        submitted = submit(
            self.spec, settings=self.settings, key=key, force=force, job_id=job_id, priority=priority, start=start
        )
        directory = JobDirectory.open(submitted.directory)
        return JobHandle.open(directory, lease_seconds=self.settings.lease_seconds, callbacks=callbacks)

    def to_dask(self) -> DaskFrame:
        """Return the scored rows as a lazy Dask DataFrame, in source order.

        Nothing is written. Rows that a job would reject are left out.

        Returns
        -------
        dask.dataframe.DataFrame
            One Dask partition per partition of the plan, with the columns of the output.

        Raises
        ------
        SpecError
            For a fan-out, which has no rows of its own.

        See Also
        --------
        score : The same for any DataFrame.
        Report.to_dask : The rows that a job published.
        """
        from pipeline.execution import graph
        from pipeline.scoring.frames import scored_meta

        if self.spec.fan_out is not None:
            raise SpecError(
                "a fan-out has no rows of its own",
                where="fan_out",
                expected="a job over one of its values",
                next_step="remove fan_out, and filter for the value",
            )
        # The sink is not checked: nothing is written to it.
        with own_storage_options(), prepended_sys_path(self.settings.import_paths):
            if self.spec.has_dask:
                return self._staged(draft(self.spec, settings=self.settings).plan)
            # A checkpoint changes no row, and nothing is kept here.
            steps = tuple(step for step in self.spec.steps if not isinstance(step, CheckpointStep))
            plan = draft(self.spec.model_copy(update={"steps": steps}), settings=self.settings).plan
        recipe = plan.recipe(job=self.spec.name, directory="", import_paths=self.settings.import_paths)
        # There is no job directory that could keep them.
        recipe = replace(recipe, functions=packed_sources(plan))
        return graph.scored(recipe, plan.partitions, plan.versions, meta=scored_meta(recipe))

    def _staged(self, plan: Plan) -> DaskFrame:
        """Return the rows of a job with ``dask`` steps."""
        from pipeline.execution.stage_frames import staged

        paths = self.settings.import_paths

        def recipe_of(stage: Stage) -> StageRecipe:
            planned = plan_lazy_stage(plan, stage)
            recipe = planned.recipe(job=self.spec.name, directory="", import_paths=paths)
            return replace(recipe, functions=packed_sources(plan))

        return staged(plan, recipe_of, StepModules(plan.code, import_paths=paths, sources=plan.sources))

    def __repr__(self) -> str:
        return f"<Job {self.spec.name}: {', '.join(source_paths(self.spec))} → {self.spec.sink.place}>"

    def __str__(self) -> str:
        return self.spec.to_yaml()

    def _repr_html_(self) -> str:
        spec = self.spec
        steps = [step_text(step) for step in spec.steps]
        rows = {"source": ", ".join(source_paths(spec)), "steps": ", ".join(steps), "sink": spec.sink.place}
        return html_table(f"Job {spec.name}", rows.items())


def _step_fields(step: AnyStepInput) -> Any:
    """Return a step as `JobSpec.build` takes it."""
    if isinstance(step, Score):
        return {"score": step}
    is_part = isinstance(step, (MapStep, FilterStep, SelectStep, ScoreStep, CheckpointStep, DaskStep, Mapping))
    return {"map": step} if callable(step) and not is_part else step
