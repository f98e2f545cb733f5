"""Describe a model independently of its flavor: features, version, predictor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from pipeline.common.digest import digest_json
from pipeline.common.html import html_table
from pipeline.common.text import listed
from pipeline.common.units import format_bytes
from pipeline.devices.inventory import Gpu
from pipeline.devices.report import DeviceProblem
from pipeline.spec.model_ref import OutputKind

Task = Literal["binary", "multiclass", "regression", "ranking", "other"]
FeatureKind = Literal["number", "integer", "indicator", "category", "text", "any"]
"""``text``: a column of strings; ``any``: a column of any type, which the model alone checks."""
PromiseKind = Literal["exact", "fixed", "code"]


@dataclass(frozen=True)
class Feature:
    """One input column of a model."""

    name: str
    kind: FeatureKind = "number"
    categories: tuple[str, ...] | tuple[int, ...] | None = None
    """Values of a category in the order of their codes. None: the model stores no values, and rows contain codes."""
    category_bytes: str | None = None
    """UTF-8 bytes of all names, as hexadecimal digits, where the file may have lost a part; ``categories`` is None."""
    category_offsets: tuple[int, ...] = ()
    """Offsets of these names; see `pipeline.models.category_names`."""


@dataclass(frozen=True)
class OutputType:
    """Type and number of the values that a model gives for a row."""

    kind: OutputKind
    type: str
    """Arrow type by name: ``float32``, ``float64``, ``int32``, ``int64``, ``bool`` or ``string``."""
    width: int
    """Values per row."""
    names: tuple[str, ...] = ()
    """Name of each value, for the names of the columns; empty: they are numbered."""
    is_list: bool | None = None
    """True: the values of a row are one column of fixed-size lists, such as an embedding; None: they are not."""
    types: tuple[str, ...] = ()
    """Arrow type of each value by name, where they are not all of ``type``; a value may then be null."""

    @property
    def arrow(self) -> pa.DataType:
        """``type`` as an Arrow type."""
        return pa.type_for_alias(self.type)

    @property
    def arrow_types(self) -> tuple[pa.DataType, ...]:
        """Arrow type of each value."""
        return tuple(map(pa.type_for_alias, self.types)) or (self.arrow,) * self.width

    def columns(self, prefix: str) -> pa.Schema:
        """Return the columns that receive the values, named for ``prefix``."""
        if self.is_list:
            return pa.schema([(prefix, pa.list_(self.arrow, self.width))])
        if self.names:
            return pa.schema(list(zip((f"{prefix}_{name}" for name in self.names), self.arrow_types, strict=True)))
        names = [prefix] if self.width == 1 else [f"{prefix}_{index}" for index in range(self.width)]
        return pa.schema([(name, self.arrow) for name in names])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the array that `Predictor.predict` returns; object for strings and values of several types."""
        return np.dtype(object if self.type == "string" or self.types else self.arrow.to_pandas_dtype())


@dataclass(frozen=True)
class Promise:
    """Dependence of a row's result on the other rows of its call, as the first load of the model measured it."""

    kind: PromiseKind
    """``exact``: the bits of the library's predict on all rows, whatever the batch. ``fixed``: the same bits in any
    batch, because every call gets ``chunk`` rows. ``code``: nothing is promised."""
    chunk: int = 0
    """For ``fixed``: rows of every call; the last one is filled up with its first row."""
    noise: float = 0.0
    """Largest difference to the library's predict on all rows at once that was measured."""
    rows: int = 0
    """Rows that were measured; 0: the model took none of the rows that were made up for it."""


@dataclass(frozen=True)
class ModelFile:
    """One of the files of a model that is more than one file."""

    name: str
    """Path in the model's folder, with ``/``."""
    sha256: str
    nbytes: int
    uri: str = ""
    """Path or URL of the file; empty: below that of the model."""


