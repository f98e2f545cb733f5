from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.execution.stragglers import (
    WINDOW,
    Ask,
    Backup,
    Cut,
    Divide,
    PaceHistory,
    Reassign,
    RunningAttempt,
    Share,
    StragglerPolicy,
    choose_mitigations,
    limit,
)
from pipeline.scoring.progress import ProgressSnapshot

PATIENCE = StragglerPolicy(share=1e9)
"""Of what is slow. Sharing, which asks sooner, has tests of its own."""
SHARING = StragglerPolicy()


def rates(*seconds: float, workers: int = 4) -> PaceHistory:
    """One unit of work each."""
    found = PaceHistory()
    for number, value in enumerate(seconds):
        found = found.after(f"w{number % workers}", seconds=value, work=1.0)
    return found


EVEN = rates(10, 10, 10, 10, 10)


def run(seconds: float, **fields: Any) -> RunningAttempt:
    return RunningAttempt(**{"key": "k", "work": 1.0, "rows": 100_000, "worker": "slow", "seconds": seconds, **fields})


def seen(
    rows_done: int, seconds: float, *, batches: int = 10, since: float = 0.1, starved: float = 0.5
) -> dict[str, Any]:
    """``starved`` as a share: by default it is the worker that is slow."""
    return {"sight": ProgressSnapshot(rows_done, batches, seconds, since, starved * seconds), "sight_age": 0.5}


def test_one_that_goes_on_when_nothing_is_left_is_shared_with_its_own_worker() -> None:
    assert choose_mitigations([run(0.9)], idle=["w1", "w2"], rates=EVEN, patience=SHARING) == ()
    assert choose_mitigations([run(1.1)], idle=["w1", "w2"], rates=EVEN, patience=SHARING) == (Ask("k"),)
    (action,) = choose_mitigations([run(4.5, **seen(40_000, 4.0))], idle=["w1", "w2"], rates=EVEN, patience=SHARING)
    assert action == Share("k", ("slow", "w1", "w2"), left=pytest.approx(5.5))
    assert choose_mitigations([run(4.5, **seen(40_000, 4.0))], idle=["w1"], rates=PaceHistory(), patience=SHARING), (
        "it is its own measure"
    )


def test_what_ends_soon_or_shows_nothing_or_is_small_is_not_shared() -> None:
    for fields in (
        seen(70_000, 7.0),
        {**seen(0, 4.0), "sight_age": 0.2},
        {**seen(50, 4.0), "rows": 100},
        {**seen(40_000, 4.0), "copies": 2},
    ):
        assert choose_mitigations([run(7.1, **fields)], idle=["w1", "w2"], rates=EVEN, patience=SHARING) == ()
    assert (
        choose_mitigations([run(7.1, cut_asked=0.5, **seen(40_000, 4.0))], idle=["w1"], rates=EVEN, patience=SHARING)
        == ()
    )


def test_those_that_are_shared_divide_the_idle_ones_among_them() -> None:
    runs = [run(4.5, key=name, **{**seen(40_000, 4.0), "worker": name}) for name in ("a", "b")]
    found = choose_mitigations(runs, idle=["w1", "w2", "w3", "w4"], rates=EVEN, patience=SHARING)
    assert [action.workers for action in found if isinstance(action, Share)] == [("a", "w1", "w3"), ("b", "w2", "w4")]


def test_rows_that_take_long_on_a_worker_that_is_well_are_shared_with_it() -> None:
    expensive = run(20, **seen(10_000, 20, starved=0.1))
    (action,) = choose_mitigations([expensive], idle=["w1", "w2"], rates=EVEN, patience=SHARING)
    assert action == Share("k", ("slow", "w1", "w2"), left=pytest.approx(179.5), expensive=200.0)
    (cut,) = choose_mitigations(
        [replace(expensive, **seen(10_000, 20))], idle=["w1", "w2"], rates=EVEN, patience=SHARING
    )
    assert cut == Cut("k", ("w1", "w2"), left=180.0), "it did not get to run"
    was_slow = PaceHistory((*EVEN.samples, ("slow", 20.0), ("slow", 20.0)))
    (cut,) = choose_mitigations([expensive], idle=["w1", "w2"], rates=was_slow, patience=SHARING)
    assert isinstance(cut, Cut), "it was slow before"


def test_one_that_answers_but_does_not_get_on_is_helped_as_if_it_were_frozen() -> None:
    stuck = run(30, **seen(40_000, 30, since=12.0, starved=0.0))
    assert (
        choose_mitigations(
            [replace(stuck, **seen(40_000, 30, since=3.0, starved=0.0))], idle=["w1"], rates=EVEN, patience=PATIENCE
        )
        == ()
    )
    assert isinstance(choose_mitigations([stuck], idle=["w1"], rates=EVEN, patience=PATIENCE)[0], Cut)
    late = replace(stuck, cut_asked=10.0)
    assert isinstance(choose_mitigations([late], idle=["w1"], rates=EVEN, patience=PATIENCE)[0], Backup)


