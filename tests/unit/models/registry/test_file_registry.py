"""The built-in model registry: its files, the guarantees of its verbs, and its commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dask.config
import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.common.digest import digest_bytes
from pipeline.common.sketch import MOST_COLUMNS, NumberSketch, Sketches
from pipeline.errors import ConflictError, ModelDigestMismatch, ModelError, RefusedForSafety, SpecError, StateCorrupt
from pipeline.models.registry.client import Registry
from pipeline.models.registry.file_registry import BuiltInRegistry, VersionMetadata
from pipeline.models.registry.records import AliasRecord, VersionRecord, previous_target, targets
from pipeline.models.registry.training import training_sketches
from pipeline.spec.model_ref import ModelRef
from pipeline.testing.oracle import train_model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Three models over the same features."""
    folder = tmp_path_factory.mktemp("registered")
    return [train_model(folder / f"m{number}.ubj", rounds=2 + number).read_bytes() for number in range(3)]


@pytest.fixture
def registry(tmp_path: Path) -> BuiltInRegistry:
    return BuiltInRegistry(str(tmp_path / "models"))


@pytest.fixture
def filled(registry: BuiltInRegistry, models: list[bytes]) -> BuiltInRegistry:
    """``churn`` with three versions; ``champion`` was set to each in turn."""
    for number, data in enumerate(models, 1):
        registry.register("churn", data, VersionMetadata())
        registry.set_alias("churn", "champion", number)
    return registry


def moves(*texts: str) -> list[AliasRecord]:
    """``set 1``, ``rollback 2``, ``unset``."""
    parts = [text.split() for text in texts]
    return [
        AliasRecord("m", "a", place, int(part[1]) if len(part) > 1 else None, part[0])  # type: ignore[arg-type]
        for place, part in enumerate(parts, 1)
    ]


@pytest.mark.parametrize(
    ("history", "live", "expected"),
    [
        (["set 1"], {1}, None),
        (["set 1", "set 2"], {1, 2}, 1),
        (["set 1", "set 2", "set 3", "rollback 2"], {1, 2, 3}, 1),
        (["set 1", "set 2", "rollback 1"], {1, 2}, None),
        (["set 1", "set 2", "rollback 1", "set 3"], {1, 2, 3}, 1),
        (["set 1", "set 2", "set 3"], {1, 3}, 1),
        (["set 1", "set 2", "set 1"], {1, 2}, 2),
        (["set 1", "set 2", "set 1"], {1}, None),
        (["set 1", "set 2", "unset"], {1, 2}, 2),
        (["set 1", "unset", "set 2"], {1, 2}, 1),
        (["set 1", "set 2", "withdrawn 1"], {1}, None),
        (["unset"], set(), None),
    ],
)
def test_a_rollback_leads_to_the_version_before(history: list[str], live: set[int], expected: int | None) -> None:
    assert previous_target(moves(*history), live=live) == expected


def test_rolling_back_is_undone_by_setting_again() -> None:
    assert targets(moves("set 1", "set 2", "rollback 1", "set 2")) == (1, 2)


def test_versions_are_dense_and_hold_what_was_said(registry: BuiltInRegistry, models: list[bytes]) -> None:
    said = VersionMetadata({"auc": 0.9}, {"data": "2026-01"}, "first", None, "m.ubj")
    first = registry.register("churn", models[0], said).record
    second = registry.register("churn", models[1], VersionMetadata(parent=1)).record
    assert (first.version, second.version, second.parent) == (1, 2, 1)
    assert registry.version("churn", 1) == first
    assert (first.metrics, first.tags, first.description, first.source) == (
        {"auc": 0.9},
        {"data": "2026-01"},
        "first",
        "m.ubj",
    )
    assert first.digest == digest_bytes(models[0])
    assert registry.store.read(first.file) == models[0]
    assert (first.trees, first.objective, first.task) == (2, "binary:logistic", "binary")


