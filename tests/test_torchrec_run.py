"""Plans on real gloo processes equal the unsharded model; the reference shares no code with TorchRec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from codegen.runtime.compare import RunResult, run_plan
from ir.constraints import SHARDING_TYPES
from ir.errors import InputError
from ir.plan import Plan
from tests.plans import Decision, Table, make_plan

MODELS = str(Path(__file__).with_name("torchrec_models.py"))

# prime and uneven rows, a dim that 4 column blocks do not share evenly, two features on one table
TABLES = [Table("a", 61, 24), Table("b", 40, 8, ("x", "y")), Table("c", 37, 16), Table("d", 53, 16)]


def declared(tables: list[Table]) -> list[list[Any]]:
    return [[t.name, t.rows, t.dim, t.features or (f"f_{t.name}",), t.pooling, t.dtype] for t in tables]


def run(plan: Plan, tables: list[Table], model: str = "Small", **options: Any) -> RunResult:
    options = {"steps": 2, "lr": 0.1, "timeout": 120, **options}
    return run_plan(plan, f"{MODELS}:{model}", (declared(tables),), **options)


def decision(kind: str, hosts: int, host_size: int, kernel: str | None, turn: int) -> Decision:
    """One way to place ``kind``; ``turn`` rotates the ranks so that tables differ."""
    world = hosts * host_size
    host = turn % hosts
    places = {
        "table_wise": (turn % world,),
        "column_wise": ((turn + 1) % world, turn % world),
        "table_column_wise": tuple(host * host_size + (turn + i) % host_size for i in range(2)),
        "table_row_wise": (host,),
        "grid_shard": (host, (host + 1) % hosts),
    }.get(kind, (0,))
    return Decision(kind, places, kernel=kernel if kind != "data_parallel" else None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("hosts", "host_size"), [(1, 2), (2, 2)])
@pytest.mark.parametrize("kind", SHARDING_TYPES)
def test_each_sharding_type_equals_the_unsharded_model(kind: str, hosts: int, host_size: int) -> None:
    kernels = ("fused", "dense", "fused", "fused")
    decisions = {
        table.name: decision(kind, hosts, host_size, kernel, turn)
        for turn, (table, kernel) in enumerate(zip(TABLES, kernels, strict=True))
    }
    result = run(make_plan(TABLES, decisions, hosts, host_size, optimizer="adagrad"), TABLES)
    assert result.equal, result
    assert result.changed == result.tensors == len(TABLES) + 2


SEVEN = [Table(f"t{i}", 40 + 7 * i, 8 * (1 + i % 3)) for i in range(7)]


@pytest.mark.parametrize(("hosts", "host_size"), [(2, 1), (1, 2), (4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
def test_all_types_in_one_collection(hosts: int, host_size: int, optimizer: str) -> None:
    decisions = {
        table.name: decision(kind, hosts, host_size, None, turn)
        for turn, (table, kind) in enumerate(zip(SEVEN, SHARDING_TYPES, strict=True))
    }
    plan = make_plan(SEVEN, decisions, hosts, host_size, optimizer=optimizer)  # type: ignore[arg-type]
    result = run(plan, SEVEN)
    assert result.equal, result
    assert len(result.notes) == (3 if optimizer == "rowwise_adagrad" else 0)  # three types split columns here
    assert len(result.peak_rss) == hosts * host_size
    assert all(rss > 2**20 for rss in result.peak_rss)
    assert len(result.step_seconds) == 2


def test_uneven_widths_and_several_blocks_on_one_rank() -> None:
    decisions = {
        "a": Decision("column_wise", (1, 0, 1), (12, 8, 4)),
        "b": Decision("column_wise", (0, 0), kernel="dense"),
        "c": Decision("table_column_wise", (1, 1), (12, 4)),
        "d": Decision("grid_shard", (0, 0), (12, 4)),
    }
    result = run(make_plan(TABLES, decisions, 1, 2, optimizer="rowwise_adagrad"), TABLES)
    assert result.equal, result


def test_mean_pooling_weighted_bags_and_adam() -> None:
    tables = [Table("a", 61, 24, pooling="mean"), Table("b", 40, 8, pooling="mean"), Table("c", 37, 12)]
    kinds = {
        "a": Decision("column_wise", (0, 1)),
        "b": Decision("table_wise", (1,)),
        "c": Decision("row_wise"),
    }
    assert run(make_plan(tables, kinds, 1, 2), tables).equal
    sums = [Table("a", 61, 24), Table("c", 37, 12)]
    dense = {"a": Decision("column_wise", (1, 0), kernel="dense"), "c": Decision("data_parallel")}
    result = run(make_plan(sums, dense, 1, 2, optimizer="adam"), sums, options={"weighted": True}, lr=0.01)
    assert result.equal, result


@pytest.mark.parametrize(
    "pair",
    [
        (Decision("table_wise", (1,)), Decision("row_wise")),
        (Decision("column_wise", (1, 0)), Decision("column_wise", (0, 0))),
    ],
)
def test_sequences(pair: tuple[Decision, Decision]) -> None:
    where = {"pooling": "none", "module": "ec"}
    tables = [
        Table(n, r, 8, parameter=f"ec.embeddings.{n}.weight", **where) for n, r in (("a", 40), ("b", 37))
    ]
    result = run(make_plan(tables, dict(zip("ab", pair, strict=True)), 1, 2), tables, "Sequences")
    assert result.equal, result


def test_half_precision_tables() -> None:
    tables = [Table("a", 61, 24, dtype="fp16"), Table("b", 40, 8)]
    plan = make_plan(tables, {"a": Decision("row_wise"), "b": Decision("table_wise")}, 1, 2)
    result = run(plan, tables)
    assert result.equal, result
    assert result.tolerance == 1e-3


def test_a_wrong_update_would_be_seen() -> None:
    """The comparison itself: a model that computes something else when it is sharded must not pass."""
    plan = make_plan(TABLES, {t.name: Decision("row_wise") for t in TABLES}, 1, 2)
    same = run(plan, TABLES, steps=1)
    assert same.equal
    assert same.weights.relative < 1e-6
    changed = run_plan(plan, f"{MODELS}:Forgetful", (declared(TABLES),), steps=1, lr=0.1)
    assert not changed.equal
    assert changed.weights.relative > 1e-3
    assert changed.updates.relative > 0.01
    assert changed.notes == ()  # its vectors come in their order


def test_a_model_that_reads_vectors_by_position_is_told_why_it_differs() -> None:
    """TorchRec returns the vectors of rank 0's tables first, whatever their order in the collection."""
    placed = {table.name: Decision("table_wise", (turn % 2 ^ 1,)) for turn, table in enumerate(TABLES)}
    plan = make_plan(TABLES, placed, 1, 2)
    result = run(plan, TABLES, "ByPosition", steps=1)
    assert not result.equal
    (note,) = result.notes
    assert "'ebc' returns its vectors in the order of its shards" in note


def test_refused_runs() -> None:
    plan = make_plan(TABLES, {t.name: Decision("row_wise") for t in TABLES}, 1, 2)
    with pytest.raises(InputError, match="plan is for 2 ranks, not 4"):
        run(plan, TABLES, nproc=4)
    with pytest.raises(InputError, match="does not divide over 2 ranks"):
        run(plan, TABLES, batch=33)
    with pytest.raises(InputError, match="steps must be at least 1"):
        run(plan, TABLES, steps=0)
