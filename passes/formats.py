"""Number formats: requests other than "least step" turned into pins, and the section of the plan.

* ``memory`` and ``loss`` (the reverse) are a multiple-choice knapsack over all tensors
  (:mod:`passes.format_knapsack`); its choice is pinned and sharding then minimises the step.
* ``loss`` with ``max_step``: the least accuracy budget whose step is short enough; budgets that the master
  program refutes are the bound.
* Tables that must agree: the format that the relaxation uses most within the budgets is pinned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cost_models.calibration import Calibration
from cost_models.embedding import state_bytes, stored_bytes
from cost_models.formats import bits_per_element
from ir.errors import InfeasibleError, InputError
from ir.format_plan import FormatPlan, FormatRequest, ParetoPoint, TensorFormat
from ir.program import Program
from ir.units import format_seconds
from passes.assignment.joint import Joint
from passes.assignment.master import Master
from passes.dense_formats import DenseChoice
from passes.format_knapsack import KnapsackOption, solve_knapsack
from passes.format_menu import grouped, has_kernel
from passes.joint import JointProblem, best_traffic, relax_all, state_problem

BISECTIONS = 12  # steps on the accuracy budget that a step limit needs
SLACKS = (1.0, 1.02, 1.1, 1.3, 2.0, 4.0)  # of that budget, until a placed plan keeps the step limit


@dataclass(frozen=True, slots=True)
class Resolved:
    """A request whose objective is the step, and what was proved about the objective that was asked."""

    request: FormatRequest
    value: float | None = None  # of the objective asked, when it is not the step
    bound: float | None = None
    price: float = 0.0


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
    found = solve_knapsack(options, [limit for _, limit in budgets])
    rules = dict(request.rules)
    for pinned, choice in zip(pins, found.choice, strict=True):
        rules.update(pinned[choice])
    pinned_request = replace(
        request, objective="step", max_loss=None, average_bits=None, max_bytes=None, rules=rules, groups=()
    )
    price = next((p for (name, _), p in zip(budgets, found.prices, strict=True) if name == "loss"), 0.0)
    return Resolved(pinned_request, found.value, found.bound, price)


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


def total_loss(problem: JointProblem, joint: Joint) -> float:
    """Predicted loss increase of a joint solution, traffic included."""
    return sum(tensor.loss for tensor in tensor_formats(problem, joint))


def dense_choice(problem: JointProblem, joint: Joint, member: int) -> DenseChoice:
    """What a dense member's chosen option means."""
    t = len(problem.program.model.tables) + member
    option = joint.problem.options[t][joint.solution.choice[t]]
    return problem.members[member].meaning[problem.members[member].options.index(option)]


def tensor_formats(problem: JointProblem, joint: Joint) -> tuple[TensorFormat, ...]:
    """Every tensor's format, tables first."""
    program = problem.program
    menu = problem.maker.formats
    assert menu is not None
    made: list[TensorFormat] = []
    for t, table in enumerate(program.model.tables):
        chosen = problem.meaning(joint, t)
        loss = menu.loss(table.name, chosen.format, 1.0) if chosen.format != table.dtype else None
        made.append(
            TensorFormat(
                table.name,
                "table",
                chosen.format,
                table.params,
                bits_per_element(chosen.format, table.dim),
                loss.mean if loss else 0.0,
                loss.stderr if loss else 0.0,
                not has_kernel(chosen.format, "embedding", program.topology.device),
                **_next(problem, joint, t),
            )
        )
        if chosen.state != "fp32":
            state = menu.loss(f"{table.name}.state", chosen.state, 1.0)
            bits = bits_per_element(chosen.state, table.dim)
            made.append(
                TensorFormat(
                    f"{table.name}.state", "state", chosen.state, table.params, bits, state.mean, state.stderr
                )
            )
    for i, _ in enumerate(problem.members):
        for tensor in dense_choice(problem, joint, i).tensors:
            made.append(
                TensorFormat(
                    tensor.name,
                    tensor.kind,
                    tensor.format,
                    tensor.elements,
                    tensor.bits,
                    tensor.loss.mean,
                    tensor.loss.stderr,
                    tensor.emulated,
                )
            )
    return (*made, *_traffic(problem))


