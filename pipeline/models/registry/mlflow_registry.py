"""Resolve model references with MLflow: a tracking server, or its database.

Models are registered with MLflow's own tools. This module looks up versions and aliases, and scores with the file of a
flavor in the model's folder, or with its ``python_function``. An artefact on a shared disk is read in place. Other
artefacts (behind MLflow's server, in a bucket with its own credentials) are fetched by the driver. The driver stores
each of them by its digest beside the job directories, for the workers.

mlflow is imported when the first reference is resolved. The package ``mlflow-skinny`` is enough; the full package
requires older versions of pyarrow.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from pipeline.common.units import iso_time
from pipeline.errors import InfrastructureError, ModelError, PipelineError, SpecError
from pipeline.models.code_model import keep_archive
from pipeline.models.folder_models import FolderSource, folder_at, resolve_folder
from pipeline.models.model import ModelVersion
from pipeline.models.registry.records import AliasRecord, ModelSummary, VersionRecord, describe
from pipeline.spec.model_ref import ModelRef
from pipeline.storage.urls import local_path

_ABSENT = {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE"}
_QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""Limits for a lookup that runs every few seconds: by default MLflow waits minutes for a lost server."""
_FLAVOR = "xgboost"
_ON_DISK = re.compile(r"(?:file:(?://)?)?(?P<path>(?![A-Za-z][A-Za-z0-9+.-]*:/).*)", re.DOTALL)
"""Pattern of a path or a ``file:`` URL; not ``mlflow-artifacts:/1/models``, ``runs:/…`` or ``s3://…``."""


