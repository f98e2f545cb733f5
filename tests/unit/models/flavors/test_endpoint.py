"""The flavor of services against a service on this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import EndpointUnavailable, ModelError
from pipeline.models.endpoint_model import resolve_endpoint
from pipeline.models.endpoints.calls import Calls, attempt_calls
from pipeline.models.flavors.endpoint import EndpointPredictor, load
from pipeline.models.model import ModelVersion
from pipeline.models.record import model_from_record, model_to_record
from pipeline.spec.endpoint import Endpoint
from pipeline.testing.fake_service import DIMENSIONS, KEY, MODEL, FakeService, Fault, embedding_of, fake_service


@pytest.fixture(autouse=True)
def service_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_KEY", KEY)


@pytest.fixture
def service() -> Iterator[FakeService]:
    with fake_service() as service:
        yield service


def version_of(service: FakeService, **fields: Any) -> ModelVersion:
    given = {"url": service.url, "model": MODEL, "key": "env:SERVICE_KEY", "timeout": "2 s", **fields}
    if "input" not in given:
        given.setdefault("messages", "{{text}}")
    return resolve_endpoint(Endpoint.model_validate(given, strict=False))


def predict(predictor: EndpointPredictor, texts: list[str | None]) -> np.ndarray:
    return predictor.predict(predictor.encode(pa.table({"renamed": texts})), kind="prediction")


def test_answers_in_the_order_of_the_rows(service: FakeService) -> None:
    service.seconds = 0.01
    predictor = load(version_of(service, prices={"input": 2.0, "output": 4.0}, concurrency=5))
    assert predict(predictor, [f"row {number}" for number in range(20)]).tolist() == [f"ROW {n}" for n in range(20)]
    assert 1 < service.most_open <= 5
    usage = predictor.take_usage()
    assert usage == {"calls": 20, "prompt_tokens": 40, "completion_tokens": 40, "cost": pytest.approx(240e-6)}
    assert predictor.take_usage() == {}


def test_the_version_is_stored_and_travels(service: FakeService) -> None:
    version = version_of(service, answer={"stars": "int64"})
    assert model_from_record(model_to_record(version)) == version
    assert KEY not in str(model_to_record(version))
    assert (version.feature_names, version.promise and version.promise.kind) == (("text",), "code")


def test_what_decides_an_answer_is_the_digest(service: FakeService) -> None:
    first = version_of(service)
    assert version_of(service, concurrency=1, requests_per_minute=5.0, prices={"input": 1.0}).digest == first.digest
    assert version_of(service, temperature=0.5).digest != first.digest
    assert version_of(service, messages="Say {{text}}").digest != first.digest


def test_refused_rows_are_named(service: FakeService) -> None:
    service.choose = lambda text, number: Fault(400, {"error": {"message": "bad"}}) if text == "b" else None
    predictor = load(version_of(service))
    scores = predict(predictor, ["a", "b", None, "c"])
    assert (scores[0], scores[3]) == ("A", "C")
    refused = predictor.take_refusals()
    assert {place: reason for place, (reason, _) in refused.items()} == {1: "BadRequest", 2: "MissingValue"}
    assert "text" in refused[2][1]
    assert predictor.take_refusals() == {}
    assert sum(service.asked.values()) == 3


def test_faults_that_pass(service: FakeService) -> None:
    faults = {
        "limit": Fault(429, headers={"Retry-After": "0.05"}),
        "broken": Fault(500),
        "dropped": Fault(drops=True),
        "garbage": Fault(200, raw=b'{"choices": [{'),
        "empty": Fault(200, {"choices": []}),
    }
    service.choose = lambda text, number: faults.get(text) if number == 1 else None
    predictor = load(version_of(service))
    assert predict(predictor, list(faults)).tolist() == [name.upper() for name in faults]
    assert set(service.asked.values()) == {2}
    assert predictor.take_usage()["failed_calls"] == len(faults)


def test_a_slow_answer_is_asked_for_again(service: FakeService) -> None:
    gate = threading.Event()
    service.choose = lambda text, number: gate.wait(5) and None if number == 1 else None  # type: ignore[func-returns-value]
    predictor = load(version_of(service, timeout=0.3))
    assert predict(predictor, ["a"]).tolist() == ["A"]
    gate.set()
    assert service.asked["a"] == 2


def test_structured_answers_have_types(service: FakeService) -> None:
    service.reply = lambda text: f'{{"mood": "good", "stars": {len(text)}}}' if text != "bad" else "no"
    predictor = load(version_of(service, answer={"mood": ["good", "bad"], "stars": "int64"}))
    output = predictor.version.output_types[0]
    assert output.columns("a") == pa.schema([("a_mood", pa.string()), ("a_stars", pa.int64())])
    scores = predict(predictor, ["abc", "bad", "abcd"])
    assert scores[[0, 2]].tolist() == [["good", 3], ["good", 4]]
    assert predictor.take_refusals()[1][0] == "InvalidAnswer"


def test_one_field_is_one_column(service: FakeService) -> None:
    service.reply = lambda text: '{"stars": 4}'
    predictor = load(version_of(service, answer={"stars": "int64"}))
    assert predict(predictor, ["x", "y"]).tolist() == [4, 4]


def test_embeddings(service: FakeService) -> None:
    service.choose = lambda text, number: Fault(400) if "bad" in text.split("\n") else None
    predictor = load(version_of(service, input="{{text}}", rows_per_request=4))
    assert predictor.version.output_types[0].width == DIMENSIONS
    texts = ["a", "b", "bad", "c", "d", "e"]
    vectors = predict(predictor, list(texts))
    good = [place for place, text in enumerate(texts) if text != "bad"]
    assert vectors[good].tolist() == [embedding_of(texts[place]) for place in good]
    assert list(predictor.take_refusals()) == [2]
    assert predictor.take_usage()["prompt_tokens"] == 5


@pytest.mark.parametrize("fields", [{}, {"input": "{{text}}"}])
def test_a_refused_key_is_found_by_planning(service: FakeService, fields: dict[str, Any]) -> None:
    service.key = "another"
    with pytest.raises(ModelError, match="refuses the key") as caught:
        version_of(service, **fields)
    assert KEY not in str(caught.value)
    version_of(service, check=False, dimensions=3 if fields else None, **fields)


def test_a_key_that_is_refused_while_rows_are_scored(service: FakeService) -> None:
    predictor = load(version_of(service, concurrency=2))
    service.key = "rotated"
    with pytest.raises(ModelError, match="refuses the key"):
        predict(predictor, [f"row {number}" for number in range(50)])
    assert not service.asked


def test_a_service_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.models.endpoint_model.PLAN_ATTEMPTS", 1)
    with fake_service() as gone:
        pass
    with pytest.raises(ModelError, match="cannot be reached"):
        version_of(gone)
    predictor = load(version_of(gone, check=False, patience=0.3))
    with pytest.raises(EndpointUnavailable, match="does not answer"):
        predict(predictor, ["a"])


def test_limits_are_shared(service: FakeService) -> None:
    predictor = load(version_of(service, max_concurrency=8, requests_per_minute=600.0, tokens_per_minute=1000.0))
    with attempt_calls(Calls(share=0.25)):
        predict(predictor, ["a"])
    limiter = predictor.client.limiter
    assert (limiter.concurrency, limiter.requests.per_minute, limiter.tokens.per_minute) == (2, 150.0, 250.0)


class Memory:
    """Answers that are kept in memory."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Any]] = {}

    def take(self, key: str) -> Any:
        found = self.answers.get(key)
        return found.pop() if found else None

    def keep(self, key: str, answer: Any) -> None:
        self.answers.setdefault(key, []).append(answer)

    def flush(self) -> None:
        pass


