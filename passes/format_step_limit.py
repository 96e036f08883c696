"""Least loss (or fewest bytes) of formats under a limit on the step.

The budget is bisected: the master program refutes budgets whose bound exceeds the limit, and the largest refuted one
is the bound on the objective. From there upward budgets are tried until a placed plan keeps the limit, and the
steps between the last that did not and the first that did are halved. What slack a placed plan leaves is spent
(:mod:`passes.format_slack`). The plan found is the answer; what it spends may be less than its budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from cost_models.calibration import Calibration
from ir.errors import InfeasibleError
from ir.format_plan import FormatRequest
from ir.program import Program
from ir.units import format_seconds
from passes.assignment.budget import Budget
from passes.assignment.joint import Joint, portion
from passes.format_requests import agree, largest_sum, with_request
from passes.format_section import stored_size, total_loss
from passes.format_slack import least_in_place
from passes.joint import JointProblem, relax_all
from passes.joint_search import search_formats
from passes.joint_solve import best_traffic
from passes.tiers import step_limit

BISECTIONS = 14  # of the refuted budgets, at most
CLOSE = 1.002  # ratio of two budgets that ends a bisection
LEAST = 1e-9  # of the largest budget: the smallest that is told from none
SLACKS = (1.0, 1.4, 2.5, 6.0)  # of the least budget that is not refuted; from there on squares
NEAR = 1.05  # of the limit: a plan as slow as that is searched on
HALVINGS = 4  # between the last budget that failed and the first that was kept
NEAR_ENOUGH = 1.1  # ratio of the two that ends them
SHARE = 0.4  # of the work that is left, for one budget


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The plan of least spending found that keeps the step limit, with the request that it answers."""

    request: FormatRequest
    problem: JointProblem
    joint: Joint
    bound: float  # of its step
    value: float
    lower_bound: float  # of the value


def least_within_step(
    program: Program, calibration: Calibration, request: FormatRequest, work: Budget
) -> Kept:
    """The least loss or the fewest bytes whose step keeps ``max_step``, with the ``work`` that is left.

    Raises:
        InfeasibleError: no plan found keeps it.
    """
    search = _Search(program, calibration, request, work)
    low, high = search.refute()
    return search.place(low, high)


def too_slow(request: FormatRequest, what: str) -> InfeasibleError:
    """No formats keep the step limit."""
    assert request.max_step is not None
    others = {
        "max_loss": request.max_loss,
        "average_bits": request.average_bits,
        "max_bytes": request.max_bytes,
    }
    given = tuple(f"formats.{name}" for name, value in others.items() if value is not None)
    within = f" within {' and '.join(given)}" if given else ""
    return InfeasibleError(
        f"no {what} a step of {format_seconds(request.max_step)}{within}; allow a longer step",
        conflict=("formats.max_step", *given),
    )


class _Search:
    def __init__(
        self, program: Program, calibration: Calibration, request: FormatRequest, work: Budget
    ) -> None:
        assert request.max_step is not None
        self.calibration, self.request = calibration, request
        self.limit = min(request.max_step, step_limit(program) or math.inf)
        self.program, self.work = program, work
        self.name = "loss" if request.objective == "loss" else "bytes"
        self.value: Callable[[JointProblem, Joint], float]
        if request.objective == "loss":
            given, name, self.value = request.max_loss, "loss", total_loss
        else:
            given, name, self.value = request.max_bytes, "bytes", stored_size
        self.most = float(given) if given is not None else largest_sum(program, calibration, request, name)

    def asked(self, budget: float) -> FormatRequest:
        """The request for the least step within a budget."""
        wanted = replace(self.request, objective="step", max_step=None)
        if self.request.objective == "loss":
            return replace(wanted, max_loss=budget)
        return replace(wanted, max_bytes=math.ceil(budget))

    def refuted(self, budget: float) -> bool:
        """Proved: no plan within the budget keeps the limit, whether tables agree or not."""
        stated, _ = relax_all(with_request(self.program, self.asked(budget)), self.calibration)
        return not stated or stated[0][1].bound > self.limit

    def refute(self) -> tuple[float, float]:
        """The largest budget known to be refuted (0 for none) and the least that is not."""
        if self.refuted(self.most):
            raise too_slow(self.request, "formats reach")
        low, high = self.most * LEAST, self.most
        if not self.refuted(low):
            return 0.0, low
        for _ in range(BISECTIONS):
            if high <= low * CLOSE:
                break
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.refuted(middle) else (low, middle)
        return low, high

    def kept(self, budget: float) -> Kept | None:
        """A plan within the budget that keeps the limit, if one is found."""
        part = portion(self.work, SHARE)
        try:
            return self._kept(budget, part)
        except InfeasibleError:
            return None
        finally:
            self.work.spend(part.work)

    def _kept(self, budget: float, work: Budget) -> Kept | None:
        # only tiers ask how long the step may be
        limit = self.limit if self.program.options.constraints.tiers is not None else None
        asked = agree(self.program, self.calibration, self.asked(budget))
        problem, joint, bound = best_traffic(
            with_request(self.program, asked),
            self.calibration,
            step=limit,
            request=asked,
            enough=True,
            budget=work,
        )
        wider = least_in_place(problem, joint, self.name, self.limit)
        if wider is None and self.limit < joint.step < self.limit * NEAR:
            joint = search_formats(problem, joint, budget=work, seed=self.program.options.seed)
            wider = least_in_place(problem, joint, self.name, self.limit)
        joint = wider or joint
        if joint.step > self.limit:
            return None
        return Kept(asked, problem, joint, min(bound, joint.step), self.value(problem, joint), 0.0)

    def place(self, low: float, high: float) -> Kept:
        """The best plan found from the budget ``high`` upward."""
        slacks = list(SLACKS)
        while high * slacks[-1] < self.most:
            slacks.append(slacks[-1] ** 2)
        found, failed = None, low
        for budget in dict.fromkeys(min(high * slack, self.most) for slack in slacks):
            found = self.kept(budget)
            if found is not None:
                break
            failed = budget
        if found is None:
            raise too_slow(self.request, "placed plan reaches")
        for _ in range(HALVINGS):
            if found.value <= max(failed, high) * NEAR_ENOUGH:
                break
            middle = math.sqrt(max(failed, high) * found.value)
            better = self.kept(middle)
            found, failed = (better, failed) if better is not None else (found, middle)
        return replace(found, lower_bound=min(found.value, low))
