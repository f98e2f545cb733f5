"""Random sequences of what happens to a job: partitions done, split, retried, quarantined, scored again, late workers.

After each step the job is opened anew, as another process does. At the end every row of the files that count is output
or rejected exactly once, and the manifest reconciles.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipeline.common.rows import InputFile
from pipeline.driver.quarantine import open_quarantine_round
from pipeline.driver.retry import find_work, number_partitions
from pipeline.errors import CorruptInput
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.rounds import Round, RoundReason, make_record
from pipeline.jobs.splits import even_split_points, split_receipt
from pipeline.plan.packing import pack
from pipeline.plan.plan import Limits, Partition
from pipeline.report.rejects import read_rejected
from pipeline.storage.urls import unique_name
from pipeline.testing.examples import choose
from pipeline.testing.jobs import SmallJob, small_job, write_receipt

LIMITS = Limits(workers=2, threads=1, memory=0)
STEPS = ("score", "score", "score", "split", "late", "retry", "quarantine", "rescore")
Step = tuple[str, int, int]
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
"""A sequence takes a second: hours would go by until the shortest one is found."""


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> SmallJob:
    """A job of 75 rows in three files, which quarantines files and may reject half of the rows."""
    folder = tmp_path_factory.mktemp("lake")
    job = small_job(folder / "in", sink=str(folder / "out"), bad_every=10)
    errors = {"max_fraction": 1.0, "files": "quarantine"}
    spec = type(job.plan.spec).model_validate({**job.plan.spec.to_dict(), "errors": errors})
    return replace(job, plan=replace(job.plan, spec=spec))


@dataclass
class History:
    """One job, and what happened to it."""

    job: SmallJob
    root: str

    @property
    def directory(self) -> JobDirectory:
        """The job as another process reads it."""
        return JobDirectory.open(self.root, fsync=False)

    def apply(self, step: Step) -> None:
        """Let one thing happen, if it can."""
        what, first, second = step
        directory = self.directory
        ledger = directory.ledger()
        getattr(self, f"_{what}")(directory, ledger, first, second)
        # Whatever was stored can be read again.
        after = self.directory.ledger()
        assert len(after.done) + len(after.todo) == after.planned

    def _worker(self, number: int) -> SmallJob:
        """A worker's view of which rows are bad: a retry may repair some of them."""
        return replace(self.job, bad_every=(10, 20, 0)[number % 3])

    def _score(self, directory: JobDirectory, ledger: Ledger, first: int, second: int) -> None:
        if todo := ledger.todo:
            partition = todo[first % len(todo)]
            write_receipt(directory, self._worker(second), partition, attempt=unique_name(), of=ledger.last)

    def _split(self, directory: JobDirectory, ledger: Ledger, first: int, second: int) -> None:
        large = [partition for partition in ledger.todo if partition.rows >= 2]
        if large:
            partition = large[first % len(large)]
            split_points = even_split_points(0, partition.rows, parts=2 + second % 3)
            number = ledger.last.number
            model = ledger.last.plan.model.digest
            made = split_receipt(
                partition.id, split_points, plan=ledger.last.digest, model=model, attempt="s", round=number
            )
            directory.receipts.put(made)

    def _late(self, directory: JobDirectory, ledger: Ledger, first: int, second: int) -> None:
        """A worker without a connection ends a partition of any round, superseded or not."""
        rounds = directory.rounds.all()
        of = rounds[first % len(rounds)]
        partitions = of.plan.partitions
        if partitions:
            partition = partitions[second % len(partitions)]
            write_receipt(directory, self._worker(first), partition, attempt=unique_name(), of=of)

    def _retry(self, directory: JobDirectory, ledger: Ledger, first: int, second: int) -> None:
        work = find_work(directory, ledger, limits=LIMITS)
        if not work.partitions and not work.repaired:
            return
        plan = replace(
            ledger.last.plan, files=work.files, partitions=work.partitions, pruned_rows=0, quarantined_files=()
        )
        record = make_record(
            plan,
            number=directory.rounds.next_number(),
            reason=RoundReason.RETRY,
            epoch=1,
            created="",
            supersedes=ledger.pending,
            quarantined_files=work.still_rejected,
            repaired_files=[file.path for file in work.repaired],
        )
        directory.rounds.open(record, plan)

    def _quarantine(self, directory: JobDirectory, ledger: Ledger, first: int, second: int) -> None:
        paths = sorted(ledger.files)
        if len(paths) > 1:
            error = CorruptInput("an input file is damaged", where=paths[first % len(paths)])
            open_quarantine_round(directory, ledger, error, epoch=1)

    def _rescore(self, directory: JobDirectory, ledger: Ledger, first: int, second: int) -> None:
        files: tuple[InputFile, ...] = tuple(ledger.files.values())
        plan = replace(
            ledger.last.plan,
            files=files,
            partitions=number_partitions(pack(files, threads=2)),
            quarantined_files=ledger.quarantined_files,
        )
        record = make_record(
            plan,
            number=directory.rounds.next_number(),
            reason=RoundReason.ALIAS_CHANGE,
            epoch=1,
            created="",
            supersedes={},
            rescore_all=True,
        )
        directory.rounds.open(record, plan)

    def finish(self) -> None:
        """Score all that is left, and check that every row is there once."""
        directory = self.directory
        while todo := directory.ledger().todo:
            for partition in todo:
                write_receipt(directory, self.job, partition, of=_round_of(directory, partition))
        ledger = self.directory.ledger()
        directory.manifests.prepare(ledger)
        ids = Counter(_output_ids(directory, ledger))
        ids.update(row["id"] for batch in read_rejected(directory) for row in batch.to_pylist())
        bad = {file.path for file in ledger.quarantined_files}
        expected = [row for file in self.job.plan.files if file.path not in bad for row in _ids(file)]
        assert ids == Counter(expected)
        assert ledger.rows.input == len(expected)


