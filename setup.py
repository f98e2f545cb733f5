"""Name the compiled part of the package. Everything else is in pyproject.toml, the way to build in build_support/."""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("pipeline/models/trees/native")

setup(
    ext_modules=[
        Extension(
            "pipeline.models.trees.native.libtrees",
            sources=sorted(map(str, NATIVE.glob("*.c"))),
            depends=sorted(map(str, NATIVE.glob("*.h"))),
            optional=True,
        )
    ]
)
