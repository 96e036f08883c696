"""The plan file: round trip, identical bytes, refusal of damage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import planner
from ir.errors import InputError
from ir.program import Model
from ir.reading import adapter, digest
from ir.workload import Workload

ROOT = Path(__file__).resolve().parent.parent


def test_save_and_load_give_the_same_plan(tmp_path: Path, model: Model, workload: Workload) -> None:
    plan = planner.compile(model, "h100-2x4", workload)
    file = tmp_path / "plan.json"
    plan.save(file)
    again = planner.Plan.load(file)
    assert again == plan
    assert again.digest == plan.digest
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]  # no temporary left behind


def test_two_runs_in_two_processes_give_identical_bytes(tmp_path: Path) -> None:
    tables = {
        "name": "set",
        "tables": [
            {"name": f"t{i}", "rows": 1000 * (i * 7 % 13 + 1), "dim": 64, "pooling_factor": i % 5 + 1}
            for i in range(40)
        ],
    }
    (tmp_path / "tables.json").write_text(json.dumps(tables))
    texts = []
    for seed in ("0", "1"):  # of Python's own hashing, which must not matter
        output = tmp_path / f"plan{seed}.json"
        subprocess.run(
            [
                sys.executable,
                "-m",
                "planner",
                "compile",
                str(tmp_path / "tables.json"),
                "-t",
                "h100-4x8",
                "-o",
                str(output),
            ],
            cwd=ROOT,
            check=True,
            capture_output=True,
            timeout=120,
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        )
        texts.append(output.read_bytes())
    assert texts[0] == texts[1]


def test_a_plan_holds_no_wall_clock_times_or_paths(model: Model, workload: Workload) -> None:
    text = planner.compile(model, "h100-1x8", workload).to_json()
    assert str(ROOT) not in text
    assert not any(word in text for word in ("hostname", "wall", "elapsed", "/home", "/tmp"))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(format_version="9.0"), "format_version 9.0, this planner reads"),
        (lambda d: d["table_plans"][0].update(rows=5), "does not match its digest"),
        (lambda d: d["table_plans"][0].pop("dim"), "table_plans.0.dim: missing"),
        (lambda d: d.pop("certificate"), "certificate: missing"),
        (lambda d: d["memory"][0].update(rank=-1), "memory.0.rank"),
    ],
)
def test_damaged_plans_are_refused(edit, message: str, model: Model, workload: Workload) -> None:  # type: ignore[no-untyped-def]
    data = json.loads(planner.compile(model, "h100-1x4", workload).to_json())
    edit(data)
    with pytest.raises(InputError, match=message):
        planner.Plan.from_dict(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON.*line 1"),
        ("[1, 2]", "must be a mapping"),
        ('{"a": NaN}', "NaN"),
        ('{"a": 1, "a": 2}', "key 'a' twice"),
        ("[" * 100_000, "nested too deeply|not JSON"),
    ],
)
def test_files_that_are_no_plan(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        planner.Plan.load(file)


def test_saving_into_a_missing_folder_writes_nothing(
    tmp_path: Path, model: Model, workload: Workload
) -> None:
    plan = planner.compile(model, "h100-1x4", workload)
    with pytest.raises(InputError, match="cannot write"):
        plan.save(tmp_path / "no" / "plan.json")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_written_before_fields_existed_keeps_its_digest() -> None:
    """As an older writer would, without the fields that have a default, alone and all at once."""
    plan = planner.compile("dlrm-small", "local-2")
    whole = plan.to_dict()
    assert whole["warnings"] == []
    bare = adapter(planner.Plan).dump_python(plan, mode="json", exclude_defaults=True)
    bare |= {"format_version": whole["format_version"], "digest": whole["digest"]}
    assert len(json.dumps(bare)) < 0.95 * len(json.dumps(whole))
    for old in ({k: v for k, v in whole.items() if k != "warnings"}, bare):
        again = planner.Plan.from_dict(old)
        assert again == plan
        assert again.digest == old["digest"]
        for edit in ({"mode": "inference"}, {"warnings": ["new"]}, {"constraints": {"memory_reserve": 0.2}}):
            with pytest.raises(InputError, match="does not match its digest"):
                planner.Plan.from_dict({**old, **edit})


def test_digests_over_the_whole_text_are_still_read() -> None:
    """So planners before took them."""
    data = planner.compile("dlrm-small", "local-2").to_dict()
    data.pop("digest")
    old = {**data, "digest": digest(data)}
    assert planner.Plan.from_dict(old).model.name == "dlrm-small"
    with pytest.raises(InputError, match="does not match its digest"):
        planner.Plan.from_dict({**old, "mode": "inference"})
