"""A real S3 API on a loopback port, for tests: moto's server, made as atomic as S3 is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SECRET = "sentinel-9b1f-secret-access-key"
"""The only secret there is. It must turn up nowhere."""
REGION = "us-east-1"


@dataclass(frozen=True)
class S3:
    """A running server with one bucket."""

    endpoint: str
    """``http://127.0.0.1:<port>``."""
    bucket: str
    ignored: set[str]
    """Request headers the server pretends not to know, in WSGI's spelling; tests add to it."""

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to reach the server: nothing of it is written to a job spec."""
        return {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "FSSPEC_S3_ENDPOINT_URL": self.endpoint,
        }

    def url(self, path: str) -> str:
        """``s3://`` URL of a key or prefix."""
        return f"s3://{self.bucket}/{path}"

    def client(self) -> Any:
        """A client that owes nothing to fsspec."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id="testing",
            aws_secret_access_key=SECRET,
        )

    def names(self, prefix: str = "") -> list[str]:
        """All keys that begin with ``prefix``, sorted."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", ()))

    def pending_uploads(self) -> list[str]:
        """Keys of multipart uploads that were begun and neither completed nor aborted: they cost money for ever."""
        found = self.client().list_multipart_uploads(Bucket=self.bucket).get("Uploads", ())
        return [upload["Key"] for upload in found]


@contextmanager
def serve_s3(bucket: str = "test-bucket") -> Iterator[S3]:
    """Run a server on a free port of 127.0.0.1.

    :raises ImportError: when moto's server is not installed.
    """
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, type: str, message: str, *args: Any) -> None:
            """Say nothing."""

    ignored: set[str] = set()
    application = _one_at_a_time(DomainDispatcherApplication(create_backend_app), ignored)
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, name="s3", daemon=True)
    thread.start()
    try:
        running = S3(f"http://127.0.0.1:{server.server_port}", bucket, ignored)
        running.client().create_bucket(Bucket=bucket)
        yield running
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _one_at_a_time(application: Any, ignored: set[str]) -> Callable[[dict[str, Any], Any], Iterable[bytes]]:
    """moto checks a condition, then writes, so that two requests could both pass; S3 does it in one step."""
    lock = threading.Lock()

    def serialised(environment: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        for name in ignored:
            environment.pop(name, None)
        with lock:
            return list(application(environment, start_response))

    return serialised
