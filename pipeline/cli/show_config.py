"""``plan --show-config``: each field and setting with its value and where that comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.common.text import table_text
from pipeline.spec.diagnostics import shown
from pipeline.spec.precedence import ResolvedSetting


def config_details(spec: Mapping[str, ResolvedSetting], settings: Mapping[str, ResolvedSetting]) -> dict[str, Any]:
    """Return both tables as JSON."""
    return {
        "spec": {name: choice.to_dict() for name, choice in spec.items()},
        "settings": {name: choice.to_dict() for name, choice in settings.items()},
    }


def config_text(details: Mapping[str, Any]) -> str:
    """Format both tables as text."""
    return "\n\n".join(
        table_text([title, "VALUE", "FROM", "WHERE"], [_row(name, field) for name, field in details[key].items()])
        for title, key in (("JOB SPEC", "spec"), ("SETTING", "settings"))
    )


def _row(name: str, field: Mapping[str, Any]) -> list[str]:
    where = "" if field["origin"] == field["from"] else str(field["origin"])
    over = [f"{shown(other['value'])} ({other['origin']})" for other in field["over"] if other["from"] != "built-in"]
    where += f"; wins over {', '.join(over)}" if over else ""
    return [name, "" if field["value"] is None else shown(field["value"]), str(field["from"]), where.removeprefix("; ")]