def test_the_same_file_again_is_the_same_version(filled: BuiltInRegistry, models: list[bytes]) -> None:
    again = filled.register("churn", models[1], VersionMetadata())
    assert (again.is_new, again.record.version) == (False, 2)
    with pytest.raises(ConflictError, match="versions never change") as caught:
        filled.register("churn", models[1], VersionMetadata(metrics={"auc": 0.8}))
    assert "--again" in caught.value.next_step
    new = filled.register("churn", models[1], VersionMetadata(metrics={"auc": 0.8}), again=True)
    assert (new.is_new, new.record.version, new.record.digest) == (True, 4, again.record.digest)
    assert filled.register("other", models[1], VersionMetadata()).record.version == 1


def test_distributions_of_training_data_belong_to_a_version(registry: BuiltInRegistry, models: list[bytes]) -> None:
    sketches = Sketches()
    columns = {f"other_{number}": np.arange(3.0) for number in range(40)} | {"age": np.array([20.0, 30.0, 40.0])}
    sketches.add(pa.table(columns))
    record = registry.register("churn", models[0], VersionMetadata(training=sketches)).record
    assert VersionRecord.from_json(record.to_json_bytes(), where="x") == record
    found = training_sketches(registry.resolve(ModelRef("models:/churn/1")))
    assert found is not None
    assert len(found.columns) == MOST_COLUMNS
    age = found.columns["age"]
    assert isinstance(age, NumberSketch)
    assert age.mean == 30
    # The same bytes again: the version as it is, unless its training data are said to be others.
    assert not registry.register("churn", models[0], VersionMetadata()).is_new
    sketches.add(pa.table(columns))
    with pytest.raises(ConflictError, match="versions never change"):
        registry.register("churn", models[0], VersionMetadata(training=sketches))
    registry.store.replace(record.training, b"{}")
    with pytest.raises(StateCorrupt, match="training data"):
        training_sketches(registry.resolve(ModelRef("models:/churn/1")))
    assert "training" not in json.loads(registry.register("churn", models[1], VersionMetadata()).record.to_json_bytes())


def test_an_alias_keeps_its_history(filled: BuiltInRegistry) -> None:
    assert filled.rollback("churn", "champion", reason="worse").version == 2
    assert filled.rollback("churn", "champion").version == 1
    with pytest.raises(ConflictError, match="no version to roll back to"):
        filled.rollback("churn", "champion")
    history = filled.history("churn", "champion")
    assert [(move.version, move.action) for move in history] == [
        (1, "set"),
        (2, "set"),
        (3, "set"),
        (2, "rollback"),
        (1, "rollback"),
    ]
    assert history[3].reason == "worse"
    assert filled.set_alias("churn", "champion", 1) == history[-1], "to where it is already is no move"


def test_a_version_in_use_is_not_removed(filled: BuiltInRegistry) -> None:
    with pytest.raises(ConflictError, match="an alias points to the version"):
        filled.remove("churn", 3)
    assert filled.lookup(ModelRef("models:/churn@champion")).version == 3
    filled.remove("churn", 3, force=True, reason="leaks")
    with pytest.raises(ModelError, match="has no alias"):
        filled.lookup(ModelRef("models:/churn@champion"))
    assert filled.rollback("churn", "champion").version == 2


def test_a_number_is_never_used_again(filled: BuiltInRegistry, models: list[bytes]) -> None:
    file = filled.version("churn", 3).file
    filled.remove("churn", 3, force=True)
    assert not filled.store.exists(file)
    with pytest.raises(ModelError, match="was removed"):
        filled.resolve(ModelRef("models:/churn/3"))
    with pytest.raises(ModelError, match="was removed"):
        filled.set_alias("churn", "champion", 3)
    assert filled.register("churn", models[2], VersionMetadata()).record.version == 4
    assert filled.store.exists(file)
    assert filled.summary("churn").removed == (3,)
    assert all(checked.ok for checked in filled.verify())


