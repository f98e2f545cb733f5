"""Read the file of a job spec, or a text, and apply the overrides of the command line.

A relative path in a spec is relative to the working directory, wherever the file lies.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pipeline.errors import SpecError
from pipeline.spec.diagnostics import IN_PYTHON, Document, FieldPath, Place, SpecIssue, dotted
from pipeline.spec.precedence import Precedence, SettingSource, Variable, spec_variables
from pipeline.spec.yaml import MAX_BYTES, parse_text
from pipeline.storage.urls import file_system, storage_errors


def read_document(
    source: str | os.PathLike[str], *, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Document:
    """Read a YAML or JSON file, or a text with more than one line, and apply ``field=value`` overrides to it.

    :param environ: variables, of which those named ``PIPELINE_SPEC__…`` are overrides too, of a lower rank.

    :raises SpecError: when the file cannot be read, is no YAML (or JSON), or an override fits nowhere.
    :raises RefusedForSafety: for anchors, aliases, Python tags and very deep nesting.
    """
    name = os.fspath(source)
    if isinstance(source, str) and "\n" in source:
        document = parse_text(source, name=IN_PYTHON, is_json=source.lstrip().startswith("{"))
    else:
        document = parse_text(read_text(name), name=name, is_json=name.endswith(".json"))
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
            data = data[int(key)] if key.isdigit() and int(key) < len(data) else None
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


def read_text(name: str) -> str:
    """Read the text of a job spec file: a local path or any fsspec URL.

    :raises SpecError: when there is none, or it is over 1 MiB, or not UTF-8.
    """
    try:
        if "://" in name:
            system, path = file_system(name)
            with storage_errors(name), system.open(path, "rb") as file:
                data: bytes = file.read(MAX_BYTES + 1)
        else:
            with Path(name).expanduser().open("rb") as file:
                data = file.read(MAX_BYTES + 1)
    except OSError as error:
        _cannot_open(name, error)
    return _decode(data, name)


def _cannot_open(name: str, error: OSError) -> NoReturn:
    if isinstance(error, FileNotFoundError):
        raise SpecError(
            "no job spec at that path",
            where=name,
            next_step="fix the path, or write a new spec with: python -m pipeline init",
        ) from error
    raise SpecError("the job spec cannot be read", where=name, found=error.strerror or str(error)) from error


def _decode(data: bytes, name: str) -> str:
    if len(data) > MAX_BYTES:
        raise SpecError(
            "the job spec is too large",
            where=name,
            found=f"over {MAX_BYTES:,} bytes",
            expected="at most 1 MiB",
            next_step="give the path of a job spec, not of data",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SpecError(
            "the job spec is not UTF-8 text",
            where=f"{name}:{line}",
            found=f"the byte 0x{data[error.start]:02x}",
            next_step="save it as UTF-8",
        ) from error


_SEGMENT = re.compile(r'"(?P<quoted>[^"]*)"|(?P<name>[^."\[\]=\s]+)|\[(?P<index>[0-9]+)\]')


def apply_override(document: Document, text: str, *, flag: str = "--set", rank: Precedence = Precedence.SET) -> None:
    """Set one field of ``document`` from ``field.name=value``; the value is YAML by the same rules.

    :param flag: flag or variable that says so, for messages.
    :param rank: what it is, for those who ask where a value comes from.

    :raises SpecError: when there is no such place in the document, or the value is no YAML; it names the flag.
    """
    flag_name = f"{flag} {text}" if rank is Precedence.SET else flag
    path, value_text = _split_override(text, flag_name)
    value_document = parse_text(value_text, name=flag_name) if value_text.strip() else Document(flag_name)
    place = Place(name=flag_name)
    for mistake in value_document.mistakes:
        document.mistakes.append(
            SpecIssue(mistake.message, place, path, mistake.found, mistake.expected, mistake.next_step)
        )
    before = deepcopy(document.data)
    resolved = _put(document, path, value_document.data, flag_name)
    _note_origin(document, resolved, rank, before=before)
    for places in (document.values, document.keys):
        for known in [known for known in places if known[: len(resolved)] == resolved]:
            del places[known]
    # What was wrong with the value that is replaced is of no interest any more.
    document.mistakes[:] = [
        m for m in document.mistakes if m.place.name == flag_name or m.path[: len(resolved)] != resolved
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
        path.append(int(index) if index is not None else quoted if quoted is not None else name)
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


def _index(here: list[Any], part: str | int, resolved: list[str | int], flag_name: str) -> int:
    text = str(part)
    if text.isdigit() and int(text) < len(here):
        return int(text)
    raise SpecError(
        "an override names a position outside of the list",
        where=flag_name,
        found=text,
        expected=f"{dotted(resolved)}.0 to {dotted(resolved)}.{len(here) - 1}" if here else "the list is empty",
    )
