"""Commands of batch systems: what they are given, and how their answers are read."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.execution.clusters.batch_commands import SYSTEMS, Answer, BatchCommands, CommandFailed, run_command
from pipeline.execution.clusters.pool import JobEnd, JobStatus

SQUEUE = """\
11|RUNNING|None|2026-11-30T10:00:00|n1|pipeline-a
12|PENDING|Priority|2026-11-30T15:14:00||pipeline-a
13|PENDING|PartitionTimeLimit|N/A||pipeline-a
14|CANCELLED|None|2026-11-30T10:00:00|n2|a|b
15|COMPLETING|None|2026-11-30T10:00:00|n2|pipeline-a
16|OUT_OF_MEMORY|OutOfMemory|2026-11-30T10:00:00|n2|pipeline-a
"""
QSTAT = """\
Job id            Name             User              Time Use S Queue
----------------  ---------------- ----------------  -------- - -----
11.server         pipeline         ann               00:00:01 R workq
12.server         pipeline         ann                      0 Q workq
13.server         pipeline         ann               00:00:01 F workq
"""
SGE = """\
job-ID  prior   name       user         state submit/start at     queue                          slots ja-task-ID
-----------------------------------------------------------------------------------------------------------------
     11 0.55500 pipeline   ann          r     11/30/2026 10:00:00 all.q@node1                        1
     12 0.55500 pipeline   ann          qw    11/30/2026 10:00:00                                    1
     13 0.55500 pipeline   ann          Eqw   11/30/2026 10:00:00                                    1
"""


def playing(system: str, *answers: Answer) -> tuple[BatchCommands, list[list[str]]]:
    """Commands that get ``answers``, and the list of commands that were run."""
    queued, calls = list(answers), []

    def run(command: Sequence[str], stdin: str) -> Answer:
        calls.append(list(command))
        return queued.pop(0)

    return replace(SYSTEMS[system], run=run), calls


class TestStates:
    def test_of_slurm(self) -> None:
        commands, calls = playing("SLURM", Answer(0, SQUEUE, ""))
        states = commands.states(["11", "12", "13", "14", "15", "16", "17"])
        assert "--jobs=11,12,13,14,15,16,17" in calls[0]
        assert states == {
            "11": JobStatus(is_running=True, node="n1", name="pipeline-a"),
            "12": JobStatus(reason="Priority", expected="2026-11-30T15:14:00", name="pipeline-a"),
            "13": JobStatus(reason="PartitionTimeLimit", is_impossible=True, name="pipeline-a"),
            "14": JobStatus(end=JobEnd.CANCELLED, node="n2", name="a|b"),
            "15": JobStatus(is_ending=True, node="n2", name="pipeline-a"),
            "16": JobStatus(end=JobEnd.OUT_OF_MEMORY, node="n2", name="pipeline-a"),
        }

    @pytest.mark.parametrize(
        ("system", "text", "third"),
        [
            ("PBS", QSTAT, JobStatus(end=JobEnd.UNKNOWN)),
            ("SGE", SGE, JobStatus(end=JobEnd.FAILED, reason="state Eqw")),
            ("LSF", "11|RUN|n1\n12|PEND|-\n13|EXIT|n1\n", JobStatus(end=JobEnd.UNKNOWN)),
            ("HTCondor", "11 0 2\n12 0 1\n13 0 3\n", JobStatus(end=JobEnd.CANCELLED)),
        ],
    )
    def test_of_other_systems(self, system: str, text: str, third: JobStatus) -> None:
        commands, _ = playing(system, Answer(0, text, ""))
        states = commands.states(["11", "12", "13"])
        assert [states[id].is_running for id in ("11", "12", "13")] == [True, False, False]
        assert states["12"].end is None
        assert states["13"] == third

    def test_of_jobs_that_are_all_unknown(self) -> None:
        commands, _ = playing("SLURM", Answer(1, "", "slurm_load_jobs error: Invalid job id specified"))
        assert commands.states(["11"]) == {}

    def test_without_an_answer(self) -> None:
        commands, _ = playing("SLURM", Answer(1, "", "slurm_load_jobs error: Unable to contact slurm controller"))
        with pytest.raises(CommandFailed, match="Unable to contact"):
            commands.states(["11"])


class TestSubmission:
    @pytest.mark.parametrize(
        ("text", "is_refused"),
        [
            ("sbatch: error: Batch job submission failed: Requested node configuration is not available", True),
            ("sbatch: error: invalid partition specified: mian", True),
            ("sbatch: error: Batch job submission failed: Unable to contact slurm controller", False),
            ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", False),
            ("sbatch: error: QOSMaxSubmitJobPerUserLimit", False),
        ],
    )
    def test_tells_refusals_from_failures_in_passing(self, text: str, is_refused: bool) -> None:
        commands, _ = playing("SLURM", Answer(1, "", text))
        with pytest.raises(CommandFailed) as caught:
            commands.submit(Path("worker.sh"))
        assert caught.value.is_refused is is_refused
        assert caught.value.text == text

    def test_of_lsf_keeps_the_error_text(self, tmp_path: Path) -> None:
        """dask-jobqueue throws it away: ``2> /dev/null``."""
        script = tmp_path / "worker.sh"
        script.write_text("#BSUB -q mian\n")
        commands, calls = playing("LSF", Answer(255, "", "mian: No such queue. Job not submitted."))
        with pytest.raises(CommandFailed, match="No such queue") as caught:
            commands.submit(script)
        assert calls == [["bsub"]]
        assert caught.value.is_refused
        commands, _ = playing("LSF", Answer(0, "Job <77> is submitted to queue <normal>.", ""))
        assert commands.submit(script) == "77"


class TestCancellation:
    def test_of_jobs_that_are_gone_is_no_error(self) -> None:
        commands, calls = playing("SLURM", Answer(1, "", "scancel: error: Kill job error on job id 1: Invalid job id"))
        commands.cancel(["1", "2"])
        assert calls == [["scancel", "1", "2"]]


def test_a_command_that_hangs_is_ended_with_its_children() -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    began = time.monotonic()
    with pytest.raises(CommandFailed, match=r"did not answer within 0 s"):
        run_command([sys.executable, "-c", child], timeout=0.3)
    assert time.monotonic() - began < 30, "a child would hold the pipes open for a minute"


def test_a_command_that_is_missing() -> None:
    with pytest.raises(CommandFailed, match="no-such-program"):
        run_command(["no-such-program"])
