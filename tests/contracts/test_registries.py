"""One suite for every model registry: references resolve to the same version, with the same bytes, on each."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.common.digest import digest_bytes
from pipeline.errors import ModelError, RefusedForSafety, SpecError
from pipeline.models.flavors import read_model
from pipeline.models.registry import ModelRegistry, open_registry
from pipeline.models.registry.client import Registry
from pipeline.models.registry.file_registry import BuiltInRegistry, VersionMetadata
from pipeline.spec.model_ref import ModelRef
from pipeline.testing.oracle import FEATURES, train_model
from pipeline.testing.s3 import S3

# What MLflow and SQLAlchemy warn of is theirs to fix.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models over the same features."""
    folder = tmp_path_factory.mktemp("registered")
    return [train_model(folder / f"m{number}.ubj", rounds=3 + number) for number in range(2)]


@dataclass
class Kept:
    """A registry with two versions of one model."""

    registry: ModelRegistry
    name: str
    digests: list[str]

    def ref(self, rest: str) -> ModelRef:
        return ModelRef.parse(f"models:/{self.name}{rest}")


def keep(root: str, files: list[Path], cache: Path) -> Kept:
    registry = open_registry(root, cache=str(cache))
    assert isinstance(registry, BuiltInRegistry)
    for file in files:
        registry.register("churn", file.read_bytes(), VersionMetadata(source=str(file)))
    return Kept(registry, "churn", [digest_bytes(file.read_bytes()) for file in files])


@pytest.fixture(scope="session")
def mlflow_uri(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Callable[[], str]]]:
    """A real MLflow on sqlite; the function logs both models under a new name."""
    xgboost = pytest.importorskip("xgboost")
    pytest.importorskip("sqlalchemy")
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("mlflow.xgboost")
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    experiment = mlflow.create_experiment("tests", artifact_location=str(folder / "artifacts"))

    def log() -> str:
        name = f"Churn Model_{uuid.uuid4().hex[:6]}"
        for file in files:
            with mlflow.start_run(experiment_id=experiment):
                mlflow.log_metric("auc", 0.9)
                booster = xgboost.Booster(model_file=str(file))
                mlflow.xgboost.log_model(booster, name="m", registered_model_name=name, pip_requirements=["xgboost"])
        return name

    yield uri, log
    mlflow.set_tracking_uri(before)


@pytest.fixture(params=["local", "s3", "mlflow"])
def kept(request: pytest.FixtureRequest, files: list[Path], tmp_path: Path) -> Kept:
    if request.param == "local":
        return keep(str(tmp_path / "models"), files, tmp_path)
    if request.param == "s3":
        server: S3 = request.getfixturevalue("s3")
        return keep(server.url(uuid.uuid4().hex), files, tmp_path)
    uri, log = request.getfixturevalue("mlflow_uri")
    name, registry = log(), open_registry(uri, cache=str(tmp_path))
    data = [read_model(registry.resolve(ModelRef.parse(f"models:/{name}/{number}")).uri) for number in (1, 2)]
    return Kept(registry, name, [digest_bytes(one) for one in data])


def test_a_number_resolves_to_that_version(kept: Kept) -> None:
    for number in (1, 2):
        ref = kept.ref(f"/{number}")
        found, version = kept.registry.lookup(ref), kept.registry.resolve(ref)
        assert (found.name, found.version) == (kept.name, number)
        assert (version.name, version.version) == (kept.name, str(number))
        assert version.reference == ref.text
        assert version.digest == kept.digests[number - 1] == digest_bytes(read_model(version.uri))
        assert version.registry == kept.registry.root
        assert version.feature_names == FEATURES
        assert (version.task, version.trees) == ("binary", 2 + number)


def test_an_alias_resolves_to_where_it_points_now(kept: Kept) -> None:
    for number in (2, 1, 2):
        kept.registry.set_alias(kept.name, "champion", number)
        assert kept.registry.lookup(kept.ref("@champion")).version == number
        assert kept.registry.resolve(kept.ref("@champion")).digest == kept.digests[number - 1]
        assert kept.registry.summary(kept.name).aliases == {"champion": number}


def test_a_lookup_needs_no_model_file(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.registry.set_alias(kept.name, "champion", 1)
    monkeypatch.setattr("pipeline.models.flavors.xgboost.probe", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(BuiltInRegistry, "read_file", lambda *_: pytest.fail("the model was read"))
    assert kept.registry.lookup(kept.ref("@champion")).version == 1


def test_aliases_do_not_know_of_each_other(kept: Kept) -> None:
    kept.registry.set_alias(kept.name, "champion", 1)
    kept.registry.set_alias(kept.name, "challenger", 2)
    kept.registry.set_alias(kept.name, "champion", None)
    assert kept.registry.summary(kept.name).aliases == {"challenger": 2}
    with pytest.raises(ModelError):
        kept.registry.lookup(kept.ref("@champion"))


def test_models_and_versions_are_listed(kept: Kept) -> None:
    assert kept.name in kept.registry.names()
    summary = kept.registry.summary(kept.name)
    assert (summary.versions, summary.latest, summary.removed) == ((1, 2), 2, ())
    record = kept.registry.version(kept.name, 2)
    assert (record.name, record.version, record.flavor) == (kept.name, 2, "xgboost")
    assert record.created.endswith("Z")
    assert record.source


@pytest.mark.parametrize("rest", ["/3", "@nobody"])
def test_unknown_names_are_errors(kept: Kept, rest: str) -> None:
    with pytest.raises(ModelError) as caught:
        kept.registry.lookup(kept.ref(rest))
    assert caught.value.next_step
    with pytest.raises(ModelError):
        kept.registry.resolve(ModelRef.parse(f"models:/no-such-model{rest}"))


def test_an_alias_points_to_versions_that_are_there(kept: Kept) -> None:
    with pytest.raises(ModelError):
        kept.registry.set_alias(kept.name, "champion", 3)
    assert kept.registry.summary(kept.name).aliases == {}


def test_the_same_from_python(kept: Kept) -> None:
    registry = Registry(kept.registry.root)
    registry.set_alias(kept.name, "champion", 2)
    assert registry.get(f"models:/{kept.name}@champion").version == 2
    assert registry.resolve(f"models:/{kept.name}@champion").digest == kept.digests[1]
    assert list(registry.versions(kept.name)["version"]) == [2, 1]
    models = registry.models().set_index("name")
    assert models.loc[kept.name, "aliases"] == {"champion": 2}
    registry.delete_alias(kept.name, "champion")
    with pytest.raises(ModelError):
        registry.get(f"models:/{kept.name}@champion")


def test_mlflow_keeps_its_own_house(mlflow_uri: tuple[str, Callable[[], str]], files: list[Path]) -> None:
    registry = Registry(f"mlflow+{mlflow_uri[0]}")
    with pytest.raises(SpecError, match="needs the built-in registry") as caught:
        registry.register(files[0], name="churn")
    assert "log_model" in caught.value.next_step
    assert registry.get(f"models:/{mlflow_uri[1]()}/1").version == 1


def test_mlflow_from_its_own_environment(
    mlflow_uri: tuple[str, Callable[[], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, log = mlflow_uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    name = log()
    assert Registry("mlflow").resolve(f"models:/{name}/1").version == "1"


def test_a_password_in_the_url_of_a_registry_is_refused() -> None:
    for root in ("mlflow+http://me:secret@host:5000", "postgresql://me:secret@host/db", "s3://me:secret@bucket/models"):
        with pytest.raises(RefusedForSafety) as caught:
            open_registry(root)
        assert "secret" not in str(caught.value)
