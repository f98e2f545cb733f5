"""The documents are true: commands print the shown output, tables agree with the code, links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import reduce
from importlib import import_module
from pathlib import Path

import dask.config
import pytest
import yaml

from docs.make_reference import EXAMPLES, make_page
from docs.shown import DEMO, REST, Command, Shell, agree, normalise, read_blocks
from pipeline import errors
from pipeline.cli import main
from pipeline.errors import Interrupted, PipelineError
from pipeline.execution.clusters import find_cluster
from pipeline.report.verify import CHECKS
from pipeline.settings import Settings, setting_names
from pipeline.spec.job_spec import JobSpec

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), ROOT / "llms.txt", ROOT / "benchmarks/README.md", *DOCS.rglob("*.md")])
SHOWN = [
    "README.md",
    "docs/errors.md",
    "docs/json.md",
    "docs/parameters.md",
    "docs/command-line.md",
    "docs/fan-out.md",
    "docs/partial-success.md",
]
"""In this order: the first makes the demo, and the last ones add jobs to what the others look at."""


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """Return the text below a heading, up to the next one."""
    _, found, rest = text.partition(f"\n{heading}\n")
    assert found, f"there is no heading {heading!r}"
    return re.split(r"^#+ ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def first_column(text: str) -> list[str]:
    return re.findall(r"^\| (?:&emsp;)*`([\w-]+)` \|", text, re.MULTILINE)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """One folder for all documents, as the demo takes its time."""
    shell = Shell(tmp_path_factory.mktemp("docs"))
    yield shell
    shell.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_commands_print_what_is_shown(name: str, shell: Shell) -> None:
    shell.folder = shell.home
    if name != "README.md" and not (shell.home / "pipeline-demo").exists():
        shell.run(DEMO)
    commands = [command for block in read_blocks(read(name)) for command in block]
    assert commands
    for command in commands:
        real = shell.run(command.text).splitlines()
        assert agree(command.output, real), f"$ {command.text}\n" + "\n".join(normalise(real))


def test_no_other_page_shows_commands() -> None:
    with_commands = [
        str(path.relative_to(ROOT)) for path in PAGES if any(read_blocks(path.read_text(encoding="utf-8")))
    ]
    assert sorted(with_commands) == sorted(SHOWN)


@pytest.mark.parametrize(
    ("shown", "real", "expected"),
    [
        (["a", "…"], ["a", "b", "c"], True),
        (["a"], ["a", "b"], False),
        (["a b"], ["a c"], False),
        (["scoring: 7%, 1/8 partitions", "x"], ["scoring: 9%, 2/8 partitions", "scoring: 10%", "x"], True),
        (["in 1.02 s, 3 rows"], ["in 3 min 07 s, 3 rows"], True),
        (["in 1.02 s, 3 rows"], ["in 1.02 s, 4 rows"], False),
        (["churn-demo-20260101-120000-a1b2"], ["churn-demo-20270101-130000-ffff"], True),
    ],
)
def test_only_what_changes_may_differ(shown: list[str], real: list[str], expected: bool) -> None:
    assert agree(shown, real) is expected


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_job_specs_load(page: Path) -> None:
    for block in yaml_blocks(page):
        if not block.startswith("# "):
            assert JobSpec.load(block).name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_cluster_files_and_settings_load(page: Path, tmp_path: Path) -> None:
    """YAML of another kind than job specs begins with the name of its file."""
    for block in yaml_blocks(page):
        if block.startswith("# cluster_configs/"):
            (tmp_path / "cluster.yaml").write_text(block)
            find_cluster(str(tmp_path / "cluster.yaml"), settings=Settings.load())
        elif block.startswith("# ~/.config/dask/"):
            with dask.config.set(yaml.safe_load(block)):
                Settings.load()


def yaml_blocks(page: Path) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_tables_of_the_job_spec_are_up_to_date() -> None:
    text = read("docs/job-spec.md")
    assert make_page(text) == text, "run: python docs/make_reference.py"


def test_every_part_of_the_job_spec_has_its_table() -> None:
    assert re.findall(r"<!-- table: (\w+) -->", read("docs/job-spec.md")) == [
        "JobSpec",
        "Source",
        "CsvOptions",
        "Incremental",
        "MapStep",
        "RetryCall",
        "FilterStep",
        "SelectStep",
        "CheckpointStep",
        "Checkpoint",
        "DaskStep",
        "DaskInput",
        "ScoreStep",
        "Score",
        "Endpoint",
        "Message",
        "Prices",
        "Output",
        "Sink",
        "Errors",
        "ColumnContract",
        "RunOptions",
        "ReportOptions",
        "Gate",
        "GateRows",
        "GateColumn",
        "Budget",
        "Hook",
        "FanOut",
        "Trigger",
        "ArrivalTrigger",
        "Settings",
    ]


@pytest.mark.parametrize(("part", "field"), [(part, field) for part, fields in EXAMPLES.items() for field in fields])
def test_examples_of_the_job_spec_load(part: str, field: str) -> None:
    spec = """
