"""Plain mistakes of a person: each has a clear error and its documented exit code, and none is called a bug."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.testing.oracle import Lake

EXIT_CODES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 74, 75, 130, 141, 143}
"""Exit codes of docs/errors.md; 1 is a bug."""
NINES = "9" * 400


@pytest.fixture
def spec(in_folder: Path, lake: Lake, model_path: Path) -> dict[str, Any]:
    """A job spec that is right, of which a test changes one field."""
    return {
        "name": "small",
        "source": {"path": str(lake.path)},
        "steps": [{"score": {"model": str(model_path), "output": "p", "keep": ["id"]}}],
        "sink": {"path": "out/"},
    }


def write(spec: dict[str, Any]) -> str:
    Path("job.yaml").write_text(yaml.safe_dump(spec))
    return "job.yaml"


def call(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the error of a command, which printed no traceback and called nothing a bug."""
    result = CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False)
    assert "Traceback" not in result.stderr
    assert "bug in the pipeline package" not in result.stderr
    answer = json.loads(result.stdout)
    error: dict[str, Any] = answer.get("error") or next(iter(answer.get("problems", [])), {})
    assert error.get("exit_code", 0) == result.exit_code
    return result.exit_code, error


def run_process(
    arguments: Sequence[str], *, environment: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), **(environment or {})},
        text=True,
        timeout=120,
        stderr=subprocess.PIPE,
        check=False,
        **options,
    )


def check_process(done: subprocess.CompletedProcess[str], *, code: int, message: str) -> None:
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "bug in the pipeline package" not in done.stderr


@pytest.mark.fault(113)
class TestSpec:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("source.path", "~nosuchuser/lake"),
            ("sink.path", "~nosuchuser/out"),
            ("steps.0.score.model", "~nosuchuser/model.ubj"),
            ("sink.target_file_size", f"{NINES} GiB"),
            ("sink.target_file_size", NINES),
            ("cluster", "http://127.0.0.1:1"),
            ("cluster", "tcp://"),
            ("errors.max_fraction", "-1"),
            ("source.path", "x" * 5000),
        ],
    )
    def test_field_with_a_wrong_value(self, spec: dict[str, Any], field: str, value: str) -> None:
        """The plan is refused with an error that names the field or the value."""
        code, error = call("plan", write(spec), "--set", f"{field}={json.dumps(value)}")
        assert code in (2, 4, 5, 74)
        assert len(str(error)) < 12_000

    @pytest.mark.parametrize(
        "override",
        [
            "steps.²=x",
            "steps.²³.score=x",
            f"steps.{'1' * 5000}=x",
            f"steps[{'1' * 5000}]=x",
            ".".join(["a"] * 5000) + "=x",
            "=x",
            "steps",
            "name.a.b=1",
            "a=" + "[" * 200 + "]" * 200,
            "",
            ".=",
            "steps[0]x=1",
        ],
    )
    def test_odd_override(self, spec: dict[str, Any], override: str) -> None:
        """``--set`` of another form, or for a place that is not there, is refused."""
        code, _ = call("validate", write(spec), "--set", override)
        assert code in (2, 7)

    @pytest.mark.parametrize("field", ["every", "grace"])
    def test_duration_of_400_digits(self, spec: dict[str, Any], field: str) -> None:
        """A duration of a trigger is at most 100 years."""
        code, error = call("validate", write({**spec, "triggers": [{"every": "1 h", field: f"{NINES} s"}]}))
        assert code == 2
        assert "at most 100 years" in str(error)


