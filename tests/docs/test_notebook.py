"""notebooks/quickstart.ipynb runs from an empty folder, and gives the output stored in it.

``python tests/docs/test_notebook.py`` stores the output of today.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
HOME = "/home/you"


def execute(folder: Path) -> Any:
    """The notebook with the output of today."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
    try:
        client = NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )
        client.execute()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_warning_of_a_library(output)]
    return notebook


def is_warning_of_a_library(output: Any) -> bool:
    """Threads reset each other's warning filters now and then; a deprecation inside a library then comes through."""
    return bool(
        output.output_type == "stream" and output.name == "stderr" and re.search(r"site-packages.*Warning", output.text)
    )


def shown(notebook: Any) -> list[list[str]]:
    """Text that each code cell shows."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[text_of(output) for output in cell.outputs] for cell in cells]


def text_of(output: Any) -> str:
    assert output.output_type in ("execute_result", "display_data"), output
    return "".join(output.data["text/plain"])


def normalised(outputs: list[list[str]], folder: str) -> list[list[list[str]]]:
    from docs.shown import normalise

    return [[normalise(text.replace(folder, HOME).splitlines()) for text in texts] for texts in outputs]


def test_notebook_is_stored_with_output_and_without_machine_paths() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert all(shown(notebook)[:-1])
    assert set(re.findall(r"/(?:home|tmp|root|work|usr)/\w*", text)) <= {HOME}
    assert len(text) < 60_000


@pytest.mark.slow
def test_notebook_gives_its_stored_output(tmp_path: Path) -> None:
    stored = shown(nbformat.read(NOTEBOOK, as_version=4))
    real = shown(execute(tmp_path))
    pairs = zip(normalised(real, str(tmp_path.resolve())), normalised(stored, HOME), strict=True)
    for number, (is_now, was) in enumerate(pairs):
        assert is_now == was, f"code cell {number}; to store what it gives now: python tests/docs/test_notebook.py"


def store() -> None:
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(Path(folder))
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
        text = nbformat.writes(notebook).replace(os.path.realpath(folder), HOME)
    NOTEBOOK.write_text(re.sub(r"\n*\Z", "\n", text), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    store()
