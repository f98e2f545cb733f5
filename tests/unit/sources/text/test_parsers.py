"""Cells and lines that cannot be read are found one by one; all other rows are read as without them."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import CorruptInput, SchemaDrift, SpecError
from pipeline.sources.text.csv_parser import CsvParser
from pipeline.sources.text.json_parser import JsonLinesParser
from pipeline.sources.text.parser import Parsed, Parser
from pipeline.spec.parts import CsvOptions


def csv_parser(types: dict[str, str] | None = None, **options: Any) -> CsvParser:
    return CsvParser(CsvOptions.model_validate(options), types or {})


def parse(parser: Parser, data: bytes) -> Parsed:
    schema = parser.infer(data, path="f")
    return parser.parse(data[parser.body(data) :], schema, parser.names(data))


def failures(parsed: Parsed) -> list[tuple[int, str, str]]:
    problems = [(one.row, one.problem(1)) for one in parsed.unreadable]
    return [(row, problem.reason, problem.message) for row, problem in problems]


def test_types_come_from_values_unless_given() -> None:
    data = b"a,b,c,d,e\n1,1.5,x,2020-01-01,\n2,2,007,2021-01-01,\n"
    assert csv_parser().infer(data, path="f").types == [
        pa.int64(), pa.float64(), pa.string(), pa.date32(), pa.string()
    ]  # fmt: skip
    given = csv_parser({"a": "float32", "e": "decimal128(10, 2)", "c": "string"}).infer(data, path="f")
    assert (given.field("a").type, given.field("e").type) == (pa.float32(), pa.decimal128(10, 2))


def test_cells_that_do_not_convert() -> None:
    parsed = parse(
        csv_parser({"n": "int64", "x": "float64", "b": "bool"}),
        b'n,t,x,b\n1,a,1.5,true\nx,"q ""z""",2,false\n3,,y,maybe\n,"",,\n5,b,nan,1\n',
    )
    assert failures(parsed) == [
        (1, "cell:n:int64", "line 1, column 'n': 'x' is no int64"),
        (2, "cell:x:double", "line 1, column 'x': 'y' is no double"),
    ]
    assert parsed.table.column("n").to_pylist() == [1, None, 3, None, 5]
    assert parsed.table.column("t").to_pylist() == ["a", 'q "z"', None, "", "b"]
    assert parsed.table.column("b").to_pylist() == [True, False, None, None, True]


def test_a_bad_cell_changes_no_other_row() -> None:
    """The slow way gives the same values as pyarrow at once, for every kind of column."""
    rng = random.Random(3)
    rows = [f"{rng.randint(-9, 9)},{rng.random():.3f},2020-01-0{rng.randint(1, 9)},{rng.choice(['', 'NA', 't'])}"
            for _ in range(200)]  # fmt: skip
    header, parser = "i,f,d,s\n", csv_parser(nulls=("NA", ""))
    good = parse(parser, (header + "\n".join(rows)).encode()).table
    for place in (0, 77, 199):
        bad = [*rows[:place], "!,?,#,t", *rows[place + 1 :]]
        parser = csv_parser({"i": "int64", "f": "float64", "d": "date32"}, nulls=("NA", ""))
        parsed = parse(parser, (header + "\n".join(bad)).encode())
        assert [one.row for one in parsed.unreadable] == [place]
        for part in (slice(0, place), slice(place + 1, 200)):
            assert parsed.table.slice(part.start, part.stop - part.start).to_pylist() == good.to_pylist()[part]


def test_ragged_lines_and_bad_cells_together() -> None:
    parsed = parse(csv_parser({"a": "int64", "b": "int64"}), b"a,b\n1,2\n3\nx,4\n5,6,7\n8,y\n9,10")
    assert [reason for _, reason, _ in failures(parsed)] == [
        "line:columns", "cell:a:int64", "line:columns", "cell:b:int64"
    ]  # fmt: skip
    assert [row for row, _, _ in failures(parsed)] == [1, 2, 3, 4]
    assert failures(parsed)[0][2] == "line 1: 1 cells, not 2"
    assert parsed.table.column("a").to_pylist() == [1, None, None, None, 8, 9]


def test_bytes_that_are_not_utf8() -> None:
    parsed = parse(csv_parser({"a": "string", "b": "int64"}), b"a,b\nok,1\n\xff\xfe,2\n")
    assert failures(parsed) == [(1, "cell:a:string", "line 1, column 'a': '\\\\xff\\\\xfe' is no string")]


@pytest.mark.parametrize(
    ("options", "data", "expected"),
    [
        ({"delimiter": ";", "quote": "'", "escape": "\\"}, b"a;b\n1;'x;y'\n2;l\\;m\n", [(1, "x;y"), (2, "l;m")]),
        ({"quote": None, "header": ("a", "b")}, b'1,x"y\n', [(1, 'x"y')]),
        ({"header": False}, b"1,x\n", [(1, "x")]),
        ({"delimiter": "\t"}, b"\xef\xbb\xbfa\tb\r\n1\tx\r\n", [(1, "x")]),
    ],
)
def test_dialects(options: dict[str, Any], data: bytes, expected: list[tuple[int, str]]) -> None:
    table = parse(csv_parser(**options), data).table
    assert list(zip(*(column.to_pylist() for column in table.columns), strict=True)) == expected


def test_mistakes_in_headers_and_types() -> None:
    with pytest.raises(SchemaDrift, match="two columns of the same name"):
        csv_parser().infer(b"a,a\n1,2\n", path="f")
    with pytest.raises(SpecError, match="a column that the files do not have"):
        csv_parser({"z": "int64"}).infer(b"a\n1\n", path="f")
    with pytest.raises(SpecError, match="a type of the source is unknown"):
        csv_parser({"a": "integer"})
    with pytest.raises(CorruptInput, match="damaged, or of another format"):
        csv_parser().infer(b"", path="f")


def test_json_lines() -> None:
    lines = ['{"a":1,"b":"x","c":[1,2]}', '{"a":"q"}', "nope", "", '{"b":null,"z":5}', "[1]", '{"a":2} {"a":3}']
    parsed = parse(JsonLinesParser({"a": "int64"}), "\n".join(lines).encode())
    assert failures(parsed) == [
        (1, "cell:a:int64", "line 1, column 'a': '\"q\"' is no int64"),
        (2, "line:json", "line 1: 'nope' is no JSON object"),
        (4, "line:json", "line 1: '[1]' is no JSON object"),
        (5, "line:json", 'line 1: \'{"a":2} {"a":3}\' is no JSON object'),
    ]
    assert parsed.table.column("a").to_pylist() == [1, None, None, None, None, None]
    assert parsed.table.column("c").to_pylist()[0] == [1, 2]
    assert parsed.table.column("z").to_pylist() == [None, None, None, 5, None, None]


def test_json_types() -> None:
    schema = JsonLinesParser({"new": "string"}).infer(b'{"a":1.5,"n":null,"s":{"x":null}}\n', path="f")
    assert schema.field("n").type == pa.string()
    assert schema.field("s").type == pa.struct([("x", pa.string())])
    assert schema.names == ["new", "a", "n", "s"] or schema.names == ["a", "n", "s", "new"]
    with pytest.raises(CorruptInput, match="damaged, or of another format"):
        JsonLinesParser({}).infer(b"a,b\n1,2\n", path="f")