class MLflowRegistry:
    """A `pipeline.models.registry.ModelRegistry` on MLflow."""

    kind = "mlflow"

    def __init__(self, root: str, *, cache: str = "") -> None:
        self.root = root
        self._uri = None if root == "mlflow" else root.removeprefix("mlflow+")
        self._cache = cache

    @cached_property
    def _mlflow(self) -> Any:
        # Send no usage data for lookups.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            import mlflow
            import mlflow.artifacts
        except ImportError as error:
            raise SpecError(
                "the model registry is MLflow, which is not installed",
                where=f"pipeline.registry: {self.root}",
                found=str(error),
                next_step="pip install 'dask-batch-pipeline[mlflow]'",
            ) from error
        return mlflow

    @cached_property
    def _client(self) -> Any:
        with self._errors(self.root):
            return self._mlflow.MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)

    def names(self) -> list[str]:
        """Return the names of the models, sorted."""
        found: list[str] = []
        token = None
        with self._errors(self.root):
            while True:
                page = self._client.search_registered_models(max_results=1000, page_token=token)
                found += [model.name for model in page]
                token = page.token
                if not token:
                    return sorted(found)

    def summary(self, name: str) -> ModelSummary:
        """Return the versions and aliases of a model."""
        quoted = name.replace("'", "")
        with self._errors(name):
            model = self._client.get_registered_model(name)
            versions = sorted(int(one.version) for one in self._client.search_model_versions(f"name='{quoted}'"))
        aliases = {alias: int(version) for alias, version in dict(model.aliases).items()}
        return ModelSummary(name, tuple(versions), (), aliases)

    def version(self, name: str, number: int) -> VersionRecord:
        """Return the record of a version, with the metrics of its run."""
        with self._errors(f"models:/{name}/{number}"):
            found = self._client.get_model_version(name, str(number))
            metrics = self._client.get_run(found.run_id).data.metrics if found.run_id else {}
        return _record(found, metrics)

    def lookup(self, ref: ModelRef) -> VersionRecord:
        """Return the current version of ``ref``, with one request."""
        with _quick():
            return self._find(ref)

    def _find(self, ref: ModelRef) -> VersionRecord:
        with self._errors(ref.text):
            if ref.alias:
                return _record(self._client.get_model_version_by_alias(ref.name, ref.alias))
            return _record(self._client.get_model_version(ref.name, str(ref.version)))

    def resolve(self, ref: ModelRef, *, allow_code: bool = False) -> ModelVersion:
        """Resolve ``ref`` to its current version. Read its files, and load it once in a child process.

        A model with a file of xgboost, LightGBM, CatBoost, scikit-learn or ONNX is scored from that file; any other by
        MLflow's ``python_function``, if code is allowed.
        """
        record = self._find(ref)
        with self._errors(record.uri):
            folder = str(self._client.get_model_version_download_uri(record.name, str(record.version)))
        folder = folder.rstrip("/")
        if (on_disk := _ON_DISK.fullmatch(folder)) is not None:
            source = folder_at(str(local_path(on_disk["path"])))
            version = resolve_folder(source, name=record.name, allow_code=allow_code)
        else:
            with tempfile.TemporaryDirectory() as scratch:
                version = resolve_folder(self._remote(folder, scratch, record), name=record.name, allow_code=allow_code)
        return describe(record, version, registry=self.root)

    def set_alias(self, name: str, alias: str, number: int | None, *, reason: str = "") -> AliasRecord:
        """Point an alias to a version; None removes the alias. MLflow stores no history and no reason."""
        with self._errors(f"models:/{name}@{alias}"):
            if number is None:
                self._client.delete_registered_model_alias(name, alias)
            else:
                self._client.set_registered_model_alias(name, alias, str(number))
        return AliasRecord(name, alias, 0, number, "set" if number is not None else "unset", reason)

    def _remote(self, folder: str, scratch: str, record: VersionRecord) -> FolderSource:
        """Return a folder that only MLflow can fetch; its files are kept where workers read them."""
        read = cache(lambda name: self._fetch(f"{folder}/{name}", scratch, record))
        with self._errors(f"{record.uri}, {folder}"):
            names = tuple(self._list(folder, ""))
        return FolderSource(record.uri, names, read, lambda name: keep_archive(read(name), self._cache))

    def _list(self, folder: str, below: str) -> Iterator[str]:
        found = self._mlflow.artifacts.list_artifacts(
            artifact_uri=f"{folder}/{below}".rstrip("/"), tracking_uri=self._uri
        )
        for info in found:
            # Stores name files by their path in the artifacts of the run, in the folder, or in what was listed.
            name = f"{below}/{info.path.rsplit('/', 1)[-1]}".lstrip("/")
            if info.is_dir:
                yield from self._list(folder, name)
            else:
                yield name

    def _fetch(self, uri: str, folder: str, record: VersionRecord) -> bytes:
        with self._errors(f"{record.uri}, {uri}"):
            path = self._mlflow.artifacts.download_artifacts(
                artifact_uri=uri, dst_path=folder, tracking_uri=self._uri, registry_uri=self._uri
            )
        return Path(path).read_bytes()

    @contextmanager
    def _errors(self, where: str) -> Iterator[None]:
        """Convert MLflow's errors to errors of this package."""
        exception = self._mlflow.exceptions.MlflowException
        try:
            yield
        except PipelineError:
            raise
        except exception as error:
            if getattr(error, "error_code", "") in _ABSENT:
                raise ModelError(
                    "MLflow does not have that",
                    where=where,
                    found=str(error).splitlines()[0][:300],
                    expected=f"a registered model in {self.root}",
                    next_step="python -m pipeline models list",
                ) from error
            raise self._unreachable(where, error) from error
        except Exception as error:
            # Errors of SQLAlchemy and requests, and others that MLflow's stores do not convert.
            raise self._unreachable(where, error) from error

    def _unreachable(self, where: str, error: Exception) -> InfrastructureError:
        return InfrastructureError(
            "MLflow cannot be asked",
            where=f"{where} in {self.root}",
            found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}",
            next_step="start the server or correct pipeline.registry, then try again",
        )


def _record(found: Any, metrics: dict[str, float] | None = None) -> VersionRecord:
    return VersionRecord(
        name=str(found.name),
        version=int(found.version),
        digest="",
        nbytes=0,
        file=str(found.source),
        flavor=_FLAVOR,
        task="other",
        objective="",
        outputs=0,
        trees=0,
        features=(),
        metrics=dict(metrics or {}),
        tags={str(key): str(value) for key, value in dict(found.tags or {}).items()},
        description=str(found.description or ""),
        source=f"run {found.run_id}" if found.run_id else str(found.source),
        created=_time(found.creation_timestamp),
        user=str(found.user_id or ""),
        id=f"{found.name}/{found.version}",
    )


def _time(milliseconds: int | None) -> str:
    return iso_time(datetime.fromtimestamp(milliseconds / 1000, UTC)) if milliseconds else ""


@contextmanager
def _quick() -> Iterator[None]:
    """Set short timeouts for MLflow inside the block, unless the environment sets them."""
    names = [name for name in _QUICK if name not in os.environ]
    os.environ.update({name: _QUICK[name] for name in names})
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
