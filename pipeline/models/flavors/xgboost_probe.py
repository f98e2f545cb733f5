"""Find the facts about an xgboost model file by loading it and scoring one row, in a child process.

A damaged file can crash xgboost, so a child process loads each file first. The child receives the bytes whose digest
was computed: the file at the path may change later.
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
"""Time limit of the child process."""
NO_PACKAGE = "install one of the extras: xgboost-cpu (small, no GPU) or xgboost (with CUDA), never both"
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from pipeline.models.flavors.xgboost_probe import main; main()"
)


def probe(data: bytes, *, where: str = "") -> dict[str, Any]:
    """Return the facts about the model in ``data``; see `facts`.

    :raises ModelError: when xgboost is missing, rejects the bytes, crashes, or takes longer than `SECONDS`.
    """
    try:
        # A fork of a process that has done its imports takes a tenth of the time of a new process.
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
    """Return the answer of a forked process; if the process dies, return the exit status or signal as text.

    :raises TimeoutError: when the process takes longer than `SECONDS`.
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
    # xgboost's exceptions contain all that it prints.
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    sender.send(ask(question))


def _in_process(data: bytes) -> dict[str, Any] | str:
    """Return the answer of a new process; if the process fails, return the exit status or signal as text.

    :raises TimeoutError: when the process takes longer than `SECONDS`.
    """
    # Replace the child's sys.path: the folder of this package, then the parent's path, without the current directory.
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
    """Run in the child process: read bytes from standard input, write one line of JSON to standard output."""
    data = sys.stdin.buffer.read()
    # Keep xgboost from importing scikit-learn: this takes longer than all the rest, and is not needed here.
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
    """Return the message of an xgboost error without its stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _SOURCE.sub("", lines[0])[:300] if lines else type(error).__name__


def facts(booster: Any) -> dict[str, Any]:
    """Return the facts about a booster, as JSON types.

    - ``names``, ``types`` (xgboost's names), ``categories`` (values or null per feature), ``objective``;
    - ``prediction``, ``margin`` and ``leaf``: values per row, counted by scoring one row; ``leaf`` is 0 if xgboost
      returns no leaves;
    - ``tree_engine_blockers``: reasons why the tree engine cannot score the model.
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
        # xgboost has read the model, so the model is valid: the tree engine does not support its form.
        return [f"a model in a form it does not know ({type(error).__name__}: {error})"[:200]]


def _width(scores: Any) -> int:
    return int(scores.size)


def _categories(booster: Any, types: list[str]) -> list[list[Any] | None]:
    if "c" not in types or not hasattr(booster, "get_categories"):
        return [None] * len(types)
    found = booster.get_categories(export_to_arrow=True).to_arrow()
    return [None if values is None else values.to_pylist() for _, values in found]
