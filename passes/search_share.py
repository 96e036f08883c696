"""How the passes that search share the time limit of a compilation: in equal parts.

The plan's own sharding is searched for always, that of groups of tables, of the smaller models of growth and pruning and
inside towers where they are asked for. Whoever searches several times divides its part.
"""

from __future__ import annotations

from ir.constraints import Constraints
from ir.program import Program


def stages(constraints: Constraints) -> int:
    """The passes that search under these constraints."""
    groups = constraints.dense is not None and bool(constraints.dense.sparse_groups)
    return 1 + sum((groups, constraints.growth is not None, constraints.towers is not None))


def search_limit(program: Program) -> float:
    """The part of the time limit that one pass has, about seconds of deterministic work."""
    return program.options.time_limit / stages(program.options.constraints)
