"""An incremental job whose sink is in a bucket, where a folder cannot be swapped."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.spec.job_spec import JobSpec
from pipeline.testing.inline import plan_inline, publish_inline, score_inline
from pipeline.testing.oracle import make_table, oracle
from pipeline.testing.s3 import S3


def test_new_and_changed_files(s3: S3, tmp_path: Path, model_path: Path) -> None:
    lake, jobs, client = tmp_path / "lake", tmp_path / "jobs", s3.client()
    lake.mkdir()
    spec = JobSpec.build(
        name="inc",
        source={"path": str(lake), "incremental": True},
        steps=[{"score": {"model": str(model_path), "keep": ["id"]}}],
        sink={"path": s3.url("inc-out"), "mode": "append"},
    )

    def run(number: int) -> list[str]:
        plan = plan_inline(spec, directory=jobs)
        publish_inline(score_inline(plan, directory=jobs, job=f"inc-{number}"))
        return [file.reason.partition(" /")[0] for file in plan.files]

    def published() -> pa.Table:
        def get(name: str) -> bytes:
            return client.get_object(Bucket=s3.bucket, Key=f"inc-out/{name}")["Body"].read()

        state = json.loads(get("_manifest.json"))
        names = [file["name"] for one in state["publications"] for file in one["files"]]
        there = client.list_objects_v2(Bucket=s3.bucket, Prefix="inc-out/")["Contents"]
        assert sorted(f"inc-out/{name}" for name in names) == sorted(
            one["Key"] for one in there if one["Key"].endswith(".parquet")
        )
        return pa.concat_tables([pq.read_table(io.BytesIO(get(name))) for name in names]).sort_by("id")

    pq.write_table(make_table(30, seed=1), lake / "a.parquet")
    pq.write_table(make_table(20, seed=2, start=100), lake / "b.parquet")
    assert run(1) == ["new", "new"]
    pq.write_table(make_table(10, seed=3, start=200), lake / "c.parquet")
    assert run(2) == ["new"]
    assert run(3) == []
    pq.write_table(make_table(5, seed=4, start=300), lake / "a.parquet")
    assert run(4) == ["changed", "shares an output file with"]
    found, expected = published(), oracle(sorted(lake.iterdir()), model_path).sort_values("id")
    assert found["id"].to_pylist() == expected["id"].tolist()
    assert found["prediction"].to_pylist() == expected["prediction"].tolist()
