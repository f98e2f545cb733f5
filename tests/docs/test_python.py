"""docs/python.md agrees with signatures and docstrings, and the examples in the docstrings run."""

from __future__ import annotations

import contextlib
import doctest
import sys
from collections.abc import Iterator
from pathlib import Path

import dask
import pandas as pd
import pytest

import pipeline
from docs.make_python import PAGE, examined, make_page
from pipeline.demo import make_demo


def test_page_agrees_with_the_code() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert make_page(text) == text, "python docs/make_python.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo with one job that ended."""
    folder = tmp_path_factory.mktemp("python")
    make_demo(folder, rows=5000)
    before = list(sys.path)
    with contextlib.chdir(folder), dask.config.set({"pipeline.workers": 1, "pipeline.threads": 1}):
        pipeline.Job.load("job.yaml").run(callbacks=[])
        yield folder
    sys.path[:] = before
    sys.modules.pop("features", None)


@pytest.mark.slow
def test_examples_of_docstrings_run(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    import features  # type: ignore[import-not-found]

    customers = features.build(pd.read_parquet("lake/customers/country=SE/"))
    customers = customers[customers["monthly_charges"] < 1000]
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    names = {"pipeline": pipeline, "customers": customers, "Settings": pipeline.Settings}
    for name, target in [("pipeline", pipeline), *examined()]:
        for test in finder.find(target, name, module=False, globs=dict(names)):
            runner.run(test)
    assert runner.summarize(verbose=False).attempted > 15
    assert runner.summarize(verbose=False).failed == 0
