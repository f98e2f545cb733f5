"""The notebooks run from an empty folder each, and give the output stored in them.

``python tests/docs/test_notebook.py [NAME …]`` stores the output of today.
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
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ALL = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
HOME = "/home/you"


def execute(path: Path, folder: Path) -> Any:
    """The notebook with the output of today."""
    notebook = nbformat.read(path, as_version=4)
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
    """Threads reset each other's warning filters now and then; a deprecation inside a library then comes through.

    Workers of a busy machine are told to end twice.
    """
    return bool(
        output.output_type == "stream"
        and output.name == "stderr"
        and re.search(r"site-packages.*Warning|distributed\.\w+ - ", output.text)
    )


def shown(notebook: Any) -> list[list[str]]:
    """Text that each code cell shows."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[text_of(output) for output in cell.outputs] for cell in cells]


def text_of(output: Any) -> str:
    if output.output_type == "stream":
        return str(output.text)
    assert output.output_type in ("execute_result", "display_data"), output
    return "".join(output.data["text/plain"])


def normalised(outputs: list[list[str]], folder: str) -> list[list[list[str]]]:
    from docs.shown import normalise

    return [[normalise(text.replace(folder, HOME).splitlines()) for text in texts] for texts in outputs]


@ALL
def test_notebook_is_stored_with_output_and_without_machine_paths(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert sum(map(bool, shown(notebook))) > len(cells) / 2
    assert set(re.findall(r"/(?:home|tmp|root|work|usr)/\w*", text)) <= {HOME}
    assert len(text) < 100_000


@pytest.mark.slow
@ALL
def test_notebook_gives_its_stored_output(path: Path, tmp_path: Path) -> None:
    stored = shown(nbformat.read(path, as_version=4))
    real = shown(execute(path, tmp_path))
    pairs = zip(normalised(real, str(tmp_path.resolve())), normalised(stored, HOME), strict=True)
    for number, (is_now, was) in enumerate(pairs):
        assert is_now == was, f"code cell {number}; to store what it gives now: python tests/docs/test_notebook.py"


def store(path: Path) -> None:
    """Store the output of today in a notebook."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(path, Path(folder))
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
        text = nbformat.writes(notebook).replace(os.path.realpath(folder), HOME)
    path.write_text(re.sub(r"\n*\Z", "\n", text), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for notebook_path in NOTEBOOKS:
        if not sys.argv[1:] or notebook_path.stem in sys.argv[1:]:
            store(notebook_path)