def _traffic(problem: JointProblem) -> list[TensorFormat]:
    program = problem.program
    if not program.model.tables:
        return []
    wire = program.workload.exchange_dtype
    columns = sum(table.dim * len(table.features) for table in program.model.tables)
    names = ["traffic.forward"] + (["traffic.backward"] if program.options.mode == "train" else [])
    each = problem.traffic.mean / 2, problem.traffic.stderr / math.sqrt(2)
    return [
        TensorFormat(
            name, "traffic", wire, columns * program.workload.global_batch, bits_per_element(wire), *each
        )
        for name in names
        if wire in ("fp32", "bf16", "fp16")
    ]


def _next(problem: JointProblem, joint: Joint, t: int) -> dict[str, str]:
    """The runner-up format of a table, at the prices of the relaxation, and why the chosen one was taken."""
    relaxed = joint.relaxed
    made = next(c for c in problem.classes if t in c.members)
    owner = problem.classes.index(made)
    chosen = problem.meaning(joint, t).format
    best: dict[str, float] = {}
    for k, (c, o) in enumerate(relaxed.index):
        if c == owner:
            format = made.meaning[made.menu.options[o]].format
            price = Master.reduced(relaxed.columns[k], relaxed.duals)
            best[format] = min(best.get(format, math.inf), price)
    others = sorted((price, f) for f, price in best.items() if f != chosen)
    if not others:
        return {"runner_up": "", "reason": "the only format allowed"}
    price, other = others[0]
    delta = price - best.get(chosen, 0.0)
    if delta > 1e-9 * joint.step:
        why = (
            f"{other} would cost {delta * 1e6:.3g} us of the step more, at the prices of memory and accuracy"
        )
    else:
        why = f"{other} would cost the same, at the prices of memory and accuracy"
    return {"runner_up": other, "reason": why}


def format_section(
    problem: JointProblem, joint: Joint, bound: float, resolved: Resolved, pareto: tuple[ParetoPoint, ...]
) -> FormatPlan:
    """The section ``decisions.formats``."""
    program = problem.program
    asked = program.options.constraints.formats
    menu = problem.maker.formats
    assert asked is not None
    assert menu is not None
    tensors = tensor_formats(problem, joint)
    stored = [t for t in tensors if t.kind in ("table", "weight")]
    elements = sum(t.elements for t in stored)
    size = sum(t.elements * t.bits / 8 for t in tensors if t.kind == "weight")
    for t, table in enumerate(program.model.tables):
        chosen = problem.meaning(joint, t)
        size += table.rows * _row_bytes(program, table.dim, chosen.format, chosen.state)
    step = asked.objective == "step"
    given = asked.sensitivity
    price = 0.0
    if "loss" in problem.budgets:
        at = problem.budgets.index("loss")
        price = float(joint.relaxed.duals.cost[at]) / problem.scale[at]
    return FormatPlan(
        objective_name=asked.objective,
        objective=joint.step if step or resolved.value is None else resolved.value,
        lower_bound=bound if step or resolved.bound is None else resolved.bound,
        loss=sum(t.loss for t in tensors),
        stderr=math.sqrt(sum(t.stderr**2 for t in tensors)),
        average_bits=sum(t.elements * t.bits for t in stored) / elements if elements else 32.0,
        bytes=size,
        cast_seconds=sum(dense_choice(problem, joint, i).price.cast for i in range(len(problem.members))),
        sensitivity=f"{given.method}, {given.metric}"
        if given
        else "data-free: 10^(-QSNR/10) on a standard normal",
        tensors=tensors,
        loss_price=price if step else resolved.price,
        pareto=pareto,
    )


def _row_bytes(program: Program, dim: int, format: str, state: str) -> float:
    kept = stored_bytes(format, dim)
    return kept + (
        state_bytes(program.workload.optimizer, dim, state) if program.options.mode == "train" else 0.0
    )


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