def test_bytes_that_another_version_has_stay(filled: BuiltInRegistry, models: list[bytes]) -> None:
    filled.register("churn", models[0], VersionMetadata(), again=True)
    filled.remove("churn", 1)
    assert filled.resolve(ModelRef("models:/churn/4")).digest == digest_bytes(models[0])


def test_verify_finds_what_was_changed(filled: BuiltInRegistry, models: list[bytes]) -> None:
    assert [checked.ok for checked in filled.verify("churn")] == [True] * 4
    first, second = filled.version("churn", 1), filled.version("churn", 2)
    filled.store.replace(first.file, models[1])
    filled.store.remove(second.file)
    filled.store.remove("churn/aliases/champion/2.json")
    wrong = {checked.what: checked.detail for checked in filled.verify() if not checked.ok}
    assert set(wrong) == {"models:/churn/1", "models:/churn/2", "models:/churn@champion"}
    with pytest.raises(ModelDigestMismatch, match="not the one that was registered"):
        filled.resolve(ModelRef("models:/churn/1"))
    for data in models[:2]:
        filled.register("churn", data, VersionMetadata())
    assert {checked.what for checked in filled.verify() if not checked.ok} == {"models:/churn@champion"}


def test_a_damaged_record_is_said(filled: BuiltInRegistry) -> None:
    filled.store.replace("churn/versions/2.json", b"{")
    with pytest.raises(StateCorrupt, match="damaged"):
        filled.lookup(ModelRef("models:/churn/2"))
    filled.store.replace("churn/versions/2.json", filled.store.read("churn/versions/1.json"))
    with pytest.raises(StateCorrupt, match="not the one its name says"):
        filled.lookup(ModelRef("models:/churn/2"))


