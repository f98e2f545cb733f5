"""The command line: stdout, stderr and exit codes. Jobs are fakes here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from pipeline.cli import main, options
from pipeline.cli.templates import JOB_TEMPLATE
from pipeline.common import forkserver
from pipeline.common.rows import QuarantinedFile, RowCounts
from pipeline.errors import Interrupted, OutputExists, TooManyRejects
from pipeline.events import Callback, PartitionEnded, RoundStarted, StatusChanged, notify
from pipeline.jobs.status import Status
from pipeline.report.rejects import Export, RejectExample, RejectGroup, RejectSummary
from pipeline.report.report import Report
from pipeline.report.verify import Check, Verification
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.parts import ColumnContract, Errors, MapStep, Source
from pipeline.spec.score import Output, Score
from pipeline.spec.sink import Sink
from pipeline.testing.reports import sample_report

JOB = """\
name: churn
source: {path: lake/}
steps:
  - score: {model: model.json}
sink: {path: out/}
"""
ROOT = Path(__file__).parents[3]
COMMANDS = [
    "init",
    "demo",
    "validate",
    "plan",
    "run",
    "submit",
    "resume",
    "retry",
    "publish",
    "cancel",
    "watch",
    "wait",
    "logs",
    "list",
    "status",
    "why",
    "report",
    "dashboard",
    "metrics",
    "verify",
    "rejects",
    "triggers",
    "models",
    "diff",
    "serve",
    "gc",
    "chaos",
    "doctor",
    "completion",
]


JOB_ID = "churn-20260101-120000-a1b2"


def report(**changes: Any) -> Report:
    return sample_report(job=JOB_ID, next=(f"python -m pipeline verify {JOB_ID}",), **changes)


def plain(report: Report) -> dict[str, Any]:
    return json.loads(json.dumps(report.to_dict()))


@dataclass
class FakeRunner:
    """Stands for `pipeline.runner`: notes what it was asked and does what it is told."""

    outcome: Report | BaseException = field(default_factory=report)
    calls: list[tuple[str, Any, dict[str, Any]]] = field(default_factory=list)

    def run(self, spec: JobSpec, **options: Any) -> Any:
        return self._do("run", spec, options)

    def resume(self, job: str, **options: Any) -> Any:
        return self._do("resume", job, options)

    def _do(self, name: str, what: Any, options: dict[str, Any]) -> Any:
        self.calls.append((name, what, options))
        _events(options["callbacks"])
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


def _events(callbacks: Sequence[Callback]) -> None:
    job = "churn-20260101-120000-a1b2"
    notify(callbacks, StatusChanged(job, "PROVISIONING", "RUNNING"))
    notify(callbacks, RoundStarted(job, 0, 2, 0, 1000, 0))
    notify(callbacks, PartitionEnded(job, 0, "00000", "done", RowCounts(600, 590, 10, 0)))
    notify(callbacks, PartitionEnded(job, 0, "00001", "done", RowCounts(400, 400, 0, 0)))


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> FakeRunner:
    import pipeline

    fake, module = FakeRunner(), ModuleType("pipeline.runner")
    module.run, module.resume = fake.run, fake.resume  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pipeline.runner", module)
    monkeypatch.setattr(pipeline, "runner", module, raising=False)
    return fake


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "job.yaml").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), prog_name="python -m pipeline")


def test_help_names_every_command_in_the_order_of_use() -> None:
    result = call("--help")
    assert result.exit_code == 0
    listed = [line.split()[0] for line in result.stdout.partition("Commands:")[2].strip().splitlines()]
    assert listed == COMMANDS


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pipeline.cli import main; main(['--help'], standalone_mode=False); "
        "heavy = {'dask', 'distributed', 'pandas', 'numpy', 'pyarrow', 'xgboost', 'pydantic', 'yaml', 'rich'}; "
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    times = []
    for _ in range(3):
        # Processor time: what the clock says depends on what else the machine does.
        begin = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
        end = os.times()
        times.append(end.children_user + end.children_system - begin.children_user - begin.children_system)
        assert done.returncode == 0, f"imported {done.stderr}"
    assert min(times) < 0.5


def test_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "pipeline", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("pipeline, version ")


def test_commands_are_available_under_dask() -> None:
    group = click.Group("dask")
    group.add_command(main)
    result = CliRunner().invoke(group, ["pipeline", "run", "nowhere.yaml", "--json"])
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["kind"] == "SpecError"
    points = [point.value for point in importlib.metadata.entry_points(group="dask_cli", name="pipeline")]
    assert points in ([], ["pipeline.cli:main"])


LEAVES = [
    (name, *rest)
    for name, command in main.commands.items()
    for rest in ([(one,) for one in command.commands] if isinstance(command, click.Group) else [()])
]
"""Every command, and those of groups."""


@pytest.mark.parametrize("command", LEAVES, ids=" ".join)
def test_every_command_explains_itself(command: tuple[str, ...]) -> None:
    result = call(*command, "--help")
    assert result.exit_code == 0
    for option in ("--json", "--quiet", "--verbose"):
        assert option in result.stdout


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["rnu"], "did you mean run?"),
        (["job.yaml"], "did you mean: python -m pipeline run job.yaml?"),
        (["run", "--jobb", "x"], "--job"),
        (["run"], "Missing argument"),
        (["plan", "job.yaml", "--workers", "0"], "--workers"),
    ],
)
def test_a_wrong_command_line_exits_with_2(folder: Path, arguments: list[str], hint: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert hint in result.stderr
    assert result.stdout == ""


def test_a_wrong_command_line_is_json_where_json_was_asked_for() -> None:
    result = call("run", "--jobb", "x", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["exit_code"] == 2


def test_run_shows_the_summary_on_stdout_and_progress_on_stderr(folder: Path, runner: FakeRunner) -> None:
    result = call("run", "job.yaml")
    assert result.exit_code == 0
    assert "1,000 in = 990 out + 10 rejected + 0 filtered" in result.stdout
    assert "python -m pipeline verify churn-20260101-120000-a1b2" in result.stdout
    assert "scoring: 1,000 rows in 2 partitions" in result.stderr
    assert "100%, 2/2 partitions, 1,000 rows" in result.stderr
    assert "partitions," not in result.stdout.partition("balance")[0]


def test_run_gives_one_json_object(folder: Path, runner: FakeRunner) -> None:
    result = call("run", "job.yaml", "--json")
    assert json.loads(result.stdout) == plain(report())


def test_quiet_shows_no_progress(folder: Path, runner: FakeRunner) -> None:
    assert call("run", "job.yaml", "-q").stderr == ""


def test_flags_become_settings_and_overrides_the_spec(folder: Path, runner: FakeRunner) -> None:
    flags = ["--workers", "3", "--threads", "2", "--memory-limit", "1GiB", "--cluster", "c", "--directory", "jobs"]
    result = call(
        "run", "job.yaml", "--job", "mine", "--set", "sink.path=elsewhere/", "--set", "sink.mode=append", *flags
    )
    assert result.exit_code == 0, result.stderr
    ((name, spec, options),) = runner.calls
    settings = options["settings"]
    assert name == "run"
    assert (spec.sink.path, spec.sink.mode) == ("elsewhere/", "append")
    assert options["job_id"] == "mine"
    assert (settings.workers, settings.threads, settings.memory_limit) == (3, 2, "1GiB")
    assert (settings.cluster, settings.directory) == ("c", "jobs")


def test_parameters_are_given_with_p(folder: Path, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "daily.yaml").write_text(JOB + "params: {day: , country: de}\n")
    monkeypatch.setenv("PIPELINE_PARAMS__COUNTRY", "se")
    override = "sink.path=out/${params.day}/${params.country}/"
    result = call("run", "daily.yaml", "-p", "day=2026-01-01", "--set", override)
    assert result.exit_code == 0, result.stderr
    assert runner.calls[0][1].sink.path == "out/2026-01-01/se/"
    missing = call("run", "daily.yaml")
    assert (missing.exit_code, "-p day=VALUE" in missing.stderr) == (2, True)


def test_show_config_shows_the_source_of_every_value(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_ATTEMPTS", "7")
    flags = ["--workers", "3", "--set", "sink.mode=append"]
    shown = json.loads(call("plan", "job.yaml", "--show-config", "--json", *flags).stdout)
    assert shown["spec"]["sink.mode"]["from"] == "-p/--set"
    assert shown["spec"]["name"]["origin"].startswith("job.yaml:")
    assert shown["settings"]["workers"] == {
        "value": 3,
        "from": "flag",
        "origin": "--workers",
        "over": [{"value": None, "from": "built-in", "origin": "built-in"}],
    }
    assert shown["settings"]["attempts"]["origin"] == "PIPELINE_ATTEMPTS"
    text = call("plan", "job.yaml", "--show-config", *flags).stdout
    assert re.search(r"^workers +3 +flag +--workers$", text, re.MULTILINE)
    assert re.search(r"^attempts +7 +environment +PIPELINE_ATTEMPTS$", text, re.MULTILINE)


@pytest.mark.parametrize("variable", [None, "by-variable"])
def test_set_wins_over_the_variable_of_the_cluster(
    variable: str | None, folder: Path, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.execution.clusters import cluster_choice

    if variable:
        monkeypatch.setenv("PIPELINE_CLUSTER", variable)
    call("run", "job.yaml", "--set", "cluster=by-set")
    call("run", "job.yaml")
    chosen = [cluster_choice(spec, settings=options["settings"]).value for _, spec, options in runner.calls]
    assert chosen == ["by-set", variable or "local"]


def test_modules_are_looked_for_beside_the_spec_and_here(folder: Path, runner: FakeRunner, tmp_path: Path) -> None:
    (folder / "specs").mkdir()
    (folder / "specs" / "job.yaml").write_text(JOB)
    call("run", "specs/job.yaml")
    assert runner.calls[0][2]["settings"].import_paths == (str(folder / "specs"), str(folder))


def test_strict_turns_warnings_into_exit_code_3(folder: Path, runner: FakeRunner) -> None:
    assert call("run", "job.yaml", "--strict").exit_code == 0
    runner.outcome = report(status=Status.SUCCEEDED_WITH_WARNINGS, warnings=("10 rows were rejected",))
    assert call("run", "job.yaml").exit_code == 0
    result = call("run", "job.yaml", "--strict")
    assert result.exit_code == 3
    assert "10 rows were rejected" in result.stdout
    assert call("resume", "--strict").exit_code == 3


def test_run_of_a_job_directory_resumes_the_job(folder: Path, runner: FakeRunner) -> None:
    job = folder / ".pipeline" / "jobs" / "churn-1"
    job.mkdir(parents=True)
    (job / "job.json").write_text("{}")
    assert call("run", f"{job}/").exit_code == 0
    assert runner.calls[0][:2] == ("resume", str(job))
    assert call("run", str(job), "--set", "sink.path=x").exit_code == 2
    assert call("run", str(job), "--job", "x").exit_code == 2


def test_run_of_another_folder_shows_the_command(folder: Path, runner: FakeRunner) -> None:
    result = call("run", ".")
    assert result.exit_code == 2
    assert "python -m pipeline run job.yaml" in result.stderr
    assert runner.calls == []


def test_resume_defaults_to_the_last_job(folder: Path, runner: FakeRunner) -> None:
    call("resume")
    call("resume", "churn-2026")
    assert [(name, job) for name, job, _ in runner.calls] == [("resume", "@last"), ("resume", "churn-2026")]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OutputExists("the output exists already", where="out/", next_step="--set sink.mode=overwrite"), 6),
        (TooManyRejects("too many rows were rejected", found="12 of 100"), 4),
        (Interrupted("interrupted", next_step="python -m pipeline resume churn-1"), 130),
        (Interrupted("terminated", signal_number=15, next_step="python -m pipeline resume churn-1"), 143),
    ],
)
def test_error_is_printed_with_its_exit_code(folder: Path, runner: FakeRunner, error: Exception, code: int) -> None:
    runner.outcome = error
    text = call("run", "job.yaml")
    assert text.exit_code == code
    assert text.stdout == ""
    assert text.stderr.endswith(f"{error}\n")
    assert "Traceback" not in text.stderr
    told = json.loads(call("run", "job.yaml", "--json").stdout)
    assert told["error"]["exit_code"] == code
    assert told["job"] == "churn-20260101-120000-a1b2"


def test_a_defect_exits_with_1_and_shows_its_traceback_when_asked(folder: Path, runner: FakeRunner) -> None:
    runner.outcome = ZeroDivisionError("oh")
    short = call("run", "job.yaml")
    assert short.exit_code == 1
    assert "ZeroDivisionError: oh" in short.stderr
    assert "-v" in short.stderr
    assert "Traceback" not in short.stderr
    long = call("run", "job.yaml", "-v")
    assert long.exit_code == 1
    assert "Traceback" in long.stderr
    assert json.loads(call("run", "job.yaml", "--json").stdout)["error"]["kind"] == "ZeroDivisionError"


def test_control_c_outside_of_a_job_exits_with_130(folder: Path, runner: FakeRunner) -> None:
    runner.outcome = KeyboardInterrupt()
    assert call("run", "job.yaml").exit_code == 130


def test_a_reader_that_went_away_is_no_traceback() -> None:
    code = "import sys; from pipeline.cli import main; main(['validate', '--schema'], prog_name='pipeline')"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 141
    assert errors == ""


def test_a_missing_spec_is_one_short_message(folder: Path) -> None:
    result = call("run", "nowhere.yaml")
    assert result.exit_code == 2
    assert result.stderr == (
        "no job spec at that path\n"
        "  where:    nowhere.yaml\n"
        "  next:     fix the path, or write a new spec with: python -m pipeline init\n"
    )


def test_a_python_tag_exits_with_7(folder: Path) -> None:
    (folder / "job.yaml").write_text(JOB + "cluster: !!python/name:os.system\n")
    assert call("validate", "job.yaml").exit_code == 7


def test_validate_shows_every_issue(folder: Path) -> None:
    (folder / "job.yaml").write_text(JOB + "eror: 1\ncluster: no\n")
    result = call("validate", "job.yaml")
    assert result.exit_code == 2
    assert "job.yaml:6:1" in result.stdout
    assert "job.yaml:7:10" in result.stdout
    told = json.loads(call("validate", "job.yaml", "--json").stdout)
    assert told["ok"] is False
    assert [issue["where"] for issue in told["problems"][0]["issues"]] == ["job.yaml:6:1", "job.yaml:7:10"]


def test_validate_looks_at_steps_and_model_too(folder: Path) -> None:
    (folder / "features.py").write_text("def build(frame):\n    return frame\n")
    (folder / "job.yaml").write_text(JOB.replace("steps:\n", "steps:\n  - map: features:biuld\n"))
    told = json.loads(call("validate", "job.yaml", "--json").stdout)
    assert [problem["kind"] for problem in told["problems"]] == ["StepFailed", "ModelError"]


def test_validate_prints_the_schema(folder: Path) -> None:
    result = call("validate", "--schema")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["title"] == "Job spec"
    assert call("validate").exit_code == 2


def test_init_writes_a_spec_and_never_over_one(tmp_path: Path) -> None:
    result = call("init", str(tmp_path / "new"))
    path = tmp_path / "new" / "job.yaml"
    assert result.exit_code == 0
    assert f"python -m pipeline plan {path}" in result.stdout
    assert JobSpec.load(path).name == "my-job"
    path.write_text("mine")
    again = call("init", str(tmp_path / "new"), "--json")
    assert again.exit_code == 6
    assert json.loads(again.stdout)["error"]["kind"] == "OutputExists"
    assert path.read_text() == "mine"


@pytest.mark.parametrize("part", [JobSpec, Source, MapStep, Score, Output, Sink, Errors, ColumnContract])
def test_the_template_explains_every_field(part: Any) -> None:
    missing = [name for name in part.model_fields if f"{name}:" not in JOB_TEMPLATE]
    assert missing == []


def test_the_template_is_valid_with_every_comment_taken_away() -> None:
    """A person who uncomments an example must not meet an error."""
    fields = [name for part in (JobSpec, Source, Score, Sink, Errors) for name in part.model_fields]
    others = (
        "- map:",
        "  dtype_backend:",
        "  row_wise:",
        "  on_error:",
        "  timeout:",
        "  concurrency:",
        "  rows_per_call:",
        "  row_timeout:",
        "  age:",
        "  plan:",
        "  s3:",
        "  - {cron:",
        "  - {when:",
        "  - {url:",
        "  - {openlineage:",
    )
    lines = []
    for line in JOB_TEMPLATE.splitlines():
        text = line.strip().removeprefix("# ")
        is_example = line.strip().startswith("# ") and (text.split(":")[0] in fields or text.startswith(others))
        lines.append(line.replace("# ", "", 1) if is_example else line)
    # The fields whose other form is an example.
    lines = [line for line in lines if line.strip() not in ("output: prediction", "model: model.json")]
    spec = JobSpec.load("\n".join(lines) + "\n")
    assert [step.map for step in spec.maps] == ["features:build"]
    assert set(spec.contract) == {"age", "plan"}
    assert spec.sink.target_bytes == 256 << 20


@pytest.fixture
def replace_module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def replace(name: str, **attributes: Any) -> None:
        package, _, last = f"pipeline.{name}".rpartition(".")
        module = ModuleType(f"pipeline.{name}")
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, f"pipeline.{name}", module)
        monkeypatch.setattr(import_module(package), last, module, raising=False)

    return replace


def test_list_shows_jobs_as_a_table_or_json(folder: Path, replace_module: Callable[..., None]) -> None:
    jobs: list[Any] = []
    asked: list[dict[str, Any]] = []

    def list_jobs(root: str, **wanted: Any) -> tuple[Any, ...]:
        asked.append(wanted)
        return tuple(jobs)

    replace_module("jobs.listing", list_jobs=list_jobs)
    assert "no jobs in" in call("list").stdout
    assert "no matching jobs" in call("list", "--name", "x*").stdout
    one = {
        "job": "churn-1",
        "status": "RUNNING",
        "age": 75.0,
        "partitions": {"done": 3, "planned": 40},
        "rows": 12345,
        "output": "out",
    }
    jobs.append(SimpleNamespace(to_dict=lambda now: one))
    lines = call("list").stdout.splitlines()
    assert lines[0].split() == ["JOB", "STATUS", "AGE", "DONE", "ROWS", "OUTPUT"]
    assert lines[1].split() == ["churn-1", "RUNNING", "1", "min", "15", "s", "3/40", "12,345", "out"]
    assert json.loads(call("list", "--json").stdout)["jobs"] == [one]
    call("list", "--status", "running", "--status", "QUEUED", "--limit", "7")
    assert asked[-1] == {"name": "", "statuses": frozenset({"RUNNING", "QUEUED"}), "limit": 7}
    wrong = call("list", "--status", "runing")
    assert wrong.exit_code == 2
    assert "queued" in wrong.stderr


def test_status_shows_the_report_of_a_job_that_ended(folder: Path, replace_module: Callable[..., None]) -> None:
    asked = []
    job = SimpleNamespace(read_report=lambda: plain(report()), status=lambda: "SUCCEEDED")

    def find_job(root: str, name: str) -> Any:
        asked.append((root, name))
        return job

    replace_module("jobs.listing", find_job=find_job)
    assert json.loads(call("status", "--json", "--directory", "d").stdout) == plain(report())
    assert call("status", "churn").stdout.startswith("SUCCEEDED  churn-20260101-120000-a1b2\n")
    assert asked == [("d", "@last"), (".pipeline/jobs", "churn")]


def test_verify_exits_with_6_when_a_check_fails(folder: Path, replace_module: Callable[..., None]) -> None:
    asked: list[dict[str, Any]] = []

    def verify(job: Any, **options: Any) -> Any:
        asked.append(options)
        checks = (Check("rows", True, "1,000 rows"), Check("checksums", options["seed"] != 7, "1 differs"))
        return Verification(job.job, checks)

    replace_module("jobs.listing", find_job=lambda root, name: SimpleNamespace(job="churn-1"))
    replace_module("report.verify", verify=verify)
    good = call("verify", "--sample", "10", "--seed", "1")
    assert good.exit_code == 0
    assert good.stdout.startswith("VERIFIED  churn-1\n")
    bad = call("verify", "--seed", "7", "--json")
    assert bad.exit_code == 6
    assert [check["ok"] for check in json.loads(bad.stdout)["checks"]] == [True, False]
    assert asked == [
        {"sample": 10, "seed": 1, "call_services": False},
        {"sample": 1000, "seed": 7, "call_services": False},
    ]


def test_rejects_are_shown_by_reason(folder: Path, replace_module: Callable[..., None]) -> None:
    summary = RejectSummary(
        job="churn-1",
        groups=(RejectGroup("contract:age", 2, (RejectExample("a.parquet", 1234, "age is 999", {"age": 999}),)),),
        files=("/jobs/churn-1/rounds/0/rejects/00000-x.parquet",),
        total=2,
        quarantined_files=(QuarantinedFile("b.parquet", "file:CorruptInput", "cut"),),
    )
    asked: list[tuple[int, str]] = []

    def summarise(job: Any, *, examples: int, reason: str) -> Any:
        asked.append((examples, reason))
        return summary

    replace_module("jobs.listing", find_job=lambda root, name: SimpleNamespace(job="churn-1"))
    replace_module("report.rejects", summarise=summarise, export=lambda job, path, *, reason: Export(path, 2))
    text = call("rejects", "--limit", "1").stdout
    assert "b.parquet (rows unknown)" in text
    assert "2 × contract:age" in text
    assert "a.parquet, row 1,234: age is 999" in text
    assert "00000-x.parquet" in text
    shown = json.loads(call("rejects", "--json").stdout)
    assert shown == {"schema_version": 1, **json.loads(json.dumps(summary.to_dict()))}
    written = json.loads(call("rejects", "--json", "--reason", "contract:*", "--export", "bad.csv").stdout)
    assert written["exported"] == {"path": "bad.csv", "rows": 2}
    assert asked == [(1, "*"), (3, "*"), (3, "contract:*")]


@pytest.mark.parametrize(
    ("score", "is_started"), [("{by: key, models: 'm/{}.ubj'}", True), ("{model: m.ubj}", False)], ids=["by key", "one"]
)
def test_many_models_are_inspected_in_forks(
    score: str, is_started: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[bool] = []
    monkeypatch.setattr(forkserver, "is_running", lambda: False)
    monkeypatch.setattr(forkserver, "start", lambda environment, has_steps: started.append(has_steps))
    spec = f"name: k\nsource: {{path: in}}\nsteps: [score: {score}]\nsink: {{path: out}}\n"
    options.load(spec, overrides=(), params=())
    assert started == [False] * is_started
