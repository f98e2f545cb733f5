"""`load_spec`: load a job spec with its file, and the origin of each of its values."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.spec.diagnostics import Document, FieldPath, dotted
from pipeline.spec.document import read_document
from pipeline.spec.fields import KEY_PLACEHOLDER
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.model_ref import ModelRef
from pipeline.spec.parameters import (
    PLACEHOLDER,
    GivenValues,
    RenderedSpec,
    given_by_environment,
    given_in_python,
    render_spec,
)
from pipeline.spec.parts import DaskStep
from pipeline.spec.precedence import Precedence, ResolvedSetting, SettingSource, param_variables
from pipeline.storage.urls import expand_user, is_local_path, local_path

FILE_DATABASES = ("sqlite", "duckdb")
"""Schemes of databases that are a file."""


@dataclass(frozen=True)
class LoadedSpec:
    """A job spec and its file."""

    spec: JobSpec
    path: str | None
    """Absolute path or URL of the file; None for a text or a pipe."""
    origins: Mapping[str, ResolvedSetting] = field(default_factory=dict)
    """Origin of the value of each field, by its name in ``--set``."""

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders from which its steps are imported: the folder of the file, then the working directory."""
        if self.path is None or "://" in self.path:
            return (os.getcwd(),)
        return tuple(dict.fromkeys((str(Path(self.path).parent), os.getcwd())))


def load_spec(
    source: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    params: Mapping[str, Any] | Sequence[GivenValues] = (),
    run_date: str | None = None,
    environ: Mapping[str, str] | None = None,
    text: str | None = None,
) -> LoadedSpec:
    """Load a job spec from a YAML or JSON file (path or URL), or from a text with more than one line.

    :param overrides: ``field=value`` each, as ``--set`` has them.
    :param params: values for its parameters: by name, or as `pipeline.spec.parameters` reads them from ``-p``.
    :param run_date: value of ``${run.date}``, as ``2026-01-01``. Default: today, UTC.
    :param environ: default: the environment of this process.
    :param text: text of the file, where it was read already.
    :raises SpecError: with every issue; see `JobSpec.load`.
    """
    environ = os.environ if environ is None else environ
    document = read_document(source, overrides=overrides, environ=environ, text=text)
    given = given_in_python(params) if isinstance(params, Mapping) else tuple(params)
    by_environment = given_by_environment(param_variables(environ), _declared(document))
    filled = render_spec(document, given=(*by_environment, *given), run_date=run_date, environ=environ)
    spec = JobSpec.from_filled(document)
    name = os.fspath(source)
    path = None
    if not (isinstance(source, str) and "\n" in source):
        path = name if "://" in name else _file(name)
    return LoadedSpec(spec, path, spec_origins(document, spec.model_dump(mode="json"), filled))


def _file(name: str) -> str | None:
    path = expand_user(name).absolute()
    return None if path.is_fifo() else str(path)


def _declared(document: Document) -> Mapping[str, Any]:
    params = document.data.get("params") if isinstance(document.data, dict) else None
    return params if isinstance(params, dict) else {}


def absolute(spec: JobSpec) -> JobSpec:
    """Return ``spec`` with absolute local paths, so that the job does not depend on the working directory."""
    record = spec.to_dict()
    path = spec.source.path
    record["source"]["path"] = absolute_path(path) if isinstance(path, str) else [absolute_path(part) for part in path]
    if spec.source.base is not None:
        record["source"]["base"] = absolute_path(spec.source.base)
    if spec.sink.path:
        record["sink"]["path"] = absolute_path(spec.sink.path)
    if spec.sink.url is not None:
        record["sink"]["url"] = absolute_database(spec.sink.url)
    for step in record["steps"]:
        if "dask" in step:
            for table in step.get("inputs", {}).values():
                paths = table["path"]
                table["path"] = absolute_path(paths) if isinstance(paths, str) else [*map(absolute_path, paths)]
                if "base" in table:
                    table["base"] = absolute_path(table["base"])
        if "score" in step:
            step["score"] |= _absolute_models(step["score"])
    return JobSpec.model_validate(record)


