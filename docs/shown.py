"""Run the commands that the documents show, and compare their output or insert it.

A block that begins with ```` ```console ```` holds commands, each on a line that begins with ``$ ``, and their
output. The blocks of a document run one after the other, and ``cd`` lasts. The blocks of README.md start in an empty
folder, the blocks of docs/ in a folder in which the demo ran. A line of ``…`` stands for omitted lines.

``python docs/shown.py README.md docs/*.md`` inserts the current output of the commands.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import dask
from click.testing import CliRunner

from pipeline.cli import main

HOME = "/home/you"
"""Text in the documents for the folder in which the commands run."""
REST = "…"
"""Line that stands for any omitted lines."""
DEMO = "python -m pipeline demo"
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CHANGING = (
    (re.compile(r"[a-z]+(-[a-z]+)*-\d{8}-\d{6}-[0-9a-f]{4}"), "JOB"),
    (re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z"), "TIME"),
    (re.compile(r"\b\d{5}-[0-9a-f]{6,}(?=\.parquet)"), "PART"),
    (re.compile(r"\b[0-9a-f]{12,64}\b"), "DIGEST"),
    (re.compile(r"\d+ h \d+ min|\d+ min \d+ s|\d+(\.\d+)? s\b"), "DURATION"),
    (re.compile(r"127\.0\.0\.1:\d+"), "LOOPBACK"),
    (re.compile(r"[\d,]+ rows/s"), "RATE"),
    (re.compile(r"\d+(\.\d+)? ([KMGT]i)?B\b"), "SIZE"),
    (re.compile(r"\(summed over partitions\)|(read|steps|score|write|model load) DURATION,? ?"), ""),
    (re.compile(r'("(?:bytes|task|worker|limit|peak_memory)": )\d+'), r"\1NUMBER"),
    # A small job starts the tree engine or not: that depends on the machine. The timed rows depend on the partitions.
    (re.compile(r"(  engine     )(xgboost(?:; trees .*)?$|trees [\d.]+ × .*)"), r"\1ENGINE"),
    (re.compile(r'("(?:trees|xgboost|timed_rows|compared_rows)": )\d+(?=,?$)'), r"\1NUMBER"),
    (re.compile(r'"(x86-64-v[234]|baseline)"'), "KERNELS"),
    (re.compile(r"\d+\.\d+"), "NUMBER"),
    (re.compile(r" +"), " "),
)
"""Patterns that differ from run to run or from machine to machine, with their replacements."""
_PROGRESS = re.compile(r"scoring: \d+%")


@dataclass
class Command:
    """One command of a document, and the output that the document shows."""

    text: str
    output: list[str] = field(default_factory=list)


class Shell:
    """A folder in which commands run one after the other; commands of this project run in this process to save time."""

    def __init__(self, folder: Path) -> None:
        self.folder = self.home = folder.resolve()

    def run(self, text: str) -> str:
        """Return standard output and error of a command, with `HOME` for the folder of the first command."""
        name, *arguments = shlex.split(text)
        if name == "cd":
            self.folder = (self.folder / arguments[0]).resolve(strict=True)
            return ""
        if arguments[:2] == ["-m", "pipeline"]:
            # The number of partitions depends on the shape of the cluster.
            with contextlib.chdir(self.folder), dask.config.set({"pipeline.workers": 2, "pipeline.threads": 1}):
                output = CliRunner().invoke(main, arguments[2:], prog_name="python -m pipeline").output
        else:
            output = subprocess.run(
                [name, *arguments], cwd=self.folder, capture_output=True, text=True, check=True
            ).stdout
        return output.replace(str(self.home), HOME)

    def close(self) -> None:
        """Forget the modules of steps that were imported from the folder."""
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", "") or "").startswith(str(self.home)):
                del sys.modules[name]


def read_blocks(text: str) -> Iterator[list[Command]]:
    """Yield the commands of each block of a document."""
    for block in _BLOCK.finditer(text):
        yield _read(block[1])


def _read(block: str) -> list[Command]:
    commands: list[Command] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            commands.append(Command(line.removeprefix("$ ")))
        else:
            commands[-1].output.append(line)
    return commands


def normalise(lines: list[str]) -> list[str]:
    """Return ``lines`` without changing parts and without lines of progress, whose number varies."""
    kept = []
    for line in lines:
        if _PROGRESS.match(line):
            continue
        for pattern, word in _CHANGING:
            line = pattern.sub(word, line)  # noqa: PLW2901
        kept.append(line.rstrip(" ,"))
    return kept


def agree(shown: list[str], real: list[str]) -> bool:
    """Return True if the shown lines equal the real lines, except for changing parts and lines that ``…`` omits."""
    shown, real = normalise(shown), normalise(real)
    while shown and shown[-1] == "":
        shown.pop()
    while real and real[-1] == "":
        real.pop()
    pattern = "".join("(?:.*\n)*?" if line == REST else re.escape(line) + "\n" for line in shown)
    return re.fullmatch(pattern, "".join(line + "\n" for line in real)) is not None


def update(path: Path, *, shell: Shell) -> None:
    """Run the commands of a document and insert their output."""

    def replace(block: re.Match[str]) -> str:
        lines = []
        for command in _read(block[1]):
            output = shell.run(command.text).rstrip("\n").splitlines()
            if command.output[-1:] == [REST]:
                output = [*output[: len(command.output) - 1], REST]
            output = _thin(output)
            lines += [f"$ {command.text}", *output]
        return "```console\n" + "\n".join(lines) + "\n```"

    path.write_text(_BLOCK.sub(replace, path.read_text(encoding="utf-8")), encoding="utf-8")


def _thin(lines: list[str]) -> list[str]:
    """Return ``lines`` with `REST` for all lines of progress between the first and the last."""
    progress = [index for index, line in enumerate(lines) if _PROGRESS.match(line)]
    return [*lines[: progress[0] + 1], REST, *lines[progress[-1] :]] if len(progress) > 2 else lines


def _update_all(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            home = Shell(Path(folder))
            if "docs" in Path(name).resolve().parts and not (home.folder / "pipeline-demo").exists():
                home.run(DEMO)
            update(Path(name), shell=home)
            home.close()


if __name__ == "__main__":
    _update_all(sys.argv[1:])
