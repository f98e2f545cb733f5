"""The flavor of services: a model that answers requests with the interface of OpenAI, and has no file.

Nothing is promised about a row: a service may answer the same prompt otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.common.digest import digest_bytes
from pipeline.errors import BadPrediction, ModelError
from pipeline.models.endpoints.bodies import (
    Answer,
    Refusal,
    Usage,
    estimated_tokens,
    prompt_key,
    prompt_of,
    read_chat,
    read_embeddings,
    request_body,
    unpack_vector,
)
from pipeline.models.endpoints.calls import Calls, current_calls
from pipeline.models.endpoints.client import Attempts, Client, open_client, rows_of
from pipeline.models.flavors import Flavor
from pipeline.models.flavors.library import LibraryPredictor
from pipeline.models.model import ModelData, ModelVersion
from pipeline.spec.endpoint import Endpoint
from pipeline.spec.model_ref import OutputKind

FLUSH_SECONDS = 2.0
"""Seconds between two writes of the answers of a batch: a process that is killed loses so much, and what is open."""
_MISSING = "MissingValue"


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts of rows, with the operations of a matrix."""

    texts: np.ndarray
    """Text of each row, or the name of its missing column as `Missing`."""

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice | np.ndarray) -> Prompts:
        return Prompts(self.texts[rows])


@dataclass(frozen=True, slots=True)
class Missing:
    """A row without a value for its prompt."""

    column: str


def endpoint_of(version: ModelVersion) -> Endpoint:
    """Return how the service of a model is called."""
    return Endpoint.model_validate_json(version.endpoint)


def load(version: ModelVersion, data: ModelData = b"", *, threads: int | None = None) -> EndpointPredictor:
    """Load the predictor for ``version``; nothing is sent.

    :raises SpecError: if a secret that the endpoint refers to is not here.
    """
    endpoint = endpoint_of(version)
    return EndpointPredictor(version, endpoint, open_client(endpoint))


