"""Planning: columns, partitions, memory, and the messages of errors."""

from __future__ import annotations

import dataclasses
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.common.digest import digest_json
from pipeline.common.rows import InputFile, RowGroup
from pipeline.errors import InsufficientMemory, SchemaDrift, SpecError, StateCorrupt
from pipeline.models.model import Feature, ModelVersion
from pipeline.plan.columns import _check_feature
from pipeline.plan.describe import difference, plan_summary
from pipeline.plan.memory import USABLE, row_memory, shared_memory
from pipeline.plan.plan import Limits, Plan
from pipeline.plan.planner import _matrix_features, dispatch_order, held_bytes, make_plan
from pipeline.plan.recipe import KeyedRecipe, ScoreRecipe
from pipeline.plan.table import plan_from_table, plan_to_table
from pipeline.sources import Discovery, discover
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.parts import Source

GIB = 1 << 30
LIMITS = Limits(workers=2, threads=1, memory=2 * GIB)
PREDICTIONS = pa.schema([("prediction", pa.float32())])
SCHEMA = pa.schema(
    [("id", pa.string()), ("x", pa.float32()), ("y", pa.float64()), ("n", pa.int64()), ("k", pa.int64())]
)


def model(*features: Feature | str, **changes) -> ModelVersion:
    made = tuple(Feature(one) if isinstance(one, str) else one for one in features)
    version = ModelVersion("churn", "3", "m.ubj", "d" * 64, "xgboost", 10_000, made, "binary", 1)
    return dataclasses.replace(version, **changes)


def spec(*, source=None, maps=(), score=None, **others) -> JobSpec:
    steps = [*({"map": name} for name in maps), {"score": {"model": "m.ubj", **(score or {})}}]
    return JobSpec.model_validate(
        {"name": "j", "source": {"path": "/in", **(source or {})}, "steps": steps, "sink": {"path": "/out"}, **others}
    )


