"""The IR as text: what is compiled, on what, and what has been decided so far.

Deterministic: the same program gives the same text. Names are printed with ``%`` where they refer to
other lines. Absent sections have not been decided yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from ir.ops import EmbeddingTable, Op
from ir.plan import EVERY_RANK, Certificate, RankMemory, Shard, TablePlan, Timeline
from ir.program import Program
from ir.topology import Topology
from ir.units import format_bandwidth, format_bytes, format_count, format_seconds
from ir.workload import Workload

Item = TypeVar("Item")


def print_program(program: Program, limit: int | None = None) -> str:
    """The text of a program.

    Args:
        program: what to print.
        limit: at most so many lines a section (tables, ops, shardings, ranks, events), with a line that
            says how many were left out; None prints all.
    """
    model = program.model
    lines = [
        f"program {model.name} {{",
        f"  model    {len(model.tables)} tables, {format_count(model.embedding_params)} embedding parameters; "
        f"{len(model.ops)} ops, {format_count(model.dense_params)} dense parameters, "
        f"{_flops(model.dense_flops)} forward per sample",
        f"  digest   {model.digest}",
        f"  topology {_topology(program.topology)}",
        f"  workload {_workload(program.workload)}",
        f"  options  mode={program.options.mode} time_limit={program.options.time_limit:g} "
        f"seed={program.options.seed}",
    ]
    lines += _section("tables", model.tables, _table, limit)
    lines += _section("ops", model.ops, _op, limit)
    if program.tables is not None:
        lines += _section("sharding", program.tables, _sharding, limit)
    if program.certificate is not None:
        lines.append(f"  certificate {_certificate(program.certificate)}")
    if program.memory is not None:
        lines += _section("memory", program.memory, _memory, limit)
    if program.timeline is not None:
        lines += _timeline(program.timeline, limit)
    for assumption in program.assumptions:
        lines.append(f"  assume {assumption.name} = {assumption.value}  // {assumption.source}")
    lines += [f"  warning {text}" for text in program.warnings]
    return "\n".join([*lines, "}"])


def _flops(number: float) -> str:
    """``"32.1 MFLOP"``."""
    count, _, unit = format_count(number).partition(" ")
    return f"{count} {unit}FLOP"


def _section(
    name: str, items: Sequence[Item], line: Callable[[Item], str], limit: int | None
) -> Iterable[str]:
    shown = items if limit is None else items[: max(0, limit)]
    yield f"  {name} {{"
    yield from (f"    {line(item)}" for item in shown)
    if len(shown) < len(items):
        yield f"    // and {len(items) - len(shown)} more"
    yield "  }"


def _topology(topology: Topology) -> str:
    levels = ", ".join(
        f"{level.fanout} per {level.name} over {level.link.name} {format_bandwidth(level.link.bandwidth)}"
        for level in topology.levels
    )
    tiers = ", ".join(f"{tier.name} {format_bytes(tier.capacity)}" for tier in topology.device.tiers)
    return f"{topology.name}: {topology.world_size} x {topology.device.name} ({tiers}); {levels}"


def _workload(workload: Workload) -> str:
    stated = len(workload.features)
    ids = sum(stats.pooling_factor for stats in workload.features.values())
    return (
        f"global_batch={workload.global_batch} optimizer={workload.optimizer} "
        f"compute={workload.compute_dtype} exchange={workload.exchange_dtype} "
        f"id_bytes={workload.id_bytes}; {stated} features stated, {ids:g} ids a sample; {workload.origin}"
    )


def _table(table: EmbeddingTable) -> str:
    where = f" @{table.parameter}" if table.parameter else ""
    weighted = " weighted" if table.weighted else ""
    return (
        f"%{table.name} = table {table.rows} x {table.dim} {table.dtype} {table.pooling}{weighted} "
        f"[{', '.join(table.features)}]{where}"
    )


def _shape(op: Op) -> str:
    return f"({', '.join(str(size) for size in op.out_shape)}) {op.dtype}"


def _op(op: Op) -> str:
    target = f"[{op.target}]" if op.target else ""
    reads = ", ".join(f"%{name}" for name in op.inputs)
    facts = []
    if op.tables:
        facts.append(f"tables={len(op.tables)}:" + ",".join(op.tables))
    if op.gemm is not None:
        k, n = op.gemm
        facts.append(f"gemm={op.gemm_rows:g}x{k}x{n}")
    if op.flops:
        facts.append(f"flops={op.flops:g}")
    if op.params:
        facts.append(f"params={op.params}")
    if op.activation_bytes:
        facts.append(f"bytes={op.activation_bytes:g}")
    where = f" @{op.module}" if op.module else ""
    record = f" {{{' '.join(facts)}}}" if facts else ""
    return f"%{op.name} = {op.kind}{target}({reads}) : {_shape(op)} {op.phase}{record}{where}"


def _ranges(numbers: Iterable[int]) -> str:
    """``0-3,8`` for 0, 1, 2, 3, 8."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _shards(shards: Sequence[Shard]) -> str:
    """Column blocks with the ranks that hold them: ``[0:64]@3 [64:128]@8-15``."""
    blocks: dict[tuple[int, int], list[int]] = {}
    for shard in shards:
        if shard.rows:
            blocks.setdefault((shard.col, shard.col + shard.cols), []).append(shard.rank)
    return " ".join(
        f"[{a}:{b}]@{'all' if ranks == [EVERY_RANK] else _ranges(ranks)}"
        for (a, b), ranks in sorted(blocks.items())
    )


def _sharding(plan: TablePlan) -> str:
    cost = sum(plan.terms.values())
    runner = plan.runner_up
    other = f"; runner-up {runner.option}" if runner is not None else ""
    if runner is not None and runner.delta is not None:
        other += f" {'+' if runner.delta >= 0 else '-'}{format_seconds(abs(runner.delta))}"
    return (
        f"%{plan.name} -> {plan.option} {plan.compute_kernel} {_shards(plan.shards)} "
        f"{{{format_seconds(cost)}, {format_bytes(sum(plan.memory.values()))}}}{other}"
    )


def _certificate(certificate: Certificate) -> str:
    return (
        f"{certificate.objective_name}: objective {format_seconds(certificate.objective)}, bound "
        f"{format_seconds(certificate.lower_bound)} ({certificate.bound_method}), gap "
        f"{100 * certificate.gap:.3f} %, {certificate.status}"
    )


def _memory(record: RankMemory) -> str:
    used = ", ".join(f"{purpose} {format_bytes(size)}" for purpose, size in record.used.items())
    return f"rank {record.rank}: {format_bytes(record.total)} of {format_bytes(record.limit)} ({used})"


def _timeline(timeline: Timeline, limit: int | None) -> list[str]:
    lines = [f"  step {format_seconds(timeline.step)}"]
    events = sorted(timeline.events, key=lambda event: (event.start, event.stream, event.name))
    return lines + list(
        _section(
            "timeline",
            events,
            lambda event: (
                f"{format_seconds(event.start)} +{format_seconds(event.duration)} {event.stream}: {event.name}"
                f"{' *critical' if event.critical else ''}"
            ),
            limit,
        )
    )
