"""What a model reference stands for. In this version: model files."""

from __future__ import annotations

from pipeline.errors import ModelError
from pipeline.flavors import detect_bytes, find_flavor, read_model
from pipeline.model import ModelRef, ModelVersion


def resolve(ref: ModelRef) -> ModelVersion:
    """The immutable version that ``ref`` stands for now.

    :raises ModelError: when there is none, or the file is no model.
    :raises RefusedForSafety: for a pickle.
    """
    if not ref.is_file:
        raise ModelError(
            "only model files resolve in this version",
            found=ref.text,
            expected="path or URL of an xgboost model file",
            next_step="give the path of the file itself as score.model",
        )
    data = read_model(ref.text)
    return find_flavor(detect_bytes(data, where=ref.text)).inspect(ref.text, data)
