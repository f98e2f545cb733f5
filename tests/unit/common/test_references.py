"""References to secrets, in certificates and in options of file systems."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.common import secrets as redaction
from pipeline.common.secrets import resolve_options, resolve_reference, written_secret
from pipeline.errors import SpecError
from pipeline.execution.clusters.security import certificates_from
from pipeline.sources import read_ahead
from pipeline.spec.job_spec import JobSpec
from pipeline.storage.urls import options_for, own_storage_options, use_storage_options, with_storage_options

SECRET = "correct-horse-battery"


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_secrets", set())


def test_a_variable_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text(SECRET + "\n")
    monkeypatch.setenv("LAKE", SECRET)
    assert resolve_reference("env:LAKE", where="x") == SECRET
    assert resolve_reference(f"file:{tmp_path / 'secret'}", where="x") == SECRET
    assert resolve_reference("plain", where="x") == "plain"
    assert resolve_reference("file:///data", where="x") == "file:///data", "a URL is no reference"
    assert redaction.redact(f"it is {SECRET}") == "it is [secret]"


@pytest.mark.parametrize("text", ["env:NOT_THERE", "env:EMPTY", "env:", "file:/not/there", "file:{empty}"])
def test_dangling_reference_is_refused_with_its_field(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMPTY", "")
    (tmp_path / "empty").touch()
    with pytest.raises(SpecError) as caught:
        resolve_reference(text.format(empty=tmp_path / "empty"), where="storage: s3://.secret")
    assert caught.value.where == "storage: s3://.secret"


def test_options_are_resolved_however_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAKE", SECRET)
    options = {"anon": False, "client_kwargs": {"password": "env:LAKE"}, "many": ["a", "env:LAKE"]}
    assert resolve_options(options, where="x") == {
        "anon": False,
        "client_kwargs": {"password": SECRET},
        "many": ["a", SECRET],
    }


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"secret": SECRET}, "secret"),
        ({"key": "AK"}, "key"),
        ({"client_kwargs": {"aws_session_token": "x"}}, "client_kwargs.aws_session_token"),
        ({"endpoint_url": f"https://me:{SECRET}@host"}, "endpoint_url"),
        ({"headers": ["Bearer abcdefghijkl"]}, "headers"),
        ({"secret": "env:LAKE", "token": "file:/run/x", "anon": False, "endpoint_url": "http://host:1"}, ""),
        ({"token": None, "key": ""}, ""),
    ],
)
def test_a_secret_that_is_written_out_is_found(options: dict[str, Any], found: str) -> None:
    assert written_secret(options) == found


def test_the_longest_beginning_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAKE", SECRET)
    use_storage_options({"s3://": {"anon": True}, "s3://lake": {"secret": "env:LAKE"}})
    assert options_for("s3://other/x") == {"anon": True}
    assert options_for("s3://lake/x") == options_for("s3://lake") == {"secret": SECRET}
    assert options_for("s3://lake-house/x") == {"anon": True}
    assert options_for("gs://lake/x") == {}
    use_storage_options({})
    assert options_for("s3://lake/x") == {}, "the next job has no options of the one before"


@pytest.mark.fault(85)
def test_two_jobs_side_by_side_have_their_own_options() -> None:
    seen: dict[str, list[Any]] = {"a": [], "b": []}
    barrier = threading.Barrier(2)

    def work(job: str) -> None:
        with own_storage_options():
            use_storage_options({"s3://lake": {"endpoint_url": job}})
            with ThreadPoolExecutor(1) as pool:
                for _ in range(20):
                    barrier.wait()
                    seen[job].append(options_for("s3://lake/x"))
                    seen[job].append(pool.submit(with_storage_options(options_for), "s3://lake/x").result())
        seen[job].append(options_for("s3://lake/x"))

    threads = [threading.Thread(target=work, args=(job,)) for job in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for job, options in seen.items():
        assert options == [{"endpoint_url": job}] * 40 + [{}]
    assert options_for("s3://lake/x") == {}


@pytest.mark.fault(85)
def test_reading_ahead_has_the_options_of_its_job() -> None:
    use_storage_options({"s3://lake": {"anon": True}})
    assert list(read_ahead(options_for(url) for url in ["s3://lake/x", "gs://x"])) == [{"anon": True}, {}]


def spec(**fields: Any) -> JobSpec:
    return JobSpec.build(
        name="a", source={"path": "s3://lake/x"}, steps=[{"score": {"model": "m.ubj"}}], sink={"path": "out"}, **fields
    )


def test_a_job_spec_holds_references_and_where_they_lead_is_not_its_work() -> None:
    made = spec(storage={"s3://lake": {"secret": "env:LAKE"}})
    assert made.digest == spec().digest
    assert JobSpec.load(made.to_yaml()) == made


@pytest.mark.fault(49)
def test_a_secret_in_a_job_spec_is_refused_and_not_repeated() -> None:
    with pytest.raises(SpecError) as caught:
        spec(storage={"s3://lake": {"secret": SECRET}})
    assert "env:NAME" in str(caught.value)
    assert "secret" in str(caught.value)
    assert SECRET not in str(caught.value) + repr(caught.value.to_dict())


def test_a_beginning_is_that_of_a_url() -> None:
    with pytest.raises(SpecError, match="not a URL prefix"):
        spec(storage={"lake": {"anon": True}})


def test_a_key_is_referred_to_and_not_written_out(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("x")
    key = "-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----\n"
    with pytest.raises(SpecError, match="reference") as caught:
        certificates_from(str(tmp_path / "ca.pem"), str(tmp_path / "ca.pem"), key, where="tls://host:1")
    assert "MIIE" not in str(caught.value)
    with pytest.raises(SpecError, match="certificate file not found"):
        certificates_from(str(tmp_path / "ca.pem"), str(tmp_path / "ca.pem"), "/not/there", where="tls://host:1")