def _round_of(directory: JobDirectory, partition: Partition) -> Round:
    """Only the last round has partitions left."""
    assert partition.id
    return directory.rounds.all()[-1]


def _ids(file: InputFile) -> list[int]:
    ids: list[int] = pq.read_table(file.path, columns=["id"]).column("id").to_pylist()
    return ids


def _output_ids(directory: JobDirectory, ledger: Ledger) -> Iterator[int]:
    for receipt in ledger.done:
        if receipt.data is not None:
            path = layout.round_file(receipt.round, receipt.data.name)
            yield from pq.read_table(f"{directory.root}/{path}", columns=["id"]).column("id").to_pylist()


@pytest.mark.fault(55)
@settings(max_examples=choose(12, of=600), suppress_health_check=list(HealthCheck), phases=NO_SHRINKING)
@given(steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9)), max_size=14))
def test_every_row_is_counted_once_whatever_happens(lake: SmallJob, steps: list[Step]) -> None:
    folder = tempfile.mkdtemp(prefix="rounds-")
    try:
        made = JobDirectory.create(Path(folder), lake.plan, job="small-1", options=JobOptions(fsync=False))
        history = History(lake, made.root)
        for step in steps:
            history.apply(step)
        history.finish()
    finally:
        shutil.rmtree(folder)


@pytest.mark.fault(55)
def test_a_retry_whose_input_file_turns_bad(lake: SmallJob, tmp_path: Path) -> None:
    """The plan of the third round lists rejected rows first, and its files in another order."""
    made = JobDirectory.create(tmp_path, lake.plan, job="small-1", options=JobOptions(fsync=False))
    history = History(lake, made.root)
    for step in (("score", 0, 0), ("retry", 0, 0), ("quarantine", 2, 0)):
        history.apply(step)
    last = history.directory.ledger().last
    assert [Path(partition.fragments[0].path).parent.name for partition in last.plan.partitions] == ["rejects", "in"]
    history.finish()


@pytest.mark.fault(55)
def test_two_files_that_turn_bad_one_after_the_other(lake: SmallJob, tmp_path: Path) -> None:
    """No retry is needed for such a plan."""
    made = JobDirectory.create(tmp_path, lake.plan, job="small-1", options=JobOptions(fsync=False))
    history = History(lake, made.root)
    for step in (("score", 0, 0), ("quarantine", 0, 0), ("quarantine", 0, 0)):
        history.apply(step)
    history.finish()
