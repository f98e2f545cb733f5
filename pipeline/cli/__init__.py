"""The command line: ``python -m pipeline`` and ``dask pipeline``.

stdout is data, stderr is progress and messages. Nothing that takes time is imported before a command needs it.
"""

from __future__ import annotations

import difflib
import os
import sys
from contextlib import suppress
from typing import Any

import click

from pipeline import __version__
from pipeline.cli import chaos, dashboard, gc, inspect, models, plan, run, serve, submit, support, triggers, watch
from pipeline.cli.options import JSON, VERBOSITY, json_text, tell
from pipeline.common.secrets import mask_streams, redact
from pipeline.errors import PipelineError, SpecError, StepFailed
from pipeline.storage.urls import as_storage_error

BROKEN_PIPE = 141
"""128 + SIGPIPE: whoever read stdout has gone."""
INTERRUPTED = 130


class Commands(click.Group):
    """A group that turns every error into a message, an exit code and, where asked for, JSON."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note ``--json`` first, so that errors in other arguments are printed as JSON too."""
        ctx.meta[JSON] = "--json" in args
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands in the order in which a newcomer needs them."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve a command as click does; for an unknown name, suggest the nearest one."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            if not near and args[0].endswith((".yaml", ".yml", ".json")):
                hint = f"; did you mean: {ctx.command_path} run {args[0]}?"
            ctx.fail(f"unknown command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        mask_streams()
        try:
            _check_working_directory()
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except (click.exceptions.Exit, click.Abort):
            raise
        except click.ClickException as error:
            if ctx.meta.get(JSON):
                click.echo(json_text({"error": _details(error)}))
            error.message = redact(error.message)  # type: ignore[misc]
            raise
        except BrokenPipeError:
            _close_stdout()
            ctx.exit(BROKEN_PIPE)
        except KeyboardInterrupt as error:
            details = {"kind": "Interrupted", "message": "interrupted", "exit_code": INTERRUPTED}
            tell(error, text="interrupted", details=details)
            ctx.exit(INTERRUPTED)
        except SystemExit as error:
            # Only code of a job raises it here: click's own way out is Exit.
            ctx.exit(_tell_error(StepFailed("code of the job ended the process", found=f"sys.exit({error.code!r})")))
        except Exception as error:
            ctx.exit(_tell_error(error))


def _tell_error(error: Exception) -> int:
    """Print an error; return the exit status."""
    known = _as_known(error)
    if known is None:
        text = f"bug in the pipeline package: {type(error).__name__}: {error}"
        details = {"kind": type(error).__name__, "message": str(error), "exit_code": PipelineError.exit_code}
        is_verbose = click.get_current_context().meta.get(VERBOSITY, 0) > 0
        text += "" if is_verbose else "\n  next:     run it again with -v for the traceback"
        tell(error, text=text, details=details)
        return PipelineError.exit_code
    try:
        sys.stdout.flush()
        tell(known, text=str(known), details=known.to_dict())
    except OSError:
        # stdout itself cannot be written.
        _close_stdout()
        tell(known, text=str(known), details=known.to_dict())
    return known.exit_code


def _as_known(error: Exception) -> PipelineError | None:
    """Return ``error`` as an error of this package; None for a bug."""
    if isinstance(error, PipelineError):
        return error
    if isinstance(error, OSError):
        return as_storage_error(error, where=str(error.filename or "stdout or stderr"))
    return _dask_config_error(error)


def _check_working_directory() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise SpecError(
            "the working directory does not exist any more",
            found=error.strerror or str(error),
            expected="a folder: relative paths start from it",
            next_step="cd to an existing folder",
        ) from error


def _dask_config_error(error: Exception) -> SpecError | None:
    """Return the error for a malformed file of Dask's configuration, which Dask reads when it is imported."""
    text = " ".join(str(error).split())
    if not (isinstance(error, ValueError) and text.startswith("A dask config file at")):
        return None
    return SpecError(
        "a file of Dask's configuration cannot be read",
        found=text[:400],
        expected="YAML",
        next_step="fix or remove the file (~/.config/dask/, /etc/dask/, or DASK_CONFIG)",
    )


def _details(error: click.ClickException) -> dict[str, Any]:
    return {"kind": type(error).__name__, "message": error.format_message(), "exit_code": error.exit_code}


def _close_stdout() -> None:
    """Point stdout nowhere, so that Python does not fail again when it flushes it at the end."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@click.group(cls=Commands, name="pipeline", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pipeline")
def main() -> None:
    """Batch inference jobs on Dask: every row scored, once, with proof.

    \b
    New here?   python -m pipeline demo
    Your own:   python -m pipeline init, then validate, plan, run
    """


for _command in (
    plan.init,
    run.demo,
    plan.validate,
    plan.plan,
    run.run,
    submit.submit,
    run.resume,
    run.retry,
    run.publish,
    submit.cancel,
    watch.watch,
    watch.wait,
    watch.logs,
    inspect.list_command,
    inspect.status,
    support.why,
    inspect.report,
    dashboard.dashboard,
    dashboard.metrics,
    inspect.verify,
    inspect.rejects,
    triggers.triggers,
    models.models,
    inspect.diff,
    serve.serve,
    gc.gc,
    chaos.chaos,
    support.doctor,
    support.completion,
):
    main.add_command(_command)
