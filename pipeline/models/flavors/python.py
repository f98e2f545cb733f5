"""The Python flavor: a class, a function or an object of the user's own, with declared features and outputs.

The code is pinned by its sources, and workers import these, apart from the modules of other jobs. Nothing is promised
about the bits of a row: how far they depend on the batch is measured, and said.
"""

from __future__ import annotations

import inspect as reflection
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.common.step_modules import StepModules
from pipeline.errors import ModelError, PipelineError, RefusedForSafety
from pipeline.models.feature_frame import FeatureFrame
from pipeline.models.flavors import Flavor
from pipeline.models.flavors.first_load import Described, first_load
from pipeline.models.flavors.library import LibraryPredictor, check_digest
from pipeline.models.flavors.matrix import category_values
from pipeline.models.flavors.python_archive import MANIFEST, PythonArchive
from pipeline.models.flavors.python_declared import declared_features, declared_outputs
from pipeline.models.flavors.python_results import result_values, wrong_result
from pipeline.models.flavors.thread_pools import POOLS
from pipeline.models.model import Feature, ModelData, ModelFolder, ModelVersion
from pipeline.models.process import threads_wanted
from pipeline.spec.model_ref import OutputKind

CODE = "code.zip"
"""Name of the archive among the files of a model that has others."""
FILES = "files/"
"""Folder of the files that ``load`` gets."""
_EXPECTED = "a class with predict(frame), or a function of a frame"


def inspect(uri: str, data: ModelData, *, name: str | None = None, allow_code: bool = False) -> ModelVersion:
    """Describe the model ``uri``; see `pipeline.models.flavors.first_load.first_load`."""
    return first_load("python", uri, data, name=name, allow_code=allow_code, library="Python")


def describe(version: ModelVersion, data: ModelData, *, allow_code: bool = False) -> Described:
    """Import the code, load the model, and return what it declares. To be called in a child process.

    :raises RefusedForSafety: unless code is allowed.
    :raises StepFailed: if the code cannot be imported.
    :raises ModelError: for an object that is no model, or declares no features.
    """
    if not allow_code:
        raise RefusedForSafety(
            "loading the model runs code in its file",
            where=version.uri,
            found="an archive of Python code, and score.allow_code: false",
            expected="module:Class, whose code is the job's own",
            next_step="write model: module:Class; or, if you trust whoever made the file, set score.allow_code: true",
        )
    model = _load_model(version, data)
    outputs = declared_outputs(model, where=version.uri)
    kinds = {output.kind for output in outputs}
    described = replace(
        version,
        features=declared_features(model, where=version.uri),
        output_types=outputs,
        task="multiclass" if "probabilities" in kinds else "other",
        objective=type(model).__name__ if not reflection.isfunction(model) else model.__name__,
        runs_code=True,
    )
    predictor = PythonPredictor(described, model, threads=1)
    return Described(described, predictor, tuple(output.kind for output in outputs), outputs=outputs, is_declared=True)


def load(version: ModelVersion, data: ModelData, *, threads: int | None = None) -> PythonPredictor:
    """Load the predictor for ``version``.

    :param data: the archive, or a folder with it and other files; their digest is verified before anything runs.
    :param threads: threads of BLAS and OpenMP in a call. Default: ``score.threads``, ``OMP_NUM_THREADS``, or 1.
    :raises ModelDigestMismatch: when ``data`` differs from what was pinned.
    :raises StepFailed: if the code cannot be imported.
    """
    check_digest(version, data)
    return PythonPredictor(version, _load_model(version, data), threads=threads or version.threads or threads_wanted())


def import_model(version: ModelVersion, data: ModelData, *, with_files: bool = False) -> Any:
    """Import the object, class or function of an archive with exactly its sources.

    :param with_files: True: make an object of a class, and call its ``load`` with the other files.
    """
    archive = PythonArchive.from_bytes(data.read(CODE) if isinstance(data, ModelFolder) else data, where=version.uri)
    # No such folder is there: the sources come from memory, and messages name it.
    folder = f"{data.path if isinstance(data, ModelFolder) else ''}/{version.digest[:12]}.zip"
    modules = StepModules(archive.steps(folder), import_paths=(folder,), sources=archive.sources)
    with modules.activated():
        model: Any = _unpickled(archive.pickled, version) if archive.pickled else modules.function(archive.entrypoint)
        if with_files and isinstance(model, type):
            model = _called(model, version, "the class of the model cannot be made")
        if with_files and hasattr(model, "load") and not archive.pickled:
            _called(lambda: model.load(_paths(data)), version, "load of the model failed")
    return model


def _paths(data: ModelData) -> dict[str, Path]:
    if not isinstance(data, ModelFolder):
        return {}
    return {name.removeprefix(FILES): data.local(name) for name in data.names if name.startswith(FILES)}


