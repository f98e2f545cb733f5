"""Model formats: detect the format of a file, inspect it, and load it.

A flavor has two functions. ``inspect`` runs once, on the driver, and describes the model. ``load`` runs once in each
worker process and returns the `pipeline.models.model.Predictor`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from pipeline.common.plugins import find_adapter
from pipeline.devices.report import DeviceReport
from pipeline.models.flavors.detect import (
    HEAD_BYTES,
    MAX_BYTES,
    archive_names,
    is_torch_program,
    pickle_kind,
    read_model,
    refused_pickle,
    unknown_format,
)
from pipeline.models.model import DevicePredictor, ModelVersion, Predict, Predictor
from pipeline.spec.model_ref import OutputKind

__all__ = ["BUILT_IN", "MAX_BYTES", "Flavor", "detect", "detect_bytes", "find_flavor", "read_model"]

BUILT_IN = {
    "xgboost": "pipeline.models.flavors.xgboost:FLAVOR",
    "lightgbm": "pipeline.models.flavors.lightgbm:FLAVOR",
    "torch": "pipeline.models.flavors.torch:FLAVOR",
    "transformers": "pipeline.models.flavors.transformers:FLAVOR",
    "sklearn": "pipeline.models.flavors.sklearn:FLAVOR",
    "onnx": "pipeline.models.flavors.onnx:FLAVOR",
    "catboost": "pipeline.models.flavors.catboost:FLAVOR",
    "python": "pipeline.models.flavors.python:FLAVOR",
    "mlflow": "pipeline.models.flavors.mlflow:FLAVOR",
    "endpoint": "pipeline.models.flavors.endpoint:FLAVOR",
}
"""``module:attribute`` of the `Flavor` per name, in the order in which their files are recognised."""


@dataclass(frozen=True)
class Flavor:
    """Functions of one model format."""

    name: str
    inspect: Callable[..., ModelVersion]
    """``inspect(uri, data, *, name=None, allow_code=False)``: describe the model file at ``uri``, which has the bytes
    ``data``, and was loaded once in a child process."""
    load: Callable[..., Predictor]
    """``load(version, data)``: make the predictor from the bytes of the file, after verifying their digest."""
    accepts: Callable[[bytes, tuple[str, ...]], bool]
    """``accepts(head, names)``: True for a file that begins with ``head``, and that contains files of these names if it
    is an archive. Nothing is loaded."""
    accepts_folder: Callable[[tuple[str, ...]], bool] | None = None
    """``accepts_folder(names)``: True for a folder with files of these names. None: the models are single files."""
    describe: Callable[..., Any] | None = None
    """``describe(version, data, *, allow_code)``: load the file in a child process, and return the
    `pipeline.models.flavors.first_load.Described`. None: ``inspect`` has a child of its own."""
    distributions: tuple[str, ...] = ()
    """Distributions whose versions must be the same on driver and workers, beside those of ``libraries``."""
    takes: Literal["matrix", "frame"] = "matrix"
    """Input of ``predict``: a matrix of numbers, in which infinite values are found, or a pandas frame."""
    is_own_code: bool = False
    """True: the code that loads a model is the job's own, as that of its steps: its first load has the network, and as
    much memory as it takes."""
    has_file: bool = True
    """False: the model is a service; its rows are never scored a second time without being asked for."""
    libraries: tuple[str, ...] = ()
    """Modules that ``load`` imports; workers import them while they start."""
    unneeded: tuple[str, ...] = ()
    """Packages that ``libraries`` import if they are installed, and ``load`` and its predictor do without."""
    encodes_by_features: bool = False
    """True if flavor, kinds and categories of the features alone decide how a predictor encodes a table: models with
    equal ones may share a matrix."""
    loaded_factor: Callable[[Any], int] | None = None
    """``loaded_factor(data)``: bytes of the loaded model / bytes of its file, rounded up. None: 10."""
    tree_engine_blockers: Callable[[ModelVersion, OutputKind], tuple[str, ...]] | None = None
    """``tree_engine_blockers(version, kind)``: reasons why the tree engine cannot compute that output. None: the tree
    engine supports no output of this flavor."""
    trees: Callable[[Any, OutputKind], Predict] | None = None
    """``trees(predictor, kind)``: the predictor's ``predict`` on the tree engine."""
    device_blockers: Callable[[ModelVersion, OutputKind], tuple[str, ...]] | None = None
    """``device_blockers(version, kind)``: reasons why a GPU cannot compute that output with the CPU's bits. None: no
    GPU evaluates this flavor."""
    device_report: Callable[[], DeviceReport] | None = None
    """Reports the GPU of this process, and a problem of the flavor's libraries with it."""
    on_device: Callable[..., DevicePredictor] | None = None
    """``on_device(predictor, *, gpu, memory, threads, rows)``: put the model of a predictor on the GPU of this process.
    """


def detect(uri: str) -> str:
    """Return the flavor of the model file at ``uri`` (path or fsspec URL); see `detect_bytes`."""
    return detect_bytes(read_model(uri), where=uri)


def detect_bytes(data: bytes, *, where: str = "", flavor: str = "auto", allow_code: bool = False) -> str:
    """Return the flavor of the bytes of a model file.

    :param flavor: ``auto``, or the only flavor that may be.
    :param allow_code: True: a file that runs code while it is loaded is allowed.
    :raises RefusedForSafety: for a pickle, under any file name, unless code is allowed.
    :raises ModelError: when the format is unknown, or not that of ``flavor``.
    """
    head, names = data[:HEAD_BYTES], archive_names(data)
    # A program of PyTorch has pickles among its files; its flavor refuses it, and says what to save instead.
    kind = "" if is_torch_program(names) else pickle_kind(head)
    if kind and not allow_code:
        raise refused_pickle(kind, where=where)
    offered = BUILT_IN if flavor == "auto" else (flavor,)
    found = next((name for name in offered if find_flavor(name).accepts(head, names)), None)
    if found is None:
        raise unknown_format(data, where=where)
    return found


def find_flavor(name: str) -> Flavor:
    """Return the flavor named ``name``.

    :raises SpecError: when the flavor is unknown.
    """
    return cast(Flavor, find_adapter(name, kind="flavor", built_in=BUILT_IN))
