"""Damaged footers: refused with the file, whatever they do to the process that reads them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import CorruptInput, InputError
from pipeline.sources import discover, find_source, read_batches, selected_fragments
from pipeline.sources.parquet import footer_guard
from pipeline.sources.parquet.footer_guard import FooterGuard
from pipeline.sources.parquet.opening import footer_bytes, parse_footer, read_footer
from pipeline.spec.parts import Source
from pipeline.testing.encryption import write_encrypted_columns
from pipeline.testing.examples import choose

pytest.importorskip("pyarrow.parquet.encryption")


def write(path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "id": pa.array(range(300), pa.int64()),
            "x": pa.array([None if n % 7 == 0 else n / 3 for n in range(300)], pa.float64()),
            "name": [f"name {n % 11}" for n in range(300)],
            "tags": [["a"] * (n % 3) for n in range(300)],
        }
    )
    pq.write_table(table, path, row_group_size=100, **options)
    return path


class TestEncryptedColumns:
    @pytest.fixture
    def lake(self, tmp_path: Path) -> Path:
        for name in "ab":
            write(tmp_path / "lake" / f"{name}.parquet")
        write_encrypted_columns(tmp_path / "lake" / "c.parquet")
        return tmp_path / "lake"

    def test_they_end_a_process_that_reads_them(self, lake: Path) -> None:
        """If pyarrow raises one day, the guard has less to do."""
        code = "import pyarrow.parquet as pq, sys; pq.ParquetFile(sys.argv[1]).metadata.row_group(0).column(1)"
        ended = subprocess.run([sys.executable, "-c", code, str(lake / "c.parquet")], capture_output=True, check=False)
        assert ended.returncode in (-signal.SIGABRT, 1)

    @pytest.mark.fault(92)
    @pytest.mark.parametrize("columns", [None, ("id",)])
    def test_they_are_refused(self, lake: Path, columns: tuple[str, ...] | None) -> None:
        with pytest.raises(CorruptInput, match="encrypted") as caught:
            discover(Source(path=str(lake / "c.parquet"), columns=columns))
        assert caught.value.where == str(lake / "c.parquet")

    @pytest.mark.fault(92)
    def test_they_are_quarantined(self, lake: Path) -> None:
        discovery = discover(Source(path=str(lake)), quarantine_files=True)
        assert [Path(file.path).name for file in discovery.rejected] == ["c.parquet"]
        assert "encrypted" in discovery.rejected[0].message

    @pytest.mark.fault(93)
    def test_the_guard_survives_them_without_the_check(self, lake: Path) -> None:
        """Without a look at the signature, the child ends; the file is blamed, and the next file is read."""
        footer = footer_bytes(str(lake / "c.parquet"))
        with pytest.raises(CorruptInput, match="SIGABRT") as caught:
            FooterGuard().check("c.parquet", footer)
        assert caught.value.where == "c.parquet"
        FooterGuard().check("a.parquet", footer_bytes(str(lake / "a.parquet")))


@pytest.mark.fault(93)
class TestGuard:
    def test_a_killed_child_is_not_the_fault_of_the_footer(self, tmp_path: Path) -> None:
        footer = footer_bytes(str(write(tmp_path / "a.parquet")))
        FooterGuard().check("a.parquet", footer)
        child = footer_guard._shared._child
        assert child is not None
        os.kill(child.pid, signal.SIGKILL)
        FooterGuard().check("a.parquet", footer)
        assert footer_guard._shared._child is not child

    def test_a_process_that_cannot_start_is_done_without(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        footer_guard._shared.close()
        monkeypatch.setattr(footer_guard._Shared, "_start", lambda self: (_ for _ in ()).throw(OSError(11, "EAGAIN")))
        FooterGuard().check("a.parquet", footer_bytes(str(write(tmp_path / "a.parquet"))))
        assert "could be started" in caplog.text


class TestContradiction:
    @pytest.mark.fault(94)
    def test_other_number_of_rows(self, tmp_path: Path) -> None:
        """A footer of 1 row whose row groups have none was scored as an empty file."""
        path = write(tmp_path / "a.parquet")
        footer = footer_bytes(str(path))
        count = footer.index(b"\x16\xd8\x04")  # field 3, i64, zigzag varint of 300
        changed = footer[:count] + b"\x16\xda\x04" + footer[count + 3 :]
        with pytest.raises(CorruptInput, match="301 rows in all, 300 in its row groups"):
            parse_footer(str(path), changed)

    @pytest.mark.fault(94)
    def test_negative_number_of_rows(self, tmp_path: Path) -> None:
        """The row groups of a file have no negative number of rows."""
        path = write(tmp_path / "a.parquet")
        whole = path.read_bytes()
        count = whole.rindex(b"\x16\xc8\x01")  # i64, zigzag varint of 100: rows of the last row group
        path.write_bytes(whole[:count] + b"\x16\xc7\x01" + whole[count + 3 :])
        with pytest.raises(CorruptInput, match="row group 2 has -100 rows") as caught:
            discover(Source(path=str(path)))
        assert caught.value.where == str(path)

    @pytest.mark.fault(94)
    def test_name_of_a_column_that_is_not_utf8(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", store_schema=False)
        path.write_bytes(path.read_bytes().replace(b"name", b"n\xffme"))
        with pytest.raises(CorruptInput, match="in its footer: UnicodeDecodeError") as caught:
            discover(Source(path=str(path)))
        assert caught.value.where == str(path)


def outcome(path: Path) -> str:
    """Plan and read a file as a job does. Return the kind of error, or ``ok``."""
    try:
        discovery = discover(Source(path=str(path), filter="id >= 0 or x < 1"))
        find_source("parquet").identify(next(iter(discovery.measured)).file)
        fragments = [fragment for file in discovery.files for fragment in selected_fragments(file)]
        for batch in read_batches(
            fragments, columns=discovery.physical, schema=discovery.schema, batch_rows=64, versions=discovery.versions
        ):
            batch.table.validate()
    except InputError as error:
        if str(path) not in error.where:
            raise
        return error.kind
    return "ok"


def mutant(whole: bytes, chance: random.Random) -> bytes:
    """Return a file with flipped, overwritten or removed bytes, in the footer half of the times."""
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    first = len(whole) - footer if chance.random() < 0.5 else 0
    data = bytearray(whole)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(first, len(data))
        kind = chance.randrange(4)
        if kind == 0:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[place] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            data[place : place + chance.randrange(1, 9)] = chance.randbytes(chance.randrange(9))
        else:
            del data[place : place + chance.randrange(1, 65)]
    return bytes(data)


class TestMutants:
    """Mutants are read or refused, each with its path; none is a defect, and none ends this process."""

    @pytest.mark.fault(94)
    @pytest.mark.parametrize("version", ["1.0", "2.0"])
    def test_mutants_are_read_or_refused(self, tmp_path: Path, version: str) -> None:
        whole = write(tmp_path / "whole.parquet", data_page_version=version, compression="snappy").read_bytes()
        path, outcomes = tmp_path / "mutant.parquet", set()
        for seed in range(choose(40, of=1000)):
            path.write_bytes(mutant(whole, random.Random(seed)))
            try:
                outcomes.add(outcome(path))
            except Exception as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        assert "CorruptInput" in outcomes

    def test_read_footer_of_every_cut(self, tmp_path: Path) -> None:
        whole = write(tmp_path / "whole.parquet").read_bytes()
        path = tmp_path / "cut.parquet"
        for length in range(0, len(whole), max(1, len(whole) // 200)):
            path.write_bytes(whole[:length])
            with pytest.raises(CorruptInput):
                read_footer(str(path))
