"""Names of categories as xgboost stores them: the UTF-8 bytes of all names, and the offset at which each name begins.

xgboost 3.1 to 3.3 write the names of a pandas column with offsets that count characters, and only as many bytes as
there are characters. Beyond ASCII the names shift, and the end is lost. A file does not tell which way it was written.
Pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def split_names(offsets: Sequence[int], values: bytes) -> list[str] | None:
    """Return the names where offsets count bytes; None if they cannot: bytes are not UTF-8, or a name comes twice.

    :raises ValueError: for offsets that do not rise from 0 to the number of bytes.
    """
    if offsets[0] != 0 or offsets[-1] != len(values) or any(start > stop for start, stop in pairwise(offsets)):
        raise ValueError(f"offsets of category names that do not rise from 0 to {len(values)}")
    try:
        names = [values[start:stop].decode() for start, stop in pairwise(offsets)]
    except UnicodeDecodeError:
        return None
    return names if values.isascii() or len(set(names)) == len(names) else None


def could_be_cut(offsets: Sequence[int], values: bytes) -> bool:
    """Return True if ``offsets`` may count characters, and ``values`` may lack its end."""
    if values.isascii():
        return False
    text = _readable(values)
    if text is None:
        return False
    whole = [text[start:stop] for start, stop in pairwise(offsets) if stop <= len(text)]
    return len(set(whole)) == len(whole)


def likely_names(offsets: Sequence[int], values: bytes) -> list[str]:
    """Return the names where offsets count characters; what is lost of a name is ``…``."""
    text = _readable(values) or ""
    return [text[start:stop] + ("…" if stop > len(text) else "") for start, stop in pairwise(offsets)]


def are_stored(names: Sequence[str], offsets: Sequence[int], values: bytes) -> bool:
    """Return True if ``names``, in this order, can be the ones stored as ``offsets`` and ``values``, whole or cut."""
    encoded = [name.encode() for name in names]
    by_bytes = [0, *accumulate(len(name) for name in encoded)]
    by_characters = [0, *accumulate(len(name) for name in names)]
    joined = b"".join(encoded)
    given = list(offsets)
    return (by_bytes == given and joined == values) or (by_characters == given and joined[: given[-1]] == values)


def _readable(values: bytes) -> str | None:
    """Return the text up to a character that is cut off at the end; None if the bytes are not UTF-8."""
    try:
        return values.decode()
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            return None
        return values[: error.start].decode()