def test_file_that_is_not_a_model_is_not_registered(registry: BuiltInRegistry) -> None:
    with pytest.raises(ModelError):
        registry.register("churn", b"nothing", VersionMetadata())
    with pytest.raises(RefusedForSafety):
        registry.register("churn", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n.", VersionMetadata())
    assert registry.names() == []


@pytest.mark.parametrize("name", ["Churn", "../x", "a/b", "", "x" * 65, ".hidden", "a b"])
def test_a_name_cannot_lead_anywhere(name: str, registry: BuiltInRegistry, models: list[bytes]) -> None:
    with pytest.raises(SpecError, match="invalid model name"):
        registry.register(name, models[0], VersionMetadata())
    assert registry.store.list_folders() == []


@pytest.mark.parametrize("alias", ["1", "v2", "latest", "../x", "A", ""])
def test_an_alias_is_a_word(alias: str, filled: BuiltInRegistry) -> None:
    with pytest.raises(SpecError, match="invalid alias"):
        filled.set_alias("churn", alias, 1)


@pytest.mark.parametrize(
    "metadata",
    [VersionMetadata({"a\nb": 1.0}), VersionMetadata({"auc": float("nan")}), VersionMetadata(tags={"": "x"})],
)
def test_metadata_is_checked(metadata: VersionMetadata, registry: BuiltInRegistry, models: list[bytes]) -> None:
    with pytest.raises(SpecError):
        registry.register("churn", models[0], metadata)


def test_a_parent_must_be_there(registry: BuiltInRegistry, models: list[bytes]) -> None:
    with pytest.raises(ModelError):
        registry.register("churn", models[0], VersionMetadata(parent=7))


def test_records_are_read_back(filled: BuiltInRegistry) -> None:
    record = filled.version("churn", 1)
    assert VersionRecord.from_json(record.to_json_bytes(), where="") == record


def test_boosters_and_bytes_from_python(tmp_path: Path, models: list[bytes]) -> None:
    xgboost = pytest.importorskip("xgboost")
    registry = Registry(tmp_path / "models")
    booster = xgboost.Booster(model_file=bytearray(models[0]))
    record = registry.register(booster, name="churn", alias="champion", metrics={"auc": 0.5})
    assert registry.get("models:/churn@champion") == record
    assert registry.register(models[1], name="churn").version == 2
    with pytest.raises(SpecError, match="not a model of a supported kind"):
        registry.register(object(), name="churn")
    assert [checked.ok for checked in registry.verify()] == [True] * 3


class Shell:
    """The commands, on a registry of the test's own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        options = ["--registry", str(self.root), "--json"]
        result = CliRunner().invoke(main, ["models", *arguments, *options])
        assert result.exit_code == code, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        text = CliRunner().invoke(main, ["models", *arguments, *options[:-1]])
        assert text.output.strip()
        return found


def test_commands(tmp_path: Path, models: list[bytes]) -> None:
    shell = Shell(tmp_path / "models")
    for number, data in enumerate(models):
        (tmp_path / f"m{number}.ubj").write_bytes(data)
    assert shell("list")["models"] == []
    options = ["--name", "churn", "--alias", "champion", "--metric", "auc=0.9", "--tag", "data=2026"]
    made = shell("register", str(tmp_path / "m0.ubj"), *options)
    assert (made["uri"], made["is_new"], made["metrics"]) == ("models:/churn/1", True, {"auc": 0.9})
    assert shell("register", str(tmp_path / "m1.ubj"), "--name", "churn", "--parent", "1")["version"] == 2
    shell("register", str(tmp_path / "m2.ubj"), "--name", "churn")
    assert shell("alias", "churn", "champion", "2")["version"] == 2
    assert [row["version"] for row in shell("list", "churn")["versions"]] == [3, 2, 1]
    assert shell("list")["models"][0]["aliases"] == {"champion": 2}
    assert shell("show", "models:/churn@champion")["version"] == 2
    assert [move["version"] for move in shell("show", "churn")["history"]] == [1, 2]
    assert shell("verify")["ok"]
    assert shell("remove", "churn", "2", code=6)["error"]["kind"] == "ConflictError"
    shell("remove", "churn", "3", "--reason", "worse")
    assert shell("show", "models:/churn/3", code=5)["error"]["kind"] == "ModelError"
    record = BuiltInRegistry(str(shell.root)).version("churn", 1)
    (shell.root / record.file).write_bytes(b"x")
    assert not shell("verify", code=6)["ok"]


def test_a_rollback_from_the_command_line(tmp_path: Path, filled: BuiltInRegistry) -> None:
    runner = CliRunner()
    for expected in (2, 1):
        result = runner.invoke(main, ["models", "rollback", "churn", "champion", "--registry", filled.root, "--json"])
        assert json.loads(result.stdout)["version"] == expected
    assert runner.invoke(main, ["models", "rollback", "churn", "champion", "--registry", filled.root]).exit_code == 6


@pytest.mark.parametrize(
    "arguments",
    [
        ("alias", "churn", "champion"),
        ("register", "m.ubj", "--metric", "auc"),
        ("alias", "churn", "x", "1", "--delete"),
    ],
)
def test_usage_of_commands(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["models", *arguments, "--registry", str(tmp_path)])
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("model", "words"),
    [("models:/churn/1", "names version 1 by its number"), ("m.ubj", "is a file"), ("models:/churn@champion", "")],
)
def test_validate_warns_of_versions_that_are_written_down(
    model: str, words: str, filled: BuiltInRegistry, models: list[bytes], tmp_path: Path
) -> None:
    (tmp_path / "m.ubj").write_bytes(models[0])
    path = str(tmp_path / "m.ubj") if model == "m.ubj" else model
    job = tmp_path / "job.yaml"
    job.write_text(
        f"name: churn\nsource: {{path: lake/}}\nsteps:\n  - score: {{model: '{path}'}}\nsink: {{path: out/}}\n"
    )
    with dask.config.set({"pipeline.registry": filled.root}):
        result = CliRunner().invoke(main, ["validate", str(job), "--json"])
        text = CliRunner().invoke(main, ["validate", str(job)])
    found = json.loads(result.stdout)
    assert found["ok"], found
    assert [words in warning for warning in found["warnings"]] == ([True] if words else [])
    assert ("warning:" in text.stdout) == bool(words)
