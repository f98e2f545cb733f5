"""Read YAML and JSON into plain data with the position of every value; ambiguous YAML is refused.

The reader is YAML 1.2's core schema, less everything a person would be surprised by. What YAML 1.1 and 1.2 read
differently (``no``, ``010``, ``1:30``, ``2024-01-01``) is an error and not a guess. Anchors, aliases and tags are
refused: a job spec needs none, and they are how a small file becomes a large one or runs code.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

import yaml

from pipeline.errors import RefusedForSafety, SpecError
from pipeline.spec.diagnostics import Document, FieldPath, Place, SpecIssue, SpecIssues
from pipeline.spec.file import MAX_BYTES

MAX_DEPTH = 40

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,29})")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")

_WORD = re.compile(r"(?:yes|no|on|off)", re.IGNORECASE)
_OTHER_BASE = re.compile(r"[-+]?0[obxOBX][0-9a-fA-F_]+")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+(?:\.[0-9_]*)?")
_UNDERSCORE = re.compile(r"[-+]?[0-9][0-9]*_[0-9_]*(?:\.[0-9_]*)?")
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")
_DATE = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:(?:[Tt]|[ \t]+)[0-9]{1,2}:[0-9]{2}:[0-9]{2}.*)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|nan)", re.IGNORECASE)


def parse_text(text: str, *, name: str, is_json: bool = False) -> Document:
    """Read YAML, or JSON, into a `Document`.

    :raises SpecIssues: when the text is not YAML (or JSON) at all.
    :raises RefusedForSafety: for aliases, anchors, Python tags and very deep nesting.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise SpecError(
            "the job spec is too large",
            where=name,
            found=f"over {MAX_BYTES:,} bytes",
            expected="at most 1 MiB",
            next_step="give the path of a job spec, not of data",
        )
    if is_json:
        _check_json(text, name)
        # YAML allows no tabs between tokens, and JSON none inside of strings.
        text = text.replace("\t", " ")
    document = Document(name)
    document.values[()] = Place(1, 1, name)
    try:
        node = _Composer(text, name).get_single_node()
    except yaml.MarkedYAMLError as error:
        raise SpecIssues([_syntax_issue(error, name)], name=name) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        issue = SpecIssue(
            "a character that YAML does not allow",
            Place(line, 1, name),
            found=f"U+{ord(text[error.position]):04X}",
        )
        raise SpecIssues([issue], name=name) from error
    if node is None:
        raise SpecIssues([SpecIssue("the job spec is empty", Place(1, 1, name))], name=name)
    document.data = _TextReader(document).value(node, ())
    return document


def _check_json(text: str, name: str) -> None:
    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is not a JSON number")

    try:
        json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        place = Place(error.lineno, error.colno, name)
        raise SpecIssues([SpecIssue("the file is not JSON", place, found=error.msg)], name=name) from error
    except (ValueError, RecursionError) as error:
        issue = SpecIssue("the file is not JSON", Place(1, 1, name), found=str(error) or "too deep nesting")
        raise SpecIssues([issue], name=name) from error


_HINTS = (
    ("found character '\\t'", "indent with spaces instead of tabs"),
    ("cannot start any token", "put the value in quotes"),
    ("mapping values are not allowed", "check the indentation, or put a value with a colon in quotes"),
    ("could not find expected ':'", "write a colon and a space between a key and its value"),
    ("expected <block end>", "check the indentation: entries of one block start in the same column"),
    ("found unexpected end of stream", "close the quotes"),
    ("expected ',' or ']'", "close the bracket"),
    ("expected ',' or '}'", "close the brace"),
    ("but found another document", "keep one job to a file, without --- in between"),
)


def _syntax_issue(error: yaml.MarkedYAMLError, name: str) -> SpecIssue:
    mark = error.problem_mark or error.context_mark
    place = Place(mark.line + 1, mark.column + 1, name) if mark else Place(1, 1, name)
    found = " ".join(part for part in (error.context, error.problem) if part)
    hint = next((hint for sign, hint in _HINTS if sign in found), "")
    return SpecIssue("the file is not YAML", place, found=found, next_step=hint)


