"""Load a model file for the first time: in a child process with limits, which describes and measures the model.

A damaged or hostile file can crash its library, take all memory, or keep it busy for ever. Workers load a file only if
its digest is the digest of a plan, so that the verdict of the child holds for them, too.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from typing import Any, cast

import numpy as np
import pyarrow as pa

from pipeline import errors
from pipeline.common.units import format_bytes
from pipeline.errors import BadPrediction, ModelError, PipelineError
from pipeline.models.flavors.child import ask_child
from pipeline.models.flavors.library import LibraryPredictor, digest_of
from pipeline.models.flavors.limits import Limits
from pipeline.models.flavors.measure import KINDS, measure, measure_code, sample_table
from pipeline.models.flavors.network import cut_network
from pipeline.models.model import ModelData, ModelFile, ModelFolder, ModelVersion, OutputType, Promise
from pipeline.models.record import model_from_record, model_to_record
from pipeline.spec.model_ref import OutputKind

MEMORY = 1 << 30
"""Bytes for the rows of the measurement."""
CPU_SECONDS = 60
"""Seconds of processor time for the measurement."""
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from pipeline.models.flavors.first_load import main; main()"
)
_loaded: dict[tuple[str, str, bool], ModelVersion] = {}
_loading: dict[tuple[str, str, bool], threading.Lock] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Described:
    """A loaded model, with what its file tells."""

    version: ModelVersion
    """With features, task and trees; without outputs and promise."""
    predictor: LibraryPredictor
    kinds: tuple[OutputKind, ...]
    """Outputs that the model may have; each is tried."""
    values: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Values that a feature may have, where its kind does not tell."""
    outputs: tuple[OutputType, ...] = ()
    """Outputs to assume if the model takes none of the made-up rows."""
    is_declared: bool = False
    """True: ``outputs`` are what the model has, and nothing is promised about its bits."""


def first_load(
    flavor: str, uri: str, data: ModelData, *, name: str | None = None, allow_code: bool = False, library: str = ""
) -> ModelVersion:
    """Describe the model at ``uri``, which has the bytes ``data``, or the files in a folder.

    :param flavor: name of the flavor, whose ``describe`` is called in the child.
    :param name: name of the version; default: the file's name without its ending.
    :param library: name of the library, for messages.
    :raises ModelError: when the file is damaged, its library is missing or crashes, or the limits are exceeded.
    :raises EnvMismatch: when the model needs another version of its library.
    """
    digest = digest_of(data)
    key = flavor, digest, allow_code
    with _lock:
        loading = _loading.setdefault(key, threading.Lock())
    with loading:
        if key not in _loaded:
            _loaded[key] = _ask(flavor, uri, data, allow_code=allow_code, library=library)
        found = _loaded[key]
    stem = uri.rstrip("/").rsplit("/", 1)[-1].rsplit(".", 1)[0] or "model"
    files = data.files if isinstance(data, ModelFolder) else ()
    return replace(found, name=name or stem, version=digest[:12], uri=uri, digest=digest, files=files)


def _ask(flavor: str, uri: str, data: ModelData, *, allow_code: bool, library: str) -> ModelVersion:
    nbytes = data.nbytes if isinstance(data, ModelFolder) else len(data)
    limits = _limits(nbytes)
    header: dict[str, Any] = {"flavor": flavor, "allow_code": allow_code, "uri": uri}
    content = b"" if isinstance(data, ModelFolder) else data
    if isinstance(data, ModelFolder):
        header["folder"] = {"path": data.path, "files": [asdict(file) for file in data.files]}
    try:
        answer = ask_child(_CHILD, json.dumps(header).encode() + b"\n" + content, limits=limits)
    except TimeoutError:
        answer = f"more than {limits.seconds} s"
    if isinstance(answer, str):
        raise ModelError(
            "reading the model ended the process that tried it, or took too long: the file is damaged",
            where=uri,
            found=answer,
            expected=f"a {library or flavor} model file",
            next_step="copy the file again, or save the model again",
        )
    if "memory" in answer:
        raise ModelError(
            "loading the model takes too much memory: the file is damaged",
            where=uri,
            found=f"more than {format_bytes(limits.memory)} for a file of {format_bytes(nbytes)}",
            expected=f"a {library or flavor} model file",
            next_step="copy the file again, or save the model again",
        )
    if "error" in answer:
        kind, message, details = answer["error"]
        raise cast(type[PipelineError], getattr(errors, kind))(message, **{**details, "where": uri})
    return model_from_record(answer["version"])


def _limits(nbytes: int) -> Limits:
    limits = Limits.for_file(nbytes)
    return Limits(limits.memory + MEMORY, limits.cpu_seconds + CPU_SECONDS)


