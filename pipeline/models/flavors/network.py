"""Cut off the network of a process that loads a model file nobody has checked yet."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from contextlib import suppress
from typing import Any, Literal

_NEW_NETWORK, _NEW_USER = 0x40000000, 0x10000000
"""CLONE_NEWNET and CLONE_NEWUSER of unshare(2)."""
_GUARDED = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")


def cut_network() -> Literal["namespace", "guard"]:
    """Leave the network for good. Files, pipes and sockets that are open already stay.

    :returns: ``namespace``: this process is in a network of its own, without any interface (Linux, where a namespace
        may be made). ``guard``: Python's sockets refuse to connect; code of another language could still do so.
    """
    if sys.platform.startswith("linux") and _unshare():
        return "namespace"
    sys.addaudithook(_refuse)
    return "guard"


def _unshare() -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if not libc.unshare(_NEW_NETWORK):
        return True
    # Without privileges, a namespace of users is needed beside it; in a process with threads there is none.
    if libc.unshare(_NEW_USER | _NEW_NETWORK):
        return False
    with suppress(OSError):
        # Without these maps, files would belong to nobody by their numbers; access to them is the same.
        for name, text in (("uid_map", f"{user} {user} 1"), ("setgroups", "deny"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    return True


def _refuse(event: str, given: tuple[Any, ...]) -> None:
    """Raise for an event of a socket that is not local to this machine's files. To be called as an audit hook."""
    if event not in _GUARDED:
        return
    if given and isinstance(given[0], socket.socket) and given[0].family == getattr(socket, "AF_UNIX", None):
        return
    raise PermissionError("the first load of a model has no network")