class _Composer(yaml.SafeLoader):
    """PyYAML's safe loader up to the tree of nodes; it refuses features that a job spec does not need."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self._name = name
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        where = str(Place(mark.line + 1, mark.column + 1, self._name))
        if event.anchor is not None:
            sign = f"*{event.anchor}" if isinstance(event, yaml.AliasEvent) else f"&{event.anchor}"
            _refuse("anchors and aliases are not allowed in a job spec", where, sign, "write the value out")
        tag = getattr(event, "tag", None)
        if tag is not None:
            self._refuse_tag(tag, where)
        if self._depth >= MAX_DEPTH:
            _refuse("the job spec is nested too deep", where, f"over {MAX_DEPTH} levels", "write it flat")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    @staticmethod
    def _refuse_tag(tag: str, where: str) -> NoReturn:
        short = tag.replace("tag:yaml.org,2002:", "!!")
        if "python" in tag:
            _refuse("a job spec cannot hold Python objects", where, short, "name code as module:function")
        raise SpecError("tags are not allowed in a job spec", where=where, found=short, next_step="leave it out")


def _refuse(message: str, where: str, found: str, next_step: str) -> NoReturn:
    raise RefusedForSafety(message, where=where, found=found, next_step=next_step)


class _TextReader:
    """Turn nodes into data, and record positions and issues in the document."""

    def __init__(self, document: Document) -> None:
        self.document = document

    def value(self, node: yaml.Node, path: FieldPath) -> Any:
        self.document.values[path] = self._place(node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: FieldPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, path)
            if key is None:
                continue
            here = (*path, key)
            if key in data:
                found = f"{key}, first in line {self.document.keys[here].line}"
                self._add_issue(
                    key_node, path=here, message="a key is there twice", found=found, step="keep one of them"
                )
                continue
            self.document.keys[here] = self._place(key_node)
            data[key] = self.value(value_node, here)
        return data

    def _key(self, node: yaml.Node, path: FieldPath) -> str | None:
        if not isinstance(node, yaml.ScalarNode):
            self._add_issue(node, path=path, message="a key is not a name", found="a list or a mapping")
            return None
        text = _joined(str(node.value))
        if node.style is None and text == "<<":
            _refuse("merge keys are not allowed in a job spec", str(self._place(node)), "<<", "write the values out")
        if not isinstance(self._scalar(node, (*path, text)), str):
            step = f'put it in quotes: "{text}"'
            self._add_issue(node, path=(*path, text), message="a key is not a name", found=text or "nothing", step=step)
        return text

    def _scalar(self, node: Any, path: FieldPath) -> Any:
        text: str = node.value
        if node.style is not None:
            return _joined(text)
        trap = _trap(text)
        if trap is not None:
            meaning, instead = trap
            self._add_issue(node, path=path, message=f"a value has two meanings: {meaning}", found=text, step=instead)
            return text
        if _NULL.fullmatch(text):
            return None
        if _BOOL.fullmatch(text):
            return text.lower() == "true"
        if _INT.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text):
            return self._float(node, path)
        return text

    def _float(self, node: yaml.Node, path: FieldPath) -> float:
        number = float(node.value)
        if math.isinf(number):
            self._add_issue(node, path=path, message="a number is too large", found=str(node.value))
        return number

    def _place(self, node: yaml.Node) -> Place:
        mark = node.start_mark
        return Place(mark.line + 1, mark.column + 1, self.document.name)

    def _add_issue(self, node: yaml.Node, *, path: FieldPath, message: str, found: str, step: str = "") -> None:
        self.document.issues.append(SpecIssue(message, self._place(node), path, found, "", step))


def _joined(text: str) -> str:
    """Replace surrogate pairs, as in JSON's ``\\ud83d\\ude00``, by their character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _trap(text: str) -> tuple[str, str] | None:
    """Return the reason why a plain value is ambiguous, and what to write instead; None for a clear value."""
    quoted = f'"{text}"'
    if _WORD.fullmatch(text):
        plain = "true" if text.lower() in ("yes", "on") else "false"
        return f"text, and the {plain} of YAML 1.1", f"write {quoted} for the text, or {plain}"
    if _OTHER_BASE.fullmatch(text):
        return "text, and a number of another base", f"write {quoted} for the text, or the number in decimal"
    if _LEADING_ZERO.fullmatch(text):
        plain = re.sub(r"^([-+]?)0+(?=[0-9])", r"\1", text.replace("_", ""))
        return "a number with a leading zero, octal in YAML 1.1", f"write {quoted} for the text, or {plain}"
    if _UNDERSCORE.fullmatch(text):
        return "text, and a number in YAML 1.1", f"write {quoted} for the text, or {text.replace('_', '')}"
    if _BASE_60.fullmatch(text):
        return "text, and a number of base 60 in YAML 1.1", f"write {quoted} for the text, or the number in full"
    if _DATE.fullmatch(text):
        return "text, and a date in YAML 1.1", f"write {quoted}"
    if _NOT_FINITE.fullmatch(text):
        return "text, and a number that is not finite", f"write {quoted} for the text; a number must be finite"
    return None
