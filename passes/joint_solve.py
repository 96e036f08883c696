"""A placed solution of the joint problem, under the best format of embedding traffic.

:func:`passes.assignment.joint.solve_joint` places one choice that fits the averages of all ranks. Where it ends far from
the bound, or finds nothing, others are tried here: choices that leave memory to spare, and longer and shorter steps.
"""

from __future__ import annotations

import math
from dataclasses import replace

from cost_models.calibration import Calibration
from ir.errors import InfeasibleError
from ir.format_plan import FormatRequest
from ir.program import Program
from passes.assignment.budget import Budget
from passes.assignment.column_generation import Relaxation
from passes.assignment.joint import Joint, portion, solve_joint
from passes.joint import JointProblem, relax_all

WIDE = 1.1  # ratio of step and bound from which other choices are tried
ROOM = (1.0, 0.9, 0.8)  # of every rank's memory that they fill on average
LONGER = (3.0, 6.0, 12.0)  # of the bound: lengths of the step that are tried when none shorter is kept
HALVINGS = 5  # of the gap between step and bound, where a further resource decides the step
CLOSE = 1.05  # ratio of step and bound at which that ends
BUSY = 0.99  # of the step: a resource as busy as that decides it
# Shares of the budget that is left at each point; what a search does not need the next ones have.
TRAFFIC = 0.6  # for one format of traffic
CHOICE = 0.6  # of that, for one choice; the rest for others and for longer or shorter steps
LENGTH = 0.5  # of what is left of it, for one length of the step


def best_traffic(
    program: Program,
    calibration: Calibration,
    *,
    step: float | None = None,
    request: FormatRequest | None = None,
    enough: bool = False,
    budget: Budget | None = None,
) -> tuple[JointProblem, Joint, float]:
    """The best of all formats of embedding traffic: problem, solution, and the bound over all of them.

    With ``enough`` any plan that keeps ``step`` will do: the search stops there. Searches share ``budget``, by default
    the program's time limit.
    """
    budget = budget if budget is not None else Budget(program.options.time_limit)
    stated, refused = relax_all(program, calibration, step=step, request=request)
    if not stated:
        assert refused is not None
        raise refused
    best: tuple[JointProblem, Joint] | None = None
    for problem, relaxed in stated:
        if best is not None and relaxed.bound >= best[1].step:
            break
        part = portion(budget, TRAFFIC)
        try:
            joint = _solve(program, problem, relaxed, part, enough=enough)
        except InfeasibleError as error:
            refused = error
            continue
        finally:
            budget.spend(part.work)
        if best is None or joint.step < best[1].step:
            best = problem, joint
        if enough and step is not None and best[1].step <= step:
            break
    if best is None:
        assert refused is not None
        raise refused
    return (*best, min(best[1].step, stated[0][1].bound))


def _solve(
    program: Program, problem: JointProblem, relaxed: Relaxation, budget: Budget, *, enough: bool
) -> Joint:
    """A placed solution; raises InfeasibleError when none is found.

    The whole choice that placing starts from knows averages. Where large pieces fill some ranks, what it would replicate
    fits nowhere, and placing gives that up table by table, or fails. So where the gap is wide, choices are tried that
    leave memory for ranks to be filled unevenly; not with ``enough``, where many numbers of hosts are tried.
    """
    options, frame = program.options, problem.frame
    best: Joint | None = None
    refused: InfeasibleError | None = None
    for room in ROOM[:1] if enough else ROOM:
        if best is not None and best.step <= relaxed.bound * WIDE:
            break
        columns = tuple(replace(made, memory=made.memory / room) for made in relaxed.columns)
        part = portion(budget, 1.0 if enough else CHOICE)
        try:
            found = solve_joint(
                frame,
                problem.menus,
                replace(relaxed, columns=columns),
                budget=part,
                seed=options.seed,
                stop_gap=_slack(problem, relaxed) if enough else 0.0,
            )
        except InfeasibleError as error:
            refused = refused or error
            continue
        finally:
            budget.spend(part.work)
        if best is None or found.step < best.step:
            best = replace(found, relaxed=relaxed)
    if best is None and not enough and frame.step is None and any(frame.stretched):
        best = _lengthened(program, problem, relaxed, budget)
    if best is None:
        assert refused is not None
        raise refused
    return best if enough else _shortened(program, problem, relaxed, best, budget)


def _lengthened(program: Program, problem: JointProblem, relaxed: Relaxation, budget: Budget) -> Joint | None:
    """A solution of a much longer step than the bound, if one is found.

    Averages count a part of a table as a part of its cost, and pieces as spread over all ranks; a lookup by processors in
    memory that a rank must wait for as a whole can be many times as long.
    """
    for longer in LONGER:
        frame, part = replace(problem.frame, step=relaxed.bound * longer), portion(budget, LENGTH)
        try:
            return solve_joint(frame, problem.menus, relaxed, budget=part, seed=program.options.seed)
        except InfeasibleError:
            continue
        finally:
            budget.spend(part.work)
    return None


def _shortened(
    program: Program, problem: JointProblem, relaxed: Relaxation, joint: Joint, budget: Budget
) -> Joint:
    """Shorter steps tried where a drive, a link or a processor decides the step; no worse than ``joint``.

    The search allows them a few lengths of the step, far apart; here the gap to the bound is halved.
    """
    frame = problem.frame
    low = relaxed.bound
    for _ in range(HALVINGS):
        busy = joint.solution.extra.max(axis=0) if frame.limits else ()
        deciding = any(s and used >= BUSY * joint.step for s, used in zip(frame.stretched, busy, strict=True))
        if frame.step is not None or not deciding or joint.step <= low * CLOSE:
            break
        middle, part = math.sqrt(low * joint.step), portion(budget, LENGTH)
        try:
            found = solve_joint(
                replace(frame, step=middle), problem.menus, relaxed, budget=part, seed=program.options.seed
            )
        except InfeasibleError:
            low = middle
            continue
        finally:
            budget.spend(part.work)
        if found.step >= joint.step:
            break
        joint = found
    return joint


def _slack(problem: JointProblem, relaxed: Relaxation) -> float:
    """Gap above the bound at which the phases just keep the step that was allowed."""
    frame = problem.frame
    if frame.step is None or relaxed.bound <= frame.base:
        return 0.0
    return max(0.0, (frame.step - frame.base) / (relaxed.bound - frame.base) - 1.0)
