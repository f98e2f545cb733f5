"""What evaluated the model of a job, and what speaks for it. Pure."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline.models.engines import GIVEN_UP, EngineUse


def engine_evidence(whole: EngineUse | None, *, tolerance: float) -> dict[str, Any]:
    """The fields of ``whole``, with ``speedup`` and ``tolerance``; empty for None.

    :param whole: of all partitions together.
    """
    if whole is None:
        return {}
    record = asdict(whole) | {"kernels": list(whole.kernels), "reasons": list(whole.reasons)}
    record["seconds"] = {name: round(value, 6) for name, value in whole.seconds.items()}
    record["seconds_start"] = round(whole.seconds_start, 3)
    return {**record, "speedup": round(whole.speedup, 3), "tolerance": tolerance}


def engine_warnings(whole: EngineUse | None) -> tuple[str, ...]:
    """What a person must know of it."""
    if whole is None:
        return ()
    found = [f"the tree engine was given up: {reason}" for reason in whole.reasons if reason.startswith(GIVEN_UP)]
    if whole.mismatches:
        found.append(
            f"{whole.mismatches:,} of {whole.compared_rows:,} compared rows came out otherwise than from xgboost, "
            f"whose results were taken there; {whole.rows.get('trees', 0):,} rows have the tree engine's: "
            "score again with engine: xgboost"
        )
    return tuple(found)
