"""What the next job of a pool requests: shapes in order, growth after a kill, and what the site refuses."""

from __future__ import annotations

from pipeline.execution.clusters.requests import FIRST, REFUSED_SECONDS, Request, Requests, Shape

SMALL = Shape(slots=2, lifetimes=(1000.0, 1500.0, 2000.0), memory_steps=2)
LARGE = Shape(slots=8, lifetimes=(9000.0,))


def test_grows_once_for_all_jobs_of_a_size() -> None:
    requests = Requests((SMALL,))
    assert requests.grow(FIRST, memory=True) == Request(memory=1)
    assert requests.grow(FIRST, memory=True) is None, "killed for the size before"
    assert requests.next(now=0) == Request(memory=1)
    assert requests.grow(Request(memory=1), memory=True, walltime=True) == Request(memory=2, walltime=1)
    assert requests.grow(Request(memory=2, walltime=1), memory=True) is None, "at its limit"
    assert requests.lifetime(Request(memory=2, walltime=1)) == 1500
    assert Requests((LARGE,)).grow(FIRST, memory=True, walltime=True) is None


def test_a_refused_size_stays_below_the_site_s_limit() -> None:
    requests = Requests((SMALL,))
    grown = requests.grow(FIRST, memory=True)
    assert grown is not None
    assert requests.refused(grown, now=0)
    assert requests.next(now=0) == FIRST
    assert requests.grow(FIRST, memory=True) is None


def test_a_refused_shape_is_followed_by_the_next_and_tried_again_later() -> None:
    requests = Requests((SMALL, LARGE))
    assert requests.refused(FIRST, now=0)
    assert requests.next(now=1) == Request(1)
    assert not requests.refused(Request(1), now=1)
    assert requests.next(now=2) is None
    assert requests.next(now=REFUSED_SECONDS) == FIRST


def test_a_shape_that_waits_long_is_followed_by_the_next() -> None:
    requests = Requests((SMALL, LARGE))
    assert requests.next(late={0}, now=0) == Request(1)
    assert requests.next(late={0, 1}, now=0) == FIRST, "all wait: the first is as good as another"
