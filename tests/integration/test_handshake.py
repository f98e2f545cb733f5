"""Handshake with workers: imports and versions are compared before a job runs."""

from __future__ import annotations

import pytest
from distributed import Client

from pipeline.errors import EnvMismatch
from pipeline.execution.clusters import client as handshake


def test_every_worker_answers_and_has_imported_the_flavor(client: Client) -> None:
    assert len(handshake.shake_hands(client, flavor="xgboost", timeout=60)) == 2
    loaded = client.run(lambda: "xgboost" in __import__("sys").modules)
    assert set(loaded.values()) == {True}


@pytest.mark.fault(53)
def test_another_version_on_the_workers_is_refused_with_both(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    # The driver's own view is falsified: the workers are other processes and tell the truth.
    real = handshake.version
    monkeypatch.setattr(handshake, "version", lambda name: "1.2.3" if name == "pyarrow" else real(name))
    with pytest.raises(EnvMismatch) as caught:
        handshake.shake_hands(client, flavor="xgboost", timeout=60)
    assert caught.value.expected == "pyarrow 1.2.3"
    assert caught.value.found == f"pyarrow {real('pyarrow')}"
    assert caught.value.exit_code == 2


def test_a_worker_without_a_module_is_refused_with_its_name(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    # As where the package is not installed: the other side fails while it takes the function in.
    monkeypatch.setattr(handshake, "warm_up", Missing())
    with pytest.raises(EnvMismatch, match="cannot import") as caught:
        handshake.shake_hands(client, flavor="xgboost", timeout=60)
    assert "not_installed_anywhere" in caught.value.found


class Missing:
    """A function that only this process has."""

    def __reduce__(self) -> tuple[object, ...]:
        return __import__, ("not_installed_anywhere",)

    def __call__(self, flavor: str, device: str) -> None:
        return None
