"""Access to a running job over the network, and to its state on disk."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import stat
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from distributed import Client
from distributed.core import rpc

from pipeline.errors import RefusedForSafety, SchedulerLost, SpecError
from pipeline.execution.clusters.address import ExistingScheduler
from pipeline.execution.clusters.local import LocalProcesses
from pipeline.execution.clusters.security import Certificates, certificates_in, make_certificates
from pipeline.settings import Settings
from pipeline.testing.held import HeldJob, held_job
from pipeline.testing.oracle import Lake
from pipeline.testing.processes import wait_until
from pipeline.testing.sockets import listening_sockets, process_tree, speaks_plainly


@pytest.mark.fault(50, 52)
def test_a_running_job_listens_on_loopback_only_and_keeps_its_state_private(
    tmp_path: Path, lake: Lake, model_path: Path
) -> None:
    with held_job(tmp_path, source=lake.path, model=model_path) as job:
        sockets = wait_for_sockets(job, count=4, what="scheduler, dashboard and two workers")
        check_private(tmp_path / ".pipeline")
    for host, port in sockets:
        assert ipaddress.ip_address(host).is_loopback, (host, port)


@pytest.mark.fault(50, 51, 52)
@pytest.mark.slow
def test_a_cluster_on_the_network_speaks_tls_only_and_only_with_those_who_hold_its_key(
    tmp_path: Path, lake: Lake, model_path: Path
) -> None:
    host = network_address()
    (tmp_path / "cluster_configs").mkdir()
    (tmp_path / "cluster_configs" / "network.yaml").write_text(yaml.safe_dump({"type": "local", "host": host}))
    options = ("--workers", "2", "--cluster", "network")
    with held_job(tmp_path, source=lake.path, model=model_path, options=options) as job:
        # One worker is in its step by now; the other may still be starting.
        on_network = wait_for_sockets(job, count=5, what="scheduler, two nannies, two workers", is_loopback=False)
        check_private(tmp_path / ".pipeline")
        parts = {path.name: path for path in job.directory.glob("tls/*/*.pem")}
        assert set(parts) == {"ca.pem", "cert.pem", "key.pem"}
        right = Certificates(*(str(parts[name]) for name in ("ca.pem", "cert.pem", "key.pem")))
        others = make_certificates(now=datetime.now(UTC))
        # Trusts the scheduler, and shows a certificate that is not of its authority.
        forged = Certificates(right.ca, others.cert, others.key)
        for ip, port in on_network:
            assert not speaks_plainly(ip, port), f"{ip}:{port} speaks to anybody"
            assert not lets_in(ip, port, None), f"{ip}:{port} lets in who shows no certificate"
            assert not lets_in(ip, port, forged), f"{ip}:{port} lets in who shows a foreign certificate"
            assert lets_in(ip, port, right)
        found = [one for ip, port in on_network if (one := scheduler_at(ip, port, right)) is not None]
        assert len(found) == 1, "one of them is the scheduler"
        check_clients(found[0], parts, forged)
    assert not (job.directory / "tls").exists()
    assert pq.read_table(tmp_path / "out").num_rows == lake.rows


def check_clients(address: str, parts: dict[str, Path], forged: Certificates) -> None:
    """Check that Dask's own client and a cluster file connect with the key only."""
    # The time that those without a key are given up in; a busy machine needs more for those who have it.
    settings, patient = Settings.load(scheduler_timeout=5), Settings.load(scheduler_timeout=120)
    ca, cert, key = (str(parts[name]) for name in ("ca.pem", "cert.pem", "key.pem"))
    for security in (None, make_certificates(now=datetime.now(UTC)).security(), forged.security()):
        with pytest.raises((OSError, TypeError, RuntimeError)):
            Client(address, security=security, timeout=5, set_as_default=False)
    with pytest.raises(OSError):  # noqa: PT011 - says one thing or another
        Client(address.replace("tls://", "tcp://"), timeout=5, set_as_default=False)
    with ExistingScheduler(patient, address, ca=ca, cert=f"file:{cert}", key=f"file:{key}").open() as client:
        client.wait_for_workers(2, timeout=120)
        assert len(client.scheduler_info(n_workers=-1)["workers"]) == 2
    with pytest.raises(SpecError, match="needs certificates"), ExistingScheduler(settings, address).open():
        pass
    with pytest.raises(SpecError, match="incomplete"), ExistingScheduler(settings, address, ca=ca).open():
        pass
    folder = parts["ca.pem"].parent
    (folder / "forged.pem").write_text(forged.cert + forged.key)
    false = str(folder / "forged.pem")
    lost = ExistingScheduler(settings, address, ca=ca, cert=false, key=false)
    with pytest.raises(SchedulerLost) as caught, lost.open():
        pass
    assert "certificates" in caught.value.next_step


