"""Choices of options to start from: the relaxation at several targets, and the simple plans."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from passes.assignment.compiled import Compiled
from passes.assignment.problem import Floats
from passes.assignment.relaxation import piece_floor, relax

# Tables beyond which, with several phases, boxes are solved through their duals alone and packings are not searched
MANY_TABLES = 3000
# Pieces up to these multiples of the bound: small ones pack better, large ones cost less.
LIMITS = (1.0, 1.05, 1.15, 1.4, 0.7, 0.5, 0.35, 0.2, 0.1)
SWEPT = (0.1, 1.1)  # multiples of the bound between which the sizes of pieces are swept
SWEEPS = 20  # sizes at most
ROOM = (0.0, 0.002, 0.01)  # excess over the bound at which a piece may stand beside the fixed load
WHOLE_SHARES = (0.995, 0.99, 0.98, 0.95)  # of the memory that such a choice may use on average
WHOLE_NODES = 2000  # of the search for it
WHOLE_GAP = 1e-3  # relative, at which it stops
COMMON = 0.9  # an option label that this share of the tables has makes a uniform plan


def relaxed_choices(compiled: Compiled, bound: float) -> list[list[int]]:
    """Least-average choices among options whose pieces stay below several multiples of the bound."""
    floor = piece_floor(compiled)
    made: list[list[int]] = []
    least = np.minimum.reduceat(np.where(compiled.usable, floor, np.inf), compiled.start[:-1])
    for limit in LIMITS:
        allowed = compiled.usable & (floor <= np.maximum(limit * bound, least)[compiled.table] * (1 + 1e-9))
        choice = list(map(int, relax(compiled, allowed).choice - compiled.start[:-1]))
        if choice not in made:
            made.append(choice)
    return made


def swept_choices(compiled: Compiled, bound: float) -> list[list[int]]:
    """Least-average choices without pieces above a size, for the sizes that there are around the bound."""
    size = compiled.total_biggest
    near = compiled.usable & (size >= SWEPT[0] * bound) & (size <= SWEPT[1] * bound)
    sizes = np.unique(size[near])
    least = np.minimum.reduceat(np.where(compiled.usable, size, np.inf), compiled.start[:-1])
    made: list[list[int]] = []
    for limit in sizes[np.unique(np.linspace(0, len(sizes) - 1, SWEEPS).astype(int))] if len(sizes) else []:
        allowed = compiled.usable & (size <= np.maximum(limit, least)[compiled.table] * (1 + 1e-12))
        choice = list(map(int, relax(compiled, allowed).choice - compiled.start[:-1]))
        if choice not in made:
            made.append(choice)
    return made


def roomy_choices(compiled: Compiled, bound: float) -> list[list[int]]:
    """Least-average choices whose largest piece fits beside what the choice puts on every rank.

    The bound looks at pieces alone, so the choice that attains it may hold a piece that no rank has
    room for. The fixed load is taken from the choice before, a few times over.
    """
    fixed = compiled.everywhere.sum(axis=1)
    piece = compiled.total_biggest - fixed
    made: list[list[int]] = []
    for excess in ROOM:
        chosen = relax(compiled, compiled.usable).choice
        for _ in range(3):
            room = bound * (1 + excess) - float(fixed[chosen].sum())
            least = np.minimum.reduceat(np.where(compiled.usable, piece, np.inf), compiled.start[:-1])
            allowed = compiled.usable & (piece <= np.maximum(room, least)[compiled.table])
            chosen = relax(compiled, allowed).choice
        choice = [int(j) for j in chosen - compiled.start[:-1]]
        if choice not in made:
            made.append(choice)
    return made


def memory_choices(compiled: Compiled, bound: float) -> list[list[int]]:
    """Where memory binds: choices of the least average that leave a share of it for packing, in whole options.

    The relaxation may split a large table, and rounds equal tables all one way. A mixed-integer program counts how many
    of each set of equal tables take each option (the multiple-choice knapsack problem; solved by SCIP).
    """
    from ortools.linear_solver import pywraplp  # takes a second to load

    floor = piece_floor(compiled)
    least = np.minimum.reduceat(np.where(compiled.usable, floor, np.inf), compiled.start[:-1])
    allowed = compiled.usable & (floor <= np.maximum(bound, least)[compiled.table] * (1 + 1e-9))
    classes: dict[int, list[int]] = {}
    for t in range(compiled.tables):
        classes.setdefault(id(compiled.choices[t]), []).append(t)  # compile_problem shares equal ones
    made: list[list[int]] = []
    for share in WHOLE_SHARES:
        solver = pywraplp.Solver.CreateSolver("SCIP")
        solver.SetSolverSpecificParametersAsString(
            f"limits/nodes = {WHOLE_NODES}\nlimits/gap = {WHOLE_GAP}\n"
        )
        memory = solver.Constraint(-solver.infinity(), share)
        objective = solver.Objective()
        objective.SetMinimization()
        counts = []
        for members in classes.values():
            first = int(compiled.start[members[0]])
            whole = solver.Constraint(float(len(members)), float(len(members)))
            row = []
            for o in range(first, int(compiled.start[members[0] + 1])):
                count = solver.IntVar(0, float(len(members)) if allowed[o] else 0.0, "")
                whole.SetCoefficient(count, 1.0)
                memory.SetCoefficient(count, float(compiled.mean_memory[o] / compiled.problem.capacity))
                objective.SetCoefficient(count, float(compiled.total_share[o] / bound))
                row.append(count)
            counts.append((members, row))
        if solver.Solve() not in (pywraplp.Solver.OPTIMAL, pywraplp.Solver.FEASIBLE):
            continue
        choice = [0] * compiled.tables
        for members, row in counts:
            options = [j for j, count in enumerate(row) for _ in range(round(count.solution_value()))]
            for t, j in zip(members, options, strict=True):
                choice[t] = j
        if choice not in made:
            made.append(choice)
    return made


def uniform_choices(compiled: Compiled, fallback: list[int]) -> list[list[int]]:
    """The same option for every table that has it, as simple planners do."""
    problem = compiled.problem
    counts = Counter(label for options in problem.options for label in {option.label for option in options})
    made = []
    for label, count in sorted(counts.items()):
        if count < COMMON * compiled.tables:
            continue
        choice = list(fallback)
        for t, options in enumerate(problem.options):
            for j, option in enumerate(options):
                if option.label == label and compiled.usable[compiled.start[t] + j]:
                    choice[t] = j
        made.append(choice)
    return made


def threshold_choice(compiled: Compiled, sweeps: int = 3, levels: int = 10) -> list[int] | None:
    """A choice for several phases: least average load among pieces below a threshold in each phase.

    A phase costs the larger of its average and of its largest piece. The thresholds are lowered one
    phase at a time wherever that estimate falls.
    """
    phases = compiled.share.shape[1]
    limits = np.full(phases, np.inf)
    best = _estimate(compiled, limits)
    if best is None:
        return None
    for _ in range(sweeps):
        before = best[0]
        for p in range(phases):
            _, _, peak, average = best
            if peak[p] <= 0:
                continue
            low = max(float(average[p]), 1e-3 * float(peak[p]))
            for threshold in np.geomspace(low, max(float(peak[p]), low), levels)[:-1]:
                trial = limits.copy()
                trial[p] = threshold
                made = _estimate(compiled, trial)
                if made is not None and made[0] < best[0]:
                    best, limits = made, trial
        if best[0] >= before * (1 - 1e-6):
            break
    return [int(j) for j in best[1] - compiled.start[:-1]]


def _estimate(compiled: Compiled, limits: Floats) -> tuple[float, NDArray[np.int64], Floats, Floats] | None:
    """(sum over phases of max(average, largest piece), flat choice, largest pieces, averages)."""
    allowed = compiled.usable & (compiled.biggest <= limits[None, :] * (1 + 1e-12)).all(axis=1)
    relaxed = relax(compiled, allowed)
    if not np.isfinite(relaxed.value):
        return None
    fixed = compiled.everywhere[relaxed.choice]
    peak = (compiled.biggest[relaxed.choice] - fixed).max(axis=0) + fixed.sum(axis=0)
    average = compiled.share[relaxed.choice].sum(axis=0)
    return float(np.maximum(peak, average).sum()), relaxed.choice, peak, average
