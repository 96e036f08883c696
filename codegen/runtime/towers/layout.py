"""Who holds, sends and receives what in a tower exchange, computed once from the plan.

Rank ``r`` of a world of W ranks in T towers of G = W / T ranks is member ``r % G`` of tower ``r // G``. Its
peers are the ranks with the same ``r % G``.
"""

from __future__ import annotations

from dataclasses import dataclass

from ir.errors import InputError
from ir.plan import Plan, Shard, TablePlan
from ir.towers import TowerDecision


@dataclass(frozen=True, slots=True)
class Slot:
    """Ids of one feature that a rank is sent: those of rows ``row`` to ``row + rows - 1``."""

    feature: str
    row: int
    rows: int
    whole: bool  # all rows of the table: no id has to be filtered


@dataclass(frozen=True, slots=True)
class Held:
    """A shard on a rank, and the slots (one a feature of its table) that are looked up in it."""

    table: str
    shard: Shard
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of a rank's lookup output: ``cols`` of ``feature`` from ``col``, of rows from ``row``."""

    feature: str
    row: int
    col: int
    cols: int


@dataclass(frozen=True, slots=True)
class TowerLayout:
    """The static shape of one model's tower exchange.

    Attributes:
        world, members: W and G.
        features: of each tower, in the order of its output.
        dims: columns of each feature.
        slots, held: of each rank.
    """

    world: int
    members: int
    features: tuple[tuple[str, ...], ...]
    dims: dict[str, int]
    slots: tuple[tuple[Slot, ...], ...]
    held: tuple[tuple[Held, ...], ...]

    @property
    def towers(self) -> int:
        """T."""
        return self.world // self.members

    def width(self, tower: int) -> int:
        """Columns of a tower's features."""
        return sum(self.dims[feature] for feature in self.features[tower])

    def columns(self, rank: int) -> tuple[Columns, ...]:
        """What a rank's lookups put out, left to right."""
        return tuple(
            Columns(self.slots[rank][slot].feature, held.shard.row, held.shard.col, held.shard.cols)
            for held in self.held[rank]
            for slot in held.slots
        )


def tower_layout(plan: Plan, decision: TowerDecision) -> TowerLayout:
    """The layout of a plan.

    Raises:
        InputError: a table is sharded over ranks outside its tower, or copied to every rank.
    """
    world, members = plan.world_size, decision.towers[0].ranks
    slots: list[list[Slot]] = [[] for _ in range(world)]
    held: list[list[Held]] = [[] for _ in range(world)]
    dims: dict[str, int] = {}
    for number, tower in enumerate(decision.towers):
        for name in tower.tables:
            table = plan.tables[name]
            dims.update(dict.fromkeys(table.features, table.dim))
            for shard in sorted(table.shards, key=lambda s: (s.row, s.col)):
                if shard.rank < 0 or shard.rank // members != number:
                    raise InputError(
                        f"table {name!r} of tower {number} has a shard on rank {shard.rank}, outside the tower; "
                        "compile the plan again"
                    )
                if shard.rows and shard.cols:
                    _hold(table, shard, slots[shard.rank], held[shard.rank])
    return TowerLayout(
        world=world,
        members=members,
        features=tuple(tower.features for tower in decision.towers),
        dims=dims,
        slots=tuple(map(tuple, slots)),
        held=tuple(map(tuple, held)),
    )


def _hold(table: TablePlan, shard: Shard, slots: list[Slot], held: list[Held]) -> None:
    """Note a shard on its rank; column blocks of the same rows share the ids."""
    wanted = [Slot(f, shard.row, shard.rows, shard.rows == table.rows) for f in table.features]
    for slot in wanted:
        if slot not in slots:
            slots.append(slot)
    held.append(Held(table.name, shard, tuple(slots.index(slot) for slot in wanted)))


def assembly(layout: TowerLayout, tower: int) -> list[tuple[list[int], list[int]]]:
    """How the members' outputs, side by side in member order, become the tower's features.

    Returns:
        Layers of (source columns, target columns). The first covers every target once, in order; the
        others are partial sums of further row blocks, to be added.

    Raises:
        InputError: columns of a feature are on no rank.
    """
    start: dict[str, int] = {}
    reached = 0
    for feature in layout.features[tower]:
        start[feature] = reached
        reached += layout.dims[feature]
    sources: list[list[int]] = [[] for _ in range(reached)]  # of each target column, one a row block
    position = 0
    for member in range(layout.members):
        for part in layout.columns(tower * layout.members + member):
            for column in range(part.cols):
                sources[start[part.feature] + part.col + column].append(position + column)
            position += part.cols
    if not all(sources):
        raise InputError(f"tower {tower} has columns that no rank holds; compile the plan again")
    layers = []
    for depth in range(max(map(len, sources))):
        targets = [target for target, found in enumerate(sources) if len(found) > depth]
        layers.append(([sources[target][depth] for target in targets], targets))
    return layers