@pytest.mark.fault(113)
class TestSettings:
    @pytest.mark.parametrize("value", ["-1GiB", "0", f"{NINES}GiB", "-1", "", "many", "1e400"])
    def test_memory_limit(self, spec: dict[str, Any], value: str) -> None:
        """A memory limit that is no positive size is refused before anything is planned."""
        assert call("plan", write(spec), "--memory-limit", value)[0] == 2

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("PIPELINE_HOOKS", "{not json"),
            ("PIPELINE_HOOKS", "[" * 100_000),
            ("PIPELINE_HOOKS", "5"),
            ("PIPELINE_HOOKS", '"text"'),
            ("PIPELINE_HOOKS", '{"url": "x"}'),
            ("PIPELINE_HOOKS", "[null]"),
            ("PIPELINE_LEASE_SECONDS", "0"),
            ("PIPELINE_LEASE_SECONDS", "-5 s"),
            ("PIPELINE_LEASE_SECONDS", NINES),
            ("PIPELINE_LEASE_SECONDS", "nan"),
            ("PIPELINE_WORKERS", NINES),
            ("PIPELINE_WORKERS", "²"),
            ("PIPELINE_DIRECTORY", "~nosuchuser/jobs"),
        ],
    )
    def test_variable(self, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
        """An invalid variable is refused with its name."""
        monkeypatch.setenv(name, value)
        code, error = call("list") if name == "PIPELINE_DIRECTORY" else call("plan", write(spec))
        assert code == 2
        assert name in str(error) or "nosuchuser" in str(error)

    @pytest.mark.parametrize("value", ["[1, 2]", "text", "5", "{5: x}", "{workers: [1]}", "{hooks: {a: b}}"])
    def test_settings_of_dask(self, spec: dict[str, Any], value: str) -> None:
        """``pipeline:`` of ``dask.config`` that is no mapping of settings is refused."""
        import dask.config

        with dask.config.set({"pipeline": yaml.safe_load(value)}):
            code, error = call("plan", write(spec))
        assert code == 2
        assert "pipeline" in str(error)

    def test_malformed_file_of_dask(self, spec: dict[str, Any], in_folder: Path) -> None:
        """A malformed file of Dask's configuration is named."""
        folder = in_folder / "dask-config"
        folder.mkdir()
        (folder / "bad.yaml").write_text("a: [1\n")
        for arguments in (["run", write(spec)], ["list"]):
            done = run_process(arguments, environment={"DASK_CONFIG": str(folder)}, stdout=subprocess.DEVNULL)
            check_process(done, code=2, message="bad.yaml")


class TestTargets:
    @pytest.mark.fault(113)
    @pytest.mark.parametrize(
        ("arguments", "code"),
        [
            (("init", "file"), 6),
            (("init", "file/below"), 6),
            (("init", "/proc/x"), 74),
            (("init", "x" * 5000), 74),
            (("init", "~nosuchuser"), 2),
            (("demo", "file"), 7),
            (("demo", "/proc/x", "--rows", "1000"), 74),
            (("demo", "file/below", "--rows", "1000"), 74),
            (("demo", "x" * 5000, "--rows", "1000"), 74),
            (("demo", "--rows", NINES), 2),
            (("run", "x" * 5000), 2),
            (("run", "~nosuchuser/job.yaml"), 2),
            (("plan", "~nosuchuser/job.yaml"), 2),
            (("validate", "nosuch://bucket/job.yaml"), 2),
            (("plan", "file/job.yaml"), 2),
            (("list", "--directory", "~nosuchuser/jobs"), 2),
            (("status", "x" * 5000), 74),
            (("triggers", "list", "--file", "~nosuchuser/t.yaml"), 2),
            (("run", "job.yaml", "--job", ""), 2),
            (("submit", "job.yaml", "--job", ""), 2),
            (("submit", "job.yaml", "--key", " "), 2),
        ],
    )
    def test_odd_path(self, spec: dict[str, Any], arguments: tuple[str, ...], code: int) -> None:
        """A file in place of a folder, a path that cannot exist or is too long, and an empty id are refused."""
        write(spec)
        Path("file").touch()
        assert call(*arguments)[0] == code

    @pytest.mark.parametrize("folder", ["/proc/x", "file/jobs", "x" * 300])
    def test_directory_that_cannot_be(self, spec: dict[str, Any], folder: str) -> None:
        """A root of job directories that cannot be created is an error of storage."""
        Path("file").touch()
        assert call("run", write(spec), "--directory", folder)[0] == 74

    @pytest.mark.fault(112)
    def test_working_directory_that_was_removed(self, in_folder: Path) -> None:
        """The message says so, whatever the command is."""
        gone = in_folder / "gone"
        gone.mkdir()
        script = f"cd {gone} && rmdir {gone} && exec {sys.executable} -m pipeline list"
        done = subprocess.run(
            ["/bin/sh", "-c", script],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        check_process(done, code=2, message="the working directory does not exist any more")


@pytest.mark.fault(111)
class TestStandardOutput:
    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is missing")
    @pytest.mark.parametrize("arguments", [["validate", "job.yaml", "--json"], ["list"]])
    def test_full_disk(self, spec: dict[str, Any], arguments: list[str]) -> None:
        """A full disk behind stdout is an error of storage."""
        write(spec)
        with open("/dev/full", "w") as full:
            done = run_process(arguments, stdout=full)
        check_process(done, code=74, message="no space left")

    def test_closed_pipe(self, spec: dict[str, Any]) -> None:
        """A reader that has gone ends the command with 141, without a message."""
        write(spec)
        read, sink = os.pipe()
        os.close(read)
        done = run_process(["list"], stdout=sink)
        os.close(sink)
        assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.fault(110)
class TestSpecFromAPipe:
    @pytest.mark.parametrize("command", [["validate"], ["run", "--workers", "1", "--job", "piped"]])
    def test_spec_on_stdin(self, spec: dict[str, Any], command: list[str]) -> None:
        """A spec from a pipe is read once: ``envsubst < job.yaml | python -m pipeline run /dev/stdin``."""
        done = run_process([command[0], "/dev/stdin", *command[1:]], input=yaml.safe_dump(spec), stdout=subprocess.PIPE)
        assert done.returncode == 0, done.stderr
        if command[0] == "run":
            assert list(Path("out").glob("*.parquet"))

    @pytest.mark.parametrize("command", ["plan", "run", "validate", "submit"])
    @pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/dev/urandom", "."])
    def test_device(self, in_folder: Path, command: str, path: str) -> None:
        """A device or folder is refused at once, and not read."""
        assert call(command, path)[0] == 2

    def test_named_pipe(self, spec: dict[str, Any]) -> None:
        """A named pipe is read when its writer comes."""
        os.mkfifo("spec.pipe")
        text = yaml.safe_dump(spec)
        writer = threading.Thread(target=lambda: Path("spec.pipe").write_text(text))
        writer.start()
        assert call("validate", "spec.pipe")[0] == 0
        writer.join()

    def test_pipe_without_a_writer(self, in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pipe that never delivers is given up after its time limit."""
        from pipeline.spec import file

        os.mkfifo("spec.pipe")
        monkeypatch.setitem(file.read_text.__kwdefaults__, "pipe_seconds", 0.2)
        code, error = call("run", "spec.pipe")
        assert (code, error["message"]) == (2, "the job spec does not end")

    def test_pipe_without_an_end(self, in_folder: Path) -> None:
        """A pipe of more than 1 MiB is refused."""
        done = run_process(["plan", "/dev/stdin"], input="# \n" * 500_000, stdout=subprocess.PIPE)
        check_process(done, code=2, message="the job spec is too large")


def test_documented_exit_codes() -> None:
    """The exit codes of these tests are those of docs/errors.md."""
    page = (Path(__file__).parents[3] / "docs/errors.md").read_text()
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert codes <= EXIT_CODES
    assert EXIT_CODES - codes <= {130, 141, 143}
