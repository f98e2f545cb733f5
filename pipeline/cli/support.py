"""``why``, ``doctor`` and ``completion``: help where something does not work as expected."""

from __future__ import annotations

import os
from pathlib import Path

import click

from pipeline.cli.inspect import job_argument
from pipeline.cli.options import directory_option, emit, output_options, settings_for
from pipeline.errors import SpecError
from pipeline.storage.urls import storage_errors

SCRIPT = "batch-pipeline"
"""Name of the console script."""
SHELLS = ("bash", "zsh", "fish")


@click.command(short_help="Explain why a job makes no progress.")
@job_argument
@directory_option
@output_options
def why(job: str, directory: str | None) -> None:
    """Explain why a job makes no progress: no workers, its place in the queue, who holds its lease, paused workers."""
    from pipeline.jobs.listing import find_job
    from pipeline.service.why import explain

    settings = settings_for(directory=directory)
    explanation = explain(find_job(settings.directory, job), lease_seconds=settings.lease_seconds)
    emit(explanation.to_dict(), explanation.text)


@click.command(short_help="Check this machine: versions, disk, file system, credentials.")
@directory_option
@output_options
@click.pass_context
def doctor(context: click.Context, directory: str | None) -> None:
    """Check what jobs need of this machine; exit with 1 when a check fails. Credentials are shown by name only."""
    from pipeline.common.text import table_text
    from pipeline.service.doctor import Outcome, examine

    findings = examine(settings_for(directory=directory))
    is_ok = all(finding.outcome is not Outcome.FAIL for finding in findings)

    def text() -> str:
        rows = [[str(f.outcome), f.check, f.text + (f"; next: {f.next}" if f.next else "")] for f in findings]
        return table_text(["", "CHECK", "FOUND"], rows)

    emit({"ok": is_ok, "findings": [finding.to_dict() for finding in findings]}, text)
    if not is_ok:
        context.exit(1)


@click.command(short_help="Install completion for a shell.")
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@click.option("--print", "is_printed", is_flag=True, help="Print the script, instead of installing it.")
@output_options
@click.pass_context
def completion(context: click.Context, shell: str | None, is_printed: bool) -> None:
    """Install completion of commands, options and job ids of batch-pipeline, for bash, zsh or fish.

    Default: the shell in $SHELL.
    """
    from click.shell_completion import get_completion_class

    shell = shell or Path(os.environ.get("SHELL", "")).name
    kind = get_completion_class(shell)
    if kind is None or shell not in SHELLS:
        raise SpecError("unknown shell", where="$SHELL", found=shell or "not set", expected=", ".join(SHELLS))
    maker = kind(context.find_root().command, {}, SCRIPT, f"_{SCRIPT.replace('-', '_').upper()}_COMPLETE")
    # `source` would run bash for its version.
    script = maker.source_template % maker.source_vars()
    if is_printed:
        click.echo(script)
        return
    path, hint = _completion_file(shell)
    with storage_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script, encoding="utf-8")
    emit({"shell": shell, "path": str(path)}, lambda: f"Wrote {path}. {hint}")


def _completion_file(shell: str) -> tuple[Path, str]:
    """Return the file from which a shell loads the completion of a command, and what is left to do."""
    data = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser()
    config = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    if shell == "bash":
        return data / "bash-completion" / "completions" / SCRIPT, "New shells with bash-completion use it."
    if shell == "fish":
        return config / "fish" / "completions" / f"{SCRIPT}.fish", "New shells use it."
    return (
        Path("~/.zfunc").expanduser() / f"_{SCRIPT}",
        "Once, put this before compinit in ~/.zshrc: fpath=(~/.zfunc $fpath)",
    )
