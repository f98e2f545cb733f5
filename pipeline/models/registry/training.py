"""Distributions of the data that a version was trained with: a baseline for the publish gate."""

from __future__ import annotations

import json
from collections.abc import Collection

from pipeline.common.digest import digest_bytes
from pipeline.common.sketch import MOST_COLUMNS, Sketches
from pipeline.errors import StateCorrupt
from pipeline.models.model import ModelVersion
from pipeline.models.registry import is_mlflow, open_registry
from pipeline.storage.store import Store, open_store

SCHEMA_VERSION = 1


def training_bytes(sketches: Sketches, features: Collection[str]) -> bytes:
    """Return the file of distributions: those of the features, then of other columns while there is room."""
    order = sorted(sketches.columns, key=lambda name: name not in features)[:MOST_COLUMNS]
    kept = Sketches()
    kept.columns.update({name: sketches.columns[name] for name in order})
    return json.dumps({"schema_version": SCHEMA_VERSION, **kept.pack()}).encode()


def training_path(name: str, data: bytes) -> str:
    """Return the path of a file of distributions in the registry."""
    return f"{name}/files/{digest_bytes(data)}.training.json"


def training_sketches(version: ModelVersion) -> Sketches | None:
    """Return the distributions of the data that a version was trained with; None if its registry has none.

    :raises StateCorrupt: if their file is missing or damaged.
    """
    if not version.registry or is_mlflow(version.registry) or not version.version.isdecimal():
        return None
    record = open_registry(version.registry).version(version.name, int(version.version))
    return read_training(open_store(version.registry), record.training) if record.training else None


def read_training(store: Store, path: str) -> Sketches:
    """Return the distributions of a file in the registry.

    :raises StateCorrupt: if it is missing or damaged.
    """
    sketches = Sketches()
    try:
        data = store.read(path)
        if digest_bytes(data) not in path:
            raise ValueError("other bytes than those that were registered")
        sketches.add_packed(json.loads(data))
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateCorrupt(
            "the distributions of a model's training data are damaged",
            where=store.url(path),
            found=f"{type(error).__name__}: {error}",
            expected="the file that was written when the version was registered",
            next_step="restore the file, or register the model once more with --again and --training",
        ) from error
    return sketches
