"""The site of docs/: it is built strictly, without network, with every page in the navigation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("mkdocs", reason="mkdocs-material is not installed (the extra docs)")
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = spec_from_file_location("site_links", ROOT / "build_support" / "site_links.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_in_the_navigation(site: Path) -> None:
    links = {link for page in site.glob("*.html") for link in re.findall(r'href="([^"#]+)', page.read_text())}
    for page in (ROOT / "docs").rglob("*.md"):
        built = page.relative_to(ROOT / "docs").with_suffix(".html").as_posix().replace("README.html", "index.html")
        assert (site / built).is_file()
        assert built in links or built.startswith("design/"), built


def test_nothing_is_loaded_from_other_servers(site: Path) -> None:
    loaded = re.compile(r'<(?:script|img|link)\b[^>]*\b(?:src|href)="?((?:https?:)?//[^"\s>]+)')
    assert {name for page in site.rglob("*.html") for name in loaded.findall(page.read_text())} == set()
    assert (site / "search" / "search_index.json").stat().st_size > 100_000


def test_pages_without_a_place(hooks: ModuleType) -> None:
    """A new page stands at the end of its section."""
    nav: list[Any] = [{"Start": ["a.md"]}, {"How-tos": ["b.md"]}, {"Design notes": ["design/README.md"]}]
    completed = hooks.with_all_pages(nav, ["c.md", "a.md", "design/001.md", "b.md"])
    assert completed[1:] == [{"How-tos": ["b.md", "c.md"]}, {"Design notes": ["design/README.md", "design/001.md"]}]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[a page](gate.md#limits)", "[a page](gate.md#limits)"),
        ("[a note](design/../gate.md)", "[a note](design/../gate.md)"),
        ("[rules](../SECURITY.md#limits)", "rules (`SECURITY.md`)"),
        ("[SECURITY.md](../SECURITY.md)", "SECURITY.md"),
        ("```\n[rules](../SECURITY.md)\n```", "```\n[rules](../SECURITY.md)\n```"),
    ],
)
def test_links_beside_the_docs(hooks: ModuleType, text: str, shown: str) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="here.md"))
    assert hooks.on_page_markdown(text, page=page, config={"docs_dir": str(ROOT / "docs")}, files=None) == shown


def test_link_to_a_missing_file(hooks: ModuleType) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="design/here.md"))
    with pytest.raises(PluginError, match=r"no such file: nothing\.py"):
        hooks.on_page_markdown("[x](../../nothing.py)", page=page, config={"docs_dir": str(ROOT / "docs")}, files=None)
