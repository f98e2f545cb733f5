"""Make ``docs/faults.md``: the faults of ``docs/faults.yaml``, the tests marked with each, and measured times.

    python docs/make_faults.py [REPORT.xml …]

A report is the file that ``pytest -m fault --junitxml=REPORT.xml`` writes; its times are kept in ``docs/faults.json``.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import yaml

DOCS = Path(__file__).resolve().parent
TESTS = DOCS.parent / "tests"
PAGE = DOCS / "faults.md"
BEGIN = "<!-- faults:begin -->"
END = "<!-- faults:end -->"


@dataclass(frozen=True)
class Fault:
    """A row of the table."""

    number: int
    fault: str
    how: str
    outcome: str
    exit: str
    why: str = ""
    """Reason for a fault without a test; else empty."""


@dataclass(frozen=True)
class Measured:
    """Measured outcome and time of a test."""

    outcome: str
    """``passed``, ``failed`` or ``skipped: reason``."""
    seconds: float
    """Seconds over all parameters of the test."""


def read_faults() -> tuple[Fault, ...]:
    """Return all faults, by number."""
    rows = yaml.safe_load((DOCS / "faults.yaml").read_text())
    return tuple(Fault(number=number, **fields) for number, fields in sorted(rows.items()))


def marked_tests(tests: Path = TESTS) -> dict[int, list[str]]:
    """Map the number of a fault to the tests marked with it, as ``tests/faults/test_x.py::test_y``, from the source."""
    found: dict[int, list[str]] = {}
    for file in sorted(tests.rglob("test_*.py")):
        path = file.relative_to(tests.parent).as_posix()
        for name, numbers in _marks(ast.parse(file.read_text())):
            for number in numbers:
                found.setdefault(number, []).append(f"{path}::{name}")
    return found


def _marks(module: ast.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, _numbers(node.decorator_list)
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and inner.name.startswith("test"):
                    yield f"{node.name}::{inner.name}", _numbers([*node.decorator_list, *inner.decorator_list])
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            # A state machine's ``TestCase`` has no decorators: ``TestX.pytestmark = pytest.mark.fault(31)``.
            target = node.targets[0]
            if target.attr == "pytestmark" and isinstance(target.value, ast.Name):
                yield target.value.id, _numbers([node.value])


def _numbers(decorators: Sequence[ast.expr]) -> tuple[int, ...]:
    """Return the arguments of every ``fault(…)`` mark, including marks of single parameters."""
    calls = (node for one in decorators for node in ast.walk(one) if isinstance(node, ast.Call))
    marks = (call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "fault")
    numbers = (argument.value for mark in marks for argument in mark.args if isinstance(argument, ast.Constant))
    return tuple(sorted({number for number in numbers if isinstance(number, int)}))


def read_measured() -> dict[str, Measured]:
    """Return the stored measurement of each test."""
    path = DOCS / "faults.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    return {name: Measured(**row) for name, row in rows.items()}


def learn(report: Path, measured: dict[str, Measured]) -> None:
    """Add the results of a pytest report to ``measured``; several parameters of one test count as one."""
    cases: dict[str, list[ElementTree.Element]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        cases.setdefault(_test_name(case), []).append(case)
    for name, found in cases.items():
        outcomes = [_outcome(case) for case in found]
        worst = next((one for one in outcomes if one == "failed"), None)
        said = worst or next((one for one in outcomes if one == "passed"), outcomes[0])
        measured[name] = Measured(said, round(sum(float(case.get("time", 0)) for case in found), 1))


def _test_name(case: ElementTree.Element) -> str:
    parts = str(case.get("classname")).split(".")
    place = next(number for number, part in enumerate(parts) if part.startswith("test_"))
    inner = [*parts[place + 1 :], str(case.get("name")).split("[")[0]]
    return f"{'/'.join(parts[: place + 1])}.py::{'::'.join(inner)}"


def _outcome(case: ElementTree.Element) -> str:
    for child in case:
        if child.tag in ("failure", "error"):
            return "failed"
        if child.tag == "skipped":
            return f"skipped: {child.get('message')}"
    return "passed"


def table(faults: Sequence[Fault], tests: Mapping[int, Sequence[str]], measured: Mapping[str, Measured]) -> str:
    """Return the table, in Markdown."""
    lines = ["| # | fault | how it is made | outcome seen | exit | test | time |", "|--:|---|---|---|---|---|--:|"]
    for fault in faults:
        names = tests.get(fault.number, ())
        shown = "<br>".join(_link(name) + _remark(measured.get(_measured_name(name, measured))) for name in names)
        times = [measured[key].seconds for name in names if (key := _measured_name(name, measured)) in measured]
        time = f"{sum(times):,.1f} s" if times else ""
        lines.append(
            f"| {fault.number} | {fault.fault} | {fault.how} | {fault.outcome} | {fault.exit} "
            f"| {shown or f'none: {fault.why}'} | {time} |"
        )
    return "\n".join(lines)


def _measured_name(name: str, measured: Mapping[str, Measured]) -> str:
    """Return the name under which pytest reports a test: a state machine is one test, named by hypothesis."""
    return name if name in measured else f"{name}::runTest"


def _link(name: str) -> str:
    path, _, test = name.partition("::")
    return f"[{Path(path).stem}::{test}](../{path})"


def _remark(measured: Measured | None) -> str:
    return f" ({measured.outcome})" if measured and measured.outcome != "passed" else ""


def write_page(text: str, made: str) -> str:
    """Return ``text`` with the table between its marks replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main(reports: Sequence[str]) -> None:
    """Read the reports, then write the page."""
    measured = read_measured()
    for report in reports:
        learn(Path(report), measured)
    tests = marked_tests()
    named = {_measured_name(name, measured) for names in tests.values() for name in names}
    kept = {name: measured[name].__dict__ for name in sorted(named & measured.keys())}
    (DOCS / "faults.json").write_text(json.dumps(kept, indent=1) + "\n")
    PAGE.write_text(write_page(PAGE.read_text(), table(read_faults(), tests, measured)))


if __name__ == "__main__":
    main(sys.argv[1:])
