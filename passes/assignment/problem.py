"""The problem and its answer.

The problem's records live in :mod:`ir.assignment`, where cost models may state them too; this module
re-exports them and adds the solution.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ir.assignment import Option, Piece, Problem, Scope

__all__ = ["Option", "Piece", "Problem", "Scope", "Solution", "evaluate", "evaluate_extra"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A placement with a proved bound.

    Attributes:
        choice: option index of each table.
        placement: for each table the rank ("rank"), host ("host") or -1 ("all") of each piece, pieces in
            the option's order, each repeated ``count`` times.
        objective: sum of ``phase_max``, seconds.
        phase_max: largest load of any rank in each phase, seconds.
        lower_bound: no solution of the problem has a smaller objective.
        status: "optimal" when objective and bound agree to 1e-6, else "feasible".
        bound_method: what proved the bound.
        loads: seconds, shape (ranks, phases).
        memory: bytes, shape (ranks,).
        work: deterministic solver work spent, about seconds.
        extra: further resources used, shape (ranks, resources).
        spent: of each budget.
    """

    choice: tuple[int, ...]
    placement: tuple[tuple[int, ...], ...]
    objective: float
    phase_max: tuple[float, ...]
    lower_bound: float
    status: Literal["optimal", "feasible"]
    bound_method: str
    loads: Floats
    memory: Floats
    work: float = 0.0
    extra: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    spent: tuple[float, ...] = ()

    @property
    def gap(self) -> float:
        """(objective - lower bound) / objective, a fraction of 1."""
        return 0.0 if self.objective <= 0 else max(0.0, 1.0 - self.lower_bound / self.objective)


def evaluate(
    problem: Problem, choice: tuple[int, ...] | list[int], placement: tuple[tuple[int, ...], ...]
) -> tuple[Floats, Floats]:
    """Loads (ranks, phases) in seconds and memory (ranks,) in bytes of a placement, from its definition."""
    size = problem.host_size
    loads = np.zeros((problem.ranks, len(problem.phases)))
    memory = np.zeros(problem.ranks)
    for options, chosen, places in zip(problem.options, choice, placement, strict=True):
        cursor = 0
        for piece in options[chosen].pieces:
            if piece.scope == "all":
                loads += np.asarray(piece.load) * piece.count
                memory += piece.memory * piece.count
                cursor += piece.count
                continue
            for place in places[cursor : cursor + piece.count]:
                where = slice(place, place + 1)
                if piece.scope == "host":
                    where = slice(place * size, (place + 1) * size)
                loads[where] += piece.load
                memory[where] += piece.memory
            cursor += piece.count
    return loads, memory


def evaluate_extra(
    problem: Problem, choice: tuple[int, ...] | list[int], placement: tuple[tuple[int, ...], ...]
) -> tuple[Floats, tuple[float, ...]]:
    """Further resources (ranks, resources) and spent budgets of a placement, from its definition."""
    size = problem.host_size
    extra = np.zeros((problem.ranks, len(problem.limits)))
    spent = np.zeros(len(problem.budgets))
    for options, chosen, places in zip(problem.options, choice, placement, strict=True):
        spent += options[chosen].cost or 0.0
        cursor = 0
        for piece in options[chosen].pieces:
            for place in places[cursor : cursor + piece.count] if piece.extra else ():
                where = {
                    "rank": slice(place, place + 1),
                    "host": slice(place * size, (place + 1) * size),
                    "all": slice(None),
                }[piece.scope]
                extra[where] += piece.extra
            cursor += piece.count
    return extra, tuple(float(x) for x in spent)
