"""Bad input through the command line: one screen with the problem, the exit code, and nothing written."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result

from pipeline.cli import main
from pipeline.sources import discover, read_batches, selected_fragments
from pipeline.spec.parts import Source
from pipeline.testing.oracle import make_table, train_model

SCREEN_LINES = 20
"""A message is read in one go: about half of a small terminal."""
Listing = dict[str, tuple[int, int]]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return train_model(tmp_path_factory.mktemp("small") / "model.json", rounds=2).read_bytes()


@pytest.fixture
def folder(in_folder: Path, small_model: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a table, a model and a job that would run."""
    (in_folder / "work" / "lake").mkdir(parents=True)
    work = in_folder / "work"
    monkeypatch.chdir(work)
    (work / "model.json").write_bytes(small_model)
    pq.write_table(make_table(60, seed=1), work / "lake" / "a.parquet", row_group_size=20)
    return work


def spec(**changes: Any) -> dict[str, Any]:
    fields = {
        "name": "churn",
        "source": {"path": "lake"},
        "steps": [{"score": {"model": "model.json"}}],
        "sink": {"path": "out"},
    }
    return {**fields, **changes}


def score(**fields: Any) -> list[dict[str, Any]]:
    return [{"score": {"model": "model.json", **fields}}]


def listing(folder: Path) -> Listing:
    """Every file and folder, with what would tell that it was touched."""
    found = {str(path): path.lstat() for path in folder.parent.rglob("*") if "__pycache__" not in path.parts}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), prog_name="python -m pipeline")


def refused(
    folder: Path, job: dict[str, Any] | str, *, code: int, command: str = "run", args: tuple[str, ...] = ()
) -> str:
    """Run the job, which must be refused with ``code`` and leave every file alone; the message."""
    path = folder / "job.yaml"
    path.write_text(job if isinstance(job, str) else yaml.safe_dump(job, sort_keys=False, allow_unicode=True))
    before = listing(folder)
    result = call(command, "job.yaml", *args)
    assert result.exit_code == code, result.output
    assert listing(folder) == before, "something was written"
    message = result.stderr
    assert result.stdout == ""
    assert "defect" not in message
    assert "Traceback" not in message
    assert len(message.splitlines()) <= SCREEN_LINES, message
    return message


def assert_explained(message: str, *, where: str, says: str) -> None:
    """The message has every part a person acts on."""
    parts = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in message.splitlines() if ":" in line}
    for part in ("where", "found", "expected", "next"):
        assert parts.get(part), f"no {part!r} in:\n{message}"
    assert where in parts["where"], message
    assert says in message, message


# What the source may be


def text_file(folder: Path) -> None:
    (folder / "lake" / "b.parquet").write_text("id,age\n1,2\n")


def empty_file(folder: Path) -> None:
    (folder / "lake" / "b.parquet").write_bytes(b"")


