"""Find the facts about an xgboost model file by loading it and scoring one row, in a child process.

A damaged file can crash xgboost, take all memory, or keep it busy for ever. So a child process with limits loads each
file first. The child receives the bytes whose digest was computed: the file at the path may change later. Workers load
a file only if its digest is the digest of a plan, so the verdict of the child holds for them, too.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from pipeline.common import forkserver as forks
from pipeline.common.imports import allow_partial_imports, import_library
from pipeline.common.units import format_bytes
from pipeline.devices.inventory import VISIBLE
from pipeline.errors import ModelError, PipelineError
from pipeline.models.flavors.child import ask_child, how_it_ended
from pipeline.models.flavors.limits import Limits
from pipeline.models.flavors.network import cut_network
from pipeline.models.flavors.xgboost_file import Document, read_categories, saved_version, tree_problem

UNNEEDED = ("sklearn",)
"""Packages that xgboost imports for its classes in the style of scikit-learn, which takes longer than all the rest."""
NO_PACKAGE = "install one of the extras: xgboost-cpu (small, no GPU) or xgboost (with CUDA), never both"
_EXPECTED = "a model file as booster.save_model wrote it"
_SAVE_AGAIN = "copy the file again, or save it again with booster.save_model('model.ubj')"
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from pipeline.models.flavors.xgboost_probe import main; main()"
)


def probe(data: bytes, *, where: str = "") -> dict[str, Any]:
    """Return the facts about the model in ``data``; see `facts`.

    :raises ModelError: when xgboost is missing, rejects the bytes, crashes, or exceeds `Limits.for_file`.
    """
    limits = Limits.for_file(len(data))
    try:
        # A fork of a process that has done its imports takes a tenth of the time of a new process.
        answer = (
            _in_fork(_answer, data, limits=limits) if forks.is_running() else ask_child(_CHILD, data, limits=limits)
        )
    except TimeoutError:
        answer = {"slow": f"more than {limits.seconds} s"}
    if answer == f"signal {signal.SIGXCPU.name}":
        answer = {"slow": f"more than {limits.cpu_seconds} s of processor time"}
    if isinstance(answer, str):
        answer = {"crash": answer}
    for key, message in _REFUSALS.items():
        if key in answer:
            found = answer[key]
            if key == "memory":
                found = f"more than {format_bytes(limits.memory)} for a file of {format_bytes(len(data))}"
            is_missing = key == "missing"
            raise ModelError(
                message,
                where=where,
                found=found,
                expected="" if is_missing else _EXPECTED,
                next_step=NO_PACKAGE if is_missing else _SAVE_AGAIN,
            )
    return answer


_REFUSALS = {
    "slow": "loading the model and scoring one row takes too long: the file is damaged",
    "crash": "reading the model ended the process that tried it: the file is damaged",
    "memory": "loading the model takes too much memory: the file is damaged",
    "missing": "xgboost is not installed here",
    "damaged": "the trees of the model are damaged",
    "refused": "xgboost cannot read the model",
}
"""Key of a child's answer -> message of the error."""


def _in_fork(ask: Callable[[Any], Any], question: object, *, limits: Limits) -> Any:
    """Return the answer of a forked process; if the process dies, return the exit status or signal as text.

    :raises TimeoutError: when the process takes longer than the limit.
    """
    context = get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_answer, args=(ask, question, sender, limits), daemon=True)
    child.start()
    sender.close()
    with receiver:
        try:
            if not receiver.poll(limits.seconds):
                raise TimeoutError
            return receiver.recv()
        except EOFError:
            child.join()
            return how_it_ended(child.exitcode or 0, b"")
        finally:
            child.kill()


def _send_answer(ask: Callable[[Any], Any], question: object, sender: Connection, limits: Limits) -> None:
    # xgboost's exceptions contain all that it prints.
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    allow_partial_imports()
    # A damaged file must not reach a GPU.
    os.environ[VISIBLE] = ""
    cut_network()
    with suppress(ImportError):
        # Import first, so that the limits are those of the model alone.
        import_library("xgboost", without=UNNEEDED)
    limits.apply()
    sender.send(ask(question))


_SOURCE = re.compile(r"^\[\d\d:\d\d:\d\d\] \S+:\d+: ")


def main() -> None:
    """Run in the child process: read bytes from standard input, write one line of JSON to standard output."""
    data = sys.stdin.buffer.read()
    allow_partial_imports()
    # A damaged file must not reach a GPU.
    os.environ[VISIBLE] = ""
    cut_network()
    with suppress(ImportError):
        # Import first, so that the limits are those of the model alone.
        import_library("xgboost", without=UNNEEDED)
    Limits.for_file(len(data)).apply()
    sys.stdout.write("\n" + json.dumps(_answer(data)) + "\n")
    sys.stdout.flush()


