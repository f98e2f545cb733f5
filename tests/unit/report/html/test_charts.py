from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from pipeline.report.html import charts
from pipeline.report.html.spans import Span, Spans

SPACE = "{http://www.w3.org/2000/svg}"


def spans(count: int = 50, *, worker: str = "host:1", rejected: int = 0) -> Spans:
    random = np.random.default_rng(count)
    starts = np.sort(random.random(count)) * 100
    return Spans(
        tuple(
            Span(f"{n:05d}", f"{worker}{n % 3}", 1e9 + start, 1e9 + start + length, 1000, rejected, 10**8 * (n % 3 + 1))
            for n, (start, length) in enumerate(zip(starts, 1 + random.random(count) * 5, strict=True))
        )
    )


def parsed(chart: charts.Chart) -> ElementTree.Element:
    return ElementTree.fromstring(str(chart.svg))


@pytest.mark.parametrize("count", [1, 2, 50, 3000])
def test_every_chart_is_well_formed_and_inside_its_picture(count):
    given = spans(count, rejected=1)
    drawn = [charts.throughput(given, [(1e9 + 50, "a & b")]), charts.timeline(given), charts.durations(given)]
    drawn += [charts.memory(given), charts.shares("t", "u", [("a", 1.0, "1"), ("b", 0.0, "0")], name="s")]
    for chart in drawn:
        root = parsed(chart)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for path in root.iter("path"):
            places = [float(x) for x in re.findall(r"[MLH](-?[\d.]+)", path.attrib["d"])]
            assert all(0 <= place <= width + 1 for place in places)
        for rect in root.iter("rect"):
            assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width + 3
            assert float(rect.attrib["y"]) + float(rect.attrib["height"]) <= height
        assert root.attrib["role"] == "img"
        assert chart.text
        assert chart.rows
        assert all(len(row) == len(chart.header) for row in chart.rows)


def test_the_area_under_the_throughput_is_all_rows():
    given = spans(50)
    path = next(path for path in parsed(charts.throughput(given, [])).iter("path") if "area" in path.attrib["class"])
    points = re.findall(r"L([\d.]+) ([\d.]+)H([\d.]+)", path.attrib["d"])
    area = sum((float(right) - float(left)) * (150 - float(level)) for left, level, right in points)
    top = float(re.search(r"([\d,]+) at the most", charts.throughput(given, []).text)[1].replace(",", ""))
    seconds_a_pixel = (given.end - given.begin) / (charts.WIDTH - charts.LEFT - 12)
    assert area * seconds_a_pixel * top / 136 == pytest.approx(50_000, rel=0.01)


def test_a_few_rejected_rows_of_millions_are_seen():
    chart = charts.shares("rows", "rows", [("output", 9e6, "9,000,000"), ("rejected", 1.0, "1")], name="rows")
    assert min(float(rect.attrib["width"]) for rect in parsed(chart).iter("rect")) == 2.0


def test_partitions_with_rejected_rows_have_another_colour():
    some = Spans(tuple(sorted((*spans(3).parts, *spans(2, rejected=7).parts), key=lambda part: part.start)))
    classes = {path.attrib["class"] for path in parsed(charts.timeline(some)).iter("path")}
    assert {"c1", "c2"} <= classes
    assert "c2" not in {path.attrib["class"] for path in parsed(charts.timeline(spans(5))).iter("path")}


def test_names_of_workers_are_escaped():
    chart = charts.timeline(spans(3, worker="<b>&"))
    assert "<b>&amp;" not in str(chart.svg)
    assert "&lt;b&gt;&amp;" in str(chart.svg)


def test_tables_and_lanes_are_bounded():
    many = Spans(tuple(Span(str(n), f"w{n}", float(n), n + 1.5, 10, 0, 1) for n in range(1000)))
    chart = charts.timeline(many)
    assert (len(chart.rows), chart.left_out) == (charts.SHOWN_ROWS, 1000 - charts.SHOWN_ROWS)
    assert "960 threads are not drawn" in chart.text


def test_durations_name_median_and_slowest():
    given = Spans(tuple(Span(str(n), "w", 0.0, float(n + 1), 1, 0, 1) for n in range(100)))
    assert charts.durations(given).text == (
        "half of the partitions took up to 50.50 s, 95 % up to 95.05 s, the slowest 100.00 s"
    )
    counts = sum(int(count.replace(",", "")) for _, count in charts.durations(given).rows)
    assert counts == 100
