"""Draw charts as inline SVG: with a title, a unit, a text alternative and their data as a table.

Colours are names of CSS variables, which the page sets for light, dark and print. They are those of Okabe and Ito,
which colour-blind readers can tell apart (https://jfly.uni-koeln.de/color/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from pipeline.common.units import format_bytes, format_count, format_seconds
from pipeline.report.html.spans import Spans

WIDTH = 900
LEFT = 96
"""Pixels for the labels at the left."""
_RIGHT = 12
SHOWN_LANES = 40
"""Threads of workers in the timeline."""
SHOWN_ROWS = 200
"""Rows of a chart's table."""
BINS = 120
"""Intervals of time in the chart of rows per second."""
BARS = 40


@dataclass(frozen=True)
class Chart:
    """A chart, and its data as a table."""

    name: str
    """Id in the page."""
    title: str
    unit: str
    svg: Markup
    """Empty if there is nothing to draw."""
    text: str
    """Content of the picture in a sentence: its text alternative."""
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left_out: int = 0
    """Rows that the table does not have."""


def throughput(spans: Spans, marks: Sequence[tuple[float, str]]) -> Chart:
    """Draw input rows per second over time. A partition's rows count as spread evenly over its time.

    :param marks: times in seconds since the epoch, and what happened then.
    """
    begin, end = spans.begin, spans.end
    edges = np.linspace(begin, end, BINS + 1)
    length = np.maximum(spans.stops - spans.starts, 1e-3)
    done = np.array([float(np.sum(spans.rows * np.clip((edge - spans.starts) / length, 0.0, 1.0))) for edge in edges])
    rates = np.diff(done) / np.diff(edges)
    top = float(rates.max(initial=0.0)) or 1.0
    height, base = 180, 150
    x = LEFT + (edges - begin) / (end - begin) * (WIDTH - LEFT - _RIGHT)
    y = base - rates / top * (base - 14)
    steps = "".join(f"L{left:.1f} {level:.1f}H{right:.1f}" for left, right, level in zip(x, x[1:], y, strict=False))
    area = f'<path class="c1 area" d="M{x[0]:.1f} {base}{steps}V{base}Z"/>'
    lines = "".join(
        f'<path class="mark" d="M{LEFT + (time - begin) / (end - begin) * (WIDTH - LEFT - _RIGHT):.1f} 8V{base}">'
        f"<title>{escape(text)}</title></path>"
        for time, text in marks
        if begin <= time <= end
    )
    grid = _levels(top, base, 14, format_count)
    mean = float(spans.rows.sum()) / (end - begin)
    step = max(1, BINS // 30)
    return Chart(
        "throughput",
        "Throughput",
        "input rows per second",
        _svg(height, grid + area + lines + _time_axis(end - begin, base), "throughput"),
        f"{format_count(mean)} rows per second on average over {format_seconds(end - begin)}, "
        f"{format_count(top)} at the most",
        ("from", "rows per second"),
        tuple(
            (format_seconds(float(edges[n] - begin)), format_count(float(rates[n : n + step].mean())))
            for n in range(0, BINS, step)
        ),
    )


def timeline(spans: Spans) -> Chart:
    """Draw when each thread of each worker was at a partition. Partitions closer than a pixel are drawn as one."""
    lanes = spans.lanes()
    shown = lanes[:SHOWN_LANES]
    begin, length = spans.begin, spans.end - spans.begin
    scale = (WIDTH - LEFT - _RIGHT) / length
    row = 14 if len(shown) > 12 else 20
    body = []
    for number, (worker, parts) in enumerate(shown):
        top = 6 + number * row
        for style, chosen in (("c1", [p for p in parts if not p.rejected]), ("c2", [p for p in parts if p.rejected])):
            path = "".join(
                f"M{left:.1f} {top}h{right - left:.1f}v{row - 4}h{left - right:.1f}z"
                for left, right in _merged(
                    (LEFT + (part.start - begin) * scale, LEFT + (part.stop - begin) * scale) for part in chosen
                )
            )
            body.append(f'<path class="{style}" d="{path}"/>' if path else "")
        body.append(f'<text class="label" x="{LEFT - 6}" y="{top + row - 7}">{escape(_short(worker))}</text>')
    base = 6 + len(shown) * row
    more = len(lanes) - len(shown)
    busy = float(np.sum(spans.stops - spans.starts)) / (length * max(len(lanes), 1))
    slow = sorted(spans.parts, key=lambda part: part.start - part.stop)
    return Chart(
        "timeline",
        "Partitions by worker",
        "time since the first partition began; orange: with rejected rows",
        _svg(base + 26, "".join(body) + _time_axis(length, base), "timeline"),
        f"{len(spans.parts):,} partitions on {len(lanes):,} threads of workers, which were busy {busy:.0%} of the time"
        + (f"; {more:,} threads are not drawn" if more > 0 else ""),
        ("partition", "worker", "from", "seconds", "rows", "rejected"),
        tuple(
            (
                part.partition,
                part.worker,
                format_seconds(part.start - begin),
                f"{part.stop - part.start:.2f}",
                f"{part.rows:,}",
                f"{part.rejected:,}",
            )
            for part in slow[:SHOWN_ROWS]
        ),
        max(0, len(slow) - SHOWN_ROWS),
    )


def durations(spans: Spans) -> Chart:
    """Draw how many partitions took how long, with median, 95th percentile and the slowest."""
    seconds = spans.stops - spans.starts
    top = float(seconds.max(initial=0.0)) or 1.0
    counts, edges = np.histogram(seconds, bins=min(BARS, max(4, int(np.sqrt(len(seconds))) * 2)), range=(0.0, top))
    base, most = 130, int(counts.max())
    scale = (WIDTH - LEFT - _RIGHT) / top
    bars = "".join(
        f"M{LEFT + left * scale:.1f} {base}v-{count / most * (base - 24):.1f}h{(right - left) * scale - 1:.1f}V{base}z"
        for left, right, count in zip(edges, edges[1:], counts, strict=False)
        if count
    )
    middle, late = (float(np.quantile(seconds, part)) for part in (0.5, 0.95))
    marks = "".join(
        f'<path class="mark" d="M{LEFT + at * scale:.1f} 18V{base}"/>'
        f'<text class="note" x="{LEFT + at * scale:.1f}" y="13" text-anchor="{anchor}">{name}</text>'
        for name, at, anchor in (("median", middle, "middle"), ("95 %", late, "end" if late > top / 2 else "start"))
    )
    body = _levels(most, base, 24, format_count) + f'<path class="c1" d="{bars}"/>' + marks + _time_axis(top, base)
    return Chart(
        "durations",
        "Durations of partitions",
        "number of partitions by seconds",
        _svg(base + 26, body, "durations"),
        f"half of the partitions took up to {middle:.2f} s, 95 % up to {late:.2f} s, the slowest {top:.2f} s",
        ("seconds", "partitions"),
        tuple(
            (f"{left:.2f} to {right:.2f}", f"{count:,}")
            for left, right, count in zip(edges, edges[1:], counts, strict=False)
        ),
    )


def shares(title: str, unit: str, parts: Sequence[tuple[str, float, str]], *, name: str) -> Chart:
    """Draw one bar that is divided into parts.

    :param parts: name, value, and the value as text; in the order of colours.
    """
    total = sum(value for _, value, _ in parts) or 1.0
    width, left, body = WIDTH - 2, 1.0, []
    for number, (label, value, _) in enumerate(parts):
        if not value:
            continue
        # Two pixels at least: a few rejected rows of millions must be seen.
        long = max(2.0, value / total * width)
        body.append(f'<rect class="c{number + 1}" x="{left:.1f}" y="4" width="{long:.1f}" height="26"/>')
        if long > 8 * len(label) + 8:
            body.append(f'<text class="inside" x="{left + 6:.1f}" y="22">{escape(label)}</text>')
        left += long
    said = ", ".join(f"{label} {text}" for label, _, text in parts)
    return Chart(
        name,
        title,
        unit,
        _svg(34, "".join(body), name),
        said,
        ("part", unit, "share"),
        tuple((label, text, f"{value / total:.2%}") for label, value, text in parts),
    )


def memory(spans: Spans) -> Chart:
    """Draw the peak memory of each worker, largest first."""
    peaks: dict[str, int] = {}
    for part in spans.parts:
        peaks[part.worker] = max(part.peak_memory, peaks.get(part.worker, 0))
    ordered = sorted(peaks.items(), key=lambda pair: -pair[1])
    top = ordered[0][1] if ordered else 0
    body = "".join(
        f'<rect class="c1" x="{LEFT}" y="{6 + 20 * number}" height="14" '
        f'width="{peak / max(top, 1) * (WIDTH - LEFT - 90):.1f}"/>'
        f'<text class="label" x="{LEFT - 6}" y="{17 + 20 * number}">{escape(_short(worker))}</text>'
        f'<text class="note" x="{LEFT + 6 + peak / max(top, 1) * (WIDTH - LEFT - 90):.1f}" y="{17 + 20 * number}">'
        f"{format_bytes(peak)}</text>"
        for number, (worker, peak) in enumerate(ordered[:SHOWN_LANES])
    )
    more = max(0, len(ordered) - SHOWN_LANES)
    return Chart(
        "memory",
        "Peak memory of workers",
        "resident bytes",
        _svg(8 + 20 * min(len(ordered), SHOWN_LANES), body, "memory") if top else Markup(),
        f"the largest worker had {format_bytes(top)}" + (f"; {more:,} workers are not drawn" if more else ""),
        ("worker", "peak"),
        tuple((worker, format_bytes(peak)) for worker, peak in ordered[:SHOWN_ROWS]),
        max(0, len(ordered) - SHOWN_ROWS),
    )


def _svg(height: int, body: str, name: str) -> Markup:
    # All texts in ``body`` are escaped where they are put in.
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}-text">{body}</svg>')


