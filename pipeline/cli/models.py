"""``models``: the model registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.cli.options import emit, output_options, settings_for
from pipeline.errors import ConflictError, SpecError

if TYPE_CHECKING:
    from pipeline.models.registry import ModelRegistry
    from pipeline.models.registry.file_registry import BuiltInRegistry
    from pipeline.models.registry.records import Registered

Command = TypeVar("Command", bound=Callable[..., Any])


def registry_option(command: Command) -> Command:
    """``--registry``."""
    text = "Path or URL of the registry. Default: pipeline.registry of dask.config, else .pipeline/models."
    return click.option("--registry", metavar="ROOT", help=text)(command)


reason_option = click.option("--reason", default="", help="Reason for the change, kept in the history.")


@click.group(short_help="The model registry: versions and aliases.")
def models() -> None:
    """Manage models: immutable versions, and aliases that point to them.

    A job spec names one as models:/churn@champion or models:/churn/3.
    """


@models.command(short_help="Register a model file as the next version of a model.")
@click.argument("file", metavar="FILE")
@click.option("--name", help="Name of the model. Default: that of the file.")
@click.option("--alias", "aliases", multiple=True, help="Point this alias to the version; may be repeated.")
@click.option("--metric", "metrics", metavar="NAME=NUMBER", multiple=True, help="Such as auc=0.9; may be repeated.")
@click.option("--tag", "tags", metavar="NAME=TEXT", multiple=True, help="Such as data=2026-01; may be repeated.")
@click.option("--description", default="", help="One line about it.")
@click.option("--parent", type=click.IntRange(min=1), help="Version that it was trained from.")
@click.option("--training", metavar="PATH", multiple=True, help="Parquet of its training data, for a gate; repeatable.")
@click.option("--again", is_flag=True, help="Register a new version even if one has the same bytes.")
@registry_option
@output_options
def register(
    *,
    file: str,
    name: str | None,
    aliases: Sequence[str],
    metrics: Sequence[str],
    tags: Sequence[str],
    description: str,
    parent: int | None,
    training: Sequence[str],
    again: bool,
    registry: str | None,
) -> None:
    """Register a model file as the next version of a model. The file is copied in; versions never change.

    The same file again gives the version it has already. Of training data the distributions are stored, no rows.
    """
    from pipeline.models.registry.client import model_bytes
    from pipeline.models.registry.file_registry import VersionMetadata
    from pipeline.models.registry.records import check_alias, check_model_name

    store = _built_in(registry)
    name = check_model_name(name or file.rstrip("/").rsplit("/", 1)[-1].rsplit(".", 1)[0])
    for alias in aliases:
        check_alias(alias)
    measured = {key: _number(key, text) for key, text in _pairs(metrics, flag="--metric").items()}
    data, source = model_bytes(file)
    sketches = None
    if training:
        from pipeline.report.baseline import file_sketches
        from pipeline.sources.locate import locate

        sketches, _ = file_sketches(locate(training))
    metadata = VersionMetadata(measured, _pairs(tags, flag="--tag"), description, parent, source, sketches)
    registered = store.register(name, data, metadata, again=again)
    for alias in aliases:
        store.set_alias(name, alias, registered.record.version)
    emit(
        {"is_new": registered.is_new, "aliases": list(aliases), **registered.record.to_dict()},
        lambda: _registered_text(registered, aliases),
    )


def _registered_text(registered: Registered, aliases: Sequence[str]) -> str:
    record = registered.record
    title = "Registered" if registered.is_new else "Already registered:"
    return "\n".join(
        [
            f"{title} {record.uri}  (sha256 {record.digest[:12]})",
            *(f"  alias      models:/{record.name}@{alias}" for alias in aliases),
            *([] if aliases else _next(f"python -m pipeline models alias {record.name} champion {record.version}")),
        ]
    )


@models.command("list", short_help="List the models, or the versions of one.")
@click.argument("name", required=False)
@registry_option
@output_options
def list_command(name: str | None, registry: str | None) -> None:
    """List the models, or the versions of one, newest first."""
    from pipeline.models.registry.client import version_row, versions_of

    store = _open(registry)
    if name is None:
        summaries = [store.summary(model).to_dict() for model in store.names()]
        emit({"registry": store.root, "models": summaries}, lambda: _models_text(summaries, store.root))
        return
    rows = [version_row(record, aliases) for record, aliases in versions_of(store, name)]
    details = store.summary(name).to_dict()
    emit({"registry": store.root, **details, "versions": rows}, lambda: _versions_text(rows))


@models.command(short_help="Show a version, or a model with the history of its aliases.")
@click.argument("reference", metavar="NAME|models:/NAME@ALIAS|models:/NAME/N")
@registry_option
@output_options
def show(reference: str, registry: str | None) -> None:
    """Show a version in full, or a model with its versions and the history of its aliases."""
    from pipeline.spec.model_ref import ModelRef

    store = _open(registry)
    if reference.startswith("models:"):
        details = store.lookup(ModelRef.parse(reference)).to_dict()
        emit(details, lambda: _version_text(details))
        return
    summary = store.summary(reference).to_dict()
    files = _built_in(registry) if store.kind == "built-in" else None
    histories = [files.history(reference, alias) for alias in files.aliases(reference)] if files else []
    moves = sorted((move.to_dict() for history in histories for move in history), key=lambda move: move["created"])
    emit({**summary, "history": moves}, lambda: _model_text(summary, moves))


@models.command(short_help="Point an alias to a version.")
@click.argument("name")
@click.argument("alias")
@click.argument("version", type=click.IntRange(min=1), required=False)
@click.option("--delete", is_flag=True, help="Delete the alias.")
@reason_option
@registry_option
@output_options
def alias(*, name: str, alias: str, version: int | None, delete: bool, reason: str, registry: str | None) -> None:
    """Point an alias to a version, or delete it. Jobs that name the alias use the new version from their next start."""
    if (version is None) != delete:
        raise click.UsageError("give a version number, or --delete")
    move = _open(registry).set_alias(name, alias, version, reason=reason)
    emit(move.to_dict(), lambda: _move_text(move))


@models.command(short_help="Point an alias to its previous version.")
@click.argument("name")
@click.argument("alias")
@reason_option
@registry_option
@output_options
def rollback(name: str, alias: str, reason: str, registry: str | None) -> None:
    """Point an alias to its previous version. Each further call goes back one version more."""
    move = _built_in(registry).rollback(name, alias, reason=reason)
    emit(move.to_dict(), lambda: _move_text(move))


@models.command(short_help="Check every file against its digest.")
@click.argument("name", required=False)
@registry_option
@output_options
@click.pass_context
def verify(context: click.Context, name: str | None, registry: str | None) -> None:
    """Digest every model file again, and check that numbers are dense and aliases lead somewhere."""
    checks = [checked.to_dict() for checked in _built_in(registry).verify(name)]
    is_ok = all(checked["ok"] for checked in checks)
    emit({"ok": is_ok, "checks": checks}, lambda: _checks_text(checks, ok=is_ok))
    if not is_ok:
        context.exit(ConflictError.exit_code)


@models.command(short_help="Delete a version permanently.")
@click.argument("name")
@click.argument("version", type=click.IntRange(min=1))
@click.option("--force", is_flag=True, help="Delete the aliases that point to it.")
@reason_option
@registry_option
@output_options
def remove(name: str, version: int, force: bool, reason: str, registry: str | None) -> None:
    """Delete a version and its file; its number is never reused. Refused while an alias points to it."""
    gone = _built_in(registry).remove(name, version, force=force, reason=reason)
    emit(gone.to_dict(), lambda: f"Removed models:/{name}/{version}")


def _open(registry: str | None) -> ModelRegistry:
    from pipeline.models.registry import open_registry

    settings = settings_for(registry=registry)
    return open_registry(settings.registry, cache=settings.directory)


def _built_in(registry: str | None) -> BuiltInRegistry:
    from pipeline.models.registry.client import built_in

    return built_in(_open(registry))


def _pairs(texts: Sequence[str], *, flag: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise click.UsageError(f"{flag} takes NAME=VALUE, not {text!r}.")
        pairs[key] = value
    return pairs


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SpecError("not a valid metric value", where=f"--metric {key}", found=repr(text)) from None


def _next(command: str) -> list[str]:
    return [f"  next       {command}"]


def _models_text(summaries: list[dict[str, Any]], root: str) -> str:
    from pipeline.common.text import table_text

    if not summaries:
        return f"no models in {root}\n  next:     python -m pipeline models register FILE"
    rows = [
        [model["name"], str(model["latest"] or ""), str(len(model["versions"])), _aliases_text(model["aliases"])]
        for model in summaries
    ]
    return table_text(["MODEL", "LATEST", "VERSIONS", "ALIASES"], rows)


def _aliases_text(aliases: dict[str, int]) -> str:
    return ", ".join(f"{alias} = {number}" for alias, number in sorted(aliases.items()))


def _metrics_text(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in metrics.items())


def _versions_text(rows: list[dict[str, Any]]) -> str:
    from pipeline.common.text import table_text

    cells = [
        [
            str(row["version"]),
            ", ".join(row["aliases"]),
            row["digest"][:12],
            row["task"],
            _metrics_text(row["metrics"]),
            row["created"],
            row["user"],
        ]
        for row in rows
    ]
    return table_text(["VERSION", "ALIASES", "SHA256", "TASK", "METRICS", "CREATED", "BY"], cells)


def _version_text(details: dict[str, Any]) -> str:
    lines = [details["uri"]]
    shown = {
        "file": details["file"],
        "sha256": details["digest"],
        "model": f"{details['flavor']}, {details['objective'] or details['task']}, {details['trees']:,} trees",
        "rounds": _rounds(details),
        "features": ", ".join(feature["name"] for feature in details["features"]),
        "metrics": _metrics_text(details["metrics"]),
        "tags": ", ".join(f"{key}={value}" for key, value in details["tags"].items()),
        "about": details["description"],
        "parent": details["parent"] and f"models:/{details['name']}/{details['parent']}",
        "source": details["source"],
        "created": f"{details['created']} by {details['user']} on {details['host']}".removesuffix(" on "),
    }
    return "\n".join([*lines, *(f"  {name:<10} {value}" for name, value in shown.items() if value)])


def _rounds(details: dict[str, Any]) -> str:
    if not details["rounds"] or details["best_iteration"] is None:
        return ""
    return (
        f"{details['rounds']:,}, best iteration {details['best_iteration']:,}; "
        "a job scores with all, unless score.iteration_range says otherwise"
    )


def _model_text(summary: dict[str, Any], moves: list[dict[str, Any]]) -> str:
    lines = [
        summary["name"],
        f"  versions   {', '.join(str(number) for number in summary['versions']) or 'none'}",
        *([f"  removed    {', '.join(str(number) for number in summary['removed'])}"] if summary["removed"] else []),
        *(f"  alias      {alias} = {number}" for alias, number in sorted(summary["aliases"].items())),
    ]
    for move in moves:
        where = "removed" if move["version"] is None else f"version {move['version']}"
        action = "" if move["action"] in ("set", "unset") else f" ({move['action']})"
        reason = f": {move['reason']}" if move["reason"] else ""
        lines.append(f"  {move['created']}  {move['alias']} -> {where}{action} by {move['user']}{reason}")
    return "\n".join(lines)


def _move_text(move: Any) -> str:
    where = "is removed" if move.version is None else f"-> version {move.version}"
    return f"models:/{move.name}@{move.alias} {where}"


def _checks_text(checks: list[dict[str, Any]], *, ok: bool) -> str:
    lines = [f"  {'ok' if check['ok'] else 'WRONG':<6} {check['what']}  {check['detail']}" for check in checks]
    return "\n".join(["VERIFIED" if ok else "NOT AS REGISTERED", *lines])
