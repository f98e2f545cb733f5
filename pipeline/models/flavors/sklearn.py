"""The scikit-learn flavor: skops files with types of a list, and pickles where the job allows code.

Scores are those of ``predict``, ``predict_proba`` and ``decision_function`` on a frame with the training columns, with
the bits that the measured promise says. Estimators of BLAS get calls of one size on one thread.
"""

from __future__ import annotations

import io
import threading
import warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import EnvMismatch, ModelError, RefusedForSafety
from pipeline.models.feature_frame import FeatureFrame
from pipeline.models.flavors import Flavor
from pipeline.models.flavors.detect import pickle_kind
from pipeline.models.flavors.first_load import Described, first_load
from pipeline.models.flavors.library import LibraryPredictor, check_digest, import_or_explain
from pipeline.models.flavors.matrix import category_values
from pipeline.models.flavors.sklearn_columns import Columns, columns_of
from pipeline.models.flavors.sklearn_types import TRUSTED
from pipeline.models.flavors.thread_pools import POOLS
from pipeline.models.model import Feature, ModelVersion, OutputType, Predict, Task
from pipeline.models.process import threads_wanted
from pipeline.models.trees import TreeEngine
from pipeline.models.trees.sklearn import read_sklearn, sklearn_output, sklearn_rows, unsupported_sklearn
from pipeline.spec.model_ref import OutputKind

_EXPECTED = "a fitted estimator, saved with skops.io.dump(model, 'model.skops')"
_OF_TREES = ("prediction", "probabilities")
_load_lock = threading.Lock()


def inspect(uri: str, data: bytes, *, name: str | None = None, allow_code: bool = False) -> ModelVersion:
    """Describe the model file at ``uri``; see `pipeline.models.flavors.first_load.first_load`."""
    return first_load("sklearn", uri, data, name=name, allow_code=allow_code, library="scikit-learn")


def describe(version: ModelVersion, data: bytes, *, allow_code: bool = False) -> Described:
    """Load the file, and describe the model. To be called in a child process.

    :raises RefusedForSafety: for a file that would run code, unless it is allowed.
    :raises EnvMismatch: for a model of another minor version of scikit-learn.
    :raises ModelError: when the file is damaged, or holds no fitted estimator.
    """
    model, runs_code = _read(data, where=version.uri, allow_code=allow_code)
    if not hasattr(model, "predict"):
        raise ModelError(
            "the file holds no model", found=type(model).__name__, expected=_EXPECTED, next_step="save a fitted model"
        )
    base: Any = import_or_explain("sklearn.base", library="scikit-learn", extra="sklearn", where=version.uri)
    is_classifier = bool(base.is_classifier(model))
    columns = columns_of(model)
    classes = getattr(model, "classes_", None) if is_classifier else None
    count = 0 if classes is None or isinstance(classes, list) else len(classes)
    task: Task = "regression" if base.is_regressor(model) else "other"
    if count:
        task = "binary" if count == 2 else "multiclass"
    blockers = unsupported_sklearn(model)
    described = replace(
        version,
        features=columns.features,
        task=task,
        objective=_objective(model),
        trees=0 if blockers else _trees(model),
        tree_engine_blockers=tuple(blockers),
        runs_code=True if runs_code else None,
    )
    predictor = SklearnPredictor(described, model, columns, threads=1)
    kinds: list[OutputKind] = ["prediction"]
    if count:
        kinds += ["label", *(["probabilities"] if hasattr(model, "predict_proba") else [])]  # type: ignore[list-item]
    if hasattr(model, "decision_function"):
        kinds.append("margin")
    return Described(described, predictor, tuple(kinds), columns.values, _usual_outputs(model, count))


def _objective(model: Any) -> str:
    names = [type(model).__name__]
    if names[0] == "Pipeline":
        names += [type(step).__name__ for _, step in model.steps]
    return " ".join(names)[:200]


def _trees(model: Any) -> int:
    """Return the number of trees of an ensemble that the tree engine can score."""
    if hasattr(model, "_predictors"):
        return sum(map(len, model._predictors))
    return int(np.size(model.estimators_))


