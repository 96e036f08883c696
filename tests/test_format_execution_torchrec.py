"""Formats under TorchRec: DataTypes of trained and of served tables, GEMM formats inside a sharded model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torchrec")

from codegen.formats import apply_formats
from codegen.runtime.launch import launch
from codegen.torchrec_formats import quantized, set_formats
from ir.decisions import Decisions
from ir.errors import InputError
from ir.format_plan import FormatPlan, TensorFormat
from ir.plan import Plan
from planner.plan import Plan as FrontPlan
from tests.format_targets import inputs_of
from tests.plans import Decision, Table, make_plan
from tests.torchrec_models import Small

TARGET = f"{Path(__file__).with_name('format_targets.py')}:train"
TABLES = [Table("a", 60, 16), Table("b", 44, 8), Table("c", 30, 16)]
SAMPLES = 32


def declared() -> list[list[Any]]:
    return [[t.name, t.rows, t.dim, [f"f_{t.name}"], t.pooling, t.dtype] for t in TABLES]


def planned(tables: dict[str, str], dense: dict[str, str], mode: Any = "train") -> Plan:
    """A plan on two ranks with these formats."""
    kinds = {"a": Decision("table_wise", (0,)), "b": Decision("row_wise"), "c": Decision("table_wise", (1,))}
    plan = make_plan(TABLES, kinds, 1, 2, optimizer="sgd")
    chosen = [TensorFormat(name, "table", text, 1, 8, 0.0) for name, text in tables.items()]
    for name, text in dense.items():
        kind: Any = "weight" if name.endswith("weight") else "activation"
        chosen.append(TensorFormat(name, kind, text, 1, 8, 0.0))
    formats = FormatPlan("memory", 0, 0, 0, 0, 8, 0, 0, "test", tuple(chosen))
    return replace(
        plan,
        mode=mode,
        table_plans=tuple(replace(t, format=tables.get(t.name)) for t in plan.table_plans),
        decisions=Decisions(formats=formats),
    )


def test_a_sharded_model_trains_in_the_formats_of_its_plan() -> None:
    """fp16 tables and MX6 GEMMs on two ranks, against one process with the same roundings written out."""
    plan = planned({"a": "fp16", "b": "fp32"}, {"top.weight": "mx6", "top.input": "mx6"})
    ranks = launch(TARGET, 2, {"plan": plan.to_dict(), "tables": declared(), "samples": SAMPLES}, timeout=120)

    torch.manual_seed(0)
    model = Small(declared())
    with torch.no_grad():
        weight = model.ebc.embedding_bags["a"].weight
        weight.copy_(weight.half())
    apply_formats(model, {"top.weight": "mx6", "top.input": "mx6"}, training=True, inplace=True)
    dense, ids, label = inputs_of(declared(), SAMPLES)
    before = model(dense, ids)
    F.binary_cross_entropy_with_logits(before, label).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.5 * parameter.grad
        weight.copy_(weight.half())
        after = model(dense, ids)
    assert torch.allclose(torch.tensor([x for r in ranks for x in r["before"]]), before, atol=1e-6)
    # FBGEMM may round an fp16 weight up or down: one unit in the last place of values below 1, through MX6
    assert torch.allclose(torch.tensor([x for r in ranks for x in r["after"]]), after, atol=2e-3)
    assert (after - before).abs().max() > 0.1
    types = {name: kind for rank in ranks for name, kind in rank["types"].items()}
    assert types["ebc.embedding_bags.a.weight"] == "torch.float16"
    assert types["ebc.embedding_bags.b.weight"] == types["ebc.embedding_bags.c.weight"] == "torch.float32"


def test_what_torchrec_cannot_train_is_refused_before_anything_changes() -> None:
    from codegen.torchrec_check import collections_of

    model = Small(declared())
    for text, why in (("int8", "emulate it with plan.apply"), ("mx9", "emulate it"), ("bf16", "CUDA only")):
        plan = planned({"a": "fp16", "b": text}, {})
        with pytest.raises(InputError, match=why):
            set_formats(plan, model, collections_of(model), "cpu")
    assert model.ebc.embedding_bags["a"].weight.dtype == torch.float32


def test_served_tables_have_their_data_type() -> None:
    model = Small(declared())
    plan = planned({"a": "int4", "b": "int8:align=16"}, {}, mode="inference")
    made = quantized(plan, model)
    types = {config.name: config.data_type.name for config in made.ebc.embedding_bag_configs()}  # type: ignore[union-attr, operator]
    assert types == {"a": "INT4", "b": "INT8", "c": "FP32"}
    dense, ids, _ = inputs_of(declared(), SAMPLES)
    emulated = FrontPlan.from_dict(plan.to_dict()).apply(model)
    with torch.no_grad():
        assert torch.allclose(made(dense, ids), emulated(dense, ids), atol=1e-5)
        assert not torch.allclose(made(dense, ids), model(dense, ids), atol=1e-3)
    with pytest.raises(InputError, match="TorchRec serves"):
        quantized(planned({"a": "mx9"}, {}, mode="inference"), model)


def test_a_plan_without_formats_says_so() -> None:
    bare = make_plan(TABLES, {t.name: Decision("data_parallel") for t in TABLES}, 1, 2)
    with pytest.raises(InputError, match=r"constraints\.formats"):
        FrontPlan.from_dict(bare.to_dict()).apply(Small(declared()))
