"""Write the tables of docs/job-spec.md from the code: ``python docs/make_reference.py``."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.settings import Settings
from pipeline.spec.job_spec import json_schema

PAGE = Path(__file__).parent / "job-spec.md"
EXAMPLES: dict[str, dict[str, str]] = {
    "JobSpec": {
        "name": "churn-nightly",
        "source": "{path: lake/customers/}",
        "steps": "[{map: features:build}, {score: {model: churn.ubj}}]",
        "sink": "{path: scored/}",
        "errors": "{max_fraction: 0.001}",
        "contract": "{age: {min: 18, max: 110}}",
        "on_alias_change": "restart",
        "step_change": "pin",
        "cluster": "tls://10.0.0.1:8786",
        "device": "cuda",
        "storage": "{'s3://lake': {key: env:LAKE_KEY, secret: env:LAKE_SECRET}}",
        "params": '{day: "2026-01-01", threshold: 0.5}',
        "run": '{date: "2026-01-01"}',
        "report": "{show_values: true}",
        "gate": "{psi: 0.2}",
        "budget": "{cost: 25}",
        "fan_out": "{by: country}",
        "hooks": "[{when: [failure], command: [notify-send, it failed]}]",
        "triggers": '[{cron: "30 2 * * *", time_zone: Europe/Berlin}]',
    },
    "Source": {
        "path": "[lake/2025/, lake/2026/part-*.parquet]",
        "format": "csv",
        "csv": '{delimiter: ";"}',
        "types": "{zip: string, age: int64}",
        "columns": "[customer_id, age, plan]",
        "filter": "country == 'DE' and age >= 18",
        "base": "lake/",
        "incremental": "true",
    },
    "CsvOptions": {
        "delimiter": '";"',
        "quote": """ "'" """.strip(),
        "escape": r"'\'",
        "header": "[customer_id, age, plan]",
        "nulls": '["", "NA"]',
    },
    "Incremental": {"on_model_change": "all"},
    "Gate": {
        "psi": "0.2",
        "js": "0.05",
        "ks": "0.1",
        "baseline": "lake/reference.parquet",
        "rows": "{min: 0.5, max: 2}",
        "columns": "{churn: {mean: [0.1, 0.5]}}",
        "min_rows": "10000",
        "action": "warn",
    },
    "GateRows": {"min": "0.5", "max": "2", "at_least": "1000", "at_most": "5000000"},
    "GateColumn": {
        "psi": "0.5",
        "js": "0.1",
        "ks": "0.2",
        "nulls": "0.01",
        "mean": "[0.1, 0.5]",
        "min": "0",
        "max": "1",
    },
    "Budget": {"cost": "25", "node_hours": "40"},
    "ReportOptions": {"distributions": "false", "show_values": "true"},
    "Trigger": {
        "name": "nightly",
        "cron": '"30 2 * * *"',
        "time_zone": "Europe/Berlin",
        "every": "15 min",
        "arrival": "{path: landing/, marker: _SUCCESS}",
        "after": "churn-nightly",
        "missed": "skip",
        "grace": "10 min",
        "overlap": "forbid",
        "params": "{country: DE}",
    },
    "ArrivalTrigger": {
        "path": "landing/",
        "quiet": "30 s",
        "marker": "_SUCCESS",
        "files": "100",
        "rows": "1000000",
        "bytes": "1 GiB",
        "at_latest": "1 h",
    },
    "MapStep": {
        "map": "features:build",
        "dtype_backend": "pyarrow",
        "row_wise": "unchecked",
        "on_error": "{TimeoutError: {retry: 3}, KeyError: fail}",
        "concurrency": "32",
        "rows_per_call": "10",
        "timeout": "2 min",
        "row_timeout": "5 s",
    },
    "RetryCall": {"retry": "3", "wait": "2 s", "then": "reject"},
    "FilterStep": {"filter": "country == 'DE' and total > 0"},
    "SelectStep": {"select": "{customer: customer_id, age: age}"},
    "CheckpointStep": {"checkpoint": "true"},
    "Checkpoint": {"partition_bytes": "64 MiB"},
    "DaskStep": {
        "dask": "joins:history",
        "inputs": "{customers: {path: lake/customers/}}",
        "partition_bytes": "128 MiB",
        "shuffle": "tasks",
        "origin": "true",
    },
    "DaskInput": {
        "path": "lake/customers/",
        "format": "csv",
        "csv": '{delimiter: ";"}',
        "types": "{zip: string}",
        "columns": "[customer, country]",
        "filter": "country == 'DE'",
        "base": "lake/",
    },
    "ScoreStep": {"score": "{model: churn.ubj}"},
    "Score": {
        "model": "models/churn.ubj",
        "endpoint": '{url: "http://localhost:8000/v1", model: m, messages: "{{text}}"}',
        "combine": "mean",
        "meta": "meta.ubj",
        "meta_input": "margin",
        "by": "country",
        "models": "models/{}.ubj",
        "other": "models/rest.ubj",
        "features": "[age, tenure, plan]",
        "output": "{column: churn, kind: margin}",
        "keep": "[customer_id, country]",
        "engine": "xgboost",
        "tolerance": "1e-6",
        "iteration_range": "best",
        "flavor": "lightgbm",
        "allow_code": "true",
        "model_files": "weights/",
        "threads": "2",
        "where": "first > 0.8",
        "shadow": "churn",
        "categories": "{city: [Berlin, München, Köln]}",
    },
    "Endpoint": {
        "url": "http://localhost:8000/v1",
        "model": "Qwen/Qwen3-8B",
        "messages": '"Sum up: {{text}}"',
        "input": '"{{text}}"',
        "answer": "{mood: [good, bad], stars: int64}",
        "dimensions": "256",
        "temperature": "0",
        "max_tokens": "200",
        "seed": "7",
        "options": "{top_p: 0.9}",
        "key": "env:SERVICE_KEY",
        "headers": "{api-key: env:SERVICE_KEY}",
        "concurrency": "16",
        "max_concurrency": "64",
        "requests_per_minute": "3000",
        "tokens_per_minute": "1000000",
        "rows_per_request": "64",
        "timeout": "2 min",
        "attempts": "10",
        "patience": "1 h",
        "prices": "{input: 0.15, output: 0.60}",
        "check": "false",
    },
    "Message": {"role": "system", "content": '"You rate {{kind}}."'},
    "Prices": {"input": "0.15", "output": "0.60", "cached": "0.075"},
    "Output": {"column": "churn", "kind": "contributions"},
    "Sink": {
        "path": "scored/",
        "mode": "overwrite",
        "format": "parquet",
        "target_file_size": "256 MiB",
        "compression": "zstd",
        "url": "env:WAREHOUSE",
        "table": "ml.scores",
        "key": "[customer_id]",
        "where": "day == '2026-01-01'",
        "job_column": "job",
    },
    "Errors": {
        "max_fraction": "0.001",
        "max_rows": "100",
        "files": "quarantine",
        "max_files": "3",
        "keep_columns": "[age, plan]",
        "hash_columns": "[customer_id]",
        "hash_key": "env:REJECT_KEY",
        "retain": "30 days",
    },
    "Hook": {
        "when": "[failure, warnings]",
        "command": "[notify-send, it failed]",
        "url": "https://hooks.example.com/jobs",
        "secret": "env:HOOK_SECRET",
        "openlineage": "prod",
        "timeout": "5",
        "attempts": "3",
    },
    "FanOut": {"by": "country", "max_parallel": "8", "publish": "each", "max_children": "50"},
    "RunOptions": {"date": '"2026-01-01"'},
    "ColumnContract": {
        "dtype": "int64",
        "nullable": "false",
        "finite": "true",
        "min": "0",
        "max": "120",
        "allowed": "[basic, standard, premium]",
    },
}
"""YAML for each field of each part; a test loads every one of them."""

_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def make_page(text: str) -> str:
    """Return ``text`` with a new table between each ``<!-- table: Part -->`` and ``<!-- end -->``."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{make_table(found[2])}\n{found[3]}", text)


