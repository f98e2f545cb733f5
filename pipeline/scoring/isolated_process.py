"""Main module of the process that `pipeline.scoring.isolation` starts.

The process imports everything once and forks a scorer, and another scorer after each crash: a start costs
milliseconds, not seconds. The process never runs a step or the model itself, and so has no threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from typing import IO

from pipeline.common.secrets import mask_logs, mask_streams
from pipeline.common.step_output import OutputLine, StepOutput, capture
from pipeline.common.warn_once import install
from pipeline.models.endpoints.calls import set_process_share
from pipeline.models.flavors import find_flavor
from pipeline.plan.recipe import StageRecipe
from pipeline.scoring.isolation import Answered, Died, read_message, sendable, write_message
from pipeline.scoring.predictors import library_predictors
from pipeline.scoring.scorer import ScoredBatch, Scorer
from pipeline.storage.urls import use_storage_options

_PR_SET_PDEATHSIG = 1


def serve(questions: IO[bytes], answers: IO[bytes]) -> None:
    """Pass each question to the scorer, and its answer back, until the questions end. None requests a new scorer.

    If a scorer crashes, the answer is `Died`. Incomplete answers are never passed on.
    """
    recipe: StageRecipe = read_message(questions)
    use_storage_options(recipe.storage)
    flavors = dict.fromkeys(score.model.flavor for score in recipe.scores)
    for library in [name for flavor in flavors for name in find_flavor(flavor).libraries]:
        with suppress(ImportError):
            import_module(library)
    write_message(answers, "ready")
    scorer: _Fork | None = None
    with suppress(EOFError):
        while True:
            question = read_message(questions)
            if question is None:
                scorer = _Fork(recipe)
            write_message(answers, Died(None) if scorer is None else scorer.ask(question))


class _Fork:
    """A forked scorer."""

    def __init__(self, recipe: StageRecipe) -> None:
        question, answer = os.pipe(), os.pipe()
        self._pid = os.fork()
        if not self._pid:
            os.close(question[1])
            os.close(answer[0])
            _score_all(recipe, os.fdopen(question[0], "rb"), os.fdopen(answer[1], "wb"))
        os.close(question[0])
        os.close(answer[1])
        self._questions, self._answers = os.fdopen(question[1], "wb"), os.fdopen(answer[0], "rb")

    def ask(self, question: object) -> object:
        """Return the scorer's answer, or `Died`."""
        try:
            write_message(self._questions, question)
            return read_message(self._answers)
        except (BrokenPipeError, EOFError):
            _, status = os.waitpid(self._pid, 0)
            for file in (self._questions, self._answers):
                with suppress(OSError):
                    file.close()
            return Died(os.waitstatus_to_exitcode(status))


def _score_all(recipe: StageRecipe, questions: IO[bytes], answers: IO[bytes]) -> None:
    """Answer None with the process id once the model is loaded, and every batch with its `ScoredBatch`.

    An error is the answer to its question. Never returns.
    """
    die_with_parent()
    scorer: Scorer | None = None
    answer: ScoredBatch | Exception | int
    try:
        while True:
            question = read_message(questions)
            lines: list[OutputLine] = []
            with capture(StepOutput(lines.append)) as output:
                try:
                    if scorer is None or question is None:
                        set_process_share(recipe.service_share)
                        scorer = Scorer(recipe, library_predictors(recipe))
                        answer = os.getpid()
                    else:
                        answer = scorer.score_batch(question[0], paths=question[1])
                except Exception as error:
                    answer = sendable(error)
            write_message(answers, Answered(answer, tuple(lines), output.counts, output.left_out))
    finally:
        os._exit(0)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, even during an endless loop."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Serve on standard input and output; text that a step prints goes to standard error."""
    die_with_parent()
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    mask_logs()
    mask_streams()
    install()
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    serve(questions, answers)


if __name__ == "__main__":
    main()