def _answer(data: bytes) -> dict[str, Any]:
    try:
        import xgboost
    except ImportError as error:
        return {"missing": f"{type(error).__name__}: {error}"}
    with suppress(AttributeError):
        # Threads of a large machine would need more address space than the model.
        xgboost.core._LIB.omp_set_num_threads(1)
    try:
        return facts(xgboost.Booster(model_file=bytearray(data)), data)
    except MemoryError:
        return {"memory": ""}
    except DamagedTrees as error:
        return {"damaged": str(error)}
    except (xgboost.core.XGBoostError, ValueError, OverflowError) as error:
        text = first_line(error)
        return {"memory" if is_out_of_memory(text) else "refused": text}


class DamagedTrees(Exception):
    """The trees of a model are none that xgboost writes; the message names the fault."""


def is_out_of_memory(text: str) -> bool:
    """Return True if ``text`` is xgboost's message for a failed allocation."""
    return "bad_alloc" in text or "out of memory" in text.lower() or "Failed to allocate" in text


def first_line(error: BaseException) -> str:
    """Return the message of an xgboost error without its stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _SOURCE.sub("", lines[0])[:300] if lines else type(error).__name__


def facts(booster: Any, data: bytes) -> dict[str, Any]:
    """Return the facts about a booster that was loaded from ``data``, as JSON types.

    - ``names``, ``types`` (xgboost's names), ``categories`` (values or null per feature), ``objective``, ``booster``;
    - ``category_bytes``, ``category_offsets``: names of categories that the file may have lost, per feature;
    - ``prediction``, ``margin`` and ``leaf``: values per row, counted by scoring one row; ``leaf`` is 0 if xgboost
      returns no leaves;
    - ``rounds``, ``trees_per_round`` (0: rounds differ), ``best_iteration`` (or null);
    - ``tree_engine_blockers``: reasons why the tree engine cannot score the model;
    - ``device_blockers``: reasons why a GPU is not known to compute the CPU's margins.

    :raises DamagedTrees: for trees that a prediction would follow for ever, or out of their bounds.
    :raises ValueError: for names that do not fit the features.
    """
    import numpy as np
    import xgboost

    document = Document.read(booster)
    if document is not None and (problem := tree_problem(document)):
        raise DamagedTrees(problem)
    count = booster.num_features()
    names, types = _names_and_types(booster, count)
    row = xgboost.DMatrix(np.zeros((1, count), dtype=np.float32))
    try:
        leaves = _width(booster.predict(row, pred_leaf=True, validate_features=False))
    except xgboost.core.XGBoostError:
        leaves = 0
    rounds = booster.num_boosted_rounds() if leaves else 0
    return {
        "names": names,
        "types": types,
        **read_categories(document, types, version=saved_version(data)),
        "objective": json.loads(booster.save_config())["learner"]["objective"]["name"],
        "booster": "gblinear" if document is None else document.booster,
        "prediction": _width(booster.predict(row, validate_features=False)),
        "margin": _width(booster.predict(row, validate_features=False, output_margin=True)),
        "leaf": leaves,
        "rounds": rounds,
        "trees_per_round": 0 if document is None else document.trees_per_round,
        "best_iteration": _best_iteration(booster, rounds),
        "tree_engine_blockers": _tree_engine_blockers(document),
        "device_blockers": _device_blockers(document),
    }


def _names_and_types(booster: Any, count: int) -> tuple[list[str], list[str]]:
    """Return name and type of each of ``count`` features.

    :raises ValueError: for another number of names or types.
    """
    names = booster.feature_names or [f"f{index}" for index in range(count)]
    types = booster.feature_types or ["float"] * count
    if not len(names) == len(types) == count:
        raise ValueError(f"{len(names)} feature names and {len(types)} feature types for {count} features")
    return list(names), list(types)


def _best_iteration(booster: Any, rounds: int) -> int | None:
    """Return the round at which early stopping found the best score; None if the file names no such round."""
    text = booster.attr("best_iteration") or ""
    return int(text) if text.isascii() and text.isdigit() and int(text) < rounds else None


def _tree_engine_blockers(document: Document | None) -> list[str]:
    from pipeline.models.trees import unsupported_xgboost

    if document is None:
        return ["a model in a form it does not know"]
    try:
        return list(unsupported_xgboost(document.model))
    except (PipelineError, LookupError, ValueError, TypeError) as error:
        # xgboost has read the model, so the model is valid: the tree engine does not support its form.
        return [f"a model in a form it does not know ({type(error).__name__}: {error})"[:200]]


def _device_blockers(document: Document | None) -> list[str]:
    from pipeline.models.flavors.xgboost_fold import fold_blockers

    if document is None:
        return ["a model in an unknown form"]
    try:
        return list(fold_blockers(document.model))
    except (PipelineError, LookupError, ValueError, TypeError) as error:
        return [f"a model in an unknown form ({type(error).__name__}: {error})"[:200]]


def _width(scores: Any) -> int:
    return int(scores.size)
