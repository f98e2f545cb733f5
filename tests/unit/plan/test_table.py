"""Plans stored as tables: reading gives back the plan that was stored, in any order of partitions and rows."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.rows import Fragment, InputFile, QuarantinedFile, RowGroup
from pipeline.errors import PipelineError
from pipeline.plan import table as plan_table
from pipeline.plan.plan import Partition, Plan
from pipeline.plan.table import plan_bytes, plan_from_table, plan_to_table, read_plan
from pipeline.storage.store import open_store
from pipeline.testing.jobs import small_job

NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30)
"""Any text that UTF-8 can hold: quotes, line breaks, NUL, emoji."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan of three files, a partition each."""
    folder = tmp_path_factory.mktemp("plan")
    return small_job(folder / "in", sink=str(folder / "out")).plan


@st.composite
def input_files(draw: st.DrawFn) -> tuple[InputFile, ...]:
    """Input files and files of rejects, mixed, with row groups of any size."""
    paths = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    files = []
    for path in paths:
        groups = draw(
            st.lists(
                st.builds(RowGroup, st.integers(1, 9), st.integers(0, 99), st.integers(0, 99), st.booleans()),
                min_size=1,
                max_size=4,
            )
        )
        is_rejects = draw(st.booleans())
        name = f"rounds/0/rejects/{path}" if is_rejects else f"/in/{path}"
        keys = () if is_rejects else tuple(draw(st.lists(st.tuples(NAMES, NAMES), max_size=2)))
        files.append(InputFile(name, draw(st.integers(0, 1 << 62)), draw(NAMES), tuple(groups), keys))
    return tuple(files)


@st.composite
def plans(draw: st.DrawFn, base: Plan) -> Plan:
    """Plans whose partitions and ranges are in any order, whatever the order of the files."""
    files = draw(input_files())
    fragments = []
    for file in files:
        cuts = sorted(draw(st.sets(st.integers(0, file.rows), max_size=4)))
        for low, high in pairwise(cuts):
            rejected_from = draw(NAMES) if file.path.startswith("rounds/") else ""
            size = draw(st.integers(0, 1 << 40))
            fragments.append(
                Fragment(file.path, low, high, 0, len(file.row_groups), size, file.hive_keys, rejected_from)
            )
    shuffled = draw(st.permutations(fragments))
    edges = sorted({0, len(shuffled), *draw(st.sets(st.integers(0, len(shuffled)), max_size=5))})
    partitions = [tuple(shuffled[low:high]) for low, high in pairwise(edges)]
    quarantined = draw(st.lists(st.builds(QuarantinedFile, NAMES, NAMES, NAMES, st.none() | st.integers()), max_size=2))
    return replace(
        base,
        files=files,
        partitions=tuple(Partition(f"{number:05d}", parts) for number, parts in enumerate(partitions)),
        quarantined_files=tuple(quarantined),
    )


@pytest.mark.fault(56)
class TestRoundTrip:
    @given(data=st.data())
    def test_any_order_of_partitions_and_ranges_is_kept(self, base: Plan, data: st.DataObject) -> None:
        """A round's plan may list rejected rows first and its files in another order."""
        plan = data.draw(plans(base))
        stored = plan_from_table(plan_to_table(plan))
        assert stored == plan
        assert stored.digest == plan.digest

    def test_files_and_partitions_in_opposite_orders(self, base: Plan, tmp_path: Path) -> None:
        """The smallest such plan, through a file."""
        plan = replace(base, partitions=tuple(reversed(base.partitions)))
        store = open_store(tmp_path)
        store.replace("plan.parquet", plan_bytes(plan))
        assert read_plan(store) == plan

    def test_ranges_of_one_partition_in_another_order_than_files(self, base: Plan) -> None:
        """One partition reads the last file first."""
        parts = tuple(part for partition in reversed(base.partitions) for part in partition.fragments)
        plan = replace(base, partitions=(Partition("00000", parts),))
        assert plan_from_table(plan_to_table(plan)) == plan


@pytest.mark.fault(56)
class TestRefusal:
    def test_a_plan_that_would_be_read_back_differently_is_not_stored(
        self, base: Plan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever a later defect loses, no job directory holds a plan that cannot be read."""
        lossy = plan_table._partitions
        monkeypatch.setattr(plan_table, "_partitions", lambda table, files: tuple(reversed(lossy(table, files))))
        with pytest.raises(PipelineError, match="read back as another plan"):
            plan_bytes(base)

    def test_ordinals_with_a_gap_are_damage(self, base: Plan) -> None:
        """A table whose rows were dropped is no plan."""
        table = plan_to_table(base)
        with pytest.raises(PipelineError, match="damaged"):
            plan_from_table(table.slice(1))

    def test_plan_of_an_older_version_is_refused_by_its_version(self, base: Plan) -> None:
        """The error names both versions, so that nobody looks for damage."""
        table = plan_to_table(base)
        record = {**json.loads(table.schema.metadata[plan_table._METADATA]), "schema_version": 2}
        with pytest.raises(PipelineError) as caught:
            plan_from_table(table.replace_schema_metadata({plan_table._METADATA: json.dumps(record).encode()}))
        assert "schema_version 2" in str(caught.value.found)
        assert "schema_version 3" in str(caught.value.expected)
