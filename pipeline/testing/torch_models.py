"""A module of PyTorch for tests of the flavor ``torch``."""

from __future__ import annotations

from typing import Any

import torch


class Network(torch.nn.Module):  # type: ignore[misc]
    """A network of two layers with two named outputs."""

    features = ("f0", "f1", "f2", "f3", "f4", "f5", "f6", "f7")
    outputs = {"prediction": {"left": "float32", "right": "float32"}}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 64)
        self.last = torch.nn.Linear(64, 2)

    def forward(self, rows: Any) -> Any:
        """Return [rows, 2]."""
        return self.last(torch.relu(self.first(rows)))


def network() -> Any:
    """Return the module without its weights, as a factory does."""
    return Network()