def _merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Join spans of pixels that lie closer than a pixel and are narrower than two, and leave a gap between others."""
    joined: list[tuple[float, float]] = []
    for left, right in sorted(spans):
        if joined and left - joined[-1][1] < 1.0 and min(right - left, joined[-1][1] - joined[-1][0]) < 2.0:
            joined[-1] = (joined[-1][0], max(right, joined[-1][1]))
        else:
            joined.append((left, right))
    return [(left, max(left + 1.0, right - 1.0)) for left, right in joined]


def _time_axis(seconds: float, base: float) -> str:
    """Draw an axis of time from 0 to ``seconds``."""
    step = _step(seconds)
    places = np.arange(0, seconds + step * 1e-6, step)
    return f'<path class="axis" d="M{LEFT} {base}H{WIDTH - _RIGHT}"/>' + "".join(
        f'<text class="note" text-anchor="middle" x="{LEFT + place / seconds * (WIDTH - LEFT - _RIGHT):.1f}" '
        f'y="{base + 16}">{format_seconds(float(place)) if place else "0"}</text>'
        for place in places
    )


def _levels(top: float, base: float, above: float, text: Callable[[float], str]) -> str:
    """Draw lines for 0, a half and the whole of ``top``."""
    return "".join(
        f'<path class="grid" d="M{LEFT} {base - part * (base - above):.1f}H{WIDTH - _RIGHT}"/>'
        f'<text class="label" x="{LEFT - 6}" y="{base - part * (base - above) + 4:.1f}">{text(top * part)}</text>'
        for part in (0.0, 0.5, 1.0)
    )


_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14_400, 21_600, 43_200, 86_400)


def _step(seconds: float) -> float:
    """Return the seconds between two labels of an axis, of which there are 4 to 9."""
    return next((step for step in _STEPS if seconds / step <= 9), seconds / 8)


def _short(worker: str) -> str:
    return worker if len(worker) <= 14 else f"…{worker[-13:]}"
