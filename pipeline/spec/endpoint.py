"""`Endpoint`: a service with the interface of OpenAI that scores rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.common.digest import digest_json
from pipeline.common.secrets import is_reference, redact, says_secret
from pipeline.common.units import parse_seconds
from pipeline.spec.fields import Name, SpecModel, check_timeout, spec_error

PLACE = re.compile(r"\{\{\s*(.+?)\s*\}\}")
"""Place of a column in a template: ``{{name}}``."""
ANSWER_TYPES = ("string", "int64", "float64", "bool")
_JSON_TYPES = {"string": "string", "integer": "int64", "number": "float64", "boolean": "bool"}
BATCH_WAVES = 4
"""Requests of a batch of rows / requests at a time: an attempt can stop only between two batches."""
WORK_FIELDS = {"model", "messages", "input", "answer", "dimensions", "temperature", "max_tokens", "seed", "options"}
"""Fields that decide an answer; the others say how the service is called."""


def _check_service(text: str) -> str:
    if is_reference(text):
        return text
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise spec_error(
            "is not the URL of a service", expected="its base, as http://localhost:8000/v1 or https://host/v1"
        )
    if parts.username or parts.password or redact(text) != text:
        raise spec_error(
            "contains a secret", expected="a URL without one", next_step="write key: env:NAME beside it", hides=True
        )
    if parts.path.rstrip("/").endswith(("/chat/completions", "/embeddings")):
        base = text.replace("/chat/completions", "").replace("/embeddings", "")
        raise spec_error("names one of the service's operations", expected="its base", next_step=f"write {base}")
    return text


def _check_key(text: str) -> str:
    if not is_reference(text):
        raise spec_error(
            "contains a secret",
            expected="a reference to it: env:NAME or file:PATH",
            next_step="put it into a variable, write key: env:NAME, and rotate a key that others have seen",
            hides=True,
        )
    return text


def _check_headers(headers: dict[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        is_secret = says_secret(name) or name.lower() in ("authorization", "api-key", "x-api-key", "cookie")
        if not is_reference(value) and (is_secret or redact(value) != value):
            raise spec_error(
                f"contains a secret in {name}",
                expected="a reference to it: env:NAME or file:PATH",
                next_step=f"write {name}: env:NAME, and rotate a secret that others have seen",
                hides=True,
            )
    return headers


def _check_answer(answer: dict[str, Any]) -> dict[str, Any]:
    for name, kind in answer.items():
        is_known = (
            kind in ANSWER_TYPES
            if isinstance(kind, str)
            else isinstance(kind, dict)
            or (isinstance(kind, (list, tuple)) and kind and all(isinstance(one, str) for one in kind))
        )
        if not is_known:
            raise spec_error(
                f"has no type for {name}",
                expected=f"{', '.join(ANSWER_TYPES)}, a list of the texts to choose from, or a JSON Schema",
            )
    return {name: list(kind) if isinstance(kind, tuple) else kind for name, kind in answer.items()}


def _one_message(value: Any) -> Any:
    """Return a text as the message of a user."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class Message(SpecModel):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"] = "user"
    """Who says it."""
    content: Name
    """Text, with ``{{column}}`` in place of the value of a column."""


class Prices(SpecModel):
    """Prices of a service, in money per million tokens. The currency is that of ``budget.cost``."""

    input: float = Field(default=0.0, ge=0.0)
    """Tokens of prompts, or of embedded texts."""
    output: float = Field(default=0.0, ge=0.0)
    """Tokens of answers."""
    cached: float | None = Field(default=None, ge=0.0)
    """Tokens of prompts that the service had cached. Default: as ``input``."""


