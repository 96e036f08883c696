"""The tower form against the flat model in one process: outputs, gradients, updates, on real gloo ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from codegen.runtime.launch import LaunchError, launch
from ir.decisions import Decisions
from ir.plan import Plan
from ir.towers import Tower, TowerDecision
from tests.plans import Decision, Table, make_plan

RANKS = str(Path(__file__).with_name("tower_ranks.py"))
TOLERANCE = 1e-6  # fp32: sums over ids in another order
DIM = 8

TABLES = [
    Table("a", 40, DIM, ("a1", "a2")),
    Table("b", 33, DIM),
    Table("c", 17, DIM, pooling="mean"),
    Table("d", 64, DIM),
]


def _plan(
    hosts: int, host_size: int, towers: list[list[int]], decisions: dict[str, Decision], tables: list[Table]
) -> Plan:
    """Table numbers by tower, in rank order; every tower a whole number of hosts."""
    plan = make_plan(tables, decisions, hosts, host_size)
    each = hosts * host_size // len(towers)
    made = []
    for number, members in enumerate(towers):
        chosen = [plan.table_plans[i] for i in members]
        features = tuple(f for t in chosen for f in t.features)
        width = sum(t.dim * len(t.features) for t in chosen)
        made.append(
            Tower(
                tables=tuple(t.name for t in chosen),
                features=features,
                first_rank=number * each,
                ranks=each,
                dim=chosen[0].dim,
                width=width,
                vectors_out=len(features),
                width_out=width,
            )
        )
    section = TowerDecision(True, "test", "coherent", "none", tuple(made))
    return replace(plan, decisions=Decisions(towers=section))


def _run(plan: Plan, tables: list[Table], sizes: list[int], **how: Any) -> dict[str, Any]:
    rows = [[t.name, t.rows, t.dim, list(t.features or (f"f_{t.name}",)), t.pooling] for t in tables]
    answers = launch(
        f"{RANKS}:compare",
        plan.world_size,
        {"plan": plan.to_dict(), "tables": rows, "sizes": sizes, **how},
        host_size=plan.topology.host_size,
        timeout=120,
    )
    errors: dict[str, float] = {}
    for answer in answers:
        for name, value in answer["errors"].items():
            errors[name] = max(errors.get(name, 0.0), value)
    assert answers[0]["before"] > 0
    return {"errors": errors, "moved": answers[0]["moved"]}


SHAPES = {
    # hosts, ranks a host, tables of each tower, sharding of each table, samples of each rank
    "1x2": (
        1,
        2,
        [[0, 1, 2, 3]],
        {"a": ("table_wise", 0), "b": ("row_wise", 0), "c": ("column_wise", (1, 0))},
        [5, 3],
    ),
    "2x1": (
        2,
        1,
        [[2, 0], [1, 3]],
        {"a": ("table_wise", 0), "b": ("table_wise", 1), "c": ("table_wise", 0)},
        [4, 6],
    ),
    "2x2": (
        *(2, 2, [[3, 1], [0, 2]]),
        {
            "d": ("table_row_wise", 0),
            "b": ("table_wise", 1),
            "a": ("table_column_wise", (3, 2)),
            "c": ("table_wise", 3),
        },
        [3, 1, 5, 2],
    ),
    "4x1": (
        *(4, 1, [[0], [1], [2], [3]]),
        {"a": ("table_wise", 0), "b": ("table_wise", 1), "c": ("table_wise", 2), "d": ("table_wise", 3)},
        [2, 3, 1, 4],
    ),
    "groups": (
        4,
        1,
        [[0, 1], [2, 3]],
        {"a": ("column_wise", (0, 1)), "b": ("table_wise", 1), "c": ("table_wise", 2)},
        [2, 3, 1, 4],
    ),
}


def _decisions(stated: dict[str, Any], last: int) -> dict[str, Decision]:
    made = {}
    for name in "abcd":
        kind, place = stated.get(name, ("table_wise", last))
        made[name] = Decision(kind, place if isinstance(place, tuple) else (place,))
    return made


@pytest.mark.parametrize("shape", SHAPES)
def test_exchange_alone_equals_the_flat_model(shape: str) -> None:
    """Uneven batches, empty bags, shared tables, all splits inside a tower."""
    hosts, host_size, towers, stated, sizes = SHAPES[shape]
    plan = _plan(hosts, host_size, towers, _decisions(stated, hosts * host_size - 1), TABLES)
    found = _run(plan, TABLES, sizes)["errors"]
    assert {"outputs", "tables", "updated", "top.0.weight"} <= set(found)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("kind", ["projection", "cross", "wukong", "dhen"])
def test_tower_modules_move_before_the_peer_exchange(kind: str) -> None:
    """Their gradients, summed within the tower only, are the flat model's."""
    hosts, host_size, towers, stated, _ = SHAPES["2x2"]
    plan = _plan(hosts, host_size, towers, _decisions(stated, 3), TABLES)
    assert plan.decisions.towers is not None
    groups = [list(t.features) for t in plan.decisions.towers.towers]
    found = _run(plan, TABLES, [3, 1, 5, 2], groups=groups, kind=kind)
    assert found["moved"] == 2 * 4
    assert "module" in found["errors"]
    assert max(found["errors"].values()) < TOLERANCE, found


def test_module_across_towers_stays_behind() -> None:
    """Modules over other groups than the plan's towers are not moved, and the result is the same."""
    hosts, host_size, towers, stated, _ = SHAPES["2x2"]
    plan = _plan(hosts, host_size, towers, _decisions(stated, 3), TABLES)
    groups = [["a1", "f_b"], ["a2", "f_c", "f_d"]]
    found = _run(plan, TABLES, [3, 1, 5, 2], groups=groups, kind="projection")
    assert found["moved"] == 0
    assert max(found["errors"].values()) < TOLERANCE, found


def test_fused_kernels_update_like_sgd_and_weights_of_ids_travel() -> None:
    hosts, host_size, towers, stated, sizes = SHAPES["2x2"]
    tables = [replace(t, pooling="sum") for t in TABLES]
    plan = _plan(hosts, host_size, towers, _decisions(stated, 3), tables)
    found = _run(plan, tables, sizes, kernel="fused", weighted=True)["errors"]
    assert max(found.values()) < TOLERANCE, found


def test_shard_outside_its_tower_is_refused() -> None:
    hosts, host_size, towers, stated, sizes = SHAPES["2x1"]
    plan = _plan(hosts, host_size, towers, _decisions({**stated, "a": ("table_wise", 1)}, 1), TABLES)
    with pytest.raises(LaunchError, match="table 'a' of tower 0 has a shard on rank 1, outside the tower"):
        _run(plan, TABLES, sizes)