def make_table(name: str) -> str:
    """Return field, type, default, example and meaning of every field of a part, as a Markdown table.

    :raises KeyError: for a field without an example in `EXAMPLES`.
    """
    if name == "Settings":
        return _settings_table()
    schema = json_schema()
    part = schema if name == "JobSpec" else schema["$defs"][name]
    lines = ["| field | type | default | example | meaning |", "| --- | --- | --- | --- | --- |"]
    for field, described in part["properties"].items():
        default = "**required**" if field in part.get("required", ()) else _default(described)
        meaning = described.get("description") or _linked(schema, described).get("description", "")
        cells = [f"`{field}`", _type(described), default, f"`{EXAMPLES[name][field]}`", meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _settings_table() -> str:
    (owner,) = ast.parse(inspect.getsource(Settings)).body
    body = owner.body if isinstance(owner, ast.ClassDef) else []
    meanings = {
        item.target.id: " ".join(ast.literal_eval(said.value).replace("``", "`").split())
        for item, said in pairwise(body)
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(said, ast.Expr)
    }
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for field in fields(Settings):
        if not field.metadata.get("is_setting", True):
            continue
        value = str(field.default).lower() if isinstance(field.default, bool) else field.default
        default = "" if value in (None, ()) else f"`{value}`"
        lines.append(f"| `{field.name.replace('_', '-')}` | {default} | {meanings[field.name]} |")
    return "\n".join(lines) + "\n"


def _linked(schema: dict[str, Any], described: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = schema["$defs"].get(described.get("$ref", "").rsplit("/", 1)[-1], {})
    return found


def _default(described: dict[str, Any]) -> str:
    value = described.get("default")
    if isinstance(value, dict) or (value is None and described.get("type") == "object"):
        return "none"
    return "" if value is None else f"`{value}`"


def _type(described: dict[str, Any]) -> str:
    if "$ref" in described:
        name = described["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "enum" in described:
        return ", ".join(f"`{value}`" for value in described["enum"])
    for key in ("anyOf", "oneOf"):
        if key in described:
            kinds = [_type(one) for one in described[key] if one.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if "prefixItems" in described:
        return f"list of {len(described['prefixItems'])} {_type(described['prefixItems'][0])}"
    if described["type"] == "array":
        return f"list of {_type(described['items'])}"
    if described["type"] == "object" and described["additionalProperties"] is True:
        return "mapping"
    if described["type"] == "object":
        inner = _type(described["additionalProperties"])
        is_name = "maxLength" in described.get("propertyNames", {})
        return f"mapping of {'URL' if inner == 'mapping' else 'name' if is_name else 'column'} to {inner}"
    return {"string": "text", "boolean": "true or false", "integer": "number", "number": "number"}[described["type"]]


if __name__ == "__main__":
    PAGE.write_text(make_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
