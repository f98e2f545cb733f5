"""Resolve a folder to a model version: one flavor for all its files, or an MLflow model with a file of a flavor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from pipeline.errors import ModelError, RefusedForSafety
from pipeline.models.flavors import BUILT_IN, MAX_BYTES, detect_bytes, find_flavor, read_model
from pipeline.models.flavors.mlflow_file import MLMODEL, MlflowModel, parse_mlmodel
from pipeline.models.flavors.transformers_file import is_encoder, pack_folder
from pipeline.models.folders import copy_files, list_files
from pipeline.models.model import ModelVersion

_PYFUNC = "mlflow"


@dataclass(frozen=True)
class FolderSource:
    """A folder to resolve, wherever its files are."""

    uri: str
    """Path, URL or reference, for messages."""
    names: tuple[str, ...]
    read: Callable[[str], bytes]
    """Reads a file by its name."""
    place: Callable[[str], str]
    """Path or URL of a file, where workers read it."""


def folder_at(uri: str, *, limit: int = MAX_BYTES) -> FolderSource:
    """Return the folder at a path or URL."""
    base = uri.rstrip("/")
    return FolderSource(
        uri,
        tuple(list_files(uri)),
        lambda name: read_model(f"{base}/{name}", limit=limit),
        lambda name: f"{base}/{name}",
    )


def resolve_folder(
    source: FolderSource,
    *,
    name: str | None = None,
    flavor: str | None = None,
    allow_code: bool = False,
    limit: int = MAX_BYTES,
) -> ModelVersion:
    """Return the version of the model in a folder.

    :param name: name of the version; default: that of the folder.
    :param flavor: the only flavor that it may have; None: any.
    :param limit: largest size of all files, in bytes.
    :raises ModelError: when no flavor takes the folder.
    :raises RefusedForSafety: for a folder with code, unless it is allowed.
    """
    described = parse_mlmodel(source.read(MLMODEL), where=source.uri) if MLMODEL in source.names else None
    if described is not None and described.native is not None and flavor != _PYFUNC:
        return _native(source, described, name=name, flavor=flavor, allow_code=allow_code)
    offered = BUILT_IN if flavor is None else (flavor,)
    takers = ((one, find_flavor(one).accepts_folder) for one in offered)
    found = next((one for one, accepts in takers if accepts is not None and accepts(source.names)), None)
    if found is None:
        raise _unknown_folder(source)
    if found == _PYFUNC and not allow_code:
        # Refused before its files are fetched.
        find_flavor(found).inspect(source.uri, b"", allow_code=False)
    places = {one: source.place(one) for one in source.names}
    files = copy_files(places, limit=limit, where=source.uri, has_uris=not _is_below(source, places))
    return find_flavor(found).inspect(source.uri, files, name=name or _name(source.uri), allow_code=allow_code)


def folder_bytes(uri: str, *, limit: int = MAX_BYTES) -> tuple[bytes, str]:
    """Return the one file in which a registry keeps the model in a folder, and the path of what was read.

    For an MLflow model that is the file of a flavor, for a text encoder an archive.

    :raises ModelError: for a folder of another kind.
    :raises RefusedForSafety: for a folder that runs code when it is loaded.
    """
    source = folder_at(uri, limit=limit)
    if MLMODEL in source.names:
        native = parse_mlmodel(source.read(MLMODEL), where=uri).native
        if native is None:
            find_flavor(_PYFUNC).inspect(uri, b"", allow_code=False)
        assert native is not None
        return source.read(native[1]), source.place(native[1])
    if not is_encoder(source.names):
        raise _unknown_folder(source)
    return pack_folder(source.names, source.read), uri


def _native(
    source: FolderSource, described: MlflowModel, *, name: str | None, flavor: str | None, allow_code: bool
) -> ModelVersion:
    """Return the version of the file of a flavor in an MLflow model."""
    assert described.native is not None
    logged, file = described.native
    data, place = source.read(file), source.place(file)
    try:
        found = detect_bytes(data, where=place, flavor=flavor or "auto", allow_code=allow_code)
    except RefusedForSafety as error:
        error.next_step = (
            f"log the model with the MLflow flavor {logged} in a safe format (scikit-learn: "
            "serialization_format='skops'); or, if you trust whoever made it, set score.allow_code: true"
        )
        raise
    version = find_flavor(found).inspect(place, data, name=name or _name(source.uri), allow_code=allow_code)
    columns = described.features
    has_names = not all(feature.name == f"f{index}" for index, feature in enumerate(version.features))
    if not has_names and len(columns) == len(version.features):
        # The file numbers its columns; the signature names them.
        named = zip(version.features, columns, strict=True)
        version = replace(version, features=tuple(replace(feature, name=one.name) for feature, one in named))
    return version


def _is_below(source: FolderSource, places: Mapping[str, str]) -> bool:
    """Return True if all files are where the folder and their names say."""
    base = source.uri.rstrip("/")
    return all(place == f"{base}/{name}" for name, place in places.items())


def _name(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1] or "model"


def _unknown_folder(source: FolderSource) -> ModelError:
    files = [name for name in source.names if "/" not in name]
    return ModelError(
        "the model is a folder of no known kind" if len(source.names) != 1 else "the model is a folder",
        where=source.uri,
        found=", ".join(files[:8]) + (f" and {len(files) - 8} more" if len(files) > 8 else ""),
        expected="a model file, or the folder of an MLflow model or of a text encoder",
        next_step=f"name the file: {source.place(files[0])}" if files else "give the path of the file in it",
    )