class EndpointPredictor(LibraryPredictor):
    """A service. Threads share its connections and limits."""

    def __init__(self, version: ModelVersion, endpoint: Endpoint, client: Client) -> None:
        super().__init__(version, threads=1)
        self.endpoint = endpoint
        self.client = client
        self._pool = ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="endpoint")
        self._of_thread = threading.local()

    def encode(self, table: pa.Table, *, order: Literal["C", "F"] = "C") -> Any:
        """See `pipeline.models.model.Predictor.encode`: the prompt of each row.

        :param table: columns in the order of the features; their names may be others.
        """
        names = self.version.feature_names
        columns = [table.column(index).to_pylist() for index in range(len(names))]
        texts = np.empty(table.num_rows, dtype=object)
        for row in range(table.num_rows):
            values = {name: column[row] for name, column in zip(names, columns, strict=True)}
            missing = next((name for name, value in values.items() if value is None), None)
            texts[row] = prompt_of(self.endpoint, values) if missing is None else Missing(missing)
        return Prompts(texts)

    def example(self) -> Any:
        """See `pipeline.models.model.Predictor.example`."""
        return Prompts(np.array([prompt_of(self.endpoint, dict.fromkeys(self.version.feature_names, "x"))], object))

    def call(self, rows: Prompts, kind: OutputKind) -> np.ndarray:
        """Return the results of ``rows``. Those that were refused have any value; see `take_refusals`.

        :raises ModelError: when no request will work.
        :raises EndpointUnavailable: when the service does not answer.
        """
        calls = current_calls()
        self._apply_limits(calls)
        found: dict[int, Answer | Refusal] = {}
        keys: dict[int, str] = {}
        for place, text in enumerate(rows.texts):
            if isinstance(text, Missing):
                found[place] = Refusal(_MISSING, f"null in {text.column}, which the prompt needs")
                continue
            keys[place] = prompt_key(self.version.digest, text)
            if (kept := calls.kept.take(keys[place])) is not None:
                found[place] = Answer.from_json(kept)
                self._count(calls, found[place].usage, reused=1)
        self._ask(rows, [place for place in keys if place not in found], keys, found, calls)
        refused = {place: one for place, one in found.items() if isinstance(one, Refusal)}
        known: dict[int, Refusal] = getattr(self._of_thread, "refused", {})
        self._of_thread.refused = known | refused
        return self._values(found, len(rows))

    def take_refusals(self) -> Mapping[int, tuple[str, str]]:
        """Return reason and message of the rows that the last `predict` of this thread has no result for."""
        refused: dict[int, Refusal] = getattr(self._of_thread, "refused", {})
        self._of_thread.refused = {}
        return {place: (one.reason, one.message) for place, one in refused.items()}

    def take_usage(self) -> dict[str, float]:
        """Return requests, tokens and cost of this thread since the last call."""
        usage: dict[str, float] = getattr(self._of_thread, "usage", {})
        self._of_thread.usage = {}
        return usage

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See `pipeline.models.model.Predictor.is_out_of_memory`."""
        return isinstance(error, MemoryError)

    def _apply_limits(self, calls: Calls) -> None:
        endpoint, share = self.endpoint, calls.share
        most = endpoint.max_concurrency
        self.client.limiter.set_limits(
            concurrency=endpoint.concurrency if most is None else max(1, min(endpoint.concurrency, int(most * share))),
            requests_per_minute=endpoint.requests_per_minute and endpoint.requests_per_minute * share,
            tokens_per_minute=endpoint.tokens_per_minute and endpoint.tokens_per_minute * share,
        )
        self.client.start_batch()

    def _ask(
        self,
        rows: Prompts,
        places: Sequence[int],
        keys: Mapping[int, str],
        found: dict[int, Answer | Refusal],
        calls: Calls,
    ) -> None:
        """Ask the service about rows. Answers are kept as they come, whatever happens to the others."""
        is_over = threading.Event()
        size = 1 if self.endpoint.is_chat else self.endpoint.rows_per_request
        groups = {
            self._pool.submit(self._ask_group, rows, group, is_over.is_set): group for group in rows_of(places, size)
        }
        failed: BaseException | None = None
        waiting: set[Future[Any]] = set(groups)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=FLUSH_SECONDS, return_when=FIRST_EXCEPTION)
                for future in done:
                    if future.cancelled():
                        continue
                    if (error := future.exception()) is None:
                        self._take(future.result(), groups[future], keys, found, calls)
                        continue
                    failed = failed or error
                    _end(is_over, waiting)
                calls.kept.flush()
        except BaseException:
            _end(is_over, groups)
            raise
        if failed is not None:
            raise failed

    def _take(
        self,
        result: tuple[list[Answer | Refusal], Attempts],
        places: Sequence[int],
        keys: Mapping[int, str],
        found: dict[int, Answer | Refusal],
        calls: Calls,
    ) -> None:
        """Take the results of a request over, and keep those that are paid."""
        results, asked = result
        self._count(calls, Usage(), sent=asked.calls, failed=asked.failed)
        for place, one in zip(places, results, strict=True):
            found[place] = one
            self._count(calls, one.usage)
            if isinstance(one, Answer):
                calls.kept.keep(keys[place], one.to_json())

    def _ask_group(
        self, rows: Prompts, places: Sequence[int], is_over: Callable[[], bool]
    ) -> tuple[list[Answer | Refusal], Attempts]:
        attempts = Attempts()
        return self._ask_texts([rows.texts[place] for place in places], attempts, is_over), attempts

    def _ask_texts(self, texts: Sequence[str], attempts: Attempts, is_over: Callable[[], bool]) -> list[Any]:
        """Return a result for each text. A refused request of several is cut in two: one of them is the reason."""
        endpoint = self.endpoint
        read: Callable[[Mapping[str, Any]], Any]
        if endpoint.is_chat:
            read = lambda body: read_chat(endpoint, body)  # noqa: E731
        else:
            width = self._width
            read = lambda body: read_embeddings(body, rows=len(texts), width=width)  # noqa: E731
        result = self.client.post(
            "chat/completions" if endpoint.is_chat else "embeddings",
            request_body(endpoint, texts),
            read,
            estimated=estimated_tokens(endpoint, texts, answer_tokens=self.client.mean_answer_tokens),
            attempts=attempts,
            is_over=is_over,
        )
        if isinstance(result, Refusal) and len(texts) > 1:
            middle = len(texts) // 2
            return [
                one for part in (texts[:middle], texts[middle:]) for one in self._ask_texts(part, attempts, is_over)
            ]
        return [result] if endpoint.is_chat or isinstance(result, Refusal) else list(result)

    @property
    def _width(self) -> int | None:
        outputs = self.version.output_types
        return outputs[0].width if outputs and outputs[0].is_list else None

    def _count(self, calls: Calls, usage: Usage, *, reused: int = 0, sent: int = 0, failed: int = 0) -> None:
        cost = usage.cost(self.endpoint.prices)
        calls.add_cost(cost)
        added = {
            "calls": sent,
            "failed_calls": failed,
            "reused_answers": reused,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "cost": cost,
        }
        known: dict[str, float] = getattr(self._of_thread, "usage", {})
        self._of_thread.usage = {
            name: known.get(name, 0) + amount for name, amount in added.items() if amount or name in known
        }

    def _values(self, found: Mapping[int, Answer | Refusal], rows: int) -> np.ndarray:
        """Return the results as an array [rows] or [rows, width]; any values for rows without one."""
        output = self.version.output_types[0]
        if output.is_list:
            vectors = np.zeros((rows, output.width), np.float32)
            for place, one in found.items():
                if isinstance(one, Answer):
                    vectors[place] = unpack_vector(one.value)
            return vectors
        values = np.empty(rows if output.width == 1 else (rows, output.width), dtype=object)
        for place, one in found.items():
            if isinstance(one, Answer):
                values[place] = one.value[0] if output.types and output.width == 1 else one.value
        return values


def _end(is_over: threading.Event, futures: Iterable[Future[Any]]) -> None:
    """Send no more requests of a batch."""
    is_over.set()
    for future in futures:
        future.cancel()


def inspect(uri: str, data: ModelData, *, name: str | None = None, allow_code: bool = False) -> ModelVersion:
    """Refuse: a service has no file that could be inspected.

    :raises ModelError: always.
    """
    raise ModelError(
        "a service is no model file",
        where=uri,
        found=f"a file with the digest {digest_bytes(data)[:12]}" if isinstance(data, bytes) else "a folder",
        expected="score: {endpoint: {url: …, model: …}}",
    )


def check_answers(answers: Sequence[Any], *, where: str) -> int:
    """Return the numbers of an embedding that planning asked for.

    :raises BadPrediction: if there is none.
    """
    if len(answers) != 1 or not isinstance(answers[0], Answer):
        raise BadPrediction(
            "the service did not embed a short text",
            where=where,
            found=answers[0].message if answers and isinstance(answers[0], Refusal) else f"{len(answers)} embeddings",
            next_step="look at endpoint.model: it must be a model for embeddings",
        )
    return len(unpack_vector(answers[0].value))


FLAVOR = Flavor(
    "endpoint",
    inspect,
    load,
    accepts=lambda head, names: False,
    takes="frame",
    has_file=False,
)
