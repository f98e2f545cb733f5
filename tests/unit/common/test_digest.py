"""Digests depend on the content only: the same everywhere, and independent of unset fields."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.digest import digest_bytes, digest_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


@dataclass(frozen=True)
class Old:
    name: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class New(Old):
    extra: str | None = None
    more: dict[str, int] = field(default_factory=dict)


def test_known_values() -> None:
    assert digest_bytes(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert digest_json({"b": 1, "a": [1, 2]}) == digest_bytes(b'{"a":[1,2],"b":1}')


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=5))
def test_order_of_keys_does_not_count(value: dict[str, object]) -> None:
    assert digest_json(value) == digest_json(dict(reversed(value.items())))


def test_unset_fields_do_not_count() -> None:
    assert digest_json(Old("x", (1,))) == digest_json(New("x", (1,))) == digest_json({"name": "x", "sizes": [1]})
    assert digest_json(New("x", (1,), "y")) != digest_json(New("x", (1,)))


@pytest.mark.parametrize(("one", "other"), [(0, False), (1, 1.0), ("1", 1), ([1, 2], [2, 1]), (0, None), ("", None)])
def test_different_content_differs(one: object, other: object) -> None:
    assert digest_json({"x": one, "y": 1}) != digest_json({"x": other, "y": 1})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), object(), b"x", {1, 2}])
def test_value_that_json_cannot_hold_is_refused(bad: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        digest_json({"x": bad})


def test_another_process_gives_the_same() -> None:
    code = "from pipeline.common.digest import digest_json; print(digest_json({'a': {'ü': [1.5, True]}, 'b': 'x'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest_json({"b": "x", "a": {"ü": [1.5, True]}})
