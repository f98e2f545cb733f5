"""Write the reference in docs/python.md from signatures and docstrings: ``python docs/make_python.py``.

The docstrings hold the examples; tests/docs/test_python.py runs them in a folder of the demo.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pipeline

PAGE = Path(__file__).parent / "python.md"
_BLOCK = re.compile(r"(<!-- api: ([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SECTION = re.compile(r"^(Parameters|Returns|Raises|Examples|See Also)\n-+\n", re.MULTILINE)
_WIDTH = 100


def make_page(text: str) -> str:
    """Return ``text`` with a fresh entry between each ``<!-- api: Name -->`` and ``<!-- end -->``."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{make_entry(block[2])}\n{block[3]}", text)


def make_entry(name: str) -> str:
    """Return signature and docstring of a public object, or of a public method, as Markdown."""
    owner, _, member = name.partition(".")
    target = inspect.getattr_static(getattr(pipeline, owner), member) if member else getattr(pipeline, owner)
    target = getattr(target, "__func__", target)
    signature = (
        "" if isinstance(target, (property, cached_property)) else f"```python\n{_signature(name, target)}\n```\n\n"
    )
    return signature + "\n".join(_markdown(inspect.getdoc(target) or ""))


def examined() -> Iterator[Any]:
    """Yield the names and objects of the page, for doctest."""
    for block in _BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        owner, _, member = block[2].partition(".")
        target = getattr(pipeline, owner)
        yield block[2], getattr(target, member) if member else target


def _signature(name: str, target: Any) -> str:
    signature = inspect.signature(target)
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    texts = []
    for position, parameter in enumerate(parameters):
        if parameter.kind is parameter.KEYWORD_ONLY and not any(
            p.kind is p.KEYWORD_ONLY for p in parameters[:position]
        ):
            texts.append("*")
        texts.append(str(parameter.replace(annotation=parameter.empty)))
    name = f"pipeline.{name}" if inspect.isclass(target) or "." not in name else name
    line = f"{name}({', '.join(texts)})"
    if len(line) <= _WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {text},\n" for text in texts) + ")"


def _markdown(text: str) -> Iterator[str]:
    first, *sections = _SECTION.split(text)
    yield first.strip().replace("``", "`")
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        yield ""
        if title == "Examples":
            yield f"```pycon\n{body.strip()}\n```"
            continue
        yield f"**{title}**\n"
        yield from _items(body, title=title)


def _items(body: str, *, title: str) -> Iterator[str]:
    """Yield the entries of a section as a list."""
    entries: list[tuple[str, list[str]]] = []
    for line in body.strip().splitlines():
        if line.startswith("    "):
            entries[-1][1].append(line.strip())
        elif line.strip():
            entries.append((line, []))
    for head, texts in entries:
        name, _, kind = head.partition(" : ")
        meaning = " ".join(texts).replace("``", "`")
        if title == "See Also":
            yield f"- `{name}`: {kind}"
        else:
            yield f"- `{name}`" + (f" ({kind})" if kind else "") + (f": {meaning}" if meaning else "")


if __name__ == "__main__":
    PAGE.write_text(make_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
