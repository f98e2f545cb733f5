"""`why`, `doctor`, `completion`, and runs that were refused, from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.jobs.directory import JobDirectory
from pipeline.testing.jobs import small_job

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    small = small_job(tmp_path, sink=str(tmp_path / "out"))
    JobDirectory.create(tmp_path / ".pipeline/jobs", small.plan, job="small-1")
    return tmp_path


def test_why(folder: Path) -> None:
    done = CliRunner().invoke(main, ["why", "small", "--json"])
    assert json.loads(done.stdout)["reasons"] == ["nobody has started it: a plan, or a probe, was stored only"]


def test_doctor_exit_code(folder: Path) -> None:
    assert CliRunner().invoke(main, ["doctor"]).exit_code == 0
    (folder / "pandas.py").write_text("")
    done = CliRunner().invoke(main, ["doctor", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["ok"] is False


def test_missing_input_is_listed(folder: Path) -> None:
    spec = "name: lost\nsource: {path: nowhere/}\nsteps: [{select: [a]}]\nsink: {path: o/}\n"
    (folder / "job.yaml").write_text(spec)
    assert CliRunner().invoke(main, ["run", "job.yaml"]).exit_code == 4
    shown = CliRunner().invoke(main, ["list"]).stdout
    assert "ago: lost: the source's path does not exist: " in shown
    (refused,) = json.loads(CliRunner().invoke(main, ["list", "--json"]).stdout)["refused"]
    assert refused["error"]["kind"] == "MissingInput"


@pytest.mark.parametrize(
    ("shell", "file"),
    [
        ("bash", ".local/share/bash-completion/completions/batch-pipeline"),
        ("zsh", ".zfunc/_batch-pipeline"),
        ("fish", ".config/fish/completions/batch-pipeline.fish"),
    ],
)
def test_completion_is_installed_by_one_command(
    shell: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SHELL", f"/bin/{shell}")
    done = CliRunner().invoke(main, ["completion"])
    assert done.exit_code == 0, done.output
    assert "_BATCH_PIPELINE_COMPLETE" in (tmp_path / file).read_text()


def test_completion_without_known_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert CliRunner().invoke(main, ["completion"]).exit_code == 2


def test_job_ids_are_completed(folder: Path) -> None:
    code = "import sys; sys.argv[0] = 'batch-pipeline'; from pipeline.cli import main; main(prog_name='batch-pipeline')"
    words = {"COMP_WORDS": "batch-pipeline status sm", "COMP_CWORD": "2"}
    environment = {**os.environ, **words, "_BATCH_PIPELINE_COMPLETE": "bash_complete", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "plain,small-1\n", done.stderr


def test_metrics_as_a_textfile_and_trend(folder: Path) -> None:
    assert CliRunner().invoke(main, ["metrics", "--output", "jobs.prom"]).exit_code == 0
    assert 'pipeline_job_status{job="small-1",name="small",status="PLANNED"} 1' in (folder / "jobs.prom").read_text()
    assert sorted(path.name for path in folder.glob(".jobs.prom*")) == []
    assert "small-1" in CliRunner().invoke(main, ["list", "--trend", "small"]).stdout
    assert CliRunner().invoke(main, ["list", "--trend", "small", "--name", "x"]).exit_code == 2
