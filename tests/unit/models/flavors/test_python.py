"""Models in Python: declared features and outputs, pinned code and files, objects."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline.errors import (
    BadPrediction,
    ModelDigestMismatch,
    ModelError,
    PipelineError,
    RefusedForSafety,
    SpecError,
    StepFailed,
)
from pipeline.models.cache import forget_models, get_predictor
from pipeline.models.flavors.fitted import fitted_bytes
from pipeline.models.model import ModelVersion
from pipeline.models.options import promise_text, promise_warning
from pipeline.models.registry import resolve
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.model_ref import ModelRef
from pipeline.spec.score import Score
from pipeline.testing.inline import plan_inline, publish_inline, score_inline

CHURN = """
    import json
    from helper import scale

    class Churn:
        features = {"age": "number"}
        outputs = "float32"

        def load(self, files):
            self.weight = json.loads(files["weights.json"].read_text())

        def predict(self, frame):
            return scale(frame["age"], self.weight)
"""
HELPER = "def scale(age, weight):\n    return age * weight\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder from which models are imported: the working directory."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, my_models=CHURN, helper=HELPER)
    (tmp_path / "weights.json").write_text("2")
    return tmp_path


def write(folder: Path, **modules: str) -> None:
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source))


def pinned(
    folder: Path, reference: str = "my_models:Churn", files: tuple[str, ...] = ("weights.json",)
) -> ModelVersion:
    return resolve(
        ModelRef(reference),
        import_paths=[str(folder)],
        model_files=[str(folder / name) for name in files],
        cache=str(folder / "jobs"),
    )


def predict(version: ModelVersion, ages: list[float]) -> list[Any]:
    forget_models()
    predictor, _ = get_predictor(version)
    found: list[Any] = predictor.predict(predictor.encode(pa.table({"age": ages})), kind="prediction").tolist()
    return found


class TestPinnedCode:
    def test_workers_run_the_planned_code(self, home: Path) -> None:
        version = pinned(home)
        write(home, helper=HELPER.replace("*", "+"))
        assert predict(version, [1.0, 2.0]) == [2.0, 4.0]
        later = pinned(home)
        assert later.digest != version.digest
        assert predict(later, [1.0, 2.0]) == [3.0, 4.0]

    def test_equal_code_elsewhere_is_the_same_version(self, home: Path, tmp_path: Path) -> None:
        version = pinned(home)
        other = tmp_path / "other"
        other.mkdir()
        write(other, my_models=CHURN, helper=HELPER)
        (other / "weights.json").write_text("2")
        assert pinned(other).digest == version.digest

    def test_changed_file_is_another_model(self, home: Path) -> None:
        version = pinned(home)
        (home / "weights.json").write_text("3")
        assert predict(version, [1.0]) == [2.0]  # this process has a copy of its own
        forget_copies()
        with pytest.raises(ModelDigestMismatch, match="not the one that was pinned"):
            predict(version, [1.0])
        assert predict(pinned(home), [1.0]) == [3.0]

    def test_typo_in_the_class(self, home: Path) -> None:
        with pytest.raises(StepFailed) as caught:
            pinned(home, "my_models:Chrun")
        assert "my_models:Churn" in caught.value.next_step

    def test_error_in_load_is_named(self, home: Path) -> None:
        (home / "weights.json").write_text("{")
        with pytest.raises(ModelError, match="load of the model failed") as caught:
            pinned(home)
        assert "JSONDecodeError" in caught.value.found


def forget_copies() -> None:
    from pipeline.models import folders

    folders._opened.clear()


class TestDeclared:
    @pytest.mark.parametrize(
        ("body", "error", "text"),
        [
            ("pass", ModelError, "does not declare its features"),
            ("features = {'age': 'float'}", ModelError, "declares its features in another form"),
            ("features = ['age']; outputs = {'a': 'int32', 'b': 'string'}", ModelError, "declares its outputs"),
            ("features = ['age']; predict = lambda self, frame: frame['age'][:3]", BadPrediction, "what it declares"),
            ("features = ['age']; predict = lambda self, frame: ['x'] * len(frame)", BadPrediction, "what it declares"),
        ],
    )
    def test_other_forms_are_refused(self, home: Path, body: str, error: type[PipelineError], text: str) -> None:
        write(home, other=f"class Model:\n    predict = lambda self, frame: frame['age']\n    {body}\n")
        with pytest.raises(error, match=text) as caught:
            pinned(home, "other:Model", files=())
        assert caught.value.next_step

    def test_function(self, home: Path) -> None:
        write(home, other="def twice(frame):\n    return frame['age'] * 2\ntwice.features = {'age': 'integer'}\n")
        version = pinned(home, "other:twice", files=())
        assert (version.name, version.outputs) == ("twice", 1)
        assert predict(version, [4.0]) == [8.0]

    def test_result_with_another_order_is_matched_by_index(self, home: Path) -> None:
        write(home, other="def f(frame):\n    return frame['age'][::-1] * 1.0\nf.features = {'age': 'number'}\n")
        assert predict(pinned(home, "other:f", files=()), [1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]

    def test_dependence_on_the_batch_is_measured(self, home: Path) -> None:
        write(
            home, other="def f(frame):\n    return frame['age'] - frame['age'].mean()\nf.features = {'age': 'number'}\n"
        )
        version = pinned(home, "other:f", files=())
        assert version.promise is not None
        assert (version.promise.kind, version.promise.noise > 0) == ("code", True)
        assert "nothing is promised" in promise_warning(version)

    def test_independent_rows_are_no_warning(self, home: Path) -> None:
        version = pinned(home)
        assert "the same bits in other batches" in promise_text(version)
        assert promise_warning(version) == ""


EMBED = """
    import numpy as np

    def embed(frame):
        return np.stack([frame["age"].to_numpy("float32")] * 3, axis=1)

    embed.features, embed.outputs = {"age": "number"}, "float32[3]"
