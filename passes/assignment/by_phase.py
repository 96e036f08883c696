"""Several phases: a bound from the rooms, and placements fitted to the rooms at which it is attained.

The linear program at the best leaf of :mod:`passes.assignment.room_bound` says how long each phase should last
and which options then cost least. Rooms found by splitting are held: so many equal pieces fit them and no
more. A share of them is left empty, as whole pieces leave it; the other phases get a margin. Each choice is
placed by :mod:`passes.assignment.fitting`, repaired by :mod:`passes.assignment.overflow`, and the best few
are polished.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from passes.assignment.budget import Budget
from passes.assignment.by_class import improve_by_class
from passes.assignment.compiled import Compiled
from passes.assignment.dual_bound import METHOD, DualBound
from passes.assignment.dual_bound import NODES as DUAL_NODES
from passes.assignment.fitting import fit
from passes.assignment.host_bound import METHOD as BY_CLASS
from passes.assignment.many_tables import choice_with_room
from passes.assignment.overflow import Overflow
from passes.assignment.pair_polish import PairPolish
from passes.assignment.polish import Polisher
from passes.assignment.problem import Floats
from passes.assignment.room_bound import NODES, Leaf, RoomBound
from passes.assignment.starts import MANY_TABLES
from passes.assignment.target_search import Incumbent

SPARE = (0.03, 0.0, 0.06)  # shares of the held rooms left empty
FILL = (0.8, 0.65, 0.5)  # shares of the targets up to which hosts are filled with what loads all their ranks
MARGIN = 0.05  # of the targets over the rooms
HELD = 5e-4  # of the targets over held rooms, which hold no further piece anyway
HOLD = 1e-4  # slack of held rooms in the program
NARROW = 0.01  # pieces may exceed the rooms of the program before by this fraction
DIVES = 6
REPAIRS = 400  # steps of repair for each placement
POLISHED = 2  # placements that are polished
COOL = (0.015, 0.006, 0.003)  # tau of polishing, as a fraction of the bound: the placements are even already
POLISH_LEAST = 2e-3  # relative gap below which polishing is not worth its work
WHOLE_TABLES = 64  # tables up to which the bound is computed with whole options
PAIRS = 0.3  # share of the work for splitting pairs of places, with more than WHOLE_TABLES tables
AGAIN = 0.01  # relative difference of objectives worth another bound, or not worth polishing
PROGRAM_WORK = 2e-5  # seconds an option of a linear program, measured on one core of the development machine


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """A choice, and targets for the placed pieces of each phase in seconds."""

    choice: list[int]
    targets: Floats


def _bound(compiled: Compiled, value: float, budget: Budget) -> tuple[RoomBound, float, Leaf | None]:
    if compiled.tables > MANY_TABLES:
        search: RoomBound = DualBound(compiled, value)
        return search, *search.run(nodes=DUAL_NODES)
    search = RoomBound(compiled, value)
    bound, leaf = search.run(nodes=NODES)
    if search.program.complete:
        budget.spend(PROGRAM_WORK * len(search.program.keep) * search.program.solved)
    return search, bound, leaf


def improve(compiled: Compiled, best: Incumbent, budget: Budget, seed: int, stop: float) -> tuple[float, str]:
    """Improve ``best`` in place; the bound in seconds and what proved it."""
    before = best.value
    search, bound, leaf = _bound(compiled, best.value, budget)
    many = compiled.tables > MANY_TABLES
    method = (
        METHOD if many else "linear program over options and phase lengths, dual feasible functions (GLOP)"
    )
    proposals: list[Proposal] = []
    limited = bool(compiled.problem.limits or compiled.problem.budgets)
    if compiled.tables > WHOLE_TABLES and not many:
        proved, how, placed = _by_class(compiled, best, budget, bound, limited, seed, stop)
        if proved > bound:
            bound, method = proved, how
        if placed:
            return bound, method
    if compiled.tables <= WHOLE_TABLES:
        from passes.assignment.whole_bound import whole_bound  # CP-SAT takes a second to load

        whole = whole_bound(compiled, best.value, seed)
        if whole.bound > bound:
            bound, method = whole.bound, "options and phase lengths, dual feasible functions (CP-SAT)"
        proposals = [_proposal(compiled, choice) for choice in whole.choices[-1:]]
    if best.value <= bound * (1 + max(stop, POLISH_LEAST)):
        return bound, method
    if leaf is not None and many:
        roomy = choice_with_room(compiled, search.incumbent, leaf.point)
        proposals += [] if roomy is None else [Proposal(*roomy)]
    elif leaf is not None:
        proposals += _dives(compiled, search, leaf)
    pairs = 0.0 if compiled.tables <= WHOLE_TABLES or limited else PAIRS
    rest = budget.slice(1.0 - (1.0 if many and pairs else pairs))
    _place(compiled, proposals, best, bound, rest, seed, stop)
    budget.spend(rest.work)
    if pairs:
        PairPolish(compiled, best, seed).run(budget, bound, stop)
    if best.value < before * (1 - AGAIN) and not many:
        bound = max(bound, _bound(compiled, best.value, budget)[1])
    return bound, method


def _by_class(
    compiled: Compiled, best: Incumbent, budget: Budget, bound: float, limited: bool, seed: int, stop: float
) -> tuple[float, str, bool]:
    """Improve ``best`` in place by classes of hosts: a bound, what proved it, and whether there was an improvement."""
    dual = DualBound(compiled, best.value).run(nodes=DUAL_NODES)[0]
    if limited:
        return dual, METHOD, False
    proved, placed = improve_by_class(compiled, best, max(bound, dual), budget, seed, stop)
    return (proved, BY_CLASS, placed) if proved > dual else (dual, METHOD, placed)


def placements(compiled: Compiled, choice: list[int], seed: int) -> Iterator[list[list[int]]]:
    """Whole placements of a choice, as even as single passes make them."""
    proposal, budget = _proposal(compiled, choice), Budget(float("inf"))  # single passes: they end
    for fill in FILL:
        places = fit(compiled, choice, proposal.targets, fill, budget)
        if places is not None:
            repair = Overflow(compiled, choice, places, seed)
            repair.run(proposal.targets, REPAIRS, budget)
            yield repair.place(places)


def _proposal(compiled: Compiled, choice: list[int]) -> Proposal:
    flat = compiled.start[:-1] + np.asarray(choice)
    part = (compiled.share[flat] - compiled.everywhere[flat]).sum(axis=0)
    piece = (compiled.biggest[flat] - compiled.everywhere[flat]).max(axis=0)
    return Proposal(choice, np.maximum(part, piece) * (1 + MARGIN))


def _dives(compiled: Compiled, search: RoomBound, leaf: Leaf) -> Iterator[Proposal]:
    """Whole choices near the leaf's optimum, one for each share of the held rooms left empty."""
    program = search.program
    held = leaf.low > 0
    for spare in SPARE if held.any() and compiled.tables <= MANY_TABLES else SPARE[1:2]:
        program.spare = spare
        high = np.where(held, np.minimum(leaf.point.rooms * (1 + HOLD), leaf.high), leaf.high)
        point = leaf.point
        for _ in range(DIVES):
            narrow = np.minimum(high, np.maximum(point.rooms * (1 + NARROW), leaf.low))
            if spare == 0 and (program.piece * (point.x[:, None] > 1e-7) <= narrow * (1 + 1e-9)).all():
                break
            found = program.solve(leaf.low, narrow)
            if found is None:
                break
            point, high = found, narrow
        program.spare = 0.0
        fits = (program.piece <= np.maximum(high, point.rooms) * (1 + 1e-9)).all(axis=1)
        value = np.where(fits, point.x, -1.0)
        at = [
            int(a + value[a:b].argmax()) for a, b in zip(program.edges[:-1], program.edges[1:], strict=True)
        ]
        choice = [int(o - s) for o, s in zip(program.keep[at], compiled.start[:-1], strict=True)]
        rooms = np.maximum(point.rooms, program.part[at].sum(axis=0)) * search.incumbent
        yield Proposal(choice, rooms * (1 + np.where(held, HELD, MARGIN)))


