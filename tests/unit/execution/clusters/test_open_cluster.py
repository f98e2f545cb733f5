"""Closing a cluster: the outcome of the run counts, whatever happens while the cluster closes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline.errors import Interrupted
from pipeline.execution.clusters import open_cluster
from pipeline.plan.plan import Limits


class SlowToClose:
    """A cluster that does not close in time, like one whose workers are stuck."""

    owns_workers = True

    def limits(self) -> Limits:
        return Limits(1, 1, 0)

    def preload(self, *, has_steps: bool) -> None:
        pass

    @contextmanager
    def open(self, *, directory: str = "") -> Iterator[str]:
        try:
            yield "client"
        finally:
            raise TimeoutError


@pytest.mark.fault(63)
def test_success_stays_a_success(caplog: pytest.LogCaptureFixture) -> None:
    with open_cluster(SlowToClose()) as client:
        assert client == "client"
    assert "did not close cleanly: TimeoutError" in caplog.text


@pytest.mark.fault(63)
def test_interruption_stays_an_interruption(caplog: pytest.LogCaptureFixture) -> None:
    """Exit code 143 of SIGTERM, not 1 of a TimeoutError."""
    with pytest.raises(Interrupted) as caught, open_cluster(SlowToClose()):
        raise Interrupted("the run was interrupted", signal_number=15)
    assert caught.value.exit_code == 143
    assert "did not close cleanly" in caplog.text


def test_errors_of_the_start_are_raised() -> None:
    class Broken(SlowToClose):
        @contextmanager
        def open(self, *, directory: str = "") -> Iterator[str]:
            raise TimeoutError
            yield ""

    with pytest.raises(TimeoutError), open_cluster(Broken()):
        pass
