"""Models that exist for a name with ``{}``: by key, files only, and in a registry only with that alias."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from pipeline.errors import ModelError, SpecError
from pipeline.models.listing import list_models
from pipeline.models.registry.file_registry import BuiltInRegistry, VersionMetadata


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("de.ubj", "at.ubj", "de.json", ".ubj", "[x].ubj", "not/de.ubj"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "folder.ubj").mkdir()
    return tmp_path


def test_files_by_key_in_order(folder: Path) -> None:
    found = list_models(str(folder / "{}.ubj"))
    assert found == {key: str(folder / f"{key}.ubj") for key in ("[x]", "at", "de")}
    assert list(found) == sorted(found)


def test_the_key_may_be_a_folder(folder: Path) -> None:
    assert list_models(str(folder / "{}" / "de.ubj")) == {"not": str(folder / "not" / "de.ubj")}


def test_a_listing_without_models_is_an_error(folder: Path) -> None:
    with pytest.raises(ModelError, match="no model for any key") as caught:
        list_models(str(folder / "{}.cbm"))
    assert caught.value.where.endswith("{}.cbm")


def test_urls(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    for key in ("de", "at"):
        system.pipe(f"/keyed/m-{key}.ubj", b"x")
    system.pipe("/keyed/m-.ubj", b"x")
    assert list_models("memory://keyed/m-{}.ubj") == {key: f"memory://keyed/m-{key}.ubj" for key in ("at", "de")}
    with pytest.raises(SpecError, match="wildcard"):
        list_models("memory://keyed/*/{}.ubj")


def test_models_of_a_registry_that_have_the_alias(tmp_path: Path, model_path: Path) -> None:
    registry = BuiltInRegistry(str(tmp_path / "models"))
    data = model_path.read_bytes()
    for name in ("churn-de", "churn-at", "churn-", "other"):
        registry.register(name, data, VersionMetadata(source="test"))
    for name in ("churn-de", "other"):
        registry.set_alias(name, "champion", 1)
    names = "models:/churn-{}@champion", "models:/churn-{}/1"
    found = [list_models(name, registry=str(tmp_path / "models")) for name in names]
    assert found == [
        {"de": "models:/churn-de@champion"},
        {"at": "models:/churn-at/1", "de": "models:/churn-de/1"},
    ]