def half_file(folder: Path) -> None:
    whole = (folder / "lake" / "a.parquet").read_bytes()
    (folder / "lake" / "b.parquet").write_bytes(whole[: len(whole) // 2])


def replace_table(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        path = folder / "lake" / "a.parquet"
        pq.write_table(change(pq.read_table(path)), path)

    return prepare


def add_table(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        pq.write_table(change(pq.read_table(folder / "lake" / "a.parquet")), folder / "lake" / "b.parquet")

    return prepare


def with_column(name: str, values: pa.Array) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(name), name, values)


SIXTY_WORDS = pa.array(["x"] * 60)


@pytest.mark.parametrize(
    ("prepare", "source", "where", "says"),
    [
        (lambda folder: None, "lakes", "lakes", "did you mean lake?"),
        (lambda folder: (folder / "empty").mkdir(), "empty", "empty", "no file"),
        (lambda folder: None, "lake/*.csv", "*.csv", "no file matches"),
        (text_file, "lake", "lake/b.parquet", "not a Parquet file"),
        (empty_file, "lake", "lake/b.parquet", "is empty"),
        (half_file, "lake", "lake/b.parquet", "truncated"),
        (replace_table(lambda t: t.drop(["balance"])), "lake", "lake/a.parquet", "balance"),
        (replace_table(with_column("age", SIXTY_WORDS)), "lake", "lake/a.parquet", "string"),
        (add_table(with_column("age", SIXTY_WORDS)), "lake", "lake/b.parquet", "column 'age' of type string"),
        (add_table(with_column("age", pa.array([1.5] * 60))), "lake", "lake/b.parquet", "column 'age' of type double"),
        (add_table(lambda t: t.drop(["name"])), "lake", "lake/b.parquet", "'name'"),
        (add_table(lambda t: t.append_column("more", SIXTY_WORDS)), "lake", "lake/b.parquet", "'more'"),
    ],
    ids=[
        "missing path", "empty folder", "no match", "no parquet", "empty file", "truncated", "missing feature",
        "wrong dtype", "drift: text", "drift: fraction", "drift: missing", "drift: extra",
    ],
)  # fmt: skip
@pytest.mark.fault(39)
def test_a_source_that_cannot_be_scored(
    folder: Path, prepare: Callable[[Path], None], source: str, where: str, says: str
) -> None:
    prepare(folder)
    message = refused(folder, spec(source={"path": source}), code=4)
    assert_explained(message, where=where, says=says)
    assert refused(folder, spec(source={"path": source}), code=4, command="plan") == message


@pytest.mark.fault(25, 39)
def test_harmless_schema_differences_run(folder: Path) -> None:
    """Another order of columns, and nullable or not, are the same table; so are no rows."""
    table = pq.read_table(folder / "lake" / "a.parquet")
    turned = table.select(table.column_names[::-1])
    fields = [field.with_nullable(field.name not in ("age", "id")) for field in turned.schema]
    pq.write_table(turned.cast(pa.schema(fields)), folder / "lake" / "b.parquet")
    pq.write_table(table.slice(0, 0), folder / "lake" / "c.parquet")
    (folder / "job.yaml").write_text(yaml.safe_dump(spec()))
    result = call("plan", "job.yaml", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"] == 120


@pytest.mark.fault(39)
def test_extra_columns_pass_where_they_are_not_asked_for(folder: Path) -> None:
    add_table(lambda table: table.append_column("more", SIXTY_WORDS))(folder)
    columns = ["age", "balance", "visits", "tenure"]
    (folder / "job.yaml").write_text(yaml.safe_dump(spec(source={"path": "lake", "columns": columns})))
    assert call("plan", "job.yaml").exit_code == 0


@pytest.mark.fault(36)
def test_a_parquet_file_cut_anywhere_is_refused_before_anything_runs(folder: Path) -> None:
    whole = (folder / "lake" / "a.parquet").read_bytes()
    cuts = {0, 1, 3, 4, 5, 7, 8, 11, 12, *range(len(whole) - 12, len(whole))}
    cuts |= set(random.Random(3).sample(range(len(whole)), 190))
    for cut in sorted(cuts):
        (folder / "lake" / "a.parquet").write_bytes(whole[:cut])
        message = refused(folder, spec(), code=4)
        assert_explained(message, where="lake/a.parquet", says="an input file is")


@pytest.mark.fault(54)
def test_zero_rows_are_scored_exactly(folder: Path) -> None:
    replace_table(lambda table: table.slice(0, 0))(folder)
    (folder / "job.yaml").write_text(yaml.safe_dump(spec()))
    result = call("run", "job.yaml")
    assert result.exit_code == 0, result.output
    assert "0 in = 0 out + 0 rejected + 0 filtered" in result.stdout
    status = call("status", "@last", "--json")
    assert json.loads(status.stdout)["rows"] == {"in": 0, "out": 0, "rejected": 0, "filtered": 0}
    (written,) = (folder / "out").glob("*.parquet")
    table = pq.read_table(written)
    assert table.num_rows == 0
    assert table.schema.names == [*make_table(1, seed=1).column_names, "prediction"]


# What the output may be


@pytest.mark.parametrize("mode", ["error", "overwrite"])
def test_an_output_that_holds_something_is_left_alone(folder: Path, mode: str) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("years of work")
    message = refused(folder, spec(sink={"path": "out", "mode": mode}), code=6 if mode == "error" else 7)
    assert_explained(message, where="sink.path", says="thesis.txt")


@pytest.mark.parametrize("path", [".", "..", "/", "~", "lake", "lake/out", "lake/../../work", ".pipeline/jobs/x"])
def test_an_output_that_would_touch_something_else(folder: Path, path: str) -> None:
    assert_explained(refused(folder, spec(sink={"path": path}), code=7), where="sink.path", says="cannot go there")


@pytest.mark.fault(46)
def test_a_link_does_not_lead_the_output_into_the_source(folder: Path) -> None:
    (folder / "link").symlink_to("lake")
    message = refused(folder, spec(sink={"path": "link/out", "mode": "overwrite"}), code=7)
    assert_explained(message, where="sink.path", says="overlaps with the source")


def test_a_file_where_the_output_should_be(folder: Path) -> None:
    (folder / "out").write_text("")
    assert "there is a file" in refused(folder, spec(), code=7)


# What the model may be


def harmful(folder: Path, *, protocol: int) -> bytes:
    """A pickle that leaves a file behind when anything opens it."""

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(folder / "the payload ran"), "w"))

    return pickle.dumps({"learner": Payload()}, protocol=protocol)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["model.json", "model.ubj", "model.pkl"])
@pytest.mark.fault(42, 48)
def test_a_pickle_is_refused_whatever_its_name_and_never_opened(folder: Path, protocol: int, name: str) -> None:
    (folder / name).write_bytes(harmful(folder, protocol=protocol))
    for command in ("run", "plan"):
        message = refused(folder, spec(steps=score(model=name)), code=7, command=command)
        assert_explained(message, where=name, says="a pickle")
    assert not (folder / "the payload ran").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "an empty file"),
        (b"hello, I am no model", "text that begins with 'hello"),
        (b'{"weights": [1, 2]}', "'weights'"),
        (b"tree\nversion=v4\n", "LightGBM"),
        (b"PAR1....PAR1", "Parquet"),
    ],
)
def test_a_file_that_is_no_model(folder: Path, content: bytes, says: str) -> None:
    (folder / "other.json").write_bytes(content)
    assert_explained(refused(folder, spec(steps=score(model="other.json")), code=5), where="other.json", says=says)