"""


class TestEmbeddings:
    @pytest.mark.skipif(
        int(pa.__version__.split(".")[0]) < 26, reason="pyarrow before 26 reads no nulls in lists of a fixed size"
    )
    def test_job_writes_lists_of_fixed_size(self, home: Path) -> None:
        write(home, vectors=EMBED)
        (home / "in").mkdir()
        pq.write_table(pa.table({"age": [1.0, None, 3.0], "id": [1, 2, 3]}), home / "in" / "a.parquet")
        spec = {
            "name": "embed",
            "source": {"path": str(home / "in")},
            "steps": [{"score": {"model": "vectors:embed", "output": "v", "where": "id < 3"}}],
            "sink": {"path": str(home / "out")},
        }
        plan = plan_inline(JobSpec.model_validate(spec), directory=home / "jobs", import_paths=[str(home)])
        publish_inline(score_inline(plan, directory=home / "jobs", job="embed-1"))
        found = pq.read_table(home / "out")
        assert found.schema.field("v").type == pa.list_(pa.float32(), 3)
        first, second, third = found["v"].to_pylist()
        assert (first, third) == ([1.0, 1.0, 1.0], None)
        assert np.isnan(second).all()

    def test_frames_get_arrays(self, home: Path) -> None:
        write(home, vectors=EMBED)
        scored = pipeline.score(pd.DataFrame({"age": [1.0, 2.0]}, index=[7, 9]), "vectors:embed", output="v")
        assert scored.loc[9, "v"].tolist() == [2.0, 2.0, 2.0]


class Threshold:
    """A model with state."""

    features: ClassVar[Any] = {"age": "number"}
    outputs: ClassVar[Any] = {"prediction": "float64"}

    def __init__(self, at: float) -> None:
        self.at = at

    def predict(self, frame: pd.DataFrame) -> Any:
        return (frame["age"] > self.at).astype(float)


class TestObjects:
    def test_object_is_scored_as_it_is(self, home: Path) -> None:
        frame = pd.DataFrame({"age": [1.0, 5.0]})
        assert pipeline.score(frame, Threshold(3.0), output="p")["p"].tolist() == [0.0, 1.0]

        class Local(Threshold):
            pass

        assert pipeline.score(frame, Local(0.5), output="p")["p"].tolist() == [1.0, 1.0]

    def test_step_of_a_job_takes_an_object(self, home: Path) -> None:
        pq.write_table(pa.table({"age": [1.0, 5.0]}), home / "a.parquet")
        step = {"score": {"model": Threshold(3.0), "output": "p"}}
        job = pipeline.Job("objects", source={"path": "a.parquet"}, steps=[step], sink={"path": "out"})
        found = job.to_dask().compute(scheduler="synchronous")
        assert found["p"].tolist() == [0.0, 1.0]

    def test_stored_object_needs_allow_code(self, home: Path) -> None:
        path = home / "model.bin"
        path.write_bytes(fitted_bytes(Threshold(1.0)))
        with pytest.raises(RefusedForSafety, match="runs code"):
            resolve(ModelRef(str(path)))
        assert resolve(ModelRef(str(path)), allow_code=True).runs_code
        with pytest.raises(RefusedForSafety):
            pipeline.Registry(home / "models").register(path, name="m")

    def test_object_without_features_is_explained(self, home: Path) -> None:
        with pytest.raises(SpecError, match="not a model") as caught:
            pipeline.score(pd.DataFrame({"age": [1.0]}), object())
        assert "features" in caught.value.expected


class TestSpec:
    def test_files_need_a_model_in_python(self) -> None:
        with pytest.raises(ValueError, match="model_files without"):
            Score(model="churn.ubj", model_files="weights.json", output="p")

    def test_one_model_has_one_set_of_files(self, home: Path) -> None:
        steps = [{"score": {"model": "my_models:Churn", "model_files": name, "output": name[0]}} for name in ("a", "b")]
        pq.write_table(pa.table({"age": [1.0]}), home / "a.parquet")
        job = pipeline.Job("two", source={"path": "a.parquet"}, steps=steps, sink={"path": "out"})
        with pytest.raises(SpecError, match="different files"):
            job.plan()

    def test_files_of_one_name_are_refused(self, home: Path) -> None:
        (home / "deep").mkdir()
        (home / "deep" / "weights.json").write_text("1")
        with pytest.raises(SpecError, match="one name"):
            pinned(home, files=("weights.json", "deep"))
