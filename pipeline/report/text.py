"""Reports, plans and lists as plain text of at most one screen. Pure functions from what ``--json`` shows to lines.

Where each value of a job's configuration comes from, as ``plan --show-config`` prints it. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.common.units import format_bytes, format_count, format_seconds
from pipeline.spec.diagnostics import shown
from pipeline.spec.precedence import ResolvedSetting

SHOWN_CHILDREN = 60
"""Children of a fan-out in a summary."""
LABEL = 11
"""Columns for the word at the start of a line."""


def reconciliation(rows: Mapping[str, int]) -> str:
    """``1,000 in = 990 out + 10 rejected + 0 filtered``, with ≠ where it does not add up."""
    total = rows["out"] + rows["rejected"] + rows["filtered"]
    sign = "=" if rows["in"] == total else "≠"
    return (
        f"{rows['in']:,} in {sign} {rows['out']:,} out + {rows['rejected']:,} rejected + {rows['filtered']:,} filtered"
    )


def summary_text(report: Mapping[str, Any]) -> str:
    """What a person reads when a job has ended, or asks for its status."""
    error = report.get("error") or {}
    lines = [f"{report['status']}  {report['job']}"]
    lines += _labelled(
        {
            "error": str(error.get("message") or ""),
            "found": str(error.get("found") or ""),
            "rows": reconciliation(report["rows"]),
            "input": str(report.get("input") or ""),
            "done": _done(report),
            "rejects": _reasons(report.get("reasons") or {}),
            "again": _rounds(report),
            "speed": _speed(report),
            "time": _times(report.get("seconds") or {}),
            "balance": _balance(report),
            "batch": _batch(report.get("batch") or {}),
            "model": _model(report["model"]),
            "engine": _engine(report.get("engines") or {}),
            "estimate": _estimated(report.get("estimate") or {}),
            "output": _published(report),
            "directory": str(report.get("directory") or ""),
        }
    )
    lines += _children(report)
    lines += [f"  {'warning':<{LABEL}}{text}" for text in report.get("warnings") or ()]
    lines += next_lines(report.get("next") or ())
    return "\n".join(lines)


def _children(report: Mapping[str, Any]) -> list[str]:
    """A table of the children of a fan-out, those first that did not end well."""
    children = sorted(report.get("children") or (), key=lambda child: str(child["status"]).startswith("SUCCEEDED"))
    if not children:
        return []
    counts = Counter(str(child["status"]) for child in children)
    total = ", ".join(f"{count:,} {status}" for status, count in counts.items())
    rows = [
        [
            str(child["job"]).removeprefix(f"{report['job']}"),
            str(child["status"]),
            f"{child['partitions']['done']:,} of {child['partitions']['planned']:,}",
            *(f"{child['rows'][name]:,}" for name in ("in", "out", "rejected", "filtered")),
            f"{child['retries']:,}",
            _cut(str(child["reason"]), width=60),
        ]
        for child in children[:SHOWN_CHILDREN]
    ]
    header = ["CHILD", "STATUS", "PARTITIONS", "IN", "OUT", "REJECTED", "FILTERED", "RETRIES", "REASON"]
    lines = [f"  {'children':<{LABEL}}{total}", *(f"    {line}" for line in table_text(header, rows).split("\n"))]
    left = len(children) - SHOWN_CHILDREN
    return lines + ([f"    … and {left:,} more (--json shows all)"] if left > 0 else [])


def next_lines(commands: Sequence[str]) -> list[str]:
    """What to type next, one command a line."""
    return [f"  {'next' if not index else '':<{LABEL}}{command}" for index, command in enumerate(commands)]


def plan_text(details: Mapping[str, Any]) -> str:
    """What will run, for ``plan``."""
    memory, model = details.get("memory") or {}, details.get("model") or {}
    output, filtered = details.get("output") or {}, details.get("pruned_rows") or 0
    rows = format_count(details["rows"])
    if filtered:
        rows += f", {filtered:,} of them in row groups that the filter rules out"
    features = model.get("features")
    lines = ["The plan fits. Nothing was written, nothing runs yet."]
    if "estimate" in details:
        lines = [f"The plan fits. A sample of it was scored as a part of the job {details['job']}."]
    lines += _labelled(
        {
            "rows": rows,
            "bytes": f"{format_bytes(details['bytes'])} to read, uncompressed",
            "files": _count(details.get("files")),
            "aside": _aside(details.get("rejected_files") or ()),
            "partitions": _count(details["partitions"]),
            "skew": _skew(details.get("skew")),
            "batch": f"{details['batch_rows']:,} rows" if details.get("batch_rows") else "",
            "memory": _memory(memory),
            "cluster": _cluster(details.get("cluster") or {}),
            "model": _model(model),
            "engine": _planned_engine(details.get("engine") or {}),
            "features": f"{len(features)}: {_listed(features)}" if isinstance(features, (list, tuple)) else "",
            "output": _output(output),
            "columns": _listed(output.get("columns") or ()),
            "children": _planned_children(details.get("children") or ()),
        }
    )
    lines += [f"  {'warning':<{LABEL}}{text}" for text in details.get("warnings") or ()]
    return "\n".join(lines)


def _planned_children(children: Sequence[Mapping[str, Any]]) -> str:
    return f"{len(children):,}: {_listed([child['slug'] for child in children])}" if children else ""


def verification_text(job: str, *, ok: bool, checks: Sequence[Mapping[str, Any]]) -> str:
    """Each check of ``verify`` with its outcome."""
    width = max((len(str(check["name"])) for check in checks), default=0)
    lines = [f"{'VERIFIED' if ok else 'NOT AS IT SHOULD BE'}  {job}"]
    lines += [f"  {'ok    ' if c['ok'] else 'FAILED'}  {c['name']!s:<{width}}  {c['detail']}" for c in checks]
    return "\n".join(lines)


def rejects_text(job: str, details: Mapping[str, Any]) -> str:
    """Rejected rows by reason, with the first of each."""
    lines = [f"{details['total']:,} rejected rows  {job}"]
    lines += [f"  {_rounds(details)}"] if _rounds(details) else []
    for group in details["groups"]:
        lines += ["", f"{group['count']:,} × {group['reason']}"]
        for example in group["examples"]:
            lines.append(f"  {example['file']}, row {example['row']:,}: {example['message']}")
            values = ", ".join(f"{name}={value!r}" for name, value in example["values"].items())
            lines += [f"    {_cut(values)}"] if values else []
    if details.get("rejected_files"):
        lines += ["", f"{len(details['rejected_files']):,} input files set aside as a whole:"]
        for file in details["rejected_files"]:
            lines += [f"  {_rejected_file(file)}", f"    {file['reason']}: {_cut(file['message'])}"]
    if exported := details.get("exported"):
        lines += ["", f"wrote {exported['rows']:,} rows to {exported['path']}"]
    elif details["files"]:
        lines += ["", "all of them, with every column:", *(f"  {name}" for name in details["files"])]
    if details["total"] or details.get("rejected_files"):
        lines += ["", "mended it? then:", *(f"  {command}" for command in (f"python -m pipeline retry {job}",))]
    return "\n".join(lines)


def _rejected_file(file: Mapping[str, Any]) -> str:
    rows = "rows unknown" if file["rows"] is None else f"{file['rows']:,} rows"
    return f"{file['path']} ({rows})"


def _aside(files: Sequence[Mapping[str, Any]]) -> str:
    """The first of the files that are set aside, with what is wrong with it."""
    if not files:
        return ""
    more = f", and {len(files) - 1:,} more (--json shows all)" if len(files) > 1 else ""
    return f"{_rejected_file(files[0])}: {_cut(files[0]['message'])}{more}"


def table_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, as wide as they must be."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)
    )


def _labelled(fields: Mapping[str, str]) -> list[str]:
    return [f"  {name:<{LABEL}}{text}" for name, text in fields.items() if text]


def _count(value: Any) -> str:
    if isinstance(value, Mapping):
        return format_count(value.get("count", 0))
    return format_count(value) if isinstance(value, (int, float)) else ""


def _done(report: Mapping[str, Any]) -> str:
    """How far an unfinished job is."""
    if str(report["status"]).startswith("SUCCEEDED"):
        return ""
    planned = (report.get("partitions") or {}).get("planned")
    if not planned:
        return ""
    return f"{_partitions_done(report):,} of {planned:,} partitions"


def _published(report: Mapping[str, Any]) -> str:
    output = str(report.get("output") or "")
    if str(report["status"]).startswith("SUCCEEDED"):
        return output
    published = report.get("published")
    return output + (f" (as manifest {published} left it)" if published else " (nothing published by this job)")


def _rounds(report: Mapping[str, Any]) -> str:
    """What was tried again, the last three times."""
    texts = [
        f"round {one['round']} ({one['why']}): {one['healed']:,} of {one['retried']:,} rejected rows healed"
        for one in report.get("rounds") or ()
        if one["retried"]
    ]
    return "; ".join(texts[-3:])


def _partitions_done(report: Mapping[str, Any]) -> int:
    return int((report.get("partitions") or {}).get("done", 0))


def _balance(report: Mapping[str, Any]) -> str:
    done = _partitions_done(report)
    parts = [f"{done:,} partitions"] if done else []
    parts += [text for text in (_skew(report.get("skew")),) if text]
    parts += [f"{report['retries']:,} retries"] if "retries" in report else []
    return ", ".join(parts + _stragglers(report.get("stragglers") or {}))


def _batch(record: Mapping[str, Any]) -> str:
    """Rows of a batch, where they are not simply what was planned."""
    planned, remembered, smallest = (record.get(name) for name in ("planned", "remembered", "smallest"))
    if remembered is None and (smallest is None or smallest == planned):
        return ""
    began = f"began with {format_count(remembered)} rows, remembered from an earlier job; " if remembered else ""
    ended = f"down to {format_count(smallest)} rows; " if smallest else ""
    return f"{began}{ended}planned were {format_count(planned or 0)}"


def _stragglers(record: Mapping[str, Any]) -> list[str]:
    helped = sum(int(record.get(name) or 0) for name in ("backups", "cuts", "divided"))
    if not helped:
        return []
    won = f", about {format_seconds(record['seconds_won'])} won" if record.get("seconds_won") else ""
    return [f"{helped:,} {'straggler' if helped == 1 else 'stragglers'} helped{won}"]


def _reasons(reasons: Mapping[str, int]) -> str:
    shown = sorted(reasons.items(), key=lambda pair: -pair[1])
    text = ", ".join(f"{count:,} × {reason}" for reason, count in shown[:4])
    return f"{text}, and {len(shown) - 4} more reasons" if len(shown) > 4 else text


def _speed(report: Mapping[str, Any]) -> str:
    rate, total = report.get("rows_per_second"), (report.get("seconds") or {}).get("total")
    parts = [f"{format_count(rate)} rows/s"] if rate else []
    parts += [f"{format_seconds(total)} in all"] if total else []
    waited = (report.get("seconds") or {}).get("provision")
    parts += [f"{format_seconds(waited)} of it waiting for workers"] if waited else []
    return ", ".join(parts)


def _times(seconds: Mapping[str, float]) -> str:
    """Phases beside the total, those of nothing left out."""
    parts = [
        f"{name.replace('_', ' ')} {format_seconds(value)}"
        for name, value in seconds.items()
        if name not in ("total", "provision") and value >= 0.005
    ]
    return ", ".join(parts) + " (summed over partitions)" if parts else ""


def _skew(skew: Any) -> str:
    if isinstance(skew, Mapping):
        before, after = skew.get("before"), skew.get("after")
        if before is None or after is None:
            return ""
        return f"largest is {before:.1f} × the mean in files, {after:.1f} × in partitions"
    return ""


def _model(model: Mapping[str, Any]) -> str:
    digest = str(model.get("digest") or "")
    parts = [str(model.get("name") or ""), f"version {model['version']}" if model.get("version") else ""]
    text = " ".join(part for part in parts if part)
    return f"{text} (sha256 {digest[:16]})" if digest else text


def _planned_engine(engine: Mapping[str, Any]) -> str:
    possible = engine.get("possible") or ()
    if "trees" in possible:
        return "trees" if len(possible) == 1 else "trees or xgboost, whichever is faster on the first rows"
    reasons = "; ".join(engine.get("reasons") or ())
    return f"xgboost; the tree engine is not used: {reasons}" if reasons else "xgboost"


def _engine(engines: Mapping[str, Any]) -> str:
    """What evaluated the model, and what was found when both engines did."""
    rows = engines.get("rows") or {}
    if not any(rows.values()):
        return ""
    timed, compared, wrong = (engines.get(name) or 0 for name in ("timed_rows", "compared_rows", "mismatches"))
    speed = f" {engines['speedup']:.1f} × xgboost's predictor on {timed:,} timed rows" if timed else ""
    parts = [f"trees{speed}" if rows.get("trees") else f"xgboost; trees{speed}" if speed else "xgboost"]
    if wrong:
        parts += [f"different on {wrong:,} of {compared:,} compared rows"]
    elif compared:
        near = f"within {engines['tolerance']:g}" if engines.get("tolerance") else "bit-equal"
        parts += [f"{near} on all {compared:,} compared rows"]
    return ", ".join(parts)


def _memory(memory: Mapping[str, Any]) -> str:
    task, limit = memory.get("task"), memory.get("limit")
    if task is None or limit is None:
        return ""
    return f"{format_bytes(task)} a task projected, {format_bytes(limit)} a worker"


def _cluster(cluster: Mapping[str, Any]) -> str:
    if "workers" not in cluster:
        return ""
    threads = cluster.get("threads", 1)
    return f"{cluster['workers']} workers, {threads} {'thread' if threads == 1 else 'threads'} each"


def _output(output: Mapping[str, Any]) -> str:
    parts = [str(output.get("path") or ""), f"mode {output['mode']}" if output.get("mode") else ""]
    parts += [f"about {format_bytes(output['bytes'])}"] if output.get("bytes") else []
    return ", ".join(part for part in parts if part)


def _listed(names: Sequence[Any]) -> str:
    words = [str(name.get("name")) if isinstance(name, Mapping) else str(name) for name in names]
    return ", ".join(words[:12]) + (f" and {len(words) - 12} more" if len(words) > 12 else "")


def _cut(text: str, *, width: int = 160) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def estimate_text(estimate: Mapping[str, Any]) -> list[str]:
    """What a probe says of the whole job, with 95 % intervals."""

    def span(name: str, form: Callable[[float], str]) -> str:
        low, expected, high = (form(estimate[name][key]) for key in ("low", "expected", "high"))
        return f"about {expected} ({low} to {high})"

    peak, projected = (format_bytes(estimate[name]) for name in ("peak_memory", "projected_memory"))
    return _labelled(
        {
            "probed": f"{estimate['sampled']:,} of {estimate['partitions']:,} partitions; they stay done",
            "time": f"{span('seconds', format_seconds)} on {estimate['workers']:,} workers",
            "cost": f"{span('worker_hours', '{:.3g}'.format)} worker-hours",
            "size": f"{span('output_bytes', lambda size: format_bytes(round(size)))} of output",
            "memory": f"{peak} at most so far in a worker; the plan reckons with {projected}",
        }
    )


def _estimated(comparison: Mapping[str, Any]) -> str:
    """What a probe had said of the wall time, beside what came."""
    if not comparison:
        return ""
    said, came = comparison["estimated"]["seconds"], comparison["came"]["seconds"]
    span = " to ".join(format_seconds(said[key]) for key in ("low", "high"))
    return f"{format_seconds(came)} came of {format_seconds(said['expected'])} estimated ({span})"


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


def config_details(spec: Mapping[str, ResolvedSetting], settings: Mapping[str, ResolvedSetting]) -> dict[str, Any]:
    """As JSON output shows it."""
    return {
        "spec": {name: choice.to_dict() for name, choice in spec.items()},
        "settings": {name: choice.to_dict() for name, choice in settings.items()},
    }


def config_text(details: Mapping[str, Any]) -> str:
    """The same as two tables."""
    return "\n\n".join(
        table_text([title, "VALUE", "FROM", "WHERE"], [_row(name, one) for name, one in details[key].items()])
        for title, key in (("JOB SPEC", "spec"), ("SETTING", "settings"))
    )


def _row(name: str, one: Mapping[str, Any]) -> list[str]:
    where = "" if one["origin"] == one["from"] else str(one["origin"])
    over = [f"{shown(other['value'])} ({other['origin']})" for other in one["over"] if other["from"] != "built-in"]
    where += f"; wins over {', '.join(over)}" if over else ""
    return [name, "" if one["value"] is None else shown(one["value"]), str(one["from"]), where.removeprefix("; ")]
