"""Alternate growth and pruning: phases of a training, each with its sharding and exchange type.

Candidates of a phase are (sharding, exchange type): the plan's own pair, and for every level of
sparsity and every type that is allowed, the sharding that :class:`passes.sharding.Sharding` finds for
the smaller model, whose dense part leaves more memory to tables. With step time t(i, c) of phase i under
candidate c and the time m(a, b) to move tables from a to b, the phases minimise

    sum over i of  steps_i t(i, c_i) + m(c_{i-1}, c_i)

a shortest path, exact over the candidates. A candidate is offered where it fits in memory. The final
phase is at full size and uses the workload's own exchange type.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from cost_models.calibration import Calibration, default_calibration
from cost_models.growth import cheapest_path, move_bytes, move_seconds, prunable_layers, shrunk
from ir.errors import InfeasibleError, InputError
from ir.growth import Growth, GrowthPhase, GrowthRequest, MovedTable, kept_units, schedule
from ir.plan import Shard, TablePlan
from ir.program import Model, Program
from ir.sharding import ROW_SPLIT
from ir.workload import ExchangeType
from passes.memory import MemoryAccounting
from passes.sharding import Sharding
from passes.step import StepTimeline

Tables = tuple[TablePlan, ...]
Candidate = tuple[Tables, ExchangeType]


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
        self.shardings: list[Tables] = [program.tables]
        self.received: dict[tuple[int, int], int] = {}
        self.prices: dict[tuple[tuple[int, ...], int, ExchangeType], tuple[float, int] | None] = {}

    def section(self) -> Growth:
        """The decided section."""
        self._solve()
        candidates = [(s, t) for t in self.types for s in range(len(self.shardings))]
        last = len(self.schedule) - 1
        steps: list[list[float | None]] = []
        for i, (_, count, _) in enumerate(self.schedule):
            row: list[float | None] = []
            for sharding, dtype in candidates:
                price = self._price(self.kept[i], sharding, dtype)
                barred = price is None or (i == last and dtype != self.own)
                row.append(None if barred or price is None else count * price[0])
            steps.append(row)
        moves = {
            (i, a, b): self._move(i, candidates[a][0], candidates[b][0])[1]
            for i in range(1, len(steps))
            for a in range(len(candidates))
            for b in range(len(candidates))
        }
        path = [candidates[c] for c in cheapest_path(steps, moves)]
        fixed = [(0, self.own)] * len(path)
        dense = self._price(tuple(layer.units for layer in self.layers), 0, self.own)
        assert dense is not None
        used = sorted({sharding for sharding, _ in path} - {0})
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
                    solved = Sharding(self.calibration).run(self._at(model, None, dtype)).tables
                except InfeasibleError:
                    continue  # cannot happen to a smaller model unless the search ran out of work
                assert solved is not None
                if all(_shards(solved) != _shards(known) for known in self.shardings):
                    self.shardings.append(solved)

    def _at(self, model: Model, tables: Tables | None, dtype: ExchangeType) -> Program:
        """The program of one phase."""
        workload = replace(self.program.workload, exchange_dtype=dtype)
        return replace(self.program, model=model, workload=workload, tables=tables)

    def _price(self, kept: tuple[int, ...], sharding: int, dtype: ExchangeType) -> tuple[float, int] | None:
        """Seconds of a step and bytes on the fullest rank; None when it does not fit."""
        key = (kept, sharding, dtype)
        if key not in self.prices:
            placed = MemoryAccounting().run(self._at(self.models[kept], self.shardings[sharding], dtype))
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

    def _phases(
        self, path: list[tuple[int, ExchangeType]], number: dict[int, int]
    ) -> tuple[GrowthPhase, ...]:
        made = []
        for i, ((kind, count, _), (sharding, dtype)) in enumerate(zip(self.schedule, path, strict=True)):
            price = self._price(self.kept[i], sharding, dtype)
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
                    sharding=number[sharding],
                    move_bytes=size,
                    move_seconds=seconds,
                )
            )
        return tuple(made)


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
