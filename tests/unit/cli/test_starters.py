"""Examples of `init --template`: each works unedited."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.cli.starters import STARTERS


def make(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = CliRunner().invoke(main, ["init", str(folder), "--template", name])
    assert made.exit_code == 0, made.output
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("name", [name for name, starter in STARTERS.items() if not starter.first.endswith(".py")])
def test_first_command_works_on_any_machine(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "new", name, monkeypatch)
    command = "validate" if STARTERS[name].first == "validate" else "plan"
    done = CliRunner().invoke(main, [command, "job.yaml", "--json"])
    assert done.exit_code == 0, done.output
    if command == "plan":
        assert json.loads(done.stdout)["rows"] == 20_000


def test_the_service_of_the_example_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "new", "endpoint", monkeypatch)
    with subprocess.Popen([sys.executable, "stand_in.py", "0"], stdout=subprocess.PIPE, text=True) as service:
        try:
            assert service.stdout is not None
            url = service.stdout.readline().split()[-1]
            done = CliRunner().invoke(
                main, ["plan", "job.yaml", "--json", "--set", f"steps.0.score.endpoint.url={url}"]
            )
        finally:
            service.kill()
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"] == 400


def test_nothing_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "new", "onnx", monkeypatch)
    again = CliRunner().invoke(main, ["init", ".", "--template", "onnx"])
    assert again.exit_code == 6
    assert "a file of the template exists already" in again.output


def test_missing_library_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "lightgbm.py").write_text("raise ImportError('not here')")
    done = CliRunner().invoke(main, ["init", str(tmp_path / "new"), "--template", "lightgbm"])
    assert done.exit_code != 0
    assert 'pip install "dask-batch-pipeline[lightgbm]"' in done.output


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, starter in STARTERS.items() if starter.first == "run"])
def test_job_runs_unedited(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "new", name, monkeypatch)
    done = CliRunner().invoke(main, ["run", "job.yaml", "--json", "--workers", "1", "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"]["out"] == 20_000
