"""Network security of clusters: sockets listen on loopback, or with TLS, or with ``--insecure-network``.

Each run of a job has its own certificate authority, and one certificate for driver, scheduler and workers. Dask checks
the certificate of both ends, so only holders of the key can connect. The key of the authority is never written, so
no second certificate can be made.
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
from typing import TYPE_CHECKING, Any

from pipeline.common.secrets import resolve_reference
from pipeline.errors import RefusedForSafety, SpecError
from pipeline.jobs import layout
from pipeline.storage.local import LocalStore
from pipeline.storage.urls import is_local_path, local_path, unique_name

if TYPE_CHECKING:
    from distributed import Security

LOOPBACK = "127.0.0.1"


def is_loopback(host: str) -> bool:
    """True if ``host`` is an IP address that only this machine reaches, or ``localhost``."""
    with suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def host_of(address: str) -> str:
    """Return the host of an address such as ``tcp://10.0.0.1:8786`` or ``127.0.0.1:8787``."""
    return address.rpartition("://")[2].rpartition(":")[0].strip("[]")


def check_dashboard(address: str) -> None:
    """Refuse a dashboard on the network: a dashboard shows code and data, without passwords or TLS.

    :raises RefusedForSafety: unless ``address`` is a loopback address.
    """
    if is_loopback(host_of(address)):
        return
    raise RefusedForSafety(
        "the dashboard would be open to the network",
        where="pipeline.dashboard",
        found=address,
        expected="an address of this machine only, such as 127.0.0.1:8787",
        next_step="keep it there, and open it from another machine with: ssh -L 8787:127.0.0.1:8787 HOST",
    )


def open_network_refused(found: str, *, next_step: str) -> RefusedForSafety:
    """Return the error for scheduler and workers that would listen on the network without TLS."""
    return RefusedForSafety(
        "scheduler and workers would be open to the network: whoever reaches them runs code as you",
        found=found,
        expected="TLS, or 127.0.0.1",
        next_step=f"{next_step}, or use --insecure-network",
    )


DAYS = 365
SKEW = timedelta(days=1)
"""Tolerated difference between the clocks of two machines."""


@dataclass(frozen=True)
class Certificates:
    """Three PEM files, or their contents."""

    ca: str
    """Certificate of the authority."""
    cert: str
    key: str

    def security(self) -> Security:
        """Return Dask's security object, which refuses connections without TLS."""
        from distributed import Security

        roles = ("client", "scheduler", "worker")
        return Security(
            require_encryption=True,
            tls_ca_file=self.ca,
            **{f"tls_{role}_cert": self.cert for role in roles},
            **{f"tls_{role}_key": self.key for role in roles},
        )


@contextmanager
def certificates_in(directory: str) -> Iterator[Certificates]:
    """Yield new certificates in files that only this user can read, and remove them on leaving.

    Certificates left by a killed run are removed too.

    :param directory: job directory, driven by this process only. Empty, or on an object store: a temporary folder of
        this machine is used.
    :raises RefusedForSafety: when the package ``cryptography`` is not installed.
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
    """Return a new authority and a certificate of it, as PEM texts.

    :raises RefusedForSafety: when the package ``cryptography`` is not installed.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError as error:
        raise open_network_refused(
            "the package cryptography is not installed", next_step='pip install ".[tls]"'
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
    """Return existing certificates; None if no certificate is given.

    Each argument is a path, or a reference ``file:PATH`` or ``env:NAME`` to a path or to the PEM text.

    :raises SpecError: when only some arguments are given, or a file does not exist.
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
            "expected a reference, not the text of a certificate or key",
            where=where,
            expected="a path, file:PATH or env:NAME",
            next_step="put it into a file that only you can read",
        )
    resolved = resolve_reference(text, where=where)
    if "\n" in resolved:
        return resolved
    path = local_path(resolved)
    if not path.is_file():
        raise SpecError("certificate file not found", where=where, found=str(path))
    return str(path)
