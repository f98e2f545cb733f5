"""What an xgboost model file holds, found by loading it and scoring one row, in a process of its own.

A damaged file can crash the library, so the first load of a file happens where a crash costs nothing. The child reads
the bytes from its standard input (those that were digested, not what the path holds a moment later) and prints one
line of JSON.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError, PipelineError

SECONDS = 600
"""How long the child may take."""
NO_PACKAGE = "install one of the extras: xgboost-cpu (small, no GPU) or xgboost (with CUDA), never both"
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from pipeline.flavors.xgboost_probe import main; main()"
)


def probe(data: bytes, *, where: str = "") -> dict[str, Any]:
    """Facts about the model in ``data``; see `facts`.

    :raises ModelError: when the library is missing, refuses the bytes, or dies of them.
    """
    # The parent's path, with the folder of this package first, in place of the child's own current directory.
    paths = [str(Path(__file__).resolve().parents[2]), *(path for path in sys.path if path)]
    command = [sys.executable, "-c", _CHILD, json.dumps(paths)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        child = subprocess.run(command, input=data, capture_output=True, timeout=SECONDS, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            "the model could not be read in time", where=where, found=f"more than {SECONDS} s", next_step=_MEND
        ) from error
    if child.returncode != 0:
        raise ModelError(
            "reading the model ended the process that tried it: the file is damaged",
            where=where,
            found=_how_it_ended(child.returncode, child.stderr),
            next_step=_MEND,
        )
    answer: dict[str, Any] = json.loads(child.stdout.decode().splitlines()[-1])
    if "missing" in answer:
        raise ModelError("xgboost is not installed here", where=where, found=answer["missing"], next_step=NO_PACKAGE)
    if "refused" in answer:
        raise ModelError("xgboost cannot read the model", where=where, found=answer["refused"], next_step=_MEND)
    return answer


_SOURCE = re.compile(r"^\[\d\d:\d\d:\d\d\] \S+:\d+: ")
_MEND = "copy the file again, or save it again with booster.save_model('model.ubj')"


def _how_it_ended(code: int, stderr: bytes) -> str:
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    lines = stderr.decode(errors="replace").strip().splitlines()
    return f"exit status {code}: {lines[-1] if lines else ''}"


def main() -> None:
    """The child: bytes on standard input, one line of JSON on standard output."""
    data = sys.stdin.buffer.read()
    # xgboost imports scikit-learn when it is there, which takes longer than all the rest, and is not needed here.
    sys.modules["sklearn"] = None  # type: ignore[assignment]
    try:
        import xgboost
    except ImportError as error:
        answer: dict[str, Any] = {"missing": f"{type(error).__name__}: {error}"}
    else:
        try:
            answer = facts(xgboost.Booster(model_file=bytearray(data)))
        except (xgboost.core.XGBoostError, ValueError) as error:
            answer = {"refused": first_line(error)}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    sys.stdout.flush()


def first_line(error: BaseException) -> str:
    """The message of a library error without its stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _SOURCE.sub("", lines[0])[:300] if lines else type(error).__name__


def facts(booster: Any) -> dict[str, Any]:
    """What there is to know about a booster, as JSON holds it.

    Keys: ``names``, ``types`` (as xgboost names them), ``categories`` (values or null per feature), ``objective``,
    the values per row of ``prediction``, ``margin`` and ``leaf`` (0 where the library offers no leaves), counted by
    scoring one row, and ``not_for_trees``, what keeps the tree engine from scoring it.
    """
    import numpy as np
    import xgboost

    count = booster.num_features()
    names = booster.feature_names or [f"f{index}" for index in range(count)]
    types = booster.feature_types or ["float"] * count
    row = xgboost.DMatrix(np.zeros((1, count), dtype=np.float32))
    try:
        leaves = _width(booster.predict(row, pred_leaf=True, validate_features=False))
    except xgboost.core.XGBoostError:
        leaves = 0
    return {
        "names": list(names),
        "types": list(types),
        "categories": _categories(booster, types),
        "objective": json.loads(booster.save_config())["learner"]["objective"]["name"],
        "prediction": _width(booster.predict(row, validate_features=False)),
        "margin": _width(booster.predict(row, validate_features=False, output_margin=True)),
        "leaf": leaves,
        "not_for_trees": _not_for_trees(booster),
    }


def _not_for_trees(booster: Any) -> list[str]:
    from pipeline.trees import unsupported_xgboost
    from pipeline.trees.ubj import read_ubj

    try:
        return list(unsupported_xgboost(read_ubj(booster.save_raw("ubj"))))
    except (PipelineError, LookupError, ValueError, TypeError) as error:
        # xgboost reads it, so that the model is a good one: the engine just does not know its form.
        return [f"a model in a form it does not know ({type(error).__name__}: {error})"[:200]]


def _width(scores: Any) -> int:
    return int(scores.size)


def _categories(booster: Any, types: list[str]) -> list[list[Any] | None]:
    if "c" not in types or not hasattr(booster, "get_categories"):
        return [None] * len(types)
    found = booster.get_categories(export_to_arrow=True).to_arrow()
    return [None if values is None else values.to_pylist() for _, values in found]