def main() -> None:
    """Run in the child process: read a header and the file from standard input, write one line of JSON."""
    header = json.loads(sys.stdin.buffer.readline())
    data: ModelData = sys.stdin.buffer.read()
    if folder := header.get("folder"):
        data = ModelFolder(folder["path"], tuple(ModelFile(**file) for file in folder["files"]))
    answer = json.dumps(_answer(header, data))
    sys.stdout.write("\n" + answer + "\n")
    sys.stdout.flush()


def _answer(header: Mapping[str, Any], data: ModelData) -> dict[str, Any]:
    from pipeline.models.flavors import find_flavor

    flavor = find_flavor(header["flavor"])
    assert flavor.describe is not None
    if not flavor.is_own_code:
        cut_network()
    for library in flavor.libraries:
        with suppress(ImportError):
            # Import first, so that the limits are those of the model alone.
            import_module(library)
    nbytes = data.nbytes if isinstance(data, ModelFolder) else len(data)
    if not flavor.is_own_code:
        _limits(nbytes).apply()
    blank = ModelVersion(
        name="",
        version="",
        uri=header["uri"],
        digest=digest_of(data),
        flavor=flavor.name,
        nbytes=nbytes,
        features=(),
        task="other",
        outputs=1,
    )
    try:
        return {"version": model_to_record(complete(flavor.describe(blank, data, allow_code=header["allow_code"])))}
    except MemoryError:
        return {"memory": True}
    except PipelineError as error:
        details = {name: getattr(error, name) for name in ("found", "expected", "next_step")}
        return {"error": [type(error).__name__, error.message, details]}
    except Exception as error:
        found = f"{type(error).__name__}: {error}"[:300]
        details = {"found": found, "next_step": "copy the file again, or save the model again"}
        return {"error": ["ModelError", f"{flavor.name} cannot read the model", details]}


def complete(described: Described) -> ModelVersion:
    """Return the version with the outputs that the model gave for made-up rows, and the promise that was measured."""
    predictor, version = described.predictor, described.version
    table = sample_table(version.features, values=described.values)
    outputs, problem = _outputs(predictor, table.slice(0, 64), described.kinds)
    promise = Promise("code")
    if outputs:
        measured = [output.kind for output in outputs if output.kind in KINDS] or [outputs[0].kind]
        promise = (measure_code if described.is_declared else measure)(predictor, table, measured)
    elif not described.outputs:
        raise ModelError(
            "the model predicts nothing for the rows that were made up for it",
            found=problem,
            expected="a prediction for each row",
            next_step="save a fitted model, with the names of its columns",
        )
    if described.is_declared or not outputs:
        outputs = described.outputs
    elif described.outputs:
        outputs = tuple(_as_declared(output, described.outputs) for output in outputs)
    widths = {output.kind: output.width for output in outputs}
    return replace(
        version,
        output_types=outputs,
        outputs=widths.get("prediction", 1),
        margins=widths.get("margin", widths.get("prediction", 1)),
        promise=promise,
    )


def _as_declared(output: OutputType, declared: Sequence[OutputType]) -> OutputType:
    """Return an output that the model gave with its declared names, or as the declared list.

    :raises BadPrediction: if it declares another width or type.
    """
    same = next((one for one in declared if one.kind == output.kind), None)
    if same is None or not (same.names or same.is_list):
        return output
    if (same.type, same.width) != (output.type, output.width):
        raise BadPrediction(
            "the model did not return what it declares",
            found=f"{output.width} of type {output.type}",
            expected=f"{same.width} of type {same.type}",
            next_step="fix the model, or what it declares in outputs",
        )
    return same


def _outputs(
    predictor: LibraryPredictor, table: pa.Table, kinds: Sequence[OutputKind]
) -> tuple[tuple[OutputType, ...], str]:
    """Return the outputs that the model gives, and the error of its prediction if it gives none."""
    found, problem = [], ""
    for kind in kinds:
        try:
            scores = predictor.call(predictor.encode(table), kind)
            output = output_of(kind, scores, rows=table.num_rows)
        except (MemoryError, BadPrediction):
            raise
        except Exception as error:
            problem = problem or f"{type(error).__name__}: {error}"[:300]
            if kind == "prediction":
                break
            continue
        if output is not None:
            found.append(output)
    return tuple(found), problem


def output_of(kind: OutputKind, scores: np.ndarray, *, rows: int) -> OutputType | None:
    """Return type and width of an output; None for values that have no column type."""
    if not isinstance(scores, np.ndarray) or scores.shape[:1] != (rows,) or scores.ndim > 2:
        raise ModelError("not one result a row", found=f"{type(scores).__name__} {getattr(scores, 'shape', '')}")
    width = 1 if scores.ndim == 1 else scores.shape[1]
    if scores.dtype.kind in "OU":
        return OutputType(kind, "string", width) if all(isinstance(one, str) for one in scores.flat) else None
    names = {"f4": "float32", "f8": "float64", "i4": "int32", "i8": "int64", "b1": "bool"}
    name = names.get(scores.dtype.str[1:])
    return None if name is None else OutputType(kind, name, width)
