"""The alias of the model changes when a third of the job is done: each policy, and kill -9, in real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.jobs.directory import JobDirectory
from pipeline.models.registry.file_registry import BuiltInRegistry, VersionMetadata
from pipeline.report.verify import verify
from pipeline.testing.oracle import Lake, make_lake, oracle, train_model
from pipeline.testing.processes import ProcessCluster, start_command, wait_until

STEP = '''
import os, time
from pathlib import Path

JOB, GATES = Path({job!r}), Path({gates!r})
IS_WORKER = "DASK_PIPELINE_TEST__IS_WORKER" in os.environ


def build(frame):
    """On workers: once a third of the partitions of a round is done, none ends until the round's gate is open."""
    while IS_WORKER and any(is_held(round) for round in (0, 1)):
        time.sleep(0.01)
    return frame.assign(tenure=frame["tenure"])


def is_held(round):
    done = len(list((JOB / f"rounds/{{round}}/receipts").glob("*.json")))
    return done >= {third} and not (GATES / f"open-{{round}}").exists()
'''
PARTITIONS = 9
THIRD = PARTITIONS // 3

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uniform_lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("drift") / "lake", rows=(4000,) * PARTITIONS, row_group=2000)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [train_model(folder / f"m{number}.ubj", rounds=4 + 3 * number) for number in range(2)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessCluster]:
    config = {"pipeline-test.is-worker": 1}
    with ProcessCluster(tmp_path_factory.mktemp("cluster"), config=config, is_shared=True) as cluster:
        yield cluster


class MovingAlias:
    """A folder with a job, a registry, and gates that hold the job."""

    def __init__(self, folder: Path, uniform_lake: Lake, models: list[Path], cluster: str, policy: str) -> None:
        self.folder, self.lake, self.models = folder, uniform_lake, models
        self.job = folder / ".pipeline/jobs/moving-1"
        self.registry = BuiltInRegistry(str(folder / ".pipeline/models"))
        for model in models:
            self.registry.register("churn", model.read_bytes(), VersionMetadata())
        self.registry.set_alias("churn", "champion", 1)
        # Workers outlive a test, and keep a module by its name.
        module = f"held_{folder.name}".replace("-", "_")
        step = STEP.format(job=str(self.job), gates=str(folder), third=THIRD)
        (folder / f"{module}.py").write_text(step)
        spec = {
            "name": "moving",
            "source": {"path": str(uniform_lake.path)},
            "steps": [{"map": f"{module}:build"}, {"score": {"model": "models:/churn@champion"}}],
            "sink": {"path": str(folder / "out")},
            "on_alias_change": policy,
            "cluster": cluster,
        }
        (folder / "job.yaml").write_text(yaml.safe_dump(spec))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return start_command(self.folder, *arguments, "--json", environment={"DASK_PIPELINE__ALIAS_POLL": "0.1"})

    def run(self) -> subprocess.Popen[str]:
        return self.start("run", "job.yaml", "--job", "moving-1")

    def end(self, process: subprocess.Popen[str], *, code: int = 0) -> dict[str, Any]:
        out, err = process.communicate(timeout=240)
        assert process.returncode == code, err
        found: dict[str, Any] = json.loads(out)
        return found

    def move(self, *command: str) -> None:
        self.end(self.start("models", *command))

    def done(self, round: int) -> int:
        return len(list((self.job / f"rounds/{round}/receipts").glob("*.json")))

    def until(self, condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
        """Wait for it, while the driver lives."""
        wait_until(lambda: condition() or process.poll() is not None, seconds=240)
        assert condition(), process.communicate()[1]

    def open_gate(self, round: int) -> None:
        (self.folder / f"open-{round}").touch()

    def has_event(self, name: str) -> bool:
        path = self.job / "events.jsonl"
        return path.exists() and any(f'"event": "{name}"' in line for line in path.read_text().splitlines())

    def assert_published(self, result: dict[str, Any], version: int) -> None:
        """Every published file is of that version, and the rows are those of its oracle."""
        files = sorted((self.folder / "out").glob("*.parquet"))
        named = [json.loads(pq.read_schema(file).metadata[b"pipeline.model"]) for file in files]
        record = self.registry.version("churn", version)
        expected = {"name": "churn", "version": str(version), "digest": record.digest, "uri": record.uri}
        assert files
        assert named == [expected] * len(files)
        out = pd.concat([pq.read_table(file).to_pandas() for file in files], ignore_index=True)
        wanted = oracle(self.lake.files, self.models[version - 1])
        pd.testing.assert_frame_equal(out, wanted, check_exact=True)
        rows = self.lake.rows
        assert result["rows"] == {"in": rows, "out": rows, "rejected": 0, "filtered": 0}
        assert result["model"]["version"] == str(version)
        proof = verify(JobDirectory.open(self.job))
        assert proof.ok, proof.checks


@pytest.fixture
def moving_alias(
    tmp_path: Path, uniform_lake: Lake, models: list[Path], cluster: ProcessCluster
) -> Callable[[str], MovingAlias]:
    return lambda policy: MovingAlias(tmp_path, uniform_lake, models, cluster.address, policy)


def test_pin(moving_alias: Callable[[str], MovingAlias]) -> None:
    it = moving_alias("pin")
    process = it.run()
    it.until(lambda: it.done(0) >= THIRD, process)
    it.move("alias", "churn", "champion", "2")
    it.until(lambda: it.has_event("alias_change"), process)
    it.open_gate(0)
    result = it.end(process)
    it.assert_published(result, 1)
    assert [text for text in result["warnings"] if "from version 1 to version 2" in text]
    assert not list((it.job / "rounds").glob("*.json"))


def test_fail(moving_alias: Callable[[str], MovingAlias]) -> None:
    it = moving_alias("fail")
    process = it.run()
    it.until(lambda: it.done(0) >= THIRD, process)
    it.move("alias", "churn", "champion", "2")
    it.open_gate(0)
    assert it.end(process, code=5)["error"]["kind"] == "ModelChanged"
    assert not (it.folder / "out").exists()
    assert it.end(it.start("resume", "moving-1"), code=5)["error"]["kind"] == "ModelChanged"
    before = {path.name: path.read_bytes() for path in (it.job / "rounds/0/receipts").iterdir()}
    it.move("rollback", "churn", "champion")
    it.assert_published(it.end(it.start("resume", "moving-1")), 1)
    assert len(before) >= THIRD
    assert {name: (it.job / "rounds/0/receipts" / name).read_bytes() for name in before} == before


def test_restart(moving_alias: Callable[[str], MovingAlias]) -> None:
    it = moving_alias("restart")
    process = it.run()
    it.until(lambda: it.done(0) >= THIRD, process)
    it.move("alias", "churn", "champion", "2")
    it.until((it.job / "rounds/1.json").exists, process)
    assert not (it.folder / "out").exists()
    it.open_gate(0)
    it.open_gate(1)
    result = it.end(process)
    it.assert_published(result, 2)
    assert [text for text in result["warnings"] if "version 1 -> 2" in text]


@pytest.mark.parametrize("moment", ["before the round", "in the round"])
def test_a_driver_that_is_killed_while_it_starts_over(moment: str, moving_alias: Callable[[str], MovingAlias]) -> None:
    it = moving_alias("restart")
    process = it.run()
    it.until(lambda: it.done(0) >= THIRD, process)
    if moment == "before the round":
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        it.move("alias", "churn", "champion", "2")
        it.open_gate(0)
    else:
        it.move("alias", "churn", "champion", "2")
        it.until((it.job / "rounds/1.json").exists, process)
        it.open_gate(0)
        it.until(lambda: it.done(1) >= THIRD, process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert not (it.folder / "out").exists()
    before = {path.name: path.read_bytes() for path in (it.job / "rounds").glob("1/receipts/*.json")}
    assert (len(before) >= THIRD) == (moment == "in the round")
    it.open_gate(1)
    it.assert_published(it.end(it.start("resume", "moving-1")), 2)
    after = {name: (it.job / "rounds/1/receipts" / name).read_bytes() for name in before}
    assert after == before, "what was scored with the new version is not scored again"
    assert [path.name for path in (it.job / "rounds").glob("*.json")] == ["1.json"]
