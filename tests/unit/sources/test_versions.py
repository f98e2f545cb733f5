"""Versions of local files: replaced files are noticed, restored files are not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputChanged
from pipeline.sources import discover, read_batches, selected_fragments
from pipeline.sources.locate import current_version, has_version, locate, locate_planned
from pipeline.sources.parquet.opening import footer_bytes
from pipeline.sources.versions import content_version, is_same_version, with_tail
from pipeline.spec.parts import Source


def write(path: Path, last: int) -> Path:
    pq.write_table(pa.table({"x": [1, 2, last]}), path)
    return path


def keep_times(path: Path, of: os.stat_result) -> None:
    os.utime(path, ns=(of.st_atime_ns, of.st_mtime_ns))


def copy_onto(source: Path, path: Path) -> None:
    """Run ``cp -p`` until the change time differs: file systems count it in steps of some milliseconds."""
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:
        subprocess.run(["cp", "-p", source, path], check=True)


@pytest.mark.fault(97)
class TestReplacedFile:
    def test_rename_onto_the_file_is_noticed(self, tmp_path: Path) -> None:
        """``rsync -t`` puts another inode of the same size and time in place."""
        path = write(tmp_path / "a.parquet", 3)
        (planned,) = discover(Source(path=str(path))).files
        before = path.stat()
        other = write(tmp_path / "other.parquet", 4)
        keep_times(other, before)
        os.replace(other, path)
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        assert not has_version(str(path), planned.size, planned.version)

    def test_copy_onto_the_file_is_noticed(self, tmp_path: Path) -> None:
        """``cp -p`` keeps the inode: only the change time and the content differ."""
        path = write(tmp_path / "a.parquet", 3)
        discovery = discover(Source(path=str(path)))
        (planned,) = discovery.files
        before = path.stat()
        other = write(tmp_path / "other.parquet", 4)
        keep_times(other, before)
        copy_onto(other, path)
        after = path.stat()
        assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
        assert not has_version(str(path), planned.size, planned.version)
        with pytest.raises(InputChanged):
            locate_planned(str(path), [planned])
        batches = read_batches(
            list(selected_fragments(planned)),
            columns=("x",),
            schema=discovery.schema,
            batch_rows=10,
            versions=discovery.versions,
        )
        with pytest.raises(InputChanged):
            next(batches)

    def test_values_that_the_footer_does_not_tell_are_noticed(self, tmp_path: Path) -> None:
        """Smallest and largest value, sizes and offsets are the same: only the data differs."""
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"x": [1, 2, 9]}), path)
        (planned,) = discover(Source(path=str(path))).files
        before = path.stat()
        other = tmp_path / "other.parquet"
        pq.write_table(pa.table({"x": [1, 3, 9]}), other)
        assert footer_bytes(str(other)) == footer_bytes(str(path))
        keep_times(other, before)
        copy_onto(other, path)
        assert not has_version(str(path), planned.size, planned.version)

    def test_change_time_alone_is_no_change(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", 3)
        (planned,) = discover(Source(path=str(path))).files
        same = tmp_path / "same.parquet"
        shutil.copy2(path, same)
        copy_onto(same, path)
        assert current_version(str(path))[1] not in planned.version
        assert has_version(str(path), planned.size, planned.version)

    def test_restored_copy_is_the_same(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", 3)
        (planned,) = discover(Source(path=str(path))).files
        copy = tmp_path / "copy.parquet"
        shutil.copy2(path, copy)
        keep_times(copy, path.stat())
        os.replace(copy, path)
        assert current_version(str(path))[1].split()[1] not in planned.version
        assert has_version(str(path), planned.size, planned.version)
        (again,) = discover(Source(path=str(path))).files
        assert again.version != planned.version
        assert content_version(again.version) == content_version(planned.version)


class TestIsSameVersion:
    @pytest.mark.parametrize(
        ("planned", "current", "expected"),
        [
            ("mtime:1", "mtime:1", True),
            ("mtime:1", "mtime:1 inode:7", True),
            ("mtime:1 inode:7", "mtime:1 inode:7 tail:4-ab", True),
            ("mtime:1 inode:7", "mtime:1 inode:7 ctime:3", True),
            ("mtime:1 inode:7 ctime:3", "mtime:1 inode:7 ctime:3", True),
            ("mtime:1 inode:7 ctime:3", "mtime:1 inode:7 ctime:4", False),
            ("mtime:1 inode:7", "mtime:2 inode:7", False),
            ("mtime:1 inode:7", "mtime:1 inode:8", False),
            ("etag:a", "etag:a", True),
            ("etag:a", "etag:b", False),
            ("etag:a", "mtime:1", False),
            ("modified:1", "modified:2", False),
        ],
    )
    def test_parts_are_compared(self, planned: str, current: str, expected: bool) -> None:
        assert is_same_version("/nowhere", (5, planned), (5, current)) is expected
        assert not is_same_version("/nowhere", (5, planned), (6, current))

    @pytest.mark.parametrize("now", ["mtime:1 inode:8 ctime:3", "mtime:1 inode:7 ctime:4", "mtime:1 inode:8 ctime:4"])
    def test_last_bytes_decide_between_inodes_and_change_times(self, tmp_path: Path, now: str) -> None:
        path = tmp_path / "a"
        path.write_bytes(b"0" * 100 + b"tail")
        planned = with_tail("mtime:1 inode:7 ctime:3", b"tail")
        assert is_same_version(str(path), (104, planned), (104, now))
        path.write_bytes(b"0" * 100 + b"tale")
        assert not is_same_version(str(path), (104, planned), (104, now))

    def test_object_store_has_no_tail(self) -> None:
        assert with_tail("etag:a", b"tail") == "etag:a"


def test_listing_gives_the_inode_beside_the_version(tmp_path: Path) -> None:
    """A trigger's key must not change with inode and change time: a restored file would fire again."""
    path = write(tmp_path / "a.parquet", 3)
    (file,) = locate(str(path))
    assert file.version == f"mtime:{path.stat().st_mtime_ns}"
    assert (path.stat().st_size, file.identity) == current_version(str(path))
