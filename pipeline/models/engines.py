"""Select the engine that evaluates a model: xgboost, or the tree engine where it gives the same bits faster.

Plan and worker find the possible engines with the same functions. A process scores with xgboost for as long as the
tree engine takes to start, then starts the tree engine, times both on the next rows and selects the faster one.

xgboost is the reference: its results are compared with the tree engine's on all timed rows and on a sample later. Where
they differ, the process disables the tree engine for this model and uses xgboost's results.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import count
from statistics import median
from time import perf_counter, thread_time
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.common.pickling import fast_pickle
from pipeline.errors import ModelError, SpecError
from pipeline.models.cache import ModelKey, get_predictor, is_cached, on_drop
from pipeline.models.flavors import find_flavor
from pipeline.models.model import ModelVersion, Predict, Predictor
from pipeline.models.outputs import output_type
from pipeline.models.trees import NEXT_STEP, kernel_name, unavailable
from pipeline.spec.model_ref import Engine, OutputKind


@dataclass(frozen=True)
class EngineOptions:
    """Engines that can evaluate a model in a job."""

    requested: Engine
    """Engine that the spec names."""
    possible: tuple[str, ...]
    """The library by the name of its flavor, such as ``xgboost``; ``trees``; or both when each worker selects one."""
    reasons: tuple[str, ...]
    """Reasons, by name, why the tree engine is not possible."""

    @property
    def has_trees(self) -> bool:
        """True if the tree engine is possible."""
        return "trees" in self.possible


def engine_options(engine: Engine, version: ModelVersion, *, kind: OutputKind) -> EngineOptions:
    """Find the engines that can evaluate ``version`` in a process of this machine."""
    library = version.flavor
    if engine in ("library", "xgboost"):
        return EngineOptions(engine, (library,), (f"{library} was requested",))
    reasons = engine_blockers(version, kind)
    if reasons:
        return EngineOptions(engine, (library,), reasons)
    return EngineOptions(engine, ("trees",) if engine == "trees" else (library, "trees"), ())


def engine_blockers(version: ModelVersion, kind: OutputKind) -> tuple[str, ...]:
    """Return the reasons, by name, why the tree engine cannot compute ``kind`` here; empty where it can."""
    blockers = find_flavor(version.flavor).tree_engine_blockers
    reasons = (f"the flavor {version.flavor}",) if blockers is None else blockers(version, kind)
    reason = unavailable()
    return reasons or ((reason,) if reason else ())


def check_engine(engine: Engine, version: ModelVersion, *, kind: OutputKind) -> None:
    """Refuse a job that requests the tree engine on a machine where the engine is not available.

    :raises ModelError: with every reason by name.
    :raises SpecError: for ``xgboost`` and a model of another library.
    """
    if engine == "xgboost" and version.flavor != "xgboost":
        raise SpecError(
            "xgboost cannot score this model",
            where="score.engine",
            found=f"engine: xgboost, and a {version.flavor} model",
            expected="engine: auto, library or trees",
            next_step="write engine: library, or remove score.engine",
        )
    reasons = engine_blockers(version, kind) if engine == "trees" else ()
    if reasons:
        raise ModelError(
            "the tree engine cannot score this job",
            where="score.engine",
            found=f"engine: trees was requested; unsupported: {'; '.join(reasons)}",
            expected="engine: auto or library",
            next_step=NEXT_STEP
            if reasons == (unavailable(),)
            else f"leave score.engine out, so that {version.flavor} scores what it cannot",
        )


DEVICE_ENGINE = "xgboost-cuda"
"""Name of xgboost on a GPU, in receipts and reports."""
_TEXTS = ("kernels", "reasons", "disabled", "device_reasons")
_LATER = ("device_reasons", "usage")
"""Fields that came later, and are left out of JSON while they are empty."""


@fast_pickle
@dataclass(frozen=True, slots=True)
class EngineUse:
    """Engines that evaluated the model for some rows, and the evidence for that choice."""

    rows: dict[str, int] = field(default_factory=dict)
    """Rows per engine (``trees``, ``xgboost``, ``lightgbm``, …, ``xgboost-cuda``) whose result was used; repeated
    batches count each time."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each engine for the ``timed_rows``."""
    timed_rows: int = 0
    """Rows that both engines scored to find the faster engine. Their results are compared, too."""
    compared_rows: int = 0
    """Rows that both engines scored and whose results were compared."""
    mismatches: int = 0
    """Compared rows whose results differ. The library's are used, and the process disabled the tree engine."""
    seconds_start: float = 0.0
    """Seconds to start the tree engine: load its kernels, read and compile the trees. Once per process."""
    kernels: tuple[str, ...] = ()
    """Kernels of the tree engine, such as ``x86-64-v3``."""
    reasons: tuple[str, ...] = ()
    """Reasons, by name, why the tree engine was not used."""
    disabled: tuple[str, ...] = ()
    """Reasons why a process disabled the tree engine while scoring; each one is worth a warning."""
    device_reasons: tuple[str, ...] = ()
    """Reasons why a process stopped using its GPU; each one is worth a warning. Left out of JSON if there are none."""
    usage: dict[str, float] = field(default_factory=dict)
    """Amounts that a model counts itself, such as ``tokens`` and ``padded_tokens`` of texts. Left out of JSON if there
    are none."""

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
            device_reasons=tuple(sorted({*self.device_reasons, *other.device_reasons})),
            usage=_added(self.usage, other.usage),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, with lists in place of tuples."""
        record = asdict(self) | {name: list(getattr(self, name)) for name in _TEXTS}
        return {name: value for name, value in record.items() if name not in _LATER or value}

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> EngineUse:
        """Inverse of `to_dict`."""
        return EngineUse(**{**record, **{name: tuple(record.get(name, ())) for name in _TEXTS}})

    @property
    def device_rows(self) -> int:
        """Rows whose result came from a GPU."""
        return self.rows.get(DEVICE_ENGINE, 0)

    @property
    def speedup(self) -> float:
        """Speed of the tree engine / speed of the library on the timed rows; 0.0 if no rows were timed."""
        trees = self.seconds.get("trees", 0.0)
        libraries = sum(seconds for name, seconds in self.seconds.items() if name != "trees")
        return libraries / trees if trees > 0 else 0.0

    @property
    def libraries(self) -> str:
        """Libraries that were timed, else those that scored, by the names of their flavors; xgboost without any."""
        timed, scored = ({*names} - {"trees", DEVICE_ENGINE} for names in (self.seconds, self.rows))
        return " and ".join(sorted(timed or scored)) or "xgboost"


Number = TypeVar("Number", int, float)


def _added(first: Mapping[str, Number], second: Mapping[str, Number]) -> dict[str, Number]:
    return {name: first.get(name, 0) + second.get(name, 0) for name in sorted({*first, *second})}


START_SECONDS_PER_TREE = 0.0002
"""CPU seconds for each tree to start the tree engine (measured: 55 ms for 300 of depth 6, 185 ms for 1,000 of depth 8).

