"""Number formats: requests other than "least step" turned into pins, and the sweep of budgets.

``memory`` and ``loss`` (the reverse) are a multiple-choice knapsack over all tensors (:mod:`passes.format_knapsack`); its
choice is pinned and sharding then minimises the step. With ``max_step``: :mod:`passes.format_step_limit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cost_models.calibration import Calibration
from ir.errors import InfeasibleError, InputError
from ir.format_plan import FormatPlan, FormatRequest, ParetoPoint
from ir.program import Program
from passes.assignment.budget import Budget
from passes.assignment.joint import portion
from passes.format_knapsack import Knapsack, KnapsackOption, solve_knapsack
from passes.format_menu import grouped
from passes.format_requests import UNBOUNDED, agree, largest_sum, pinned, untied, with_request
from passes.format_section import Resolved, format_section, trade
from passes.joint import JointProblem, state_problem, traffic_programs
from passes.joint_search import search_formats
from passes.joint_solve import best_traffic


def check(program: Program) -> None:
    """Raise InputError for a request whose parts do not make sense together."""
    constraints = program.options.constraints
    request = constraints.formats
    assert request is not None
    bounded = (request.average_bits, request.max_bytes, request.max_step)
    if request.objective == "loss" and all(bound is None for bound in bounded):
        raise InputError(
            "formats.objective 'loss' without a bound keeps every tensor as it is; give average_bits, max_bytes or "
            "max_step"
        )
    if request.objective == "memory" and request.max_loss is None and request.average_bits is None:
        raise InputError("formats.objective 'memory' needs a bound on accuracy; give max_loss")
    if (
        request.max_step is not None
        and constraints.tiers is not None
        and constraints.tiers.objective != "step"
    ):
        raise InputError(
            f"formats.max_step and tiers.objective {constraints.tiers.objective!r} both set the step; leave max_step "
            "out, tiers.throughput limits the step there"
        )


def resolve(program: Program, calibration: Calibration) -> Resolved:
    """Turn the program's request into one for the step; raises InfeasibleError when no formats keep the budgets."""
    request = program.options.constraints.formats
    assert request is not None
    if request.objective != "step":
        return _knapsack(program, calibration, request)
    return Resolved(agree(program, calibration, request))


def _knapsack(program: Program, calibration: Calibration, request: FormatRequest) -> Resolved:
    names = ("loss", "bits", "bytes")
    elements = _elements(program)
    limits = {
        "loss": request.max_loss,
        "bits": None if request.average_bits is None else request.average_bits * elements,
        "bytes": request.max_bytes,
    }
    wide = replace(
        request, objective="step", max_loss=UNBOUNDED, average_bits=UNBOUNDED, max_bytes=2**62, groups=()
    )
    wires = {
        one.workload.exchange_dtype: loss.mean
        for one, loss in traffic_programs(with_request(program, wide), wide)
    }
    finest = min(wires.values())  # what embedding traffic loses at least
    if limits["loss"] is not None:
        limits["loss"] -= finest
        if limits["loss"] < 0:
            raise _nothing_fits(["loss"])
    budgets = [(name, float(limit)) for name, limit in limits.items() if limit is not None]
    stated = state_problem(with_request(program, wide), calibration)
    target = "bytes" if request.objective == "memory" else "loss"
    members, pins = _members(stated, request, names)
    options = [
        [KnapsackOption(sums[target], tuple(sums[name] for name, _ in budgets)) for sums in member]
        for member in members
    ]
    try:
        found = solve_knapsack(options, [limit for _, limit in budgets])
    except InfeasibleError:
        raise _nothing_fits([name for name, _ in budgets]) from None
    # accuracy that is left over may go into the traffic, but a loss that is minimised may not
    spent = sum(sums[at]["loss"] for sums, at in zip(members, found.choice, strict=True))
    room = finest if target == "loss" or request.max_loss is None else request.max_loss - spent
    kept = tuple(sorted(name for name, loss in wires.items() if loss <= max(room, finest)))
    held = {name: f for every, at in zip(pins, found.choice, strict=True) for name, f in every[at].items()}
    if program.model.tables:
        held |= {"traffic.forward": kept, "traffic.backward": kept}
    chosen = replace(
        pinned(request, held), objective="step", max_loss=None, average_bits=None, max_bytes=None, groups=()
    )
    price = next((p for (name, _), p in zip(budgets, found.prices, strict=True) if name == "loss"), 0.0)
    extra = finest if target == "loss" else 0.0
    return Resolved(
        chosen,
        found.value + extra,
        found.bound + extra,
        price,
        _following(members, pins, options, found),
    )


def _nothing_fits(budgets: Sequence[str]) -> InfeasibleError:
    words = {"loss": "max_loss", "bits": "average_bits", "bytes": "max_bytes"}
    given = tuple(f"formats.{words[name]}" for name in budgets)
    return InfeasibleError(
        f"no choice of formats keeps {' and '.join(given)}; raise a budget or allow other formats",
        conflict=given,
        relaxation="a larger budget",
    )


