"""The parts of a job spec, as frozen models. `Hook` is also a part of the settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from pipeline.common.secrets import is_reference
from pipeline.common.units import parse_bytes
from pipeline.spec.fields import (
    AnyPath,
    ArgumentName,
    DateText,
    Entrypoint,
    ErrorName,
    Name,
    Names,
    PathText,
    SomeNames,
    SpecModel,
    Value,
    check_seconds,
    check_size,
    check_timeout,
    check_values,
    spec_error,
)


class Incremental(SpecModel):
    """Options of an incremental job."""

    on_model_change: Literal["new", "all"] = "new"
    """Input to score after the model or a step has changed. ``new``: only new input; the output then has rows of both
    models. ``all``: all input; the output is replaced in one commit."""


def _check_character(text: str) -> str:
    if len(text.encode()) != 1 or text in "\r\n":
        raise spec_error(f"is {text!r}", expected="one ASCII character, such as ; or a tab")
    return text


_Character = Annotated[str, AfterValidator(_check_character)]


class CsvOptions(SpecModel):
    """Format of CSV files. All files of a source have the same."""

    delimiter: _Character = ","
    """Character between two cells."""
    quote: _Character | None = '"'
    """Character around cells with delimiters or newlines; doubled inside of them. None: quotes are plain text."""
    escape: _Character | None = None
    """Character before a quote, delimiter or newline that is part of a cell."""
    header: bool | SomeNames = True
    """True: the first line of each file has the names of its columns. A list: the names, in files without such a line.
    False: no such line, and the columns are called ``f0``, ``f1``, …"""
    nulls: Annotated[tuple[str, ...], Field(strict=False)] = ("",)
    """Texts without quotes that mean null. In quotes they are text: ``""`` is an empty text."""

    @model_validator(mode="after")
    def _check_distinct(self) -> Self:
        used = [text for text in (self.delimiter, self.quote, self.escape) if text is not None]
        if len(set(used)) < len(used):
            raise spec_error("uses a character twice", expected="different characters for delimiter, quote and escape")
        return self


TEXT_FORMATS = ("csv", "jsonl")
"""Formats whose columns have no types of their own."""


def _reader(format: str, csv: CsvOptions | None, types: Mapping[str, str] | None) -> str:
    """Return a format with its options, as `pipeline.sources.find_source` takes it."""
    options = {**(csv.model_dump() if csv else {}), **({"types": dict(types)} if types else {})}
    return f"{format}?{json.dumps(options, sort_keys=True)}" if options else format


def _check_text_options(format: str, csv: CsvOptions | None, types: Mapping[str, str] | None) -> None:
    if csv is not None and format != "csv":
        raise spec_error(f"has csv: and format: {format}", expected="format: csv beside csv:")
    if types is not None and format not in TEXT_FORMATS:
        raise spec_error(
            f"has types: and format: {format}",
            expected="types: beside format: csv or jsonl; other files know the types of their columns",
        )


class Source(SpecModel):
    """Input of a job: files, columns and filter."""

    path: PathText | Annotated[tuple[PathText, ...], Field(min_length=1, strict=False)]
    """File, directory (with hive partition folders or not), glob, or a list of these; any fsspec URL."""
    format: str = "parquet"
    """``parquet``, ``csv``, ``jsonl`` (JSON Lines), or the name of another `pipeline.sources` adapter."""
    csv: CsvOptions | None = None
    """Format of CSV files. Default: commas, double quotes, and a header."""
    types: dict[Name, Name] | None = None
    """Arrow type per column of CSV and JSON Lines files, such as ``{age: int64, zip: string}``. Other columns have the
    type of their values in the first MiB of the first file. A value of another type is a reject."""
    columns: SomeNames | None = None
    """Columns to read. Default: with a ``map`` step, all columns; without one, those that the model, ``keep`` or the
    contract needs."""
    filter: Name | None = None
    """Condition for rows to score, such as ``country == 'DE' and age >= 18``. Other rows are dropped."""
    base: PathText | None = None
    """Folder below which ``key=value`` folders are hive keys. Needed only when ``path`` lists single files."""
    incremental: bool | Incremental = False
    """Score only the input that is new since the last success: new files, changed files, appended row groups. Needs
    ``sink.mode: append``; see docs/incremental.md."""

    if TYPE_CHECKING:  # also paths and lists, which validation turns into what the fields hold

        def __init__(
            self,
            *,
            path: AnyPath | Sequence[AnyPath],
            format: str = "parquet",
            csv: CsvOptions | Mapping[str, Any] | None = None,
            types: Mapping[str, str] | None = None,
            columns: Sequence[str] | None = None,
            filter: str | None = None,
            base: AnyPath | None = None,
            incremental: bool | Incremental = False,
        ) -> None: ...

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        _check_text_options(self.format, self.csv, self.types)
        return self

    @property
    def reader(self) -> str:
        """``format`` with the options of its files; see `pipeline.sources.find_source`."""
        return _reader(self.format, self.csv, self.types)


class RetryCall(SpecModel):
    """Another call of a step, after a pause."""

    retry: int = Field(ge=1, le=10)
    """Most further calls on the same rows."""
    wait: Annotated[float | int | str, AfterValidator(check_seconds)] = "1 s"
    """Pause before the first of them, as ``2 s`` or seconds; doubled before each further one, up to a minute."""
    then: Literal["fail", "reject"] = "fail"
    """After the last of them: fail the job, or reject the rows at fault."""


class MapStep(SpecModel):
    """Step that calls a function of yours with one batch of rows at a time."""

    map: Entrypoint
    """``module:function``, or in Python a function; pandas DataFrame -> pandas DataFrame. Its result for a row must
    not depend on the other rows of the batch. It may drop rows; the index tells which rows remain. A function whose
    parameter is annotated as ``pyarrow.Table`` or ``polars.DataFrame`` gets one, with the column ``__row__`` in
    place of the index. It may be an ``async def`` function."""
    dtype_backend: Literal["numpy", "pyarrow"] = "numpy"
    """Dtypes of the DataFrame, the same for all batches of a job. ``numpy``: pandas' defaults; integers and booleans
    are nullable (``Int64``, ``boolean``) unless statistics of all files prove that there are no nulls. ``pyarrow``:
    `pandas.ArrowDtype` for every column. Both decode dictionaries."""
    row_wise: Literal["checked", "unchecked"] = "checked"
    """``checked``: planning runs the step on a sample in seven ways, and refuses it if the result for a row differs.
    ``unchecked``: no check; a result with a fresh index and as many rows as before is taken to be in their order."""
    on_error: dict[ErrorName, Literal["reject", "fail"] | RetryCall] = Field(default_factory=dict)
    """Action per class of an exception that the step raises, such as ``ValueError`` or ``requests.Timeout``, or a base
    class of it: ``reject`` the rows at fault, ``fail`` the job, or ``{retry: 3}``. Default: ``reject``, except for
    errors of memory, storage and network."""
    concurrency: int | None = Field(default=None, ge=1, le=1024)
    """For an ``async def`` function: most calls that wait at a time in a task. Default: 16."""
    rows_per_call: int | None = Field(default=None, ge=1)
    """For an ``async def`` function: most rows of a call. Default: 100."""
    timeout: Annotated[float | int | str, AfterValidator(check_timeout)] | None = None
    """Longest time for a batch, as ``30 s`` or seconds, with the other steps and the models of the job. The rows of a
    batch that takes longer are scored in smaller groups, and rows that take longer even alone are rejected. Works for
    code that cannot be interrupted: such a job scores in child processes."""
    row_timeout: Annotated[float | int | str, AfterValidator(check_timeout)] | None = None
    """Longest time for a row, which bounds the time of a group by its number of rows."""


class FilterStep(SpecModel):
    """Step that drops rows."""

    filter: Name
    """Condition for rows to go on with, in the language of ``source.filter``; other rows count as filtered. Before the
    first ``map`` and ``score``, files are read with it, as with ``source.filter``."""


class SelectStep(SpecModel):
    """Step that selects and renames columns."""

    select: SomeNames | Annotated[dict[Name, Name], Field(min_length=1)]
    """Columns to go on with, in order; or ``{new: old}``. The columns of a last ``select`` are those of the output."""

    @property
    def columns(self) -> dict[str, str]:
        """``select`` as a mapping of new to old names, in order."""
        return dict(self.select) if isinstance(self.select, dict) else {name: name for name in self.select}


class Checkpoint(SpecModel):
    """End of a stage."""

    partition_bytes: Annotated[int | str, AfterValidator(check_size)] | None = None
    """Most uncompressed bytes of a partition of the next stage, as ``64 MiB`` or a number. Default: 256 MiB."""


def _check_checkpoint(value: bool | Checkpoint) -> bool | Checkpoint:
    if value is False:
        raise spec_error("is false", expected="true, or partition_bytes", next_step="remove the step")
    return value


class CheckpointStep(SpecModel):
    """Step that ends a stage: its rows are kept, and cut anew for the steps behind it."""

    checkpoint: Annotated[bool | Checkpoint, AfterValidator(_check_checkpoint)]
    """``true``, or the size of the partitions behind it. A job that died repeats no work before it, and a partition
    that became larger than the others is cut; see docs/stages.md."""

    @property
    def partition_bytes(self) -> int | None:
        """Most bytes of a partition of the next stage; None: the default."""
        size = self.checkpoint.partition_bytes if isinstance(self.checkpoint, Checkpoint) else None
        return None if size is None else parse_bytes(size)


class DaskInput(SpecModel):
    """A table that a ``dask`` step reads beside its rows."""

    path: PathText | Annotated[tuple[PathText, ...], Field(min_length=1, strict=False)]
    """Files, directory, glob or URL, as in ``source.path``. Its files are pinned when the job is planned."""
    format: str = "parquet"
    """As ``source.format``."""
    csv: CsvOptions | None = None
    """As ``source.csv``."""
    types: dict[Name, Name] | None = None
    """As ``source.types``."""
    columns: SomeNames | None = None
    """Columns to read. Default: all."""
    filter: Name | None = None
    """Condition for the rows to read, in the language of ``source.filter``."""
    base: PathText | None = None
    """Folder below which ``key=value`` folders are hive keys."""

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        _check_text_options(self.format, self.csv, self.types)
        return self

    @property
    def source(self) -> Source:
        """The table as a source."""
        return Source.model_validate(self.model_dump())


class DaskStep(SpecModel):
    """Step whose rows depend on other rows: a join, a groupby, a shuffle. It is a stage of its own."""

    dask: Entrypoint
    """``module:function``, Dask DataFrame -> Dask DataFrame. It must be lazy: it describes the result, and computes
    nothing. Columns have Arrow's types. The result has no index: end with ``reset_index()``."""
    inputs: dict[ArgumentName, DaskInput] = Field(default_factory=dict)
    """Further tables by the name of the function's parameter that gets one."""
    partition_bytes: Annotated[int | str, AfterValidator(check_size)] | None = None
    """Most uncompressed bytes of a partition of its tables, as ``64 MiB`` or a number. Smaller partitions need less
    memory and more messages. Default: 256 MiB."""
    shuffle: Literal["p2p", "tasks"] = "p2p"
    """Method of Dask's shuffles: between workers, or with tasks, which hold all rows in memory."""
    origin: bool = False
    """True: the frame has the columns ``_file`` and ``_row``, the origin of each row. If the result still has both,
    they are the origin of rows that later steps reject, and no columns of the output."""

    @property
    def target_bytes(self) -> int | None:
        """``partition_bytes`` as a number of bytes."""
        return None if self.partition_bytes is None else parse_bytes(self.partition_bytes)


