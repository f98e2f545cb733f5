"""Remote model files on a machine: downloaded once, verified whenever they are read."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.common.digest import digest_bytes
from pipeline.models import node_cache
from pipeline.models.node_cache import FILES, read_cached, read_version
from pipeline.models.process import ProcessFacts, process_facts, set_process_facts

DATA = b"a model" * 1000
DIGEST = digest_bytes(DATA)


class Downloads:
    """A download that counts its calls."""

    def __init__(self, data: bytes = DATA) -> None:
        self.data = data
        self.count = 0

    def __call__(self) -> bytes:
        self.count += 1
        return self.data


def test_file_is_downloaded_once(tmp_path: Path) -> None:
    download = Downloads()
    assert [read_cached(tmp_path / "models", DIGEST, download) for _ in range(3)] == [DATA] * 3
    assert download.count == 1
    assert (tmp_path / "models").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "models" / DIGEST).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", [DATA[:-1], b"", DATA[:-1] + b"x"], ids=["cut", "empty", "changed"])
def test_damaged_file_is_downloaded_again(damage: bytes, tmp_path: Path) -> None:
    download = Downloads()
    read_cached(tmp_path, DIGEST, download)
    (tmp_path / DIGEST).write_bytes(damage)
    assert read_cached(tmp_path, DIGEST, download) == DATA
    assert download.count == 2
    assert (tmp_path / DIGEST).read_bytes() == DATA


def test_bytes_of_another_digest_are_not_kept(tmp_path: Path) -> None:
    """The caller checks the digest, too, and reports that the file is not the pinned one."""
    assert read_cached(tmp_path, DIGEST, Downloads(b"other")) == b"other"
    assert not (tmp_path / DIGEST).exists()


def test_folder_that_cannot_be_made_costs_a_download(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    download = Downloads()
    assert read_cached(tmp_path / "file" / "models", DIGEST, download) == DATA
    assert download.count == 1


def test_files_read_longest_ago_are_removed(tmp_path: Path) -> None:
    datas = [f"model {number}".encode() for number in range(FILES + 2)]
    for number, data in enumerate(datas):
        read_cached(tmp_path, digest_bytes(data), Downloads(data))
        os.utime(tmp_path / digest_bytes(data), (number, number))
    kept = {path.name for path in tmp_path.iterdir() if not path.suffix}
    assert kept == {digest_bytes(data) for data in datas[2:]}


def test_threads_wait_for_the_first(tmp_path: Path) -> None:
    download = Downloads()
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: read_cached(tmp_path, DIGEST, download), range(16))) == {DATA}
    assert download.count == 1


def _read(folder: Path, started: Any) -> None:
    def download() -> bytes:
        with (folder / "downloads").open("ab") as file:
            file.write(b".")
        return DATA

    started.wait()
    assert read_cached(folder / "models", DIGEST, download) == DATA


def test_processes_race_for_one_download(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Barrier(4)
    children = [context.Process(target=_read, args=(tmp_path, started)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert (tmp_path / "downloads").read_bytes() == b"."


class TestReadVersion:
    @pytest.fixture(autouse=True)
    def facts(self, tmp_path: Path) -> Iterator[None]:
        before = process_facts()
        set_process_facts(ProcessFacts(2, str(tmp_path / "node")))
        yield
        set_process_facts(before)

    def version(self, uri: str) -> Any:
        return type("Version", (), {"uri": uri, "digest": DIGEST, "nbytes": len(DATA)})()

    def test_remote_files_are_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        download = Downloads()
        monkeypatch.setattr(node_cache, "read_model", lambda uri, limit: download())
        for _ in range(2):
            assert read_version(self.version("s3://models/m.ubj")) == DATA
        assert download.count == 1
        assert (tmp_path / "node" / DIGEST).exists()

    def test_local_files_are_read_where_they_are(self, tmp_path: Path) -> None:
        (tmp_path / "m.ubj").write_bytes(DATA)
        assert read_version(self.version(str(tmp_path / "m.ubj"))) == DATA
        assert not (tmp_path / "node").exists()

    def test_process_that_is_no_worker_keeps_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        set_process_facts(ProcessFacts())
        download = Downloads()
        monkeypatch.setattr(node_cache, "read_model", lambda uri, limit: download())
        for _ in range(2):
            read_version(self.version("s3://models/m.ubj"))
        assert download.count == 2
