"""List the sockets on which processes listen, as the kernel reports them, and check whether they need TLS."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_LISTEN = "0A"


def process_tree(pid: int) -> list[int]:
    """Return the process and all its descendants."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def listening_sockets(pids: Iterable[int]) -> list[tuple[str, int]]:
    """Return IP address and port of each TCP socket on which a process listens, from ``/proc/<pid>/net/tcp``."""
    found: set[tuple[str, int]] = set()
    for pid in pids:
        inodes = set()
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                inodes.add(os.readlink(link))
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and f"socket:[{fields[9]}]" in inodes:
                    found.add(_address(fields[1]))
    return sorted(found)


def _address(text: str) -> tuple[str, int]:
    """Parse an address: ``0100007F:1F90`` is 127.0.0.1, port 8080, as 4-byte words in the machine's byte order."""
    raw, port = text.split(":")
    words = [bytes.fromhex(raw[start : start + 8])[::-1] for start in range(0, len(raw), 8)]
    return str(ipaddress.ip_address(b"".join(words))), int(port, 16)


def speaks_plainly(host: str, port: int) -> bool:
    """Return True if the other end answers a plain-text request with anything but a TLS alert."""
    found = b""
    with socket.create_connection((host, port), timeout=30) as connection, suppress(ConnectionError):
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        while chunk := connection.recv(4096):
            found += chunk
    return bool(found) and not found.startswith(b"\x15")
