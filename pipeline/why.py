"""Why each partition of a plan is to be done, in the way of Snakemake. Pure."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pipeline.plan import Plan

EVERYTHING = "the job is not incremental: all of its input is scored"


def explain(plan: Plan) -> dict[str, Any]:
    """As JSON output shows it: ``counts`` of files per reason, how many are ``unchanged``, the published files that the
    job ``replaces``, its ``files`` and its ``partitions``, each with why."""
    reasons = {file.path: file.why or EVERYTHING for file in plan.files}
    done = {file.path: sum(group.rows for group in file.row_groups[: file.done_groups]) for file in plan.files}
    return {
        "counts": dict(Counter(_kind(reason) for reason in reasons.values())),
        "unchanged": plan.progress.unchanged,
        "replaces": list(plan.progress.replaces),
        "files": [
            {"path": file.path, "why": reasons[file.path], "rows": file.rows, "done_rows": done[file.path]}
            for file in plan.files
        ],
        "partitions": [
            {
                "partition": partition.id,
                "rows": partition.rows,
                "why": list(dict.fromkeys(reasons[part.path] for part in partition.fragments)),
            }
            for partition in plan.partitions
        ],
    }


def input_text(plan: Plan) -> str:
    """What of its source an incremental job scores, in words; empty for others."""
    if not plan.progress.baseline:
        return ""
    counts = Counter(_kind(file.why) for file in plan.files)
    unchanged = f"{plan.progress.unchanged:,} unchanged"
    if not counts:
        return f"nothing new; {unchanged} files"
    return ", ".join([*(f"{count:,} {reason}" for reason, count in counts.items()), f"{unchanged} files"])


def _kind(reason: str) -> str:
    """A reason without the names in it."""
    for kind in ("failed before", "shares an output file"):
        if reason.startswith(kind):
            return kind
    return reason


def why_text(details: dict[str, Any], *, shown: int = 20) -> str:
    """The same for a person: partitions with their reasons, then what is left alone."""
    lines = ["", "why each partition is to be done"]
    for one in details["partitions"][:shown]:
        lines.append(f"  {one['partition']:<9}{one['rows']:>12,} rows  {'; '.join(one['why'])}")
    more = len(details["partitions"]) - shown
    lines += [f"  … and {more:,} more (--json shows all)"] if more > 0 else []
    lines += ["  nothing is to be done"] if not details["partitions"] else []
    lines += [f"  {details['unchanged']:,} files are as they were published"] if details["unchanged"] else []
    count = len(details["replaces"])
    lines += [f"  {count:,} published files are replaced: rows in them have changed"] if count else []
    return "\n".join(lines)