def _absolute_models(score: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a score that name models, with absolute paths."""
    made: dict[str, Any] = {}
    for name in ("model", "meta", "models", "other"):
        value = score.get(name)
        if isinstance(value, str):
            made[name] = value if name == "other" and value == "reject" else _absolute_model(value)
        elif isinstance(value, dict):
            made[name] = {key: _absolute_model(text) for key, text in value.items()}
        elif isinstance(value, list):
            made[name] = [_absolute_model(text) for text in value]
    files = score.get("model_files")
    if files is not None:
        made["model_files"] = absolute_path(files) if isinstance(files, str) else [*map(absolute_path, files)]
    return made


def _absolute_model(text: str) -> str:
    is_file = ModelRef.parse(text.replace(PLACEHOLDER, "x").replace(KEY_PLACEHOLDER, "x")).is_file
    return absolute_path(text) if is_file else text


def source_paths(spec: JobSpec) -> tuple[str, ...]:
    """Return the paths of the source as a tuple."""
    return _paths(spec.source.path)


def input_paths(spec: JobSpec) -> tuple[str, ...]:
    """Return the paths of the source, and of the tables of ``dask`` steps."""
    tables = [table for step in spec.steps if isinstance(step, DaskStep) for table in step.inputs.values()]
    return (*source_paths(spec), *(path for table in tables for path in _paths(table.path)))


def _paths(path: str | tuple[str, ...]) -> tuple[str, ...]:
    return (path,) if isinstance(path, str) else tuple(path)


def absolute_path(path: str) -> str:
    """Return a local path made absolute; URLs, and paths that begin with a placeholder, stay."""
    return str(local_path(path)) if is_local_path(path) and not path.startswith(PLACEHOLDER) else path


def absolute_database(url: str) -> str:
    """Return the URL of a database in a file with an absolute path; other URLs stay."""
    scheme, separator, path = url.partition(":///")
    if not separator or scheme not in FILE_DATABASES or path.startswith((PLACEHOLDER, ":")):
        return url
    return f"{scheme}:///{local_path(path)}"


def spec_origins(document: Document, record: Mapping[str, Any], filled: RenderedSpec) -> dict[str, ResolvedSetting]:
    """Return the value of each field that has one, with its origin.

    :param document: as the spec was read.
    :param record: the spec with its defaults, as JSON holds it.
    """
    origins = {}
    for path, value in _leaves(record, ()):
        if path[0] == "params":
            continue
        origins[dotted(path)] = _origin(document, path, value, filled)
    origins |= {f"params.{name}": choice for name, choice in filled.params.items()}
    return origins


def _origin(document: Document, path: FieldPath, value: Any, filled: RenderedSpec) -> ResolvedSetting:
    if path == ("run", "date") and path not in document.values:
        return ResolvedSetting(value, Precedence.BUILT_IN, "the date of submission, UTC")
    if not _is_written(document.data, path):
        return ResolvedSetting(value, Precedence.BUILT_IN, Precedence.BUILT_IN.words)
    origin = str(document.place_of(path))
    used = [name for at, names in filled.used.items() if at[: len(path)] == path for name in names]
    if used:
        origin += " with " + ", ".join(f"${{{name}}}" for name in dict.fromkeys(used))
    over: tuple[SettingSource, ...] = document.over.get(path, ())
    return ResolvedSetting(value, document.rank_of(path), origin, over)


def _is_written(data: Any, path: FieldPath) -> bool:
    for part in path:
        try:
            data = data[part]
        except (LookupError, TypeError):
            return False
    return data is not None


def _leaves(value: Any, path: FieldPath) -> Iterator[tuple[FieldPath, Any]]:
    """Yield single values and lists of them, with their paths, without fields that are not set."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for number, item in enumerate(value):
            yield from _leaves(item, (*path, number))
    elif value is not None and value != []:
        yield path, value
