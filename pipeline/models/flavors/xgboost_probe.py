"""What an xgboost model file holds, found by loading it and scoring one row, in a process of its own.

A damaged file can crash the library, so the first load of a file happens where a crash costs nothing. The child is
given the bytes that were digested, not what the path holds a moment later.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.common import forkserver as forks
from pipeline.errors import ModelError, PipelineError

SECONDS = 600
"""How long the child may take."""
NO_PACKAGE = "install one of the extras: xgboost-cpu (small, no GPU) or xgboost (with CUDA), never both"
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from pipeline.models.flavors.xgboost_probe import main; main()"
)


def probe(data: bytes, *, where: str = "") -> dict[str, Any]:
    """Facts about the model in ``data``; see `facts`.

    :raises ModelError: when the library is missing, refuses the bytes, or dies of them.
    """
    try:
        # A fork of a process that has the imports behind it costs a tenth of a new one.
        answer = _in_fork(_answer, data) if forks.is_running() else _in_process(data)
    except TimeoutError as error:
        raise ModelError(
            "the model could not be read in time", where=where, found=f"more than {SECONDS} s", next_step=_MEND
        ) from error
    if isinstance(answer, str):
        raise ModelError(
            "reading the model ended the process that tried it: the file is damaged",
            where=where,
            found=answer,
            next_step=_MEND,
        )
    if "missing" in answer:
        raise ModelError("xgboost is not installed here", where=where, found=answer["missing"], next_step=NO_PACKAGE)
    if "refused" in answer:
        raise ModelError("xgboost cannot read the model", where=where, found=answer["refused"], next_step=_MEND)
    return answer


def _in_fork(ask: Callable[[Any], Any], question: object) -> Any:
    """The answer of a process forked for it, or as a text how that one ended.

    :raises TimeoutError: when it takes too long.
    """
    context = get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_answer, args=(ask, question, sender), daemon=True)
    child.start()
    sender.close()
    with receiver:
        try:
            if not receiver.poll(SECONDS):
                raise TimeoutError
            return receiver.recv()
        except EOFError:
            child.join()
            return _how_it_ended(child.exitcode or 0, b"")
        finally:
            child.kill()


def _send_answer(ask: Callable[[Any], Any], question: object, sender: Connection) -> None:
    # What the library prints is in its exceptions too.
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    sender.send(ask(question))


def _in_process(data: bytes) -> dict[str, Any] | str:
    """The answer of a process started for it, or how that one ended.

    :raises TimeoutError: when it takes too long.
    """
    # The parent's path, with the folder of this package first, in place of the child's own current directory.
    paths = [str(Path(__file__).resolve().parents[3]), *(path for path in sys.path if path)]
    command = [sys.executable, "-c", _CHILD, json.dumps(paths)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        child = subprocess.run(command, input=data, capture_output=True, timeout=SECONDS, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError from error
    if child.returncode != 0:
        return _how_it_ended(child.returncode, child.stderr)
    answer: dict[str, Any] = json.loads(child.stdout.decode().splitlines()[-1])
    return answer


_SOURCE = re.compile(r"^\[\d\d:\d\d:\d\d\] \S+:\d+: ")
_MEND = "copy the file again, or save it again with booster.save_model('model.ubj')"


def _how_it_ended(code: int, stderr: bytes) -> str:
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    lines = stderr.decode(errors="replace").strip().splitlines()
    return f"exit status {code}: {lines[-1] if lines else ''}"


def main() -> None:
    """The process started for it: bytes on standard input, one line of JSON on standard output."""
    data = sys.stdin.buffer.read()
    # xgboost imports scikit-learn when it is there, which takes longer than all the rest, and is not needed here.
    sys.modules["sklearn"] = None  # type: ignore[assignment]
    sys.stdout.write("\n" + json.dumps(_answer(data)) + "\n")
    sys.stdout.flush()


def _answer(data: bytes) -> dict[str, Any]:
    try:
        import xgboost
    except ImportError as error:
        return {"missing": f"{type(error).__name__}: {error}"}
    try:
        return facts(xgboost.Booster(model_file=bytearray(data)))
    except (xgboost.core.XGBoostError, ValueError) as error:
        return {"refused": first_line(error)}


def first_line(error: BaseException) -> str:
    """The message of a library error without its stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _SOURCE.sub("", lines[0])[:300] if lines else type(error).__name__


def facts(booster: Any) -> dict[str, Any]:
    """What there is to know about a booster, as JSON holds it.

    Keys: ``names``, ``types`` (as xgboost names them), ``categories`` (values or null per feature), ``objective``,
    the values per row of ``prediction``, ``margin`` and ``leaf`` (0 where the library offers no leaves), counted by
    scoring one row, and ``tree_engine_blockers``, what keeps the tree engine from scoring it.
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
        "tree_engine_blockers": _tree_engine_blockers(booster),
    }


def _tree_engine_blockers(booster: Any) -> list[str]:
    from pipeline.models.trees import unsupported_xgboost
    from pipeline.models.trees.xgboost import read_ubj

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
