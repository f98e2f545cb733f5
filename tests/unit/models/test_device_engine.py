"""A model on the GPU of this process: compared with the CPU, and given up or refused when something is wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xgboost

from pipeline.devices.inventory import NOT_INSTALLED
from pipeline.errors import DeviceLost, DeviceOutOfMemory, ModelError, NoDevice
from pipeline.models.device_engine import DeviceEvaluator, open_evaluator
from pipeline.models.engines import DEVICE_ENGINE, SAMPLE_EVERY, SAMPLE_ROWS, EngineUse, Evaluator, forget_selections
from pipeline.models.flavors import xgboost as flavor
from pipeline.models.flavors import xgboost_probe
from pipeline.models.model import ModelVersion
from pipeline.models.process import ProcessFacts, process_facts, set_process_facts
from pipeline.models.registry import resolve
from pipeline.plan.recipe import ScoreRecipe
from pipeline.spec.model_ref import ModelRef
from pipeline.testing.fake_device import LOST, FakeGpu, installed
from pipeline.testing.oracle import FEATURES, make_table, train_model

ROWS = 2500


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[ModelVersion]:
    """Six models."""
    folder = tmp_path_factory.mktemp("models")

    def probe(data: bytes, *, where: str) -> dict[str, Any]:
        return xgboost_probe.facts(xgboost.Booster(model_file=bytearray(data)), data)

    paths = [train_model(folder / f"{number}.ubj", rounds=3 + number) for number in range(6)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flavor, "probe", probe)
        return [resolve(ModelRef(str(path))) for path in paths]


@pytest.fixture
def version(versions: list[ModelVersion]) -> ModelVersion:
    return versions[0]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget_selections()
    facts = process_facts()
    yield
    set_process_facts(facts)


def score_of(version: ModelVersion, **fields: Any) -> ScoreRecipe:
    return ScoreRecipe(version, version.feature_names, "prediction", ("prediction",), (), **fields)


def open_device(version: ModelVersion, device: Any = "auto", **fields: Any) -> DeviceEvaluator:
    evaluator, _ = open_evaluator(score_of(version, **fields), device=device)
    assert isinstance(evaluator, DeviceEvaluator)
    return evaluator


def matrix_of(evaluator: Evaluator | DeviceEvaluator) -> np.ndarray:
    return evaluator.encode(make_table(ROWS, seed=3).select(FEATURES))


def on_cpu(version: ModelVersion, matrix: np.ndarray) -> bytes:
    return open_evaluator(score_of(version, engine="xgboost"))[0].predict(matrix, kind="prediction").tobytes()


class TestScores:
    @pytest.mark.parametrize("device", ["auto", "cuda"])
    def test_gpu_scores_with_the_bits_of_the_cpu(self, device: Any, version: ModelVersion) -> None:
        with installed() as opened:
            evaluator = open_device(version, device)
            matrix = matrix_of(evaluator)
            assert matrix.flags.f_contiguous
            scores = evaluator.predict(matrix, kind="prediction")
        assert scores.tobytes() == on_cpu(version, matrix)
        assert evaluator.engine_use() == EngineUse(rows={DEVICE_ENGINE: ROWS}, compared_rows=SAMPLE_ROWS)
        assert evaluator.device == "GPU-fake-1"
        assert len(opened) == 1

    def test_first_and_every_64th_batch_are_compared(self, version: ModelVersion) -> None:
        with installed():
            evaluator = open_device(version)
            matrix = matrix_of(evaluator)[:10]
            for _ in range(SAMPLE_EVERY + 1):
                evaluator.predict(matrix, kind="prediction")
        assert evaluator.use.compared_rows == 20

    def test_batch_is_on_its_way_when_it_is_made(self, version: ModelVersion) -> None:
        """Made, looked at and scored with one copy to the device; the sample for the comparison is another."""
        with installed() as opened:
            evaluator = open_device(version)
            before = opened[0].uploads
            matrix = matrix_of(evaluator)
            assert not evaluator.may_have_infinite(matrix, [0, 1])
            scores = evaluator.predict(matrix[:], kind="prediction")
            assert opened[0].uploads == before + 2
            assert opened[0].looks == 1
            assert scores.tobytes() == on_cpu(version, matrix)

    def test_host_looks_for_infinite_values_once_the_gpu_is_given_up(self, version: ModelVersion) -> None:
        with installed() as opened:
            evaluator = open_device(version)
            evaluator.engine.disable("a reason")
            before = opened[0].uploads
            matrix = matrix_of(evaluator)
            assert evaluator.may_have_infinite(matrix, [0])
            assert opened[0].uploads == before
            assert evaluator.predict(matrix, kind="prediction").tobytes() == on_cpu(version, matrix)

    @pytest.mark.parametrize("call", ["encode", "may_have_infinite"])
    def test_lost_device_is_lost_for_all_partitions(self, call: str, version: ModelVersion, tmp_path: Path) -> None:
        with installed() as opened, pytest.MonkeyPatch.context() as patch:
            evaluator = open_device(version)
            matrix = matrix_of(evaluator)
            (tmp_path / "1").touch()
            opened[0].gpu = replace(opened[0].gpu, tokens=str(tmp_path))
            if call == "encode":
                patch.setattr(type(opened[0]), "upload", lambda self, *_: self._fail())
                with pytest.raises(DeviceLost):
                    matrix_of(evaluator)
            else:
                with pytest.raises(DeviceLost):
                    evaluator.may_have_infinite(matrix, [0])
            with pytest.raises(DeviceLost):
                open_device(version)

    def test_output_of_the_cpu_only(self, version: ModelVersion) -> None:
        with installed():
            evaluator = open_device(version)
            leaves = evaluator.predict(matrix_of(evaluator), kind="leaf")
        assert leaves.dtype == np.int32
        assert evaluator.device == ""

    def test_no_rows(self, version: ModelVersion) -> None:
        with installed():
            evaluator = open_device(version, "cuda")
            assert evaluator.predict(matrix_of(evaluator)[:0], kind="prediction").shape == (0,)


class TestNoGpu:
    def test_auto_scores_on_the_cpu_without_a_word(self, version: ModelVersion) -> None:
        """A worker without a GPU is no fault in a cluster of both."""
        with installed(FakeGpu(memory=0)):
            evaluator, _ = open_evaluator(score_of(version), device="auto")
            evaluator.predict(matrix_of(evaluator), kind="prediction")
        assert isinstance(evaluator, Evaluator)
        assert evaluator.engine_use().device_reasons == ()

    def test_cuda_is_refused(self, version: ModelVersion) -> None:
        with pytest.raises(NoDevice, match="a GPU was requested, and a worker has none") as error:
            open_evaluator(score_of(version), device="cuda")
        assert error.value.found == NOT_INSTALLED

    @pytest.mark.parametrize(
        ("gpu", "found", "kind"),
        [
            (FakeGpu(placement="cpu"), "xgboost scored on cpu", NoDevice),
            (FakeGpu(has_cuda=False), f"xgboost {xgboost.__version__}, built without CUDA", NoDevice),
            (FakeGpu(error="no kernel image"), "XGBoostError: no kernel image", NoDevice),
            (FakeGpu(wrong_after=0), "256 of 256 values of the proof", ModelError),
        ],
    )
    def test_proof_that_fails(self, gpu: FakeGpu, found: str, kind: type[Exception], version: ModelVersion) -> None:
        with installed(gpu):
            with pytest.raises(kind) as error:
                open_evaluator(score_of(version), device="cuda")
            evaluator, _ = open_evaluator(score_of(version), device="auto")
            evaluator.predict(matrix_of(evaluator), kind="prediction")
        assert found in str(error.value)
        assert evaluator.engine_use().device_reasons == (found,)

    def test_cpu_asks_for_no_gpu(self, version: ModelVersion) -> None:
        with installed() as opened:
            evaluator, _ = open_evaluator(score_of(version))
        assert isinstance(evaluator, Evaluator)
        assert opened == []


class TestMismatch:
    GPU = FakeGpu(wrong_after=2)
    """Right in the proof and for one batch of a comparison, wrong later."""

    def test_auto_takes_the_cpu_for_that_batch_and_all_later_ones(self, version: ModelVersion) -> None:
        with installed(FakeGpu(wrong_after=1)) as opened:
            evaluator = open_device(version)
            matrix = matrix_of(evaluator)
            wanted = on_cpu(version, matrix)
            assert evaluator.predict(matrix, kind="prediction").tobytes() == wanted
            calls = opened[0].calls
            assert evaluator.predict(matrix, kind="prediction").tobytes() == wanted
            other = open_device(version)
            other.predict(matrix, kind="prediction")
            assert opened[0].calls == calls
        use = evaluator.engine_use()
        assert use.rows == {"xgboost": 2 * ROWS}
        assert use.mismatches > 0
        (reason,) = other.engine_use().device_reasons
        assert reason.startswith("its results differ from the CPU's: ")
        assert version.digest[:12] in reason

    def test_cuda_is_an_error(self, version: ModelVersion) -> None:
        with installed(FakeGpu(wrong_after=1)):
            evaluator = open_device(version, "cuda")
            with pytest.raises(ModelError, match="the GPU gives other results than the CPU") as error:
                evaluator.predict(matrix_of(evaluator), kind="prediction")
        assert f" of {SAMPLE_ROWS:,} rows, margins up to " in error.value.found
        assert error.value.next_step == "set score.tolerance, or say device: cpu, and report it"

    def test_tolerance_allows_it(self, version: ModelVersion) -> None:
        with installed(FakeGpu(wrong_after=1)):
            evaluator = open_device(version, "cuda", tolerance=1e-4)
            evaluator.predict(matrix_of(evaluator), kind="prediction")
        assert evaluator.engine_use().mismatches == 0


class TestErrors:
    def test_memory_that_is_short_ends_a_partition_on_the_cpu(self, version: ModelVersion) -> None:
        with installed(FakeGpu(memory=1 << 22)) as opened:
            evaluator = open_device(version)
            matrix = matrix_of(evaluator)
            opened[0].gpu = replace(opened[0].gpu, others=(1 << 22) - 100)
            assert evaluator.predict(matrix, kind="prediction").tobytes() == on_cpu(version, matrix)
            opened[0].gpu = replace(opened[0].gpu, others=0)
            evaluator.predict(matrix, kind="prediction")
            later = open_device(version)
            later.predict(matrix, kind="prediction")
        (reason,) = evaluator.engine_use().device_reasons
        assert reason.startswith("memory ran short: 1,024 rows need ")
        assert evaluator.use.device_rows == 0
        assert later.use.device_rows == ROWS

    def test_memory_that_is_short_is_an_error_with_cuda(self, version: ModelVersion) -> None:
        with installed(FakeGpu(memory=1 << 22)) as opened:
            evaluator = open_device(version, "cuda")
            opened[0].gpu = replace(opened[0].gpu, others=(1 << 22) - 100)
            with pytest.raises(DeviceOutOfMemory):
                evaluator.predict(matrix_of(evaluator), kind="prediction")

    def test_error_of_a_call(self, version: ModelVersion) -> None:
        with installed() as opened:
            auto, cuda = open_device(version), open_device(version, "cuda")
            matrix = matrix_of(auto)
            opened[0].gpu = replace(opened[0].gpu, error="Check failed: x")
            with pytest.raises(xgboost.core.XGBoostError):
                cuda.predict(matrix, kind="prediction")
            assert auto.predict(matrix, kind="prediction").tobytes() == on_cpu(version, matrix)
        assert auto.engine_use().device_reasons == ("call failed: XGBoostError: Check failed: x",)

    @pytest.mark.parametrize("device", ["auto", "cuda"])
    def test_lost_device_is_lost_for_this_process(self, device: Any, version: ModelVersion, tmp_path: Path) -> None:
        with installed(FakeGpu(tokens=str(tmp_path))):
            evaluator = open_device(version, device)
            (tmp_path / "1").touch()
            with pytest.raises(DeviceLost):
                evaluator.predict(matrix_of(evaluator), kind="prediction")
            with pytest.raises(DeviceLost, match="the GPU of a worker failed") as error:
                open_evaluator(score_of(version), device=device)
        assert LOST in error.value.found


class TestModels:
    def test_threads_load_a_model_once(self, version: ModelVersion) -> None:
        barrier = threading.Barrier(4)

        def open_one(_: int) -> object:
            barrier.wait()
            return open_device(version).engine

        with installed(), ThreadPoolExecutor(4) as pool:
            assert len(set(map(id, pool.map(open_one, range(4))))) == 1

    def test_least_recently_used_model_leaves_the_device(self, versions: list[ModelVersion]) -> None:
        with installed():
            first = open_device(versions[0]).engine
            for version in versions[1:4]:
                open_device(version)
            assert open_device(versions[0]).engine is first
            second = open_device(versions[1]).engine
            open_device(versions[4])
            assert open_device(versions[1]).engine is second
            assert open_device(versions[0]).engine is first

    def test_models_take_a_share_of_the_device_at_most(self, versions: list[ModelVersion]) -> None:
        with installed():
            nbytes = open_device(versions[0]).engine.predictor.nbytes
        with installed(FakeGpu(memory=6 * nbytes)):
            first = open_device(versions[0]).engine
            open_device(versions[1])
            assert open_device(versions[0]).engine is not first

    def test_threads_of_the_worker_share_the_memory(self, version: ModelVersion) -> None:
        set_process_facts(ProcessFacts(threads=8))
        with installed(FakeGpu(memory=1 << 24)):
            predictor: Any = open_device(version).engine.predictor
            assert predictor.limit.rows == 65_536
        set_process_facts(ProcessFacts(threads=1))
        with installed(FakeGpu(memory=1 << 24)):
            predictor = open_device(version).engine.predictor
            assert predictor.limit.rows == 262_144


def test_reasons_are_left_out_of_json_without_any() -> None:
    """The receipts of CPUs have the bytes that they had."""
    assert "device_reasons" not in EngineUse().to_dict()
    use = EngineUse(rows={DEVICE_ENGINE: 3}, device_reasons=("a",))
    assert EngineUse.from_dict(use.to_dict()) == use
    assert EngineUse.from_dict(EngineUse().to_dict()) == EngineUse()
    assert (use + EngineUse(device_reasons=("b", "a"))).device_reasons == ("a", "b")
