"""Storage for all durable data: exclusive create, replace and list, on POSIX file systems and object stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.common.lazy import lazy_face

if TYPE_CHECKING:
    from pipeline.storage.store import Store, open_store
    from pipeline.storage.urls import file_system, storage_errors, use_storage_options

__all__ = ["Store", "file_system", "open_store", "storage_errors", "use_storage_options"]

__getattr__, __dir__ = lazy_face(
    "pipeline.storage",
    {
        "store": "Store open_store",
        "urls": "file_system storage_errors use_storage_options",
    },
)
