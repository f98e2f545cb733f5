"""`Hook`: what is told to somebody, and how, when a job begins or ends. A part of a job spec, and of the settings."""

from __future__ import annotations

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from pipeline.common.secrets import is_reference
from pipeline.spec.parts import Name, Part, wrong

HookEvent = Literal["start", "success", "warnings", "failure", "cancelled", "interrupted"]
ENDS: tuple[HookEvent, ...] = ("success", "warnings", "failure", "cancelled", "interrupted")


def _check_secret(text: str) -> str:
    if not is_reference(text):
        raise wrong(
            "holds a secret itself",
            expected="a reference to it: env:NAME or file:PATH",
            next_step="put it into a variable, write secret: env:NAME, and change a secret that others have seen",
            hides=True,
        )
    return text


def _check_url(text: str) -> str:
    if is_reference(text):
        return text
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise wrong("is no address of a web server", expected="https://…, or env:NAME where the address is a secret")
    if parts.username or parts.password:
        raise wrong("holds a password", expected="an address without one", next_step="write url: env:NAME")
    return text


def _check_command(words: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(words, str):
        raise wrong(
            "is one text, which would need a shell",
            expected="a list: the program, then each argument",
            next_step=f"write [{', '.join(words.split())}]",
        )
    return words


class Hook(Part):
    """Somebody who is told when the job begins or ends: a program, a web server, or a lineage service."""

    when: Annotated[tuple[HookEvent, ...], Field(min_length=1, strict=False)] = ENDS
    """Any of ``start``, ``success``, ``warnings`` (succeeded with some), ``failure``, ``cancelled``, ``interrupted``.
    Default: every end. A lineage service is told of every event."""
    command: (
        Annotated[str | Annotated[tuple[Name, ...], Field(min_length=1, strict=False)], AfterValidator(_check_command)]
        | None
    ) = None
    """A program and its arguments, as a list; no shell. It gets the facts as JSON on stdin, and as variables
    ``PIPELINE_HOOK_…``."""
    url: Annotated[str, AfterValidator(_check_url)] | None = None
    """A web server that gets the facts as JSON; ``env:NAME`` where the address is a secret."""
    secret: Annotated[str, AfterValidator(_check_secret)] | None = None
    """``env:NAME`` or ``file:PATH``: signs what is sent to ``url`` with HMAC-SHA256."""
    openlineage: Name | None = None
    """Namespace of the job for OpenLineage (the extra ``openlineage``); where events go, OpenLineage's own
    configuration says."""
    timeout: float = Field(default=10.0, gt=0.0, le=600.0)
    """Seconds an attempt may take."""
    attempts: int = Field(default=5, ge=1, le=20)
    """How often it is tried, with pauses of 1, 2, 4, … seconds."""

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        kinds = [name for name in ("command", "url", "openlineage") if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise wrong(
                f"is {' and '.join(kinds)} at once" if kinds else "says nobody to be told",
                expected="one of command, url, openlineage",
            )
        if self.secret is not None and self.url is None:
            raise wrong("has a secret, but no url", expected="secret: beside url:")
        return self

    @property
    def name(self) -> str:
        """What people are told of it: the program, or the host; an address may be a secret."""
        if self.command is not None:
            return f"command {self.command[0]}"
        if self.openlineage is not None:
            return f"openlineage {self.openlineage}"
        url = self.url or ""
        return f"url {url}" if is_reference(url) else f"url {urlsplit(url).scheme}://{urlsplit(url).netloc}"