def _load_model(version: ModelVersion, data: ModelData) -> Any:
    """Return the object, or the function, with its files loaded."""
    model = import_model(version, data, with_files=True)
    if not callable(getattr(model, "predict", model)):
        raise ModelError("not a model", where=version.uri, found=type(model).__name__, expected=_EXPECTED)
    return model


def _unpickled(data: bytes, version: ModelVersion) -> Any:
    import cloudpickle

    return _called(lambda: cloudpickle.loads(data), version, "the object of the model cannot be unpickled")


def _called(function: Callable[[], Any], version: ModelVersion, message: str) -> Any:
    try:
        return function()
    except (PipelineError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(
            message,
            where=version.uri,
            found=f"{type(error).__name__}: {error}"[:300],
            expected="a class that is made without arguments, and load(files), which gets the path of each file by "
            "its name",
            next_step="fix the code of the model",
        ) from error


class PythonPredictor(LibraryPredictor):
    """A model in Python. Its ``predict`` gets a pandas frame with the columns of its features."""

    def __init__(self, version: ModelVersion, model: Any, *, threads: int) -> None:
        super().__init__(version, threads=threads)
        self._predict: Callable[[Any], Any] = getattr(model, "predict", model)
        self._outputs = {output.kind: output for output in version.output_types}

    def encode(self, table: pa.Table, *, order: Literal["C", "F"] = "C") -> Any:
        """See `pipeline.models.model.Predictor.encode`: a frame whose dtypes do not depend on its rows."""
        import pandas as pd

        columns = {
            feature.name: _series(table.column(index), feature) for index, feature in enumerate(self.version.features)
        }
        return FeatureFrame(pd.DataFrame(columns, copy=False))

    def example(self) -> Any:
        """See `pipeline.models.model.Predictor.example`."""
        from pipeline.models.flavors.measure import sample_table

        return self.encode(sample_table(self.version.features, 1))

    def call(self, rows: FeatureFrame, kind: OutputKind) -> np.ndarray:
        """Call the model, and return the result of ``kind`` in the type that it declares."""
        frame = rows.frame.reset_index(drop=True)
        with POOLS.hold(self.threads):
            result = self._predict(frame)
        output = self._outputs[kind]
        if len(self._outputs) > 1:
            if not isinstance(result, Mapping) or kind not in result:
                raise wrong_result(result, f"a mapping with the key {kind!r}: the model declares several outputs")
            result = result[kind]
        values = result_values(result, output.names, rows=len(frame))
        is_flat = output.width == 1 and not output.is_list
        shape = (len(frame),) if is_flat else (len(frame), output.width)
        if is_flat and values.shape == (len(frame), 1):
            values = values[:, 0]
        if values.shape != shape:
            raise wrong_result(result, f"{output.type} {list(shape)}, as declared: one result a row", values)
        if output.type == "string":
            texts = values.astype(object)
            if not all(isinstance(text, str) for text in texts.flat):
                raise wrong_result(result, "texts, as declared", values)
            return texts
        if not np.can_cast(values.dtype, output.dtype, casting="same_kind"):
            raise wrong_result(result, f"{output.type}, as declared", values)
        return values.astype(output.dtype, copy=False)


def _series(column: pa.ChunkedArray, feature: Feature) -> Any:
    """Return a column as a Series whose dtype depends on its type and the feature alone."""
    import pandas as pd

    kind, types = column.type, pa.types
    if types.is_dictionary(kind):
        column, kind = pc.cast(column, kind.value_type), kind.value_type
    if feature.categories is not None:
        known = category_values(feature)
        codes = pc.fill_null(pc.index_in(pc.cast(column, known.type, safe=False), value_set=known), -1)
        return pd.Series(pd.Categorical.from_codes(codes.to_numpy(), categories=known.to_pandas()))
    if feature.kind == "number" and not types.is_float32(kind):
        return pd.Series(pc.cast(column, pa.float64(), safe=False).to_numpy())
    if feature.kind == "integer" and not types.is_integer(kind):
        column, kind = pc.cast(column, pa.int64()), pa.int64()
    if feature.kind == "indicator":
        column, kind = pc.cast(column, pa.bool_()), pa.bool_()
    return column.to_pandas(types_mapper=_nullable)


def _nullable(kind: pa.DataType) -> Any:
    """Return the dtype of pandas that has nulls of its own, for integers and flags."""
    import pandas as pd

    if pa.types.is_boolean(kind):
        return pd.BooleanDtype()
    if pa.types.is_integer(kind):
        return pd.api.types.pandas_dtype(str(kind).replace("int", "Int").replace("u", "U"))
    return None


FLAVOR = Flavor(
    "python",
    inspect,
    load,
    accepts=lambda head, names: MANIFEST in names,
    describe=describe,
    takes="frame",
    is_own_code=True,
)
