"""Checkpoints between runtimes: towers, codecs, formats, tiers and TorchRec, on other ranks, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from codegen.runtime.compare_rank import unsharded_model
from codegen.runtime.launch import launch
from ir.dense_plan import DensePlan, GroupTable, SparseReplicas
from ir.plan import Plan
from tests import composed_plans as plans
from tests.checkpoint_forms_rank import SIZE, kept, model
from tests.composition_ranks import batch

RANK = f"{Path(__file__).with_name('checkpoint_forms_rank.py')}:trainings"
Flat = dict[str, plans.Decision]
CODED: Flat = plans.FLAT_2 | {
    "d": plans.Decision("table_wise", (0,)),
    "c": plans.Decision("table_wise", (1,)),
}


def towers(optimizer: str) -> Plan:
    return plans.towered(plans.flat_plan(2, 2, plans.TOWERS_2X2, optimizer), "wukong")


def everything(optimizer: str) -> Plan:
    """Towers, dedup, codecs, formats of weights and state, and three tiers."""
    plan = plans.deduplicated(towers(optimizer), ("f_a", "f_c", "b1"), ("f_d", "f_g"))
    return plans.compressed(plans.formatted(plans.tiered(plan), plans.FORMATS, plans.STATES), plans.BOUNDED)


def run(ranks: int, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
    """Jobs on so many ranks; the answers of rank 0."""
    given = [{**job, "plan": job["plan"].to_dict(), "modules": job.get("modules", True)} for job in jobs]
    answers: list[dict[str, Any]] = launch(
        RANK, ranks, {"jobs": given}, host_size=jobs[0]["plan"].topology.host_size, timeout=240
    )[0]
    return answers


def assert_same(one: Path, other: Path) -> None:
    """Two checkpoints hold the same tensors, bit for bit."""
    first, second = kept(one), kept(other)
    assert set(first) == set(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("optimizer", ["adagrad", "rowwise_adagrad"])
def test_around_all_runtimes_and_back(optimizer: str, tmp_path: Path) -> None:
    """Towers on 2 x 2 ranks -> TorchRec on 2 -> codecs on 2 -> everything on 2 x 2 -> towers: as if undisturbed."""
    first, plain = towers(optimizer), plans.flat_plan(1, 2, plans.FLAT_2, optimizer)
    coded = plans.compressed(plans.flat_plan(1, 2, CODED, optimizer), plans.BOUNDED)
    at = {name: tmp_path / name for name in ("start", "end", "plain", "coded", "all", "back", "moved")}
    text = {name: str(folder) for name, folder in at.items()}
    run(4, {"plan": first, "until": 5, "save": {"3": [text["start"]], "5": [text["end"]]}})
    forms = run(
        2,
        {"plan": plain, "seed": 1, "load": text["start"], "copy": text["plain"]},
        {"plan": coded, "seed": 2, "load": text["plain"], "copy": text["coded"]},
        {"plan": plain, "seed": 3, "load": text["coded"], "until": 5, "save": {"5": [text["moved"]]}},
    )
    forms += run(
        4,
        {"plan": everything(optimizer), "seed": 4, "load": text["coded"], "copy": text["all"]}
        | {"how": {"storage": str(tmp_path / "tiers")}},
        {"plan": first, "seed": 5, "load": text["all"], "until": 5, "save": {"5": [text["back"]]}},
    )
    assert [one["form"] for one in forms] == ["torchrec", "coded", "torchrec", "composed", "towers"]
    assert forms[3]["step"] == 3  # the bounds of codecs go on decaying from there
    for name in ("plain", "coded", "all"):
        assert_same(at["start"], at[name])
    # they go on to the same place, up to the order of sums: DDP arranges its buckets anew after a first step
    end, start = kept(at["end"]), kept(at["start"])
    assert any(name.startswith("towers.1.") for name in end)
    assert any(name.startswith("optimizer/towers.1.") for name in end)
    for name in ("back", "moved"):
        found = kept(at[name])
        for key, value in end.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)
            assert not torch.equal(value, start[key]), key


def test_adam_and_a_split_dense_part(tmp_path: Path) -> None:
    """Steps are counted for each shard; the dense part is split over hosts, then over all ranks, then copied."""
    first = towers("adam")
    dense = DensePlan("hsdp", 2, 2, reshard_after_forward=False, units=(("bottom",), ("top",)))
    both = plans.with_decisions(everything("adam"), dense=dense)
    spread = plans.with_decisions(
        plans.compressed(towers("adam"), plans.BOUNDED), dense=DensePlan("fsdp", 4, 1, units=(("top",),))
    )
    at = {name: tmp_path / name for name in ("start", "end", "both", "spread", "back")}
    text = {name: str(folder) for name, folder in at.items()}
    rows = {"kernel": "rows"}
    run(
        4,
        {
            "plan": first,
            "until": 4,
            "save": {"2": [text["start"]], "4": [text["end"]]},
            "how": {"kernel": "dense"},
        },
        {"plan": both, "seed": 1, "load": text["start"], "copy": text["both"]}
        | {"how": rows | {"storage": str(tmp_path / "tiers")}},
        {"plan": spread, "seed": 2, "load": text["both"], "copy": text["spread"], "how": rows},
        {"plan": first, "seed": 3, "load": text["spread"], "until": 4, "save": {"4": [text["back"]]}}
        | {"how": {"kernel": "dense"}},
    )
    assert_same(at["start"], at["both"])
    assert_same(at["start"], at["spread"])
    end, back = kept(at["end"]), kept(at["back"])
    assert end["optimizer/ebc.embedding_bags.d.weight/step"] == 4
    for key, value in end.items():
        torch.testing.assert_close(back[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_groups_of_tables_are_saved_when_they_agree(tmp_path: Path) -> None:
    """Two groups of two ranks that average every second step go on as if undisturbed, and into one flat plan."""
    decided = plans.FLAT_2 | {"c": plans.Decision("row_wise")}
    flat = plans.flat_plan(1, 4, plans.FLAT_2, "rowwise_adagrad")
    found = {}
    for table in plans.flat_plan(1, 2, decided).table_plans:
        columns = tuple(
            dict.fromkeys((s.col, s.cols, 0 if s.rows < table.rows else s.rank) for s in table.shards)
        )
        found[table.name] = GroupTable(table.name, table.sharding_type, columns)
    tables = tuple(found[table.name] for table in flat.table_plans)
    plan = plans.with_decisions(
        flat, dense=DensePlan("ddp", 1, 4, sparse=SparseReplicas(2, 2, 0, 0, tables, ()))
    )
    at = {name: str(tmp_path / name) for name in ("start", "end", "back", "flat", "odd")}
    answers = run(
        4,
        {"plan": plan, "until": 4, "save": {"2": [at["start"]], "4": [at["end"]]}, "modules": False},
        {"plan": flat, "seed": 1, "load": at["start"], "copy": at["flat"], "modules": False},
        {
            "plan": plan,
            "seed": 2,
            "load": at["flat"],
            "until": 4,
            "save": {"4": [at["back"]]},
            "modules": False,
        },
        {"plan": plan, "until": 1, "save": {"1": [at["odd"]]}, "modules": False},
    )
    assert [one.get("refused", "")[:20] for one in answers[:3]] == ["", "", ""]
    assert_same(Path(at["start"]), Path(at["flat"]))
    end, back = kept(Path(at["end"])), kept(Path(at["back"]))
    for key, value in end.items():
        torch.testing.assert_close(back[key], value, rtol=1e-4, atol=1e-6, msg=key)
    assert "synchronised every 2 steps" in answers[3]["refused"]


def split(widths: dict[str, tuple[int, ...]], tiers: bool = False) -> Plan:
    """Two ranks; some tables split by columns under row-wise Adagrad, in TorchRec or with two tables in tiers."""
    flat = {name: plans.Decision("table_wise", (0,)) for name in plans.ROWS}
    for name, columns in widths.items():
        places = tuple(n % 2 for n in range(len(columns)))
        flat[name] = plans.Decision("column_wise", places, columns)
    made = plans.flat_plan(1, 2, flat, "rowwise_adagrad")
    return plans.tiered(made) if tiers else made


def expected(first: Plan, then: Plan) -> dict[str, torch.Tensor]:
    """Weights of the unsharded model after three steps with the states of one plan's blocks and two with another's.

    The states of a row are spread over its columns, and each new block takes the mean over its own.
    """
    module = model(False, 0)
    drawn, blocks = model(False, 0), []
    for plan, steps in ((first, range(3)), (then, range(3, 5))):
        trained = unsharded_model(plan, module, "rowwise_adagrad", 0.05, ("adagrad", 0.05), 1e-3)
        if blocks:
            tables, dense = trained.optimizers
            dense.load_state_dict(blocks[1])
            for group, (widths, states) in zip(tables.param_groups, blocks[0], strict=True):
                by_column = torch.cat([s.expand(-1, n) for s, n in zip(states, widths, strict=True)], dim=1)
                parts = by_column.split(group["widths"], dim=1)
                tables.state[group["params"][0]]["sum"] = [part.mean(1, keepdim=True) for part in parts]
        for step in steps:
            dense_input, ids, labels = batch(drawn, plan, SIZE, 1000 + step)
            trained.zero_grad()
            F.binary_cross_entropy_with_logits(trained(dense_input, ids), labels).backward()
            trained.step()
        tables, dense = trained.optimizers
        of_tables = [(g["widths"], tables.state[g["params"][0]]["sum"]) for g in tables.param_groups]
        blocks = [of_tables, dense.state_dict()]
    return {name: value.detach() for name, value in module.named_parameters()}


def test_states_of_column_blocks(tmp_path: Path) -> None:
    """Blocks inherit the state of the block they lie in; several become one only as a mean that is asked for."""
    halves = split({"b": (4, 4), "d": (4, 4)})
    finer = split({"b": (2, 2, 4), "d": (4, 2, 2), "g": (2, 6)}, tiers=True)
    joined = split({"b": (4, 4)})
    uneven = split({"b": (6, 2), "d": (4, 4)}, tiers=True)
    start, ends = str(tmp_path / "start"), [str(tmp_path / name) for name in ("finer", "joined", "uneven")]
    storage = [{"storage": str(tmp_path / f"tiers{n}"), "kernel": "rows"} for n in range(2)]
    again: dict[str, Any] = {"load": start, "until": 5, "modules": False}
    answers = run(
        2,
        {"plan": halves, "until": 3, "save": {"3": [start]}, "modules": False},
        {"plan": finer, "save": {"5": [ends[0]]}, "seed": 1, "how": storage[0], **again},
        {"plan": joined, "seed": 2, **again},
        {"plan": joined, "save": {"5": [ends[1]]}, "seed": 3, "momentum": "mean", **again},
        {"plan": uneven, "save": {"5": [ends[2]]}, "seed": 4, "momentum": "mean", "how": storage[1], **again},
    )
    assert "table 'd' was saved with row-wise Adagrad's states of columns 0-3, 4-7" in answers[2]["refused"]
    assert "momentum='mean'" in answers[2]["refused"]
    for folder, plan in zip(ends, (finer, joined, uneven), strict=True):
        found = kept(Path(folder))
        for name, value in expected(halves, plan).items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=f"{folder} {name}")
