"""Number formats: requests other than "least step" turned into pins, and the sweep of budgets.

* ``memory`` and ``loss`` (the reverse) are a multiple-choice knapsack over all tensors
  (:mod:`passes.format_knapsack`); its choice is pinned and sharding then minimises the step.
* ``loss`` with ``max_step``: the least accuracy budget whose step is short enough; budgets that the master
  program refutes are the bound.
* Tables that must agree: the format that the relaxation uses most within the budgets is pinned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cost_models.calibration import Calibration
from ir.errors import InfeasibleError, InputError
from ir.format_plan import FormatRequest, ParetoPoint
from ir.program import Program
from ir.units import format_seconds
from passes.format_knapsack import Knapsack, KnapsackOption, solve_knapsack
from passes.format_menu import grouped
from passes.format_section import Resolved, format_section, total_loss, trade
from passes.joint import JointProblem, best_traffic, relax_all, state_problem

BISECTIONS = 12  # steps on the accuracy budget that a step limit needs
SLACKS = (1.0, 1.02, 1.1, 1.3, 2.0, 4.0)  # of that budget, until a placed plan keeps the step limit


def resolve(program: Program, calibration: Calibration) -> Resolved:
    """Turn the program's request into one for the step.

    Raises:
        InputError: an objective without a bound that gives it a meaning.
        InfeasibleError: no formats within the budgets.
    """
    request = program.options.constraints.formats
    assert request is not None
    bounded = (request.average_bits, request.max_bytes, request.max_step)
    if request.objective == "loss" and all(bound is None for bound in bounded):
        raise InputError(
            "formats.objective 'loss' without a bound keeps every tensor as it is; give average_bits, max_bytes or "
            "max_step"
        )
    if request.objective == "memory" and request.max_loss is None and request.average_bits is None:
        raise InputError("formats.objective 'memory' needs a bound on accuracy; give max_loss")
    if request.objective == "loss" and request.max_step is not None:
        return _least_loss(program, calibration, request)
    if request.objective != "step":
        return _knapsack(program, calibration, request)
    return Resolved(_agree(program, calibration, request))


def _with(program: Program, request: FormatRequest) -> Program:
    constraints = replace(program.options.constraints, formats=request)
    return replace(program, options=replace(program.options, constraints=constraints))


def _knapsack(program: Program, calibration: Calibration, request: FormatRequest) -> Resolved:
    names = ("loss", "bits", "bytes")
    elements = _elements(program)
    limits = {
        "loss": request.max_loss,
        "bits": None if request.average_bits is None else request.average_bits * elements,
        "bytes": request.max_bytes,
    }
    budgets = [(name, float(limit)) for name, limit in limits.items() if limit is not None]
    wide = replace(request, objective="step", max_loss=1e100, average_bits=1e100, max_bytes=2**62, groups=())
    stated = state_problem(_with(program, wide), calibration)
    target = "bytes" if request.objective == "memory" else "loss"
    members, pins = _members(stated, request, names)
    options = [
        [KnapsackOption(sums[target], tuple(sums[name] for name, _ in budgets)) for sums in member]
        for member in members
    ]
    try:
        found = solve_knapsack(options, [limit for _, limit in budgets])
    except InfeasibleError:
        words = {"loss": "max_loss", "bits": "average_bits", "bytes": "max_bytes"}
        given = tuple(f"formats.{words[name]}" for name, _ in budgets)
        raise InfeasibleError(
            f"no choice of formats keeps {' and '.join(given)}; raise a budget or allow other formats",
            conflict=given,
            relaxation="a larger budget",
        ) from None
    rules = dict(request.rules)
    for pinned, choice in zip(pins, found.choice, strict=True):
        rules.update(pinned[choice])
    pinned_request = replace(
        request, objective="step", max_loss=None, average_bits=None, max_bytes=None, rules=rules, groups=()
    )
    price = next((p for (name, _), p in zip(budgets, found.prices, strict=True) if name == "loss"), 0.0)
    return Resolved(
        pinned_request, found.value, found.bound, price, _following(members, pins, options, found)
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


def _least_loss(program: Program, calibration: Calibration, request: FormatRequest) -> Resolved:
    """The least accuracy budget whose step keeps ``max_step``."""
    assert request.max_step is not None
    most = request.max_loss if request.max_loss is not None else _worst_loss(program, calibration, request)

    def asked(budget: float) -> FormatRequest:
        return _agree(
            program, calibration, replace(request, objective="step", max_step=None, max_loss=budget)
        )

    def refuted(budget: float) -> bool:
        stated, _ = relax_all(_with(program, asked(budget)), calibration)
        return not stated or stated[0][1].bound > float(request.max_step or 0.0)

    low, high = 0.0, most
    if refuted(high):
        raise _too_slow(request, "formats reach")
    for _ in range(BISECTIONS if refuted(0.0) else 0):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if refuted(middle) else (low, middle)
    start = high if refuted(0.0) else 0.0
    for slack in SLACKS:
        budget = min(most, start * slack)
        chosen = asked(budget)
        problem, joint, _ = best_traffic(_with(program, chosen), calibration, request=chosen)
        if joint.step <= request.max_step:
            spent = total_loss(problem, joint)
            return Resolved(chosen, spent, min(spent, low))
    raise _too_slow(request, "placed plan reaches")


def _too_slow(request: FormatRequest, what: str) -> InfeasibleError:
    assert request.max_step is not None
    bounded = request.max_loss is not None
    within = " within formats.max_loss" if bounded else ""
    limits = ("formats.max_step", "formats.max_loss") if bounded else ("formats.max_step",)
    return InfeasibleError(
        f"no {what} a step of {format_seconds(request.max_step)}{within}; allow a longer step",
        conflict=limits,
    )


def _worst_loss(program: Program, calibration: Calibration, request: FormatRequest) -> float:
    """The loss of the most lossy choice of every tensor: a budget that binds nothing."""
    wide = replace(request, objective="step", max_step=None, max_loss=1e100)
    stated = state_problem(_with(program, wide), calibration)
    at = stated.budgets.index("loss")
    total = sum(
        len(menu.tables) * max(option.cost[at] for option in menu.options) * stated.scale[at]
        for menu in stated.menus
    )
    return float(total)


def _agree(program: Program, calibration: Calibration, request: FormatRequest) -> FormatRequest:
    """Pin the common format of tables that must agree."""
    model = program.model
    ties = grouped([table.name for table in model.tables], request.groups)
    for group in sorted(set(ties.values())):
        members = [t for t, table in enumerate(model.tables) if ties.get(table.name) == group]
        stated = state_problem(_with(program, replace(request, groups=())), calibration)
        relaxed = stated.relax()
        use: dict[str, float] = {}
        shared: set[str] | None = None
        for c, made in enumerate(stated.classes):
            here = [t for t in members if t in made.members]
            if not here:
                continue
            formats = {base.format for base in made.bases}
            shared = formats if shared is None else shared & formats
            for k, (owner, o) in enumerate(relaxed.index):
                if owner == c and relaxed.values[k] > 0:
                    format = made.meaning[made.menu.options[o]].format
                    part = len(here) / len(made.members)
                    use[format] = use.get(format, 0.0) + relaxed.values[k] * part * made.table.params
        ranked = sorted(shared or (), key=lambda f: (-use.get(f, 0.0), f))
        for format in ranked:
            trial = replace(
                request, rules={**request.rules, **{model.tables[t].name: (format,) for t in members}}
            )
            try:
                if not state_problem(_with(program, trial), calibration).relax().exceeded:
                    request = trial
                    break
            except InfeasibleError:
                continue
        else:
            raise InfeasibleError(
                f"the tables {', '.join(model.tables[t].name for t in members[:4])} must agree on a format and none "
                "fits the budgets; raise a budget or loosen formats.groups",
                conflict=(f"formats.groups[{group}]",),
            )
    return request


def sweep(program: Program, calibration: Calibration, request: FormatRequest) -> tuple[ParetoPoint, ...]:
    """Least step at several accuracy budgets, from none to the loss of the narrowest choice."""
    if not request.pareto:
        return ()
    most = _worst_loss(program, calibration, request)
    least = max(most * 1e-6, 1e-300)
    made = []
    for i in range(request.pareto):
        budget = least * (most / least) ** (i / max(1, request.pareto - 1))
        asked = replace(request, objective="step", max_loss=budget, max_step=None, pareto=0)
        try:
            problem, joint, bound = best_traffic(_with(program, asked), calibration, request=asked)
        except InfeasibleError:
            continue
        section = format_section(
            replace(problem, program=_with(problem.program, asked)), joint, bound, Resolved(asked), ()
        )
        made.append(ParetoPoint(budget, joint.step, bound, section.loss, section.average_bits))
    return tuple(made)
