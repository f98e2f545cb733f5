"""Read what LightGBM's model text tells: features, categories, objective, and whether the text is whole."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import ModelError
from pipeline.models.model import Feature, ModelVersion, Task

_TASKS: dict[str, Task] = {
    "binary": "binary",
    "multiclass": "multiclass",
    "multiclassova": "multiclass",
    "cross_entropy": "regression",
    "cross_entropy_lambda": "regression",
    "lambdarank": "ranking",
    "rank_xendcg": "ranking",
    "custom": "other",
}
"""Task by objective; all others are regressions."""
_EXPECTED = "a file as booster.save_model wrote it"
_SAVE_AGAIN = "copy the file again, or save the model again with booster.save_model('model.txt')"


@dataclass(frozen=True)
class ModelText:
    """The text of a model, and the fields of its head."""

    text: str
    names: tuple[str, ...]
    infos: tuple[str, ...]
    """Values of each feature in the training data: ``[low:high]``, codes as ``-1:2:0``, or ``none`` for a constant."""
    objective: str
    trees: int
    outputs: int
    """Trees of each iteration."""
    pandas_categories: tuple[tuple[Any, ...], ...] | None
    """Categories of each column of the training frame that was categorical, in the frame's order; None: the model was
    not trained on a frame."""

    @property
    def classes(self) -> int:
        """Number of classes; 0 for a model without."""
        return {"binary": 2, "multiclass": self.outputs}.get(self.task, 0)

    @property
    def task(self) -> Task:
        """Task by the objective's name."""
        return _TASKS.get(self.objective, "regression")

    def describe(self, version: ModelVersion, *, blockers: Sequence[str]) -> ModelVersion:
        """Return ``version`` with what the text tells.

        :param blockers: reasons why the tree engine cannot score the model.
        :raises ModelError: when the columns of the categories are not known.
        """
        return replace(
            version,
            features=self._features(),
            task=self.task,
            objective=self.objective,
            trees=self.trees,
            rounds=self.trees // self.outputs,
            trees_per_round=self.outputs,
            tree_engine_blockers=tuple(blockers),
        )

    def _features(self) -> tuple[Feature, ...]:
        known = self._categories()
        return tuple(
            Feature(name, "category", known[name]) if name in known else Feature(name, _kind(info))
            for name, info in zip(self.names, self.infos, strict=True)
        )

    def _categories(self) -> dict[str, Any]:
        """Return the names of the categories of each feature that was a categorical column of a frame."""
        if not self.pandas_categories:
            return {}
        certain = [name for name, info in zip(self.names, self.infos, strict=True) if _kind(info) == "category"]
        likely = [name for name, info in zip(self.names, self.infos, strict=True) if info[:1] != "["]
        count = len(self.pandas_categories)
        columns = next((found for found in (certain, likely) if len(found) == count), None)
        if columns is None:
            raise ModelError(
                "the model file does not tell which columns its categories belong to",
                found=f"categories of {count} columns, and {len(certain)} categorical features: "
                + (", ".join(certain[:10]) or "none"),
                expected="one list of categories for each categorical feature",
                next_step="train without ordered categories and without categorical columns of integers beside them, "
                "or with codes in place of categories",
            )
        return {name: _values(name, values) for name, values in zip(columns, self.pandas_categories, strict=True)}


def _kind(info: str) -> Any:
    return "category" if info[:1] != "[" and info != "none" else "number"


def _values(name: str, values: Sequence[Any]) -> tuple[Any, ...]:
    if all(isinstance(value, str) for value in values) or all(type(value) is int for value in values):
        return tuple(values)
    raise ModelError(
        f"the categories of the feature {name!r} are neither texts nor integers",
        found=", ".join(map(repr, values[:5])),
        expected="texts only, or integers only",
        next_step="train again with the column as text",
    )


def read_text(data: bytes, *, where: str) -> ModelText:
    """Read the head and the end of a model text.

    :raises ModelError: for a text that is damaged or cut off.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _damaged(f"bytes that are not UTF-8: {error}", where) from error
    head, end, rest = text.partition("\nend of trees")
    fields = {
        name: value for name, _, value in (line.partition("=") for line in head.partition("\nTree=")[0].split("\n"))
    }
    tail = rest.rstrip().rpartition("\n")[2]
    if not end or not ("\nend of parameters" in rest or tail.startswith("pandas_categorical:")):
        raise _damaged("a text that is cut off", where)
    if "pandas_categorical:" in rest and not tail.startswith("pandas_categorical:"):
        raise _damaged("a text with something behind its categories", where)
    names, infos = tuple(fields.get("feature_names", "").split()), tuple(fields.get("feature_infos", "").split())
    outputs, last = fields.get("num_tree_per_iteration", ""), fields.get("max_feature_idx", "")
    if not outputs.isdecimal() or not int(outputs) or last != str(len(names) - 1) or len(infos) != len(names):
        raise _damaged(f"{len(names)} names and {len(infos)} ranges for {last or 'no'} + 1 features", where)
    if len(set(names)) != len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise _damaged(f"the feature {twice!r} more than once", where)
    return ModelText(
        text=text,
        names=names,
        infos=infos,
        objective=fields.get("objective", "custom").split(" ")[0],
        trees=len(fields.get("tree_sizes", "").split()),
        outputs=int(outputs),
        pandas_categories=_pandas_categories(tail, where),
    )


def _pandas_categories(line: str, where: str) -> tuple[tuple[Any, ...], ...] | None:
    if not line.startswith("pandas_categorical:"):
        return None
    try:
        found = json.loads(line.partition(":")[2])
        return None if found is None else tuple(map(tuple, found))
    except (ValueError, TypeError) as error:
        raise _damaged(f"categories that cannot be read: {error}", where) from error


def _damaged(found: str, where: str) -> ModelError:
    return ModelError(
        "the LightGBM model is damaged", where=where, found=found, expected=_EXPECTED, next_step=_SAVE_AGAIN
    )