def test_one_without_a_batch_is_asked_again_soon() -> None:
    begun = run(1.4, **{**seen(0, 1.0, batches=0), "sight_age": 0.2})
    assert choose_mitigations([begun], idle=["w1"], rates=EVEN, patience=SHARING) == ()
    assert choose_mitigations([replace(begun, sight_age=0.4)], idle=["w1"], rates=EVEN, patience=SHARING) == (Ask("k"),)


def test_the_idle_ones_go_where_most_is_left() -> None:
    runs = [
        run(9.0, key="little", **{**seen(70_000, 8.0), "worker": "a"}),
        run(9.0, key="much", **{**seen(20_000, 8.0, starved=0.0), "worker": "b"}),
    ]
    found = choose_mitigations(runs, idle=["w1", "w2", "w3"], rates=EVEN, patience=SHARING)
    assert [(type(action), action.key, action.workers) for action in found] == [
        (Share, "much", ("b", "w1", "w2", "w3")),
    ]


def test_who_answered_waits_a_moment_for_the_others() -> None:
    runs = [
        run(4.5, key="a", **{**seen(40_000, 4.0), "worker": "a"}),
        run(4.5, key="b", worker="b", unanswered=0.1),
    ]
    assert choose_mitigations(runs, idle=["w1", "w2"], rates=EVEN, patience=SHARING) == ()
    runs[1] = replace(runs[1], unanswered=1.1)
    assert choose_mitigations(runs, idle=["w1", "w2"], rates=EVEN, patience=SHARING) == (
        Share("a", ("a", "w1", "w2"), left=5.5),
    )


def test_within_its_time_nobody_wonders() -> None:
    assert choose_mitigations([run(14.9)], idle=["w1"], rates=EVEN, patience=PATIENCE) == ()
    assert choose_mitigations([run(15.1)], idle=["w1"], rates=EVEN, patience=PATIENCE) == (Ask("k"),)


def test_the_limit_grows_with_work_and_spread_and_one_slow_sample_does_not_move_it() -> None:
    assert limit(run(0, work=2.0), rates=EVEN, patience=PATIENCE) == 30.0
    wide = rates(6, 8, 10, 12, 14)
    assert limit(run(0), rates=wide, patience=PATIENCE) == pytest.approx(10 + 4 * 1.4826 * 2)
    assert limit(run(0), rates=rates(10, 10, 10, 10, 9999), patience=PATIENCE) == 15.0
    assert limit(run(0, work=0.01), rates=EVEN, patience=PATIENCE) == pytest.approx(3.1)


def test_too_few_samples_or_nobody_idle_decide_nothing() -> None:
    assert choose_mitigations([run(999)], idle=["w1"], rates=rates(10, 10), patience=PATIENCE) == ()
    assert choose_mitigations([run(999)], idle=[], rates=EVEN, patience=PATIENCE) == ()


def test_it_never_helps_itself() -> None:
    assert choose_mitigations([run(999, worker="w1")], idle=["w1"], rates=EVEN, patience=PATIENCE) == ()


def test_who_answers_slowly_is_asked_once_and_then_counts_as_frozen() -> None:
    assert choose_mitigations([run(20, unanswered=1.0)], idle=["w1"], rates=EVEN, patience=PATIENCE) == ()
    found = choose_mitigations([run(20, unanswered=3.1)], idle=["w1"], rates=EVEN, patience=PATIENCE)
    assert found == (Backup("k", ("w1",), 20),)


def test_an_old_answer_is_asked_for_anew() -> None:
    slow = run(20, **seen(10_000, 20))
    assert choose_mitigations([replace(slow, sight_age=4.0)], idle=["w1"], rates=EVEN, patience=PATIENCE) == (Ask("k"),)


def test_a_slow_one_is_cut_and_all_idle_ones_share_its_rest() -> None:
    found = choose_mitigations([run(20, **seen(10_000, 20))], idle=["w1", "w2", "w3"], rates=EVEN, patience=PATIENCE)
    assert found == (Cut("k", ("w1", "w2", "w3"), 180.0),)


def test_one_whose_batches_take_for_ever_gets_a_backup_or_is_divided() -> None:
    # One batch in 400 s; the next boundary is as far away.
    slow = run(400, **seen(30_000, 400, batches=1))
    assert isinstance(choose_mitigations([slow], idle=["w1"], rates=EVEN, patience=PATIENCE)[0], Backup)
    assert isinstance(choose_mitigations([slow], idle=["w1", "w2"], rates=EVEN, patience=PATIENCE)[0], Divide)