def _check_secret(text: str) -> str:
    if not is_reference(text):
        raise spec_error(
            "contains a secret",
            expected="a reference to it: env:NAME or file:PATH",
            next_step="put it into a variable, write secret: env:NAME, and rotate a secret that others have seen",
            hides=True,
        )
    return text


class Errors(SpecModel):
    """Limits for rejected rows and quarantined files."""

    max_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    """Largest fraction of rejected rows (rejected / rows to score; filtered rows do not count) with which the job
    succeeds, with warnings. Default 0: one rejected row fails the job."""
    max_rows: int | None = Field(default=None, ge=0)
    """Most rejected rows with which the job succeeds, with warnings. Without ``max_fraction`` only this number counts;
    beside it, neither may be exceeded."""
    files: Literal["fail", "quarantine"] = "fail"
    """Handling of an input file that is damaged, has other columns than most, or changes while the job runs.
    ``fail``: the job is refused, or fails. ``quarantine``: the file is left out as a whole, by name; its rows are in no
    count, and the job ends with warnings."""
    max_files: int | None = Field(default=None, ge=0)
    """Input files that may be quarantined; with more the job is refused, or fails. Default: any number, as long as one
    is left."""
    keep_columns: Names | None = None
    """Input columns that a stored reject keeps, beside its file, row number and reason. Values of other columns are not
    written, and no messages, which may quote them. Such rows cannot be retried. Default: all columns."""
    hash_columns: Names = ()
    """Input columns of which a stored reject has the HMAC-SHA-256, 64 hexadecimal digits, in place of the value: keys
    by which rows can be found again by who has ``hash_key``. They need not be in ``keep_columns``. Null stays null."""
    hash_key: Annotated[str, AfterValidator(_check_secret)] | None = None
    """Key for ``hash_columns``, at least 16 bytes, as a reference that workers resolve: ``env:NAME`` or
    ``file:PATH``."""
    retain: Annotated[float | int | str, AfterValidator(check_seconds)] | None = None
    """Time for which rejected rows are stored after the job's last event, such as ``30 days``. Then ``gc --yes``
    removes them; counts and reasons stay. Default: as long as the job directory."""

    @property
    def masks_rejects(self) -> bool:
        """True if stored rejects do not have all values as they were read."""
        return self.keep_columns is not None or bool(self.hash_columns)

    @model_validator(mode="after")
    def _check_hash_key(self) -> Self:
        if bool(self.hash_columns) != (self.hash_key is not None):
            raise spec_error(
                "has hash_columns without hash_key, or a key without columns",
                expected="both, or neither",
                next_step="write hash_columns: [id] and hash_key: env:NAME",
            )
        return self


