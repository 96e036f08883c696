"""Alternate growth and pruning: phases of a training, each with its sharding, exchange type and format of GEMMs.

Candidates of a phase are (sharding, exchange type, format): the plan's own, and for every level of
sparsity and every type that is allowed, the sharding that :class:`passes.sharding.Sharding` finds for
the smaller model, whose dense part leaves more memory to tables; each with every format that is allowed.
With step time t(i, c) of phase i under candidate c and the time m(a, b) to move tables from a to b, the
phases minimise

    sum over i of  steps_i t(i, c_i) + m(c_{i-1}, c_i)

a shortest path, exact over the candidates. A candidate is offered where it fits in memory. The final
phase is at full size and uses the plan's own types. Changing the format of GEMMs moves nothing: weights have float32
masters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from cost_models.calibration import Calibration, default_calibration
from cost_models.formats import bits_per_element
from cost_models.growth import cheapest_path, move_bytes, move_seconds, prunable_layers, shrunk
from ir.errors import InfeasibleError, InputError
from ir.format_plan import FormatPlan, FormatRequest, TensorFormat, TensorKind
from ir.growth import Growth, GrowthPhase, GrowthRequest, MovedTable, kept_units, schedule
from ir.plan import Shard, TablePlan
from ir.program import Model, Program
from ir.sharding import ROW_SPLIT
from ir.workload import ExchangeType
from passes.format_menu import FormatMenu
from passes.memory import MemoryAccounting
from passes.sharding import Sharding
from passes.step import StepTimeline

_OPERANDS: tuple[tuple[str, TensorKind], ...] = (("weight", "weight"), ("input", "activation"))

Tables = tuple[TablePlan, ...]
Candidate = tuple[int, ExchangeType, str | None]
"""Number of a sharding, exchange type, format of GEMMs (None: the plan's own)."""


@dataclass(frozen=True, slots=True)
class GrowthSchedule:
    """Fill ``decisions.growth`` when ``constraints.growth`` asks for it."""

    name: ClassVar[str] = "growth"
    calibration: Calibration | None = None

    def run(self, program: Program) -> Program:
        """Decide the phases; raises InputError when no layer of the model can be pruned."""
        request = program.options.constraints.growth
        if request is None:
            return program
        assert program.tables is not None, "sharding and the step run before growth"
        if program.options.mode != "train":
            raise InputError("growth and pruning are for training; compile with mode 'train'")
        section = _Phases(program, request, self.calibration).section()
        return replace(program, decisions=replace(program.decisions, growth=section))


class _Phases:
    """Prices of every phase under every candidate, and the choice among them."""

    def __init__(self, program: Program, request: GrowthRequest, calibration: Calibration | None) -> None:
        assert program.tables is not None
        self.program, self.calibration = program, calibration
        self.constants = calibration or default_calibration(program.topology)
        self.layers = prunable_layers(program.model, request.exclude)
        if not self.layers:
            raise InputError(
                f"growth: {program.model.name} has no hidden layer to prune; it needs linear layers joined by "
                "element-wise functions that growth.exclude does not name"
            )
        self.schedule = schedule(request)
        self.kept = [
            tuple(kept_units(layer.units, sparsity, request.multiple) for layer in self.layers)
            for _, _, sparsity in self.schedule
        ]
        self.models = {kept: shrunk(program.model, self.layers, kept) for kept in dict.fromkeys(self.kept)}
        self.own = program.workload.exchange_dtype
        self.types = tuple(dict.fromkeys((self.own, *request.exchange_dtypes)))
        self.formats: tuple[str | None, ...] = (None, *_with_kernels(program, request))
        self.shardings: list[Tables] = [program.tables]
        self.received: dict[tuple[int, int], int] = {}
        self.prices: dict[tuple[tuple[int, ...], Candidate], tuple[float, int] | None] = {}

    def section(self) -> Growth:
        """The decided section."""
        self._solve()
        own: Candidate = (0, self.own, None)
        numbers = range(len(self.shardings))
        candidates = [(s, t, f) for f in self.formats for t in self.types for s in numbers]
        last = len(self.schedule) - 1
        steps: list[list[float | None]] = []
        for i, (_, count, _) in enumerate(self.schedule):
            row: list[float | None] = []
            for candidate in candidates:
                price = self._price(self.kept[i], candidate)
                barred = price is None or (i == last and candidate[1:] != own[1:])
                row.append(None if barred or price is None else count * price[0])
            steps.append(row)
        moves = {
            (i, a, b): self._move(i, candidates[a][0], candidates[b][0])[1]
            for i in range(1, len(steps))
            for a in range(len(candidates))
            for b in range(len(candidates))
        }
        path = [candidates[c] for c in cheapest_path(steps, moves)]
        fixed = [own] * len(path)
        dense = self._price(tuple(layer.units for layer in self.layers), own)
        assert dense is not None
        used = sorted({sharding for sharding, _, _ in path} - {0})
        return Growth(
            layers=self.layers,
            phases=self._phases(path, {0: 0} | {s: i + 1 for i, s in enumerate(used)}),
            shardings=tuple(difference(self.shardings[0], self.shardings[s]) for s in used),
            dense_seconds=sum(count for _, count, _ in self.schedule) * dense[0],
            fixed_seconds=sum(p.steps * p.step_seconds + p.move_seconds for p in self._phases(fixed, {0: 0})),
        )

    def _solve(self) -> None:
        """The shardings of the smaller models, those that differ from one another."""
        for model in self.models.values():
            for dtype in self.types:
                if model.dense_params == self.program.model.dense_params and dtype == self.own:
                    continue  # the plan's own
                try:
                    solved = Sharding(self.calibration).run(self._searched(model, dtype)).tables
                except InfeasibleError:
                    continue  # cannot happen to a smaller model unless the search ran out of work
                assert solved is not None
                if all(_shards(solved) != _shards(known) for known in self.shardings):
                    self.shardings.append(solved)

    def _searched(self, model: Model, dtype: ExchangeType) -> Program:
        """The program of one phase with its part of the time limit."""
        program = self._at(model, None, dtype)
        each = program.options.time_limit / max(1, len(self.models) * len(self.types) - 1)
        return replace(program, options=replace(program.options, time_limit=each))

    def _at(
        self, model: Model, tables: Tables | None, dtype: ExchangeType, format: str | None = None
    ) -> Program:
        """The program of one phase."""
        workload, decisions = replace(self.program.workload, exchange_dtype=dtype), self.program.decisions
        if format is not None:
            decisions = replace(decisions, formats=_all_in(decisions.formats, model, format))
        return replace(self.program, model=model, workload=workload, tables=tables, decisions=decisions)

    def _price(self, kept: tuple[int, ...], candidate: Candidate) -> tuple[float, int] | None:
        """Seconds of a step and bytes on the fullest rank; None when it does not fit."""
        key = (kept, candidate)
        if key not in self.prices:
            number, dtype, format = candidate
            at = self._at(self.models[kept], self.shardings[number], dtype, format)
            placed = MemoryAccounting().run(at)
            assert placed.memory is not None
            fits = all(rank.total <= rank.limit for rank in placed.memory)
            timed = StepTimeline(self.calibration).run(placed).timeline if fits else None
            fullest = max(rank.total for rank in placed.memory)
            self.prices[key] = None if timed is None else (timed.step, fullest)
        return self.prices[key]

    def _move(self, i: int, before: int, after: int) -> tuple[int, float]:
        """Bytes into the busiest rank and seconds before phase ``i``."""
        topology = self.program.topology
        if (before, after) not in self.received:
            self.received[before, after] = max(
                move_bytes(self.shardings[before], self.shardings[after], topology, self.program.workload)
            )
        size = self.received[before, after]
        params = max(self.models[self.kept[j]].dense_params for j in (i - 1, i))
        resized = params if self.kept[i] != self.kept[i - 1] else 0
        return size, move_seconds(size, resized, topology, self.constants)

    def _phases(self, path: list[Candidate], number: dict[int, int]) -> tuple[GrowthPhase, ...]:
        made = []
        for i, ((kind, count, _), candidate) in enumerate(zip(self.schedule, path, strict=True)):
            sharding, dtype, format = candidate
            price = self._price(self.kept[i], candidate)
            assert price is not None
            size, seconds = self._move(i, path[i - 1][0], sharding) if i else (0, 0.0)
            made.append(
                GrowthPhase(
                    kind=kind,
                    steps=count,
                    kept=self.kept[i],
                    flops=self.models[self.kept[i]].dense_flops,
                    step_seconds=price[0],
                    memory=price[1],
                    exchange_dtype=dtype,
                    gemm_format=format,
                    sharding=number[sharding],
                    move_bytes=size,
                    move_seconds=seconds,
                )
            )
        return tuple(made)


def _with_kernels(program: Program, request: GrowthRequest) -> tuple[str, ...]:
    """The formats asked for; raises InfeasibleError where the device has no kernel that reads one."""
    for format in request.gemm_formats:
        menu = FormatMenu(
            FormatRequest(formats={"weight": (format,)}), program.topology.device, program.options.mode
        )
        menu.formats("growth.gemm_formats", "weight", format)
    return request.gemm_formats


def _all_in(decided: FormatPlan | None, model: Model, format: str) -> FormatPlan:
    """The decided formats, with the operands of every linear layer in ``format``."""
    tensors = tuple(
        TensorFormat(f"{op.name}.{what}", kind, format, 0.0, bits_per_element(format, op.gemm[0]), 0.0)
        for op in model.ops
        if op.gemm is not None and op.target == "Linear"
        for what, kind in _OPERANDS
    )
    if decided is None:
        return FormatPlan("step", 0.0, 0.0, 0.0, 0.0, 32.0, 0.0, 0.0, "", tensors)
    inside = {tensor.name for tensor in tensors}
    kept = tuple(tensor for tensor in decided.tensors if tensor.name not in inside)
    return replace(decided, tensors=(*kept, *tensors))


def _shards(tables: Tables) -> tuple[tuple[Shard, ...], ...]:
    return tuple(table.shards for table in tables)


def difference(own: Tables, other: Tables) -> tuple[MovedTable, ...]:
    """The tables of ``other`` that lie elsewhere than in ``own``."""
    moved = []
    for mine, table in zip(own, other, strict=True):
        if mine.shards == table.shards:
            continue
        first: dict[tuple[int, int], int] = {}
        for shard in table.shards:
            block = (shard.col, shard.cols)
            if table.sharding_type not in ROW_SPLIT:
                first[block] = shard.rank
            else:
                first[block] = min(shard.rank, first.get(block, shard.rank))
        columns = tuple((col, cols, rank) for (col, cols), rank in sorted(first.items()))
        moved.append(MovedTable(table.name, table.sharding_type, columns))
    return tuple(moved)
