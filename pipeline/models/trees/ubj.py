"""Reads UBJSON, the binary form of xgboost's models. Arrays of numbers become numpy arrays at once.

From JSON every number of every node would be a Python object for a while, in the memory of each worker.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.errors import ModelError

_KINDS = {"i": "i1", "U": "u1", "I": "i2", "l": "i4", "L": "i8", "d": "f4", "D": "f8"}
_STORED = {marker: np.dtype(kind).newbyteorder(">") for marker, kind in _KINDS.items()}
_NATIVE = {marker: np.dtype(kind) for marker, kind in _KINDS.items()}
_CONSTANTS = {"Z": None, "T": True, "F": False}


def read_ubj(data: bytes | bytearray) -> dict[str, Any]:
    """The object in ``data``, as ``json.loads`` gives it, but arrays of one kind of number are numpy arrays.

    :raises ModelError: when it is no object, or is cut off.
    """
    try:
        found = _Reader(data).value()
    except (ValueError, IndexError, KeyError) as error:
        raise _damaged(f"{type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise _damaged(type(found).__name__)
    return found


def _damaged(found: str) -> ModelError:
    return ModelError("The model is not whole UBJSON.", found=found, next_step="Score it with xgboost itself.")


class _Reader:
    def __init__(self, data: bytes | bytearray) -> None:
        self._data = memoryview(data)
        self._at = 0

    def value(self) -> Any:
        """What comes next, with its marker."""
        marker = self._marker()
        if marker == "{":
            return self._object()
        if marker == "[":
            return self._array()
        if marker == "S":
            return self._text()
        if marker in _CONSTANTS:
            return _CONSTANTS[marker]
        return self._numbers(marker, 1)[0].item()

    def _marker(self) -> str:
        found = chr(self._data[self._at])
        self._at += 1
        return found

    def _peek(self, marker: str) -> bool:
        """Whether ``marker`` comes next; then it is passed."""
        if chr(self._data[self._at]) != marker:
            return False
        self._at += 1
        return True

    def _count(self) -> int:
        marker = self._marker()
        size = _STORED[marker].itemsize
        count = int.from_bytes(self._data[self._at : self._at + size], "big", signed=marker != "U")
        self._at += size
        if marker in "dD" or count < 0:
            raise ValueError("a length that is none")
        return count

    def _text(self) -> str:
        length = self._count()
        begin, self._at = self._at, self._at + length
        if self._at > len(self._data):
            raise ValueError("a text is cut off")
        return str(self._data[begin : self._at], "utf-8")

    def _numbers(self, marker: str, count: int) -> np.ndarray:
        found = np.frombuffer(self._data, _STORED[marker], count, self._at)
        self._at += found.nbytes
        return found.astype(_NATIVE[marker])

    def _object(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self._peek("}"):
            name = self._text()
            found[name] = self.value()
        return found

    def _array(self) -> Any:
        if self._peek("$"):
            marker = self._marker()
            if not self._peek("#"):
                raise ValueError("an array of one type without a length")
            return self._numbers(marker, self._count())
        if self._peek("#"):
            return [self.value() for _ in range(self._count())]
        found: list[Any] = []
        while not self._peek("]"):
            found.append(self.value())
        return found
