"""Full disks: a file system of 8 MB, mounted for the test, under the output and under the job."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from pipeline.errors import DiskFull
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.listing import find_job, list_jobs
from pipeline.report.verify import verify
from pipeline.runner import resume, run
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.testing.oracle import Lake, make_lake, oracle
from pipeline.testing.processes import ProcessCluster
from pipeline.testing.row_check import read_folder

pytestmark = pytest.mark.slow
SIZE = 8 << 20


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self, *, leave: int) -> None:
        """Leave room for so many bytes."""
        state = os.statvfs(self.path)
        with open(self.path / "ballast", "wb") as file:
            file.write(bytes(max(0, state.f_bavail * state.f_frsize - leave)))

    def make_room(self) -> None:
        (self.path / "ballast").unlink()

    def left(self) -> list[str]:
        """Return the files on it, except the ballast."""
        return sorted(str(one.relative_to(self.path)) for one in self.path.rglob("*") if one.name != "ballast")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=0755", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield Disk(path)
    subprocess.run(["umount", str(path)], check=True)


@pytest.fixture(scope="module")
def big_lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Make a lake whose output takes some two megabytes."""
    return make_lake(tmp_path_factory.mktemp("disk") / "lake", rows=(20_000, 15_000), row_group=5000)


@pytest.fixture(scope="module")
def expected(big_lake: Lake, model_path: Path) -> pd.DataFrame:
    return oracle(big_lake.files, model_path)


class Job:
    """A job with its directory and its output where a test wants them."""

    def __init__(self, *, lake: Lake, model: Path, jobs: Path, out: Path, cluster: ProcessCluster) -> None:
        self.out = out
        self.settings: Settings = Settings.load(directory=str(jobs), cluster=cluster.address, drain_timeout=30)
        self.spec = JobSpec.build(
            name="full",
            source={"path": str(lake.path)},
            steps=[{"score": {"model": str(model)}}],
            sink={"path": str(out), "mode": "overwrite"},
        )

    def run(self, **source: str) -> None:
        run(JobSpec.build(**{**self.spec.to_dict(), **({"source": source} if source else {})}), settings=self.settings)

    def directory(self) -> JobDirectory:
        return find_job(self.settings.directory, "@last")

    def frame(self) -> pd.DataFrame:
        return read_folder(self.out).to_pandas()

    def finish(self, expected: pd.DataFrame) -> None:
        assert resume("@last", settings=self.settings).status == "SUCCEEDED"
        pd.testing.assert_frame_equal(self.frame(), expected, check_exact=True)
        proof = verify(self.directory())
        assert proof.ok, proof.checks


@pytest.mark.fault(27)
def test_a_full_disk_under_the_output_leaves_what_was_published(
    disk: Disk,
    tmp_path: Path,
    big_lake: Lake,
    model_path: Path,
    expected: pd.DataFrame,
    process_cluster: ProcessCluster,
) -> None:
    job = Job(lake=big_lake, model=model_path, jobs=tmp_path / "jobs", out=disk.path / "out", cluster=process_cluster)
    small = make_lake(tmp_path / "small", rows=(300,))
    job.run(path=str(small.path))
    before, files = job.frame(), disk.left()
    disk.fill(leave=600_000)
    with pytest.raises(DiskFull) as caught:
        job.run()
    assert caught.value.exit_code == 74
    pd.testing.assert_frame_equal(job.frame(), before, check_exact=True)
    assert disk.left() == files, "the attempt was not removed"
    assert job.directory().status() == "FAILED"
    assert len(job.directory().manifests.numbers()) == 1, "committed, and resume publishes it"
    disk.make_room()
    job.finish(expected)


@pytest.mark.fault(28)
@pytest.mark.parametrize("leave", [1_000_000, 300_000], ids=["room for some of it", "room for hardly any of it"])
def test_a_full_disk_under_the_job_acknowledges_nothing_it_does_not_hold(
    leave: int,
    disk: Disk,
    tmp_path: Path,
    big_lake: Lake,
    model_path: Path,
    expected: pd.DataFrame,
    process_cluster: ProcessCluster,
) -> None:
    job = Job(lake=big_lake, model=model_path, jobs=disk.path / "jobs", out=tmp_path / "out", cluster=process_cluster)
    disk.fill(leave=leave)
    with pytest.raises(DiskFull) as caught:
        job.run()
    assert caught.value.exit_code == 74
    assert not job.out.exists()
    directory = job.directory()
    assert not directory.manifests.numbers()
    assert not directory.status().is_success
    for receipt in directory.receipts.all():
        assert receipt.data is not None
        assert directory.store.size(f"rounds/0/{receipt.data.name}") == receipt.data.bytes
    disk.make_room()
    job.finish(expected)


@pytest.mark.fault(28)
def test_without_any_room_there_is_no_job(
    disk: Disk,
    tmp_path: Path,
    big_lake: Lake,
    model_path: Path,
    expected: pd.DataFrame,
    process_cluster: ProcessCluster,
) -> None:
    job = Job(lake=big_lake, model=model_path, jobs=disk.path / "jobs", out=tmp_path / "out", cluster=process_cluster)
    disk.fill(leave=0)
    with pytest.raises(DiskFull):
        job.run()
    assert list_jobs(job.settings.directory) == ()
    disk.make_room()
    job.run()
    pd.testing.assert_frame_equal(job.frame(), expected, check_exact=True)