class Endpoint(SpecModel):
    """A service with the interface of OpenAI: vLLM, llama.cpp's server, Ollama, or a hosted one."""

    url: Annotated[str, AfterValidator(_check_service)]
    """Base of the service, as ``http://localhost:8000/v1``; ``/chat/completions`` or ``/embeddings`` is added.
    ``env:NAME`` where the place changes with each start of the service."""
    model: Name
    """Name of the model at the service."""
    messages: (
        Annotated[
            tuple[Message, ...],
            BeforeValidator(_one_message),
            Field(min_length=1, strict=False),
        ]
        | None
    ) = None
    """Chat: messages with ``{{column}}`` in place of values; a single text is a message of the user. The result of a
    row is the text of the answer."""
    input: Name | None = None
    """Embeddings, in place of ``messages``: the text to embed, as ``{{column}}``. The result of a row is a list of
    float32 of fixed size."""
    answer: Annotated[dict[Name, Any], AfterValidator(_check_answer), Field(min_length=1)] | None = None
    """Chat: fields of a structured answer, each with ``string``, ``int64``, ``float64``, ``bool``, a list of the texts
    to choose from, or a JSON Schema. They become columns ``<output>_<field>``; a field of another schema is JSON text.
    The service is asked for JSON of that schema, and an answer that breaks it is a reject."""
    dimensions: int | None = Field(default=None, ge=1, le=65_536)
    """Embeddings: numbers of a list, where the model offers a choice. Default: those of one text, which planning
    sends."""
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    """Randomness of answers. Default: that of the service."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of an answer. Default: that of the service."""
    seed: int | None = None
    """Seed of the service's random choices; few services promise equal answers."""
    options: dict[Name, Any] = Field(default_factory=dict)
    """Further fields of each request, such as ``{top_p: 0.9}``."""
    key: Annotated[str, AfterValidator(_check_key)] | None = None
    """``env:NAME`` or ``file:PATH``: key that is sent as a bearer token. Driver and workers resolve it themselves."""
    headers: Annotated[dict[Name, str], AfterValidator(_check_headers)] = Field(default_factory=dict)
    """Further headers; secrets only as ``env:NAME`` or ``file:PATH``."""
    concurrency: int = Field(default=8, ge=1, le=1024)
    """Requests that a worker process has open at a time."""
    max_concurrency: int | None = Field(default=None, ge=1)
    """Requests that the whole job has open at a time; each worker has at least one. Default: no limit."""
    requests_per_minute: float | None = Field(default=None, gt=0.0)
    """Most requests of the whole job in a minute. Default: no limit but that of the service."""
    tokens_per_minute: float | None = Field(default=None, gt=0.0)
    """Most tokens of the whole job in a minute, of prompts and answers. Default: no limit but that of the service."""
    rows_per_request: int = Field(default=32, ge=1, le=2048)
    """Embeddings: texts of a request."""
    timeout: Annotated[float | int | str, AfterValidator(check_timeout)] = "60 s"
    """Longest time for the answer to a request."""
    attempts: int = Field(default=6, ge=1, le=100)
    """Attempts at a row that ends in a server error, a lost connection, a time-out or an unreadable answer while the
    service answers others; then the row is rejected."""
    patience: Annotated[float | int | str, AfterValidator(check_timeout)] = "10 min"
    """Longest time without any answer before the partition fails, and is retried. Calls that the service puts off
    (429) wait for so long, too."""
    prices: Prices | None = None
    """Prices, for the cost in receipts and reports, and for ``budget.cost``."""
    check: bool = True
    """Ask the service when the job is planned: whether it is there, and takes the key. false: only workers reach it."""

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            url: str,
            model: str,
            messages: str | Sequence[Message | Mapping[str, str]] | None = None,
            input: str | None = None,
            answer: Mapping[str, Any] | None = None,
            dimensions: int | None = None,
            temperature: float | None = None,
            max_tokens: int | None = None,
            seed: int | None = None,
            options: Mapping[str, Any] = ...,
            key: str | None = None,
            headers: Mapping[str, str] = ...,
            concurrency: int = 8,
            max_concurrency: int | None = None,
            requests_per_minute: float | None = None,
            tokens_per_minute: float | None = None,
            rows_per_request: int = 32,
            timeout: float | str = "60 s",
            attempts: int = 6,
            patience: float | str = "10 min",
            prices: Prices | Mapping[str, float] | None = None,
            check: bool = True,
        ) -> None: ...

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if (self.messages is None) == (self.input is None):
            raise spec_error(
                "has both messages and input" if self.messages is not None else "has neither messages nor input",
                expected="messages: for a chat, or input: for embeddings",
            )
        wrong = [
            name
            for name in (("dimensions",) if self.is_chat else ("answer", "temperature", "max_tokens", "seed"))
            if getattr(self, name) is not None
        ]
        if wrong:
            other = "messages" if self.is_chat else "input"
            raise spec_error(f"has {wrong[0]} beside {other}", next_step=f"remove {wrong[0]}")
        if not self.columns:
            raise spec_error(
                "sends the same text for each row",
                expected="{{column}} in messages or input, in place of a value of the row",
            )
        taken = {"model", "messages", "input", "stream", "n"} & set(self.options)
        if taken:
            raise spec_error(f"sets {min(taken)} in options", expected="further fields of the request")
        return self

    @property
    def is_chat(self) -> bool:
        """True for chat completions, False for embeddings."""
        return self.messages is not None

    @property
    def templates(self) -> tuple[str, ...]:
        """Texts with places of columns."""
        return (self.input or "",) if self.messages is None else tuple(message.content for message in self.messages)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the templates name, each once, in order."""
        return tuple(dict.fromkeys(name for text in self.templates for name in PLACE.findall(text)))

    @property
    def fields(self) -> dict[str, str]:
        """Arrow type of each field of a structured answer, by its name."""
        return {name: _arrow_name(kind) for name, kind in (self.answer or {}).items()}

    @property
    def schema_of_answer(self) -> dict[str, Any]:
        """JSON Schema of a structured answer."""
        properties = {name: _json_schema(kind) for name, kind in (self.answer or {}).items()}
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    @property
    def seconds(self) -> float:
        """``timeout`` in seconds."""
        return parse_seconds(self.timeout)

    @property
    def patience_seconds(self) -> float:
        """``patience`` in seconds."""
        return parse_seconds(self.patience)

    @property
    def rows_at_a_time(self) -> int:
        """Rows of a batch: a few requests for each that may be open."""
        return BATCH_WAVES * self.concurrency * (1 if self.is_chat else self.rows_per_request)

    @property
    def digest(self) -> str:
        """SHA-256 of the service and of everything that decides an answer."""
        return digest_json({"url": self.url.rstrip("/"), **self.model_dump(mode="json", include=WORK_FIELDS)})

    @property
    def reference(self) -> str:
        """Model reference of the endpoint; two with other fields have other references."""
        fields = digest_json(self.model_dump(mode="json", exclude_defaults=True))
        return f"endpoint:{self.model}@{fields[:12]}"

    def secrets(self) -> Iterator[tuple[str, str]]:
        """Yield name and value of each header, with references in place of secrets."""
        if self.key is not None:
            yield "Authorization", self.key
        yield from self.headers.items()


def _arrow_name(kind: Any) -> str:
    if isinstance(kind, str):
        return kind
    return _JSON_TYPES.get(str(kind.get("type")), "string") if isinstance(kind, dict) else "string"


def _json_schema(kind: Any) -> dict[str, Any]:
    if isinstance(kind, dict):
        return kind
    if isinstance(kind, str):
        return {"type": next(name for name, arrow in _JSON_TYPES.items() if arrow == kind)}
    return {"type": "string", "enum": list(kind)}