def wait_for_sockets(job: HeldJob, *, count: int, what: str, is_loopback: bool | None = None) -> list[tuple[str, int]]:
    """Wait until the job's processes listen on ``count`` sockets, of loopback or not, and return the sockets."""

    def listening() -> list[tuple[str, int]]:
        # A process that ends at this moment has no sockets any more: look once more.
        with suppress(FileNotFoundError, psutil.NoSuchProcess):
            sockets = listening_sockets(process_tree(job.process.pid))
            found = [one for one in sockets if is_loopback in (None, ipaddress.ip_address(one[0]).is_loopback)]
            return found if len(found) >= count else []
        return []

    return wait_until(listening, seconds=180, what=f"fewer sockets than those of {what}")


def check_private(folder: Path) -> None:
    """Check what is in the folder, except a file that is renamed or removed at this moment."""
    for path in (folder, *folder.rglob("*")):
        with suppress(FileNotFoundError):
            mode = stat.S_IMODE((found := path.lstat()).st_mode)
            assert mode == (0o700 if stat.S_ISDIR(found.st_mode) else 0o600), f"{path} {mode:o}"


def network_address() -> str:
    """An address of this machine that others can reach."""
    found = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not ipaddress.ip_address(address.address).is_loopback
    ]
    if not found:
        pytest.skip("this machine has no network interface but loopback")
    return found[0]


def lets_in(host: str, port: int, certificates: Certificates | None) -> bool:
    """Return True if a TLS server continues after the handshake. It has two minutes: silence is no refusal."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if certificates is not None:
        security = certificates.security().get_connection_args("client")
        context = security["ssl_context"]
    try:
        with socket.create_connection((host, port), timeout=120) as plain, context.wrap_socket(plain) as connection:
            # Dask's servers speak first: their handshake.
            return bool(connection.recv(1))
    except (ssl.SSLError, ConnectionError):
        return False


def scheduler_at(host: str, port: int, certificates: Certificates) -> str | None:
    """The address when a scheduler listens there."""
    address = f"tls://{host}:{port}"

    async def ask() -> object:
        async with rpc(address, connection_args=certificates.security().get_connection_args("client")) as remote:
            return (await remote.identity())["type"]

    return address if asyncio.run(ask()) == "Scheduler" else None


@pytest.mark.fault(50)
def test_without_certificates_a_cluster_on_the_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*(name for name in sys.modules if name.startswith("cryptography")), "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RefusedForSafety) as caught, LocalProcesses(Settings.load(), host=network_address()).open():
        pass
    assert caught.value.exit_code == 7
    assert "--insecure-network" in caught.value.next_step


@pytest.mark.fault(50)
def test_an_insecure_network_must_be_spelled_out() -> None:
    settings = Settings.load(workers=1, threads=1, memory_limit="1 GiB", insecure_network=True)
    with LocalProcesses(settings, host=network_address()).open() as client:
        assert client.scheduler.address.startswith(f"tcp://{network_address()}:")


@pytest.mark.fault(51)
def test_other_users_of_the_machine_are_kept_out_where_tls_is_asked_for(tmp_path: Path) -> None:
    settings = Settings.load(workers=1, threads=1, memory_limit="1 GiB", tls=True)
    with LocalProcesses(settings).open(directory=str(tmp_path)) as client:
        assert client.scheduler.address.startswith("tls://127.0.0.1:")
        assert client.submit(sum, [1, 2]).result(timeout=60) == 3
        with pytest.raises(OSError):  # noqa: PT011
            Client(client.scheduler.address.replace("tls://", "tcp://"), timeout=5, set_as_default=False)
        check_private(tmp_path / "tls")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_its_certificates_to_the_next_to_remove(tmp_path: Path) -> None:
    (tmp_path / "tls" / "old").mkdir(parents=True)
    (tmp_path / "tls" / "old" / "key.pem").touch()
    with certificates_in(str(tmp_path)) as made:
        assert not (tmp_path / "tls" / "old").exists()
        assert Path(made.key).parent.parent == tmp_path / "tls"
    assert not (tmp_path / "tls").exists()


@pytest.mark.parametrize("address", ["0.0.0.0:8787", ":8787", "[::]:8787", "10.1.2.3:0"])
@pytest.mark.fault(50)
def test_a_dashboard_for_the_whole_network_is_refused(address: str) -> None:
    """It shows code and data, and asks nobody who they are."""
    with pytest.raises(RefusedForSafety) as caught, LocalProcesses(Settings.load(dashboard=address)).open():
        pass
    assert caught.value.exit_code == 7
    assert "ssh -L" in caught.value.next_step
