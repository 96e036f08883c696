"""The emitted script: run by torchrun, and its shards compared with the plan's."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from codegen.script import emit_torchrec
from ir.constraints import SHARDING_TYPES
from ir.errors import InputError
from ir.plan import Plan
from tests.plans import Decision, Table, make_plan

MODEL = """
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.bags = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name=f"t{i}", num_embeddings=40 + 7 * i, embedding_dim=16, feature_names=[f"f_t{i}"])
                for i in range(7)
            ],
            device=torch.get_default_device(),
        )
        self.bottom = nn.Linear(5, 5)
        self.top = nn.Sequential(nn.Linear(7 * 16 + 5, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, ids, dense):
        pooled = self.inner.bags(ids)
        return self.top(torch.cat([self.bottom(dense), *(pooled[f"f_t{i}"] for i in range(7))], dim=1))


def build():
    return Tower()
"""
TABLES = [Table(f"t{i}", 40 + 7 * i, 16, module="elsewhere") for i in range(7)]
PLACES = {"column_wise": (1, 0), "table_column_wise": (1, 0), "table_wise": (1,), "grid_shard": (0, 0)}


def seven_types(host_size: int = 2, hosts: int = 1) -> Plan:
    decisions = {
        t.name: Decision(k, PLACES.get(k, (0,))) for t, k in zip(TABLES, SHARDING_TYPES, strict=True)
    }
    return make_plan(TABLES, decisions, hosts, host_size, optimizer="rowwise_adagrad", batch=64)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "tower.py"
    path.write_text(MODEL)
    return path


def test_runs_under_torchrun_and_learns(model_file: Path) -> None:
    script = model_file.with_name("train.py")
    script.write_text(emit_torchrec(seven_types(), f"{model_file}:build"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), "--steps", "31", "--lr", "0.1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        cwd=model_file.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(line.split()[3]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(losses) == 4
    assert all(0.0 < loss < 5.0 for loss in losses)
    alone = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert alone.returncode == 1
    assert "the plan is for 2 ranks, 2 a host; torchrun started 1" in alone.stderr


@pytest.mark.parametrize(("hosts", "host_size"), [(1, 2), (2, 2), (1, 4)])
def test_the_script_shards_as_the_plan_says(hosts: int, host_size: int, model_file: Path) -> None:
    import torch

    plan = seven_types(host_size, hosts)
    script = model_file.with_name("train.py")
    script.write_text(emit_torchrec(plan, f"{model_file}:build"))
    decided = runpy.run_path(str(script))["sharding_plan"](torch.device("cpu")).plan
    assert list(decided) == ["inner.bags"]
    for table in plan.table_plans:
        found = decided["inner.bags"][table.name]
        assert (found.sharding_type, found.compute_kernel) == (table.sharding_type, table.compute_kernel)
        if table.sharding_type == "data_parallel":
            assert found.sharding_spec is None
            continue
        shards = [(s.placement.rank(), *s.shard_offsets, *s.shard_sizes) for s in found.sharding_spec.shards]
        assert shards == [(s.rank, s.row, s.col, s.rows, s.cols) for s in table.shards]
        assert found.ranks == [s.rank for s in table.shards]


def test_text(model_file: Path) -> None:
    text = emit_torchrec(seven_types(), f"{model_file}:build")
    assert text == emit_torchrec(seven_types(), f"{model_file}:build")
    ast.parse(text)
    assert "inputs = ids, dense\n" in text
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert "YOUR DATA" in text
    assert max(len(line) for line in text.splitlines()) < 160


def test_narrow_vectors_are_in_the_script_and_what_it_leaves_out_is_said(model_file: Path) -> None:
    from dataclasses import replace

    from codegen.script import script_limits
    from ir.dedup import DedupGroup, DedupPlan

    plan = seven_types()
    assert "CODECS" not in emit_torchrec(plan, f"{model_file}:build")
    assert script_limits(plan) == ()
    narrow = replace(plan, workload=replace(plan.workload, exchange_dtype="bf16"))
    script = model_file.with_name("train.py")
    script.write_text(emit_torchrec(narrow, f"{model_file}:build"))
    made = runpy.run_path(str(script))
    codec = made["CODECS"]["POOLED_EMBEDDINGS_REDUCE_SCATTER"]
    assert [str(one.quantized_dtype) for one in (codec.forward, codec.backward)] == ["torch.bfloat16"] * 2
    group = DedupGroup(("f_t0",), 2.0, 9.0, 1.0, 1.0, 0.5, True, "")
    fewer = replace(plan, decisions=replace(plan.decisions, dedup=DedupPlan(2.0, (group,))))
    assert ["deduplicator" in limit for limit in script_limits(fewer)] == [True]


def test_refusals(model_file: Path) -> None:
    with pytest.raises(InputError, match=r"has no 'bulid' .did you mean 'build'"):
        emit_torchrec(seven_types(), f"{model_file}:bulid")
    with pytest.raises(InputError, match="does not exist"):
        emit_torchrec(seven_types(), "nowhere.py:build")
    tables = [*TABLES[:-1], Table("t6", 83, 16)]
    other = make_plan(tables, {t.name: Decision("row_wise") for t in tables}, 1, 2)
    with pytest.raises(InputError, match="'t6' is 83 x 16 in the plan but 82 x 16"):
        emit_torchrec(other, f"{model_file}:build")
