"""Objects that a job stores as JSON: reading gives back what was stored, whatever their texts and numbers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.rows import QuarantinedFile, RowCounts
from pipeline.jobs.cancellation import CancelRequest
from pipeline.jobs.fan_out import ChildCommit, FanOutCommit
from pipeline.jobs.lease import Holder
from pipeline.jobs.manifest import Manifest, ManifestFile, ManifestModel
from pipeline.jobs.record import JobRecord
from pipeline.jobs.rounds import RoundReason, RoundRecord

TEXTS = st.text(max_size=40)
"""Any text, lone surrogates included: JSON escapes them."""
COUNTS = st.integers(0, 1 << 62)
ROWS = st.builds(RowCounts, COUNTS, COUNTS, COUNTS, COUNTS)
QUARANTINED = st.builds(
    QuarantinedFile, TEXTS, TEXTS, TEXTS, st.none() | COUNTS, st.lists(st.tuples(TEXTS, TEXTS), max_size=2).map(tuple)
)
MODELS = st.builds(ManifestModel, TEXTS, TEXTS, TEXTS)
CHECKSUMS = st.sampled_from(["xxh3-128", "sha256"]).flatmap(lambda name: TEXTS.map(lambda digits: f"{name}:{digits}"))
FILES = st.builds(ManifestFile, TEXTS, TEXTS, COUNTS, COUNTS, CHECKSUMS)
MODEL_DETAILS = st.fixed_dictionaries({"name": TEXTS, "version": TEXTS, "digest": TEXTS})


def tuples(of: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(of, max_size=3).map(tuple)


@pytest.mark.fault(56)
@given(
    st.builds(
        RoundRecord,
        round=st.integers(1, 99),
        reason=st.sampled_from(RoundReason),
        plan=TEXTS,
        model=MODEL_DETAILS,
        maps=tuples(TEXTS),
        changes=tuples(TEXTS),
        partitions=COUNTS,
        rows=COUNTS,
        rejected_rows=COUNTS,
        supersedes=st.dictionaries(st.integers(0, 9), tuples(TEXTS), max_size=3),
        rescore_all=st.booleans(),
        quarantined_files=tuples(QUARANTINED),
        repaired_files=tuples(TEXTS),
        epoch=st.integers(1, 99),
        created=TEXTS,
    )
)
def test_round_records(record: RoundRecord) -> None:
    assert RoundRecord.from_json(record.to_json_bytes(), where="") == record


@pytest.mark.fault(56)
@given(
    st.builds(
        Manifest,
        number=st.integers(1, 99),
        job=TEXTS,
        plan=TEXTS,
        model=MODELS,
        schema=TEXTS,
        files=tuples(FILES),
        rejects=tuples(FILES),
        rows=ROWS,
        created=TEXTS,
        reasons=st.dictionaries(TEXTS, COUNTS, max_size=3),
        round=st.integers(0, 9),
        models=st.dictionaries(st.integers(0, 9), MODELS, max_size=3),
        quarantined_files=tuples(TEXTS),
    )
)
def test_manifests(manifest: Manifest) -> None:
    again = Manifest.from_json(manifest.to_json_bytes())
    assert again == manifest
    assert again.is_same_output(manifest)


@pytest.mark.fault(56)
@given(
    st.builds(
        JobRecord,
        job=TEXTS,
        name=TEXTS,
        created=TEXTS,
        plan=TEXTS,
        spec=TEXTS,
        model=MODEL_DETAILS,
        rows=COUNTS,
        partitions=COUNTS,
        sink=TEXTS,
        working_directory=TEXTS,
        import_paths=tuples(TEXTS),
        parent=TEXTS.filter(bool),
        publishes_itself=st.booleans(),
    )
)
def test_job_records(record: JobRecord) -> None:
    assert JobRecord.from_json(record.to_json_bytes(), where="") == record


@pytest.mark.fault(56)
@given(
    st.builds(
        FanOutCommit,
        number=st.integers(1, 99),
        job=TEXTS,
        rows=ROWS,
        children=tuples(st.builds(ChildCommit, TEXTS, st.integers(1, 9), ROWS.map(RowCounts.to_dict))),
        created=TEXTS,
    )
)
def test_commits_of_fan_outs(commit: FanOutCommit) -> None:
    assert FanOutCommit.from_json(commit.to_json_bytes(), where="") == commit


@pytest.mark.fault(56)
@given(
    st.builds(
        Holder,
        epoch=st.integers(1, 99),
        name=TEXTS,
        host=TEXTS,
        pid=COUNTS,
        process=TEXTS,
        started=TEXTS,
        lease_seconds=st.floats(0.1, 1e9),
        rounds=st.integers(0, 99),
    )
)
def test_lease_records(holder: Holder) -> None:
    assert Holder.from_json(holder.to_json_bytes()) == holder


@pytest.mark.fault(56)
@given(st.builds(CancelRequest, st.integers(1, 99), TEXTS, TEXTS, st.booleans(), TEXTS))
def test_requests_to_cancel(request: CancelRequest) -> None:
    assert CancelRequest.from_json(request.to_json_bytes(), epoch=request.epoch) == request
