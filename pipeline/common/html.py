"""Cards: the one look of objects in notebooks, light and dark. Pure HTML and CSS, nothing from the network."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Literal

from pipeline.common.user_code import python_calls

Tone = Literal["", "good", "warn", "bad", "busy"]
_COLORS: dict[str, str] = {"": "#8a8f98", "good": "#2e9d5b", "warn": "#c98a1b", "bad": "#d0453e", "busy": "#3b82c4"}
_STYLE = (
    "<style>"
    ".dbp-card{border:1px solid rgba(128,128,128,.35);border-left:4px solid var(--dbp-tone);border-radius:6px;"
    "padding:.5em .9em .6em;margin:.3em 0;max-width:64em;color:inherit}"
    ".dbp-card .dbp-title{font-weight:600;margin-bottom:.25em;overflow-wrap:anywhere}"
    ".dbp-card table{border-collapse:collapse;margin:0;color:inherit;border:0}"
    ".dbp-card tr,.dbp-card tr:nth-child(even),.dbp-card tr:hover{background:none!important;border:0}"
    ".dbp-card th,.dbp-card td{text-align:left!important;vertical-align:top;padding:.1em 1.2em .1em 0!important;"
    "border:0!important;white-space:pre-wrap;overflow-wrap:anywhere;max-width:none!important;background:none}"
    ".dbp-card th{font-weight:500!important;opacity:.65;white-space:nowrap!important}"
    ".dbp-card .dbp-bar{height:.45em;border-radius:.25em;background:rgba(128,128,128,.25);margin:.35em 0 .45em;"
    "overflow:hidden}"
    ".dbp-card .dbp-bar div{height:100%;background:var(--dbp-tone)}"
    "</style>"
)


def card_color(tone: Tone) -> str:
    """Return the color of a meaning."""
    return _COLORS[tone]


def html_table(title: str, fields: Iterable[tuple[str, str]], *, tone: Tone = "", share: float | None = None) -> str:
    """Return a card: a title, and one row per field with a text. Commands of a shell become calls of Python.

    :param tone: meaning of the color at its edge.
    :param share: part that is done, as a bar below the title; None: no bar.
    """
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(python_calls(text))}</td></tr>" for name, text in fields if text
    )
    bar = "" if share is None else f'<div class="dbp-bar"><div style="width:{100 * min(1.0, share):.1f}%"></div></div>'
    return html_card(title, f"{bar}<table><tbody>{rows}</tbody></table>", tone=tone)


def html_card(title: str, content: str, *, tone: Tone = "") -> str:
    """Return a card with any ``content``, which is HTML."""
    head = f'<div class="dbp-title">{escape(title)}</div>'
    return f'{_STYLE}<div class="dbp-card" style="--dbp-tone:{_COLORS[tone]}">{head}{content}</div>'
