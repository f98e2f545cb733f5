"""The one filter against secrets in text for people."""

from __future__ import annotations

import io
import json
import logging
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.common import secrets as redaction
from pipeline.common.secrets import (
    MASK,
    mask_streams,
    masking_logs,
    redact,
    redact_error,
    redact_values,
    remember_secret,
    resolve_options,
    resolve_reference,
    written_secret,
)
from pipeline.errors import InputError, SpecError
from pipeline.execution.clusters.security import certificates_from
from pipeline.sources import read_ahead
from pipeline.spec.job_spec import JobSpec
from pipeline.storage.urls import options_for, own_storage_options, use_storage_options, with_storage_options

SENTINEL = "s3ntinel/9b1f+quo'te"


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    """A secret that this process knows because it resolved a reference to it."""
    monkeypatch.setattr(redaction, "_secrets", set())
    monkeypatch.setenv("LAKE", SENTINEL)
    return resolve_reference("env:LAKE", where="test")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("s3://me:hunter2@host/x", f"s3://me:{MASK}@host/x"),
        ("see postgresql://u:p%40ss@db:5432/x, then", f"see postgresql://u:{MASK}@db:5432/x, then"),
        ("http://:hunter2@proxy", f"http://:{MASK}@proxy"),
        ("AKIAIOSFODNN7EXAMPLE is the key", f"{MASK} is the key"),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG", f"aws_secret_access_key = {MASK}"),
        ("{'key': 'AK', 'secret': 'wJalrXUtn', 'x': 1}", f"{{'key': 'AK', 'secret': '{MASK}', 'x': 1}}"),
        ('{"session_token": "abc def", "n": 2}', f'{{"session_token": "{MASK}", "n": 2}}'),
        ("S3FileSystem(key=AK, secret='abcdef', token=qwerty)", f"S3FileSystem(key=AK, secret='{MASK}', token={MASK})"),
        ("Authorization: Bearer abc.def-ghi", f"Authorization: Bearer {MASK}"),
        ("password: correct-horse", f"password: {MASK}"),
        ("/lake/token=abcdef/day=1/a.parquet", f"/lake/token={MASK}/day=1/a.parquet"),
        ("s3://lake/my-api_key=abcdef/x/secret=ghijkl/y", f"s3://lake/my-api_key={MASK}/x/secret={MASK}/y"),
        ("PATH=/lake SECRET_KEY=wJalrXUtnFEMI/K7MDENG/bPx x", f"PATH=/lake SECRET_KEY={MASK} x"),
        ("--session-token=wJalr/XUtn", f"--session-token={MASK}"),
        ("https://b.s3/x?X-Amz-Credential=AK%2F1&X-Amz-Signature=ab12&y=1",
         f"https://b.s3/x?X-Amz-Credential={MASK}&X-Amz-Signature={MASK}&y=1"),
        ("https://a.blob/x?sv=1&sig=ab%3D", f"https://a.blob/x?sv=1&sig={MASK}"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJ", MASK),
        ("ghp_0123456789abcdefghijABCDEFGHIJ012345", MASK),
        ("-----BEGIN PRIVATE KEY-----\nMIIE\nxyz\n-----END PRIVATE KEY-----\nrest", f"{MASK}\nrest"),
    ],
)  # fmt: skip
def test_text_that_looks_like_a_secret_is_masked(text: str, masked: str) -> None:
    assert redact(text) == masked
    assert redact(masked) == masked, "masking twice changes nothing"


@pytest.mark.parametrize(
    "text",
    [
        "found unexpected token: 'x' at line 3",
        "the column n_tokens is float64, not int64",
        "secret: env:LAKE_SECRET",
        "storage: {'secret': 'file:/run/secrets/lake'}",
        "tcp://10.0.0.1:8786",
        "s3://me@bucket/x",
        "lake/country=AT/part-0.parquet, row 2,277: monthly_charges is inf",
        "tokens: 12 in all; password is a column",
        "file.py:12: KeyError: 'age'",
        "a https://host:8080/path and me@example.org",
        "/lake/token=abc/my-token=5/a.parquet",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


def test_resolved_reference_is_masked_in_any_spelling(secret: str) -> None:
    from urllib.parse import quote

    for written in (secret, repr(secret), json.dumps(secret), quote(secret, safe=""), f"x{secret}y"):
        assert "9b1f" not in redact(written), written


def test_values_of_variables_that_say_so_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "qwertzuiop")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/etc/google.json")
    assert redact("x qwertzuiop y") == f"x {MASK} y"
    assert redact("/etc/google.json is missing") == "/etc/google.json is missing"


def test_a_short_value_is_not_masked_in_every_word() -> None:
    remember_secret("on")
    assert redact("one on one") == "one on one"


def test_values_are_masked_inside_and_by_their_name(secret: str) -> None:
    value = {"a": [secret, ("x", secret)], "n": 1, "none": None, "password": "short", "token": "env:T"}
    found = redact_values(value)
    assert found == {"a": [MASK, ("x", MASK)], "n": 1, "none": None, "password": MASK, "token": "env:T"}
    assert value["password"] == "short"


class Stubborn(Exception):
    """Its text cannot be changed from outside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def __str__(self) -> str:
        return self._text


def test_errors_are_masked_with_what_they_came_from(secret: str) -> None:
    try:
        try:
            try:
                raise FileNotFoundError(2, f"no {secret}", f"/x/{secret}")
            except OSError as error:
                error.add_note(f"note {secret}")
                raise ValueError(f"bad {secret}", 3, {"k": secret}) from error
        except ValueError as error:
            raise InputError("bad", where=secret, found=f"x {secret}") from error
    except InputError as error:
        masked = redact_error(error)
    assert masked is error_of(masked, InputError)
    assert isinstance(masked, InputError)
    assert masked.place == secret, "for code; never shown"
    shown = [{**vars(error), "place": ""} for error in (masked, pickle.loads(pickle.dumps(masked)))]
    told = repr(masked) + str(masked) + repr(shown) + repr(masked.to_dict())
    cause = masked.__cause__
    assert isinstance(cause, ValueError)
    origin = cause.__cause__
    assert isinstance(origin, FileNotFoundError)
    told += repr(cause) + repr(origin) + str(origin) + repr(origin.__notes__)
    assert "9b1f" not in told
    assert MASK in told
    assert origin.errno == 2


def error_of(error: BaseException, kind: type[BaseException]) -> BaseException:
    assert isinstance(error, kind)
    return error


def test_an_error_whose_text_cannot_be_changed_becomes_another(secret: str) -> None:
    masked = redact_error(Stubborn(f"it was {secret}"))
    assert type(masked) is RuntimeError
    assert str(masked) == f"Stubborn: it was {MASK}"


def test_an_error_without_a_secret_is_left_alone() -> None:
    error = Stubborn("nothing here")
    assert redact_error(error) is error


def test_log_records_are_masked_for_handlers_of_others(secret: str) -> None:
    before = logging.getLogRecordFactory()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("somebody.else")
    logger.addHandler(handler)
    try:
        with masking_logs():
            logger.warning("plain %s and %r", secret, {"k": secret})
            try:
                raise ValueError(secret)
            except ValueError:
                logger.exception("with a traceback")
        logger.warning("count %d", 1)
    finally:
        logger.removeHandler(handler)
    text = stream.getvalue()
    assert "9b1f" not in text
    assert f"ValueError: {MASK}" in text
    assert "count 1" in text
    assert logging.getLogRecordFactory() is before


def test_prints_are_masked(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    mask_streams()
    mask_streams()
    print("it is", secret)
    assert out.getvalue() == f"it is {MASK}\n"


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
