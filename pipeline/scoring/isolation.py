"""Score a partition in a separate process, which may crash, loop or exceed its memory without harm to the worker.

Every crash costs the start of another process. A range of rows that crashes its process is cut into many pieces, not
in two. Good pieces cost next to nothing, because the process lives on; three or four starts find a single bad row
among thousands. Rows that crash every process are rejected with the reason.
"""

from __future__ import annotations

import os
import pickle
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from math import inf
from operator import iadd
from typing import IO, Any

import numpy as np
import pyarrow as pa

from pipeline.common.agreement import merged
from pipeline.common.reasons import Reason, ReasonKind
from pipeline.common.sketch import Sketches
from pipeline.common.step_output import MessageCount, OutputLine, current
from pipeline.devices.inventory import VISIBLE
from pipeline.errors import OutOfMemory, PartitionStuck, PipelineError
from pipeline.models.engines import EngineUse
from pipeline.models.process import process_facts
from pipeline.plan.recipe import KeyedRecipe, StageRecipe, scores_of
from pipeline.scoring.rows import Failures
from pipeline.scoring.scorer import ScoredBatch, reject_table
from pipeline.sources import SourceBatch
from pipeline.sources.types import empty_table

PIECES = 16
"""Pieces into which a range of rows that crashed its process is cut."""
CRASHES = 48
"""Crashes after which a range that crashes again is rejected as it is, however large."""
REACH = 4
"""Consecutive bad rows per further row that is tried together with the next rows; see `Streak`."""
MIN_SECONDS = 5.0
MIN_SHARE = 0.05
"""A single row may take `MIN_SECONDS`, or `MIN_SHARE` of the time of the whole partition if that is more. On a busy
machine, running out of memory takes a while, and must not be reported as a timeout."""
START_SECONDS = 120.0
"""Seconds a process may take to start and to load the model."""
POLL_SECONDS = 0.02
"""Seconds between two checks of the process's memory."""
MEMORY_REASON = str(Reason(ReasonKind.MEMORY, "OutOfMemory"))
TIMEOUT_REASON = str(Reason(ReasonKind.TIMEOUT, "PartitionTimeout"))
SLOW_REASON = str(Reason(ReasonKind.TIMEOUT, "StepTimeout"))
"""Reason of rows that take longer than ``timeout`` and ``row_timeout`` of the steps allow."""
ENGINE_REASON = "rows were scored in a process of their own"
STEPS_SHARE = 0.6
"""Share of the worker's memory limit for the processes in which it scores partitions whose steps have time limits."""
_HEADER = 8


@dataclass(frozen=True)
class Isolation:
    """Limits of a partition that is scored in a separate process."""

    seconds: float = 600.0
    """Time limit for all rows of the partition; a part of the rows gets its share, and at least `MIN_SECONDS`."""
    memory: int = 0
    """Limit of resident bytes; 0: no limit."""
    is_for_steps: bool = False
    """True if only the time limits of the steps count: the partition has crashed no process."""


def for_steps() -> Isolation:
    """Return the limits of a partition whose steps have time limits; each thread of a worker has a process for one."""
    facts = process_facts()
    return Isolation(memory=round(STEPS_SHARE * facts.memory / max(1, facts.threads)), is_for_steps=True)


