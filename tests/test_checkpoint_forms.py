"""Checkpoints between runtimes: towers, codecs, formats, tiers and TorchRec, on other ranks, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from codegen.runtime.launch import launch
from ir.plan import Plan
from tests import composed_plans as plans
from tests.checkpoint_forms_rank import kept

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
