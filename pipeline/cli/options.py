"""Options, settings and output as text or JSON, for all commands."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.common.secrets import mask_logs, redact, redact_values
from pipeline.errors import OutputExists
from pipeline.storage.urls import as_storage_error

if TYPE_CHECKING:
    from pipeline.settings import Settings
    from pipeline.spec.load import LoadedSpec

SCHEMA_VERSION = 1
JSON = "pipeline.json"
"""Key of ``Context.meta``: whether stdout is to be JSON."""
VERBOSITY = "pipeline.verbosity"
"""Key of ``Context.meta``: -1 quiet, 0, 1 with tracebacks, 2 with debug messages."""

Command = TypeVar("Command", bound=Callable[..., Any])


def output_options(command: Command) -> Command:
    """``--json``, ``-v`` and ``-q``."""
    command = click.option("--json", "as_json", is_flag=True, expose_value=False, help="Print one JSON object.")(
        command
    )
    command = click.option(
        "-v",
        "--verbose",
        count=True,
        expose_value=False,
        callback=_set_verbosity,
        help="More messages; -vv: all of them.",
    )(command)
    return click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=_set_quiet, help="No progress, errors only."
    )(command)


def directory_option(command: Command) -> Command:
    """``--directory``."""
    text = "Where job directories lie. Default: pipeline.directory of dask.config, else .pipeline/jobs."
    return click.option("--directory", metavar="DIR", help=text)(command)


def override_option(command: Command) -> Command:
    """``--set`` and ``-p``."""
    text = "Set a field of the job spec, such as sink.path=out/ or steps.0.score.model=m.json; may be repeated."
    of_params = "Give a parameter that the job spec declares, such as day=2026-01-01; may be repeated."
    for option in (
        click.option("-p", "--param", "params", metavar="NAME=VALUE", multiple=True, help=of_params),
        click.option("--set", "overrides", metavar="FIELD=VALUE", multiple=True, help=text),
    ):
        command = option(command)
    return command


def retry_set_option(command: Command) -> Command:
    """``--set``, for the fields that a retry may change."""
    text = "Change a step, the contract or errors, such as steps.0.map=features:fixed; may be repeated."
    return click.option("--set", "overrides", metavar="FIELD=VALUE", multiple=True, help=text)(command)


def make_folder(folder: Path) -> None:
    """Create a folder that a person named, with its parents.

    :raises OutputExists: when a file has that name.
    :raises StorageError: when the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputExists(
            "a file has the name of the folder", where=str(folder), next_step="choose another folder"
        ) from error
    except OSError as error:
        raise as_storage_error(error, where=str(folder)) from error