class CrashError(Exception):
    """The process crashed or was killed while it scored some rows."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class IsolatedScorer:
    """A `Scorer` in another process."""

    def __init__(self, recipe: StageRecipe, isolation: Isolation, *, rows: int) -> None:
        self.batch_rows = recipe.batch_rows
        # Each thread of the worker has such a process.
        self._recipe = replace(recipe, service_share=recipe.service_share / max(1, process_facts().threads))
        self._isolation = isolation
        self._rows = max(1, rows)
        self._child: _Child | None = None
        self._crashes = 0
        self._scored = 0
        self._usage = EngineUse()
        self._batch_seconds, self._row_seconds = recipe.time_limits

    def score_batch(self, batch: SourceBatch, *, paths: Sequence[str] = ()) -> ScoredBatch:
        """Score the rows of ``batch``; rows that crash their process are rejected.

        :raises PipelineError: errors of `Scorer`, except those of memory.
        """
        waiting = [(0, batch.table.num_rows)]
        parts: list[ScoredBatch] = []
        streak = Streak()
        while waiting:
            start, stop = streak.next_range(waiting)
            part = _slice_batch(batch, start, stop)
            try:
                parts.append(self._score_part(part, paths))
            except CrashError as crash:
                # Slow rows are expected where steps have limits: each is searched for, however many there are.
                self._crashes += crash.reason != SLOW_REASON
                if stop - start <= max(1, streak.reach(start)) or self._crashes > CRASHES:
                    streak.add(start, stop)
                    parts.append(_reject_part(part, crash, paths, schema=self._recipe.output_schema))
                else:
                    waiting.extend(reversed(cut_range(start, stop, pieces=PIECES)))
        joined = _join_parts(batch, parts)
        self._scored += joined.table.num_rows
        self._usage += EngineUse(usage=dict(joined.usage))
        return joined

    def engine_use(self) -> EngineUse:
        """Return the engine that evaluated the model: its own library."""
        # A row passes one of the models of a step with models by key.
        passed = [scores_of([step])[: 1 if isinstance(step, KeyedRecipe) else None] for step in self._recipe.chain]
        models = Counter(score.model.flavor for scores in passed for score in scores)
        rows = {library: count * self._scored for library, count in models.items()}
        return self._usage + EngineUse(rows=rows, reasons=(ENGINE_REASON,)) if rows else EngineUse()

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def _score_part(self, part: SourceBatch, paths: Sequence[str]) -> ScoredBatch:
        if self._child is None:
            self._child = _Child(self._recipe, memory=self._isolation.memory)
        seconds, reason = self._seconds(part.table.num_rows)
        try:
            return self._child.score(part, paths, seconds=seconds, late=reason)
        except (MemoryError, OutOfMemory) as error:
            raise CrashError(MEMORY_REASON, str(error) or "MemoryError") from error

    def _seconds(self, rows: int) -> tuple[float, str]:
        """Return the seconds that some rows may take, and the reason of rows that take longer."""
        limit = self._isolation.seconds
        of_partition = max(limit * rows / self._rows, min(limit, max(MIN_SECONDS, MIN_SHARE * limit)))
        of_steps = min(self._batch_seconds or inf, self._row_seconds * rows or inf)
        if of_steps < inf and (self._isolation.is_for_steps or of_steps < of_partition):
            return of_steps, SLOW_REASON
        return of_partition, TIMEOUT_REASON


class Streak:
    """Consecutive rows that crashed their process.

    Bad rows are often next to each other. The longer the streak, the more rows after it are tried together, and
    rejected together if they crash the process too. A hundred bad rows cost some twenty crashes, not a hundred, and at
    most a quarter as many good rows after the last bad row.
    """

    def __init__(self) -> None:
        self._start = self._stop = 0

    def add(self, start: int, stop: int) -> None:
        """Add rows that crashed their process."""
        self._start, self._stop = (self._start if start == self._stop else start), stop

    def reach(self, start: int) -> int:
        """Return the number of rows from ``start`` on that are tried together."""
        return (self._stop - self._start) // REACH if start == self._stop else 0

    def next_range(self, waiting: list[tuple[int, int]]) -> tuple[int, int]:
        """Take the next range from the end of ``waiting``, joined with those after it that the streak reaches."""
        start, stop = waiting.pop()
        while waiting and waiting[-1][0] == stop and waiting[-1][1] - start <= self.reach(start):
            stop = waiting.pop()[1]
        return start, stop


def cut_range(start: int, stop: int, *, pieces: int) -> list[tuple[int, int]]:
    """Cut a range into at most ``pieces`` parts of nearly equal size, none of them empty."""
    count = min(pieces, stop - start)
    edges = [start + (stop - start) * number // count for number in range(count + 1)]
    return list(pairwise(edges))


@dataclass(frozen=True)
class Answered:
    """Answer of a scorer, and what the code of the user printed meanwhile."""

    answer: Any
    lines: tuple[OutputLine, ...] = ()
    counts: tuple[MessageCount, ...] = ()
    left_out: int = 0


@dataclass(frozen=True)
class Died:
    """Answer on behalf of a scorer that crashed."""

    code: int | None
    """Exit status, or the negative number of the signal that ended the process."""

    @property
    def name(self) -> str:
        """Name of the cause of death, such as ``SIGSEGV`` or ``exit3``."""
        if self.code is None:
            return "unknown"
        return signal.Signals(-self.code).name if self.code < 0 else f"exit{self.code}"


class _Child:
    """A process of `pipeline.scoring.isolated_process`, and the scorer that it forks."""

    def __init__(self, recipe: StageRecipe, *, memory: int) -> None:
        self._memory = memory
        self._scorer = 0
        # The process must have no threads when it forks, and no context on a GPU: it scores on the CPU.
        single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", VISIBLE: ""}
        path = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.scoring.isolated_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **single, "PYTHONPATH": path},
        )
        try:
            self._ask(recipe, seconds=START_SECONDS)
        except BaseException:
            self.close()
            raise

    def score(self, part: SourceBatch, paths: Sequence[str], *, seconds: float, late: str) -> ScoredBatch:
        """Score rows in the process.

        :param late: reason for a crash after ``seconds``.
        :raises CrashError: when the scorer crashes or is killed.
        """
        if not self._scorer:
            self._start_scorer()
        answer: ScoredBatch = self._ask((part, tuple(paths)), seconds=seconds, late=late)
        return answer

    def close(self) -> None:
        """Kill the process; its scorer ends with it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def _start_scorer(self) -> None:
        try:
            self._scorer = self._ask(None, seconds=START_SECONDS)
        except CrashError as error:
            raise PartitionStuck(
                "the model cannot be loaded in a process of its own",
                found=f"{error.reason}: {error}",
                next_step="fix the model or the step that crashes while it is imported; then resume",
            ) from error

    def _ask(self, question: Any, *, seconds: float, late: str = TIMEOUT_REASON) -> Any:
        assert self._process.stdin is not None
        try:
            write_message(self._process.stdin, question)
            answer = self._read_answer(seconds, late)
        except (BrokenPipeError, EOFError):
            raise PartitionStuck(
                "the process in which a partition was isolated is gone",
                found=f"exit status {self._process.wait()}",
                next_step="resume the job; give its machine more memory if it happens again",
            ) from None
        if isinstance(answer, Answered):
            if (output := current()) is not None:
                output.add_all(answer.lines, answer.counts, answer.left_out)
            answer = answer.answer
        if isinstance(answer, Died):
            self._scorer = 0
            raise CrashError(
                str(Reason(ReasonKind.CRASH, answer.name)), f"the process that scored it ended with {answer.name}"
            )
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _read_answer(self, seconds: float, late: str) -> Any:
        """Read the next answer. Return a `CrashError` if it is late or the scorer takes too much memory."""
        assert self._process.stdout is not None
        data, length = bytearray(), _HEADER
        crash: CrashError | None = None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while len(data) < length:
                if not selector.select(POLL_SECONDS):
                    crash = crash or self._check_limits(deadline, seconds, late)
                    continue
                chunk = os.read(self._process.stdout.fileno(), 1 << 20)
                if not chunk:
                    raise EOFError
                data += chunk
                if length == _HEADER and len(data) >= _HEADER:
                    length += int.from_bytes(data[:_HEADER], "little")
        if crash is not None:
            self._scorer = 0
            return crash
        return pickle.loads(data[_HEADER:])

    def _check_limits(self, deadline: float, seconds: float, late: str) -> CrashError | None:
        """Kill the scorer if it exceeds a limit; the next answer then reports its end, as after a crash."""
        crash: CrashError | None = None
        if time.monotonic() > deadline:
            crash = CrashError(late, f"more than {seconds:.1f} s")
        elif self._memory and resident_bytes(self._scorer or self._process.pid) > self._memory:
            crash = CrashError(MEMORY_REASON, f"more than {self._memory >> 20:,} MiB in a process of its own")
        if crash is not None:
            with suppress(ProcessLookupError):
                os.kill(self._scorer or self._process.pid, signal.SIGKILL)
        return crash


