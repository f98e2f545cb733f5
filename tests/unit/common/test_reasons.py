"""`Reason`: its text, and if user code caused it."""

from __future__ import annotations

import pytest

from pipeline.common.reasons import UNREADABLE, Reason, ReasonKind


class TestReason:
    @pytest.mark.parametrize(
        ("reason", "text"),
        [
            (Reason(ReasonKind.CONTRACT, "null", "age"), "contract:age:null"),
            (Reason(ReasonKind.CONTRACT, "max", "a:b"), "contract:a:b:max"),
            (Reason(ReasonKind.STEP, "KeyError", "features:build"), "step:features:build:KeyError"),
            (Reason(ReasonKind.FRAME, "ValueError", "day"), "frame:day:ValueError"),
            (Reason(ReasonKind.SCORE, "ValueError"), "score:ValueError"),
            (Reason(ReasonKind.CRASH, "SIGSEGV"), "crash:SIGSEGV"),
            (Reason(ReasonKind.FILE, "CorruptInput"), "file:CorruptInput"),
            (Reason(ReasonKind.NO_MODEL, ""), "no_model"),
        ],
    )
    def test_reads_back_its_text(self, reason: Reason, text: str) -> None:
        assert str(reason) == text
        assert Reason.parse(text) == reason

    @pytest.mark.parametrize("text", ["", "z", "steps:a"])
    def test_of_an_unknown_kind_is_an_error(self, text: str) -> None:
        with pytest.raises(ValueError, match="ReasonKind"):
            Reason.parse(text)


@pytest.mark.parametrize("kind", list(ReasonKind))
def test_reasons_of_the_data_blame_no_code(kind: ReasonKind) -> None:
    data = (ReasonKind.CONTRACT, ReasonKind.FRAME, ReasonKind.NO_MODEL, *UNREADABLE, ReasonKind.FILE)
    assert kind.is_user_code is (kind not in data)