def _usual_outputs(model: Any, classes: int) -> tuple[OutputType, ...]:
    """Return the outputs to assume where made-up rows are refused."""
    if classes and hasattr(model, "predict_proba"):
        probabilities = OutputType("probabilities", "float64", classes)
        return (OutputType("prediction", "float64", 1 if classes == 2 else classes), probabilities)
    return () if classes else (OutputType("prediction", "float64", 1),)


def load(version: ModelVersion, data: bytes, *, threads: int | None = None) -> SklearnPredictor:
    """Load the predictor for ``version``.

    :param data: bytes of the model file; their digest is verified before they are parsed.
    :param threads: threads of BLAS and OpenMP in a call. Default: ``score.threads``, ``OMP_NUM_THREADS``, or 1.
    :raises ModelDigestMismatch: when ``data`` differs from the pinned file.
    :raises ModelError: when scikit-learn or skops is not installed, or cannot read the file.
    :raises EnvMismatch: for a model of another minor version of scikit-learn.
    """
    check_digest(version, data)
    model, _ = _read(data, where=version.uri, allow_code=bool(version.runs_code))
    return SklearnPredictor(version, model, columns_of(model), threads=threads or version.threads or threads_wanted())


def _read(data: bytes, *, where: str, allow_code: bool) -> tuple[Any, bool]:
    """Return the estimator in a file, and True if loading it ran code of the file."""
    import_or_explain("sklearn", library="scikit-learn", extra="sklearn", where=where)
    try:
        with _load_lock, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = _unpickle(data, where, allow_code) if pickle_kind(data[:1024]) else _skops(data, where, allow_code)
    except (ModelError, RefusedForSafety, MemoryError):
        raise
    except Exception as error:
        raise ModelError(
            "scikit-learn cannot read the model",
            where=where,
            found=f"{type(error).__name__}: {error}"[:300],
            expected=_EXPECTED,
            next_step="copy the file again, or save the model again",
        ) from error
    for warning in caught:
        _check_version(warning.message, where)
    return found


def _unpickle(data: bytes, where: str, allow_code: bool) -> tuple[Any, bool]:
    if not allow_code:
        raise RefusedForSafety(
            "loading the model runs code in its file",
            where=where,
            found="a pickle, and score.allow_code: false",
            expected=_EXPECTED,
            next_step="save it with skops.io.dump(model, 'model.skops'); or, if you trust whoever made the file, "
            "set score.allow_code: true",
        )
    joblib: Any = import_or_explain("joblib", library="joblib", extra="sklearn", where=where)
    return joblib.load(io.BytesIO(data)), True


def _skops(data: bytes, where: str, allow_code: bool) -> tuple[Any, bool]:
    skops: Any = import_or_explain("skops.io", library="skops", extra="sklearn", where=where)
    unknown = [name for name in skops.get_untrusted_types(data=data) if name not in TRUSTED]
    if unknown and not allow_code:
        raise RefusedForSafety(
            "the model file holds types that are not known to be safe",
            where=where,
            found=", ".join(unknown[:10]),
            expected="types of scikit-learn, numpy and scipy that only hold numbers",
            next_step="leave them out of the model; or, if you trust whoever made the file, set score.allow_code: true",
        )
    return skops.loads(data, trusted=[*TRUSTED, *unknown]), bool(unknown)


def _check_version(warning: Any, where: str) -> None:
    saved = getattr(warning, "original_sklearn_version", None)
    if saved is None:
        return
    current = str(warning.current_sklearn_version)
    if str(saved).split(".")[:2] != current.split(".")[:2]:
        raise EnvMismatch(
            "the model was saved with another version of scikit-learn",
            where=where,
            found=f"scikit-learn {saved} in the file, {current} here",
            expected=f"scikit-learn {'.'.join(str(saved).split('.')[:2])}",
            next_step="install that version for driver and workers, or train the model again with the version here",
        )


