"""docs/registry.md describes the files of the built-in registry."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.models.registry.file_registry import BuiltInRegistry, VersionMetadata

PAGE = Path(__file__).parents[2] / "docs" / "registry.md"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> BuiltInRegistry:
    registry = BuiltInRegistry(str(tmp_path_factory.mktemp("registry") / "models"))
    registry.register("churn", model_path.read_bytes(), VersionMetadata())
    registry.set_alias("churn", "champion", 1)
    registry.register("churn", model_path.read_bytes(), VersionMetadata(), again=True)
    registry.set_alias("churn", "champion", 2)
    registry.remove("churn", 1)
    return registry


@pytest.mark.parametrize(
    ("heading", "name"),
    [
        ("versions/&lt;n&gt;.json", "versions/1.json"),
        ("aliases/&lt;alias&gt;/&lt;n&gt;.json", "aliases/champion/1.json"),
        ("removed/&lt;n&gt;.json", "removed/1.json"),
    ],
)
def test_fields_of_records(registry: BuiltInRegistry, heading: str, name: str) -> None:
    _, found, rest = PAGE.read_text(encoding="utf-8").partition(f"### {heading}\n")
    assert found
    section = re.split(r"^#+ ", rest, maxsplit=1, flags=re.MULTILINE)[0]
    documented = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert documented == list(json.loads(registry.store.read(f"churn/{name}")))


def test_layout(registry: BuiltInRegistry) -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    drawn = {line.split()[1] for line in lines if line.startswith(("        ├── ", "        └── "))}
    root = Path(registry.root, "churn")
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    shown = {re.sub(r"[0-9a-f]{64}", "<sha256>", name) for name in found}
    assert shown == drawn | {"versions/2.json", "aliases/champion/2.json"}
