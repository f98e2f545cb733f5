"""Where sockets may listen: on loopback, or with TLS, or because somebody said that they may be open."""

from __future__ import annotations

import ipaddress
from contextlib import suppress

from pipeline.errors import RefusedForSafety

LOOPBACK = "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``: an IP address, without a port. Of names, only localhost is known."""
    with suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def host_of(address: str) -> str:
    """The host in an address such as ``tcp://10.0.0.1:8786`` or ``127.0.0.1:8787``."""
    return address.rpartition("://")[2].rpartition(":")[0].strip("[]")


def check_dashboard(address: str) -> None:
    """Refuse a dashboard for the network. It shows code and data to whoever asks; it has neither passwords nor TLS.

    :raises RefusedForSafety: unless ``address`` is of this machine only.
    """
    if is_loopback(host_of(address)):
        return
    raise RefusedForSafety(
        "the dashboard would be open to the network",
        where="pipeline.dashboard",
        found=address,
        expected="an address of this machine only, such as 127.0.0.1:8787",
        next_step="keep it there, and look at it from elsewhere through: ssh -L 8787:127.0.0.1:8787 HOST",
    )


def open_network_refused(found: str, *, next_step: str) -> RefusedForSafety:
    """What to raise where scheduler and workers would listen on the network without TLS."""
    return RefusedForSafety(
        "scheduler and workers would be open to the network: whoever reaches them runs code as you",
        found=found,
        expected="TLS, or 127.0.0.1",
        next_step=f"{next_step}, or say --insecure-network",
    )