def test_answers_of_an_attempt_that_failed_are_not_paid_again(service: FakeService) -> None:
    kept, version = Memory(), version_of(service, prices={"input": 1.0}, concurrency=1)
    first = load(version)
    service.choose = lambda text, number: Fault(401) if text == "c" else None
    with attempt_calls(Calls(kept=kept)), pytest.raises(ModelError):
        predict(first, ["a", "b", "c"])
    service.choose = lambda text, number: None
    second, calls = load(version), Calls(kept=kept)
    with attempt_calls(calls):
        assert predict(second, ["a", "a", "b", "c"]).tolist() == ["A", "A", "B", "C"]
    # Equal prompts of two rows have answers of their own.
    assert service.answered == {"a": 2, "b": 1, "c": 1}
    assert second.take_usage()["reused_answers"] == 2
    assert calls.cost == pytest.approx(4e-6)


def test_other_endpoints_have_other_answers(service: FakeService) -> None:
    kept = Memory()
    for version in (version_of(service), version_of(service, temperature=1.0)):
        with attempt_calls(Calls(kept=kept)):
            predict(load(version), ["a"])
    assert service.asked["a"] == 2


def test_a_model_that_is_not_listed_is_named(service: FakeService, caplog: pytest.LogCaptureFixture) -> None:
    version_of(service, model="tiny-chap")
    assert "did you mean tiny-chat" in caplog.text


def test_limits_decide_who_shares_a_predictor(service: FakeService) -> None:
    version = version_of(service)
    assert replace(version, endpoint=version_of(service, concurrency=1).endpoint).key != version.key
