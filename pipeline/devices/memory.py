"""Compute the device memory of a batch, and the rows of a batch from the free memory. Pure: figures in, figures out.

::

    row    = 4 × features + 8 × outputs
    model  = 20 × nodes + 150 × trees
    device = context + model + threads × rows × row

- 4 × features: the float32 matrix. 8 × outputs: xgboost's own result, and the copy of it that the caller gets.
- A node of xgboost's trees on the device has 20 bytes; 150 bytes a tree are for its description (from its sources,
  not measured).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.common.units import parse_bytes
from pipeline.errors import SpecError

CONTEXT_BYTES = 512 << 20
"""Device memory of a process before it allocates anything (assumed, not measured)."""
MAX_BATCH_ROWS = 1 << 18
"""Largest number of rows of a batch: about as many as a large card scores at a time."""
MIN_BATCH_ROWS = 1024
"""Smallest number of rows of a batch: fewer are not tried after memory ran short."""
GROW_AFTER = 64
"""Batches in a row that must fit before the next one is made larger."""
DEVICE_MEMORY = 0.8
"""Share of the free memory that batches may use, if nothing else is said."""
_NODE_BYTES = 20
_TREE_BYTES = 150


def device_row_bytes(*, features: int, outputs: int) -> int:
    """Return the bytes of device memory of one row of a batch.

    :param features: columns of the float32 matrix.
    :param outputs: values of a margin.
    """
    return 4 * features + 8 * outputs


def device_model_bytes(*, nodes: int, trees: int) -> int:
    """Return the bytes of device memory of a model of ``trees`` trees with ``nodes`` nodes in all."""
    return _NODE_BYTES * nodes + _TREE_BYTES * trees


def projected_device_memory(*, batch_rows: int, row_bytes: int, threads: int, model: int) -> int:
    """Return the bytes of device memory of a process while each of its threads scores a batch.

    :param row_bytes: result of `device_row_bytes`.
    :param model: result of `device_model_bytes`.
    """
    return CONTEXT_BYTES + model + max(threads, 1) * batch_rows * row_bytes


def allowed_device_memory(value: float | int | str, *, free: int) -> int:
    """Return the bytes of ``free`` bytes that batches may use.

    :param value: a share such as 0.8, or a size such as ``40 GiB``; more than ``free`` is never allowed.
    :raises SpecError: for anything else.
    """
    share = _share(value)
    if share is None:
        return min(free, parse_bytes(value if isinstance(value, str) else int(value)))
    if 0 < share <= 1:
        return int(share * free)
    raise SpecError(
        "invalid device memory", where="device_memory", found=str(value), expected="a share such as 0.8, or a size"
    )


def _share(value: float | int | str) -> float | None:
    """Return the share that a number without a unit is; None for a size."""
    try:
        number = float(value)
    except ValueError:
        return None
    is_size = isinstance(value, int) and number > 1
    return None if is_size else number


def device_batch_rows(
    *, allowed: int, row_bytes: int, threads: int, floor: int = MIN_BATCH_ROWS, ceiling: int = MAX_BATCH_ROWS
) -> int:
    """Return the rows of a batch: the largest power of two with which each thread's batch fits into ``allowed`` bytes.

    :param allowed: result of `allowed_device_memory`.
    :param row_bytes: result of `device_row_bytes`.
    :param threads: threads that score at the same time.
    :returns: at least ``floor``, even if that does not fit, and at most ``ceiling``.
    """
    fitting = allowed // (max(threads, 1) * max(row_bytes, 1))
    return max(floor, min(ceiling, 1 << max(int(fitting).bit_length() - 1, 0)))


@dataclass(frozen=True)
class DeviceBatchLimit:
    """The largest batch of one device, learned from the batches that fitted and those that did not."""

    rows: int
    ceiling: int
    """Upper limit of ``rows``."""
    floor: int = MIN_BATCH_ROWS
    """Lower limit of ``rows``."""
    fitted: int = 0
    """Number of consecutive batches of ``rows`` rows that fitted."""

    @property
    def is_smallest(self) -> bool:
        """True if ``rows`` cannot be halved any more."""
        return self.rows <= self.floor

    def after_fit(self, rows: int) -> DeviceBatchLimit:
        """Return the limit after a batch of ``rows`` rows fitted: twice as large after `GROW_AFTER` full batches."""
        if rows < self.rows or self.rows >= self.ceiling:
            return self
        if self.fitted + 1 < GROW_AFTER:
            return replace(self, fitted=self.fitted + 1)
        return replace(self, rows=min(self.ceiling, 2 * self.rows), fitted=0)

    def after_out_of_memory(self, rows: int) -> DeviceBatchLimit:
        """Return the limit after a batch of ``rows`` rows did not fit: half of it, or less if another batch shrank."""
        return replace(self, rows=max(self.floor, min(self.rows, rows // 2)), fitted=0)
