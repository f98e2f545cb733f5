"""Models of a spec by key: listed when a job is planned, pinned one by one, each alias followed, in fan-outs too."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xgboost

from pipeline.driver.alias_change import aliases, find_outdated, pinned_versions
from pipeline.driver.prepare import prepare, work_digest
from pipeline.driver.score_models import resolve_models, scored_by, scored_steps, with_listed_models
from pipeline.errors import ModelError, SpecError
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.models.flavors import xgboost as flavor
from pipeline.models.flavors import xgboost_probe
from pipeline.models.model import ModelVersion, OutputType
from pipeline.models.registry.file_registry import BuiltInRegistry, VersionMetadata
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec

KEYS = ("at", "de")


@pytest.fixture(autouse=True)
def fast_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inspect models in this process: a child process takes a second."""

    def probe(data: bytes, *, where: str) -> dict[str, Any]:
        return xgboost_probe.facts(xgboost.Booster(model_file=bytearray(data)), data)

    monkeypatch.setattr(flavor, "probe", probe)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file of rows, and a model for each key."""
    (tmp_path / "models").mkdir()
    x = np.random.default_rng(1).random((40, 1), dtype=np.float32)
    for number, key in enumerate((*KEYS, "fr")):
        data = xgboost.DMatrix(x, x[:, 0] * (number + 1), feature_names=["x"])
        booster = xgboost.train({"max_depth": 1, "nthread": 1}, data, 1)
        booster.save_model(tmp_path / "models" / f"{key}.ubj")
    (tmp_path / "models" / "fr.ubj").rename(tmp_path / "fr.ubj")
    pq.write_table(pa.table({"key": ["de", "at"], "x": pa.array([0.1, 0.9], pa.float32())}), tmp_path / "in.parquet")
    return tmp_path


def settings_of(folder: Path) -> Settings:
    return Settings(
        directory=str(folder / "jobs"), registry=str(folder / "registry"), workers=1, threads=1, fsync=False
    )


def make_spec(folder: Path, models: Any, **fields: Any) -> JobSpec:
    step = {"score": {"by": "key", "models": models, "output": "p"}}
    made = {"name": "keyed", "source": {"path": str(folder / "in.parquet")}, "sink": {"path": str(folder / "out")}}
    return JobSpec.build(**{**made, "steps": [step], **fields})


def test_a_listing_becomes_a_mapping_that_later_files_do_not_change(folder: Path) -> None:
    spec = make_spec(folder, str(folder / "models" / "{}.ubj"))
    plan = prepare(spec, settings=settings_of(folder)).plan
    assert plan.spec.score.keyed_models == {key: str(folder / "models" / f"{key}.ubj") for key in KEYS}
    shutil.copy(folder / "fr.ubj", folder / "models" / "fr.ubj")
    again = prepare(plan.spec, settings=settings_of(folder), pins=plan.pins).plan
    assert again.digest == plan.digest
    assert list(prepare(spec, settings=settings_of(folder)).plan.spec.score.keyed_models) == ["at", "de", "fr"]


def test_a_listing_without_models_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="no model for any key"):
        with_listed_models(make_spec(folder, str(folder / "none" / "{}.ubj")), settings=settings_of(folder))


def test_incremental_work_is_another_with_another_key_or_model_but_not_in_another_folder(folder: Path) -> None:
    def digest(models: dict[str, str]) -> str:
        spec = make_spec(folder, models)
        found = resolve_models(
            [*zip(spec.references, scored_steps(spec), strict=True)], known={}, settings=settings_of(folder)
        )
        return work_digest(spec, [found[reference] for reference in spec.references])

    models = {key: str(folder / "models" / f"{key}.ubj") for key in KEYS}
    shutil.copytree(folder / "models", folder / "moved")
    moved = {key: str(folder / "moved" / f"{key}.ubj") for key in KEYS}
    swapped = {"at": models["de"], "de": models["at"]}
    renamed = {"xx": models["at"], "de": models["de"]}
    assert digest(models) == digest(moved)
    assert len({digest(one) for one in (models, swapped, renamed, {**models, "fr": models["de"]})}) == 4


def test_each_alias_is_followed(folder: Path) -> None:
    registry = BuiltInRegistry(str(folder / "registry"))
    for key in KEYS:
        registry.register(f"churn-{key}", (folder / "models" / f"{key}.ubj").read_bytes(), VersionMetadata())
        registry.set_alias(f"churn-{key}", "champion", 1)
    spec, settings = make_spec(folder, "models:/churn-{}@champion", on_alias_change="restart"), settings_of(folder)
    plan = prepare(spec, settings=settings).plan
    references = [f"models:/churn-{key}@champion" for key in KEYS]
    assert list(aliases(plan)) == references
    job = JobDirectory.open_or_create(folder / "jobs", plan, job="k-1", options=JobOptions(fsync=False))
    assert find_outdated([job], settings=settings) == []
    registry.register("churn-de", (folder / "fr.ubj").read_bytes(), VersionMetadata())
    registry.set_alias("churn-de", "champion", 2)
    assert find_outdated([job], settings=settings) == [job]
    pins = pinned_versions(plan.spec, job="k-1", settings=settings)
    assert {reference: pin.version for reference, pin in pins.items()} == dict.fromkeys(references, "1")


def test_children_of_a_fan_out_list_models_of_their_own(folder: Path) -> None:
    for child in ("a", "b"):
        shutil.copytree(folder / "models", folder / "by" / child)
    (folder / "by" / "b" / "at.ubj").unlink()
    listing = str(folder / "by" / "${fan_out.value}" / "{}.ubj")
    out = str(folder / "out-${fan_out.value}")
    spec = make_spec(folder, listing, fan_out={"by": ["a", "b"]}, sink={"path": out})
    plan = prepare(spec, settings=settings_of(folder)).plan
    assert [list(child.planned.spec.score.keyed_models) for child in plan.children] == [["at", "de"], ["de"]]
    assert plan.pins == {}
    common = make_spec(folder, str(folder / "models" / "{}.ubj"), fan_out={"by": ["a", "b"]}, sink={"path": out})
    parent = prepare(common, settings=settings_of(folder)).plan
    assert len(parent.pins) == len(KEYS)


class TestTypesOfSeveralModels:
    """Models of different libraries in one step, whose results have different types."""

    @staticmethod
    def scored(steps: dict[str, Any], *types: OutputType) -> pa.Schema:
        versions = [
            ModelVersion(f"m{index}", "1", "", str(index), "lightgbm", 1, (), "binary", 1, output_types=(found,))
            for index, found in enumerate(types)
        ]
        spec = JobSpec.model_validate(
            {"name": "j", "source": {"path": "/in"}, "steps": [{"score": steps}], "sink": {"path": "/out"}}
        )
        return scored_by(spec, versions)[0].predictions

    def test_combined_numbers_get_the_type_of_the_first(self) -> None:
        kinds = OutputType("prediction", "float64", 1), OutputType("prediction", "float32", 1)
        assert self.scored({"model": ["a", "b"], "combine": "mean"}, *kinds).types == [pa.float64()]

    def test_another_number_of_values_is_refused(self) -> None:
        kinds = OutputType("prediction", "float64", 1), OutputType("prediction", "float64", 3)
        with pytest.raises(SpecError, match="different values a row") as caught:
            self.scored({"model": ["a", "b"], "combine": "mean"}, *kinds)
        assert "3 of type double of m1" in caught.value.found

    def test_models_by_key_must_have_one_type(self) -> None:
        kinds = OutputType("prediction", "float64", 1), OutputType("prediction", "float32", 1)
        with pytest.raises(SpecError, match="different values a row"):
            self.scored({"models": {"x": "a", "y": "b"}, "by": "k"}, *kinds)

    def test_labels_of_two_types_are_no_votes(self) -> None:
        kinds = OutputType("label", "string", 1), OutputType("label", "int64", 1)
        steps = {"model": ["a", "b"], "combine": "vote", "output": {"column": "p", "kind": "label"}}
        with pytest.raises(SpecError, match="different values a row"):
            self.scored(steps, *kinds)
