"""Read the file of a job spec, or a text, and apply the overrides of the command line.

A relative path in a spec is relative to the working directory, wherever the file lies.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from typing import Any

import yaml

from pipeline.errors import SpecError
from pipeline.spec.diagnostics import IN_PYTHON, Document, FieldPath, Place, SpecIssue, dotted
from pipeline.spec.file import read_text
from pipeline.spec.precedence import Precedence, SettingSource, Variable, spec_variables
from pipeline.spec.yaml import MAX_DEPTH, parse_text


def read_document(
    source: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    text: str | None = None,
) -> Document:
    """Read a YAML or JSON file, or a text with more than one line, and apply ``field=value`` overrides to it.

    :param environ: variables, of which those named ``PIPELINE_SPEC__…`` are overrides too, of a lower rank.
    :param text: text of the file, where it was read already: a pipe can be read once only.

    :raises SpecError: when the file cannot be read, is not YAML (or JSON), or an override fits nowhere.
    :raises RefusedForSafety: for anchors, aliases, Python tags and very deep nesting.
    """
    name = os.fspath(source)
    if isinstance(source, str) and "\n" in source:
        document = parse_text(source, name=IN_PYTHON, is_json=source.lstrip().startswith("{"))
    else:
        text = read_text(name) if text is None else text
        document = parse_text(text, name=name, is_json=name.endswith(".json"))
    for variable in spec_variables(environ or {}):
        path = _path_of(variable, document.data)
        apply_override(document, f"{path}={variable.text}", flag=variable.name, rank=Precedence.ENVIRONMENT)
    for override in overrides:
        apply_override(document, override)
    return document


def _path_of(variable: Variable, data: Any) -> str:
    """Return the field that a variable names; existing keys match in any case."""
    path: list[str] = []
    for part in variable.path:
        known = {str(key).lower(): str(key) for key in data} if isinstance(data, dict) else {}
        key = known.get(part, part)
        path.append(key)
        if isinstance(data, list):
            position = _position(key)
            data = data[position] if position is not None and position < len(data) else None
        else:
            data = data.get(key) if isinstance(data, dict) else None
    return dotted(path)


def dump_text(data: Any) -> str:
    """Return YAML that `read_document` reads back to the same ``data``. Texts other than single words are quoted."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Never write an alias: the reader refuses them."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_word = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) and not _SPECIAL.fullmatch(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_word else '"')


_SPECIAL = re.compile(r"yes|no|on|off|y|n|true|false|null", re.IGNORECASE)
_Dumper.add_representer(str, _represent_text)


_SEGMENT = re.compile(r'"(?P<quoted>[^"]*)"|(?P<name>[^."\[\]=\s]+)|\[(?P<index>[0-9]+)\]')


def apply_override(document: Document, text: str, *, flag: str = "--set", rank: Precedence = Precedence.SET) -> None:
    """Set one field of ``document`` from ``field.name=value``; the value is YAML by the same rules.

    :param flag: flag or variable that says so, for messages.
    :param rank: what it is, for those who ask where a value comes from.

    :raises SpecError: when there is no such place in the document, or the value is not YAML; it names the flag.
    """
    flag_name = f"{flag} {text}" if rank is Precedence.SET else flag
    path, value_text = _split_override(text, flag_name)
    value_document = parse_text(value_text, name=flag_name) if value_text.strip() else Document(flag_name)
    place = Place(name=flag_name)
    for issue in value_document.issues:
        document.issues.append(SpecIssue(issue.message, place, path, issue.found, issue.expected, issue.next_step))
    before = deepcopy(document.data)
    resolved = _put(document, path, value_document.data, flag_name)
    _note_origin(document, resolved, rank, before=before)
    for places in (document.values, document.keys):
        for known in [known for known in places if known[: len(resolved)] == resolved]:
            del places[known]
    # What was wrong with the value that is replaced is of no interest any more.
    document.issues[:] = [
        m for m in document.issues if m.place.name == flag_name or m.path[: len(resolved)] != resolved
    ]
    document.values[resolved] = document.keys[resolved] = place


def _note_origin(document: Document, path: FieldPath, rank: Precedence, *, before: Any) -> None:
    """Record the source of the value at ``path``, and the value that it overrides."""
    with suppress(LookupError, TypeError):
        for part in path:
            before = before[part]
        replaced = SettingSource(before, document.rank_of(path), str(document.place_of(path)))
        document.over[path] = (replaced, *document.over.get(path, ()))
    for known in [known for known in document.ranks if known[: len(path)] == path]:
        del document.ranks[known]
    document.ranks[path] = rank


def _split_override(text: str, flag_name: str) -> tuple[FieldPath, str]:
    path: list[str | int] = []
    position = 0
    while match := _SEGMENT.match(text, position):
        quoted, name, index = match.group("quoted", "name", "index")
        if index is not None:
            # An index of too many digits names no position, and stays a text.
            number = _position(index)
            path.append(index if number is None else number)
        else:
            path.append(quoted if quoted is not None else name)
        position = match.end()
        if text.startswith(".", position):
            position += 1
        elif not text.startswith("[", position):
            break
    if not path or not text.startswith("=", position):
        raise SpecError(
            "an override is not of the form field=value",
            where=flag_name,
            expected="such as sink.path=out/ or steps.0.score.model=model.json",
        )
    if len(path) > MAX_DEPTH:
        raise SpecError(
            "an override is nested too deep",
            where=flag_name[:200],
            found=f"{len(path):,} levels",
            expected=f"at most {MAX_DEPTH}",
        )
    return tuple(path), text[position + 1 :]


def _put(document: Document, path: FieldPath, value: Any, flag_name: str) -> FieldPath:
    """Set the value, making mappings on the way, and return its path with list positions as numbers."""
    if not isinstance(document.data, dict):
        document.data = {}
    here: Any = document.data
    resolved: list[str | int] = []
    for part in path[:-1]:
        key = _key(here, part, resolved, flag_name)
        if isinstance(here, dict) and here.get(key) is None:
            here[key] = {}
        here = here[key]
        resolved.append(key)
    last = _key(here, path[-1], resolved, flag_name)
    here[last] = value
    return (*resolved, last)


def _key(here: Any, part: str | int, resolved: list[str | int], flag_name: str) -> Any:
    """Return ``part`` as an index or a key of ``here``."""
    if isinstance(here, list):
        return _index(here, part, resolved, flag_name)
    if isinstance(here, dict) and isinstance(part, str):
        return part
    kind = "a mapping" if isinstance(here, dict) else "a single value"
    raise SpecError(
        "an override names an unknown field",
        where=flag_name,
        found=f"{dotted(resolved) or 'the job spec'} is {kind}",
        next_step=f"set {dotted(resolved)} as a whole" if resolved else "name a field",
    )


def _position(text: str) -> int | None:
    """Return the position in a list that ``text`` names; None for any other text."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None


def _index(here: list[Any], part: str | int, resolved: list[str | int], flag_name: str) -> int:
    text = str(part)
    position = _position(text)
    if position is not None and position < len(here):
        return position
    raise SpecError(
        "an override names a position outside of the list",
        where=flag_name,
        found=text,
        expected=f"{dotted(resolved)}.0 to {dotted(resolved)}.{len(here) - 1}" if here else "the list is empty",
    )
