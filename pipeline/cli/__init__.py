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
from pipeline.cli import chaos, gc, inspect, models, plan, run, serve, submit, triggers, watch
from pipeline.cli.options import JSON, VERBOSITY, json_text, tell
from pipeline.common.secrets import mask_streams, redact
from pipeline.errors import PipelineError

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
            return super().invoke(ctx)
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
        except PipelineError as error:
            tell(error, text=str(error), details=error.to_dict())
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as error:
            details = {"kind": "Interrupted", "message": "interrupted", "exit_code": INTERRUPTED}
            tell(error, text="interrupted", details=details)
            ctx.exit(INTERRUPTED)
        except Exception as error:
            text = f"bug in the pipeline package: {type(error).__name__}: {error}"
            details = {"kind": type(error).__name__, "message": str(error), "exit_code": PipelineError.exit_code}
            advice = "" if ctx.meta.get(VERBOSITY, 0) > 0 else "\n  next:     run it again with -v for the traceback"
            tell(error, text=text + advice, details=details)
            ctx.exit(PipelineError.exit_code)


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
    submit.cancel,
    watch.watch,
    watch.wait,
    watch.logs,
    inspect.list_command,
    inspect.status,
    inspect.verify,
    inspect.rejects,
    triggers.triggers,
    models.models,
    inspect.diff,
    serve.serve,
    gc.gc,
    chaos.chaos,
):
    main.add_command(_command)
