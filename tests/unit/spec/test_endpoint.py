"""Endpoints of a job spec."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import SpecError
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.model_ref import ModelRef

CHAT = {"url": "http://localhost:8000/v1", "model": "org/m", "messages": "Sum up: {{text}}"}
EMBED = {"url": "http://localhost:8000/v1", "model": "m", "input": "{{text}}"}


def spec_of(endpoint: dict[str, Any], *before: Any, **score: Any) -> JobSpec:
    return JobSpec.build(
        name="j",
        source={"path": "in/"},
        steps=[*before, {"score": {"endpoint": endpoint, **score}}],
        sink={"path": "out/"},
    )


def test_a_chat_and_its_columns() -> None:
    messages = [{"role": "system", "content": "About {{ topic }}."}, {"content": "{{text}} {{topic}}"}]
    endpoint = spec_of({**CHAT, "messages": messages}).score.endpoint
    assert endpoint is not None
    assert (endpoint.is_chat, endpoint.columns) == (True, ("topic", "text"))


def test_it_survives_yaml() -> None:
    spec = spec_of({**CHAT, "answer": {"mood": ["good", "bad"]}, "key": "env:A_KEY", "prices": {"input": 0.5}})
    assert JobSpec.load(spec.to_yaml()) == spec


def test_its_reference_is_no_file_and_no_code() -> None:
    (reference,) = spec_of({**CHAT, "model": "m"}).references
    ref = ModelRef.parse(reference)
    assert (ref.is_endpoint, ref.is_file, ref.is_code, ref.alias) == (True, False, False, "")
    assert spec_of({**CHAT, "model": "m", "concurrency": 2}).references != (reference,)


@pytest.mark.parametrize(
    ("changes", "score", "words"),
    [
        ({"input": "{{a}}"}, {}, "both messages and input"),
        ({"messages": None}, {}, "neither messages nor input"),
        ({"messages": "the same"}, {}, "the same text for each row"),
        ({"dimensions": 3}, {}, "dimensions beside messages"),
        ({"messages": None, "input": "{{a}}", "temperature": 0.0}, {}, "temperature beside input"),
        ({"url": "localhost:8000"}, {}, "not the URL of a service"),
        ({"url": "http://me:password@host/v1"}, {}, "contains a secret"),
        ({"url": "http://host/v1/chat/completions"}, {}, "one of the service's operations"),
        ({"key": "sk-0123456789abcdef0123"}, {}, "contains a secret"),
        ({"headers": {"api-key": "0123456789"}}, {}, "contains a secret in api-key"),
        ({"answer": {"a": "decimal"}}, {}, "no type for a"),
        ({"answer": {"a": []}}, {}, "no type for a"),
        ({"options": {"stream": True}}, {}, "sets stream in options"),
        ({"timeout": "0 s"}, {}, "too short"),
        ({}, {"model": "m.ubj"}, "both endpoint and model"),
        ({}, {"features": ["text"]}, "both endpoint and features"),
        ({}, {"engine": "trees"}, "both endpoint and engine"),
        ({}, {"shadow": "x"}, "both endpoint and shadow"),
        ({}, {"output": {"column": "a", "kind": "margin"}}, "the output margin"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], score: dict[str, Any], words: str) -> None:
    endpoint = {name: value for name, value in {**CHAT, **changes}.items() if value is not None}
    with pytest.raises(SpecError) as caught:
        spec_of(endpoint, **score)
    assert words in str(caught.value)
    assert "0123456789" not in str(caught.value)
    assert "password@" not in str(caught.value)


def test_time_limits_of_steps_are_refused_in_its_stage() -> None:
    step = {"map": "features:build", "timeout": "5 s"}
    with pytest.raises(SpecError, match="time limit"):
        spec_of(CHAT, step)
    spec_of(CHAT, step, {"checkpoint": True})


def test_rows_of_a_batch() -> None:
    chat, embed = spec_of({**CHAT, "concurrency": 3}), spec_of({**EMBED, "concurrency": 3, "rows_per_request": 10})
    assert [one.score.endpoint.rows_at_a_time for one in (chat, embed) if one.score.endpoint] == [12, 120]
