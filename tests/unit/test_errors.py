"""The tree of errors: exit codes, messages, pickling, and its picture in the docstring."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator

import pytest

from pipeline import errors
from pipeline.errors import Interrupted, PipelineError, SchemaDrift


def _tree(kind: type[PipelineError]) -> Iterator[type[PipelineError]]:
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from _tree(child)


KINDS = [PipelineError, *_tree(PipelineError)]


def test_docstring_draws_the_tree_as_it_is() -> None:
    lines = re.findall(r"^    ([│├└─ ]*)(\w+) +(128 \+ n|\d+)", errors.__doc__ or "", re.MULTILINE)
    drawn, above = {}, {}
    for branch, name, code in lines:
        depth = len(branch) // 4
        above[depth] = name
        drawn[name] = (above.get(depth - 1, ""), code)
    real = {
        kind.__name__: (
            kind.__bases__[0].__name__ if kind is not PipelineError else "",
            "128 + n" if kind is Interrupted else str(kind.exit_code),
        )
        for kind in KINDS
    }
    assert drawn == real


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not Interrupted])
def test_pickling_keeps_everything(kind: type[PipelineError]) -> None:
    error = kind("m", where="w", found="f", expected="e", next_step="n")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert again.to_dict() == error.to_dict()
    assert str(again) == str(error)
    assert again.args == ("m",)


def test_interrupted_keeps_its_signal() -> None:
    error = pickle.loads(pickle.dumps(Interrupted("stopped", signal_number=15, next_step="resume")))
    assert error.exit_code == 143
    assert error.next_step == "resume"


def test_message_has_a_line_for_each_part() -> None:
    error = SchemaDrift("a column is missing", where="a.parquet", found="x, y", next_step="add it")
    assert str(error) == "a column is missing\n  where:    a.parquet\n  found:    x, y\n  next:     add it"
    assert error.to_dict() == {
        "kind": "SchemaDrift",
        "message": "a column is missing",
        "where": "a.parquet",
        "found": "x, y",
        "next": "add it",
        "exit_code": 4,
    }


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.SpecError, ValueError),
        (errors.EnvMismatch, ValueError),
        (errors.SchemaDrift, ValueError),
        (errors.BadPrediction, ValueError),
        (errors.MissingInput, FileNotFoundError),
        (errors.OutputExists, FileExistsError),
    ],
)
def test_errors_are_also_the_builtin_that_fits(kind: type[PipelineError], builtin: type[Exception]) -> None:
    error = kind("m", where="w")
    with pytest.raises(builtin) as caught:
        raise error
    assert caught.value is error
    assert (str(error), error.args) == ("m\n  where:    w", ("m",))
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (type(again), str(again), again.args) == (kind, str(error), error.args)


def test_no_error_of_a_job_is_a_timeout_error() -> None:
    """`JobHandle.wait` raises TimeoutError for a job that is still running, and nothing else may look like it."""
    assert not [kind for kind in KINDS if issubclass(kind, TimeoutError)]