A process starts the engine once xgboost has scored for as long, so that a small job loses nothing, and a large one at
most twice that time."""
SLICE_ROWS = 1024
"""Maximum of rows of one timed slice. With more rows the ratio of both engines hardly changes (measured); with fewer
rows the fixed cost of a call counts, so a selection on smaller slices holds for smaller batches only."""
ROUNDS = 4
"""Slices that are timed before an engine is selected."""
SAMPLE_EVERY = 64
"""Calls per comparison after an engine is selected."""
SAMPLE_ROWS = 1024
"""Maximum of rows compared in such a call."""
MARGIN_ROWS = 256
"""Maximum of rows of a call whose margins are compared in addition to their outputs."""


@dataclass
class EngineSelection:
    """Engine selection of one process for one model version and kind of output. All threads share it."""

    reference: Predictor
    kind: OutputKind
    tolerance: float = 0.0
    """Largest difference of margins that counts as equal; 0: every bit of the output is compared."""
    reasons: tuple[str, ...] = ()
    """Reasons, by name, why the tree engine is not used."""
    disabled: tuple[str, ...] = ()
    """Reasons why the tree engine was disabled although it was possible."""
    clock: Callable[[], float] = perf_counter
    build: Callable[[], Predict] | None = None
    """Makes the tree engine; None: the tree engine is not started later."""
    start_seconds: float = 0.0
    """Seconds that xgboost scores before the tree engine is started."""
    engine: str = field(default="library", init=False)
    """``library``, ``trees``, or ``both`` while they are timed."""
    trees: Predict | None = field(default=None, init=False)
    kernel: str = field(default="", init=False)
    _starting: threading.Lock = field(default_factory=threading.Lock, init=False)
    _guard: threading.Lock = field(default_factory=threading.Lock, init=False)
    _scored_seconds: float = field(default=0.0, init=False)
    _times: list[tuple[float, float]] = field(default_factory=list, init=False)
    _most_rows: int = field(default=0, init=False)
    """Rows of the largest timed slice."""
    _calls: count[int] = field(default_factory=count, init=False)

    def start(self, build: Callable[[], Predict], *, is_requested: bool) -> float:
        """Start the tree engine once; meanwhile other threads score with xgboost. Return the seconds of this call.

        :param is_requested: True if the job requests the tree engine only: the engine is not timed, and must start.
        :raises ModelError: when the engine is requested and does not start.
        """
        if not self._starting.acquire(blocking=is_requested):
            return 0.0
        started = self.clock()
        try:
            if self.trees is None and not (self.reasons or self.disabled):
                self.trees = self._build_trees(build)
                self.engine = "trees" if is_requested else "both"
        except Exception as error:
            reason = f"start failed: {type(error).__name__}: {error}".splitlines()[0][:200]
            if is_requested:
                raise ModelError("the tree engine does not start here", found=reason, next_step=NEXT_STEP) from error
            self.disable_trees(reason)
        finally:
            self._starting.release()
        return self.clock() - started

    @property
    def is_waiting(self) -> bool:
        """True if the tree engine is possible and has not started."""
        return self.build is not None and self.trees is None and not (self.reasons or self.disabled)

    def is_due(self) -> bool:
        """Return True if the tree engine must be started now: xgboost has scored for as long as the start takes."""
        return self.is_waiting and self._scored_seconds >= self.start_seconds

    def score_reference(self, matrix: np.ndarray) -> np.ndarray:
        """Return xgboost's scores, and count their seconds until the tree engine is started."""
        if self.trees is not None:
            return self.reference.predict(matrix, kind=self.kind)
        started = self.clock()
        scores = self.reference.predict(matrix, kind=self.kind)
        with self._guard:
            self._scored_seconds += self.clock() - started
        return scores

    def _build_trees(self, build: Callable[[], Predict]) -> Predict:
        trees = build()
        # Call the engine once, so that its trees are compiled before it is timed.
        for kind in dict.fromkeys((self.kind, *(("margin",) if self.has_margin else ()))):
            trees(self.reference.example(), kind=kind)
        self.kernel = kernel_name()
        return trees

    def disable_trees(self, reason: str) -> None:
        """Let the library score from now on."""
        with self._guard:
            self.engine, self.disabled = "library", (*self.disabled, reason)

    @property
    def has_margin(self) -> bool:
        """True if margins can be compared, too."""
        return output_type(self.reference.version, "margin") is not None

    @property
    def library(self) -> str:
        """Name of the flavor of the model."""
        return self.reference.version.flavor

    def add_times(self, library: float, trees: float, *, rows: int) -> None:
        """Add the seconds of both engines for a slice, and select the faster one after `ROUNDS` slices."""
        with self._guard:
            self._times.append((library / rows, trees / rows))
            self._most_rows = max(self._most_rows, rows)
            if self.engine != "both" or len(self._times) < ROUNDS:
                return
            library, trees = (median(times) for times in zip(*self._times, strict=True))
            self.engine = "trees" if trees < library else "library"
            if self.engine == "library":
                self.reasons = (*self.reasons, was_faster(self.library))

    def is_timed(self, rows: int) -> bool:
        """Return True if a call of ``rows`` rows must be timed: none was, or only calls that were much smaller."""
        with self._guard:
            is_selected = len(self._times) >= ROUNDS and self.engine != "both" and not self.disabled
            if is_selected and self._most_rows < SLICE_ROWS <= rows:
                self.engine, self._times = "both", []
                self.reasons = tuple(reason for reason in self.reasons if reason != was_faster(self.library))
            return self.engine == "both" and rows > 0

    def is_sample(self) -> bool:
        """Count a call, and return True if it must be compared."""
        return next(self._calls) % SAMPLE_EVERY == 0

    def is_trees_first(self) -> bool:
        """Return True if the tree engine is timed first. The order alternates: the first engine warms the cache."""
        return len(self._times) % 2 == 1


