"""Sharding option x number format x tier split: the columns of the joint problem, by class of table.

Tables that cannot be told apart (size, features' statistics, constraints, sensitivity) share a class and a
menu. Formats and sharding options are enumerated; tier splits are made by pricing
(:mod:`passes.tier_options`). Dense tensors are members with one choice of formats each, whose work lies on
every rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from cost_models.calibration import Calibration
from cost_models.embedding import PHASES, state_bytes, stored_bytes, traffic, unit_seconds
from cost_models.memory import unit_memory
from cost_models.pim_tier import pool_prices
from cost_models.tiers import Touched, tiered_unit
from ir.format_plan import LossChange
from ir.ops import EmbeddingTable
from ir.program import Program
from ir.reading import canonical_json, dump_record
from ir.sharding import ShardingOption, largest_units
from ir.tier_plan import PimTile, TableTiers
from ir.topology import MemoryTier
from passes.assignment import Option, Piece
from passes.assignment.column_generation import Menu
from passes.assignment.master import Duals
from passes.format_menu import FormatMenu
from passes.sharding_options import table_options
from passes.sharding_prices import PricedOption, PricedUnit
from passes.tier_options import TierModel

Floats = npt.NDArray[np.float64]

BEST_SPLITS = 2  # columns made for a class in one pricing round


@dataclass(frozen=True, slots=True)
class Chosen:
    """What an option of a table's menu means."""

    priced: PricedOption  # tiers included
    format: str
    state: str
    loss: LossChange
    tiers: TableTiers | None


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A sharding option in a format, all rows in the device."""

    option: ShardingOption
    units: tuple[PricedUnit, ...]
    format: str
    state: str
    loss: LossChange
    cost: tuple[float, ...]


@dataclass(slots=True, eq=False)
class TableClass:
    """Equal tables with their menu; ``meaning[i]`` is what option i stands for."""

    table: EmbeddingTable
    members: tuple[int, ...]
    bases: list[Base]
    touched: Touched | None
    menu: Menu
    tiles: tuple[PimTile, ...] = ()
    meaning: dict[Option, Chosen] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class MenuMaker:
    """Makes the menus of one program; ``budgets`` names the sums that are bounded."""

    program: Program
    calibration: Calibration
    formats: FormatMenu | None
    tiers: TierModel | None
    budgets: tuple[str, ...]  # of "loss", "bits", "bytes"
    scale: tuple[float, ...]
    phases: tuple[str, ...] = PHASES

    def classes(self) -> list[TableClass]:
        """Every class with its first columns; raises InfeasibleError when a table has no option."""
        by_key: dict[str, list[int]] = {}
        for t, table in enumerate(self.program.model.tables):
            by_key.setdefault(self._key(table), []).append(t)
        return [self._class(tuple(members)) for members in by_key.values()]

    def _key(self, table: EmbeddingTable) -> str:
        workload, constraints = self.program.workload, self.program.options.constraints
        facts: dict[str, object] = {
            "shape": (table.rows, table.dim, table.pooling, table.dtype, table.weighted),
            "stats": [dump_record(workload.stats(f)) for f in table.features],
            "dedup": [workload.dedup.get(f, 1.0) for f in table.features],
            "rule": dump_record(constraints.for_table(table.name)),
        }
        if self.formats is not None:
            facts["formats"] = [
                (f, dump_record(self.formats.loss(table.name, f, 1.0))) for f in self._table_formats(table)
            ]
        if self.tiers is not None:
            facts["tiers"] = [tier.name for tier in self.tiers.allowed(table.name)]
        return canonical_json(facts)

    def _table_formats(self, table: EmbeddingTable) -> tuple[str, ...]:
        return self.formats.formats(table.name, "table", table.dtype) if self.formats else (table.dtype,)

    def _state_formats(self, table: EmbeddingTable) -> tuple[str, ...]:
        if self.formats is None or self.program.options.mode != "train":
            return ("fp32",)
        return self.formats.formats(f"{table.name}.state", "state", "fp32")

    def _class(self, members: tuple[int, ...]) -> TableClass:
        table = self.program.model.tables[members[0]]
        bases = [
            self._base(table, option, format, state)
            for option in table_options(
                table, self.program.topology, self.program.workload, self.program.options.constraints
            )
            for format in self._table_formats(table)
            for state in self._state_formats(table)
        ]
        touched = self.tiers.touched(table) if self.tiers else None
        tiles = self.tiers.tiles(table) if self.tiers else ()
        made = TableClass(table, members, bases, touched, Menu(members, []), tiles)
        splits: Iterable[TableTiers | None] = (None,)
        if self.tiers is not None and touched is not None:
            splits = self.tiers.start_splits(table, touched)
        for split in splits:
            for base in bases:
                if split is None or base.option.sharding_type != "data_parallel":
                    self.add(made, base, split)
        return made

    def _base(self, table: EmbeddingTable, option: ShardingOption, format: str, state: str) -> Base:
        topology, workload, mode = self.program.topology, self.program.workload, self.program.options.mode
        stored = replace(table, dtype=format)
        units = tuple(
            PricedUnit(
                unit,
                count,
                unit_seconds(stored, option, unit, topology, workload, self.calibration, mode, state),
                unit_memory(stored, option, unit, topology, workload, mode, state),
            )
            for unit, count in largest_units(option, table.rows, topology.world_size, topology.host_size)
        )
        loss = LossChange(0.0)
        if self.formats is not None:
            weights = self.formats.loss(table.name, format, 1.0)
            moments = self.formats.loss(f"{table.name}.state", state, 1.0)
            loss = LossChange(weights.mean + moments.mean, float(np.hypot(weights.stderr, moments.stderr)))
        return Base(option, units, format, state, loss, self._cost(table, format, state, loss))

    def _cost(self, table: EmbeddingTable, format: str, state: str, loss: LossChange) -> tuple[float, ...]:
        row = stored_bytes(format, table.dim)
        kept = row
        if self.program.options.mode == "train":
            kept += state_bytes(self.program.workload.optimizer, table.dim, state)
        sums = {"loss": max(0.0, loss.mean), "bits": 8 * row * table.rows, "bytes": kept * table.rows}
        return tuple(sums[name] / unit for name, unit in zip(self.budgets, self.scale, strict=True))

    def add(self, made: TableClass, base: Base, split: TableTiers | None) -> Option:
        """Put a base option with a split on the menu (once)."""
        option, chosen = self.option(made, base, split)
        if option not in made.meaning:
            made.meaning[option] = chosen
            made.menu.options.append(option)
        return option

    def option(self, made: TableClass, base: Base, split: TableTiers | None) -> tuple[Option, Chosen]:
        """The option of the joint problem, and what it means."""
        units, pieces = [], []
        for unit in base.units:
            extra: tuple[float, ...] = ()
            if self.tiers is not None and split is not None and made.touched is not None:
                unit, extra = self._tiered(made, base, unit, split)
            units.append(unit)
            load = tuple(unit.seconds.get(phase, 0.0) for phase in self.phases)
            pieces.append(Piece(unit.unit.scope, load, float(sum(unit.memory.values())), unit.count, extra))
        rule = self.program.options.constraints.for_table(made.table.name)
        option = Option(
            label=self._label(base, split),
            pieces=tuple(pieces),
            together=base.option.together,
            allowed_ranks=rule.ranks if base.option.sharding_type == "table_wise" else None,
            cost=base.cost,
        )
        return option, Chosen(
            PricedOption(base.option, tuple(units)), base.format, base.state, base.loss, split
        )

    def _tiered(
        self, made: TableClass, base: Base, unit: PricedUnit, split: TableTiers
    ) -> tuple[PricedUnit, tuple[float, ...]]:
        assert self.tiers is not None
        assert made.touched is not None
        priced = tiered_unit(
            replace(made.table, dtype=base.format),
            unit.unit,
            split,
            made.touched,
            unit.seconds,
            unit.memory,
            self.program.topology,
            self.program.workload,
            self.calibration.row_efficiency,
            base.state,
        )
        taken = self.tiers.taken(priced)
        return replace(unit, seconds=priced.seconds, memory=priced.memory), taken

    def _label(self, base: Base, split: TableTiers | None) -> str:
        label = base.option.label
        if self.formats is not None:
            label += f", {base.format}" + (f" (state {base.state})" if base.state != "fp32" else "")
        if split is not None and split.cache is not None:
            label += f", {split.cache.policy} cache over {split.ranges[0].tier}"
        elif split is not None:
            label += ", " + " + ".join(f"{100 * r.accesses:.3g}% {r.tier}" for r in split.ranges)
        return label

    def best_splits(self, c: int, made: TableClass, duals: Duals) -> list[Option]:
        """The options of a class with the least reduced costs over all splits."""
        if self.tiers is None or made.touched is None or "split" not in self.tiers.request.placements:
            return []
        found = []
        for b, base in enumerate(made.bases):
            if base.option.sharding_type == "data_parallel":
                continue
            for order, tile in enumerate((None, *made.tiles)):
                cost, place = self._price_split(c, made, base, duals, tile)
                found.append((cost, b, order, place, tile))
        found.sort(key=lambda item: item[:3])
        options = []
        for _, b, _, place, tile in found[:BEST_SPLITS]:
            split = self.tiers.split(made.table, made.touched, place, tile)
            option, chosen = self.option(made, made.bases[b], split)
            made.meaning.setdefault(option, chosen)
            options.append(option)
        return options

    def _price_split(
        self, c: int, made: TableClass, base: Base, duals: Duals, tile: PimTile | None
    ) -> tuple[float, list[int]]:
        """(reduced cost but for the class's own dual, tier of each group) of the best split.

        Without a tile no rows are pooled. With one they need not be: the split without is priced on its own.
        """
        assert self.tiers is not None
        assert made.touched is not None
        tiers, topology = self.tiers, self.program.topology
        train = self.program.options.mode == "train"
        allowed = [t for t in tiers.allowed(made.table.name) if tile is not None or not tiers.pooling(t)]
        spread = {"rank": 1 / topology.world_size, "host": 1 / topology.hosts, "all": 1.0}
        cost = float(duals.cost @ np.array(base.cost)) if base.cost else 0.0
        once = 0.0  # where rows are pooled
        prices = np.zeros((len(allowed) + 1, len(made.touched.rows)))
        for position, unit in enumerate(base.units):
            mean = spread[unit.unit.scope] * unit.count
            load = np.array([unit.seconds.get(phase, 0.0) for phase in self.phases])
            worst = duals.largest[c] * (position == 0)  # the widest unit comes first
            weight = duals.phase * mean + worst
            cost += float(weight @ load)
            other = sum(v for k, v in unit.memory.items() if k not in ("weights", "optimizer"))
            cost += duals.memory * mean * other
            share = unit.unit.blocks[0].rows / made.table.rows
            width = unit.unit.blocks[0].cols
            size = stored_bytes(base.format, width)
            size += state_bytes(self.program.workload.optimizer, width, base.state) if train else 0.0
            prices[0] += duals.memory * mean * share * size * made.touched.rows
            for j, tier in enumerate(allowed, start=1):
                if tile is not None and tiers.pooling(tier):
                    groups, first = self._pooled(made, base, unit, tier, tile, duals, mean, weight)
                    prices[j] += groups
                    once += first
                else:
                    stored = duals.extra[tiers.bytes_row(tier)] * mean * share * size
                    fetch = self._fetched(tier, size, duals, mean, weight)
                    prices[j] += stored * made.touched.rows + fetch * share * made.touched.touched
        place = prices.argmin(axis=0)
        total = cost + float(prices.min(axis=0).sum())
        if any(j and tiers.pooling(allowed[int(j) - 1]) for j in place):
            total += once
        names = [0, *(tiers.tiers.index(tier) + 1 for tier in allowed)]
        return total, [names[int(j)] for j in place]

    def _fetched(self, tier: MemoryTier, size: float, duals: Duals, mean: float, weight: Floats) -> float:
        """Price of a distinct row of ``size`` bytes fetched from a tier a step."""
        assert self.tiers is not None
        device, efficiency = self.program.topology.device.tiers[0], self.calibration.row_efficiency
        fetch = float(duals.extra @ self.tiers.per_touched(tier, size)) * mean
        fetch += duals.memory * mean * self.tiers.depth[tier.name] * size
        fetch += weight[self.phases.index("lookup_forward")] * size / device.write_bandwidth / efficiency
        if self.program.options.mode == "train":
            fetch += weight[self.phases.index("lookup_backward")] * size / device.read_bandwidth / efficiency
        return float(fetch)

    def _pooled(
        self,
        made: TableClass,
        base: Base,
        unit: PricedUnit,
        tier: MemoryTier,
        tile: PimTile,
        duals: Duals,
        mean: float,
        weight: Floats,
    ) -> tuple[Floats, float]:
        """(price of each group, price of there being any) where a tier's processors pool the rows."""
        assert self.tiers is not None
        assert made.touched is not None
        device, efficiency = self.program.topology.device.tiers[0], self.calibration.row_efficiency
        block = unit.unit.blocks[0]
        asked = traffic(made.table, base.option, unit.unit, self.program.topology, self.program.workload)
        price = pool_prices(tier, tile, block.cols, asked.outputs)
        read, first = self.tiers.per_read(tier, price)
        forward = weight[self.phases.index("lookup_forward")]
        stored = (
            duals.extra[self.tiers.bytes_row(tier)] * mean * block.rows / made.table.rows * price.row_bytes
        )
        each = float(duals.extra @ read) * mean * asked.ids - forward * unit.seconds["lookup_forward"]
        once = float(duals.extra @ first) * mean
        once += duals.memory * mean * self.tiers.depth[tier.name] * price.sums
        arrive = 1 / device.write_bandwidth + 1 / device.read_bandwidth
        once += forward * price.sums * arrive / efficiency
        return stored * made.touched.rows + each * made.touched.accesses, once
