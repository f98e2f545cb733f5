"""Installation: a wheel scores where there is no compiler, and the package installs where none can be had."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import xgboost

ROOT = Path(__file__).resolve().parents[2]
BUILD_SUPPORT = ROOT / "build_support"

HAS_BUILD = int(version("setuptools").split(".")[0]) >= 77 if importlib.util.find_spec("setuptools") else False

SCORE = """
import sys, xgboost, numpy as np, pipeline
from pipeline.models.trees import TreeEngine, read_xgboost, unavailable
from pipeline.models.trees.xgboost import read_ubj
assert pipeline.__file__.startswith(sys.prefix), pipeline.__file__
booster = xgboost.Booster(model_file=sys.argv[1])
matrix = np.random.default_rng(1).standard_normal((700, 4)).astype(np.float32)
engine = TreeEngine(read_xgboost(read_ubj(booster.save_raw("ubj"))))
assert engine.margin(matrix).tobytes() == booster.inplace_predict(matrix, predict_type="margin").tobytes()
print("equal")
"""

SHOW = """
import sys, pipeline
from pipeline.models import engines, registry
from pipeline.spec.model_ref import ModelRef
assert pipeline.__file__.startswith(sys.prefix), pipeline.__file__
model = registry.resolve(ModelRef(sys.argv[1]))
print(engines.engine_options("auto", model, kind="prediction").reasons)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What an installation needs of this checkout, without anything that was built."""
    copy = tmp_path / "checkout"
    for name in ("build_support", "cluster_configs", "pipeline"):
        ignored = shutil.ignore_patterns("*.so", "*.pyc", "__pycache__", "not_built.txt")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copyfile(ROOT / name, copy / name)
    return copy


@pytest.fixture
def model(tmp_path: Path) -> Path:
    matrix = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
    data = xgboost.DMatrix(matrix, matrix[:, 0] > 0, feature_names=list("abcd"))
    path = tmp_path / "model.ubj"
    xgboost.train({"objective": "binary:logistic", "nthread": 1}, data, 5).save_model(path)
    return path


@pytest.fixture
def no_compiler(tmp_path: Path) -> dict[str, str]:
    """The variables of a machine without a compiler: nothing at all on the PATH."""
    empty = tmp_path / "no-programs"
    empty.mkdir()
    kept = {name: text for name, text in os.environ.items() if name not in {"CC", "PYTHONPATH"}}
    return kept | {"PATH": str(empty)}


@pytest.fixture
def install(tmp_path: Path) -> Callable[[Path, dict[str, str]], Path]:
    """Install into an environment of its own, which sees the other packages of this one; return its interpreter."""

    def run(source: Path, variables: dict[str, str]) -> Path:
        folder = tmp_path / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, capture_output=True)
        python = folder / "bin" / "python"
        packages = next((folder / "lib").iterdir()) / "site-packages"
        # Entries of a .pth file come after the folder itself, so that the package is found there first.
        (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
        pip += ["--no-build-isolation", "--quiet", "--disable-pip-version-check", str(source)]
        done = subprocess.run(pip, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return python

    return run


def run_code(python: Path, code: str, *arguments: str, variables: dict[str, str], folder: Path) -> str:
    command = [str(python), "-c", code, *arguments]
    done = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_build = pytest.mark.skipif(not HAS_BUILD, reason="setuptools 77 is not installed")


@needs_build
@pytest.mark.slow
class TestWheel:
    def test_it_scores_without_a_compiler(
        self,
        checkout: Path,
        model: Path,
        tmp_path: Path,
        no_compiler: dict[str, str],
        install: Callable[[Path, dict[str, str]], Path],
    ) -> None:
        pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
        subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(checkout)], check=True, capture_output=True)
        (wheel,) = tmp_path.glob("*.whl")
        assert "-py3-none-" in wheel.name
        names = zipfile.ZipFile(wheel).namelist()
        assert "pipeline/models/trees/native/libtrees.so" in names
        assert not [name for name in names if name.endswith((".c", ".h"))]
        python = install(wheel, no_compiler)
        assert "equal" in run_code(python, SCORE, str(model), variables=no_compiler, folder=tmp_path)


@needs_build
@pytest.mark.slow
class TestInstallationWithoutACompiler:
    def test_it_succeeds_and_the_reason_is_told(
        self,
        checkout: Path,
        model: Path,
        tmp_path: Path,
        no_compiler: dict[str, str],
        install: Callable[[Path, dict[str, str]], Path],
    ) -> None:
        python = install(checkout, no_compiler)
        reasons = run_code(python, SHOW, str(model), variables=no_compiler, folder=tmp_path)
        assert "no C compiler was found when the package was installed" in reasons

    def test_a_compiler_that_fails_is_named(
        self,
        checkout: Path,
        model: Path,
        tmp_path: Path,
        no_compiler: dict[str, str],
        install: Callable[[Path, dict[str, str]], Path],
    ) -> None:
        python = install(checkout, no_compiler | {"CC": f"{sys.executable} -c 1/0"})
        reasons = run_code(python, SHOW, str(model), variables=no_compiler, folder=tmp_path)
        assert "ZeroDivisionError" in reasons


class TestBuildRequirements:
    @pytest.fixture
    def backend(self, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        pytest.importorskip("setuptools.build_meta")
        monkeypatch.syspath_prepend(str(BUILD_SUPPORT))
        for name in ("backend", "native"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        import backend

        monkeypatch.setattr(backend.build_meta, "get_requires_for_build_wheel", lambda settings: [])
        return backend

    @pytest.mark.parametrize(
        ("compiler", "has_ziglang", "wanted"),
        [(["cc"], True, []), (None, True, ["ziglang"]), (None, False, [])],
    )
    def test_ziglang_is_needed_only_without_a_compiler(
        self,
        backend: ModuleType,
        monkeypatch: pytest.MonkeyPatch,
        compiler: list[str] | None,
        has_ziglang: bool,
        wanted: list[str],
    ) -> None:
        monkeypatch.setattr(backend, "find_compiler", lambda: compiler)
        monkeypatch.setattr(backend, "_has_ziglang", lambda: has_ziglang)
        assert backend.get_requires_for_build_wheel() == wanted
