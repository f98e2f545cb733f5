"""Checks of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.service import doctor
from pipeline.service.doctor import Outcome, examine, file_system, names_in_the_way
from pipeline.settings import Settings
from pipeline.storage.local import LocalStore


def test_a_machine_on_which_jobs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-secret-value")
    found = examine(Settings(directory=str(tmp_path / "jobs")))
    assert {finding.check for finding in found} == {
        *("versions", "machine", "ports", "disk", "file system", "credentials", "names")
    }
    assert [finding for finding in found if finding.outcome is Outcome.FAIL] == []
    text = " ".join(finding.text for finding in found)
    assert "AWS_ACCESS_KEY_ID" in text
    assert "a-secret-value" not in text
    assert not any((tmp_path / "jobs").iterdir())


def test_file_that_hides_a_package(tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text("")
    (finding,) = names_in_the_way(tmp_path)
    assert finding.outcome is Outcome.FAIL
    assert finding.text == f"{tmp_path / 'pipeline.py'} hides the package pipeline"


def test_package_of_this_folder_is_not_in_its_own_way() -> None:
    (finding,) = names_in_the_way(Path(doctor.__file__).parents[2])
    assert finding.outcome is Outcome.OK


def test_file_system_without_exclusive_creation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(store: LocalStore, name: str, data: bytes) -> bool:
        store.replace(name, data)
        return True

    monkeypatch.setattr(LocalStore, "put_if_absent", put)
    first = next(iter(list(file_system(str(tmp_path / "jobs")))))
    assert first.outcome is Outcome.FAIL
    assert "two drivers could run one job" in first.text


def test_port_that_is_taken(tmp_path: Path) -> None:
    found = examine(Settings(directory=str(tmp_path), dashboard="203.0.113.1:1"))
    (ports,) = [finding for finding in found if finding.check == "ports"]
    assert ports.outcome is Outcome.FAIL
