"""What evaluated the model of a job, and what speaks for it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from pipeline.receipt import GIVEN_UP, EngineUse, Receipt


def engine_evidence(receipts: Iterable[Receipt], *, tolerance: float) -> dict[str, Any]:
    """The fields of `EngineUse` summed up, with ``speedup`` and ``tolerance``; empty when no receipt has any."""
    uses = [receipt.engine for receipt in receipts if receipt.engine is not None]
    if not uses:
        return {}
    whole = sum(uses, EngineUse())
    record = asdict(whole) | {"kernels": list(whole.kernels), "reasons": list(whole.reasons)}
    record["seconds"] = {name: round(value, 6) for name, value in whole.seconds.items()}
    record["seconds_start"] = round(whole.seconds_start, 3)
    return {**record, "speedup": round(whole.speedup, 3), "tolerance": tolerance}


def engine_warnings(receipts: Iterable[Receipt]) -> tuple[str, ...]:
    """What a person must know of it."""
    whole = sum((receipt.engine for receipt in receipts if receipt.engine is not None), EngineUse())
    found = [f"the tree engine was given up: {reason}" for reason in whole.reasons if reason.startswith(GIVEN_UP)]
    if whole.mismatches:
        found.append(
            f"{whole.mismatches:,} of {whole.compared_rows:,} compared rows came out otherwise than from xgboost, "
            f"whose results were taken there; {whole.rows.get('trees', 0):,} rows have the tree engine's: "
            "score again with engine: xgboost"
        )
    return tuple(found)
