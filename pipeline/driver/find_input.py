"""Which of the source's files a job scores: all that are there, or what is new to an incremental job's sink."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from pipeline.common.digest import digest_json
from pipeline.common.rows import InputFile
from pipeline.errors import InputChanged, PipelineError, SpecError
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.listing import list_jobs
from pipeline.models.model import ModelVersion
from pipeline.plan.incremental import ALL, Found, Progress, choose
from pipeline.settings import Settings
from pipeline.sinks import published_work
from pipeline.sources import Discovery, discover
from pipeline.sources.locate import Located, locate
from pipeline.sources.parquet.discover import Chosen
from pipeline.sources.parquet.footers import group_marks
from pipeline.sources.parquet.opening import read_footer
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.parts import Incremental


def find_input(
    spec: JobSpec, model: ModelVersion, *, settings: Settings, planned: Collection[InputFile] | None = None
) -> tuple[Discovery, Progress]:
    """The files that are scored, and what an incremental job goes on from.

    :param spec: with absolute paths.
    :param planned: the only files, when they were planned before.
    :raises SpecError: for an incremental job that does not append.
    :raises PipelineError: for anything wrong with the input, or with what the sink says it holds.
    """
    policy, is_lenient = spec.source.incremental, spec.errors.files == "reject"
    if policy is False:
        return discover(spec.source, planned=planned, reject_files=is_lenient), ALL
    if planned is not None:
        chosen = {file.path: Chosen(file.why, file.done_groups) for file in planned}
        found = discover(spec.source, planned=planned, chosen=chosen)
        return found, Progress(work=work_digest(spec, model))
    if spec.sink.mode != "append":
        raise SpecError(
            "an incremental job adds to its sink",
            where="sink.mode",
            found=spec.sink.mode,
            expected="append",
            next_step="--set sink.mode=append; to publish everything anew, choose an empty sink.path",
        )
    located = {file.path: file for file in locate(spec.source.path, base=spec.source.base)}
    before = published_work(spec.sink, name=spec.name)
    increment = choose(
        [Found(file.path, file.size, file.version) for file in located.values()],
        before.work,
        kept=before.files,
        work=work_digest(spec, model),
        on_model_change=policy.on_model_change if isinstance(policy, Incremental) else "new",
        marks=lambda path: group_marks(read_footer(located[path])),
        failed=_failed_before(spec.name, settings),
    )
    discovery = discover(spec.source, chosen=increment.files, reject_files=is_lenient)
    if not increment.files:
        return replace(discovery, files=(), rejected=(), footers=()), increment.progress
    _check_unchanged(discovery, located)
    return discovery, increment.progress


def refuse_incremental(spec: JobSpec) -> None:
    """Refuse a fan-out over an incremental source.

    :raises SpecError: when it is one.
    """
    if spec.source.incremental is not False:
        raise SpecError(
            "an incremental job does not fan out",
            where="source.incremental",
            found="fan_out beside it",
            expected="one of the two",
            next_step="write a job spec, or a trigger with params, for each value",
        )


def work_digest(spec: JobSpec, model: ModelVersion) -> str:
    """SHA-256 over what is done with a row: model, steps, filter, contract."""
    score = spec.score.model_dump(mode="json", exclude={"model", "engine", "tolerance"})
    return digest_json(
        {
            "model": [model.digest, model.flavor],
            "maps": [step.model_dump(mode="json") for step in spec.maps],
            "score": score,
            "filter": spec.source.filter,
            "contract": {name: one.model_dump(mode="json") for name, one in spec.contract.items()},
        }
    )


def _check_unchanged(discovery: Discovery, located: dict[str, Located]) -> None:
    for file in discovery.files:
        before = located[file.path]
        if (file.size, file.version) != (before.size, before.version):
            raise InputChanged(
                "an input file changed while it was looked at",
                where=file.path,
                found=f"{file.size:,} bytes, {file.version}",
                expected=f"{before.size:,} bytes, {before.version}",
                next_step="run it again once the file is whole",
            )


def _failed_before(name: str, settings: Settings) -> dict[str, str]:
    """The files of the last job of that name, when it did not publish; for telling why they are to be done."""
    try:
        last = next((one for one in list_jobs(settings.directory) if one.record.name == name), None)
        if last is None or last.status.is_success or not last.status.is_final:
            return {}
        paths: Sequence[str] = [file.path for file in JobDirectory.open(last.directory).plan.files]
    except PipelineError:
        return {}
    return dict.fromkeys(paths, last.record.job)
