"""Read trigger definitions from a ``triggers.yaml``, or from ``triggers:`` of a job spec."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, ValidationError

from pipeline.errors import SpecError
from pipeline.spec.diagnostics import Document, SpecIssue, SpecIssues, did_you_mean, issues_of
from pipeline.spec.document import read_document
from pipeline.spec.fields import SpecModel
from pipeline.spec.triggers import JobTrigger, Trigger, TriggerList
from pipeline.storage.urls import expand_user

DEFAULT_FILE = "triggers.yaml"


@dataclass(frozen=True)
class WatchedTrigger:
    """A trigger and the job spec that it submits."""

    name: str
    trigger: Trigger
    job: str
    """Path or URL of the job spec."""
    file: str
    """File that defines the trigger."""


class _OwnTriggers(SpecModel):
    """The part of a job spec that is read here. Other parts may have placeholders that only a firing renders."""

    triggers: Annotated[tuple[Trigger, ...], Field(strict=False)]


def load_triggers(files: Iterable[str | os.PathLike[str]]) -> tuple[WatchedTrigger, ...]:
    """Return the triggers of several files, each a ``triggers.yaml`` or a job spec with ``triggers:``.

    :raises SpecError: with every issue of the first invalid file, or for two triggers with the same name.
    """
    watched: list[WatchedTrigger] = []
    for file in files:
        watched += _load(os.fspath(file))
    for number, trigger in enumerate(watched):
        other = next((other for other in watched[:number] if other.name == trigger.name), None)
        if other is not None:
            raise SpecError(
                "two triggers have the same name",
                where=trigger.file,
                found=f"{trigger.name}, which {other.file} has too",
                expected="a unique name for each trigger: its log is stored under it",
                next_step="change name: of one of them",
            )
    return tuple(watched)


def find_trigger(watched: Sequence[WatchedTrigger], name: str) -> WatchedTrigger:
    """Return the trigger with that name.

    :raises SpecError: when no trigger has that name.
    """
    named = next((trigger for trigger in watched if trigger.name == name), None)
    if named is None:
        names = [trigger.name for trigger in watched]
        raise SpecError(
            "unknown trigger",
            found=name,
            expected="one of " + ", ".join(names) if names else "",
            next_step=did_you_mean(name, names) or "python -m pipeline triggers list",
        )
    return named


def _load(file: str) -> list[WatchedTrigger]:
    document = read_document(file)
    data = document.data if isinstance(document.data, dict) else {}
    where = file if "://" in file else str(expand_user(file).absolute())
    if "steps" not in data and "source" not in data:
        listed = _validated(TriggerList, document)
        return [
            WatchedTrigger(_name(trigger, number, document), trigger, _beside(where, trigger.job), where)
            for number, trigger in enumerate(listed.triggers)
            if isinstance(trigger, JobTrigger)
        ]
    if not data.get("triggers"):
        raise SpecError(
            "the job spec has no triggers",
            where=file,
            next_step="add triggers: to it, or name it as the job: of a trigger in a triggers.yaml",
        )
    own = Document(document.name, {"triggers": data["triggers"]}, document.values, document.keys, _own(document))
    triggers = _validated(_OwnTriggers, own).triggers
    if len(triggers) == 1:
        return [WatchedTrigger(triggers[0].name or str(data.get("name", "")), triggers[0], where, where)]
    return [
        WatchedTrigger(_name(trigger, number, own), trigger, where, where) for number, trigger in enumerate(triggers)
    ]


def _own(document: Document) -> list[SpecIssue]:
    return [issue for issue in document.issues if issue.path[:1] in ((), ("triggers",))]


def _validated(model: Any, document: Document) -> Any:
    issues = list(document.issues)
    try:
        validated = model.model_validate(document.data)
    except ValidationError as error:
        validated = None
        issues += issues_of(error, model=model, document=document)
    if issues or validated is None:
        raise SpecIssues(issues, name=document.name)
    return validated


def _name(trigger: Trigger, number: int, document: Document) -> str:
    if trigger.name is None:
        raise SpecError(
            "a trigger has no name",
            where=str(document.place_of(("triggers", number))),
            expected="a unique name: for each trigger; its log is stored under it",
        )
    return trigger.name


def _beside(file: str, job: str) -> str:
    """Return the path ``job``, relative to the folder of ``file``."""
    if "://" in job or os.path.isabs(os.path.expanduser(job)):
        return os.path.expanduser(job)
    folder = file.rpartition("/")[0]
    return f"{folder}/{job}"