def resident_bytes(pid: int) -> int:
    """Return the resident bytes of a process; 0 if they are unknown."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def write_message(file: IO[bytes], message: Any) -> None:
    """Write the length of the pickled message, then the message."""
    data = pickle.dumps(message)
    file.write(len(data).to_bytes(_HEADER, "little") + data)
    file.flush()


def read_message(file: IO[bytes]) -> Any:
    """Read a message written by `write_message`.

    :raises EOFError: at the end of the file.
    """
    header = file.read(_HEADER)
    if len(header) < _HEADER:
        raise EOFError
    return pickle.loads(file.read(int.from_bytes(header, "little")))


def sendable(error: Exception) -> Exception:
    """Return ``error``, or its text as an error that can be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return PipelineError(f"{type(error).__name__}: {error}")
    return error


def _slice_batch(batch: SourceBatch, start: int, stop: int) -> SourceBatch:
    part = batch.slice(start, stop)
    if stop - start < batch.table.num_rows:
        # A slice would be pickled with the whole table.
        part = replace(part, table=pa.ipc.open_stream(_stream(part.table)).read_all())
    return part


def _stream(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _reject_part(part: SourceBatch, crash: CrashError, paths: Sequence[str], *, schema: bytes) -> ScoredBatch:
    count = part.table.num_rows
    failures = Failures(np.arange(count, dtype=np.int64), (crash.reason,) * count, (str(crash),) * count)
    rejected = np.bincount(part.fragment, minlength=len(part.filtered)).astype(np.int64)
    return ScoredBatch(
        table=empty_table(pa.ipc.read_schema(pa.py_buffer(schema))),
        fragment=np.empty(0, dtype=part.fragment.dtype),
        rejects=reject_table(part, failures, paths),
        rejected=rejected,
        filtered=np.zeros_like(rejected),
        seconds_steps=0.0,
        seconds_score=0.0,
    )


def _join_parts(batch: SourceBatch, parts: Sequence[ScoredBatch]) -> ScoredBatch:
    rejects = [part.rejects for part in parts if part.rejects is not None]
    zeros = np.zeros(len(batch.filtered), dtype=np.int64)
    return ScoredBatch(
        table=pa.concat_tables([part.table for part in parts]),
        fragment=np.concatenate([part.fragment for part in parts]),
        rejects=pa.concat_tables(rejects) if rejects else None,
        rejected=sum((part.rejected for part in parts), zeros),
        filtered=sum((part.filtered for part in parts), zeros + batch.filtered),
        seconds_steps=sum(part.seconds_steps for part in parts),
        seconds_score=sum(part.seconds_score for part in parts),
        agreements=reduce(merged, (part.agreements for part in parts), {}),
        usage=sum((EngineUse(usage=dict(part.usage)) for part in parts), EngineUse()).usage,
        sketches=reduce(iadd, (part.sketches for part in parts), Sketches()),
    )
