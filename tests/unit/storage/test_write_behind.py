"""Early write-out of large files to disk."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import pytest

from pipeline.storage import local as write_behind
from pipeline.storage.local import STRIDE, LocalStore, starter


@pytest.fixture
def hints(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(
        write_behind, "starter", lambda: lambda descriptor, offset, count: found.append((offset, count))
    )
    return found


def write(store: LocalStore, *sizes: int) -> bytes:
    pieces = [os.urandom(size) for size in sizes]
    with store.open_output("file") as file:
        for piece in pieces:
            assert file.write(piece) == len(piece)
    return b"".join(pieces)


def test_each_complete_stride_is_started_once_in_order(tmp_path: Path, hints: list[tuple[int, int]]) -> None:
    sizes = (100, STRIDE // 2, STRIDE, 3 * STRIDE, 5, STRIDE - 1)
    wanted = write(LocalStore(tmp_path), *sizes)
    assert (tmp_path / "file").read_bytes() == wanted
    assert len(hints) >= 3
    assert hints[0][0] == 0
    assert all(before[0] + before[1] == after[0] for before, after in itertools.pairwise(hints))
    assert all(count >= STRIDE for _, count in hints)
    assert sum(count for _, count in hints) > len(wanted) - 2 * STRIDE


def test_no_write_behind_without_fsync(tmp_path: Path, hints: list[tuple[int, int]]) -> None:
    write(LocalStore(tmp_path, fsync=False), 3 * STRIDE)
    assert hints == []


def test_small_files_are_left_to_fsync(tmp_path: Path, hints: list[tuple[int, int]]) -> None:
    assert write(LocalStore(tmp_path), 1000, 10) == (tmp_path / "file").read_bytes()
    assert hints == []


def test_files_are_written_without_the_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_behind, "starter", lambda: None)
    assert write(LocalStore(tmp_path), 2 * STRIDE) == (tmp_path / "file").read_bytes()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sync_file_range is a call of Linux")
def test_the_kernel_takes_the_hint(tmp_path: Path) -> None:
    start = starter()
    assert start is not None
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x" * (1 << 20))
        file.flush()
        assert start(file.fileno(), 0, 1 << 20) == 0
        assert start(-1, 0, 1 << 20) == -1, "a hint that fails says so, and no more"