def files(*sizes: int | list[int], width: int = 10) -> tuple[InputFile, ...]:
    """Files with these row groups; an int stands for a single one."""
    groups = [[size] if isinstance(size, int) else size for size in sizes]
    return tuple(
        InputFile(
            f"/in/{number:04d}.parquet", 1, f"mtime:{number}",
            tuple(RowGroup(rows, rows * width, rows * width // 2) for rows in of_file), (("k", str(number)),),
        )
        for number, of_file in enumerate(groups)
    )  # fmt: skip


def discovery(found=None, *, schema: pa.Schema = SCHEMA, keys=("k",), available=None) -> Discovery:
    found = files([1000, 2000], 500) if found is None else found
    return Discovery(found, schema, keys, available or tuple(schema.names))


def plan(job=None, *, version=None, found=None, frame=None, predictions=PREDICTIONS, limits=LIMITS, **options) -> Plan:
    found = found or discovery()
    return make_plan(
        job or spec(),
        model=version or model("x", "y"),
        discovery=found,
        frame_schemas=() if frame is None else (frame,),
        predictions=predictions,
        limits=limits,
        **options,
    )


def test_ids_are_in_source_order_and_wide_enough(tmp_path):
    made = plan(found=discovery(files([4096] * 40)), limits=Limits(5, 2, 2 * GIB))
    assert [one.id for one in made.partitions] == [f"{n:05d}" for n in range(40)]
    many = plan(found=discovery(files(*[[1]] * 100_001)), target_bytes=10)
    assert (many.partitions[0].id, many.partitions[-1].id) == ("000000", "100000")


def test_a_plan_does_not_depend_on_the_order_of_the_listing(tmp_path, monkeypatch):
    for number in range(6):
        pq.write_table(pa.table({"x": [1.0] * (number + 1), "y": [2.0] * (number + 1)}), tmp_path / f"{number}.parquet")
    source = Source(path=str(tmp_path))
    digest = plan(found=discover(source)).digest
    listed = tuple(f"{tmp_path}/{number}.parquet" for number in range(6))
    for seed in range(3):
        shuffled = random.Random(seed).sample(listed, len(listed))
        assert plan(found=discover(Source(path=tuple(shuffled)))).digest == digest


# ---- columns


def test_without_steps_only_what_is_needed_is_read_and_all_is_kept_by_default():
    made = plan()
    assert made.source_columns == ("id", "x", "y", "n")
    assert (made.keep, made.outputs) == (("id", "x", "y", "n", "k"), ("prediction",))
    output = pa.ipc.read_schema(pa.py_buffer(made.output_schema))
    assert output == pa.schema([*SCHEMA, *PREDICTIONS])


def test_keep_and_features_and_filter_and_contract_decide_what_is_read():
    job = spec(source={"filter": "n > 3"}, score={"keep": ("k", "id")}, contract={"id": {"nullable": False}})
    made = plan(job, version=model("y"))
    assert made.source_columns == ("id", "y", "n")
    assert pa.ipc.read_schema(pa.py_buffer(made.source_schema)).names == ["id", "y", "n", "k"]
    assert pa.ipc.read_schema(pa.py_buffer(made.output_schema)).names == ["k", "id", "prediction"]


def test_keep_may_be_empty_and_a_key_may_be_a_feature():
    made = plan(spec(score={"keep": ()}), version=model("x", "k"))
    assert (made.source_columns, made.keep, made.features) == (("x",), (), ("x", "k"))


def test_source_columns_bound_what_is_kept():
    job = spec(source={"columns": ("x", "y"), "filter": "n > 3"})
    found = discovery(schema=pa.schema([SCHEMA.field(name) for name in ("x", "y", "n", "k")]), available=SCHEMA.names)
    made = plan(job, found=found)
    assert (made.source_columns, made.keep) == (("x", "y", "n"), ("x", "y"))
    for wrong in (spec(source={"columns": ("x",)}, score={"keep": ("id",)}), spec(contract={"id": {"min": "a"}})):
        with pytest.raises(SpecError, match=r"source\.columns leaves out"):
            plan(wrong, found=found)


def test_with_steps_all_is_read_and_features_come_from_the_frame():
    frame = pa.schema([("id", pa.string()), ("x", pa.float64()), ("made", pa.float32())])
    made = plan(spec(maps=("m:f",)), version=model("x", "made"), frame=frame)
    assert made.source_columns == ("id", "x", "y", "n")
    assert made.keep == ("id", "x")
    assert pa.ipc.read_schema(pa.py_buffer(made.output_schema)).field("x").type == pa.float64()


def test_features_of_the_spec_are_by_position():
    made = plan(spec(score={"features": ("n", "y")}), version=model("a", "b"))
    assert made.features == ("n", "y")


@pytest.mark.parametrize(
    ("features", "given", "words"),
    [
        (("a", "b"), ("x",), "another number of columns"),
        (("x", "y"), ("y", "x"), "another order"),
        ((), None, "does not tell which columns"),
        (("f0", "f1"), None, "without column names"),
    ],
)
def test_features_that_do_not_fit_the_model(features, given, words):
    with pytest.raises(SpecError, match=words) as caught:
        plan(spec(score={"features": given} if given else None), version=model(*features))
    assert caught.value.next_step


def test_a_missing_feature_names_the_nearest_column_and_a_file():
    with pytest.raises(SchemaDrift, match="no column 'idd'") as caught:
        plan(version=model("idd"))
    assert "did you mean id?" in caught.value.next_step
    assert caught.value.where == "/in/0000.parquet"
    with pytest.raises(SchemaDrift, match="what the map steps return has no column 'y'"):
        plan(spec(maps=("m:f",)), frame=pa.schema([("x", pa.float32())]))


CATEGORY = Feature("c", "category", ("a", "b"))
CODES = Feature("c", "category", (3, 5))
UNKNOWN = Feature("c", "category")


@pytest.mark.parametrize(
    ("feature", "arrow_type", "fits"),
    [
        (Feature("c"), pa.float16(), True),
        (Feature("c"), pa.uint8(), True),
        (Feature("c"), pa.bool_(), True),
        (Feature("c"), pa.decimal128(9, 2), True),
        (Feature("c"), pa.null(), True),
        (Feature("c"), pa.string(), False),
        (Feature("c"), pa.timestamp("us"), False),
        (Feature("c"), pa.list_(pa.float32()), False),
        (Feature("c", "indicator"), pa.bool_(), True),
        (Feature("c", "integer"), pa.string(), False),
        (CATEGORY, pa.string(), True),
        (CATEGORY, pa.large_string(), True),
        (CATEGORY, pa.dictionary(pa.int8(), pa.string()), True),
        (CATEGORY, pa.int64(), False),
        (CODES, pa.int32(), True),
        (CODES, pa.dictionary(pa.int8(), pa.int64()), True),
        (CODES, pa.string(), False),
        (UNKNOWN, pa.int8(), True),
        (UNKNOWN, pa.string(), False),
        (UNKNOWN, pa.dictionary(pa.int8(), pa.string()), False),
    ],
)
def test_types_that_a_feature_takes(feature, arrow_type, fits):
    found = discovery(schema=pa.schema([("c", arrow_type)]), keys=())
    if fits:
        assert plan(version=model(feature), found=found).features == ("c",)
        return
    with pytest.raises(SchemaDrift, match="cannot take") as caught:
        plan(version=model(feature), found=found)
    assert "'c'" in caught.value.found
    assert str(arrow_type) in caught.value.found
    assert caught.value.expected


@pytest.mark.parametrize(("path", "is_text"), [("in/a.csv", True), ("in/a.jsonl.gz", True), ("in/a.parquet", False)])
def test_types_of_a_text_file_can_be_said(path, is_text):
    with pytest.raises(SchemaDrift) as caught:
        _check_feature(Feature("c"), pa.field("c", pa.string()), path=path)
    assert ("source.types: {c: …}" in caught.value.next_step) is is_text


def test_an_output_that_has_the_name_of_a_kept_column():
    with pytest.raises(SpecError, match="name of a column that is kept") as caught:
        plan(predictions=pa.schema([("id", pa.float32())]))
    assert caught.value.found == "id"
    assert plan(spec(score={"keep": ("n",)}), predictions=pa.schema([("id", pa.float32())])).outputs == ("id",)


def test_names_that_rejected_rows_need():
    schema = pa.schema([("x", pa.float32()), ("_reason", pa.string())])
    with pytest.raises(SpecError, match="rejected rows need"):
        plan(version=model("x"), found=discovery(schema=schema, keys=()))
    assert plan(spec(score={"keep": ("x",)}), version=model("x"), found=discovery(schema=schema, keys=())).keep == (
        "x",
    )


def test_a_wrong_keep():
    with pytest.raises(SpecError, match="needed as a column to keep") as caught:
        plan(spec(score={"keep": ("idd",)}))
    assert "did you mean id?" in caught.value.next_step


# ---- the contract


def rules(made: Plan) -> tuple[dict, dict]:
    return shown(made.source_rules), shown(made.score_rules)


def shown(of) -> dict:
    """Return the checks of each rule, and whether it is nullable."""
    values = {rule.column: dataclasses.asdict(rule) for rule in of}
    return {
        column: {k: v for k, v in rule.items() if k != "column" and v is not None and v is not False}
        for column, rule in values.items()
    }


def test_contract_defaults_follow_the_model():
    schema = pa.schema([("x", pa.float32()), ("n", pa.int64()), ("c", pa.string())])
    made = plan(version=model("x", "n", CATEGORY), found=discovery(schema=schema, keys=()))
    assert rules(made) == (
        {},
        {"x": {"nullable": True, "finite": True}, "c": {"nullable": True, "allowed": ("a", "b")}},
    )


def test_the_spec_adds_to_it_and_overrides_it():
    contract = {"x": {"finite": False, "min": 0}, "y": {"max": 9.5, "nullable": False}, "id": {"allowed": ["p", "q"]}}
    assert rules(plan(spec(contract=contract))) == (
        {},
        {
            "x": {"nullable": True, "min": 0},
            "y": {"finite": True, "max": 9.5},
            "id": {"nullable": True, "allowed": ("p", "q")},
        },
    )


def test_with_steps_the_spec_is_checked_before_and_the_model_after_them():
    frame = pa.schema([("x", pa.float32()), ("made", pa.float32())])
    contract = {"x": {"min": 0}, "n": {"max": 5}, "made": {"max": 1}}
    made = plan(spec(maps=("m:f",), contract=contract), version=model("x", "made"), frame=frame)
    before, after = rules(made)
    assert before == {"x": {"nullable": True, "min": 0}, "n": {"nullable": True, "max": 5}}
    assert after == {"x": {"nullable": True, "finite": True}, "made": {"nullable": True, "finite": True, "max": 1}}


@pytest.mark.parametrize(
    ("contract", "error", "words"),
    [
        ({"idd": {"nullable": False}}, SpecError, "did you mean id"),
        ({"n": {"dtype": "int32"}}, SchemaDrift, "'n' of type int64"),
        ({"n": {"min": "a"}}, SpecError, r"contract\.n\.min"),
        ({"id": {"max": 3}}, SpecError, r"contract\.id\.max"),
        ({"id": {"allowed": [1]}}, SpecError, r"contract\.id\.allowed"),
        ({"id": {"finite": True}}, SpecError, "holds no numbers"),
    ],
)
def test_a_contract_that_cannot_hold(contract, error, words):
    with pytest.raises(error, match=words):
        plan(spec(contract=contract))


@pytest.mark.parametrize("name", ["int64", "string", "float32", "double"])
def test_a_dtype_that_holds_is_checked_once(name):
    column = {"int64": "n", "string": "id", "float32": "x", "double": "y"}[name]
    made = plan(spec(score={"keep": ("n",)}, contract={column: {"dtype": name}}), version=model("k"))
    assert rules(made) == ({}, {})


# ---- memory


def test_plan_that_does_not_fit_is_refused_with_both_numbers():
    made = plan()
    made.validate(LIMITS)
    made.validate(Limits(2, 1, 0))
    small = Limits(2, 4, 400 << 20)
    with pytest.raises(InsufficientMemory) as caught:
        made.validate(small)
    assert made.worker_memory(small) > USABLE * small.memory
    assert "400 MiB" in caught.value.expected
    assert "needed" in caught.value.found
    assert "fewer threads" in caught.value.next_step


def test_memory_grows_with_the_batch_and_the_model_but_not_with_the_input():
    small = plan(found=discovery(files([1_000_000] * 20)))
    large = plan(found=discovery(files(*[[1_000_000] * 30] * 50)))
    assert large.task_memory == small.task_memory
    heavier = plan(found=discovery(files([1_000_000] * 20)), version=model("x", "y", nbytes=10**8))
    assert heavier.task_memory - small.task_memory == shared_memory(10**8) - shared_memory(10_000)


def test_memory_has_room_for_the_tree_engine_where_it_may_start():
    found = discovery(files([1_000_000] * 20))
    made = [plan(found=found, version=model("x", "y", trees=300, objective=name)) for name in ("reg:linear", "none")]
    assert [one.can_use_tree_engine for one in made] == [True, False]
    engine = shared_memory(made[0].model.nbytes, engine=True) - shared_memory(made[0].model.nbytes)
    assert made[0].task_memory - made[1].task_memory == engine
    few = Limits(workers=1, threads=3, memory=8 << 30)
    assert made[0].worker_memory(few) - made[1].worker_memory(few) == engine
    assert plan_from_table(plan_to_table(made[0])) == made[0]


def test_gpus_get_larger_batches_where_host_memory_holds_them():
    found = discovery(files([1_000_000] * 20))
    rows = {memory: plan(found=found, limits=Limits(2, 1, memory)).device_batch_rows for memory in (0, 16 * GIB)}
    assert rows == {0: 1 << 18, 16 * GIB: 1 << 18}
    small = Limits(2, 1, 452 << 20)
    made = plan(found=found, limits=small)
    assert made.batch_rows < made.device_batch_rows < 1 << 18
    made.validate(small)
    more = (made.device_batch_rows - made.batch_rows) * row_memory(row_bytes_in=16, row_bytes_out=20, features=2)
    assert made.worker_memory(small) + more <= USABLE * small.memory
    assert plan_from_table(plan_to_table(made)).device_batch_rows == made.device_batch_rows
    assert made.recipe(job="j", directory="d").device_batch_rows == made.device_batch_rows


def test_a_wide_table_gets_smaller_batches_and_row_groups():
    names = [f"c{n}" for n in range(2000)]
    wide = discovery(files([50_000], width=16_000), schema=pa.schema([(n, pa.float64()) for n in names]), keys=())
    made = plan(version=model(*names), found=wide, limits=Limits(1, 1, 16 * GIB))
    assert made.batch_rows < plan().batch_rows
    assert made.row_group_rows == made.batch_rows, "a row group is a batch at least"
    assert made.row_group_bytes == 64 << 20
    assert plan_from_table(plan_to_table(made)).row_group_bytes == made.row_group_bytes
    made.validate(Limits(1, 1, 16 * GIB))


# ---- digests, storing, showing


def test_rows_of_pruned_row_groups_are_counted():
    groups = (RowGroup(10, 10, 1), RowGroup(7, 7, 1, selected=False))
    made = plan(found=discovery((InputFile("/a", 1, "v", groups),)))
    assert (made.rows, made.pruned_rows, sum(one.rows for one in made.partitions)) == (17, 7, 10)


def test_zero_rows_make_a_plan_without_partitions():
    made = plan(found=discovery(files(0)))
    assert (made.rows, made.partitions) == (0, ())
    made.validate(LIMITS)
    details = plan_summary(made, LIMITS).to_dict()
    assert (details["partitions"], details["skew"]) == (0, {"before": 1.0, "after": 1.0})
    assert plan_from_table(plan_to_table(made)) == made


def test_the_digest_is_of_content():
    base = plan()
    assert plan().digest == base.digest
    assert len(base.digest) == 64
    changed = [
        plan(spec(errors={"max_fraction": 0.1})),
        plan(version=model("x", "y", digest="e" * 64)),
        plan(found=discovery(files([1000, 2000], 501))),
        plan(spec(score={"keep": ("id",)})),
    ]
    assert len({one.work_digest for one in [base, *changed]}) == 5
    assert plan(spec(cluster="elsewhere")).digest == base.digest
    assert plan(version=model("x", "y", uri="/elsewhere/m.ubj")).digest == base.digest


def test_another_cluster_cuts_otherwise_but_the_work_is_the_same():
    found = discovery(files([40_000] * 10))
    one, other = plan(found=found), plan(found=found, limits=Limits(8, 4, 64 * GIB))
    assert one.digest != other.digest
    assert one.work_digest == other.work_digest
    assert difference(one, other) == [f"how rows are cut: {len(one.partitions)} -> {len(other.partitions)} partitions"]
    smaller = plan(found=found, limits=Limits(2, 1, 16 << 20))
    assert smaller.batch_rows < one.batch_rows
    assert smaller.digest == one.digest


def test_a_plan_is_stored_without_loss(tmp_path):
    groups = (RowGroup(10, 10, 1), RowGroup(7, 7, 1, selected=False), RowGroup(0, 0, 0))
    strange = (*files([50_000, 60_000], 20), InputFile("/z/ü x", 3, "", groups, (("k", "a=b"), ("ü", "/"))), *files())
    contract = {"n": {"allowed": [1, 2], "min": 0}, "id": {"max": "z"}}
    schema = pa.schema([*SCHEMA, ("c", pa.string()), ("g", pa.int8())])
    version = model("x", CATEGORY, Feature("g", "category", (1, 2)), trees=7, objective="o")
    job = spec(contract=contract, source={"path": ("/a", "/b"), "filter": "n > 1"}, score={"keep": ("id", "k")})
    made = plan(job, found=discovery(strange, schema=schema), version=version)
    pq.write_table(plan_to_table(made), tmp_path / "plan.parquet")
    again = plan_from_table(pq.read_table(tmp_path / "plan.parquet"))
    assert again == made
    assert again.digest == made.digest
    for name in ("spec", "model", "source_rules", "partitions"):
        assert repr(getattr(again, name)) == repr(getattr(made, name))


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.lists(st.integers(0, 60_000), max_size=5), min_size=1, max_size=8), threads=st.integers(1, 8))
def test_any_plan_is_stored_without_loss(sizes, threads):
    made = plan(found=discovery(files(*sizes)), limits=Limits(threads, 1, GIB))
    assert plan_from_table(plan_to_table(made)) == made


