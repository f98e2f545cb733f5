"""Resolve an endpoint of a job spec to a model version: features, outputs, and whether the service takes the key."""

from __future__ import annotations

import difflib
import logging

from pipeline.errors import ModelError
from pipeline.models.endpoints.client import Attempts, fatal_error, open_client, service_text
from pipeline.models.endpoints.replies import Again, Body, Fatal
from pipeline.models.flavors.endpoint import EndpointPredictor, check_answers
from pipeline.models.model import Feature, ModelVersion, OutputType, Promise
from pipeline.spec.endpoint import Endpoint

logger = logging.getLogger(__name__)
PLAN_ATTEMPTS = 3
"""Attempts to reach the service while a job is planned."""


def resolve_endpoint(endpoint: Endpoint) -> ModelVersion:
    """Return the model version of a service.

    The service is asked once for its models, which is free, and for one embedding where ``dimensions`` is not given.

    :raises ModelError: if the service refuses the key, or is not there.
    :raises SpecError: if a secret that the endpoint refers to is not here.
    """
    digest = endpoint.digest
    version = ModelVersion(
        name=endpoint.model.rsplit("/", 1)[-1],
        version=digest[:12],
        uri=endpoint.url,
        digest=digest,
        flavor="endpoint",
        nbytes=0,
        features=tuple(Feature(name, "any") for name in endpoint.columns),
        task="other",
        outputs=1,
        objective=endpoint.model,
        output_types=(_output(endpoint),),
        promise=Promise("code"),
        endpoint=endpoint.model_dump_json(exclude_defaults=True),
    )
    if not endpoint.check:
        if not endpoint.is_chat and endpoint.dimensions is None:
            raise ModelError(
                "the size of the embeddings is not known",
                where="score.endpoint.dimensions",
                found="check: false, so that the service is not asked",
                next_step="write dimensions: the numbers of an embedding",
            )
        return version
    if not endpoint.is_chat and endpoint.dimensions is None:
        return _with_width(version, endpoint)
    _check(endpoint)
    return version


def _output(endpoint: Endpoint, *, width: int | None = None) -> OutputType:
    if not endpoint.is_chat:
        return OutputType("prediction", "float32", width or endpoint.dimensions or 1, is_list=True)
    fields = endpoint.fields
    if not fields:
        return OutputType("prediction", "string", 1)
    return OutputType("prediction", "string", len(fields), tuple(fields), types=tuple(fields.values()))


def _with_width(version: ModelVersion, endpoint: Endpoint) -> ModelVersion:
    """Return ``version`` with the size of the embedding of a short text."""
    from dataclasses import replace

    impatient = endpoint.model_copy(update={"attempts": PLAN_ATTEMPTS, "patience": "5 s"})
    predictor = EndpointPredictor(replace(version, output_types=()), impatient, open_client(impatient))
    answers = predictor._ask_texts(["x"], Attempts(), lambda: False)
    width = check_answers(answers, where=service_text(endpoint))
    return replace(version, output_types=(_output(endpoint, width=width),))


def _check(endpoint: Endpoint) -> None:
    """Ask the service for its models.

    :raises ModelError: if it refuses the key, or is not there.
    """
    client = open_client(endpoint.model_copy(update={"timeout": min(endpoint.seconds, 20.0)}))
    for attempt in range(PLAN_ATTEMPTS):
        reply = client.get("models")
        if not isinstance(reply, Again):
            break
        if attempt + 1 < PLAN_ATTEMPTS:
            client.sleep(0.5 * 2**attempt)
    if isinstance(reply, Fatal) and not reply.found.startswith(("404", "405")):
        raise fatal_error(endpoint, reply)
    if isinstance(reply, Again) and reply.reason not in ("ServerError", "InvalidAnswer"):
        raise ModelError(
            "the service cannot be reached",
            where=service_text(endpoint),
            found=reply.message,
            expected="a service that answers here, where the job is planned",
            next_step="start it, or look at endpoint.url; if only workers reach it, write check: false",
        )
    names = _names(reply) if isinstance(reply, Body) else []
    if names and endpoint.model not in names:
        near = difflib.get_close_matches(endpoint.model, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        logger.warning(
            "the service at %s does not list the model %s, but %s%s",
            endpoint.url,
            endpoint.model,
            ", ".join(names[:5]),
            hint,
        )


def _names(reply: Body) -> list[str]:
    data = reply.value.get("data")
    return [str(one.get("id")) for one in data if isinstance(one, dict)] if isinstance(data, list) else []
