"""xgboost on a fake GPU that adds in the GPU's order: the CPU's bits, memory that runs short, a device that is lost."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xgboost

from pipeline.devices.inventory import Gpu
from pipeline.devices.report import DeviceProblem
from pipeline.errors import DeviceLost, DeviceOutOfMemory, ModelError
from pipeline.models.flavors import xgboost as flavor
from pipeline.models.flavors import xgboost_cuda, xgboost_probe
from pipeline.models.flavors.xgboost_cuda import XGBoostDevicePredictor, device_report, on_device
from pipeline.models.flavors.xgboost_device import CupyDevice, WithoutCudaError, open_device, runs, score
from pipeline.models.model import DeviceUnusable, ModelVersion
from pipeline.spec.model_ref import OutputKind
from pipeline.testing.fake_device import LOST, FakeDevice, FakeGpu, installed

GPU = Gpu("GPU-fake-1", "NVIDIA H200", 1 << 30, 0)
ROWS = 3000
RNG = np.random.default_rng(3)
MATRIX = RNG.standard_normal((ROWS, 5)).astype(np.float32)
MATRIX[RNG.random(MATRIX.shape) < 0.1] = np.nan
OBJECTIVES: dict[str, tuple[dict[str, Any], np.ndarray]] = {
    "binary:logistic": ({"base_score": 0.3}, RNG.random(ROWS) < 0.3),
    "binary:hinge": ({}, RNG.random(ROWS) < 0.3),
    "binary:logitraw": ({}, RNG.random(ROWS) < 0.3),
    "reg:squarederror": ({}, RNG.normal(size=ROWS) + 3),
    "reg:gamma": ({}, RNG.gamma(2, 2, ROWS) + 0.1),
    "count:poisson": ({}, RNG.poisson(2, ROWS)),
    "multi:softprob": ({"num_class": 3}, RNG.integers(0, 3, ROWS)),
    "multi:softmax": ({"num_class": 3}, RNG.integers(0, 3, ROWS)),
}


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], flavor.XGBoostPredictor]:
    """A predictor on the CPU for each objective."""
    made: dict[str, flavor.XGBoostPredictor] = {}

    def predictor(objective: str) -> flavor.XGBoostPredictor:
        if objective not in made:
            options, label = OBJECTIVES[objective]
            options = {"objective": objective, "nthread": 1, "max_depth": 5, "verbosity": 0, **options}
            booster = xgboost.train(options, xgboost.DMatrix(MATRIX, label), 20)
            made[objective] = load(booster, tmp_path_factory.mktemp("model") / "m.ubj")
        return made[objective]

    return predictor


def load(booster: Any, path: Path) -> flavor.XGBoostPredictor:
    booster.save_model(path)
    data = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            flavor, "probe", lambda data, where: xgboost_probe.facts(xgboost.Booster(model_file=bytearray(data)), data)
        )
        return flavor.load(flavor.inspect(str(path), data), data)


def put(reference: Any, *, memory: float | str = 0.8, threads: int = 1) -> XGBoostDevicePredictor:
    return on_device(reference, gpu=GPU, memory=memory, threads=threads)


Predictors = Callable[[str], flavor.XGBoostPredictor]


class TestBits:
    @pytest.mark.parametrize("kind", ["prediction", "label", "margin"])
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_outputs_are_those_of_the_cpu(self, objective: str, kind: OutputKind, predictors: Predictors) -> None:
        reference = predictors(objective)
        with installed():
            scores = put(reference).predict(np.asfortranarray(MATRIX), kind=kind)
        wanted = reference.predict(MATRIX, kind=kind)
        assert (scores.shape, scores.dtype) == (wanted.shape, wanted.dtype)
        assert scores.tobytes() == wanted.tobytes()

    @pytest.mark.parametrize("rounds", [(0, 5), (3, 9)])
    def test_iteration_range(self, rounds: tuple[int, int], predictors: Predictors) -> None:
        plain = predictors("binary:logistic")
        version = replace(plain.version, iteration_range=rounds)
        reference = flavor.XGBoostPredictor(version, plain.booster)
        with installed():
            scores = put(reference).predict(MATRIX, kind="prediction")
        assert scores.tobytes() == reference.predict(MATRIX, kind="prediction").tobytes()

    def test_model_that_is_not_folded_is_caught(self, predictors: Predictors, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(xgboost_cuda, "fold_base", lambda data, iteration_range: data)
        with installed(), pytest.raises(DeviceUnusable) as error:
            put(predictors("binary:logistic"))
        assert error.value.problem is DeviceProblem.BITS
        assert "of 256 values of the proof" in error.value.found

    def test_rows_of_any_layout(self, predictors: Predictors) -> None:
        reference = predictors("binary:logistic")
        with installed():
            predictor = put(reference)
            for matrix in (MATRIX, np.asfortranarray(MATRIX), np.asfortranarray(MATRIX)[100:900], MATRIX[::-1]):
                wanted = reference.predict(matrix, kind="prediction")
                assert predictor.predict(matrix, kind="prediction").tobytes() == wanted.tobytes()

    def test_reference_is_another_booster(self, predictors: Predictors) -> None:
        reference = predictors("binary:logistic")
        before = reference.booster.save_raw("ubj")
        with installed():
            put(reference).predict(MATRIX, kind="prediction")
        assert reference.booster.save_raw("ubj") == before
        assert json.loads(reference.booster.save_config())["learner"]["generic_param"]["device"] == "cpu"


class TestProof:
    def test_report_after_a_row_was_scored(self) -> None:
        with installed() as opened:
            report = device_report()
            assert opened[0].calls == 1
        assert report.is_usable
        assert report.gpu is not None
        assert report.gpu.uuid == "GPU-fake-1"

    @pytest.mark.parametrize(
        ("gpu", "problem", "found"),
        [
            (FakeGpu(memory=0), DeviceProblem.NO_GPU, "the driver shows no GPU"),
            (
                FakeGpu(has_cuda=False),
                DeviceProblem.BUILD,
                f"xgboost {xgboost.__version__}, built without CUDA",
            ),
            (FakeGpu(placement="cpu"), DeviceProblem.PROOF, "xgboost scored on cpu"),
            (FakeGpu(error="no kernel image"), DeviceProblem.PROOF, "XGBoostError: no kernel image"),
            (FakeGpu(wrong_after=0), DeviceProblem.BITS, "4 of 4 values of the proof"),
        ],
    )
    def test_each_problem(self, gpu: FakeGpu, problem: DeviceProblem, found: str) -> None:
        with installed(gpu):
            report = device_report()
        assert (report.problem, report.found) == (problem, found)

    def test_lost_device(self, tmp_path: Path) -> None:
        (tmp_path / "1").touch()
        with installed(FakeGpu(tokens=str(tmp_path))):
            report = device_report()
        assert (report.problem, report.found) == (DeviceProblem.PROOF, f"CUDARuntimeError: {LOST}")

    def test_xgboost_without_cuda_has_no_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(xgboost, "build_info", lambda: {"USE_CUDA": False})
        with pytest.raises(WithoutCudaError, match="built without CUDA"):
            CupyDevice()

    def test_model_that_a_gpu_cannot_score_is_refused(self, tmp_path: Path) -> None:
        options = {"booster": "dart", "rate_drop": 0.5, "nthread": 1, "verbosity": 0}
        booster = xgboost.train(options, xgboost.DMatrix(MATRIX, MATRIX[:, 0] > 0), 3)
        with installed(), pytest.raises(ModelError) as error:
            put(load(booster, tmp_path / "m.ubj"))
        assert error.value.found == "the booster dart"


ROW_BYTES = 5 * 4 + 8
"""Bytes of a row of `MATRIX` on the device."""


class TestMemory:
    @pytest.mark.parametrize("form", ["python", "cupy", "xgboost"])
    def test_batches_are_halved_until_they_fit(self, form: Any, predictors: Predictors) -> None:
        """The rows are planned for an empty card, and another process takes most of it."""
        reference, matrix = predictors("binary:logistic"), np.tile(MATRIX, (6, 1))
        with installed(FakeGpu(memory=1 << 22, out_of_memory=form)) as opened:
            predictor = put(reference)
            assert predictor.limit.rows == 65_536
            opened[0].gpu = replace(opened[0].gpu, others=(1 << 22) - 5000 * ROW_BYTES)
            scores = predictor.predict(matrix, kind="prediction")
        assert scores.tobytes() == reference.predict(matrix, kind="prediction").tobytes()
        assert opened[0].largest <= 5000
        assert predictor.limit.rows == 4500
        assert opened[0].released == 2
        assert predictor.peak >= (1 << 22) - 5000 * ROW_BYTES

    def test_limit_is_remembered_for_the_next_batch(self, predictors: Predictors) -> None:
        with installed(FakeGpu(memory=1 << 22)) as opened:
            predictor = put(predictors("binary:logistic"))
            opened[0].gpu = replace(opened[0].gpu, others=(1 << 22) - 2000 * ROW_BYTES)
            predictor.predict(MATRIX, kind="margin")
            released = opened[0].released
            predictor.predict(MATRIX, kind="margin")
            assert opened[0].released == released

    def test_smallest_batch_that_does_not_fit_is_an_error_with_both_figures(self, predictors: Predictors) -> None:
        with installed(FakeGpu(memory=1 << 22)) as opened:
            predictor = put(predictors("binary:logistic"))
            opened[0].gpu = replace(opened[0].gpu, others=(1 << 22) - 1000)
            with pytest.raises(DeviceOutOfMemory, match="a batch does not fit on the GPU, however small") as error:
                predictor.predict(MATRIX, kind="margin")
        assert error.value.found == "1,024 rows need 28.0 KiB, 1000 B are free"
        assert error.value.next_step == "lower what else uses the card, or say device: cpu"
        assert error.value.exit_code == 5

    def test_threads_and_allowed_share_decide_the_rows(self, predictors: Predictors) -> None:
        reference = predictors("binary:logistic")
        with installed(FakeGpu(memory=1 << 22)):
            assert put(reference, threads=4).limit.rows == 16_384
            assert put(reference, memory="1 MiB").limit.rows == 32_768

    def test_model_counts_on_the_device(self, predictors: Predictors) -> None:
        with installed():
            assert put(predictors("binary:logistic")).nbytes > 20 * 150


class TestLost:
    def test_lost_device_is_an_error_that_rows_are_not_blamed_for(self, predictors: Predictors, tmp_path: Path) -> None:
        with installed(FakeGpu(tokens=str(tmp_path))):
            predictor = put(predictors("binary:logistic"))
            (tmp_path / "1").touch()
            for _ in range(2):
                with pytest.raises(DeviceLost, match="the GPU of a worker failed") as error:
                    predictor.predict(MATRIX, kind="margin")
        assert error.value.found == f"CUDARuntimeError: {LOST}"
        assert "GPU-fake-1" in error.value.where
        assert error.value.next_step == "look at the host's kernel log (Xid), then resume"
        assert error.value.exit_code == 75

    def test_device_that_is_lost_while_a_model_is_loaded(self, predictors: Predictors, tmp_path: Path) -> None:
        (tmp_path / "1").touch()
        with installed(FakeGpu(tokens=str(tmp_path))), pytest.raises(DeviceLost):
            put(predictors("binary:logistic"))

    def test_any_other_error_passes(self, predictors: Predictors) -> None:
        with installed() as opened:
            predictor = put(predictors("binary:logistic"))
            opened[0].gpu = replace(opened[0].gpu, error="Check failed: something")
            with pytest.raises(xgboost.core.XGBoostError, match="something"):
                predictor.predict(MATRIX, kind="margin")


def test_threads_share_a_model(predictors: Predictors) -> None:
    """Several threads score at once, each on its own, with memory for two of four batches."""
    reference, barrier = predictors("binary:logistic"), threading.Barrier(4)
    wanted = reference.predict(MATRIX, kind="prediction").tobytes()
    with installed(FakeGpu(memory=2 * ROWS * ROW_BYTES)) as opened:
        predictor = put(reference, memory=1.0)

        def score(_: int) -> bytes:
            barrier.wait()
            return predictor.predict(MATRIX, kind="prediction").tobytes()

        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(score, range(4))) == {wanted}
    assert len(opened[0].threads) == 5


class DeviceArray(np.ndarray):
    """An array of cupy, as far as copies to it go."""

    def set(self, values: np.ndarray, stream: object) -> None:
        assert values.flags.f_contiguous
        self[...] = values


TABLE = pa.table([pa.array(MATRIX[:, number], from_pandas=True) for number in range(5)], names=list("abcde"))


class TestUpload:
    """A batch is sent while it is made, and scored without another copy."""

    @pytest.fixture
    def predictor(self, predictors: Predictors, monkeypatch: pytest.MonkeyPatch) -> Iterator[XGBoostDevicePredictor]:
        monkeypatch.setattr(xgboost_cuda, "SENT_COLUMNS", 2)
        with installed() as opened:
            made = put(predictors("binary:logistic"))
            opened[0].uploads = 0
            opened[0].sends.clear()
            self.device = opened[0]
            yield made

    def wanted(self, predictors: Predictors, matrix: np.ndarray = MATRIX) -> bytes:
        return predictors("binary:logistic").predict(matrix, kind="prediction").tobytes()

    def test_columns_are_sent_as_they_are_made(self, predictor: XGBoostDevicePredictor, predictors: Predictors) -> None:
        matrix = predictor.encode(TABLE)
        assert self.device.sends == [(0, 2), (2, 4), (4, 5)]
        assert matrix.flags.f_contiguous
        assert np.array_equal(matrix, MATRIX, equal_nan=True)
        # A view, as a scorer passes it on.
        assert predictor.predict(matrix[0:ROWS], kind="prediction").tobytes() == self.wanted(predictors)
        assert self.device.uploads == 1

    def test_device_says_if_there_are_infinite_values(
        self, predictor: XGBoostDevicePredictor, predictors: Predictors
    ) -> None:
        matrix = predictor.encode(TABLE)
        assert not predictor.may_have_infinite(matrix, [0, 1, 2, 3, 4])
        assert self.device.looks == 1
        assert predictor.predict(matrix, kind="prediction").tobytes() == self.wanted(predictors)
        assert self.device.uploads == 1

    def test_rows_that_are_left_are_sent_again(self, predictor: XGBoostDevicePredictor, predictors: Predictors) -> None:
        infinite = np.where(np.arange(ROWS) == 7, np.inf, MATRIX[:, 0]).astype(np.float32)
        matrix = predictor.encode(TABLE.set_column(0, "a", pa.array(infinite)))
        assert predictor.may_have_infinite(matrix, [0, 2])
        left = np.delete(matrix, [7], axis=0)
        scores = predictor.predict(left, kind="prediction")
        assert scores.tobytes() == self.wanted(predictors, np.delete(MATRIX, [7], axis=0))
        assert self.device.uploads == 2

    def test_other_rows_are_not_taken_for_those_that_were_sent(
        self, predictor: XGBoostDevicePredictor, predictors: Predictors
    ) -> None:
        matrix = predictor.encode(TABLE)
        assert predictor.may_have_infinite(matrix[:5], [0])
        assert predictor.may_have_infinite(MATRIX, [0])
        half = predictor.predict(matrix[1000:], kind="prediction")
        assert half.tobytes() == self.wanted(predictors, MATRIX[1000:])

    def test_batch_that_is_too_large_is_cut(self, predictor: XGBoostDevicePredictor, predictors: Predictors) -> None:
        predictor.limit = replace(predictor.limit, rows=1024)
        matrix = predictor.encode(TABLE)
        assert self.device.uploads == 0
        assert predictor.may_have_infinite(matrix, [0]), "the host must look"
        assert predictor.predict(matrix, kind="prediction").tobytes() == self.wanted(predictors)
        assert self.device.uploads == 3

    def test_batch_that_does_not_fit_is_made_on_the_host(
        self, predictor: XGBoostDevicePredictor, predictors: Predictors
    ) -> None:
        self.device.gpu = replace(self.device.gpu, memory=1500 * ROW_BYTES)
        matrix = predictor.encode(TABLE)
        assert np.array_equal(matrix, MATRIX, equal_nan=True)
        assert predictor.predict(matrix, kind="prediction").tobytes() == self.wanted(predictors)
        assert predictor.limit.rows < ROWS

    def test_waiting_batch_of_another_thread_makes_room(
        self, predictor: XGBoostDevicePredictor, predictors: Predictors
    ) -> None:
        """It is sent again later. Else the smallest batch might not fit because of it."""
        with ThreadPoolExecutor(1) as other:
            waiting = other.submit(predictor.encode, TABLE).result()
            self.device.gpu = replace(self.device.gpu, memory=ROWS * ROW_BYTES)
            mine = predictor.predict(MATRIX, kind="prediction")
            assert mine.tobytes() == self.wanted(predictors)
            theirs = other.submit(predictor.predict, waiting, kind="prediction").result()
        assert theirs.tobytes() == self.wanted(predictors)

    def test_device_that_is_lost_is_told_by_each_call(self, predictor: XGBoostDevicePredictor, tmp_path: Path) -> None:
        matrix = predictor.encode(TABLE)
        (tmp_path / "1").touch()
        self.device.gpu = replace(self.device.gpu, tokens=str(tmp_path))
        with pytest.raises(DeviceLost):
            predictor.may_have_infinite(matrix, [0])


def test_runs_of_columns() -> None:
    assert runs([]) == []
    assert runs([3]) == [(3, 4)]
    assert runs([0, 1, 2, 5, 7, 8]) == [(0, 3), (5, 6), (7, 9)]


class TestCupyDevice:
    """The calls of cupy, on a module that records them."""

    @pytest.fixture
    def cupy(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        made = SimpleNamespace(calls=[])

        class Stream:
            depth = 0

            def __enter__(self) -> None:
                self.depth += 1

            def __exit__(self, *_: object) -> None:
                self.depth -= 1

        stream = Stream()

        def record(name: str, result: Callable[..., Any] = lambda *_, **__: None) -> Callable[..., Any]:
            def call(*values: Any, **options: Any) -> Any:
                made.calls.append(name if stream.depth else f"{name} outside")
                return result(*values, **options)

            return call

        def empty(shape: tuple[int, int], dtype: Any, order: Any) -> DeviceArray:
            assert order == "F"
            return np.empty(shape, dtype, order="F").view(DeviceArray)

        event = SimpleNamespace(record=record("record"), synchronize=record("synchronize"))
        made.cuda = SimpleNamespace(
            Stream=SimpleNamespace(ptds=stream),
            Event=lambda disable_timing: event,
            alloc_pinned_memory=record("pinned", bytearray),
            runtime=SimpleNamespace(memGetInfo=lambda: (3, 4)),
        )
        made.ReductionKernel = lambda *_: record("any_infinite", lambda values: np.isinf(values).any())
        made.empty, made.stack, made.asnumpy = record("empty", empty), np.stack, record("asnumpy", np.asarray)
        for name in ("get_default_memory_pool", "get_default_pinned_memory_pool"):
            setattr(made, name, lambda name=name: SimpleNamespace(free_all_blocks=record(name)))
        monkeypatch.setitem(sys.modules, "cupy", made)
        monkeypatch.setattr(xgboost, "build_info", lambda: {"USE_CUDA": True})
        return made

    def test_a_batch_runs_on_the_stream_of_its_thread(
        self, cupy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And its pinned memory is free only after the device has read it."""
        monkeypatch.setattr(xgboost, "get_config", lambda: {"use_cuda_async_pool": False})
        monkeypatch.setattr(xgboost, "set_config", lambda **options: cupy.calls.append(options))
        rows = np.asfortranarray(MATRIX[:3])
        scores = score(CupyDevice(), lambda data: data[:, 0], rows)
        assert scores.tolist() == pytest.approx(rows[:, 0].tolist(), nan_ok=True)
        assert cupy.calls == [
            "empty",
            "pinned",
            "record",
            {"use_cuda_async_pool": True},
            "asnumpy",
            "synchronize outside",
        ]

    def test_columns_are_sent_one_after_the_other(self, cupy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(xgboost, "get_config", dict)
        upload = CupyDevice().upload(len(MATRIX), 5)
        assert upload.host.flags.f_contiguous
        upload.host[:] = MATRIX
        upload.send(0, 2)
        upload.host[:, 0] = 7.0
        upload.send(2, 5)
        assert np.array_equal(upload.score(np.asarray), MATRIX, equal_nan=True)

    @pytest.mark.parametrize(("columns", "found"), [([0, 1, 2, 3, 4], True), ([3], True), ([0, 1, 2, 4], False)])
    def test_infinite_values_are_found_in_the_columns_asked_for(
        self, columns: list[int], found: bool, cupy: SimpleNamespace
    ) -> None:
        upload = CupyDevice().upload(len(MATRIX), 5)
        upload.host[:] = MATRIX
        upload.host[77, 3] = np.inf
        upload.send(0, 5)
        assert upload.has_infinite(columns) is found
        assert cupy.calls.count("any_infinite") == len(runs(columns))

    def test_pool_is_set_once_in_every_thread(self, cupy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[int] = []
        monkeypatch.setattr(xgboost, "get_config", lambda: {"use_cuda_async_pool": False})
        monkeypatch.setattr(xgboost, "set_config", lambda **_: seen.append(threading.get_ident()))
        device = CupyDevice()
        for _ in range(2):
            score(device, lambda data: data, MATRIX[:1])
        thread = threading.Thread(target=score, args=(device, lambda data: data, MATRIX[:1]))
        thread.start()
        thread.join()
        assert len(seen) == len(set(seen)) == 2

    def test_library_without_the_option_is_left_alone(
        self, cupy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(xgboost, "get_config", dict)
        monkeypatch.setattr(xgboost, "set_config", lambda **_: pytest.fail("set"))
        score(CupyDevice(), lambda data: data, MATRIX[:1])

    def test_memory_and_release(self, cupy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
        device = CupyDevice()
        assert device.memory() == (3, 4)
        device.release()
        assert cupy.calls == ["get_default_memory_pool outside", "get_default_pinned_memory_pool outside"]
        assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"

    def test_booster_is_asked_for_the_first_device(self, cupy: SimpleNamespace, predictors: Predictors) -> None:
        data = bytes(predictors("binary:logistic").booster.save_raw("ubj"))
        seen: list[Any] = []
        device = CupyDevice()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(xgboost.Booster, "set_param", lambda self, options: seen.append(options))
            device.booster(data)
        assert seen[-1] == {"device": "cuda:0", "nthread": 1}


def test_device_is_opened_once() -> None:
    with installed() as opened:
        assert open_device() is open_device()
        assert len(opened) == 1
        assert isinstance(opened[0], FakeDevice)


def test_versions_know_what_keeps_them_from_gpus(predictors: Predictors) -> None:
    version: ModelVersion = predictors("binary:logistic").version
    assert version.device_blockers == ()
