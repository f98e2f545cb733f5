"""The PyTorch flavor: weights in safetensors with a factory of the user's own, and exported programs (.pt2).

Weights in safetensors hold numbers only; ``module:factory`` makes the module, and its code is pinned like that of
`pipeline.models.flavors.python`. An exported program may hold pickles, which PyTorch opens: it needs ``allow_code``.
Calls run on one thread without gradients, with as many rows as the measured promise says.
"""

from __future__ import annotations

import io
import threading
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.errors import ModelError, PipelineError, RefusedForSafety
from pipeline.models.flavors import Flavor, matrix
from pipeline.models.flavors.detect import is_torch_program
from pipeline.models.flavors.first_load import Described, first_load
from pipeline.models.flavors.library import LibraryPredictor, check_digest, import_or_explain
from pipeline.models.flavors.python import CODE, FILES, import_model
from pipeline.models.flavors.python_declared import declared_features, declared_outputs
from pipeline.models.model import Feature, ModelData, ModelFolder, ModelVersion, OutputType
from pipeline.models.process import threads_wanted
from pipeline.spec.model_ref import OutputKind

SUFFIX = ".safetensors"
_KINDS = ("number", "integer", "indicator", "any")
_NEXT_STEP = "save the weights with safetensors.torch.save_file(module.state_dict(), 'model.safetensors')"
_threads_lock = threading.Lock()


def inspect(uri: str, data: ModelData, *, name: str | None = None, allow_code: bool = False) -> ModelVersion:
    """Describe the model at ``uri``; see `pipeline.models.flavors.first_load.first_load`.

    :raises RefusedForSafety: for an exported program, unless code is allowed.
    """
    _check_allowed(uri, allow_code)
    return first_load("torch", uri, data, name=name, allow_code=allow_code, library="PyTorch")


def describe(version: ModelVersion, data: ModelData, *, allow_code: bool = False) -> Described:
    """Load the module, and describe it. To be called in a child process.

    :raises RefusedForSafety: for an exported program, unless code is allowed.
    :raises ModelError: for weights that are not the module's, or inputs that are not one matrix.
    """
    module, rows, found, outputs = _load_module(version, data, allow_code=allow_code)
    described = replace(version, features=found, task="other", objective="PyTorch", runs_code=True)
    predictor = TorchPredictor(described, module, rows=rows, threads=1)
    return Described(described, predictor, ("prediction",), outputs=outputs)


def load(version: ModelVersion, data: ModelData, *, threads: int | None = None) -> TorchPredictor:
    """Load the predictor for ``version``.

    :param data: an exported program, or a folder with code and weights; their digest is verified before they are read.
    :param threads: threads of one call. Default: ``score.threads``, ``OMP_NUM_THREADS``, or 1.
    :raises ModelDigestMismatch: when ``data`` differs from what was pinned.
    :raises ModelError: when PyTorch is not installed, or cannot read the model.
    """
    check_digest(version, data)
    # The plan says whether code is allowed; the code of a factory is the job's own.
    module, rows, _, _ = _load_module(version, data, allow_code=True)
    return TorchPredictor(version, module, rows=rows, threads=threads or version.threads or threads_wanted())


def _check_allowed(where: str, allow_code: bool) -> None:
    if not allow_code:
        raise RefusedForSafety(
            "loading the exported program runs code in its file",
            where=where,
            found="a .pt2 archive, whose constants and sample inputs may be pickles, and score.allow_code: false",
            expected="weights in safetensors, and module:factory",
            next_step=_NEXT_STEP + "; or, if you trust whoever made the file, set score.allow_code: true",
        )


