"""Imports without garbage collection."""

from __future__ import annotations

import gc

import pytest

from pipeline.common.imports import frozen_imports


def test_objects_made_inside_are_frozen() -> None:
    before = gc.get_freeze_count()
    try:
        with frozen_imports():
            assert not gc.isenabled()
            made = [[number] for number in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(made)
    finally:
        gc.unfreeze()


def test_a_collector_that_was_off_stays_off_and_an_error_comes_through() -> None:
    gc.disable()
    try:
        with pytest.raises(ImportError), frozen_imports():
            raise ImportError
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
