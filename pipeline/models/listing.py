"""List the models that exist for a name with ``{}`` in place of a key: files, or models of a registry."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator

from pipeline.errors import ModelError, SpecError
from pipeline.models.registry import DEFAULT_ROOT, open_registry
from pipeline.spec.fields import KEY_PLACEHOLDER
from pipeline.spec.model_ref import ModelRef
from pipeline.storage.urls import file_system, is_local_path, local_path, storage_errors

_WILDCARDS = "*?["


def list_models(name: str, *, registry: str = DEFAULT_ROOT, cache: str = "") -> dict[str, str]:
    """Return the reference of each model that exists, by key, in order of the keys.

    :param name: path, URL or model reference with ``{}`` once.
    :param registry: see `pipeline.models.registry.open_registry`.
    :raises ModelError: if there is none.
    """
    if not ModelRef(name).is_file:
        found = dict(_in_registry(name, registry, cache))
    elif is_local_path(name):
        found = dict(_local_files(str(local_path(name))))
    else:
        found = dict(_remote_files(name))
    if not found:
        raise ModelError(
            "there is no model for any key",
            where=name,
            found="no such model",
            expected=f"at least one, with a value of score.by in place of {KEY_PLACEHOLDER}",
            next_step="check the path; or list the models: {key: model, …}",
        )
    return dict(sorted(found.items()))


def _local_files(name: str) -> Iterator[tuple[str, str]]:
    before, after = name.split(KEY_PLACEHOLDER)
    for path in glob.iglob(f"{glob.escape(before)}*{glob.escape(after)}"):
        key = path[len(before) : len(path) - len(after)]
        if key and os.path.isfile(path):
            yield key, path


def _remote_files(name: str) -> Iterator[tuple[str, str]]:
    if set(name) & set(_WILDCARDS):
        raise SpecError(
            "a listing of models has a wildcard beside the key",
            where="score.models",
            found=name,
            expected=f"one {KEY_PLACEHOLDER}, and none of {' '.join(_WILDCARDS)}",
            next_step="rename the folder, or list the models: {key: model, …}",
        )
    system, pattern = file_system(name.replace(KEY_PLACEHOLDER, "*"))
    before, after = pattern.split("*")
    with storage_errors(name):
        system.invalidate_cache()
        matches = system.glob(pattern, detail=True)
    for path, info in matches.items():
        key = path[len(before) : len(path) - len(after)]
        if key and info.get("type") == "file":
            yield key, name.replace(KEY_PLACEHOLDER, key)


def _in_registry(name: str, root: str, cache: str) -> Iterator[tuple[str, str]]:
    registry = open_registry(root, cache=cache)
    pattern = name.removeprefix("models:/")
    end = max(pattern.rfind("@"), pattern.rfind("/"))
    before, after = pattern[:end].split(KEY_PLACEHOLDER)
    for model in registry.names():
        key = model[len(before) : len(model) - len(after)]
        if not key or model != f"{before}{key}{after}":
            continue
        reference = name.replace(KEY_PLACEHOLDER, key)
        try:
            registry.lookup(ModelRef(reference))
        except ModelError:  # a model without this alias or version
            continue
        yield key, reference
