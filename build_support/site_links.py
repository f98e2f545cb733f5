"""Hooks of MkDocs: pages that the navigation does not name, and links from pages to files beside docs/.

The pages are written to be read on GitHub, too, where such links work.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((\.\.?/[^)\s#]*)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
_SECTIONS = {"design": "Design notes", "": "How-tos"}
"""Section of the pages of a folder that the navigation does not name."""


def named_pages(nav: Any) -> set[str]:
    """Return the paths of all pages in a navigation, relative to docs/."""
    if isinstance(nav, str):
        return {nav}
    items = nav.values() if isinstance(nav, dict) else nav
    return {page for item in items for page in named_pages(item)}


def with_all_pages(nav: list[Any], pages: list[str]) -> list[Any]:
    """Return ``nav`` with every page, those that it does not name at the end of their section."""
    for page in sorted(set(pages) - named_pages(nav)):
        title = _SECTIONS[posixpath.dirname(page)]
        (section,) = (item[title] for item in nav if isinstance(item, dict) and title in item)
        section.append(page)
    return nav


def on_config(config: Any) -> Any:
    """Complete the navigation."""
    docs = Path(config["docs_dir"])
    config["nav"] = with_all_pages(config["nav"], [path.relative_to(docs).as_posix() for path in docs.rglob("*.md")])
    return config


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Show links to files outside of docs/ as their text: the site does not have these files.

    :raises PluginError: if such a file does not exist.
    """
    fences = [(match.start(), match.end()) for match in _FENCE.finditer(markdown)]
    root = Path(config["docs_dir"]).parent

    def shown(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), match[2]))
        if target.startswith("docs/") and target.endswith((".md", ".png")):
            return match[0]
        if any(start <= match.start() < stop for start, stop in fences):
            return match[0]
        if not (root / target).exists():
            raise PluginError(f"{page.file.src_uri}: no such file: {target}")
        return match[1] if target in match[1] else f"{match[1]} (`{target}`)"

    return _LINK.sub(shown, markdown)
