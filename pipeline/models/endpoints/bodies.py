"""Make the bodies of requests, and read results from the bodies of answers. Pure functions."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.common.digest import digest_bytes
from pipeline.spec.endpoint import PLACE, Endpoint, Prices

CHARACTERS_PER_TOKEN = 4
"""For estimates before a request; the answer tells the tokens."""
ANSWER_TOKENS = 256
"""Estimated tokens of an answer before the first one, without ``max_tokens``."""
MOST_SHOWN = 160
"""Characters of a service's text in a message."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one or several requests."""

    prompt_tokens: float = 0.0
    cached_tokens: float = 0.0
    """Part of ``prompt_tokens`` that the service had cached."""
    completion_tokens: float = 0.0

    @property
    def tokens(self) -> float:
        """All tokens."""
        return self.prompt_tokens + self.completion_tokens

    def cost(self, prices: Prices | None) -> float:
        """Return the cost of the tokens; 0 without prices."""
        if prices is None:
            return 0.0
        cached = prices.input if prices.cached is None else prices.cached
        fresh = self.prompt_tokens - self.cached_tokens
        return (fresh * prices.input + self.cached_tokens * cached + self.completion_tokens * prices.output) / 1e6

    def divided(self, rows: int) -> Usage:
        """Return the share of one of ``rows`` rows."""
        return Usage(self.prompt_tokens / rows, self.cached_tokens / rows, self.completion_tokens / rows)

    @staticmethod
    def from_body(body: Mapping[str, Any]) -> Usage:
        """Return what the body of an answer says; zeros where it says nothing."""
        usage = body.get("usage")
        usage = usage if isinstance(usage, Mapping) else {}
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, Mapping) else 0
        return Usage(_number(usage.get("prompt_tokens")), _number(cached), _number(usage.get("completion_tokens")))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row without a result."""

    reason: str
    """Short and stable: ``BadRequest``, ``ContentFilter``, ``ContextLength``, ``InvalidAnswer``, ``Truncated``,
    ``NoAnswer``, ``ServerError``, ``Timeout``, ``ConnectionLost``, ``MissingValue``."""
    message: str
    usage: Usage = Usage()
    """Tokens that were paid all the same."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a row, as it is kept."""

    value: Any
    """Text, the fields of a structured answer as a list, or float32 [dimensions] as base64."""
    usage: Usage

    def to_json(self) -> dict[str, Any]:
        """Return the answer for JSON."""
        usage = self.usage
        return {"value": self.value, "usage": [usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens]}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Answer:
        """Inverse of `to_json`."""
        return Answer(record["value"], Usage(*record["usage"]))


def render(template: str, row: Mapping[str, Any]) -> str:
    """Return a template with the values of a row in place of ``{{column}}``."""
    return PLACE.sub(lambda match: value_text(row[match[1]]), template)


def value_text(value: Any) -> str:
    """Return a value as a prompt has it: texts as they are, lists and structs as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else str(value)


def prompt_of(endpoint: Endpoint, row: Mapping[str, Any]) -> str:
    """Return the prompt of a row as a text: that of an embedding, or the messages as JSON."""
    if endpoint.messages is None:
        return render(endpoint.input or "", row)
    messages = [{"role": one.role, "content": render(one.content, row)} for one in endpoint.messages]
    return json.dumps(messages, ensure_ascii=False)


def prompt_key(model: str, prompt: str) -> str:
    """Return the name under which the answer of a model to a prompt is kept.

    :param model: its digest.
    """
    return digest_bytes(f"{model}\n{prompt}".encode("utf-8", "surrogatepass"))[:32]


def request_body(endpoint: Endpoint, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the body of a request: one chat, or several texts to embed."""
    body: dict[str, Any] = {"model": endpoint.model, **endpoint.options}
    if not endpoint.is_chat:
        body |= {"input": list(prompts), "encoding_format": "float"}
        return body | ({} if endpoint.dimensions is None else {"dimensions": endpoint.dimensions})
    body["messages"] = json.loads(prompts[0])
    for name in ("temperature", "max_tokens", "seed"):
        if (value := getattr(endpoint, name)) is not None:
            body[name] = value
    if endpoint.answer is not None:
        schema = {"name": "answer", "strict": True, "schema": endpoint.schema_of_answer}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def estimated_tokens(endpoint: Endpoint, prompts: Sequence[str], *, answer_tokens: float | None = None) -> float:
    """Return the tokens that a request will take, roughly.

    :param answer_tokens: mean tokens of the answers so far; None: none yet.
    """
    sent = sum(map(len, prompts)) / CHARACTERS_PER_TOKEN
    if not endpoint.is_chat:
        return sent
    return sent + (answer_tokens or endpoint.max_tokens or ANSWER_TOKENS)


