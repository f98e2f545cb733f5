"""Measure what a model's results for a row depend on: the other rows of a call, their places, and threads.

All comparisons are of bits. The rows are made up from the model's features, with a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter, process_time
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.models.flavors.library import LibraryPredictor, predict_in_chunks
from pipeline.models.model import Feature, Promise
from pipeline.spec.model_ref import OutputKind

ROWS = 2500
"""Rows that are made up."""
FEWEST = 96
"""Rows for a model that is slow."""
CHUNKS = (1024, 32, 1)
"""Sizes of a call that are tried, in this order, where the results of free batches differ."""
SECONDS = 10.0
"""Seconds of processor time that the whole measurement should take."""
_PASSES = 16
"""Times that every row is scored, roughly."""
_CODE_PASSES = 6
"""The same for code, which makes no promise that would have to be tested."""
_CALLS, _FEWEST_CALLS = 120, 8
"""Calls of one row and of seven."""
_CALL_SECONDS = 1.0
"""Seconds for the calls of one row."""
_SLOW_CHUNK = 0.05
"""Seconds of a call of 1,024 rows from which smaller calls are preferred."""
_WORDS = ("alpha", "beta", "gamma", "delta", "order", "late", "refund", "the", "of", "42", "Grüße")
KINDS: tuple[OutputKind, ...] = ("prediction", "probabilities", "margin")
"""Outputs that are measured, where the model has them."""


def sample_table(
    features: Sequence[Feature], rows: int = ROWS, *, values: Mapping[str, Sequence[Any]] | None = None
) -> pa.Table:
    """Return made-up rows: numbers of several magnitudes, known categories, short texts.

    :param values: values to draw from, by feature, where the kind does not tell.
    """
    random = np.random.default_rng(20)
    known = dict(values or {})
    return pa.table(
        {str(index): _column(feature, rows, random, known.get(feature.name)) for index, feature in enumerate(features)}
    ).rename_columns([feature.name for feature in features])


def _column(feature: Feature, rows: int, random: np.random.Generator, values: Sequence[Any] | None) -> pa.Array:
    choices = values if values is not None else feature.categories
    if choices:
        return pa.array([choices[index] for index in random.integers(0, len(choices), rows)])
    if feature.kind == "text":
        return pa.array([" ".join(random.choice(_WORDS, 6)) for _ in range(rows)])
    if feature.kind == "indicator":
        return pa.array(random.integers(0, 2, rows))
    if feature.kind in ("integer", "category"):
        return pa.array(random.integers(0, 100, rows))
    numbers = random.normal(size=rows) * 10.0 ** random.integers(-1, 3, rows)
    return pa.array(np.where(random.random(rows) < 0.3, random.random(rows), numbers))


def measure(predictor: LibraryPredictor, table: pa.Table, kinds: Sequence[OutputKind]) -> Promise:
    """Return the strongest promise that holds for all of ``kinds`` on the rows of ``table``."""
    start = process_time()
    predictor.call(predictor.encode(table.slice(0, 64)), kinds[0])
    cost = (process_time() - start) / 64 * len(kinds) * _PASSES
    rows = int(min(table.num_rows, max(FEWEST, SECONDS / max(cost, 1e-9))))
    start = process_time()
    predictor.call(predictor.encode(table.slice(0, 1)), kinds[0])
    few = int(min(_CALLS, max(_FEWEST_CALLS, _CALL_SECONDS / max(process_time() - start, 1e-9))))
    encoded = predictor.encode(table.slice(0, rows))
    whole = [predictor.call(encoded, kind) for kind in kinds]
    calls = [_caller(predictor, kind) for kind in kinds]
    if all(_is_independent(call, encoded, expected, few) for call, expected in zip(calls, whole, strict=True)):
        return Promise("exact", rows=rows)
    for chunk in _chunks(predictor, encoded, kinds[0]):
        calls = [_caller(predictor, kind, chunk=chunk) for kind in kinds]
        fixed = [call(encoded) for call in calls]
        few = _FEWEST_CALLS  # all calls have one size
        if all(_is_independent(call, encoded, expected, few) for call, expected in zip(calls, fixed, strict=True)):
            return Promise("fixed", chunk=chunk, noise=_noise(fixed, whole), rows=rows)
    pieces = [_in_pieces(_caller(predictor, kind), encoded, 7) for kind in kinds]
    return Promise("code", noise=_noise(pieces, whole), rows=rows)


def measure_code(predictor: LibraryPredictor, table: pa.Table, kinds: Sequence[OutputKind]) -> Promise:
    """Return the promise ``code`` with the largest difference that other batches, orders and repeated calls made.

    Values that are no numbers count as 1 where they differ. Time counts as the clock shows it: code may wait.
    """
    start = perf_counter()
    predictor.call(predictor.encode(table.slice(0, 64)), kinds[0])
    cost = (perf_counter() - start) / 64 * len(kinds) * _CODE_PASSES
    encoded = predictor.encode(table.slice(0, int(min(table.num_rows, max(FEWEST, SECONDS / max(cost, 1e-9))))))
    rows = len(encoded)
    order = np.random.default_rng(21).permutation(rows)
    noise = 0.0
    for kind in kinds:
        call = _caller(predictor, kind)
        whole = call(encoded)
        others = ((call(encoded), whole), (_in_pieces(call, encoded, 7), whole), (call(encoded[order]), whole[order]))
        noise = max(noise, *(_distance(found, expected) for found, expected in others))
    return Promise("code", noise=noise, rows=rows)


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    if _same(found, expected):
        return 0.0
    return _noise([found], [expected]) if found.dtype.kind == "f" and found.shape == expected.shape else 1.0


def _chunks(predictor: LibraryPredictor, encoded: Any, kind: OutputKind) -> tuple[int, ...]:
    """Return the chunks to try, in order."""
    start = process_time()
    predict_in_chunks(predictor, encoded[: min(CHUNKS[0], len(encoded))], kind, chunk=CHUNKS[0])
    return CHUNKS if process_time() - start <= _SLOW_CHUNK else (*CHUNKS[1:2], CHUNKS[0], *CHUNKS[2:])


Call = Callable[[Any], np.ndarray]


def _caller(predictor: LibraryPredictor, kind: OutputKind, *, chunk: int = 0) -> Call:
    if chunk:
        return lambda rows: predict_in_chunks(predictor, rows, kind, chunk=chunk)
    return lambda rows: predictor.call(rows, kind)


def _is_independent(call: Call, encoded: Any, expected: np.ndarray, few: int) -> bool:
    """Return True if rows have the bits of ``expected`` in other batches, places, companies and threads.

    :param few: number of calls with one row, and with seven.
    """
    rows = len(expected)
    order = np.random.default_rng(21).permutation(rows)
    shift = min(13, rows - 1)
    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(call, [encoded[: rows // 2], encoded[rows // 2 :]]))
    return (
        _same(np.concatenate(halves), expected)
        and all(_same(_in_pieces(call, encoded[: few * size], size), expected[: few * size]) for size in (1, 7))
        and _same(_in_pieces(call, encoded, 1000), expected)
        and _same(call(encoded[shift:]), expected[shift:])
        and _same(call(encoded[order]), expected[order])
    )


def _in_pieces(call: Call, encoded: Any, size: int) -> np.ndarray:
    return np.concatenate([call(encoded[start : start + size]) for start in range(0, len(encoded), size)])


def _same(found: np.ndarray, expected: np.ndarray) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if found.dtype == object:
        return bool((found == expected).all())
    return np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()


def _noise(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Return the largest difference of numbers; texts count as 0."""
    pairs = [(one, two) for one, two in zip(found, expected, strict=True) if one.dtype.kind == "f"]
    with np.errstate(invalid="ignore"):
        return max((float(np.nanmax(np.abs(one - two), initial=0.0)) for one, two in pairs), default=0.0)