def test_another_table_is_no_plan():
    for table in (pa.table({"a": [1]}), plan_to_table(plan()).drop_columns(["ranges"])):
        with pytest.raises(StateCorrupt):
            plan_from_table(table)


def test_recipe_follows_the_plan():
    made = plan(spec(source={"filter": "n > 1"}, maps=("m:f",), sink={"path": "/out", "compression": "zstd"}))
    recipe = made.recipe(job="j-1", directory="/jobs/j-1", fsync=False, import_paths=["/code"])
    assert (recipe.job, recipe.plan, recipe.directory, recipe.round) == ("j-1", made.digest, "/jobs/j-1", 0)
    assert (recipe.columns, recipe.filter, recipe.schema) == (made.source_columns, "n > 1", made.source_schema)
    assert (recipe.maps[0].entrypoint, recipe.compression, recipe.fsync) == ("m:f", "zstd", False)
    assert (recipe.scores[0].features, recipe.scores[0].outputs, recipe.scores[0].rules) == (
        made.features,
        made.outputs,
        made.score_rules,
    )
    assert (recipe.batch_rows, recipe.import_paths) == (made.batch_rows, ("/code",))
    assert len(recipe.digest) == 64


def test_versions_are_what_workers_check():
    assert plan().versions["/in/0000.parquet"] == (1, "mtime:0")


