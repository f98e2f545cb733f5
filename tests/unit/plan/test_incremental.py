"""The files that an incremental job scores, and the reasons, decided from the published input."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pipeline.errors import InputChanged
from pipeline.plan.incremental import (
    APPENDED,
    CHANGED,
    MODEL_CHANGED,
    NEW,
    Increment,
    ListedFile,
    PublishedInput,
    PublishedInputs,
    baseline_of,
    select_files,
)


def published(path: str, *outputs: str, version: str = "v1", groups: int = 1, mark: str = "m1") -> PublishedInput:
    return PublishedInput(path, 10, version, groups, mark, outputs)


def work(number: int, *inputs: PublishedInput, done: str = "w") -> PublishedInputs:
    return PublishedInputs(f"job-{number}", 1, done, inputs)


def found(*names: str, **versions: str) -> list[ListedFile]:
    return [ListedFile(name, 10, versions.get(name, "v1")) for name in names]


def decide(
    there: Sequence[ListedFile],
    *before: PublishedInputs,
    kept: str = "xyz",
    marks: Sequence[str] = ("other",),
    model: str = "w",
    policy: str = "new",
    failed: dict[str, str] | None = None,
) -> Increment:
    return select_files(
        there, before, kept=set(kept), work=model, on_model_change=policy, marks=lambda path: marks, failed=failed
    )


def reasons(increment: Increment) -> dict[str, str]:
    return {path: how.reason for path, how in increment.files.items()}


def test_everything_is_new_at_first() -> None:
    made = decide(found("a", "b"))
    assert reasons(made) == {"a": NEW, "b": NEW}
    assert made.progress.replaces == ()
    assert made.progress.baseline


def test_only_what_is_new() -> None:
    made = decide(found("a", "b"), work(1, published("a", "x")))
    assert reasons(made) == {"b": NEW}
    assert made.progress.unchanged == 1


def test_file_of_a_failed_job_has_that_reason() -> None:
    assert reasons(decide(found("a"), failed={"a": "job-7"})) == {"a": "failed before (job-7)"}


@pytest.mark.parametrize(
    ("marks", "expected", "done"),
    [
        (["m0", "m1", "m2"], APPENDED, 2),
        (["m0", "m1"], CHANGED, 0),  # not more of them, and yet another version
        (["m0", "n1", "n2"], CHANGED, 0),
        (["m1"], CHANGED, 0),
        ([], CHANGED, 0),
    ],
)
def test_appended_or_changed(marks: list[str], expected: str, done: int) -> None:
    made = decide(found("a", a="v2"), work(1, published("a", "x", groups=2)), marks=marks)
    assert (made.files["a"].reason, made.files["a"].published_row_groups) == (expected, done)
    assert made.progress.replaces == (("x",) if expected == CHANGED else ())


def test_files_that_share_an_output_file_with_a_changed_one_are_scored_again() -> None:
    one = work(1, published("a", "x"), published("b", "x", "y"), published("c", "y"), published("d", "z"))
    made = decide(found("a", "b", "c", "d", a="v2"), one)
    assert made.files["a"].reason == CHANGED
    assert set(made.files) == {"a", "b", "c"}
    assert made.progress.replaces == ("x", "y")
    assert made.progress.unchanged == 1


def test_a_file_takes_back_what_was_published_of_it_at_any_time() -> None:
    made = decide(
        found("a", a="v3"),
        work(1, published("a", "x", version="v1")),
        work(2, published("a", "y", version="v2", groups=2)),
    )
    assert made.progress.replaces == ("x", "y")


def test_appended_rows_leave_what_is_there_unless_it_has_to_go() -> None:
    before = work(1, published("a", "x", groups=1, mark="m0"), published("b", "x"))
    assert decide(found("a", "b", a="v2"), before, marks=["m0", "m1"]).progress.replaces == ()
    made = select_files(
        found("a", "b", a="v2", b="v2"),
        (before,),
        kept={"x"},
        work="w",
        on_model_change="new",
        marks=lambda path: ["m0", "m1"] if path == "a" else [],
    )
    assert made.files["b"].reason == CHANGED
    assert made.files["a"].published_row_groups == 0, "its rows are in a file that goes: all of it is scored"


def test_a_file_that_is_gone_and_was_published_is_left_alone() -> None:
    made = decide(found("b"), work(1, published("a", "x"), published("b", "y")))
    assert made.files == {}


def test_a_file_that_is_gone_and_would_be_needed_again_is_named() -> None:
    with pytest.raises(InputChanged) as caught:
        decide(found("a", a="v2"), work(1, published("a", "x"), published("gone", "x")))
    assert caught.value.where == "gone"


@pytest.mark.parametrize(("policy", "expected"), [("new", {"c": NEW}), ("all", {"a": MODEL_CHANGED, "c": NEW})])
def test_another_model(policy: str, expected: dict[str, str]) -> None:
    made = decide(found("a", "c"), work(1, published("a", "x")), model="other", policy=policy)
    assert reasons(made) == expected
    assert made.progress.replaces == (("x",) if policy == "all" else ())


def test_another_model_for_all_needs_all() -> None:
    with pytest.raises(InputChanged, match="gone"):
        decide(found("a"), work(1, published("a", "x"), published("b", "y")), model="other", policy="all")


def test_output_files_that_were_replaced_count_no_more() -> None:
    made = decide(
        found("a", a="v3"), work(1, published("a", "x")), work(2, published("a", "y", version="v2")), kept="y"
    )
    assert made.progress.replaces == ("y",)


def test_a_baseline_is_which_publications_there_are() -> None:
    one, two = work(1), work(2)
    assert baseline_of([one]) != baseline_of([one, two])
    assert baseline_of([one, two]) == baseline_of((one, two))
    assert baseline_of([]) != ""