def _following(
    members: Sequence[Sequence[Sums]],
    pins: Sequence[Sequence[Pins]],
    options: Sequence[Sequence[KnapsackOption]],
    found: Knapsack,
) -> dict[str, dict[str, str]]:
    """Of each tensor the format that it would take next at the prices of the budgets, and what that trades."""
    made: dict[str, dict[str, str]] = {}
    for sums, names, priced, at in zip(members, pins, options, found.choice, strict=True):
        reduced = [
            o.objective + sum(p * c for p, c in zip(found.prices, o.cost, strict=True)) for o in priced
        ]
        others = [i for i in range(len(priced)) if i != at]
        if not others:
            continue
        other = min(others, key=lambda i: (reduced[i], i))
        changed = {name: f[0] for name, f in names[other].items() if f != names[at][name]}
        words = trade(
            " x ".join(dict.fromkeys(changed.values())),
            sums[other]["loss"] - sums[at]["loss"],
            sums[other]["bytes"] - sums[at]["bytes"],
        )
        for name in names[at]:
            next_one = changed.get(name, "")
            made[name] = {"runner_up": next_one, "reason": words if next_one else ""}
    return made


def _elements(program: Program) -> float:
    model = program.model
    return float(model.embedding_params + sum(op.params for op in model.ops if op.gemm is not None))


Sums = dict[str, float]
Pins = dict[str, tuple[str, ...]]


def _members(
    stated: JointProblem, request: FormatRequest, names: Sequence[str]
) -> tuple[list[list[Sums]], list[list[Pins]]]:
    """Members of the knapsack with the sums of each option, and what each option pins."""
    singles: list[tuple[str, list[Sums], list[Pins]]] = []
    scale = dict(zip(stated.budgets, stated.scale, strict=True))
    model = stated.program.model
    for made in stated.classes:
        first = {(base.format, base.state): base for base in reversed(made.bases)}
        for t in made.members:
            name = model.tables[t].name
            sums = [
                {n: c * scale[n] for n, c in zip(stated.budgets, base.cost, strict=True)}
                for base in first.values()
            ]
            pins: list[Pins] = [{name: (f,), f"{name}.state": (s,)} for f, s in first]
            singles.append((name, sums, pins))
    for member in stated.members:
        sums = [
            {n: c * scale[n] for n, c in zip(stated.budgets, o.cost, strict=True)} for o in member.options
        ]
        pins = [{tensor.name: (tensor.format,) for tensor in choice.tensors} for choice in member.meaning]
        singles.append((member.name, sums, pins))
    ties = grouped([key for _, _, pins in singles for key in pins[0]], request.groups)
    merged: dict[str, tuple[list[Sums], list[Pins]]] = {}
    for name, sums, pins in singles:
        group = next((ties[key] for key in pins[0] if key in ties), None)
        key = name if group is None else f"\0group {group}"
        merged[key] = (sums, pins) if key not in merged else _merge(merged[key], (sums, pins))
    return [sums for sums, _ in merged.values()], [pins for _, pins in merged.values()]


def _merge(
    one: tuple[list[Sums], list[Pins]], other: tuple[list[Sums], list[Pins]]
) -> tuple[list[Sums], list[Pins]]:
    """Two members that must take the same formats; raises InfeasibleError when they share none."""

    def formats(pins: Pins) -> tuple[str, ...]:
        return tuple(format for names in pins.values() for format in names)[:2]

    theirs = {formats(pins): (sums, pins) for sums, pins in zip(*other, strict=True)}
    pairs = [
        ({n: s[n] + theirs[formats(p)][0][n] for n in s}, {**p, **theirs[formats(p)][1]})
        for s, p in zip(*one, strict=True)
        if formats(p) in theirs
    ]
    if not pairs:
        names = ", ".join(sorted({*one[1][0], *other[1][0]})[:4])
        raise InfeasibleError(
            f"the tensors {names} must agree on a format but share none; widen formats.rules",
            conflict=("formats.groups",),
        )
    return [s for s, _ in pairs], [p for _, p in pairs]


def sweep(
    program: Program,
    calibration: Calibration,
    request: FormatRequest,
    made: Sequence[ParetoPoint],
    work: Budget,
) -> tuple[ParetoPoint, ...]:
    """Least step at several accuracy budgets, from none to the loss of the narrowest choice.

    ``made`` are plans that are known already: a plan serves every budget that is not below its loss. The points have
    equal parts of the ``work`` that is left.
    """
    if not request.pareto:
        return ()
    most = largest_sum(program, calibration, request, "loss")
    least = max(most * 1e-6, 1e-300)
    options = program.options
    known = list(made)
    points = []
    for i in range(request.pareto):
        budget = least * (most / least) ** (i / max(1, request.pareto - 1))
        asked = replace(request, objective="step", max_loss=budget, max_step=None, pareto=0)
        part = portion(work, 1 / (request.pareto - i))
        try:
            pinned_one = agree(program, calibration, asked)
            problem, joint, bound = best_traffic(
                with_request(program, pinned_one), calibration, request=pinned_one, budget=part
            )
            bound = untied(program, calibration, asked, bound)
        except InfeasibleError:
            work.spend(part.work)
            continue
        joint = search_formats(problem, joint, budget=part, seed=options.seed)
        work.spend(part.work)
        section = format_section(
            replace(problem, program=with_request(problem.program, asked)), joint, bound, Resolved(asked)
        )
        known.append(known_point(section, joint.step, bound))
        best = min((p for p in known if p.loss <= budget * (1 + 1e-9)), key=lambda p: p.objective)
        points.append(replace(best, budget=budget, bound=min(bound, best.objective)))
    return tuple(points)


def known_point(section: FormatPlan, step: float, bound: float) -> ParetoPoint:
    """A plan as a point of the sweep, its budget what it loses."""
    return ParetoPoint(section.loss, step, bound, section.loss, section.average_bits)
