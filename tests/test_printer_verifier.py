"""The verifier finds each planted fault, and only faults; the printer says what there is, the same each time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.constraints import ShardingType
from ir.errors import IRError
from ir.ops import EmbeddingTable, Op
from ir.plan import (
    EVERY_RANK,
    Alternative,
    Assumption,
    Certificate,
    Event,
    RankMemory,
    Shard,
    TablePlan,
    Timeline,
)
from ir.printer import print_program
from ir.program import Model, Options, Program
from ir.sharding import ShardingOption, even_widths, units
from ir.topology import Device, Level, Link, MemoryTier, Topology
from ir.verifier import verify_program
from ir.workload import FeatureStats, Workload

HOSTS, HOST = 2, 4
WORLD = HOSTS * HOST


def machine(hosts: int = HOSTS, host: int = HOST) -> Topology:
    link = Link("loopback", 1e10)
    device = Device("cpu", "cpu", {"fp32": 1e11}, (MemoryTier("ddr", 2**34, 1e10, 1e10),))
    return Topology("test", device, (Level("host", host, link), Level("cluster", hosts, link)))


def shards(
    kind: ShardingType, rows: int, widths: tuple[int, ...], world: int, host: int
) -> tuple[Shard, ...]:
    """Shards of one table; column block i goes to rank i, or host i of the row-split kinds."""
    made: list[Shard] = []
    for index, unit in enumerate(units(ShardingOption(kind, widths), rows, world, host)):
        if kind == "data_parallel":
            made.append(Shard(EVERY_RANK, 0, 0, rows, widths[0]))
            continue
        first = {"rank": index, "host": (index * host) % world, "all": 0}[unit.scope]
        made += [Shard(first + i, b.row, b.col, b.rows, b.cols) for i, b in enumerate(unit.blocks)]
    return tuple(made)


KINDS: dict[str, tuple[ShardingType, int]] = {
    "dp": ("data_parallel", 1),
    "tw": ("table_wise", 1),
    "cw": ("column_wise", 4),
    "rw": ("row_wise", 1),
    "twrw": ("table_row_wise", 1),
    "twcw": ("table_column_wise", 4),
    "grid": ("grid_shard", 2),
}
ROWS, DIM = 103, 64  # 103 rows: the last blocks are shorter


def decision(name: str, rows: int = ROWS, world: int = WORLD, host: int = HOST) -> TablePlan:
    kind, parts = KINDS[name.partition("-")[0]]
    widths = even_widths(DIM, parts)
    assert widths is not None
    return TablePlan(
        name=name,
        rows=rows,
        dim=DIM,
        dtype="fp32",
        features=(f"f_{name}",),
        pooling="sum",
        module="ebc",
        parameter=f"ebc.embedding_bags.{name}.weight",
        sharding_type=kind,
        compute_kernel="dense" if kind == "data_parallel" else "fused",
        shards=shards(kind, rows, widths, world, host),
        terms={"forward": 1e-3, "backward": 2e-3},
        memory={"weights": 4 * rows * DIM},
        runner_up=Alternative("row_wise", 5e-3, 1e-3),
    )


def model(names: list[str], rows: int = ROWS) -> Model:
    tables = tuple(EmbeddingTable(name, rows, DIM, (f"f_{name}",), module="ebc") for name in names)
    ops = (
        Op("ids", "input", out_shape=(8, len(names)), dtype="int64"),
        Op("ebc", "lookup", inputs=("ids",), out_shape=(8, DIM * len(names)), tables=tuple(names)),
        Op(
            "top",
            "gemm",
            inputs=("ebc",),
            out_shape=(8, 1),
            flops=2.0 * DIM,
            params=DIM,
            phase="top",
            gemm=(DIM, 1),
        ),
    )
    return Model("net", tables, ops)


def program() -> Program:
    """Every section filled, one table of each sharding type."""
    names = list(KINDS)
    return Program(
        model=model(names),
        topology=machine(),
        workload=Workload(1024, {f"f_{name}": FeatureStats(3.0) for name in names}),
        options=Options(),
        tables=tuple(decision(name) for name in names),
        certificate=Certificate("slowest rank", 3e-3, 2.5e-3, "feasible", "LP relaxation"),
        memory=tuple(RankMemory(rank, 2**30, {"weights": 2**20, "io": 2**10}) for rank in range(WORLD)),
        timeline=Timeline(
            4e-3,
            (
                Event("exchange", "network", 0.0, 1e-3, True),
                Event("bottom", "compute", 0.0, 5e-4, False),
                Event("lookup", "compute", 1e-3, 3e-3, True),
            ),
        ),
        assumptions=(Assumption("efficiency", "0.7", "fitted"),),
        warnings=("a warning",),
    )


def test_a_sound_program_passes() -> None:
    verify_program(program())
    verify_program(replace(program(), tables=None, certificate=None, memory=None, timeline=None))


def test_empty_row_blocks_may_be_written_or_left_out() -> None:
    sound = replace(program(), model=model(["rw"], rows=3), tables=(decision("rw", rows=3),))
    assert sound.tables is not None
    assert [shard.rows for shard in sound.tables[0].shards].count(0) == WORLD - 3
    verify_program(sound)
    kept = tuple(shard for shard in sound.tables[0].shards if shard.rows)
    verify_program(replace(sound, tables=(replace(sound.tables[0], shards=kept),)))


# ---- planted faults ----


def table(name: str, **changes: Any) -> Callable[[Program], Program]:
    """Change one decision; a callable value gets the old one."""

    def plant(sound: Program) -> Program:
        assert sound.tables is not None
        made = []
        for plan in sound.tables:
            if plan.name == name:
                new = {
                    key: value(getattr(plan, key)) if callable(value) else value
                    for key, value in changes.items()
                }
                plan = replace(plan, **new)
            made.append(plan)
        return replace(sound, tables=tuple(made))

    return plant


def shard(at: int, **changes: Any) -> Callable[[tuple[Shard, ...]], tuple[Shard, ...]]:
    return lambda old: (*old[:at], replace(old[at], **changes), *old[at + 1 :])


def drop(at: int) -> Callable[[tuple[Shard, ...]], tuple[Shard, ...]]:
    return lambda old: (*old[:at], *old[at + 1 :])


def op(at: int, **changes: Any) -> Callable[[Program], Program]:
    def plant(sound: Program) -> Program:
        ops = sound.model.ops
        return replace(
            sound, model=replace(sound.model, ops=(*ops[:at], replace(ops[at], **changes), *ops[at + 1 :]))
        )

    return plant


def first_table(**changes: Any) -> Callable[[Program], Program]:
    return lambda sound: replace(
        sound,
        model=replace(
            sound.model, tables=(replace(sound.model.tables[0], **changes), *sound.model.tables[1:])
        ),
    )


def memory(rank: int, **changes: Any) -> Callable[[Program], Program]:
    def plant(sound: Program) -> Program:
        old = sound.memory or ()
        return replace(sound, memory=(*old[:rank], replace(old[rank], **changes), *old[rank + 1 :]))

    return plant


def event(name: str, **changes: Any) -> Callable[[Program], Program]:
    def plant(sound: Program) -> Program:
        assert sound.timeline is not None
        events = tuple(replace(e, **changes) if e.name == name else e for e in sound.timeline.events)
        return replace(sound, timeline=replace(sound.timeline, events=events))

    return plant


def certificate(**changes: Any) -> Callable[[Program], Program]:
    return lambda sound: replace(sound, certificate=replace(sound.certificate, **changes))  # type: ignore[type-var]


def reverse(old: tuple[Shard, ...]) -> tuple[Shard, ...]:
    """The same blocks on the ranks in reverse order."""
    return tuple(replace(a, rank=b.rank) for a, b in zip(old, reversed(old), strict=True))


FAULTS: dict[str, tuple[Callable[[Program], Program], str]] = {
    "table name twice": (first_table(name="tw"), "two tables are called 'tw'"),
    "table without rows": (first_table(rows=0), r"table 'dp' has shape \(0, 64\)"),
    "op name twice": (op(2, name="ebc"), "two ops are called 'ebc'"),
    "unknown kind": (op(2, kind="magic"), "unknown kind 'magic'"),
    "unknown phase": (op(2, phase="middle"), "unknown phase 'middle'"),
    "input that is later": (op(1, inputs=("top",)), "reads 'top', which is no earlier op"),
    "negative shape": (op(2, out_shape=(8, -1)), r"has the shape \(8, -1\)"),
    "negative count": (op(2, flops=-1.0), "negative or not finite"),
    "infinite count": (op(2, activation_bytes=float("inf")), "negative or not finite"),
    "negative GEMM": (op(2, gemm=(-1, 3)), r"has the GEMM \(-1, 3\)"),
    "lookup of no table": (op(1, tables=()), "is of kind 'lookup' and looks up 0 tables"),
    "tables on a GEMM": (op(2, tables=("tw",)), "is of kind 'gemm' and looks up 1 tables"),
    "lookup of a missing table": (op(1, tables=("nowhere",)), "looks up 'nowhere', which is no table"),
    "no decision": (lambda p: replace(p, tables=p.tables[1:]), "table 'dp' has no decision"),  # type: ignore[index]
    "decided twice": (lambda p: replace(p, tables=(*p.tables, p.tables[1])), "'tw' is decided twice"),  # type: ignore[misc,index]
    "decision for nothing": (
        lambda p: replace(p, tables=(*p.tables, decision("tw-2"))),  # type: ignore[misc]
        "'tw-2', which is no table",
    ),
    "other rows": (table("tw", rows=104), "is decided as 104 x 64 fp32"),
    "other type": (table("tw", dtype="fp16"), "is decided as 103 x 64 fp16"),
    "no shards": (table("tw", shards=()), "has no shards"),
    "rank out of range": (table("tw", shards=shard(0, rank=WORLD)), "on ranks 8..8 of 8"),
    "copy missing": (table("dp", shards=()), "has no shards"),
    "copy on one rank": (table("dp", shards=shard(0, rank=2)), "is not one shard on every rank"),
    "part of a copy": (table("dp", shards=shard(0, rows=50)), "a copy that is not the whole table"),
    "copy of a table in one place": (table("tw", shards=shard(0, rank=-1)), "on ranks -1..-1 of 8"),
    "fused copies": (table("dp", compute_kernel="fused"), "kernel 'fused'"),
    "column block missing": (table("cw", shards=drop(1)), "columns 16..32 are not covered exactly once"),
    "last column block missing": (table("cw", shards=drop(3)), "end at column 48 of 64"),
    "column blocks overlap": (table("cw", shards=shard(1, col=12)), "columns 12..16 are not covered"),
    "too many columns": (table("cw", shards=shard(3, cols=20)), "end at column 68 of 64"),
    "width no multiple of 4": (
        table(
            "cw", shards=lambda old: (replace(old[0], cols=18), replace(old[1], col=18, cols=14), *old[2:])
        ),
        "are not multiples of 4",
    ),
    "columns split table-wise": (table("cw", sharding_type="table_wise"), "has its columns split"),
    "rows missing table-wise": (
        table("tw", shards=shard(0, rows=102)),
        "not exactly one shard with all 103 rows",
    ),
    "table-wise twice": (
        table("tw", shards=lambda old: (*old, replace(old[0], rank=5))),
        "not exactly one shard",
    ),
    "columns over two hosts": (table("twcw", shards=shard(3, rank=6)), r"spread over hosts \[0, 1\]"),
    "uneven rows": (
        table(
            "rw", shards=lambda old: (replace(old[0], rows=14), replace(old[1], row=14, rows=12), *old[2:])
        ),
        r"row blocks are not ceil\(103 / 8\)",
    ),
    "row block missing": (table("rw", shards=drop(7)), "row blocks are not"),
    "row block twice": (table("rw", shards=lambda old: (*old, old[0])), "row blocks are not"),
    "row blocks on other ranks": (table("rw", shards=reverse), "row blocks are not"),
    "rows of two hosts": (table("twrw", shards=shard(0, rank=4)), r"ceil\(103 / 4\) rows a rank"),
    "grid block incomplete": (table("grid", shards=drop(5)), "columns from 32: its row blocks are not"),
    "bound above the objective": (
        certificate(lower_bound=3.1e-3),
        "bound 0.0031 is above the objective 0.003",
    ),
    "bound not a number": (certificate(lower_bound=float("nan")), "and bound nan"),
    "rank without memory": (lambda p: replace(p, memory=p.memory[1:]), "ranks 0..7 in order"),  # type: ignore[index]
    "negative memory": (memory(2, used={"io": -1}), "rank 2 uses a negative number of bytes for 'io'"),
    "too much memory": (memory(5, limit=2**20), "rank 5 uses 1049600 bytes of 1048576"),
    "event before the step": (event("bottom", start=-1e-3), "starts at -0.001 s"),
    "negative duration": (event("bottom", duration=-1e-3), "lasts -0.001 s"),
    "event after the step": (event("lookup", duration=4e-3), "'lookup' ends after the step"),
    "events overlap": (event("bottom", duration=2e-3), "'bottom' and 'lookup' overlap on stream 'compute'"),
    "step not finite": (
        lambda p: replace(p, timeline=replace(p.timeline, step=float("nan"))),  # type: ignore[type-var]
        "the step lasts nan s",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_named(fault: str) -> None:
    plant, says = FAULTS[fault]
    with pytest.raises(IRError, match=says):
        verify_program(plant(program()))


def test_many_faults_are_counted() -> None:
    broken = replace(program(), tables=())
    broken = replace(broken, memory=tuple(replace(m, limit=0) for m in broken.memory or ()))
    with pytest.raises(IRError, match=r"'dp' has no decision; .*; and 5 more$"):
        verify_program(broken)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(set(KINDS) - {"dp"})),
    rows=st.integers(9, 400),
    at=st.integers(0, 7),
    field=st.sampled_from(["row", "col", "rows", "cols", "rank"]),
    by=st.integers(-3, 5).filter(bool),
)
def test_moving_any_edge_of_any_shard_is_a_fault(name: str, rows: int, at: int, field: str, by: int) -> None:
    """Coverage is exact: an independent count of the cells agrees with the verifier's verdict."""
    sound = replace(program(), model=model([name], rows), tables=(decision(name, rows),))
    assert sound.tables is not None
    old = sound.tables[0].shards
    changed = replace(old[at % len(old)], **{field: getattr(old[at % len(old)], field) + by})
    moved = tuple(changed if i == at % len(old) else s for i, s in enumerate(old))
    cells: dict[tuple[int, int], int] = {}
    for s in moved:
        for row in range(s.row, s.row + s.rows):
            for col in range(s.col, s.col + s.cols):
                cells[row, col] = cells.get((row, col), 0) + 1
    exact = len(cells) == rows * DIM and set(cells.values()) == {1}
    exact = exact and all(0 <= row < rows and 0 <= col < DIM for row, col in cells)
    try:
        verify_program(replace(sound, tables=(replace(sound.tables[0], shards=moved),)))
        passed = True
    except IRError:
        passed = False
    assert exact or not passed  # nothing that is not covered exactly once passes
    if field != "rank" and old[at % len(old)].rows:
        assert not passed


