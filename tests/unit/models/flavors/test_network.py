"""The first load of a model file has no network."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import ModelError
from pipeline.models.registry import resolve
from pipeline.spec.model_ref import ModelRef


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """Return a socket that listens on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        yield listening


def has_visitor(server: socket.socket) -> bool:
    try:
        server.accept()[0].close()
    except TimeoutError:
        return False
    return True


CODE = """
import socket, sys
from pipeline.models.flavors import network
if sys.argv[2] == "guard":
    network._unshare = lambda: False
print(network.cut_network())
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=5)
except OSError as error:
    print("refused")
one, other = socket.socketpair()
one.sendall(b"x")
print(other.recv(1))
"""


@pytest.mark.parametrize("way", ["any", "guard"])
def test_connections_are_refused(server: socket.socket, way: str) -> None:
    port = str(server.getsockname()[1])
    child = subprocess.run([sys.executable, "-c", CODE, port, way], capture_output=True, text=True, check=True)
    found, *others = child.stdout.splitlines()
    assert found in (("guard",) if way == "guard" else ("guard", "namespace"))
    assert others == ["refused", "b'x'"]
    assert not has_visitor(server)


class Caller:
    """An object that connects when it is unpickled."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __reduce__(self) -> tuple[object, ...]:
        return socket.create_connection, (("127.0.0.1", self.port), 5)


def test_pickle_reaches_nobody(server: socket.socket, tmp_path: Path) -> None:
    import pickle

    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(Caller(server.getsockname()[1])))
    with pytest.raises(ModelError):
        resolve(ModelRef(str(path)), allow_code=True)
    assert not has_visitor(server)
