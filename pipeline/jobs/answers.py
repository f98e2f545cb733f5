"""Answers of a service that attempts at a partition have paid, kept until the partition is committed.

::

    rounds/<n>/answers/<partition>/<attempt>-<number>.jsonl    one answer a line, under the digest of its prompt

A worker that dies loses the answers of the last two seconds and the requests that were open; the next attempt at the
partition, or at a part of it, finds all others. Prompts are not stored.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from typing import Any

from pipeline.jobs import layout
from pipeline.storage.store import Store
from pipeline.storage.urls import unique_name

logger = logging.getLogger(__name__)


class StoredAnswers:
    """The kept answers of one attempt. It reads those of earlier attempts when the first one is asked for."""

    def __init__(self, store: Store, partition: str) -> None:
        """:param store: of the round's folder.

        :param partition: id of the partition; parts of a split one share its answers.
        """
        self._store = store
        self._folder = layout.answers_folder(partition.partition(".")[0])
        self._is_whole = "." not in partition
        self._name = unique_name()
        self._number = 0
        self._found: dict[str, list[Mapping[str, Any]]] | None = None
        self._lines: list[str] = []
        self._lock = threading.Lock()

    def take(self, key: str) -> Mapping[str, Any] | None:
        """Return an answer for a prompt, each once; None if there is none left."""
        with self._lock:
            if self._found is None:
                self._found = self._read()
            answers = self._found.get(key)
            return answers.pop() if answers else None

    def keep(self, key: str, answer: Mapping[str, Any]) -> None:
        """Keep an answer, which `flush` stores."""
        line = json.dumps([key, answer])
        with self._lock:
            self._lines.append(line)

    def flush(self) -> None:
        """Store the answers since the last call. An error is only logged: the output has the answers all the same."""
        with self._lock:
            lines, self._lines = self._lines, []
            name = f"{self._folder}/{self._name}-{self._number}.jsonl"
            self._number += bool(lines)
        if not lines:
            return
        try:
            self._store.replace(name, ("\n".join(lines) + "\n").encode("ascii"))
        except Exception as error:
            logger.warning("answers of a service could not be kept: %s: %s", type(error).__name__, error)

    def remove(self) -> None:
        """Remove the answers, once their partition is committed; other parts of it may need them."""
        with self._lock:
            is_needed = not self._is_whole or (not self._number and not self._found)
        if not is_needed:
            try:
                self._store.remove_folder(self._folder)
            except Exception as error:
                logger.warning("kept answers could not be removed: %s: %s", type(error).__name__, error)

    def _read(self) -> dict[str, list[Mapping[str, Any]]]:
        found: dict[str, list[Mapping[str, Any]]] = {}
        for name in self._store.list(self._folder):
            try:
                for line in self._store.read(f"{self._folder}/{name}").decode("ascii").splitlines():
                    key, answer = json.loads(line)
                    found.setdefault(key, []).append(answer)
            except (OSError, ValueError) as error:
                logger.warning("kept answers cannot be read: %s: %s", name, error)
        return found