def test_verifying_a_large_plan_is_quick() -> None:
    names = [f"{('rw', 'grid', 'cw', 'dp')[i % 4]}-{i}" for i in range(856)]
    large = replace(
        program(),
        model=model(names, 1_000_003),
        topology=machine(16, 8),
        tables=tuple(decision(name, 1_000_003, 128, 8) for name in names),
        memory=tuple(RankMemory(rank, 2**40, {"weights": 1}) for rank in range(128)),
    )
    started = time.perf_counter()
    verify_program(large)
    seconds = time.perf_counter() - started
    print(f"856 tables on 128 ranks verified in {seconds:.3f} s (target 0.3 s)")
    assert seconds < 3 * 0.3


# ---- printing ----


def test_printing_names_everything_that_was_decided() -> None:
    text = print_program(program())
    for plan in program().tables or ():
        assert f"%{plan.name} -> {plan.option} {plan.compute_kernel} " in text
    for op_ in program().model.ops:
        assert f"%{op_.name} = {op_.kind}" in text
    for line in (
        "%tw = table 103 x 64 fp32 sum [f_tw]",
        "%top = gemm(%ebc) : (8, 1) fp32 top {gemm=1x64x1 flops=128 params=64}",
        "%rw -> row_wise fused [0:64]@0-7 {3.00 ms, 25.8 KiB}; runner-up row_wise +1.00 ms",
        "%cw -> column_wise x4 fused [0:16]@0 [16:32]@1 [32:48]@2 [48:64]@3",
        "%grid -> grid_shard x2 fused [0:32]@0-3 [32:64]@4-7",
        "certificate slowest rank: objective 3.00 ms, bound 2.50 ms (LP relaxation), gap 16.667 %, feasible",
        "rank 7: 1.00 MiB of 1.00 GiB (weights 1.00 MiB, io 1.00 KiB)",
        "1.00 ms +3.00 ms compute: lookup *critical",
        "assume efficiency = 0.7  // fitted",
        "warning a warning",
    ):
        assert line in text


def test_printing_is_deterministic_and_shows_changes() -> None:
    assert print_program(program()) == print_program(program())
    changed = table("tw", shards=shard(0, rank=3))(program())
    lines = zip(print_program(program()).splitlines(), print_program(changed).splitlines(), strict=True)
    assert [(a, b) for a, b in lines if a != b] == [
        (
            "    %tw -> table_wise fused [0:64]@0 {3.00 ms, 25.8 KiB}; runner-up row_wise +1.00 ms",
            "    %tw -> table_wise fused [0:64]@3 {3.00 ms, 25.8 KiB}; runner-up row_wise +1.00 ms",
        )
    ]


def test_sections_not_decided_yet_are_absent() -> None:
    text = print_program(replace(program(), tables=None, certificate=None, memory=None, timeline=None))
    assert not any(word in text for word in ("sharding {", "memory {", "timeline {", "certificate"))


def test_long_lists_are_cut_only_on_request() -> None:
    assert "more" not in print_program(program())
    text = print_program(program(), limit=2)
    assert text.count("// and 5 more") == 2  # tables and their shardings
    assert "// and 6 more" in text  # ranks
