"""Every fault that TorchRec runs wrongly or fails on obscurely is refused, with one sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codegen.runtime.launch import LaunchError, launch
from codegen.torchrec import check_environment
from codegen.torchrec_check import check, notes
from ir.errors import InputError
from ir.plan import Plan, Shard
from ir.sharding import ShardingOption, even_widths, units
from ir.torchrec_rules import empty_row_shards, stackable, torchrec_supported
from tests.plans import Decision, Table, make_plan
from tests.torchrec_models import Sequences, Small

BASE = Table("a", 61, 24)
OTHER = Table("b", 40, 8)


def plan_of(
    decision: Decision, table: Table = BASE, hosts: int = 2, host_size: int = 2, **options: Any
) -> Plan:
    decisions = {table.name: decision, "b": Decision("table_wise")}
    return make_plan([table, OTHER], decisions, hosts, host_size, **options)


def change(plan: Plan, shards: Callable[[tuple[Shard, ...]], Any] | None = None, **fields: Any) -> Plan:
    first, *rest = plan.table_plans
    if shards is not None:
        fields["shards"] = tuple(shards(first.shards))
    return replace(plan, table_plans=(replace(first, **fields), *rest))


GRID = Decision("grid_shard", (0, 1))
COLUMNS = Decision("column_wise", (0, 3))

FAULTS: dict[str, tuple[Plan, str]] = {
    "uneven rows": (
        change(
            plan_of(Decision("row_wise"), hosts=1),
            lambda s: (replace(s[0], rows=40), replace(s[1], row=40, rows=21)),
        ),
        "not the blocks TorchRec computes with",
    ),
    "uneven rows in a host": (
        change(
            plan_of(Decision("table_row_wise", (1,))),
            lambda s: (replace(s[0], rows=40), replace(s[1], row=40, rows=21)),
        ),
        "not the blocks TorchRec computes with",
    ),
    "rows on other ranks": (
        change(
            plan_of(Decision("row_wise"), hosts=1),
            lambda s: (replace(s[0], rank=1), replace(s[1], rank=0)),
        ),
        "puts shard i on rank i",
    ),
    "a host's rows on two hosts": (
        change(plan_of(Decision("table_row_wise", (1,))), lambda s: (replace(s[0], rank=1), s[1])),
        "not the ranks of one host of 2",
    ),
    "grid on two hosts": (
        change(plan_of(GRID), lambda s: (s[0], replace(s[1], rank=2), *s[2:])),
        "not the ranks of one host of 2",
    ),
    "table-column-wise on two hosts": (
        change(plan_of(COLUMNS), None, sharding_type="table_column_wise"),
        "shards on several hosts",
    ),
    "rank out of range": (
        change(plan_of(COLUMNS), lambda s: (s[0], replace(s[1], rank=4))),
        "shard on rank 4 but the plan has ranks 0 to 3",
    ),
    "overlapping columns": (
        change(plan_of(COLUMNS), lambda s: (s[0], replace(s[1], col=8, cols=16))),
        "ranks 0 and 3 that overlap",
    ),
    "missing columns": (
        change(plan_of(COLUMNS), lambda s: (s[0],)),
        "shards for 732 of its 1464 weights",
    ),
    "columns beyond the table": (
        change(plan_of(COLUMNS), lambda s: (s[0], replace(s[1], cols=16))),
        "but is 61 x 24",
    ),
    "no shards": (change(plan_of(COLUMNS), lambda s: ()), "has no shards"),
    "odd width": (plan_of(Decision("column_wise", (0, 1), (10, 14))), "10 columns is not a multiple of 4"),
    "dense blocks of two widths": (
        plan_of(Decision("column_wise", (1, 1), (8, 16), kernel="dense")),
        r"widths \[8, 16\] on rank 1",
    ),
    "empty row shard": (
        plan_of(Decision("row_wise"), Table("a", 5, 8)),
        "5 rows over 4 ranks leave 1 without a row",
    ),
    "tiny table": (
        plan_of(Decision("table_row_wise"), Table("a", 1, 8)),
        "1 rows over 2 ranks leave 1 without a row",
    ),
    "mean over row shards": (
        plan_of(Decision("row_wise"), Table("a", 61, 24, pooling="mean")),
        "lengths of the wrong features",
    ),
    "fused copies": (
        plan_of(Decision("data_parallel", kernel="fused")),
        "the fused kernel, which TorchRec does not",
    ),
    "a copy too few": (
        change(plan_of(Decision("data_parallel")), lambda s: (replace(s[0], rank=0),)),
        "not one whole shard on every rank",
    ),
    "bf16 on cpu": (
        plan_of(COLUMNS, Table("a", 61, 24, dtype="bf16")),
        "bf16, for which FBGEMM has no training",
    ),
    "int8 on cpu": (
        plan_of(COLUMNS, Table("a", 61, 24, dtype="int8")),
        "int8, for which FBGEMM has no training",
    ),
    "fused adam on cpu": (plan_of(COLUMNS, optimizer="adam"), "fused kernel with adam"),
    "sequences by host": (
        plan_of(Decision("table_row_wise"), Table("a", 61, 24, pooling="none")),
        "an EmbeddingCollection cannot be table_row_wise",
    ),
    "copied sequences": (
        plan_of(Decision("data_parallel"), Table("a", 61, 24, pooling="none")),
        "an EmbeddingCollection cannot be data_parallel",
    ),
    "dense sequences": (
        plan_of(Decision("table_wise", kernel="dense"), Table("a", 61, 24, pooling="none")),
        "dense kernel of an EmbeddingCollection",
    ),
    "a table twice": (
        (lambda p: replace(p, table_plans=(p.table_plans[0], *p.table_plans)))(plan_of(COLUMNS)),
        "'a' is in the plan twice",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_plan_is_refused(fault: str) -> None:
    plan, message = FAULTS[fault]
    with pytest.raises(InputError, match=message) as raised:
        check(plan)
    assert "'a'" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "decision",
    [COLUMNS, GRID, Decision("row_wise"), Decision("table_row_wise", (1,)), Decision("data_parallel")],
)
def test_a_good_plan_passes(decision: Decision) -> None:
    check(plan_of(decision))


def test_what_only_cpus_lack_is_allowed_on_gpus() -> None:
    check(plan_of(COLUMNS, Table("a", 61, 24, dtype="bf16")), device="cuda")
    check(plan_of(COLUMNS, optimizer="adam"), device="cuda")


def test_row_wise_adagrad_on_column_blocks() -> None:
    plan = plan_of(COLUMNS, optimizer="rowwise_adagrad")
    check(plan)
    assert len(notes(plan)) == 1
    assert "'a' is column_wise x2" in notes(plan)[0]
    with pytest.raises(InputError, match="keeps one state per column block"):
        check(plan, one_state_per_row=True)
    check(plan, optimizer="adagrad", one_state_per_row=True)
    assert not notes(plan_of(Decision("row_wise"), optimizer="rowwise_adagrad"))


def declared(*tables: Table) -> list[list[Any]]:
    return [[t.name, t.rows, t.dim, t.features or (f"f_{t.name}",), t.pooling, t.dtype] for t in tables]


def test_a_plan_for_another_model_is_refused() -> None:
    plan = plan_of(COLUMNS)
    check(plan, Small(declared(BASE, OTHER)))
    with pytest.raises(InputError, match="'a' is 61 x 24 in the plan but 62 x 24 in the module"):
        check(plan, Small(declared(replace(BASE, rows=62), OTHER)))
    with pytest.raises(InputError, match="'a' is 61 x 24 in the plan but 61 x 32 in the module"):
        check(plan, Small(declared(replace(BASE, dim=32), OTHER)))
    with pytest.raises(InputError, match=r"'a' of the plan is in no embedding collection.*another model"):
        check(plan, Small(declared(replace(BASE, name="A"), OTHER)))
    with pytest.raises(InputError, match="'c' of ebc is not in the plan"):
        check(plan, Small(declared(BASE, OTHER, Table("c", 9, 8))))
    with pytest.raises(InputError, match="'a' is fp32 in the plan but fp16 in the module"):
        check(plan, Small(declared(replace(BASE, dtype="fp16"), OTHER)))
    with pytest.raises(
        InputError, match="'a' is pooled in the plan but the module has it in an EmbeddingCollection"
    ):
        check(plan, Sequences(declared(BASE, replace(OTHER, dim=24))))


def test_no_collection_and_a_collection_left_out() -> None:
    from torch import nn

    plan = plan_of(COLUMNS)
    with pytest.raises(InputError, match="no EmbeddingBagCollection or EmbeddingCollection"):
        check(plan, nn.Linear(2, 2))
    both = nn.ModuleDict({"one": Small(declared(BASE, OTHER)), "two": Small(declared(Table("z", 9, 8)))})
    with pytest.raises(InputError, match=r"'z' of two\.ebc is not in the plan"):
        check(plan, both)


def test_collections_are_found_at_other_paths() -> None:
    from torch import nn

    from codegen.torchrec import to_torchrec

    plan = plan_of(COLUMNS)
    moved = to_torchrec(plan, nn.ModuleDict({"wrapper": Small(declared(BASE, OTHER))})).plan
    assert list(moved) == ["wrapper.ebc"]
    assert list(to_torchrec(plan, Small(declared(BASE, OTHER)).ebc).plan) == [""]
    twins = nn.ModuleDict({"ebc": Small(declared(BASE, OTHER)).ebc, "twin": Small(declared(BASE, OTHER)).ebc})
    with pytest.raises(InputError, match="'a' of twin is not in the plan"):  # the planned path decides
        check(plan, twins)


def test_the_processes_must_be_those_of_the_plan() -> None:
    check_environment(plan_of(GRID), 4, {"LOCAL_WORLD_SIZE": "2"})
    check_environment(plan_of(COLUMNS), 4, {})  # nothing is split by hosts
    with pytest.raises(InputError, match="plan is for 4 ranks but 2 run"):
        check_environment(plan_of(GRID), 2, {"LOCAL_WORLD_SIZE": "2"})
    with pytest.raises(InputError, match="hosts of 2 ranks but LOCAL_WORLD_SIZE is 4"):
        check_environment(plan_of(GRID), 4, {"LOCAL_WORLD_SIZE": "4"})
    with pytest.raises(InputError, match="LOCAL_WORLD_SIZE is not set"):
        check_environment(plan_of(GRID), 4, {})


@given(rows=st.integers(1, 500), ranks=st.integers(1, 40))
def test_empty_row_shards_by_counting(rows: int, ranks: int) -> None:
    """Row r lives on rank r // ceil(rows / ranks), so the ranks in use can be counted."""
    height = -(-rows // ranks)
    used = {row // height for row in range(rows)}
    assert empty_row_shards(rows, ranks) == ranks - len(used)
    reason = torchrec_supported(rows, 8, ShardingOption("row_wise", (8,)), ranks, ranks)
    assert (reason is None) == (len(used) == ranks)


@given(dim=st.integers(1, 64), parts=st.integers(1, 8))
def test_even_widths_are_supported_or_impossible(dim: int, parts: int) -> None:
    widths = even_widths(dim, parts)
    if widths is None or parts == 1:
        return
    option = ShardingOption("column_wise", widths)
    assert torchrec_supported(100, dim, option, parts, parts) is None
    assert sum(block.cols for unit in units(option, 100, parts, parts) for block in unit.blocks) == dim


@given(st.lists(st.integers(1, 8).map(lambda w: 4 * w), min_size=1, max_size=5))
def test_ascending_widths_stack(widths: list[int]) -> None:
    assert stackable(sorted(widths), "fused")
    assert stackable(widths, "dense") == (len(set(widths)) == 1)


# --- what happens without the check: each of these is run in TorchRec as it is ---------------------

UNCHECKED = f"{Path(__file__).with_name('torchrec_unchecked.py')}:largest_error"


def error_without_check(plan: Plan, tables: list[Table], timeout: float = 60.0) -> float:
    arguments = {"plan": plan.to_dict(), "tables": declared(*tables)}
    answers = launch(
        UNCHECKED, plan.world_size, arguments, host_size=plan.topology.host_size, timeout=timeout
    )
    return max(answers)


def test_the_harness_without_faults() -> None:
    plan = plan_of(Decision("row_wise"), hosts=1)
    assert error_without_check(plan, [BASE, OTHER]) < 1e-6


@pytest.mark.parametrize("fault", ["uneven rows", "mean over row shards"])
def test_silently_wrong_without_the_check(fault: str) -> None:
    plan, _ = FAULTS[fault]
    table = replace(BASE, pooling=plan.table_plans[0].pooling)
    assert error_without_check(plan, [table, OTHER]) > 1e-2


def test_a_plan_for_another_path_silently_replicates() -> None:
    plan = plan_of(Decision("row_wise"), hosts=1)
    arguments = {"plan": plan.to_dict(), "tables": declared(BASE, OTHER)}
    where = UNCHECKED.replace("largest_error", "sharded_modules")
    assert launch(where, 2, {**arguments, "path": "ebc"}) == [1, 1]
    assert launch(where, 2, {**arguments, "path": "model.ebc"}) == [0, 0]


def test_an_empty_row_shard_fails_obscurely() -> None:
    plan = make_plan([Table("a", 1, 8)], {"a": Decision("row_wise")}, 1, 2)
    with pytest.raises(LaunchError, match="must be a GPU or MTIA tensor"):
        error_without_check(plan, [Table("a", 1, 8)], timeout=20.0)


def test_table_weights_are_lost_without_loading_them() -> None:
    """Why sharded_model copies the weights: TorchRec draws new ones for tables on the CPU."""
    plan = plan_of(Decision("row_wise"), hosts=1)
    arguments = {"plan": plan.to_dict(), "tables": declared(BASE, OTHER), "load": False}
    assert max(launch(UNCHECKED, 2, arguments)) > 1e-2
