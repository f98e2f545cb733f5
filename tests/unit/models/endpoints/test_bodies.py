"""Bodies of requests and answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.models.endpoints.bodies import (
    Answer,
    Refusal,
    Usage,
    estimated_tokens,
    prompt_of,
    read_chat,
    read_embeddings,
    request_body,
    unpack_vector,
)
from pipeline.spec.endpoint import Endpoint, Message, Prices

URL = "http://localhost:8000/v1"
CHAT = Endpoint(
    url=URL, model="m", messages=(Message(role="system", content="Be short."), Message(content="{{ a }}/{{b}}"))
)
ANSWER = {"mood": ["good", "bad"], "stars": "int64", "share": "float64", "sure": "bool", "tags": {"type": "array"}}
TYPED = Endpoint(url=URL, model="m", messages="{{a}}", answer=ANSWER)
EMBED = Endpoint(url=URL, model="m", input="{{a}}", dimensions=2)


def chat_body(content: Any, *, end: str = "stop", **message: Any) -> dict[str, Any]:
    return {
        "choices": [{"finish_reason": end, "message": {"content": content, **message}}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
    }


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"a": "x", "b": "{{a}}"}, "x/{{a}}"),
        ({"a": 1, "b": 2.5}, "1/2.5"),
        ({"a": True, "b": ["ü", 1]}, 'true/["ü", 1]'),
    ],
)
def test_values_in_a_prompt(values: dict[str, Any], text: str) -> None:
    messages = json.loads(prompt_of(CHAT, values))
    assert [message["content"] for message in messages] == ["Be short.", text]


def test_body_of_a_chat() -> None:
    spec = CHAT.model_copy(update={"temperature": 0.0, "max_tokens": 5, "seed": 1, "options": {"top_p": 0.5}})
    body = request_body(spec, [prompt_of(spec, {"a": 1, "b": 2})])
    assert body.pop("messages")[1] == {"role": "user", "content": "1/2"}
    assert body == {"model": "m", "top_p": 0.5, "temperature": 0.0, "max_tokens": 5, "seed": 1}


def test_schema_of_a_structured_answer() -> None:
    schema = request_body(TYPED, [prompt_of(TYPED, {"a": 1})])["response_format"]["json_schema"]
    assert schema["strict"] is True
    assert schema["schema"]["properties"]["mood"] == {"type": "string", "enum": ["good", "bad"]}
    assert schema["schema"]["required"] == list(ANSWER)
    assert TYPED.fields == {"mood": "string", "stars": "int64", "share": "float64", "sure": "bool", "tags": "string"}


def test_text_of_an_answer() -> None:
    answer = read_chat(CHAT, chat_body("hi"))
    assert answer == Answer("hi", Usage(10, 4, 2))
    assert Answer.from_json(json.loads(json.dumps(answer.to_json()))) == answer


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ('{"mood":"bad","stars":3.0,"share":1,"sure":false,"tags":["a"]}', ["bad", 3, 1.0, False, '["a"]']),
        ('```json\n{"mood":"good","stars":1,"share":0.5,"sure":true,"tags":[]}\n```', ["good", 1, 0.5, True, "[]"]),
    ],
)
def test_fields_of_an_answer(content: str, values: list[Any]) -> None:
    assert read_chat(TYPED, chat_body(content)).value == values  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (chat_body("{}"), "InvalidAnswer"),
        (chat_body("hello"), "InvalidAnswer"),
        (chat_body("[1]"), "InvalidAnswer"),
        (chat_body('{"mood":"odd","stars":1,"share":1,"sure":true,"tags":[]}'), "InvalidAnswer"),
        (chat_body('{"mood":"bad","stars":1.5,"share":1,"sure":true,"tags":[]}'), "InvalidAnswer"),
        (chat_body('{"mood":"bad","stars":true,"share":1,"sure":true,"tags":[]}'), "InvalidAnswer"),
        (chat_body('{"mood":"bad", "sta', end="length"), "Truncated"),
        (chat_body(None), "NoAnswer"),
        (chat_body(None, refusal="I cannot"), "ContentFilter"),
        (chat_body("x", end="content_filter"), "ContentFilter"),
    ],
)
def test_answers_that_are_rejects(body: dict[str, Any], reason: str) -> None:
    found = read_chat(TYPED, body)
    assert isinstance(found, Refusal)
    assert found.reason == reason
    assert found.usage.prompt_tokens == 10  # paid all the same


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": [1]}, {"choices": [{"message": None}]}])
def test_a_body_that_is_no_chat(body: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="choices"):
        read_chat(CHAT, body)


def test_embeddings_by_their_places() -> None:
    data = [{"index": 1, "embedding": [3, 4]}, {"index": 0, "embedding": [1, 2]}]
    found = read_embeddings({"data": data, "usage": {"prompt_tokens": 6}}, rows=2, width=2)
    assert [unpack_vector(one.value).tolist() for one in found] == [[1, 2], [3, 4]]
    assert [one.usage.prompt_tokens for one in found] == [3, 3]


@pytest.mark.parametrize(
    "data",
    [
        None,
        [{"index": 0, "embedding": [1, 2]}],
        [{"index": 0, "embedding": [1, 2]}, {"index": 0, "embedding": [1, 2]}],
        [{"index": 0, "embedding": [1, 2]}, {"index": 1, "embedding": [1, 2, 3]}],
        [{"index": 0, "embedding": [1, 2]}, {"index": 1, "embedding": [1, float("nan")]}],
        [{"index": 0, "embedding": [1, 2]}, {"index": 1, "embedding": "xy"}],
        [{"index": 0, "embedding": [1, 2]}, 5],
    ],
)
def test_embeddings_that_cannot_be_read(data: Any) -> None:
    with pytest.raises(ValueError, match="embedding"):
        read_embeddings({"data": data}, rows=2, width=2)


def test_cost_of_tokens() -> None:
    usage = Usage(1_000_000, 400_000, 100_000)
    assert usage.cost(None) == 0
    assert usage.cost(Prices(input=1.0, output=10.0)) == pytest.approx(2.0)
    assert usage.cost(Prices(input=1.0, output=10.0, cached=0.5)) == pytest.approx(1.8)


def test_estimate_of_tokens() -> None:
    assert estimated_tokens(EMBED, ["x" * 40]) == 10
    assert estimated_tokens(CHAT, ["x" * 40]) == 10 + 256
    assert estimated_tokens(CHAT, ["x" * 40], answer_tokens=5) == 15
