"""A real Postgres server on loopback, with a data directory of its own. Debian's package ``postgresql`` has it."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.testing.processes import wait_until

_USER = "postgres"
"""User that runs the server where the caller is root, whom Postgres refuses."""


def find_postgres() -> Path | None:
    """Return the folder with ``initdb`` and ``postgres``; None if Postgres is not installed."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("initdb")
    folders += [Path(found).parent] if found else []
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


@contextmanager
def serve_postgres() -> Iterator[str]:
    """Run a server, and yield the URL of its database. Nothing survives a power cut: it does not sync.

    :raises FileNotFoundError: if Postgres is not installed.
    """
    binaries = find_postgres()
    if binaries is None:
        raise FileNotFoundError("Postgres is not installed: apt-get install postgresql")
    user = _USER if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="pipeline-postgres-", dir="/tmp"))  # sockets need short paths
    try:
        if user is not None:
            os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
        data, port = folder / "data", _free_port()
        options = ["-A", "trust", "-U", "tester", "--no-sync", "-E", "UTF8", "--locale", "C"]
        make: list[str] = [str(binaries / "initdb"), "-D", str(data), *options]
        subprocess.run(make, user=user, check=True, capture_output=True, cwd="/")
        address = ["-h", "127.0.0.1", "-p", str(port), "-k", str(folder)]
        command = [str(binaries / "postgres"), "-D", str(data), *address, "-F"]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(command, user=user, stdout=log, stderr=log, cwd="/")
        try:
            ready = [str(binaries / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
            wait_until(lambda: subprocess.run(ready, check=False).returncode == 0, what="a Postgres server")
            yield f"postgresql://tester@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