@dataclass(frozen=True)
class ModelFolder:
    """The files of a model in a folder of this machine, each verified against its digest."""

    path: str
    files: tuple[ModelFile, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over names, digests and sizes of the files."""
        return files_digest(self.files)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the files, sorted."""
        return tuple(file.name for file in self.files)

    def local(self, name: str) -> Path:
        """Return the path of a file."""
        return Path(self.path) / name

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""
        return self.local(name).read_bytes()


ModelData = bytes | ModelFolder
"""What a flavor loads: the bytes of a file, or a folder."""


def files_digest(files: Sequence[ModelFile]) -> str:
    """Return the digest of a model of several files: SHA-256 over their names, digests and sizes."""
    return digest_json([[file.name, file.sha256, file.nbytes] for file in sorted(files, key=lambda file: file.name)])


@dataclass(frozen=True)
class ModelVersion:
    """An immutable model version. Workers get this description and load the file themselves."""

    name: str
    version: str
    """Number in the registry; for a bare file, the first 12 digits of the digest."""
    uri: str
    """Path or URL of the file or folder, or ``module:Class``."""
    digest: str
    """SHA-256 of the file's bytes; of several ``files``, that of their list."""
    flavor: str
    """Name of the `pipeline.models.flavors` adapter, ``xgboost``."""
    nbytes: int
    """Bytes of the file, or of all files."""
    features: tuple[Feature, ...]
    task: Task
    outputs: int
    """Values per row of ``prediction`` (1, or the number of classes or targets)."""
    objective: str = ""
    """Objective by the library's name."""
    trees: int = 0
    """Trees evaluated per row; 0 for a model without trees."""
    margins: int = 1
    """Values per row of ``margin``: one per class or target, even if ``prediction`` is only the best class."""
    tree_engine_blockers: tuple[str, ...] = ()
    """Reasons, by name, why the tree engine (`pipeline.models.trees`) cannot score the model."""
    device_blockers: tuple[str, ...] = ()
    """Reasons, by name, why no GPU is known to compute the model's margins with the CPU's bits."""
    registry: str = ""
    """Path or URL of the registry that resolved the version. Empty for a bare file."""
    rounds: int = 0
    """Boosting rounds in the file; 0 for a model without trees."""
    trees_per_round: int = 0
    """Trees of each round; 0 if rounds differ."""
    best_iteration: int | None = None
    """Round at which early stopping found the best score, from 0; None if the file names no such round."""
    iteration_range: tuple[int, int] | None = None
    """Boosting rounds [begin, end) that are evaluated; None: all."""
    output_types: tuple[OutputType, ...] = ()
    """Outputs that the model has, by kind; empty for xgboost, see `pipeline.models.outputs`."""
    promise: Promise | None = None
    """Measured promise; None for xgboost, which is ``exact``."""
    runs_code: bool | None = None
    """True if loading the file runs code in it; None: never."""
    threads: int | None = None
    """Threads of one predict call; None: ``OMP_NUM_THREADS``, or 1."""
    files: tuple[ModelFile, ...] = ()
    """Files of a model that is a folder, or Python code with its files; empty for a single file."""
    endpoint: str = ""
    """How a service is called: a `pipeline.spec.endpoint.Endpoint` as JSON; empty for a model with a file."""

    @property
    def key(self) -> tuple[object, ...]:
        """Everything that decides the scores of a row: versions with equal keys may share a `Predictor`."""
        return self.digest, self.iteration_range, self.features, self.threads, self.promise, self.endpoint

    def _repr_html_(self) -> str:
        fields = {
            "file": self.uri,
            "sha256": self.digest[:16],
            "format": f"{self.flavor}, {format_bytes(self.nbytes)}",
            "task": f"{self.task} {self.objective}".strip() + (f", {self.trees:,} trees" if self.trees else ""),
            "features": f"{len(self.features)}: {listed(self.feature_names)}",
        }
        return html_table(f"model {self.name} version {self.version}", fields.items())

    @property
    def reference(self) -> str:
        """Reference to this version: ``models:/churn/3``, or the path of a bare file."""
        return f"models:/{self.name}/{self.version}" if self.registry else self.uri

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the features, in the order of the matrix's columns."""
        return tuple(feature.name for feature in self.features)


NO_MODEL = ModelVersion(
    name="none", version="", uri="", digest="", flavor="", nbytes=0, features=(), task="other", outputs=0
)
"""In place of the model of a job that only prepares data."""


def joint_digest(versions: Sequence[ModelVersion]) -> str:
    """Return one digest for the models of a job: that of the only one, "" without models, else one over all."""
    digests = list(dict.fromkeys(version.digest for version in versions))
    return digests[0] if len(digests) == 1 else digest_json(digests) if digests else ""


Matrix = np.ndarray[tuple[int, int], Any]
"""[rows, features], in the dtype of the flavor: float32 for xgboost, float64 for LightGBM. A flavor that takes frames
has a `pipeline.models.feature_frame.FeatureFrame` in its place."""


class Predict(Protocol):
    """Type of `Predictor.predict` as a function."""

    def __call__(self, matrix: Matrix, *, kind: OutputKind) -> np.ndarray:
        """See `Predictor.predict`."""


class DeviceUnusable(Exception):
    """The GPU of this process cannot evaluate a model."""

    def __init__(self, problem: DeviceProblem, found: str) -> None:
        super().__init__(f"{problem}: {found}")
        self.problem = problem
        self.found = found


class DevicePredictor(Protocol):
    """A model on the GPU of this process. Threads share it."""

    gpu: Gpu
    nbytes: int
    """Bytes of device memory that the model takes."""

    @property
    def batch_rows(self) -> int:
        """Rows of the largest batch that is expected to fit; larger ones are cut."""

    @property
    def peak(self) -> int:
        """Most bytes of the device that were in use after a batch."""

    def encode(self, table: pa.Table) -> Matrix:
        """See `Predictor.encode`; the matrix may be on its way to the device.

        :raises DeviceLost: when the device cannot be used any more: this process must end.
        """

    def may_have_infinite(self, matrix: Matrix, columns: Sequence[int]) -> bool:
        """Return False if no value of ``columns`` is infinite; True if one is, or if the device cannot tell.

        :param matrix: result of the last `encode` in this thread.
        :param columns: ascending.
        :raises DeviceLost: when the device cannot be used any more: this process must end.
        """

    def predict(self, matrix: Matrix, *, kind: OutputKind) -> np.ndarray:
        """See `Predictor.predict`; the same bits as on the CPU.

        :raises DeviceLost: when the device cannot be used any more: this process must end.
        :raises DeviceOutOfMemory: when the smallest batch does not fit.
        """


class Predictor(Protocol):
    """A loaded model. One object serves all threads of a worker process."""

    version: ModelVersion

    def encode(self, table: pa.Table, *, order: Literal["C", "F"] = "C") -> Matrix:
        """Make the matrix for `predict` from a table of exactly the model's feature columns, in its order.

        :param order: memory order of the matrix. `predict` accepts both; xgboost is faster with C.
        :returns: [rows, features] in the flavor's dtype; missing values are NaN, categories their codes.
        """

    def example(self) -> Matrix:
        """Return one row as `encode` makes it, for a first call."""

    def predict(self, matrix: Matrix, *, kind: OutputKind) -> np.ndarray:
        """Score ``matrix``, which `encode` made.

        :returns: [rows] or [rows, k] of the type and width of `pipeline.models.outputs.output_type`. For xgboost:
            float32, and int32 for ``leaf`` (k = trees) and ``label``. For ``contributions``, k = features + 1 with the
            bias last; for multi-class, k = classes × (features + 1).
        """

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return True if ``error``, which `predict` raised, says that memory ran out: a call with fewer rows may work.

        Libraries raise errors of wide types for it, so that only the message tells. `MemoryError` counts anyway.
        """
