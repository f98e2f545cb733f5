"""Where sockets may listen: on loopback, or with TLS, or because somebody said that they may be open.

TLS for one run of a job: an authority of its own, and one certificate that driver, scheduler and workers show.

Only who holds the key can connect, in either direction: Dask asks both ends for a certificate of that authority. The
authority's own key is never written and is forgotten at once, so that nobody can make a second certificate.
"""

from __future__ import annotations

import ipaddress
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from distributed import Security

from pipeline.common.secrets import resolve_reference
from pipeline.errors import RefusedForSafety, SpecError
from pipeline.jobs import layout
from pipeline.storage.local import LocalStore
from pipeline.storage.urls import is_local_path, local_path, unique_name

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


DAYS = 365
SKEW = timedelta(days=1)
"""How far the clocks of two machines may be apart."""


@dataclass(frozen=True)
class Certificates:
    """Three PEM files, or what is in them."""

    ca: str
    """Certificate of the authority."""
    cert: str
    key: str

    def security(self) -> Security:
        """What Dask takes; it refuses every connection without TLS."""
        roles = ("client", "scheduler", "worker")
        return Security(
            require_encryption=True,
            tls_ca_file=self.ca,
            **{f"tls_{role}_cert": self.cert for role in roles},
            **{f"tls_{role}_key": self.key for role in roles},
        )


@contextmanager
def certificates_in(directory: str) -> Iterator[Certificates]:
    """Certificates in files that only this user can read; gone on leaving, as are those that a killed run left.

    :param directory: job directory whose driver is the only one. Empty, or on an object store: a temporary folder of
        this machine.
    :raises RefusedForSafety: when the package that makes them is not installed.
    """
    contents = make_certificates(now=datetime.now(UTC))
    if directory and is_local_path(directory):
        root = local_path(directory) / layout.CERTIFICATES
        shutil.rmtree(root, ignore_errors=True)
    else:
        root = Path(tempfile.mkdtemp(prefix="pipeline-tls-"))
    store = LocalStore(root / unique_name(), private=True)
    try:
        yield Certificates(**{part: _write(store, f"{part}.pem", text) for part, text in vars(contents).items()})
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _write(store: LocalStore, name: str, text: str) -> str:
    store.put_if_absent(name, text.encode())
    return store.url(name)


def make_certificates(*, now: datetime) -> Certificates:
    """A new authority and a certificate of it, as PEM texts.

    :raises RefusedForSafety: when the package ``cryptography`` is not installed.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError as error:
        raise open_network_refused(
            "no package to make certificates with (cryptography)", next_step='pip install ".[tls]"'
        ) from error

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def builder(subject: str, public: Any) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("pipeline-job-ca"))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - SKEW)
            .not_valid_after(now + timedelta(days=DAYS))
        )

    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = builder("pipeline-job-ca", authority.public_key()).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    both_ends = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    cert = builder("pipeline-job", key.public_key()).add_extension(both_ends, critical=False)
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Certificates(
        ca=ca.sign(authority, hashes.SHA256()).public_bytes(pem).decode(),
        cert=cert.sign(authority, hashes.SHA256()).public_bytes(pem).decode(),
        key=private.decode(),
    )


def certificates_from(ca: str | None, cert: str | None, key: str | None, *, where: str) -> Certificates | None:
    """Certificates that somebody else made: each a path, or a reference ``file:PATH`` or ``env:NAME`` (a path in it, or
    the PEM text itself). None when none is named.

    :raises SpecError: when some are named and others not, or one is not there.
    """
    named = {"ca": ca, "cert": cert, "key": key}
    if not any(named.values()):
        return None
    missing = [part for part, text in named.items() if not text]
    if missing:
        raise SpecError(
            "certificates are incomplete", where=where, found=f"no {', no '.join(missing)}", expected="ca, cert and key"
        )
    return Certificates(**{part: _readable(str(text), where=f"{where}: {part}") for part, text in named.items()})


def _readable(text: str, *, where: str) -> str:
    if "\n" in text:
        raise SpecError(
            "a certificate or key is written out where a reference belongs",
            where=where,
            expected="a path, file:PATH or env:NAME",
            next_step="put it into a file that only you can read",
        )
    found = resolve_reference(text, where=where)
    if "\n" in found:
        return found
    path = local_path(found)
    if not path.is_file():
        raise SpecError("there is no such certificate file", where=where, found=str(path))
    return str(path)