def read_chat(endpoint: Endpoint, body: Mapping[str, Any]) -> Answer | Refusal:
    """Return the result in the body of a chat completion.

    :raises ValueError: if the body is no chat completion.
    """
    usage = Usage.from_body(body)
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(choice, Mapping) or not isinstance(message, Mapping):
        raise ValueError("no choices[0].message")
    end, text = choice.get("finish_reason"), message.get("content")
    if message.get("refusal"):
        return Refusal("ContentFilter", f"the model refuses: {shown(str(message['refusal']))}", usage)
    if end == "content_filter":
        return Refusal("ContentFilter", "the service's content filter cut the answer", usage)
    if not isinstance(text, str):
        return Refusal("NoAnswer", f"the answer has no text; finish_reason {end}", usage)
    if endpoint.answer is None:
        return Answer(text, usage)
    try:
        return Answer(_read_fields(endpoint, text), usage)
    except ValueError as error:
        if end == "length":
            message_text = "the answer ends at max_tokens, and is no whole JSON"
            return Refusal("Truncated", message_text, usage)
        return Refusal("InvalidAnswer", f"{error}: {shown(text)}", usage)


def _read_fields(endpoint: Endpoint, text: str) -> list[Any]:
    """Return the fields of a structured answer.

    :raises ValueError: if it is not of the schema.
    """
    try:
        found = json.loads(_without_fence(text))
    except (ValueError, RecursionError) as error:
        raise ValueError("the answer is no JSON") from error
    if not isinstance(found, dict):
        raise ValueError("the answer is no JSON object")
    values = []
    for name, kind in (endpoint.answer or {}).items():
        if name not in found:
            raise ValueError(f"the answer has no field {name!r}")
        values.append(_field_value(name, found[name], kind, endpoint.fields[name]))
    return values


def _field_value(name: str, value: Any, kind: Any, arrow: str) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(kind, dict) and kind.get("type") not in ("string", "integer", "number", "boolean"):
        return json.dumps(value, ensure_ascii=False)
    if arrow == "float64" and is_number:
        return float(value)
    if arrow == "int64" and is_number and float(value).is_integer() and abs(value) < 1 << 63:
        return int(value)
    if arrow == "bool" and isinstance(value, bool):
        return value
    if arrow == "string" and isinstance(value, str):
        choices = kind.get("enum") if isinstance(kind, dict) else kind
        if isinstance(choices, list) and value not in choices:
            raise ValueError(f"{name} is none of {', '.join(map(str, choices))}")
        return value
    raise ValueError(f"{name} is no {arrow}")


def _without_fence(text: str) -> str:
    """Return ``text`` without the marks of a code block around it, which some models write."""
    text = text.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        return text[text.index("\n") + 1 : -3]
    return text


def read_embeddings(body: Mapping[str, Any], *, rows: int, width: int | None) -> list[Answer]:
    """Return the embeddings in the body of an answer, in the order of the texts.

    :param width: numbers of each; None: any.
    :raises ValueError: if there is not one of the width for each text.
    """
    data = body.get("data")
    if not isinstance(data, list) or len(data) != rows:
        raise ValueError(f"{len(data) if isinstance(data, list) else 'no'} embeddings of {rows} texts")
    usage = Usage.from_body(body).divided(rows)
    ordered: list[Any] = [None] * rows
    for place, one in enumerate(data):
        index = one.get("index", place) if isinstance(one, Mapping) else -1
        if not isinstance(index, int) or not 0 <= index < rows or ordered[index] is not None:
            raise ValueError("embeddings without their places")
        ordered[index] = one.get("embedding")
    return [Answer(pack_vector(vector, width=width), usage) for vector in ordered]


def pack_vector(vector: Any, *, width: int | None) -> str:
    """Return float32 values as base64.

    :raises ValueError: for anything but ``width`` numbers.
    """
    try:
        values = np.asarray(vector, dtype="<f4")
    except (TypeError, ValueError) as error:
        raise ValueError("an embedding that is no list of numbers") from error
    if values.ndim != 1 or not len(values) or (width is not None and len(values) != width):
        raise ValueError(f"an embedding of {values.size} numbers, not {width}")
    if not np.isfinite(values).all():
        raise ValueError("an embedding with numbers that are not finite")
    return base64.b64encode(values.tobytes()).decode()


def unpack_vector(text: str) -> np.ndarray:
    """Inverse of `pack_vector`: float32 [dimensions]."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


def shown(text: str) -> str:
    """Return a service's text as a message shows it."""
    text = " ".join(text.split())
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"
