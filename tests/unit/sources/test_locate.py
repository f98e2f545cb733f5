"""Entries of a folder that are no files, names, and files that vanish while they are listed."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputChanged, InputError, MissingInput
from pipeline.sources import discover
from pipeline.sources.locate import locate
from pipeline.sources.parquet import discover as parquet_discover
from pipeline.spec.parts import Source


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    folder = tmp_path / "lake"
    folder.mkdir()
    for name in ("a", "b"):
        pq.write_table(pa.table({"x": [1, 2]}), folder / f"{name}.parquet")
    return folder


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.fault(95)
class TestUnusableEntry:
    @pytest.mark.parametrize("make", [dangling, to_itself, pipe, a_socket, device], ids=lambda make: make.__name__)
    @pytest.mark.parametrize("pattern", ["", "/*.parquet"])
    def test_error_names_it(self, lake: Path, make: Any, pattern: str) -> None:
        entry = lake / "c.parquet"
        make(entry)
        with pytest.raises(MissingInput) as caught:
            locate(f"{lake}{pattern}")
        error = caught.value
        assert (error.where, error.exit_code) == (str(entry), 4)
        assert all((error.found, error.expected, error.next_step))

    @pytest.mark.parametrize("make", [dangling, to_itself, pipe, a_socket, device], ids=lambda make: make.__name__)
    def test_quarantine_lets_the_others_pass(self, lake: Path, make: Any) -> None:
        make(lake / "c.parquet")
        discovery = discover(Source(path=str(lake)), quarantine_files=True)
        assert [Path(file.path).name for file in discovery.files] == ["a.parquet", "b.parquet"]
        assert [(Path(file.path).name, file.reason) for file in discovery.rejected] == [
            ("c.parquet", "file:MissingInput")
        ]

    def test_listing_for_a_trigger_skips_it(self, lake: Path) -> None:
        dangling(lake / "c.parquet")
        unusable: list[MissingInput] = []
        assert len(locate(str(lake), unusable=unusable)) == 2
        assert [error.where for error in unusable] == [str(lake / "c.parquet")]

    def test_skipped_entries_alone_are_an_error(self, tmp_path: Path) -> None:
        dangling(tmp_path / "c.parquet")
        with pytest.raises(MissingInput, match="not a regular file"):
            locate(str(tmp_path), unusable=[])


@pytest.mark.fault(95)
class TestLinks:
    def test_folders_that_link_to_each_other_are_walked_once_around(self, tmp_path: Path) -> None:
        for name, other in (("one", "two"), ("two", "one")):
            (tmp_path / name).mkdir()
            pq.write_table(pa.table({"x": [1]}), tmp_path / name / "a.parquet")
            (tmp_path / name / "link").symlink_to(tmp_path / other)
        names = [os.path.relpath(file.path, tmp_path / "one") for file in locate(str(tmp_path / "one"))]
        assert names == ["a.parquet", "link/a.parquet"]

    def test_a_link_to_a_folder_above_is_passed_over(self, lake: Path) -> None:
        (lake / "up").symlink_to(lake)
        assert len(locate(str(lake))) == 2


@pytest.mark.fault(96)
class TestVanishedFile:
    def test_removed_while_listed_is_not_there(self, lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stat = os.stat

        def removing(path: Any, *args: Any, **options: Any) -> os.stat_result:
            if str(path).endswith("b.parquet"):
                (lake / "b.parquet").unlink(missing_ok=True)
            return stat(path, *args, **options)

        monkeypatch.setattr(os, "stat", removing)
        assert [Path(file.path).name for file in locate(str(lake))] == ["a.parquet"]

    @pytest.mark.parametrize("name", ["a.parquet", "b.parquet"])
    def test_removed_before_its_footer_is_read(self, lake: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def listing(*args: Any, **options: Any) -> Any:
            files = locate(*args, **options)
            (lake / name).unlink(missing_ok=True)
            return files

        monkeypatch.setattr(parquet_discover, "locate", listing)
        with pytest.raises(InputChanged, match="removed while the job was planned") as caught:
            discover(Source(path=str(lake)))
        assert (caught.value.where, caught.value.exit_code) == (str(lake / name), 4)
        pq.write_table(pa.table({"x": [1, 2]}), lake / name)
        discovery = discover(Source(path=str(lake)), quarantine_files=True)
        assert [file.path for file in discovery.rejected] == [str(lake / name)]


@pytest.mark.fault(57)
def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """No plan or report could hold it; the error shows its bytes."""
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.parquet")
    with open(path, "wb"):
        pass
    with pytest.raises(InputError, match="not UTF-8") as caught:
        locate(str(tmp_path))
    assert caught.value.where.endswith("caf\\xe9.parquet")
    str(caught.value).encode()
