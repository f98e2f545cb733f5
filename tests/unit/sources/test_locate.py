"""Names of input files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.sources.locate import locate


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """No plan or report could hold it; the error shows its bytes."""
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.parquet")
    with open(path, "wb"):
        pass
    with pytest.raises(InputError, match="not UTF-8") as caught:
        locate(str(tmp_path))
    assert caught.value.where.endswith("caf\\xe9.parquet")
    str(caught.value).encode()