def _load_module(
    version: ModelVersion, data: ModelData, *, allow_code: bool
) -> tuple[Any, int, tuple[Feature, ...], tuple[OutputType, ...]]:
    """Return the module, its fixed number of rows (0: any), its features, and the outputs that it declares."""
    _check_allowed(version.uri, allow_code)
    torch: Any = import_or_explain("torch", library="PyTorch", extra="torch", where=version.uri)
    try:
        if isinstance(data, ModelFolder):
            return _from_factory(version, data)
        return _from_program(torch, data)
    except (PipelineError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(
            "PyTorch cannot read the model",
            where=version.uri,
            found=f"{type(error).__name__}: {error}"[:300],
            expected="the weights of the module that the factory makes, or a program saved with torch.export.save",
            next_step=_NEXT_STEP,
        ) from error


def _from_factory(
    version: ModelVersion, data: ModelFolder
) -> tuple[Any, int, tuple[Feature, ...], tuple[OutputType, ...]]:
    safetensors: Any = import_or_explain("safetensors.torch", library="safetensors", extra="torch", where=version.uri)
    factory = import_model(version, data)
    module = factory() if not hasattr(factory, "state_dict") else factory
    if not hasattr(module, "load_state_dict"):
        raise ModelError(
            "the factory makes no module of PyTorch",
            where=version.uri,
            found=type(module).__name__,
            expected="a function without arguments that returns a torch.nn.Module, or such a class",
            next_step="fix the factory; a class with predict is a model of the flavor python",
        )
    (weights,) = [name for name in data.names if name.startswith(FILES)]
    module.load_state_dict(safetensors.load(data.read(weights)), strict=True)
    module.eval()
    source = module if hasattr(module, "features") else factory
    features = declared_features(source, where=version.uri)
    if other := [feature.name for feature in features if feature.kind not in _KINDS]:
        raise ModelError(
            "a module of PyTorch takes numbers",
            where=version.uri,
            found=f"{other[0]}: {features[[one.name for one in features].index(other[0])].kind}",
            expected=f"features of the kinds {', '.join(_KINDS)}",
            next_step="encode texts and categories in a map step; or write a model of the flavor python",
        )
    features = tuple(replace(feature, kind="number" if feature.kind == "any" else feature.kind) for feature in features)
    outputs = declared_outputs(source, where=version.uri) if hasattr(source, "outputs") else ()
    return module, 0, features, outputs


def _from_program(torch: Any, data: bytes) -> tuple[Any, int, tuple[Feature, ...], tuple[OutputType, ...]]:
    program = torch.export.load(io.BytesIO(data))
    names = set(program.graph_signature.user_inputs)
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    shapes = [tuple(tensor.shape) for tensor in inputs]
    if (
        len(inputs) != 1
        or len(shapes[0]) != 2
        or not isinstance(shapes[0][1], int)
        or not inputs[0].is_floating_point()
    ):
        raise ModelError(
            "the inputs of the exported program are not columns",
            found=", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in inputs),
            expected="one input [rows, features] of float32",
            next_step="export a module that takes one matrix",
        )
    rows, width = shapes[0]
    features = tuple(Feature(f"f{index}") for index in range(width))
    return program.module(), rows if isinstance(rows, int) else 0, features, ()


class TorchPredictor(LibraryPredictor):
    """A loaded module."""

    def __init__(self, version: ModelVersion, module: Any, *, rows: int, threads: int) -> None:
        super().__init__(version, threads=threads)
        import torch

        self._torch: Any = torch
        self._module = module
        self._rows = rows
        """The only number of rows that a call may have; 0: any."""
        with _threads_lock:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)

    def encode(self, table: pa.Table, *, order: Literal["C", "F"] = "C") -> Any:
        """See `pipeline.models.model.Predictor.encode`: a matrix of float32."""
        return matrix.encode(table, self.version.features, dtype=np.float32)

    def example(self) -> Any:
        """See `pipeline.models.model.Predictor.example`."""
        return np.zeros((1, len(self.version.features)), np.float32)

    def call(self, rows: np.ndarray, kind: OutputKind) -> np.ndarray:
        """Call the module; one for a fixed number of rows gets that many, filled up with the first row."""
        if not self._rows or len(rows) == self._rows:
            return self._run(rows)
        parts = []
        for start in range(0, len(rows), self._rows):
            part = rows[start : start + self._rows]
            places = np.concatenate([np.arange(len(part)), np.zeros(self._rows - len(part), np.int64)])
            parts.append(self._run(part[places])[: len(part)])
        return np.concatenate(parts)

    def _run(self, rows: np.ndarray) -> np.ndarray:
        # PyTorch warns of arrays that cannot be written, and reads them in C order.
        given = self._torch.from_numpy(np.require(rows, requirements=["C", "W"]))
        with self._torch.inference_mode():
            found = self._module(given)
        result: np.ndarray = (found[0] if isinstance(found, (tuple, list)) else found).numpy()
        is_list = any(output.is_list for output in self.version.output_types)
        return result[:, 0] if result.ndim == 2 and result.shape[1] == 1 and not is_list else result


FLAVOR = Flavor(
    "torch",
    inspect,
    load,
    accepts=lambda head, names: is_torch_program(names),
    describe=describe,
    takes="matrix",
    libraries=("torch",),
    distributions=("torch",),
)


def is_factory(names: tuple[str, ...]) -> bool:
    """Return True for the files of ``module:factory``: one file of weights beside the code."""
    files = [name for name in names if name != CODE]
    return len(files) == 1 and files[0].endswith(SUFFIX)
