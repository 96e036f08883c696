"""Small problems by CP-SAT, from a known solution or none: options, places and every limit in one model.

For at most ``CELLS`` (option, place) pairs; the search is deterministic (one worker, a limit on deterministic
time). Loads are rounded to ``UNITS`` parts of the known objective, resources and shares up to as many parts of
their limits, so what it finds keeps every limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ortools.sat.python import cp_model

from passes.assignment.budget import Budget
from passes.assignment.compiled import HOST, Compiled, Group
from passes.assignment.target_search import Incumbent

CELLS = 6000
UNITS = 10**6
WORK = 20.0  # deterministic seconds at most
SHARE = 0.25  # of the budget that is left


def improve(compiled: Compiled, best: Incumbent, budget: Budget, seed: int) -> Incumbent | None:
    """A better solution than ``best`` (any, if that has no placement), or None.

    None when there is none, when none was found, or when the problem is too large.
    """
    problem = compiled.problem
    plain = all(choice.plain for options in compiled.choices for choice in options)
    cells = sum(len(c.groups) * problem.ranks for options in compiled.choices for c in options)
    if not plain or cells > CELLS or best.value <= 0:
        return None
    model = _Model(compiled, best)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed
    solver.parameters.max_deterministic_time = min(SHARE * max(0.0, budget.limit - budget.work), WORK)
    status = solver.solve(model.model)
    budget.spend(solver.response_proto.deterministic_time)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    return model.read(solver)


def _worst(compiled: Compiled) -> float:
    loads = [
        max(c.fixed + sum(g.load * g.copies for g in c.groups) for c in options)
        for options in compiled.choices
    ]
    return max(sum(loads), 1e-300)


class _Model:
    def __init__(self, compiled: Compiled, best: Incumbent) -> None:
        self.compiled, self.model = compiled, cp_model.CpModel()
        problem = compiled.problem
        model, ranks = self.model, range(problem.ranks)
        self.take: list[list[cp_model.IntVar]] = []
        self.place: dict[tuple[int, int, int], list[cp_model.IntVar]] = {}
        # without a known solution, one that puts the worst option of every table on one rank
        reference = best.value if best.placement else float(_worst(compiled))
        scale = UNITS / reference
        phases, limits = len(problem.phases), len(problem.limits)
        load: list[list[list[tuple[int, cp_model.IntVar]]]] = [[[] for _ in range(phases)] for _ in ranks]
        used: list[list[list[tuple[int, cp_model.IntVar]]]] = [[[] for _ in range(limits + 1)] for _ in ranks]
        for t, options in enumerate(compiled.choices):
            take = [model.new_bool_var("") for _ in options]
            model.add_exactly_one(take)
            self.take.append(take)
            for j, choice in enumerate(options):
                model.add_hint(take[j], int(best.choice[t] == j))
                if not compiled.usable[int(compiled.start[t]) + j]:
                    model.add(take[j] == 0)
                everywhere = (choice.fixed_memory, *choice.fixed_extra)
                fixed = compiled.everywhere[int(compiled.start[t]) + j]
                for r in ranks:
                    for p in range(phases):
                        load[r][p].append((round(float(fixed[p]) * scale), take[j]))
                    for e, amount in enumerate(self._parts(everywhere)):
                        used[r][e].append((amount, take[j]))
                for g, group in enumerate(choice.groups):
                    hint = best.placement[t] if best.placement and best.choice[t] == j else []
                    self._group(t, j, g, group, take[j], hint, load, used, scale)
        longest = [model.new_int_var(0, 4 * UNITS, "") for _ in range(phases)]
        for r in ranks:
            for p in range(phases):
                model.add(sum(c * v for c, v in load[r][p] if c) <= longest[p])
            for e in range(limits + 1):
                model.add(sum(c * v for c, v in used[r][e] if c) <= UNITS)
        for b, budget in enumerate(problem.budgets):
            model.add(
                sum(
                    math.ceil(choice.cost[b] / budget * UNITS) * self.take[t][j]
                    for t, options in enumerate(compiled.choices)
                    for j, choice in enumerate(options)
                    if compiled.usable[int(compiled.start[t]) + j]
                )
                <= UNITS
            )
        model.add(sum(longest) <= UNITS)
        model.minimize(sum(longest))

    def _parts(self, amounts: Sequence[float]) -> list[int]:
        """Bytes and further resources in parts of their limits, rounded up."""
        problem = self.compiled.problem
        whole = (problem.capacity, *problem.limits)
        return [
            math.ceil(min(a / limit, 2.0) * UNITS - 1e-6) if limit > 0 else (0 if a <= 0 else 2 * UNITS)
            for a, limit in zip(amounts, whole, strict=True)
        ]

    def _group(
        self,
        t: int,
        j: int,
        g: int,
        group: Group,
        take: cp_model.IntVar,
        hint: Sequence[int],
        load: list[list[list[tuple[int, cp_model.IntVar]]]],
        used: list[list[list[tuple[int, cp_model.IntVar]]]],
        scale: float,
    ) -> None:
        problem = self.compiled.problem
        places = problem.hosts if group.scope == HOST else problem.ranks
        size = problem.host_size
        here = [self.model.new_int_var(0, group.copies, "") for _ in range(places)]
        self.place[t, j, g] = here
        self.model.add(sum(here) == group.copies * take)
        at = list(hint[group.first : group.first + group.copies])
        parts = self._parts((group.memory, *group.extra))
        for place, count in enumerate(here):
            self.model.add_hint(count, at.count(place))
            for r in range(place * size, (place + 1) * size) if group.scope == HOST else (place,):
                for p, seconds in enumerate(group.phases):
                    load[r][p].append((round(seconds * scale), count))
                for e, amount in enumerate(parts):
                    used[r][e].append((amount, count))

    def read(self, solver: cp_model.CpSolver) -> Incumbent:
        """The solution's choice and placement; its value is left to the caller."""
        choice, placement = [], []
        for t, take in enumerate(self.take):
            j = next(j for j, variable in enumerate(take) if solver.value(variable))
            option = self.compiled.choices[t][j]
            places = [-1] * option.size
            for g, group in enumerate(option.groups):
                at = [
                    place
                    for place, count in enumerate(self.place[t, j, g])
                    for _ in range(solver.value(count))
                ]
                places[group.first : group.first + group.copies] = at
            choice.append(j)
            placement.append(places)
        return Incumbent(choice=choice, placement=placement)
