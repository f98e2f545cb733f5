"""Memory that runs short on a real GPU: batches are halved, and the errors of libraries are told apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pipeline.devices.failures import DeviceFailure, classify_device_error
from pipeline.devices.inventory import Gpu
from pipeline.errors import DeviceOutOfMemory
from pipeline.models.flavors.xgboost_device import open_device, score

pytestmark = pytest.mark.gpu
cupy: Any = pytest.importorskip("cupy")


@pytest.fixture
def pool() -> Iterator[Any]:
    """cupy's pool; without a limit, and empty, afterwards."""
    pool = cupy.get_default_memory_pool()
    yield pool
    pool.set_limit(size=0)
    open_device().release()


def test_batches_are_halved_until_they_fit(pool: Any, gpu: Gpu) -> None:
    from tests.gpu.test_bits import FEATURES, make_matrix, put, train

    reference, on_gpu = put(train(), gpu)
    matrix, before = make_matrix(200_000), on_gpu.limit.rows
    pool.free_all_blocks()
    pool.set_limit(size=pool.used_bytes() + 30_000 * 4 * FEATURES)
    found = on_gpu.predict(matrix, kind="margin")
    assert found.tobytes() == reference.predict(matrix, kind="margin").tobytes()
    assert on_gpu.limit.rows < before
    assert on_gpu.peak > 0


def test_smallest_batch_that_does_not_fit_is_an_error(pool: Any, gpu: Gpu) -> None:
    from tests.gpu.test_bits import make_matrix, put, train

    _, on_gpu = put(train(), gpu)
    pool.free_all_blocks()
    pool.set_limit(size=max(1, pool.used_bytes()))
    with pytest.raises(DeviceOutOfMemory, match="however small it is cut"):
        on_gpu.predict(make_matrix(5000), kind="margin")


def test_errors_of_libraries_are_told_apart(pool: Any, gpu: Gpu) -> None:
    """By their real texts: cupy's own, and xgboost's on a card that others have filled."""
    from tests.gpu.test_bits import _margins_of, make_matrix, train

    with pytest.raises(Exception, match=r"(?i)memory") as error:
        cupy.empty(2 * gpu.memory, np.uint8)
    assert classify_device_error(error.value) is DeviceFailure.MEMORY
    booster, matrix = open_device().booster(bytes(train().save_raw("ubj"))), make_matrix(1 << 20)
    score(open_device(), _margins_of(booster), matrix[:1000])
    upload = open_device().upload(*matrix.shape)
    upload.send(0, matrix.shape[1])
    held = list(_fill())
    with pytest.raises(Exception, match=r"(?i)memory|alloc") as error:
        _score_often(upload, _margins_of(booster))
    assert classify_device_error(error.value) is DeviceFailure.MEMORY
    del held


def _fill() -> Iterator[Any]:
    """Yield allocations until less than a MiB is free."""
    for size in (1 << 30, 1 << 24, 1 << 20):
        while open_device().memory().free > size:
            try:
                yield cupy.cuda.alloc(size)
            except MemoryError:
                break


def _score_often(upload: Any, predict: Any) -> None:
    for _ in range(64):
        upload.score(predict)
