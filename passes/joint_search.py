"""Formats first: natural choices of formats, each sharded as if it were given, then polished together.

:func:`passes.assignment.joint.solve_joint` starts from the master program's choice, which knows averages only. Here
the formats of all tensors are held in turn to those of :mod:`passes.joint_starts`, sharded by the solver for sharding
alone, and the best are polished with formats free again (:mod:`passes.assignment.polish`). What comes out is no
worse than what came in. :func:`polish` is the same last step for solutions that use memory tiers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ir.errors import InfeasibleError
from passes.assignment import Option, Problem
from passes.assignment.budget import Budget
from passes.assignment.column_generation import Frame
from passes.assignment.compiled import Compiled, compile_problem
from passes.assignment.joint import Joint, left, portion, searched
from passes.assignment.master import Duals, Master
from passes.assignment.polish import Polisher
from passes.assignment.problem import Floats, evaluate_extra
from passes.assignment.relaxation import average_bound
from passes.assignment.solve import finish
from passes.assignment.target_search import Incumbent
from passes.joint import JointProblem
from passes.joint_starts import FormatGroups, Start, natural_starts

# Shares of the budget that is left: of sharding one start, of polishing one placement.
SHARDING, POLISHING = 0.35, 0.5
SHARDED = 2  # starts that are sharded: those of the least bounds
POLISHED = 2  # placements that are polished
ROUNDS = 12  # of polishing a placement, each with another seed
IDLE = 3  # rounds without a gain that end it
GAIN = 1e-4  # relative, of a round
EXACT = 1e-5  # gap to the bound below which nothing is left to gain
POLISH_A_TABLE = (
    0.03  # seconds of work of a round for each table, at least POLISH_LEAST and at most POLISH_MOST
)
POLISH_LEAST, POLISH_MOST = 0.5, 6.0
KEPT, KEPT_FEW, FEW_TABLES = (
    12,
    40,
    64,
)  # options of a table that polishing chooses from, with many tables and few


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """Chosen options with their places, and the sum of the phases in seconds."""

    value: float
    picks: list[Option]
    places: Sequence[Sequence[int]]


def search_formats(problem: JointProblem, joint: Joint, *, budget: Budget, seed: int) -> Joint:
    """A solution no worse than ``joint``; that one where no budget is asked or further resources are in use.

    ``budget`` is of work, and pays for it.
    """
    duals = joint.relaxed.duals
    if not problem.budgets or joint.solution.extra.any():
        return joint
    groups = FormatGroups.of(problem, duals)
    if groups is None:
        return joint
    search = _Search(groups, joint, budget, seed)
    solution = joint.solution
    picks = [joint.problem.options[t][j] for t, j in enumerate(solution.choice)]
    first = Placed(solution.objective, picks, solution.placement)
    found = [first, *search.sharded(first)]
    found.sort(key=lambda placed: placed.value)
    best = min((search.polished(placed) for placed in found[:POLISHED]), key=lambda placed: placed.value)
    return joint if best.value >= first.value else search.joint(best)


class _Search:
    def __init__(self, groups: FormatGroups, joint: Joint, budget: Budget, seed: int) -> None:
        self.groups, self.given, self.budget, self.seed = groups, joint, budget, seed
        self.frame = groups.problem.frame
        self.bound = max(joint.relaxed.bound - self.frame.base, 1e-12)
        self.before = budget.work
        self.rows = self._rows()

    def _rows(self) -> list[tuple[Option, ...]]:
        """Options of each menu that polishing may choose: in use or of the least reduced costs."""
        relaxed, menus = self.given.relaxed, self.groups.problem.menus
        few = len(self.frame.names) <= FEW_TABLES
        ranked: list[list[tuple[float, int]]] = [[] for _ in menus]
        for made, value, (c, o) in zip(relaxed.columns, relaxed.values, relaxed.index, strict=True):
            price = -1.0 if value > 1e-9 else Master.reduced(made, relaxed.duals)
            ranked[c].append((price, o))
        rows = []
        for menu, order, formats in zip(menus, ranked, self.groups.formats, strict=True):
            usable = [menu.options[o] for _, o in sorted(order) if menu.options[o] in formats]
            rows.append(tuple(usable[: KEPT_FEW if few else KEPT]))
        return rows

    def sharded(self, known: Placed) -> list[Placed]:
        """The most hopeful starts, sharded with their formats fixed."""
        ranked: list[tuple[float, Start, Problem]] = []
        for start in natural_starts(self.groups):
            fixed = self._fixed(start)
            try:
                bound = average_bound(compile_problem(fixed))[0]
            except InfeasibleError:
                continue
            if bound < known.value and start != self.groups.start(known.picks):
                ranked.append((bound, start, fixed))
        ranked.sort(key=lambda item: item[:2])
        made: list[Placed] = []
        for _, start, fixed in ranked[:SHARDED]:
            if not left(self.budget):
                break
            try:
                found = searched(fixed, self.budget, SHARDING, seed=self.seed)
            except InfeasibleError:
                continue
            rows = [self.groups.menu(t)[key].options for t, key in enumerate(start)]
            picks = [row[j] for row, j in zip(rows, found.choice, strict=True)]
            made.append(Placed(found.objective, picks, found.placement))
        return made

    def _fixed(self, start: Start) -> Problem:
        """Sharding alone, with the formats given; equal rows stay one object."""
        bare: dict[int, tuple[Option, ...]] = {}
        rows = []
        for t, key in enumerate(start):
            group = self.groups.menu(t)[key]
            if id(group) not in bare:
                bare[id(group)] = tuple(
                    replace(o, cost=(), pieces=tuple(replace(p, extra=()) for p in o.pieces))
                    for o in group.options
                )
            rows.append(bare[id(group)])
        return replace(self.given.problem, options=tuple(rows), limits=(), budgets=())

    def _free(self, picks: Sequence[Option]) -> Problem:
        """The joint problem with the kept options and those in use."""
        made: dict[tuple[int, Option], tuple[Option, ...]] = {}
        rows = []
        for c, pick in zip(self.groups.owner, picks, strict=True):
            row = self.rows[c]
            rows.append(made.setdefault((c, pick), row if pick in row else (*row, pick)))
        return replace(self.given.problem, options=tuple(rows))

    def polished(self, placed: Placed) -> Placed:
        """Options and places improved within the budgets, round by round."""
        problem = self._free(placed.picks)
        compiled = compile_problem(problem)
        duals = self.given.relaxed.duals
        prices = scarcity_prices(compiled, duals)
        choice = [row.index(pick) for row, pick in zip(problem.options, placed.picks, strict=True)]
        best = Incumbent(placed.value, placed.value, choice, [list(places) for places in placed.places])
        part = portion(self.budget, POLISHING)
        polish_rounds(compiled, best, self.bound, prices, part, self.seed)
        self.budget.spend(part.work)
        picks = [row[j] for row, j in zip(problem.options, best.choice, strict=True)]
        return Placed(best.value, picks, best.placement)

    def joint(self, best: Placed) -> Joint:
        """The placement as a joint solution."""
        problem = self._free(best.picks)
        choice = [row.index(pick) for row, pick in zip(problem.options, best.picks, strict=True)]
        placement = [list(places) for places in best.places]
        work = self.budget.work - self.before
        return _joint(self.frame, self.given, problem, choice, placement, work)


def polish(frame: Frame, joint: Joint, *, budget: Budget, seed: int) -> Joint:
    """More rounds of polishing for a solution whose step its phases decide; no worse than ``joint``.

    ``budget`` is of work, and pays for it.
    """
    solution = joint.solution
    if not joint.problem.limits or frame.base + solution.objective < joint.step * (1 - GAIN):
        return joint
    compiled = compile_problem(joint.problem)
    best = Incumbent(
        solution.objective, solution.objective, list(solution.choice), [list(p) for p in solution.placement]
    )
    bound = max(joint.relaxed.bound - frame.base, 1e-12)
    before, prices = budget.work, scarcity_prices(compiled, joint.relaxed.duals)
    polish_rounds(compiled, best, bound, prices, budget, seed)
    found = _joint(frame, joint, joint.problem, best.choice, best.placement, budget.work - before)
    return found if found.step < joint.step else joint


def scarcity_prices(compiled: Compiled, duals: Duals) -> Floats:
    """Seconds that what each option takes of memory, further resources and budgets is worth."""
    prices: Floats = (
        duals.memory * compiled.mean_memory + compiled.mean_extra @ duals.extra + compiled.cost @ duals.cost
    )
    return prices


def polish_rounds(
    compiled: Compiled, best: Incumbent, bound: float, prices: Floats, budget: Budget, seed: int
) -> None:
    """Polish ``best`` in place, each round with another seed, while ``budget`` pays for it."""
    each = max(POLISH_LEAST, min(POLISH_MOST, POLISH_A_TABLE * compiled.tables))
    idle = 0
    for turn in range(ROUNDS):
        if idle == IDLE or not left(budget) or best.value <= bound * (1 + EXACT):
            break
        before, part = best.value, portion(budget, 1.0, each)
        Polisher(compiled, bound, part, seed + turn, prices).refine(best, EXACT)
        budget.spend(part.work)
        idle = idle + 1 if best.value >= before * (1 - GAIN) else 0


def _joint(
    frame: Frame, given: Joint, problem: Problem, choice: list[int], placement: list[list[int]], work: float
) -> Joint:
    """A placement as a joint solution; its limits are checked anew."""
    before = given.solution
    best = Incumbent(choice=choice, placement=placement)
    found = finish(problem, best, before.lower_bound, before.bound_method, before.work + work)
    extra, spent = evaluate_extra(problem, found.choice, found.placement)
    assert (extra <= np.asarray(problem.limits) * (1 + 1e-9)).all(), "a placement exceeds a limit of a rank"
    assert (np.asarray(spent) <= np.asarray(problem.budgets) * (1 + 1e-9)).all(), "a choice exceeds a budget"
    busy = [float(extra[:, e].max()) for e, stretched in enumerate(frame.stretched) if stretched]
    solution = replace(found, extra=extra, spent=spent)
    return replace(
        given, problem=problem, solution=solution, step=max([frame.base + solution.objective, *busy])
    )
