"""A stand-in for the module ``pynvml``: cards of your choice, and the errors of NVML."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

GIB = 1 << 30
H200 = "NVIDIA H200"


class NVMLError(Exception):
    """Base of NVML's errors."""


class NVMLErrorLibraryNotFound(NVMLError):
    """No driver is installed."""


class NVMLErrorDriverNotLoaded(NVMLError):
    """The driver is installed, and not loaded."""


class NVMLErrorNoPermission(NVMLError):
    """The user may not use the card."""


class NVMLErrorNotSupported(NVMLError):
    """The card cannot do that."""


class NVMLErrorNotFound(NVMLError):
    """No such instance."""


NO_LIBRARY = NVMLErrorLibraryNotFound("NVML Shared Library Not Found")
NOT_LOADED = NVMLErrorDriverNotLoaded("Driver Not Loaded")
NO_PERMISSION = NVMLErrorNoPermission("Insufficient Permissions")


@dataclass(frozen=True)
class Card:
    """A card, or an instance of a divided card."""

    uuid: str = "GPU-00000000-0000-0000-0000-000000000001"
    name: str = H200
    memory: int = 141 * GIB
    instances: tuple[Card | None, ...] = ()
    """Instances of a divided card; None: a number without an instance."""
    can_divide: bool = False
    error: NVMLError | None = None
    """Error of every call about the card."""


@dataclass
class FakeNvml:
    """State of a fake library, and the calls that were made."""

    cards: Sequence[Card] = (Card(),)
    error: NVMLError | None = None
    """Error of ``nvmlInit``."""
    driver: str | bytes = "580.95.05"
    open: int = 0
    """Number of ``nvmlInit`` without its ``nvmlShutdown``."""
    calls: list[str] = field(default_factory=list)

    def module(self) -> ModuleType:
        """Return a module with the functions of pynvml that this package calls."""
        made = ModuleType("pynvml")
        made.__spec__ = ModuleSpec("pynvml", None)
        functions = {
            "NVMLError": NVMLError,
            "nvmlInit": self._init,
            "nvmlShutdown": self._shutdown,
            "nvmlSystemGetDriverVersion": lambda: self.driver,
            "nvmlDeviceGetCount": lambda: len(self.cards),
            "nvmlDeviceGetHandleByIndex": self._card,
            "nvmlDeviceGetUUID": lambda card: card.uuid,
            "nvmlDeviceGetName": lambda card: card.name,
            "nvmlDeviceGetMemoryInfo": lambda card: SimpleNamespace(total=card.memory, free=card.memory, used=0),
            "nvmlDeviceGetMigMode": self._mig_mode,
            "nvmlDeviceGetMaxMigDeviceCount": lambda card: len(card.instances),
            "nvmlDeviceGetMigDeviceHandleByIndex": self._instance,
        }
        for name, function in functions.items():
            setattr(made, name, function)
        return made

    def _init(self) -> None:
        self.calls.append("nvmlInit")
        if self.error is not None:
            raise self.error
        self.open += 1

    def _shutdown(self) -> None:
        self.open -= 1

    def _card(self, index: int) -> Card:
        error = self.cards[index].error
        if error is not None:
            raise error
        return self.cards[index]

    def _mig_mode(self, card: Card) -> tuple[int, int]:
        if not (card.can_divide or card.instances):
            raise NVMLErrorNotSupported("Not Supported")
        return int(bool(card.instances)), 0

    def _instance(self, card: Card, number: int) -> Card:
        instance = card.instances[number]
        if instance is None:
            raise NVMLErrorNotFound("Not Found")
        return instance


@contextmanager
def nvml(fake: FakeNvml | None, *, cupy: bool = True) -> Iterator[FakeNvml | None]:
    """Let this process import ``fake`` as pynvml inside the block; None: the import fails.

    :param cupy: True if cupy counts as installed.
    """
    replaced: dict[str, Any] = {"pynvml": None if fake is None else fake.module(), "cupy": None}
    if cupy:
        replaced["cupy"] = ModuleType("cupy")
        replaced["cupy"].__spec__ = ModuleSpec("cupy", None)
    before = {name: sys.modules.get(name, "missing") for name in replaced}
    sys.modules.update(replaced)
    try:
        yield fake
    finally:
        for name, module in before.items():
            if module == "missing":
                del sys.modules[name]
            else:
                sys.modules[name] = module  # type: ignore[assignment]
