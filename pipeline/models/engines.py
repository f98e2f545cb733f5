"""Which engines can evaluate a model, and whether the tree engine's start pays: the same answer for plan and worker.

The engine that evaluates a model, chosen per process by timing what there is on the first rows, and watched after.

xgboost is the reference. Its results are compared with the tree engine's on all rows that are timed and on a sample
later; where they differ, the tree engine is given up for this model in this process, and xgboost's results are taken.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import count
from statistics import median
from time import perf_counter
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.common.pickling import fast_pickle
from pipeline.errors import ModelError
from pipeline.models.cache import MODELS, get_predictor
from pipeline.models.flavors import find_flavor
from pipeline.models.model import ModelVersion, Predict, Predictor
from pipeline.models.trees import available, kernel_name
from pipeline.spec.model_ref import Engine, OutputKind

BREAK_EVEN = 50_000_000
"""Rows of a process × trees from which on the tree engine earns its start: 170,000 rows with 300 trees of depth 6. With
60 million it saved a tenth of a job's CPU, with 30 million nothing (measured with forked workers and the kernels on
disk; a worker that has to import numba itself breaks even at 90 million)."""
INSTALL = "install the extra: pip install 'dask-batch-pipeline[fast]'"
_MISSING = "numba is not installed (the extra 'fast')"


@dataclass(frozen=True)
class EngineOptions:
    """What can evaluate a model in a job."""

    requested: Engine
    """As the spec says."""
    possible: tuple[str, ...]
    """``xgboost``, ``trees``, or both when the worker is to choose."""
    reasons: tuple[str, ...]
    """What keeps the tree engine out, by name."""

    @property
    def has_trees(self) -> bool:
        """Whether the tree engine is possible."""
        return "trees" in self.possible


def engine_options(engine: Engine, version: ModelVersion, *, kind: OutputKind, rows: int) -> EngineOptions:
    """What can evaluate ``version`` in this process, or in one like it.

    :param rows: that a worker process will score.
    """
    if engine == "xgboost":
        return EngineOptions(engine, ("xgboost",), ("xgboost was asked for",))
    reasons = engine_blockers(version, kind)
    if engine == "auto" and not reasons and not is_worth_starting(rows, trees=version.trees):
        reasons = (f"{rows:,} rows a worker and {version.trees:,} trees are too few to earn its start",)
    if reasons:
        return EngineOptions(engine, ("xgboost",), reasons)
    return EngineOptions(engine, ("trees",) if engine == "trees" else ("xgboost", "trees"), ())


def engine_blockers(version: ModelVersion, kind: OutputKind) -> tuple[str, ...]:
    """Why the tree engine cannot give ``kind`` here, by name; empty where it can."""
    reasons = find_flavor(version.flavor).tree_engine_blockers
    found = (f"the flavor {version.flavor}",) if reasons is None else reasons(version, kind)
    return found or (() if available() else (_MISSING,))


def is_worth_starting(rows: int, *, trees: int) -> bool:
    """Whether so many rows of one process take the tree engine less time than they save."""
    return rows * trees >= BREAK_EVEN


def check_engine(engine: Engine, version: ModelVersion, *, kind: OutputKind) -> None:
    """Refuse a job that asks for the tree engine where it cannot be had.

    :raises ModelError: with every reason by name.
    """
    reasons = engine_blockers(version, kind) if engine == "trees" else ()
    if reasons:
        raise ModelError(
            "the tree engine cannot score this job",
            where="score.engine",
            found=f"trees was asked for; what it does not do: {'; '.join(reasons)}",
            expected="engine: auto or xgboost",
            next_step=INSTALL if reasons == (_MISSING,) else "leave score.engine out: what it cannot do xgboost does",
        )


_TEXTS = ("kernels", "reasons", "disabled")


@fast_pickle
@dataclass(frozen=True, slots=True)
class EngineUse:
    """What evaluated the model for some rows, and the evidence for that choice."""

    rows: dict[str, int] = field(default_factory=dict)
    """Rows per engine (``trees``, ``xgboost``) whose result was taken; batches done again count again."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds each engine took for the ``timed_rows``."""
    timed_rows: int = 0
    """Rows that both engines scored to see which one is faster; they are compared too."""
    compared_rows: int = 0
    """Rows that both engines scored and whose results were compared."""
    mismatches: int = 0
    """Compared rows whose results differ. xgboost's were taken, and the process disabled the tree engine."""
    seconds_start: float = 0.0
    """Seconds to start the tree engine: import, compile or load its kernels, read the trees. Once per process."""
    kernels: tuple[str, ...] = ()
    """What the tree engine ran as, such as ``numba 0.68 (znver4)``."""
    reasons: tuple[str, ...] = ()
    """Why the tree engine was not used, by name."""
    disabled: tuple[str, ...] = ()
    """Why the tree engine was disabled while scoring; each of these deserves a warning."""

    def __add__(self, other: EngineUse) -> EngineUse:
        return EngineUse(
            rows=_added(self.rows, other.rows),
            seconds=_added(self.seconds, other.seconds),
            timed_rows=self.timed_rows + other.timed_rows,
            compared_rows=self.compared_rows + other.compared_rows,
            mismatches=self.mismatches + other.mismatches,
            seconds_start=self.seconds_start + other.seconds_start,
            kernels=tuple(sorted({*self.kernels, *other.kernels})),
            reasons=tuple(sorted({*self.reasons, *other.reasons})),
            disabled=tuple(sorted({*self.disabled, *other.disabled})),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, with lists in place of tuples."""
        return asdict(self) | {name: list(getattr(self, name)) for name in _TEXTS}

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> EngineUse:
        """Inverse of `to_dict`."""
        return EngineUse(**{**record, **{name: tuple(record[name]) for name in _TEXTS}})

    @property
    def speedup(self) -> float:
        """How many times faster the tree engine was on the timed rows; 0.0 where nothing was timed."""
        trees = self.seconds.get("trees", 0.0)
        return self.seconds.get("xgboost", 0.0) / trees if trees > 0 else 0.0


Number = TypeVar("Number", int, float)


def _added(one: Mapping[str, Number], other: Mapping[str, Number]) -> dict[str, Number]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in sorted({*one, *other})}


SLICE_ROWS = 8192
"""Rows that are timed at a time."""
MIN_TIMED_ROWS = 4096
"""Fewer rows are not timed: a call's own cost would count too much."""
ROUNDS = 4
"""Slices that are timed before the choice."""
SAMPLE_EVERY = 64
"""Of so many calls the first is compared once the choice is made."""
SAMPLE_ROWS = 1024
"""Rows of it that are compared."""


@dataclass
class EngineSelection:
    """The choice of one process for one model version and kind of output; its threads share it."""

    reference: Predictor
    kind: OutputKind
    tolerance: float = 0.0
    """Largest difference of margins that counts as none; 0: every bit of the output is compared."""
    reasons: tuple[str, ...] = ()
    """Why the tree engine is not used, by name."""
    disabled: tuple[str, ...] = ()
    """Why it was disabled after the plan had allowed it."""
    clock: Callable[[], float] = perf_counter
    engine: str = field(default="xgboost", init=False)
    """``xgboost``, ``trees``, or ``both`` while they are timed."""
    trees: Predict | None = field(default=None, init=False)
    kernel: str = field(default="", init=False)
    _starting: threading.Lock = field(default_factory=threading.Lock, init=False)
    _guard: threading.Lock = field(default_factory=threading.Lock, init=False)
    _times: list[tuple[float, float]] = field(default_factory=list, init=False)
    _calls: count[int] = field(default_factory=count, init=False)

    def start(self, build: Callable[[], Predict], *, is_asked_for: bool) -> float:
        """Start the tree engine, once; meanwhile other threads score with xgboost. Returns the seconds this call took.

        :param is_asked_for: it alone will do: it is not timed, and must start.
        :raises ModelError: when it is asked for and does not start.
        """
        if not self._starting.acquire(blocking=is_asked_for):
            return 0.0
        begin = self.clock()
        try:
            if self.trees is None and not (self.reasons or self.disabled):
                self.trees = self._build(build)
                self.engine = "trees" if is_asked_for else "both"
        except Exception as error:
            reason = f"start failed: {type(error).__name__}: {error}".splitlines()[0][:200]
            if is_asked_for:
                raise ModelError("the tree engine does not start here", found=reason, next_step=INSTALL) from error
            self.disable_trees(reason)
        finally:
            self._starting.release()
        return self.clock() - begin

    def _build(self, build: Callable[[], Predict]) -> Predict:
        trees = build()
        # Once through, so that everything is compiled before anything is timed.
        for kind in dict.fromkeys((self.kind, "margin")):
            trees(np.zeros((1, len(self.reference.version.features)), np.float32), kind=kind)
        self.kernel = kernel_name()
        return trees

    def disable_trees(self, reason: str) -> None:
        """Let xgboost score from now on."""
        with self._guard:
            self.engine, self.disabled = "xgboost", (*self.disabled, reason)

    def add_times(self, xgboost: float, trees: float) -> None:
        """Seconds a row of either engine; after `ROUNDS` of them the faster one is chosen."""
        with self._guard:
            self._times.append((xgboost, trees))
            if self.engine != "both" or len(self._times) < ROUNDS:
                return
            theirs, ours = (median(times) for times in zip(*self._times, strict=True))
            self.engine = "trees" if ours < theirs else "xgboost"
            if self.engine == "xgboost":
                self.reasons = (*self.reasons, "xgboost was faster on the timed rows")

    def is_sample(self) -> bool:
        """Whether this call is one of those that are compared. Counts the calls."""
        return next(self._calls) % SAMPLE_EVERY == 0

    def is_first_ours(self) -> bool:
        """Whether the tree engine goes first in the next round; the order changes, since the first warms the cache."""
        return len(self._times) % 2 == 1


class Evaluator:
    """A `Predictor` for one partition, with the engine of its process's `ResolvedSetting`; `use` is the evidence.

    Not for several threads at once; the choice in it is.
    """

    def __init__(self, choice: EngineSelection, *, seconds_start: float = 0.0) -> None:
        self.choice = choice
        self.version = choice.reference.version
        self.use = EngineUse(seconds_start=seconds_start)

    def encode(self, table: pa.Table, *, order: Literal["C", "F"] = "C") -> np.ndarray:
        """See `pipeline.models.model.Predictor.encode`; in F order for the tree engine, which reads columns."""
        return self.choice.reference.encode(table, order="F" if self.choice.engine == "trees" else order)

    def out_of_memory_errors(self) -> tuple[type[BaseException], ...]:
        """See `pipeline.models.model.Predictor.out_of_memory_errors`."""
        return self.choice.reference.out_of_memory_errors()

    def engine_use(self) -> EngineUse:
        """Return which engines evaluated the model for this partition, and why no other one did."""
        choice = self.choice
        kernels = (choice.kernel,) if choice.kernel else ()
        return self.use + EngineUse(kernels=kernels, reasons=choice.reasons, disabled=choice.disabled)

    def predict(self, matrix: np.ndarray, *, kind: OutputKind) -> np.ndarray:
        """See `pipeline.models.model.Predictor.predict`."""
        choice = self.choice
        if choice.engine == "both" and len(matrix) >= MIN_TIMED_ROWS and kind == choice.kind:
            return self._predict_timed(matrix)
        scores = self._try_trees(matrix) if choice.engine == "trees" and kind == choice.kind else None
        if scores is not None and choice.is_sample():
            head = matrix[:SAMPLE_ROWS]
            if not self._agrees(head, scores[: len(head)], choice.reference.predict(head, kind=kind)):
                scores = None
        if scores is not None:
            self.use += EngineUse(rows={"trees": len(matrix)})
            return scores
        scores = choice.reference.predict(matrix, kind=kind)
        self.use += EngineUse(rows={"xgboost": len(matrix)})
        return scores

    def _predict_timed(self, matrix: np.ndarray) -> np.ndarray:
        """Time both engines on slices of ``matrix`` until one is chosen, which predicts for the rest."""
        parts: list[np.ndarray] = []
        start = 0
        while self.choice.engine == "both" and len(matrix) - start >= MIN_TIMED_ROWS:
            parts.append(self._time_engines(matrix[start : start + SLICE_ROWS]))
            start += len(parts[-1])
        if start < len(matrix):
            parts.append(self.predict(matrix[start:], kind=self.choice.kind))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _time_engines(self, matrix: np.ndarray) -> np.ndarray:
        """xgboost's scores; both engines are timed on them and compared."""
        choice, clock, rows = self.choice, self.choice.clock, len(matrix)
        first = self._timed_trees(matrix) if choice.is_first_ours() else None
        begin = clock()
        scores = choice.reference.predict(matrix, kind=choice.kind)
        theirs = clock() - begin
        ours, seconds = first or self._timed_trees(matrix)
        if ours is not None and self._agrees(matrix, ours, scores):
            self.use += EngineUse(seconds={"xgboost": theirs, "trees": seconds}, timed_rows=rows)
            choice.add_times(theirs / rows, seconds / rows)
        self.use += EngineUse(rows={"xgboost": rows})
        return scores

    def _timed_trees(self, matrix: np.ndarray) -> tuple[np.ndarray | None, float]:
        begin = self.choice.clock()
        scores = self._try_trees(matrix)
        return scores, self.choice.clock() - begin

    def _try_trees(self, matrix: np.ndarray) -> np.ndarray | None:
        """Scores of the tree engine; None when it failed and was given up."""
        trees = self.choice.trees
        if trees is None:
            return None
        try:
            return trees(matrix, kind=self.choice.kind)
        except MemoryError:
            raise
        except Exception as error:
            self.choice.disable_trees(f"call failed: {type(error).__name__}: {error}".splitlines()[0][:200])
            return None

    def _agrees(self, matrix: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> bool:
        """Whether the two results for ``matrix`` are the same; if not, the tree engine is given up."""
        wrong = self._differing(matrix, ours, theirs)
        self.use += EngineUse(compared_rows=len(matrix), mismatches=wrong)
        if wrong:
            self.choice.disable_trees(f"{MISMATCH} (model {self.version.digest[:12]})")
            with _lock:
                _mismatched.add(self.version.digest)
        return not wrong

    def _differing(self, matrix: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> int:
        """Rows that differ. Outputs that are classes would hide most differences, so that margins are compared too."""
        kind, tolerance = self.choice.kind, self.choice.tolerance
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return len(matrix)
        if not tolerance:
            wrong = _unequal_bits(ours, theirs)
            if wrong or kind == "margin":
                return wrong
            matrix = matrix[:SAMPLE_ROWS]
        assert self.choice.trees is not None
        margins = self.choice.trees(matrix, kind="margin"), self.choice.reference.predict(matrix, kind="margin")
        return _further_apart(*margins, tolerance) if tolerance else _unequal_bits(*margins)


MISMATCH = "its results differ from xgboost's"
"""First words of the reason that is recorded for a mismatch."""


def _unequal_bits(one: np.ndarray, other: np.ndarray) -> int:
    different = np.ascontiguousarray(one).view(np.uint32) != np.ascontiguousarray(other).view(np.uint32)
    return int(different.reshape(len(one), -1).any(axis=1).sum())


def _further_apart(one: np.ndarray, other: np.ndarray, tolerance: float) -> int:
    near = np.isclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True)
    return int((~near.reshape(len(one), -1)).any(axis=1).sum())


_selections: OrderedDict[tuple[object, ...], EngineSelection] = OrderedDict()
_mismatched: set[str] = set()
_lock = threading.Lock()


class Evaluation(Protocol):
    """Fields of a job that decide how its model is evaluated. `pipeline.plan.recipe.ScoreRecipe` has them."""

    @property
    def model(self) -> ModelVersion:
        """The version that evaluates."""

    @property
    def kind(self) -> OutputKind:
        """Kind of output."""

    @property
    def engine(self) -> Engine:
        """The engine that is asked for."""

    @property
    def tolerance(self) -> float:
        """Largest difference of margins at which two engines count as equal."""

    @property
    def rows_per_worker(self) -> int:
        """Rows planned for each worker process."""


def get_evaluator(score: Evaluation) -> tuple[Evaluator, float]:
    """An evaluator for a partition, and the seconds this call spent to load the model and to start the tree engine.

    :raises ModelDigestMismatch: when the model file is not the one that was pinned.
    :raises ModelError: when it cannot be read; or the tree engine alone was asked for and cannot be had here.
    """
    version = score.model
    predictor, loading = get_predictor(version)
    outlook = engine_options(score.engine, version, kind=score.kind, rows=score.rows_per_worker)
    if score.engine == "trees" and not outlook.has_trees:
        raise ModelError(
            "the tree engine cannot score this job here",
            where=version.uri,
            found="; ".join(outlook.reasons),
            next_step=f"{INSTALL} on the workers, or leave score.engine out",
        )
    choice = _engine_selection(score, predictor, reasons=outlook.reasons)
    build = find_flavor(version.flavor).trees
    starting = 0.0
    if build is not None and outlook.has_trees:
        starting = choice.start(lambda: build(predictor, score.kind), is_asked_for=score.engine == "trees")
    return Evaluator(choice, seconds_start=starting), loading + starting


def _engine_selection(score: Evaluation, predictor: Predictor, *, reasons: tuple[str, ...]) -> EngineSelection:
    """Return the selection of this process for the model, output and engine of ``score``."""
    digest = score.model.digest
    key = (digest, score.kind, score.engine, score.tolerance, reasons)
    with _lock:
        if key not in _selections:
            is_disabled = digest in _mismatched and not reasons
            disabled = (f"{MISMATCH} before (model {digest[:12]})",) if is_disabled else ()
            _selections[key] = EngineSelection(predictor, score.kind, score.tolerance, reasons, disabled)
        _selections.move_to_end(key)
        while len(_selections) > MODELS:
            _selections.popitem(last=False)
        return _selections[key]


def forget_selections() -> None:
    """Drop every choice of this process, also that a model's results differed."""
    with _lock:
        _selections.clear()
        _mismatched.clear()
