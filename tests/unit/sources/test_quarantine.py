"""The number of quarantined files that a job allows."""

from __future__ import annotations

import pytest

from pipeline.common.rows import QuarantinedFile
from pipeline.errors import TooManyRejects
from pipeline.sources.quarantine import check_file_count


def test_only_so_many() -> None:
    files = [QuarantinedFile(f"/{name}", "file:CorruptInput", "bad") for name in "abc"]
    check_file_count(files, limit=None)
    check_file_count(files, limit=3)
    with pytest.raises(TooManyRejects) as caught:
        check_file_count(files, limit=2, job="j")
    assert caught.value.found == "3 files: /a: bad; /b: bad; …"