def test_the_summary_is_json_and_has_what_the_command_line_shows():
    made = plan(found=discovery(files(900_000, *[10_000] * 10)))
    details = plan_summary(made, LIMITS).to_dict()
    assert json.loads(json.dumps(details)) == details
    assert (details["rows"], details["partitions"], details["files"]) == (1_000_000, len(made.partitions), 11)
    assert details["skew"]["before"] == pytest.approx(9.9)
    assert details["skew"]["after"] < 1.5
    assert details["memory"] == {
        "task": made.task_memory,
        "worker": made.worker_memory(LIMITS),
        "limit": LIMITS.memory,
    }
    assert details["model"]["digest"] == "d" * 64
    assert details["output"]["path"] == "/out"
    assert details["output"]["columns"][-1] == "prediction"
    assert details["output"]["bytes"] == made.row_bytes_out * 1_000_000
    assert details["bytes"] == 10_000_000


def test_largest_first_and_nothing_twice():
    made = plan(found=discovery(files(10_000, 4096, 20_000, 4096)), limits=Limits(1, 1, GIB))
    order = dispatch_order(made.partitions)
    assert [one.rows for one in order] == sorted((one.rows for one in made.partitions), reverse=True)
    assert {one.id for one in order} == {one.id for one in made.partitions}
    done = {order[0].id}
    assert dispatch_order(made.partitions, done=done) == order[1:]
    assert dispatch_order(tuple(reversed(made.partitions))) == order


