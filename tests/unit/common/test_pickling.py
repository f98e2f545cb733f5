"""Fast pickling of dataclasses with slots."""

from __future__ import annotations

import copy
import pickle
import pickletools
from dataclasses import dataclass, field, replace

import pytest

from pipeline.common.pickling import fast_pickle
from pipeline.common.rows import Fragment, InputFile, QuarantinedFile, RowCounts, RowGroup
from pipeline.jobs.receipts import DataFile, FragmentCounts, Receipt, Timings
from pipeline.models.engines import EngineUse

EXAMPLES = [
    RowGroup(5, 80, 40, selected=False),
    InputFile("a", 9, "mtime:1", (RowGroup(5, 80, 40),), (("day", "1"),), 1, "mark", "new"),
    Fragment("a", 0, 5, 0, 1, 80, (("day", "1"),), "b"),
    QuarantinedFile("a", "file:CorruptInput", "cut", 4),
    RowCounts(5, 3, 1, 1),
    Timings(1.0, 2.0, 3.0, 4.0, 5.0, 6.0),
    EngineUse({"trees": 3}, {"trees": 0.5}, 3, 2, 1, 0.25, ("x86-64-v3",), ("few",), ("call failed",)),
    Receipt(
        "00001", "plan", "model", "attempt", DataFile("data/x", 3, 9, "sha"), None, RowCounts(5, 3, 1, 1),
        (FragmentCounts("a", 0, 5, RowCounts(5, 3, 1, 1)),), reasons={"step": 1}, splits=("00001.0",), round=2,
    ),
]  # fmt: skip


@pytest.mark.parametrize("one", EXAMPLES, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_round_trip(one: object, protocol: int) -> None:
    data = pickle.dumps(one, protocol)
    assert pickle.loads(data) == one
    assert "BUILD" not in {code.name for code, _, _ in pickletools.genops(data)}, "its own state is slow"
    assert copy.deepcopy(one) == one


def test_a_copy_with_another_value_is_pickled_with_it() -> None:
    assert pickle.loads(pickle.dumps(replace(EXAMPLES[4], output=7))).output == 7  # type: ignore[type-var]


def test_class_that_its_values_cannot_make_is_refused() -> None:
    @dataclass
    class Hidden:
        a: int = 0
        b: int = field(default=0, init=False)

    @dataclass(kw_only=True)
    class Named:
        a: int = 0
        b: int = 0

    for wrong in (Hidden, Named):
        with pytest.raises(TypeError, match=wrong.__name__):
            fast_pickle(wrong)
