"""What the events of a job tell of how it ran: batches that were made smaller, stragglers that were helped. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.plan.plan import Plan


def batch_record(plan: Plan, smallest: int | None, events: Iterable[Mapping[str, Any]]) -> dict[str, int | None]:
    """Rows per batch.

    :param smallest: that any partition ended with.
    :returns: ``planned``; ``remembered`` from an earlier job with this model on such workers, or None; and the
        ``smallest`` that any partition ended with, or None.
    """
    known = [int(event["remembered"]) for event in events if event.get("event") == "batch"]
    return {"planned": plan.batch_rows, "remembered": known[-1] if known else None, "smallest": smallest}


def straggler_record(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What was done about partitions that ran far too long.

    :returns: ``backups``, ``cuts``, ``divided``, ``moved`` and ``shared``: how many were helped like that; ``won``: how
        often the help came in first; ``seconds_won``: by how much, summed up, against the estimates.
    """
    known = [event for event in events if event.get("event") == "straggler"]
    begun = Counter(str(event.get("action")) for event in known if not event.get("is_over"))
    won = [event for event in known if event.get("is_over") and event.get("won")]
    names = {"backup": "backups", "cut": "cuts", "divide": "divided", "move": "moved", "share": "shared"}
    return {
        **{name: begun[action] for action, name in names.items()},
        "won": len(won),
        "seconds_won": round(sum(float(event.get("seconds_won") or 0.0) for event in won), 3),
    }