def test_differences_are_described_in_words():
    base = plan()
    assert difference(base, plan()) == []
    assert difference(base, plan(spec(sink={"path": "/out", "mode": "append"}))) == ["sink.mode: default -> append"]
    (text,) = difference(base, plan(version=model("x", "y", digest="e" * 64)))
    assert text == f"model churn: sha256 {'d' * 12} -> {'e' * 12}"
    found = dataclasses.replace(base.files[0], version="mtime:9"), base.files[1], *files(1, 1, 5)[2:]
    told = difference(base, plan(found=discovery(found)))
    assert told == ["file changed: /in/0000.parquet", "file new: /in/0002.parquet"]
    assert "columns of the output, or their types" in difference(base, plan(spec(score={"keep": ("id",)})))


def test_digests_do_not_need_dataclass_helpers():
    """The canonical form of a rule is the same from a stored plan."""
    made = plan(spec(contract={"n": {"allowed": [1, 2]}}))
    again = plan_from_table(plan_to_table(made))
    assert digest_json(made.score_rules) == digest_json(again.score_rules)


def test_memory_counts_the_matrices_that_a_batch_holds_at_a_time():
    def chain(*features):
        return [ScoreRecipe(model("a"), one, "prediction", (f"p{n}",)) for n, one in enumerate(features)]

    short, wide = ("x",), ("x", "y", "z")
    assert _matrix_features(chain(short)) == 1
    assert _matrix_features(chain(short, wide)) == 3
    assert _matrix_features(chain(wide, wide)) == 3
    assert _matrix_features(chain(short, wide, short)) == 1 + 3


def test_memory_counts_the_process_of_each_task_whose_steps_have_time_limits():
    limited = JobSpec.model_validate(
        {**spec(maps=["m:f"]).to_dict(), "steps": [{"map": "m:f", "timeout": 9}, {"score": {"model": "m.ubj"}}]}
    )
    frame, version = pa.schema([("x", pa.float64()), ("y", pa.float64())]), model("x", "y")
    plain, made = (plan(job, version=version, frame=frame) for job in (spec(maps=["m:f"]), limited))
    assert made.task_memory - plain.task_memory == shared_memory(version.nbytes)


def test_models_by_key_share_a_part_of_the_memory():
    def member(number, nbytes):
        return ScoreRecipe(model("a", digest=f"{number:064d}", nbytes=nbytes), ("x",), "prediction", ("p",))

    held, keyed = member(0, 1000), KeyedRecipe("k", ("a", "b"), (member(1, 3000), member(2, 5000)))
    assert held_bytes([held, keyed], memory=0) == 9000
    assert held_bytes([held, keyed], memory=10 * 7000 * 5) == 1000 + 7000
    assert held_bytes([held, keyed], memory=1) == 1000 + 5000  # the largest one must fit
    assert held_bytes([held, held], memory=1) == 1000