def not_empty(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse an empty text, as of a variable that is not set; callback of an option."""
    if value is not None and not value.strip():
        raise click.BadParameter("an empty text; give a value, or leave the option out", context, parameter)
    return value


def load(target: str, *, overrides: Sequence[str], params: Sequence[str], text: str | None = None) -> LoadedSpec:
    """Load the job spec in ``target`` with the values of ``--set`` and ``-p``.

    :param text: text of the file, where it was read already.
    :raises SpecError: with every issue that was found.
    """
    from pipeline.spec.load import load_spec
    from pipeline.spec.parameters import given_on_command_line

    loaded = load_spec(target, overrides=overrides, params=given_on_command_line(params), text=text)
    if any(score.by is not None for score in loaded.spec.scores):
        _prepare_to_fork()
    return loaded


def _prepare_to_fork() -> None:
    """Start a process to fork from: a fork inspects a model file in a tenth of the time of a new process."""
    from pipeline.common import forkserver as forks

    if not forks.is_running():
        forks.start(forks.likely_environment(None, None), has_steps=False)


def cluster_options(command: Command) -> Command:
    """``--cluster``, ``--device``, ``--workers``, ``--threads``, ``--memory-limit`` and ``--insecure-network``."""
    positive = click.IntRange(min=1)
    network = "Let scheduler and workers be open to the network without TLS: whoever reaches them runs code as you."
    for option in (
        click.option("--insecure-network", is_flag=True, default=None, help=network),
        click.option("--memory-limit", metavar="SIZE", help="Memory of one worker, such as 4GiB."),
        click.option("--threads", type=positive, metavar="N", help="Threads of one worker."),
        click.option("--workers", type=positive, metavar="N", help="Worker processes."),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Device that evaluates the model."),
        click.option("--cluster", metavar="NAME", help="A name in cluster_configs/, a file, or a scheduler's address."),
    ):
        command = option(command)
    return command


def _set_verbosity(context: click.Context, parameter: click.Parameter, value: int) -> None:
    if value:
        context.meta[VERBOSITY] = value
    _set_up_logging(context.meta.get(VERBOSITY, 0))


def _set_quiet(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        context.meta[VERBOSITY] = -1
    _set_up_logging(context.meta.get(VERBOSITY, 0))


_print_line: list[Callable[[str], object]] = []
"""Prints a line above the live display that is drawn; empty without one."""


def print_lines_with(print_line: Callable[[str], object] | None) -> None:
    """Let log records be printed by ``print_line``, that of a live display; None: to stderr again."""
    _print_line[:] = [] if print_line is None else [print_line]


class _StandardError(logging.Handler):
    """Write log records to the current stderr, or above the live display."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if _print_line:
            _print_line[0](self.format(record))
        else:
            click.echo(self.format(record), err=True)


def _set_up_logging(verbosity: int) -> None:
    mask_logs()
    logger = logging.getLogger("pipeline")
    if not any(isinstance(handler, _StandardError) for handler in logger.handlers):
        handler = _StandardError()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
    levels = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}
    logger.setLevel(levels.get(verbosity, logging.DEBUG))


def wants_json() -> bool:
    """Return True if ``--json`` was given."""
    return bool(click.get_current_context().meta.get(JSON))


def is_quiet() -> bool:
    """Return True if ``-q`` was given."""
    return int(click.get_current_context().meta.get(VERBOSITY, 0)) < 0


def emit(details: Mapping[str, Any], text: Callable[[], str]) -> None:
    """Write a result to stdout: as one JSON object where ``--json`` was given, else as text."""
    click.echo(json_text(details) if wants_json() else redact(text()))


def tell(error: BaseException, *, text: str, details: Mapping[str, Any], job: Mapping[str, Any] | None = None) -> None:
    """Print an error as text to stderr and, with ``--json``, as JSON to stdout.

    :param job: what is known of the job concerned; shown beside the error.
    """
    meta = click.get_current_context().meta
    if meta.get(VERBOSITY, 0) > 0:
        click.echo(redact("".join(traceback.format_exception(error))), err=True)
    if meta.get(JSON):
        click.echo(json_text({**(job or {}), "error": details}))
    click.echo(redact(text), err=True)


def json_text(details: Mapping[str, Any]) -> str:
    """Format one JSON object, its schema version first; secrets are masked."""
    return json.dumps({"schema_version": SCHEMA_VERSION, **redact_values(details)}, indent=1, default=str)


def settings_for(loaded: LoadedSpec | None = None, **flags: Any) -> Settings:
    """Load the settings with the given flags; modules of steps are found beside the job spec's file."""
    from pipeline.settings import Settings

    if loaded is not None:
        flags["import_paths"] = loaded.folders
    settings = Settings.load(**{name: value for name, value in flags.items() if value is not None})
    # --set cluster=… wins over the variable PIPELINE_CLUSTER, which wins over the job spec.
    if loaded is not None and _is_set_over_variable("cluster", loaded, settings):
        settings = replace(settings, cluster=None)
    if loaded is not None and _is_set_over_variable("device", loaded, settings):
        settings = replace(settings, device=None)
    return settings


def _is_set_over_variable(name: str, loaded: LoadedSpec, settings: Settings) -> bool:
    """Return True if ``--set`` gave a field of the spec whose setting comes from a variable."""
    from pipeline.spec.precedence import Precedence

    is_set = name in loaded.origins and loaded.origins[name].rank is Precedence.SET
    return is_set and settings.choice(name).rank is Precedence.ENVIRONMENT
