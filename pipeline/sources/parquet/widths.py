"""Measure the decoded width of columns whose values have no fixed width.

The bytes in a footer are those of encoded values. Repeating texts are encoded as numbers into a dictionary: 3,236 bytes
of a decoded row took 10 encoded bytes (measured). Memory holds decoded values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.sources.parquet.footer_guard import decoded_widths
from pipeline.sources.parquet.footers import Footer
from pipeline.storage.urls import is_local_path

MOST_BYTES = 1 << 26
"""Encoded bytes of a row from which on no row is decoded: the encoded bytes are projected as they are."""


def with_decoded_widths(footers: tuple[Footer, ...], *, columns: Sequence[str]) -> tuple[Footer, ...]:
    """Return ``footers`` with the widths of columns without a fixed width, measured on a few row groups.

    A column has the largest mean width of all sampled row groups, so that the projection is an upper bound.

    :param columns: columns to measure; unknown ones are ignored.
    """
    widths: dict[str, float] = {}
    for footer, group in _samples(footers):
        fixed = dict(zip(footer.names, footer.widths.tolist(), strict=True))
        names = [name for name in columns if fixed.get(name) == 0.0]
        if names and footer.totals[group] <= MOST_BYTES * footer.rows[group]:
            measured = decoded_widths(footer.file.path, group, names)
            widths |= {name: max(width, widths.get(name, 0.0)) for name, width in zip(names, measured, strict=True)}
    if not widths:
        return footers
    shared: dict[tuple[str, ...], np.ndarray] = {}
    return tuple(replace(footer, widths=_widened(footer, widths, shared)) for footer in footers)


def _samples(footers: Sequence[Footer]) -> list[tuple[Footer, int]]:
    """Return row groups to sample: the first and the last of three files; of remote files the first only."""
    filled = [
        (footer, groups)
        for number in sorted({0, len(footers) // 2, len(footers) - 1} if footers else ())
        for footer in [footers[number]]
        if (
            groups := [group for group, is_selected in enumerate(footer.selected) if is_selected and footer.rows[group]]
        )
    ]
    return [
        (footer, group)
        for footer, groups in filled
        for group in sorted({groups[0], groups[-1]} if is_local_path(footer.file.path) else {groups[0]})
    ]


def _widened(footer: Footer, widths: dict[str, float], shared: dict[tuple[str, ...], np.ndarray]) -> np.ndarray:
    if footer.names not in shared:
        measured = np.array([widths.get(name, 0.0) for name in footer.names])
        shared[footer.names] = np.where(footer.widths > 0, footer.widths, measured)
    return shared[footer.names]