name: churn
source: {path: lake/, incremental: {}}
steps:
  - map: features:build
  - score: {model: churn.ubj, output: {column: churn}}
  - filter: churn > 0
  - select: [churn]
  - checkpoint: {}
  - map: features:last
  - dask: joins:history
    inputs: {customers: {path: lake/customers/}}
sink: {path: out/}
errors: {}
contract: {age: {}}
gate: {psi: 0.1}
hooks: [{command: [a]}, {url: "https://example.com/"}, {openlineage: prod}]
fan_out: {by: plan}
triggers:
  - {name: nightly, cron: "0 1 * * *"}
  - {name: other}
  - {name: landing, arrival: {path: landing/}}
"""
    places = {
        "JobSpec": "",
        "Source": "source.",
        "CsvOptions": "source.csv.",
        "MapStep": "steps.0.",
        "RetryCall": "steps.0.on_error.OSError.",
        "FilterStep": "steps.2.",
        "SelectStep": "steps.3.",
        "CheckpointStep": "steps.4.",
        "Checkpoint": "steps.4.checkpoint.",
        "DaskStep": "steps.6.",
        "DaskInput": "steps.6.inputs.customers.",
        "ScoreStep": "steps.1.",
        "Score": "steps.1.score.",
        "Endpoint": "steps.1.score.endpoint.",
        "Message": "steps.1.score.endpoint.messages.0.",
        "Prices": "steps.1.score.endpoint.prices.",
        "Output": "steps.1.score.output.",
        "Sink": "sink.",
        "Errors": "errors.",
        "ColumnContract": "contract.age.",
        "RunOptions": "run.",
        "ReportOptions": "report.",
        "Gate": "gate.",
        "Budget": "budget.",
        "GateRows": "gate.rows.",
        "GateColumn": "gate.columns.churn.",
        "FanOut": "fan_out.",
        "Incremental": "source.incremental.",
        "Hook": "hooks.0.",
        "Trigger": "triggers.1." if field in ("every", "arrival", "after") else "triggers.0.",
        "ArrivalTrigger": "triggers.2.arrival.",
    }
    if part == "Hook":
        places["Hook"] = {"url": "hooks.1.", "secret": "hooks.1.", "openlineage": "hooks.2."}.get(field, "hooks.0.")
    needed = ["steps.1.score.model=[a.ubj, b.ubj]"] if field == "combine" else []
    if part == "Sink" and field in ("url", "table", "key", "where", "job_column"):
        mode = {"key": "merge", "where": "replace"}.get(field, "append")
        table = {"format": "sql", "url": "sqlite:///a.db", "table": "t", "mode": mode}
        table |= {"merge": {"key": ["a"]}, "replace": {"where": "a > 1"}}.get(mode, {})
        needed.append(f"sink={json.dumps(table)}")
    if part == "CsvOptions" or field in ("csv", "types"):
        options = "csv: {}, " if part == "CsvOptions" else ""
        name = "steps.6.inputs.customers" if part == "DaskInput" else "source"
        needed = [f"{name}={{path: lake/, format: csv, {options}}}"]
    if part == "RetryCall":
        needed = ["steps.0.on_error={OSError: {retry: 1}}"]
    if field.startswith("meta"):
        needed = ["steps.1.score={model: [a.ubj], combine: stack, meta: m.ubj, output: churn}"]
    if part in ("Endpoint", "Message", "Prices") or field == "endpoint":
        kind = 'input: "{{a}}"' if field in ("input", "dimensions") else 'messages: [{content: "{{a}}"}], prices: {}'
        service = f"endpoint: {{url: 'http://h/v1', model: m, {kind}}}, " if part != "Score" else ""
        needed = [f"steps.1.score={{{service}output: churn}}"]
    if field.startswith("hash_"):
        needed = ["errors={hash_columns: [customer_id], hash_key: env:KEY}"]
    if field == "model_files":
        needed = ["steps.1.score.model=my_models:Churn"]
    if part == "Score" and field in ("by", "models", "other"):
        needed = ["steps.1.score={by: country, models: 'm/{}.ubj', output: churn}"]
    assert JobSpec.load(spec, overrides=[*needed, f"{places[part]}{field}={EXAMPLES[part][field]}"]).name


def tree(kind: type[PipelineError], depth: int = 0) -> Iterator[tuple[str, str, int]]:
    """Class, exit code and depth of everything below ``kind``, as the table draws it."""
    yield kind.__name__, "128 + n" if kind is Interrupted else str(kind.exit_code), depth
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            # The children of the root are not indented: the table would only be narrower for it.
            yield from tree(child, 0 if kind is PipelineError else depth + 1)


def test_errors() -> None:
    rows = re.findall(r"^\| ((?:&emsp;)*)`(\w+)` \| ([\d +n]+) \|", read("docs/errors.md"), re.MULTILINE)
    shown = [(name, code, indent.count("&emsp;")) for indent, name, code in rows]
    assert shown == list(tree(PipelineError))


def test_reserved_errors_are_those_that_nothing_raises() -> None:
    shown = re.findall(r"`(\w+)` \| \d+ \| \*reserved\*", read("docs/errors.md"))
    library = [
        path.read_text(encoding="utf-8") for path in (ROOT / "pipeline").rglob("*.py") if path.name != "errors.py"
    ]
    leaves = [kind.__name__ for kind in kinds(PipelineError) if not kind.__subclasses__()]
    assert shown == [name for name in leaves if not any(re.search(rf"\b{name}\b", text) for text in library)]


def kinds(kind: type[PipelineError]) -> Iterator[type[PipelineError]]:
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from kinds(child)


def test_every_exit_code_is_documented() -> None:
    codes = {code for _, code, _ in tree(PipelineError)}
    assert codes <= set(re.findall(r"^\| (128 \+ n|\d+) \|", section(read("docs/errors.md"), "## Exit codes"), re.M))


def test_every_command_and_check_is_documented() -> None:
    text = read("docs/command-line.md")
    assert set(re.findall(r"^## (\w+)", text, re.MULTILINE)) == set(main.commands)
    assert first_column(section(text, "## verify [JOB]")) == list(CHECKS)


def shown_json(heading: str) -> dict[str, object]:
    """The JSON object that docs/json.md shows below a heading."""
    commands: list[Command] = next(iter(read_blocks(section(read("docs/json.md"), heading))))
    shown = [line for line in commands[-1].output if line != REST]
    found: dict[str, object] = json.JSONDecoder().raw_decode("\n".join(shown))[0]
    return found


@pytest.mark.parametrize(
    "name", ["run, resume, retry, status", "plan", "verify", "rejects", "gc", "list", "validate", "Errors"]
)
def test_keys_of_json(name: str) -> None:
    told = first_column(section(read("docs/json.md"), f"## {name}"))
    assert set(told) == set(shown_json(f"## {name}"))


def test_links() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            if "://" in path:
                continue
            other = (page.parent / path).resolve() if path else page
            if not other.exists() or (anchor and anchor not in anchors(other)):
                broken.append(f"{page.name}: {target}")
    assert broken == []


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


NOTES = sorted(DOCS.glob("design/[0-9]*.md"))


@pytest.mark.parametrize("note", NOTES, ids=lambda path: path.name)
def test_design_notes_have_the_same_headings_and_name_tests(note: Path) -> None:
    text = note.read_text(encoding="utf-8")
    expected = ["Problem", "Decision", "Alternatives considered", "Caveats", "How it is tested"]
    assert [title for title in re.findall(r"^## (.*)$", text, re.MULTILINE) if title in expected] == expected
    assert "](../../tests/" in section(text, "## How it is tested")


def test_design_notes_are_listed() -> None:
    assert re.findall(r"\]\((\d+-[\w-]+\.md)\)", read("docs/design/README.md")) == [path.name for path in NOTES]


def layers() -> dict[str, int]:
    """Package or module -> its layer in the table of docs/concepts.md."""
    table = section(read("docs/concepts.md"), "## Modules")
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", table, re.MULTILINE)
    return {name: int(layer) for layer, row in rows for name in re.findall(r"`(\w+)`", row)}


def test_concepts_name_every_module() -> None:
    entries = (ROOT / "pipeline").iterdir()
    real = {path.stem for path in entries if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert set(layers()) == real - {"__init__", "testing"}


def test_modules_import_only_from_layers_below() -> None:
    layer, wrong = layers(), []
    for path in (ROOT / "pipeline").rglob("*.py"):
        name = path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")
        # At the start of a line: what is imported for type checking or when it is needed is indented.
        for other in re.findall(r"^from pipeline\.(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            if layer.get(other, 0) > layer.get(name, len(layer)):
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_contributing_names_every_kind_of_adapter() -> None:
    kinds = set()
    for path in (ROOT / "pipeline").rglob("*.py"):
        kinds |= set(
            re.findall(r'find_adapter\(\w+, kind="(\w+)", built_in=BUILT_IN', path.read_text(encoding="utf-8"))
        )
    assert kinds
    assert {f"pipeline.{kind}s" for kind in kinds} <= set(re.findall(r"`(pipeline\.\w+)`", read("CONTRIBUTING.md")))


def exists(name: str) -> bool:
    """True for a module, or an attribute of one."""
    head, _, rest = name.partition(".")
    found: object = importlib.import_module(head)
    for part in rest.split("."):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"{head}.{part}")
        if not hasattr(found, part):
            return False
        found, head = getattr(found, part), f"{head}.{part}"
    return True


def test_names_of_modules_in_pages_exist() -> None:
    """Settings, entry-point groups and the key of file metadata look like modules; the changelog names old ones."""
    no_modules = {*setting_names(), "flavors", "sources", "sinks", "clusters", "model"}
    wrong = []
    for page in PAGES:
        names = re.findall(r"`(pipeline(?:\.\w[\w-]*)+)", page.read_text(encoding="utf-8"))
        names = [name for name in names if name.split(".")[1].replace("-", "_") not in no_modules]
        wrong += [f"{page.name}: {name}" for name in names if page.name != "CHANGELOG.md" and not exists(name)]
    assert wrong == []


def test_the_chain_of_calls_names_what_exists() -> None:
    """Every name in the diagram of docs/concepts.md is defined in the module beside it."""
    diagram = section(read("docs/concepts.md"), "### From run to predict")
    rows = re.findall(r"^ +([A-Za-z_.]+) .*?  +([a-z_.]+)$", diagram, re.MULTILINE)
    assert len(rows) > 20
    for name, module in rows:
        source = import_module(f"pipeline.{module}")
        for owner in ([], ["Driver"], ["Dispatcher"], ["Scorer"]):
            with suppress(AttributeError):
                reduce(getattr, [*owner, *name.split(".")], source)
                break
        else:
            raise AssertionError(f"{module} has no {name}")


def test_glossary_has_each_word_once() -> None:
    words = re.findall(r"^\| (?!word \|)([a-z][^|]*?) \|", read("docs/glossary.md"), re.MULTILINE)
    assert len(words) == len(set(words))