def test_a_model_that_is_not_there(folder: Path) -> None:
    message = refused(folder, spec(steps=score(model="modl.json")), code=5)
    assert_explained(message, where="modl.json", says="did you mean")


@pytest.mark.fault(42)
def test_a_model_with_flipped_bits_never_ends_the_command(folder: Path, small_model: bytes) -> None:
    """Damage either shows, or leaves a model that can be read; never a crash. Each try is a process: a few seeds."""
    for seed in range(4):
        damaged, dice = bytearray(small_model), random.Random(seed)
        for _ in range(20):
            damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        (folder / "model.json").write_bytes(damaged)
        (folder / "job.yaml").write_text(yaml.safe_dump(spec()))
        result = call("validate", "job.yaml")
        assert result.exit_code in (0, 5), result.output
        assert "defect" not in result.output


# What the job spec may say


@pytest.mark.parametrize(
    ("text", "code", "line", "says"),
    [
        ("sorce: {path: x}\n", 2, 11, "did you mean source?"),
        ("name: again\n", 2, 11, "twice"),
        ("cluster: no\n", 2, 11, "two meanings"),
        ("errors: {max_fraction: 010}\n", 2, 11, "two meanings"),
        ("cluster: !!python/object/apply:os.system ['touch ran']\n", 7, 11, "Python objects"),
        ("cluster: !!python/name:os.system\n", 7, 11, "Python objects"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", 7, 11, "anchors and aliases"),
        ("cluster:\n  <<: {type: local}\n", 7, 12, "merge keys"),
        ("cluster: " + "[" * 100 + "]" * 100 + "\n", 7, 11, "nested too deep"),
    ],
)
@pytest.mark.fault(47)
def test_a_job_spec_with_a_trap(folder: Path, text: str, code: int, line: int, says: str) -> None:
    begin = yaml.safe_dump(spec(), sort_keys=False, default_flow_style=False)
    begin += "# filled up\n" * (10 - begin.count("\n"))
    message = refused(folder, begin + text, code=code)
    assert f"job.yaml:{line}:" in message
    assert says in message
    assert "next:" in message


@pytest.mark.fault(47)
def test_a_job_spec_as_large_as_data(folder: Path) -> None:
    assert "too large" in refused(folder, "# " + "x" * (1 << 20) + "\n", code=2)


NASTY = ["../../x", "/etc/x", "a/b", "a\\b", "..", ".", "%2e%2e%2fx", "-rf", "a b", "Ü", "x" * 65]


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.fault(46)
def test_a_name_that_would_lead_elsewhere(folder: Path, name: str) -> None:
    assert "job.yaml:1:" in refused(folder, spec(name=name), code=2)


@pytest.mark.parametrize("job", [*NASTY[:-1], "x" * 101, "a\nb"])
@pytest.mark.fault(46)
def test_an_id_that_would_lead_elsewhere(folder: Path, job: str) -> None:
    message = refused(folder, spec(), code=7, args=(f"--job={job}",))
    assert_explained(message, where="--job", says="invalid job id")


@pytest.mark.fault(46)
def test_a_nul_in_a_path(folder: Path) -> None:
    for fields in ({"sink": {"path": "out\0x"}}, {"source": {"path": "lake\0x"}}, {"steps": score(model="m\0x")}):
        refused(folder, yaml.safe_dump(spec(**fields)), code=2)


@pytest.mark.fault(46)
def test_partition_folders_name_values_and_never_places(folder: Path) -> None:
    """Values of hive keys are decoded, and stay values."""
    for value in ("..%2F..%2Fescaped", "%2Fetc", "a%00b"):
        (folder / "hive" / f"country={value}").mkdir(parents=True)
        pq.write_table(pa.table({"x": [1.0]}), folder / "hive" / f"country={value}" / "a.parquet")
    found = discover(Source(path=str(folder / "hive")))
    assert sorted(value for file in found.files for _, value in file.hive_keys) == ["../../escaped", "/etc", "a\0b"]
    assert all(Path(file.path).is_relative_to(folder / "hive") for file in found.files)


# What a small file may become


@pytest.mark.fault(38)
def test_a_small_file_with_many_rows_is_read_in_bounded_memory(tmp_path: Path) -> None:
    rows, batch = 26_000_000, 65_536
    path = tmp_path / "bomb.parquet"
    with pq.ParquetWriter(path, pa.schema([("x", pa.int64())]), compression="zstd") as writer:
        writer.write_table(pa.table({"x": pa.repeat(pa.scalar(7), rows)}), row_group_size=rows)
    assert path.stat().st_size < 200_000
    (file,) = (found := discover(Source(path=str(path)))).files
    assert sum(group.bytes for group in file.row_groups) >= rows * 8, "planning must see what it becomes"
    before, most, read = pa.total_allocated_bytes(), 0, 0
    for part in read_batches(tuple(selected_fragments(file)), columns=["x"], schema=found.schema, batch_rows=batch):
        most = max(most, pa.total_allocated_bytes() - before)
        read += part.table.num_rows
    assert read == rows
    assert most < 16 << 20