def _place(
    compiled: Compiled,
    proposals: list[Proposal],
    best: Incumbent,
    bound: float,
    budget: Budget,
    seed: int,
    stop: float,
) -> None:
    """Place the proposals and polish the best placements."""
    placed: list[tuple[float, int, list[int], list[list[int]]]] = []
    for proposal in proposals:
        for fill in FILL if compiled.tables <= MANY_TABLES else FILL[:1]:
            if budget.spent() and placed:
                break
            places = fit(compiled, proposal.choice, proposal.targets, fill, budget)
            if places is None:
                continue
            repair = Overflow(compiled, proposal.choice, places, seed)
            value = repair.run(proposal.targets, REPAIRS, budget)
            placed.append((value, len(placed), proposal.choice, repair.place(places)))
    placed.append((best.value, len(placed), best.choice, best.placement))
    placed.sort(key=lambda entry: entry[:2])
    if compiled.tables > MANY_TABLES:  # pairs of places polish them faster
        best.value, _, best.choice, best.placement = placed[0]
        return
    close = [entry for entry in placed[:POLISHED] if entry[0] <= placed[0][0] * (1 + AGAIN)]
    for k, (value, _, choice, places) in enumerate(close):
        found = Incumbent(value, value, list(choice), [list(row) for row in places])
        part = budget.slice(1.0 / (len(close) - k))
        Polisher(compiled, bound, part, seed).refine(found, stop, COOL)
        budget.spend(part.work)
        if found.value < best.value:
            best.value, best.choice, best.placement = found.value, found.choice, found.placement
