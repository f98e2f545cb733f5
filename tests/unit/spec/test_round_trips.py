"""Specs with odd values: read back as they were written, or refused when they are built."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SpecError
from pipeline.spec.job_spec import JobSpec

TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=40).filter(str.strip)
NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)


def build(**fields: Any) -> JobSpec:
    given_fields = {
        "name": "odd",
        "source": {"path": "lake/"},
        "steps": [{"score": {"model": "m.ubj", "keep": ["id"]}}],
        "sink": {"path": "out/"},
        **fields,
    }
    return JobSpec.build(**given_fields)


@pytest.mark.fault(56)
@given(limit=NUMBERS, name=TEXTS, value=NUMBERS | TEXTS | st.booleans())
def test_specs_are_read_back(limit: float, name: str, value: Any) -> None:
    """From YAML and from the JSON of a plan: equal, with an equal digest, -0.0 and 5e-324 included."""
    spec = build(
        contract={name: {"max": limit}},
        steps=[{"score": {"model": "m.ubj", "keep": [name]}}],
        params={"x": value},
    )
    for again in (JobSpec.load(spec.to_yaml()), JobSpec.model_validate_json(json.dumps(spec.to_dict()))):
        assert again == spec
        assert again.digest == spec.digest
        found = again.contract[name].max
        assert math.copysign(1, float(str(found))) == math.copysign(1, limit)


@pytest.mark.fault(57)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "fields",
    [
        lambda value: {"contract": {"x": {"max": value}}},
        lambda value: {"contract": {"x": {"allowed": [1.0, value]}}},
        lambda value: {"params": {"x": value}},
        lambda value: {"params": {"x": [1.0, value]}},
        lambda value: {"errors": {"max_fraction": value}},
        lambda value: {"fan_out": {"by": [1.0, value]}},
    ],
)
def test_numbers_that_are_not_finite_are_refused(value: float, fields: Any) -> None:
    """YAML has no such numbers; from Python they are refused with the name of the field."""
    with pytest.raises(SpecError):
        build(**fields(value))


@pytest.mark.fault(57)
@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"source": {"path": "lake/\udcff"}}, "source.path"),
        ({"source": {"path": ["lake/", "lake/\udcff"]}}, "source.path.1"),
        ({"sink": {"path": "out/\udcff"}}, "sink.path"),
    ],
)
def test_text_that_is_not_utf8_is_refused(fields: dict[str, Any], where: str) -> None:
    """A path from a command line that was not UTF-8 is refused with its field, and shown with escapes."""
    with pytest.raises(SpecError) as caught:
        build(**fields)
    assert where in caught.value.message
    assert "\\udcff" in caught.value.found
    str(caught.value).encode()
