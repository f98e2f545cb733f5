"""docs/faults.md names every fault, with the tests marked with each."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs import make_faults

NUMBERS = range(1, 118)


def test_every_fault_has_a_test_or_a_reason() -> None:
    faults = make_faults.read_faults()
    assert [fault.number for fault in faults] == list(NUMBERS)
    tests = make_faults.marked_tests()
    assert set(tests) <= set(NUMBERS), "a test is marked with a fault that is not there"
    without = [fault.number for fault in faults if not tests.get(fault.number) and not fault.why]
    assert without == [], "faults without a test, and without a reason"
    needless = [fault.number for fault in faults if tests.get(fault.number) and fault.why]
    assert needless == [], "faults that have both a test and a reason for none"


def test_the_readme_counts_the_faults() -> None:
    readme = make_faults.DOCS.parent.joinpath("README.md").read_text()
    assert f"[{len(make_faults.read_faults())} faults](docs/faults.md)" in readme


def test_the_page_names_the_tests_there_are() -> None:
    page = make_faults.PAGE.read_text()
    shown = {number: re.findall(r"\[(\w+(?:::\w+)+)\]", row) for number, row in rows(page).items()}
    marked = {
        number: [f"{Path(path).stem}::{name}" for path, _, name in (one.partition("::") for one in names)]
        for number, names in make_faults.marked_tests().items()
    }
    assert {number: names for number, names in shown.items() if names} == marked, "run: python docs/make_faults.py"


def rows(page: str) -> dict[int, str]:
    return {int(row.split("|")[1]): row for row in page.splitlines() if re.match(r"\| \d+ \|", row)}


def test_marks_are_found_wherever_they_are(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_x.py").write_text(
        "@pytest.mark.fault(1, 2)\ndef test_a(): ...\n"
        "@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.fault(3))])\ndef test_b(x): ...\n"
        "class TestC:\n    @pytest.mark.fault(1)\n    def test_d(self): ...\n"
        "TestE.pytestmark = [pytest.mark.fault(4)]\n"
        "def test_f(): ...\n"
    )
    path = "tests/test_x.py"
    assert make_faults.marked_tests(tmp_path / "tests") == {
        1: [f"{path}::test_a", f"{path}::TestC::test_d"],
        2: [f"{path}::test_a"],
        3: [f"{path}::test_b"],
        4: [f"{path}::TestE"],
    }


def test_reports_are_added_up(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.faults.test_x" name="test_a[1]" time="1.5"/>'
        '<testcase classname="tests.faults.test_x" name="test_a[2]" time="2"><skipped message="no root"/></testcase>'
        '<testcase classname="tests.faults.test_x.TestE" name="runTest" time="3"><failure/></testcase>'
        '<testcase classname="tests.faults.test_y" name="test_b" time="0"><skipped message="no root"/></testcase>'
        "</testsuite></testsuites>"
    )
    measured: dict[str, make_faults.Measured] = {}
    make_faults.learn(report, measured)
    assert measured == {
        "tests/faults/test_x.py::test_a": make_faults.Measured("passed", 3.5),
        "tests/faults/test_x.py::TestE::runTest": make_faults.Measured("failed", 3.0),
        "tests/faults/test_y.py::test_b": make_faults.Measured("skipped: no root", 0.0),
    }
    faults = [make_faults.Fault(1, "a", "b", "c", "0"), make_faults.Fault(2, "d", "e", "f", "0", "no such thing here")]
    tests = {1: ["tests/faults/test_x.py::test_a", "tests/faults/test_x.py::TestE"]}
    made = make_faults.table(faults, tests, measured).splitlines()[2:]
    assert "test_x::TestE](../tests/faults/test_x.py) (failed) | 6.5 s |" in made[0]
    assert made[1] == "| 2 | d | e | f | 0 | none: no such thing here |  |"


def test_the_mark_is_known(request: pytest.FixtureRequest) -> None:
    assert any(line.startswith("fault(") for line in request.config.getini("markers"))


def test_tests_of_one_fault_are_selected() -> None:
    number, path = 12, "tests/faults/test_drivers.py"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
            "--fault",
            str(number),
            path,
        ],
        cwd=make_faults.TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    expected = {name for name in make_faults.marked_tests()[number] if name.startswith(path)}
    assert expected, "there is a test of that fault in that file"
    assert {line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line} == expected
