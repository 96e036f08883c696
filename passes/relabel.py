"""Relabel: name the ranks of a new plan so that as little as possible moves from an old one.

Ranks of a host do the same work in any order, and so do hosts, as far as the plan is concerned; which of the
equal ranks takes which part is free. Blocks of one rank may be exchanged between the ranks of a host, whole
hosts with all their blocks between each other. Row-wise tables stay: their geometry names the ranks, and every
rank holds as much of them. The names with the largest overlap are two nested assignment problems, solved by
OR-Tools' linear sum assignment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ir.plan import EVERY_RANK, TablePlan, common_weights
from ir.program import Program

_BY_RANK = frozenset({"table_wise", "column_wise", "table_column_wise"})
_BY_HOST = frozenset({"table_row_wise", "grid_shard"})
Overlap = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Relabel:
    """Exchange ranks so that the tables of ``old`` move least.

    Attributes:
        old: the decisions that are in force.
        survivors: for each rank of the new machine the rank it had in the old one, -1 for a new rank.
        pinned: names of tables whose ranks the user has fixed; nothing moves when there is one.
    """

    name: ClassVar[str] = "relabel"
    old: tuple[TablePlan, ...]
    survivors: tuple[int, ...]
    pinned: frozenset[str] = frozenset()

    def run(self, program: Program) -> Program:
        """The same plan with its ranks renamed."""
        assert program.tables is not None, "sharding runs before relabelling"
        if self.pinned or program.topology.world_size == 1:
            return program
        size, hosts = program.topology.host_size, program.topology.hosts
        old = {table.name: table for table in self.old}
        by_rank = self._overlap(program.tables, old, _BY_RANK)
        by_host = self._overlap(program.tables, old, _BY_HOST)
        worth = np.zeros((hosts, hosts), np.int64)
        inner: dict[tuple[int, int], list[int]] = {}
        for made in range(hosts):
            for place in range(hosts):
                block = np.s_[made * size : (made + 1) * size, place * size : (place + 1) * size]
                inner[made, place] = assign(by_rank[block])
                kept = by_rank[block][range(size), inner[made, place]].sum()
                # host-wise blocks keep their order inside the host
                worth[made, place] = kept + np.trace(by_host[block])
        of_host = assign(worth)
        of_rank = {
            made * size + i: of_host[made] * size + j
            for made in range(hosts)
            for i, j in enumerate(inner[made, of_host[made]])
        }
        moved = {made * size + i: of_host[made] * size + i for made in range(hosts) for i in range(size)}
        tables = tuple(_renamed(table, of_rank, moved) for table in program.tables)
        return replace(program, tables=tables)

    def _overlap(
        self, tables: tuple[TablePlan, ...], old: Mapping[str, TablePlan], types: frozenset[str]
    ) -> Overlap:
        """Weights that rank i of the new plan shares with what place j already holds."""
        world = len(self.survivors)
        place = {was: now for now, was in enumerate(self.survivors) if was >= 0}
        shared = np.zeros((world, world), np.int64)
        for table in tables:
            before = old.get(table.name)
            if before is None or table.sharding_type not in types:
                continue
            for shard in table.shards:
                for held in before.shards:
                    if held.rank == EVERY_RANK:
                        continue  # every survivor has it: no place is better than another
                    if held.rank in place:
                        shared[shard.rank, place[held.rank]] += common_weights(shard, held)
        return shared


def assign(worth: Overlap) -> list[int]:
    """The column of each row in the assignment with the largest sum; ties go to the diagonal."""
    from ortools.graph.python.linear_sum_assignment import SimpleLinearSumAssignment

    size = len(worth)
    # scaled so that staying in place decides ties and nothing else
    cost = -(worth * (size + 1) + np.eye(size, dtype=np.int64))
    solver = SimpleLinearSumAssignment()
    rows, columns = np.divmod(np.arange(size * size), size)
    solver.add_arcs_with_cost(rows, columns, cost.ravel())
    solver.solve()
    return [int(solver.right_mate(row)) for row in range(size)]


def _renamed(table: TablePlan, of_rank: Mapping[int, int], of_host: Mapping[int, int]) -> TablePlan:
    if table.sharding_type in _BY_RANK:
        names = of_rank
    elif table.sharding_type in _BY_HOST:
        names = of_host
    else:
        return table
    return replace(table, shards=tuple(replace(shard, rank=names[shard.rank]) for shard in table.shards))
