"""PyTorch: factories and weights, exported programs, memory."""

from __future__ import annotations

import io
import textwrap
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import pipeline
from pipeline.errors import BadPrediction, ModelError, PipelineError, RefusedForSafety
from pipeline.models.flavors.library import says_out_of_memory
from pipeline.models.registry import resolve
from pipeline.spec.model_ref import ModelRef


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError(), True),
    ],
)
def test_want_of_memory_is_told_by_the_message(error: Exception, expected: bool) -> None:
    assert says_out_of_memory(error) is expected


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch", reason="not in the extra dev: its wheel has 550 MB")


NET = """
    import torch

    def net():
        module = torch.nn.Linear(2, 3)
        module.features, module.outputs = ["a", "b"], "float32[3]"
        return module
"""


@pytest.fixture
def home(torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import safetensors.torch

    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(textwrap.dedent(NET))
    torch.manual_seed(1)
    safetensors.torch.save_file(torch.nn.Linear(2, 3).state_dict(), tmp_path / "w.safetensors")
    return tmp_path


def pinned(home: Path, name: str = "nets:net", files: str = "w.safetensors") -> Any:
    return resolve(ModelRef(name), import_paths=[str(home)], model_files=[str(home / files)], cache=str(home / "jobs"))


class TestFactory:
    def test_weights_are_loaded_and_lists_written(self, home: Path, torch: Any) -> None:
        torch.manual_seed(1)
        module = torch.nn.Linear(2, 3)
        frame = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]})
        found = pipeline.score(frame, "nets:net", model_files="w.safetensors", output="v")
        with torch.inference_mode():
            expected = module(torch.tensor(frame.to_numpy(np.float32))).numpy()
        np.testing.assert_allclose(np.stack(found["v"].to_list()), expected, rtol=1e-6)

    def test_flavor_and_promise(self, home: Path) -> None:
        version = pinned(home)
        assert (version.flavor, version.runs_code) == ("torch", None)
        assert version.promise.kind in ("exact", "fixed")

    def test_weights_of_another_module(self, home: Path, torch: Any) -> None:
        import safetensors.torch

        safetensors.torch.save_file(torch.nn.Linear(3, 3).state_dict(), home / "other.safetensors")
        with pytest.raises(ModelError, match="cannot read the model") as caught:
            pinned(home, files="other.safetensors")
        assert "size mismatch" in caught.value.found

    def test_declared_width_must_hold(self, home: Path) -> None:
        (home / "nets.py").write_text(textwrap.dedent(NET).replace("float32[3]", "float32[4]"))
        with pytest.raises(BadPrediction, match="what it declares"):
            pinned(home)


@pytest.fixture
def hostile(torch: Any, tmp_path: Path) -> Path:
    """Return a program whose sample inputs are a pickle that writes a file."""

    class Pickled:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    program = torch.export.export(torch.nn.Linear(2, 1), (torch.zeros(4, 2),))
    made, sample = io.BytesIO(), io.BytesIO()
    torch.export.save(program, made)
    torch.save(Pickled(), sample)
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(made) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as other:
        for name in archive.namelist():
            other.writestr(name, sample.getvalue() if "sample_inputs" in name else archive.read(name))
    return path


class TestPrograms:
    def test_hostile_program_is_refused_unread(self, hostile: Path) -> None:
        with pytest.raises(RefusedForSafety, match="runs code") as caught:
            resolve(ModelRef(str(hostile)))
        assert "safetensors" in caught.value.next_step
        assert not (hostile.parent / "ran").exists()

    def test_allowed_code_runs_in_the_child(self, hostile: Path) -> None:
        """The reason why .pt2 files need allow_code: PyTorch opens the pickles in them."""
        with suppress(PipelineError):  # with other sample inputs the program may be unusable
            resolve(ModelRef(str(hostile)), allow_code=True)
        assert (hostile.parent / "ran").exists()

    def test_fixed_number_of_rows_is_filled_up(self, torch: Any, tmp_path: Path) -> None:
        module = torch.nn.Linear(2, 1).eval()
        path = tmp_path / "model.pt2"
        torch.export.save(torch.export.export(module, (torch.zeros(4, 2),)), path)
        frame = pd.DataFrame(np.arange(14.0, dtype=np.float32).reshape(7, 2), columns=["f0", "f1"])
        found = pipeline.score(frame, path, output="p", allow_code=True)["p"].to_numpy()
        with torch.inference_mode():
            expected = module(torch.from_numpy(frame.to_numpy().copy())).numpy()[:, 0]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