def test_a_frozen_one_is_divided_or_has_a_backup_when_it_is_too_small() -> None:
    frozen = run(20, unanswered=5.0)
    assert choose_mitigations([frozen], idle=["w1", "w2"], rates=EVEN, patience=PATIENCE) == (
        Divide("k", ("w1", "w2"), 20),
    )
    small = replace(frozen, rows=900)
    assert choose_mitigations([small], idle=["w1", "w2"], rates=EVEN, patience=PATIENCE) == (Backup("k", ("w1",), 20),)


def test_one_that_is_nearly_done_is_left_alone() -> None:
    assert choose_mitigations([run(40, **seen(95_000, 40))], idle=["w1", "w2"], rates=EVEN, patience=PATIENCE) == ()


def test_a_partition_is_helped_once() -> None:
    assert choose_mitigations([run(999, unanswered=9.0, copies=2)], idle=["w1"], rates=EVEN, patience=PATIENCE) == ()


def test_a_cut_that_does_not_come_is_given_up() -> None:
    slow = run(30, **seen(10_000, 20))
    assert choose_mitigations([replace(slow, cut_asked=6.9)], idle=["w1"], rates=EVEN, patience=PATIENCE) == ()
    late = choose_mitigations([replace(slow, cut_asked=7.1)], idle=["w1"], rates=EVEN, patience=PATIENCE)
    assert isinstance(late[0], Backup)


def test_two_slow_ones_share_the_idle_ones() -> None:
    slow = [run(400, key="a", unanswered=9.0), run(500, key="b", unanswered=9.0, worker="worse")]
    found = choose_mitigations(slow, idle=["w1"], rates=EVEN, patience=PATIENCE)
    assert found == (Backup("b", ("w1",), 500),)


def test_the_fastest_idle_worker_helps() -> None:
    mixed = PaceHistory((("w1", 10.0), ("w2", 4.0), ("w1", 10.0), ("w2", 4.0), ("w3", 10.0)))
    assert choose_mitigations(
        [run(99, rows=900, unanswered=9.0)], idle=["w1", "w2", "w3"], rates=mixed, patience=PATIENCE
    ) == (Backup("k", ("w2",), 99),)


def test_helpers_that_became_slow_too_are_no_help() -> None:
    # The median still says 1, but the idle worker took 60 for its last ones.
    slow = PaceHistory((*EVEN.samples, ("w9", 60.0), ("w9", 60.0), ("w9", 60.0)))
    assert choose_mitigations([run(20, unanswered=9.0)], idle=["w9"], rates=slow, patience=PATIENCE) == ()


def test_when_all_run_slowly_the_expectation_follows() -> None:
    few = rates(10, 10, 10)
    slow = [run(20, key=str(number), worker=f"s{number}") for number in range(4)]
    assert choose_mitigations(slow, idle=["w1"], rates=few, patience=PATIENCE) == ()
    assert choose_mitigations(slow[:1], idle=["w1"], rates=few, patience=PATIENCE) == (Ask("0"),)


def test_what_has_not_begun_though_others_are_idle_is_moved() -> None:
    assert choose_mitigations([run(4.9, worker="")], idle=["w1"], rates=PaceHistory(), patience=PATIENCE) == ()
    assert choose_mitigations([run(5.1, worker="")], idle=["w1"], rates=PaceHistory(), patience=PATIENCE) == (
        Reassign("k", ("w1",)),
    )


def test_old_samples_are_forgotten() -> None:
    found = rates(*[10.0] * WINDOW, *[50.0] * WINDOW)
    assert found.typical() == 50.0
    assert len(found.samples) == WINDOW


@given(
    st.lists(st.tuples(st.floats(0.01, 1e4), st.floats(0, 1e5), st.integers(0, 10**6), st.booleans()), max_size=8),
    st.lists(st.sampled_from(["w0", "w1", "w2", "w3"]), max_size=6),
    st.lists(st.floats(0.01, 1e4), max_size=12),
)
def test_actions_name_idle_threads_once_and_never_the_own_worker(
    figures: list[tuple[float, float, int, bool]], idle: list[str], seconds: list[float]
) -> None:
    runs = [
        run(elapsed, key=str(number), work=work, rows=rows, worker=f"w{number % 5}", unanswered=9.0 if frozen else None)
        for number, (work, elapsed, rows, frozen) in enumerate(figures)
    ]
    left = list(idle)
    for action in choose_mitigations(runs, idle=idle, rates=rates(*seconds), patience=PATIENCE):
        if isinstance(action, Ask):
            continue
        assert runs[int(action.key)].worker not in action.workers
        for name in action.workers:
            left.remove(name)
