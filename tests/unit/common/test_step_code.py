"""The digest of a step's code, and the archive of its sources."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.common import step_code
from pipeline.common.digest import digest_bytes
from pipeline.common.step_code import (
    CodeFile,
    StepCode,
    changed_modules,
    code_difference,
    pack_sources,
    step_changed,
    unpack_source,
)
from pipeline.errors import StateCorrupt

SOURCES = {"features": b"import lib.tools\n", "lib.tools": b"X = 1\n", "pack": b"", "pack.inner": b"Y = 2\n"}


def code_file(module: str, source: bytes, *, folder: str = "/job") -> CodeFile:
    name = module.replace(".", "/") + ("/__init__.py" if module == "pack" else ".py")
    return CodeFile(module, f"{folder}/{name}", len(source), digest_bytes(source))


def make_code(folder: str = "/job", **changed: bytes) -> StepCode:
    return StepCode("features", tuple(code_file(n, changed.get(n, s), folder=folder) for n, s in SOURCES.items()))


def by_digest() -> dict[str, bytes]:
    return {digest_bytes(source): source for source in SOURCES.values()}


def test_digest_follows_contents_and_names_and_not_folders() -> None:
    assert make_code().digest == make_code("/elsewhere").digest
    assert make_code().digest != make_code(features=b"import lib.other\n").digest
    renamed = StepCode("features", (replace(make_code().files[0], module="other"), *make_code().files[1:]))
    assert make_code().digest != renamed.digest


def test_record_round_trip() -> None:
    assert StepCode.from_record(make_code().to_record()) == make_code()


def test_archive_gives_each_source_back() -> None:
    archive = pack_sources([make_code()], by_digest())
    assert archive == pack_sources([make_code()], by_digest())
    for file in make_code().files:
        assert unpack_source(archive, file, where="x") == SOURCES[file.module]


def test_damaged_archive_is_reported() -> None:
    archive = pack_sources([make_code()], by_digest())
    (file, *_) = make_code().files
    for data in (archive[:50], pack_sources([make_code()], {**by_digest(), file.sha256: b"other"})):
        with pytest.raises(StateCorrupt, match="archive of a job's step code is damaged"):
            unpack_source(data, file, where="code/x.zip")


def test_native_and_large_code_has_no_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    native = CodeFile("fast", "/job/fast.so", 3, "0" * 64)
    assert pack_sources([StepCode("fast", (native,))], {}) == b""
    monkeypatch.setattr(step_code, "MAX_ARCHIVE_BYTES", 3)
    assert pack_sources([make_code()], by_digest()) == b""


def test_differences_name_the_files() -> None:
    after = make_code(**{"lib.tools": b"X = 2\n"})
    (text,) = changed_modules(make_code(), after)
    assert text.startswith("/job/lib/tools.py changed: sha256 ")
    assert code_difference([make_code()], [after]) == [f"code of step features: {text}"]
    assert code_difference([make_code()], [make_code()]) == []
    fewer = StepCode("features", make_code().files[:-1])
    assert changed_modules(make_code(), fewer) == ["/job/pack/inner.py is gone"]
    assert changed_modules(fewer, make_code()) == ["/job/pack/inner.py is imported now"]
    error = step_changed([text], step="features", job="j-1")
    assert (error.exit_code, error.kind) == (5, "StepChanged")
    assert "python -m pipeline retry j-1" in str(error)