class ColumnContract(SpecModel):
    """Conditions for the values of a column. A row that breaks one is rejected before it is scored."""

    dtype: str | None = None
    """Arrow type name, such as ``int64``, ``float32``, ``string``, ``timestamp[us]``."""
    nullable: bool | None = None
    """False: nulls (and NaN) are rejected."""
    finite: bool | None = None
    """True: infinities are rejected. The default for a model's numeric features."""
    min: Value | None = None
    """Lowest value allowed."""
    max: Value | None = None
    """Highest value allowed."""
    allowed: Annotated[tuple[Value, ...], Field(min_length=1, strict=False)] | None = None
    """The only values allowed. The default for a model's categorical features: its categories."""

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.min is not None and self.max is not None:
            if isinstance(self.min, str) != isinstance(self.max, str):
                raise spec_error("has a min and a max of different types", expected="two numbers or two texts")
            if self.min > self.max:  # type: ignore[operator]
                raise spec_error("has a min above its max", expected="min <= max")
        return self


class RunOptions(SpecModel):
    """Values fixed when the job is submitted; they stay the same when it is resumed."""

    date: DateText | None = None
    """Value of ``${run.date}``. Default: the date of submission, UTC."""


class ReportOptions(SpecModel):
    """Content of the report."""

    distributions: bool = True
    """Count the distributions of scores and features while they are scored, for the report and for comparisons of
    jobs: of at least 16,384 rows for features and 524,288 for scores, all rows of smaller jobs; at most 32 columns in
    all. Of a text column up to 256 values are stored with their counts. false: count nothing."""
    show_values: bool = False
    """Show values and messages of rejected rows in ``report.html``. They may be personal."""