class Evaluator:
    """A `Predictor` for one partition, with the engine of its process's `EngineSelection`; `use` is the evidence.

    Only one thread may use an evaluator at a time. Threads may share the selection.
    """

    def __init__(self, choice: EngineSelection, *, seconds_start: float = 0.0) -> None:
        self.choice = choice
        self.version = choice.reference.version
        self.use = EngineUse(seconds_start=seconds_start)

    def encode(self, table: pa.Table, *, order: Literal["C", "F"] = "C") -> np.ndarray:
        """See `pipeline.models.model.Predictor.encode`; in F order for the tree engine, which reads columns."""
        return self.choice.reference.encode(table, order="F" if self.choice.engine == "trees" else order)

    def example(self) -> np.ndarray:
        """See `pipeline.models.model.Predictor.example`."""
        return self.choice.reference.example()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `pipeline.models.model.Predictor.is_out_of_memory`."""
        return self.choice.reference.is_out_of_memory(error)

    def take_refusals(self) -> Mapping[int, tuple[str, str]]:
        """Return reason and message of the rows that a service refused in the last `predict`, by their places."""
        refusals: Mapping[int, tuple[str, str]] = getattr(self.choice.reference, "take_refusals", dict)()
        return refusals

    def engine_use(self) -> EngineUse:
        """Return the engines that evaluated the model for this partition, and the reasons against the tree engine."""
        choice = self.choice
        kernels = (choice.kernel,) if choice.kernel else ()
        reasons = (too_little_work(choice.library),) if choice.is_waiting else choice.reasons
        return self.use + EngineUse(kernels=kernels, reasons=reasons, disabled=choice.disabled)

    def predict(self, matrix: np.ndarray, *, kind: OutputKind) -> np.ndarray:
        """See `pipeline.models.model.Predictor.predict`."""
        choice = self.choice
        if kind == choice.kind and choice.build is not None and choice.is_due():
            self.use += EngineUse(seconds_start=choice.start(choice.build, is_requested=False))
        if kind == choice.kind and choice.is_timed(len(matrix)):
            return self._predict_timed(matrix)
        scores = self._try_trees(matrix) if choice.engine == "trees" and kind == choice.kind else None
        if scores is not None and choice.is_sample():
            head = matrix[:SAMPLE_ROWS]
            if not self._agrees(head, scores[: len(head)], choice.reference.predict(head, kind=kind)):
                scores = None
        if scores is not None:
            self.use += EngineUse(rows={"trees": len(matrix)})
            return scores
        is_own = kind == choice.kind
        scores = choice.score_reference(matrix) if is_own else choice.reference.predict(matrix, kind=kind)
        take_usage = getattr(choice.reference, "take_usage", dict)
        self.use += EngineUse(rows={choice.library: len(matrix)}, usage=take_usage())
        return scores

    def _predict_timed(self, matrix: np.ndarray) -> np.ndarray:
        """Time both engines on slices of ``matrix`` until one engine is selected; score the rest with that engine."""
        parts: list[np.ndarray] = []
        start = 0
        while self.choice.engine == "both" and start < len(matrix):
            parts.append(self._time_engines(matrix[start : start + SLICE_ROWS]))
            start += len(parts[-1])
        if start < len(matrix):
            parts.append(self.predict(matrix[start:], kind=self.choice.kind))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _time_engines(self, matrix: np.ndarray) -> np.ndarray:
        """Time and compare both engines on ``matrix``. Return xgboost's scores."""
        choice, clock, rows = self.choice, self.choice.clock, len(matrix)
        first = self._timed_trees(matrix) if choice.is_trees_first() else None
        started = clock()
        scores = choice.reference.predict(matrix, kind=choice.kind)
        theirs = clock() - started
        ours, seconds = first or self._timed_trees(matrix)
        if ours is not None and self._agrees(matrix, ours, scores):
            self.use += EngineUse(seconds={choice.library: theirs, "trees": seconds}, timed_rows=rows)
            choice.add_times(theirs, seconds, rows=rows)
        self.use += EngineUse(rows={choice.library: rows})
        return scores

    def _timed_trees(self, matrix: np.ndarray) -> tuple[np.ndarray | None, float]:
        started = self.choice.clock()
        scores = self._try_trees(matrix)
        return scores, self.choice.clock() - started

    def _try_trees(self, matrix: np.ndarray) -> np.ndarray | None:
        """Return the tree engine's scores. If the engine fails, disable it and return None."""
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
        """Return True if both results for ``matrix`` are equal; else disable the tree engine."""
        wrong = self._differing(matrix, ours, theirs)
        self.use += EngineUse(compared_rows=len(matrix), mismatches=wrong)
        if wrong:
            self.choice.disable_trees(f"{MISMATCH} (model {self.version.digest[:12]})")
            with _lock:
                _mismatched.add(self.version.digest)
        return not wrong

    def _differing(self, matrix: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> int:
        """Count the rows that differ. Classes would hide most differences, so margins are compared, too."""
        kind, tolerance = self.choice.kind, self.choice.tolerance
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return len(matrix)
        if not self.choice.has_margin:
            return rows_beyond(ours, theirs, tolerance) if tolerance else unequal_bits(ours, theirs)
        if not tolerance:
            wrong = unequal_bits(ours, theirs)
            if wrong or kind == "margin":
                return wrong
            matrix = matrix[:MARGIN_ROWS]
        assert self.choice.trees is not None
        margins = self.choice.trees(matrix, kind="margin"), self.choice.reference.predict(matrix, kind="margin")
        return rows_beyond(*margins, tolerance) if tolerance else unequal_bits(*margins)


MISMATCH = "its results differ from the library's"
"""First words of the reason that is recorded for a mismatch."""


def too_little_work(library: str) -> str:
    """Return the reason why the tree engine has not started."""
    return f"{library} scored in less time than its start takes"


def was_faster(library: str) -> str:
    """Return the reason why the tree engine was not selected."""
    return f"{library} was faster on the timed rows"


def unequal_bits(ours: np.ndarray, theirs: np.ndarray) -> int:
    """Return how many rows of two results of one shape and dtype differ in any bit."""
    different = np.ascontiguousarray(ours).view(np.uint32) != np.ascontiguousarray(theirs).view(np.uint32)
    return int(different.reshape(len(ours), -1).any(axis=1).sum())


def rows_beyond(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> int:
    """Return how many rows of two results of one shape differ by more than ``tolerance``."""
    near = np.isclose(ours, theirs, rtol=0.0, atol=tolerance, equal_nan=True)
    return int((~near.reshape(len(ours), -1)).any(axis=1).sum())


_selections: dict[tuple[ModelKey, *tuple[object, ...]], EngineSelection] = {}
"""Selections of the models in the cache: a selection goes with its model."""
_mismatched: set[str] = set()
_lock = threading.Lock()


class Evaluation(Protocol):
    """Fields of a job that determine how its model is evaluated. `pipeline.plan.recipe.ScoreRecipe` has them."""

    @property
    def model(self) -> ModelVersion:
        """Version of the model."""

    @property
    def kind(self) -> OutputKind:
        """Kind of output."""

    @property
    def engine(self) -> Engine:
        """Requested engine."""

    @property
    def tolerance(self) -> float:
        """Largest difference of margins at which two engines count as equal."""


def get_evaluator(score: Evaluation) -> tuple[Evaluator, float]:
    """Return an evaluator for a partition, and the seconds this call took to load the model and start the tree engine.

    :raises ModelDigestMismatch: when the model file differs from the pinned file.
    :raises ModelError: when the file cannot be read; or when the requested tree engine is not available here.
    """
    version = score.model
    predictor, loading = get_predictor(version)
    options = engine_options(score.engine, version, kind=score.kind)
    if score.engine == "trees" and not options.has_trees:
        raise ModelError(
            "the tree engine cannot score this job here",
            where=version.uri,
            found="; ".join(options.reasons),
            next_step=f"on the workers, {NEXT_STEP}; or leave score.engine out",
        )
    choice = _engine_selection(score, predictor, reasons=options.reasons)
    build = find_flavor(version.flavor).trees
    starting = 0.0
    if build is not None and options.has_trees:
        is_requested = score.engine == "trees"
        choice.build = lambda: build(predictor, score.kind)
        choice.start_seconds = START_SECONDS_PER_TREE * version.trees
        if is_requested or choice.is_due():
            starting = choice.start(choice.build, is_requested=is_requested)
    return Evaluator(choice, seconds_start=starting), loading + starting


def _engine_selection(score: Evaluation, predictor: Predictor, *, reasons: tuple[str, ...]) -> EngineSelection:
    """Return the selection of this process for the model, output and engine of ``score``."""
    digest = score.model.digest
    key = (score.model.key, score.kind, score.engine, score.tolerance, reasons)
    with _lock:
        if key not in _selections:
            is_disabled = digest in _mismatched and not reasons
            disabled = (f"{MISMATCH} before (model {digest[:12]})",) if is_disabled else ()
            # A thread's own time does not count what other processes take; of several threads it counts one only.
            clock = thread_time if getattr(predictor, "threads", None) == 1 else perf_counter
            _selections[key] = EngineSelection(predictor, score.kind, score.tolerance, reasons, disabled, clock)
        choice = _selections[key]
    if not is_cached(score.model):  # dropped since the caller got it
        _forget_selections_of(score.model.key)
    return choice


def _forget_selections_of(model: ModelKey) -> None:
    with _lock:
        for key in [key for key in _selections if key[0] == model]:
            del _selections[key]


on_drop(_forget_selections_of)


def forget_selections() -> None:
    """Drop every selection of this process, and the record of models whose results differed."""
    with _lock:
        _selections.clear()
        _mismatched.clear()