class SklearnPredictor(LibraryPredictor):
    """A loaded estimator."""

    def __init__(self, version: ModelVersion, model: Any, columns: Columns, *, threads: int) -> None:
        super().__init__(version, threads=threads)
        self.model = model
        self._columns = columns
        self._is_classifier = version.task in ("binary", "multiclass")
        is_exact = version.promise is not None and version.promise.kind == "exact"
        self._pools: Any = nullcontext if is_exact else partial(POOLS.hold, threads)

    def encode(self, table: pa.Table, *, order: Literal["C", "F"] = "C") -> Any:
        """See `pipeline.models.model.Predictor.encode`: a frame, as pandas reads the columns from a file."""
        import pandas as pd

        columns = {
            name: _series(table.column(index), feature, is_category=feature.name in self._columns.categorical)
            for index, (name, feature) in enumerate(
                zip((one.name for one in self._columns.features), self.version.features, strict=True)
            )
        }
        return FeatureFrame(pd.DataFrame(columns, copy=False))

    def example(self) -> Any:
        """See `pipeline.models.model.Predictor.example`."""
        from pipeline.models.flavors.measure import sample_table

        return self.encode(sample_table(self.version.features, 1, values=self._columns.values))

    def call(self, rows: FeatureFrame, kind: OutputKind) -> np.ndarray:
        """Call the estimator; see `pipeline.models.model.Predictor.predict`."""
        import joblib

        given = self._given(rows.frame)
        # Estimators with n_jobs would add the results of their threads in the order in which these end.
        with self._pools(), joblib.parallel_config(backend="sequential"):
            return np.asarray(self._results(given, kind))

    def _given(self, frame: Any) -> Any:
        if self._columns.form == "texts":
            return frame.iloc[:, 0]
        return frame if self._columns.form == "frame" else frame.to_numpy(np.float64)

    def _results(self, given: Any, kind: OutputKind) -> Any:
        if kind == "margin":
            return self.model.decision_function(given)
        has_probabilities = self._is_classifier and hasattr(self.model, "predict_proba")
        if kind == "probabilities" or (kind == "prediction" and has_probabilities):
            found = self.model.predict_proba(given)
            return found if kind == "probabilities" or found.shape[1] != 2 else np.ascontiguousarray(found[:, 1])
        return self.model.predict(given)


def _series(column: pa.ChunkedArray, feature: Feature, *, is_category: bool) -> Any:
    """Return a column as a pandas Series whose dtype does not depend on which rows are missing, if it is a number."""
    import pandas as pd

    kind, types = column.type, pa.types
    if types.is_dictionary(kind):
        column, kind = pc.cast(column, kind.value_type), kind.value_type
    if is_category and feature.categories is not None:
        known = category_values(feature)
        codes = pc.fill_null(pc.index_in(pc.cast(column, known.type, safe=False), value_set=known), -1)
        return pd.Series(pd.Categorical.from_codes(codes.to_numpy(), categories=known.to_pandas()))
    if feature.kind in ("number", "integer", "indicator") and not types.is_float32(kind):
        numbers = column if types.is_null(kind) else pc.cast(column, pa.float64(), safe=False)
        return pd.Series(np.full(len(column), np.nan) if types.is_null(kind) else numbers.to_numpy())
    return column.to_pandas()


def tree_engine_blockers(version: ModelVersion, kind: OutputKind) -> tuple[str, ...]:
    """Return the reasons why the tree engine cannot compute ``kind`` with scikit-learn's bits; empty if it can."""
    return version.tree_engine_blockers if kind in _OF_TREES else (f"the output {kind}",)


def tree_predict(predictor: SklearnPredictor, kind: OutputKind) -> Predict:
    """Return ``predictor.predict`` for ``kind`` on the tree engine, with the same number of threads.

    :raises ModelError: when the engine cannot read the trees, or is not installed.
    """
    model, threads = predictor.model, predictor.threads
    engine = TreeEngine(read_sklearn(model), transform=sklearn_output(model))
    is_binary = predictor.version.task == "binary"

    def predict(matrix: Any, *, kind: OutputKind) -> np.ndarray:
        given = predictor._given(matrix.frame)
        scores = engine.predict(sklearn_rows(model, given), threads=threads)
        return np.ascontiguousarray(scores[:, 1]) if is_binary and kind == "prediction" else scores

    return predict


def _is_sklearn(head: bytes, names: tuple[str, ...]) -> bool:
    return "schema.json" in names or bool(pickle_kind(head))


FLAVOR = Flavor(
    "sklearn",
    inspect,
    load,
    accepts=_is_sklearn,
    describe=describe,
    takes="frame",
    libraries=("sklearn", "skops.io"),
    distributions=("scikit-learn", "skops", "scipy", "joblib"),
    tree_engine_blockers=tree_engine_blockers,
    trees=tree_predict,
)
