"""Read what xgboost does not tell about a model: sound trees, names of categories, the version that saved the file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pipeline.errors import ModelError
from pipeline.models.category_names import could_be_cut, split_names
from pipeline.models.trees.xgboost import read_ubj

WHOLE_NAMES = (3, 4, 0)
"""First version of xgboost that stores every name of pandas' categories whole.

Versions 3.1 to 3.3 count characters where the file needs bytes, and lose the end (dmlc/xgboost, pull request 12371)."""
_TAIL = 256
_VERSION = re.compile(rb'"version"\s*:\s*\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]')


@dataclass(frozen=True)
class Document:
    """A model as xgboost writes it, with numpy arrays for arrays of numbers."""

    model: Mapping[str, Any]

    @staticmethod
    def read(booster: Any) -> Document | None:
        """Return the document of a booster; None for a form that `read_ubj` does not know."""
        try:
            document = Document(read_ubj(booster.save_raw("ubj")))
            return document if document.booster else None
        except (ModelError, LookupError, TypeError):
            return None

    @property
    def booster(self) -> str:
        """Name of the booster: gbtree, dart or gblinear."""
        return str(self.model["learner"]["gradient_booster"]["name"])

    @property
    def _trees(self) -> Mapping[str, Any]:
        part = self.model["learner"]["gradient_booster"]
        return part["gbtree"]["model"] if self.booster == "dart" else part["model"]  # type: ignore[no-any-return]

    @property
    def trees(self) -> Sequence[Mapping[str, Any]]:
        """Trees, in the order of their rounds; none for a linear model."""
        return cast(Sequence[Mapping[str, Any]], self._trees.get("trees", ()))

    @property
    def groups(self) -> npt.NDArray[np.int64]:
        """[trees] output that each tree adds to."""
        return np.asarray(self._trees.get("tree_info", ()), np.int64)

    @property
    def trees_per_round(self) -> int:
        """Trees of each boosting round; 0 if rounds differ, or if there are none."""
        sizes = np.unique(np.diff(np.asarray(self._trees.get("iteration_indptr", ()), np.int64)))
        return int(sizes[0]) if len(sizes) == 1 else 0

    @property
    def features(self) -> int:
        """Number of features."""
        return int(self.model["learner"]["learner_model_param"]["num_feature"])

    @property
    def outputs(self) -> int:
        """Values of a margin."""
        parameters = self.model["learner"]["learner_model_param"]
        return max(int(parameters.get("num_target", 1)), int(parameters.get("num_class", 0)), 1)

    @property
    def categories(self) -> Sequence[Mapping[str, Any]]:
        """Stored categories of each feature; empty if the file has none."""
        return cast(Sequence[Mapping[str, Any]], self._trees.get("cats", {}).get("enc", ()))


def tree_problem(document: Document) -> str:
    """Return the first fault of the trees for which a prediction would not end, or would leave its memory; or ""."""
    if len(document.groups) != len(document.trees):
        return f"{len(document.groups)} outputs for {len(document.trees)} trees"
    if ((document.groups < 0) | (document.groups >= document.outputs)).any():
        return f"a tree for an output outside 0 to {document.outputs - 1}"
    for number, tree in enumerate(document.trees):
        if problem := _one_tree_problem(tree, features=document.features):
            return f"tree {number}: {problem}"
    return ""


def _one_tree_problem(tree: Mapping[str, Any], *, features: int) -> str:
    left, right, feature = (
        np.asarray(tree[name], np.int64) for name in ("left_children", "right_children", "split_indices")
    )
    if not 0 < len(left) == len(right) == len(feature):
        return f"{len(left)} left children, {len(right)} right children and {len(feature)} splits"
    reached = np.zeros(len(left), bool)
    level = np.zeros(1, np.int64)
    # One step goes to all nodes of the next level, so that a tree costs as many steps as it is deep.
    while len(level):
        reached[level] = True
        splits = level[left[level] != -1]
        if (right[splits] != left[splits] + 1).any():
            return "a right child that is not next to the left child"
        children = np.concatenate([left[splits], right[splits]])
        if ((children < 1) | (children >= len(left))).any():
            return f"a child outside the nodes 1 to {len(left) - 1}"
        if ((feature[splits] < 0) | (feature[splits] >= features)).any():
            return f"a split on a feature outside 0 to {features - 1}"
        if reached[children].any() or len(np.unique(children)) != len(children):
            return "a node with two parents: the tree leads back to itself"
        level = children
    return ""


def saved_version(data: bytes) -> tuple[int, ...] | None:
    """Return the version of xgboost that saved the file ``data``; None if the file does not tell."""
    match = _VERSION.search(data[-_TAIL:]) or _VERSION.search(data[:_TAIL])
    if match:
        return tuple(int(part) for part in match.groups())
    start = data.rfind(b"L" + (7).to_bytes(8, "big") + b"version", len(data) - _TAIL)
    if start < 0:
        return None
    try:
        return tuple(int(part) for part in read_ubj(b"{" + data[start:])["version"])
    except (ModelError, TypeError, ValueError):
        return None


def read_categories(
    document: Document | None, types: Sequence[str], *, version: tuple[int, ...] | None
) -> dict[str, Any]:
    """Return the facts ``categories``, ``category_bytes`` and ``category_offsets``, one entry per feature.

    Names that may be cut are not in ``categories``: the two others hold what the file has, as hexadecimal digits and
    offsets. All entries of a feature without stored categories are null.

    :param version: version of xgboost that saved the file.
    :raises ValueError: for two categories of one name.
    """
    known: list[list[Any] | None] = [None] * len(types)
    stored: list[str | None] = [None] * len(types)
    bounds: list[list[int]] = [[] for _ in types]
    columns = () if document is None else document.categories
    for index, (kind, column) in enumerate(zip(types, columns, strict=False)):
        if kind != "c":
            continue
        if "offsets" not in column:
            known[index] = np.asarray(column["values"]).tolist()
        elif len(column["offsets"]) > 1:
            offsets = np.asarray(column["offsets"], np.int64).tolist()
            values = np.asarray(column["values"], np.int64).astype(np.int8).tobytes()
            known[index] = _certain_names(offsets, values, version=version)
            if known[index] is None:
                stored[index], bounds[index] = values.hex(), offsets
        if len(set(known[index] or ())) != len(known[index] or ()):
            raise ValueError(f"feature {index} has two categories of one name")
    return {"categories": known, "category_bytes": stored, "category_offsets": bounds}


def _certain_names(offsets: Sequence[int], values: bytes, *, version: tuple[int, ...] | None) -> list[str] | None:
    """Return the names if the file tells them for certain, else None."""
    names = split_names(offsets, values)
    if names is None or values.isascii() or (version is not None and version >= WHOLE_NAMES):
        return names
    return None if could_be_cut(offsets, values) else names