class FanOut(SpecModel):
    """One job per value: a parent, whose children are jobs of their own."""

    by: Annotated[Name | Annotated[tuple[Value, ...], Field(min_length=1, strict=False)], AfterValidator(check_values)]
    """A hive partition key or a column of the source, with one child per value; or a list of values.
    ``${fan_out.value}`` puts the child's value into any text of its job spec."""
    max_parallel: int = Field(default=4, ge=1, le=64)
    """Number of children that run at the same time."""
    publish: Literal["all", "each"] = "all"
    """``all``: publish all children together once every child is scored. ``each``: publish each child when scored."""
    max_children: int = Field(default=1000, ge=1, le=10_000)
    """Upper limit for the number of children; more values are an error."""


HookEvent = Literal["start", "success", "warnings", "failure", "cancelled", "interrupted"]
ENDS: tuple[HookEvent, ...] = ("success", "warnings", "failure", "cancelled", "interrupted")


def _check_url(text: str) -> str:
    if is_reference(text):
        return text
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise spec_error("is not the URL of a web server", expected="https://…, or env:NAME if the URL is a secret")
    if parts.username or parts.password:
        raise spec_error("contains a password", expected="a URL without one", next_step="write url: env:NAME")
    return text


def _check_command(words: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(words, str):
        raise spec_error(
            "is a single text, which would need a shell",
            expected="a list: the program, then each argument",
            next_step=f"write [{', '.join(words.split())}]",
        )
    return words


class Hook(SpecModel):
    """Notification when the job starts or ends: to a program, a web server, or a lineage service."""

    when: Annotated[tuple[HookEvent, ...], Field(min_length=1, strict=False)] = ENDS
    """Any of ``start``, ``success``, ``warnings`` (succeeded with some), ``failure``, ``cancelled``, ``interrupted``.
    Default: every end. A lineage service gets every event."""
    command: (
        Annotated[str | Annotated[tuple[Name, ...], Field(min_length=1, strict=False)], AfterValidator(_check_command)]
        | None
    ) = None
    """A program and its arguments, as a list; no shell. It gets the event as JSON on stdin, and as variables
    ``PIPELINE_HOOK_…``."""
    url: Annotated[str, AfterValidator(_check_url)] | None = None
    """URL of a web server that gets the event as JSON; ``env:NAME`` if the URL is a secret."""
    secret: Annotated[str, AfterValidator(_check_secret)] | None = None
    """``env:NAME`` or ``file:PATH``: key that signs requests to ``url`` with HMAC-SHA256."""
    openlineage: Name | None = None
    """Namespace of the job for OpenLineage (the extra ``openlineage``). OpenLineage's own configuration says where
    events go."""
    timeout: float = Field(default=10.0, gt=0.0, le=600.0)
    """Seconds an attempt may take."""
    attempts: int = Field(default=5, ge=1, le=20)
    """Number of attempts, with pauses of 1, 2, 4, … seconds."""

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        kinds = [name for name in ("command", "url", "openlineage") if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise spec_error(
                f"has both {' and '.join(kinds)}" if kinds else "has no target",
                expected="one of command, url, openlineage",
            )
        if self.secret is not None and self.url is None:
            raise spec_error("has a secret, but no url", expected="secret: beside url:")
        return self

    @property
    def name(self) -> str:
        """Name in messages: the program or the host, as the whole URL may be a secret."""
        if self.command is not None:
            return f"command {self.command[0]}"
        if self.openlineage is not None:
            return f"openlineage {self.openlineage}"
        url = self.url or ""
        return f"url {url}" if is_reference(url) else f"url {urlsplit(url).scheme}://{urlsplit(url).netloc}"
