"""What the documents show of the command line is real: commands are run, and their output compared or put in.

A block that begins with ```` ```console ```` holds commands, each on a line that begins with ``$ ``, and what they
print. The blocks of a document run one after the other, and ``cd`` lasts: those of README.md in an empty folder, those
of docs/ in one in which the demo ran. A line of ``…`` stands for lines that are left out.

``python docs/shown.py README.md docs/*.md`` puts in what commands print today.
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
"""What the documents show in place of the folder in which the commands were run."""
REST = "…"
"""A line that stands for any lines that are left out."""
DEMO = "python -m pipeline demo"
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CHANGING = (
    (re.compile(r"[a-z]+(-[a-z]+)*-\d{8}-\d{6}-[0-9a-f]{4}"), "JOB"),
    (re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z"), "TIME"),
    (re.compile(r"\b\d{5}-[0-9a-f]{6,}(?=\.parquet)"), "PART"),
    (re.compile(r"\b[0-9a-f]{12,64}\b"), "DIGEST"),
    (re.compile(r"\d+ h \d+ min|\d+ min \d+ s|\d+(\.\d+)? s\b"), "DURATION"),
    (re.compile(r"[\d,]+ rows/s"), "RATE"),
    (re.compile(r"\d+(\.\d+)? ([KMGT]i)?B\b"), "SIZE"),
    (re.compile(r"\(summed over partitions\)|(read|steps|score|write|model load) DURATION,? ?"), ""),
    (re.compile(r'("(?:bytes|task|worker|limit)": )\d+'), r"\1NUMBER"),
    (re.compile(r"\d+\.\d+"), "NUMBER"),
    (re.compile(r" +"), " "),
)
"""What differs from run to run or from machine to machine."""
_PROGRESS = re.compile(r"scoring: \d+%")


@dataclass
class Command:
    """One command of a document, and what is shown to come of it."""

    text: str
    output: list[str] = field(default_factory=list)


class Shell:
    """A folder in which commands are run one after the other; those of this project in this process, to save time."""

    def __init__(self, folder: Path) -> None:
        self.folder = self.home = folder.resolve()

    def run(self, text: str) -> str:
        """Standard output and error of a command, with `HOME` for the folder that was empty at first."""
        name, *arguments = shlex.split(text)
        if name == "cd":
            self.folder = (self.folder / arguments[0]).resolve(strict=True)
            return ""
        if arguments[:2] == ["-m", "pipeline"]:
            # The shape of the cluster decides how many partitions there are.
            with contextlib.chdir(self.folder), dask.config.set({"pipeline.workers": 2, "pipeline.threads": 1}):
                output = CliRunner().invoke(main, arguments[2:], prog_name="python -m pipeline").output
        else:
            output = subprocess.run(
                [name, *arguments], cwd=self.folder, capture_output=True, text=True, check=True
            ).stdout
        return output.replace(str(self.home), HOME)

    def close(self) -> None:
        """Forget the modules of steps that were imported from here."""
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", "") or "").startswith(str(self.home)):
                del sys.modules[name]


def read_blocks(text: str) -> Iterator[list[Command]]:
    """The commands of each block of a document."""
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
    """``lines`` without what changes; lines of progress are left out, as there may be more or fewer of them."""
    kept = []
    for line in lines:
        if _PROGRESS.match(line):
            continue
        for pattern, word in _CHANGING:
            line = pattern.sub(word, line)  # noqa: PLW2901
        kept.append(line.rstrip(" ,"))
    return kept


def agree(shown: list[str], real: list[str]) -> bool:
    """Whether what is shown is what comes, but for what changes, and for what ``…`` stands for."""
    shown, real = normalise(shown), normalise(real)
    while shown and shown[-1] == "":
        shown.pop()
    while real and real[-1] == "":
        real.pop()
    pattern = "".join("(?:.*\n)*?" if line == REST else re.escape(line) + "\n" for line in shown)
    return re.fullmatch(pattern, "".join(line + "\n" for line in real)) is not None


def update(path: Path, *, shell: Shell) -> None:
    """Run the commands of a document and put in what they print."""

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
    """``lines`` with `REST` for all lines of progress between the first and the last."""
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
