"""Memory tiers: fewest (cheapest, most frugal) hosts at a target throughput, and the section of the plan.

A number of hosts is *impossible* when the master program's bound exceeds the step that the throughput allows, or
when no average keeps the limits; it is *kept* when a placed plan keeps the step. The search bisects for the
fewest hosts that are not impossible (more hosts never have less memory or bandwidth), then looks upward for
the fewest that are kept. "cost" and "power" do so for every set of tiers that hosts can be bought with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cost_models.calibration import Calibration
from ir.errors import InfeasibleError, InputError
from ir.program import Program
from ir.tier_plan import HostTrial, TierPlan, TierRequest, TierUse
from ir.units import format_seconds
from passes.assignment.budget import Budget
from passes.assignment.joint import Joint, portion
from passes.joint import JointProblem, relax_all
from passes.joint_search import polish, search_formats
from passes.joint_solve import best_traffic
from passes.sharding_prices import memory_limit

GROW = 1.15  # step of the upward search once the next few numbers of hosts were not kept
FIRST = 0.5  # of the work, for a first placement; the rest is for better ones
TRIAL_WORK = 5.0  # limit on solver work for one number of hosts, about seconds
TRIAL_SHARE = 0.5  # of the budget that is left, for one number of hosts at most
NEXT = 3  # numbers of hosts tried one by one


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A solved program: possibly another number of hosts or fewer tiers than it came with."""

    program: Program
    problem: JointProblem
    joint: Joint
    bound: float  # of the step
    trials: tuple[HostTrial, ...] = ()
    objective: float | None = None  # hosts, dollars or watts
    objective_bound: float | None = None


def place(program: Program, calibration: Calibration, budget: Budget) -> Placed:
    """Solve the program's tier request with the work that ``budget`` has left; raises InputError or InfeasibleError."""
    request = program.options.constraints.tiers
    if request is None or request.objective == "step":
        limit = step_limit(program)
        first = portion(budget, FIRST)
        problem, joint, bound = best_traffic(program, calibration, step=limit, budget=first)
        budget.spend(first.work)
        seed = program.options.seed
        joint = search_formats(problem, joint, budget=budget, seed=seed)
        joint = polish(problem.frame, joint, budget=budget, seed=seed)
        return Placed(program, problem, joint, min(bound, joint.step))
    if request.throughput is None:
        raise InputError(
            f"tiers.objective {request.objective!r} needs tiers.throughput, in samples per second"
        )
    if len(program.topology.levels) < 2:
        raise InputError(
            f"topology {program.topology.name!r} has no level of hosts to vary; use one such as 'h100-2x8'"
        )
    if request.objective == "nodes":
        return _fewest(program, calibration, request, budget)
    return _cheapest(program, calibration, request, budget)


def step_limit(program: Program) -> float | None:
    """Seconds that a step may last at the target throughput; None without one."""
    request = program.options.constraints.tiers
    if request is None or request.throughput is None:
        return None
    return program.workload.global_batch / request.throughput


def with_hosts(program: Program, hosts: int) -> Program:
    """The program on another number of hosts; the batch is rounded up to a multiple of the ranks."""
    machine = program.topology.with_hosts(hosts)
    batch = -(-program.workload.global_batch // machine.world_size) * machine.world_size
    return replace(program, topology=machine, workload=replace(program.workload, global_batch=batch))


def _fewest(program: Program, calibration: Calibration, request: TierRequest, budget: Budget) -> Placed:
    trials: dict[int, HostTrial] = {}
    most = request.max_hosts or 4 * program.topology.hosts

    def impossible(hosts: int) -> bool:
        if hosts not in trials:
            why = _refuted(with_hosts(program, hosts), calibration)
            if why:
                trials[hosts] = HostTrial(hosts, "impossible", None, why)
        return hosts in trials

    if impossible(most):
        raise InfeasibleError(
            f"{most} hosts cannot keep {request.throughput:g} samples/s: {trials[most].why}; raise tiers.max_hosts "
            "or lower tiers.throughput",
            conflict=("tiers.throughput", "tiers.max_hosts"),
            relaxation="more hosts",
        )
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if impossible(middle) else (low, middle)
    best = _upward(program, calibration, high, most, trials, budget)
    if best is None:
        raise InfeasibleError(
            f"no placed plan on up to {most} hosts keeps {request.throughput:g} samples/s, although averages would "
            "allow it; raise tiers.max_hosts or lower tiers.throughput",
            conflict=("tiers.throughput", "tiers.max_hosts"),
        )
    listed = tuple(trials[hosts] for hosts in sorted(trials))
    hosts = best.program.topology.hosts
    return replace(best, trials=listed, objective=float(hosts), objective_bound=float(high))


def _upward(
    program: Program,
    calibration: Calibration,
    first: int,
    most: int,
    trials: dict[int, HostTrial],
    budget: Budget,
) -> Placed | None:
    """The fewest hosts from ``first`` on that a placed plan keeps the throughput on."""
    failed, hosts = first - 1, first
    best: Placed | None = None
    while best is None and hosts <= most:
        best = _kept(program, calibration, hosts, trials, budget)
        if best is None:
            failed = hosts
            hosts = hosts + 1 if hosts < first + NEXT else max(hosts + 1, round(hosts * GROW))
            hosts = most if failed < most < hosts else hosts
    while best is not None and best.program.topology.hosts - failed > 1:
        middle = (best.program.topology.hosts + failed) // 2
        found = _kept(program, calibration, middle, trials, budget)
        best, failed = (found, failed) if found is not None else (best, middle)
    return best


def _kept(
    program: Program, calibration: Calibration, hosts: int, trials: dict[int, HostTrial], budget: Budget
) -> Placed | None:
    trial = with_hosts(program, hosts)
    limit = step_limit(trial)
    assert limit is not None
    part = portion(budget, TRIAL_SHARE, TRIAL_WORK)
    try:
        problem, joint, bound = best_traffic(trial, calibration, step=limit, enough=True, budget=part)
    except InfeasibleError as error:
        trials[hosts] = HostTrial(hosts, "not found", None, str(error))
        return None
    finally:
        budget.spend(part.work)
    if joint.step > limit * (1 + 1e-9):
        trials[hosts] = HostTrial(
            hosts, "not found", joint.step, f"the step may last {format_seconds(limit)}"
        )
        return None
    trials[hosts] = HostTrial(hosts, "kept", joint.step)
    return Placed(trial, problem, joint, bound)


def _refuted(program: Program, calibration: Calibration) -> str:
    """Why no placement on this machine keeps the throughput; empty when that is not proved."""
    limit = step_limit(program)
    assert limit is not None
    stated, refused = relax_all(program, calibration, step=limit)
    if not stated:
        return "too little of " + ", ".join(refused.conflict if refused else ())
    least = stated[0][1].bound
    if least > limit:
        return f"the step lasts {format_seconds(least)} at least, it may last {format_seconds(limit)}"
    return ""


def _cheapest(program: Program, calibration: Calibration, request: TierRequest, budget: Budget) -> Placed:
    """The set of tiers and the number of hosts with the least price or power."""
    each = request.host_price if request.objective == "cost" else request.host_watt
    if each is None:
        name = "host_price" if request.objective == "cost" else "host_watt"
        raise InputError(
            f"tiers.objective {request.objective!r} needs tiers.{name}, of a host without its tiers"
        )
    best: Placed | None = None
    bounds = []
    trials: list[HostTrial] = []
    refused: InfeasibleError | None = None
    sets = list(_tier_sets(program, request))
    for number, kept in enumerate(sets):
        one, part = _with_tiers(program, kept), portion(budget, 1 / (len(sets) - number))
        price = each + _host_tiers_price(one, request)
        try:
            found = _fewest(one, calibration, request, part)
        except InfeasibleError as error:
            refused = error
            continue
        finally:
            budget.spend(part.work)
        trials += [
            replace(t, why=f"with {'+'.join(kept) or 'no host tier'}{': ' * bool(t.why)}{t.why}")
            for t in found.trials
        ]
        bounds.append(price * (found.objective_bound or 1.0))
        total = price * found.program.topology.hosts
        if best is None or best.objective is None or total < best.objective:
            best = replace(found, objective=total)
    if best is None:
        assert refused is not None
        raise refused
    return replace(best, trials=tuple(trials), objective_bound=min(bounds))


def _tier_sets(program: Program, request: TierRequest) -> Iterator[tuple[str, ...]]:
    names = [t.name for t in program.topology.host_tiers if request.tiers is None or t.name in request.tiers]
    for size in range(len(names) + 1):
        yield from itertools.combinations(names, size)


def _with_tiers(program: Program, kept: tuple[str, ...]) -> Program:
    tiers = tuple(tier for tier in program.topology.host_tiers if tier.name in kept)
    constraints = program.options.constraints
    assert constraints.tiers is not None
    request = replace(constraints.tiers, tiers=kept)
    options = replace(program.options, constraints=replace(constraints, tiers=request))
    return replace(program, topology=replace(program.topology, host_tiers=tiers), options=options)


def _host_tiers_price(program: Program, request: TierRequest) -> float:
    total = 0.0
    for tier in program.topology.host_tiers:
        rate = tier.price_per_gb if request.objective == "cost" else tier.watt_per_gb
        if rate is None:
            what = "price_per_gb" if request.objective == "cost" else "watt_per_gb"
            raise InputError(
                f"memory tier {tier.name!r} of {program.topology.name!r} states no {what}; add it"
            )
        total += rate * tier.capacity / 1e9
    return total


def tier_section(placed: Placed) -> TierPlan | None:
    """The section ``decisions.tiers``; None when no tiers were asked for."""
    program, joint = placed.program, placed.joint
    request = program.options.constraints.tiers
    if request is None:
        return None
    by_step = request.objective == "step"
    return TierPlan(
        objective_name=request.objective,
        objective=joint.step if by_step or placed.objective is None else placed.objective,
        lower_bound=placed.bound if by_step or placed.objective_bound is None else placed.objective_bound,
        step=joint.step,
        step_limit=step_limit(program),
        hosts=program.topology.hosts,
        tiers=tuple(_uses(placed)),
        trials=placed.trials,
    )


def _uses(placed: Placed) -> Iterator[TierUse]:
    """Use of each tier with the prices of the relaxation: what one more GB of it would save."""
    program, joint, problem = placed.program, placed.joint, placed.problem
    kept = 1e9 * (1 - program.options.constraints.memory_reserve)  # of a GB that is added, what rows may use
    duals, solution, size = joint.relaxed.duals, joint.solution, program.topology.host_size
    device = program.topology.device.tiers[0]
    dense = memory_limit(program) - problem.frame.capacity
    binding = ("capacity",) if duals.memory > 0 else ()
    yield TierUse(
        device.name,
        float(solution.memory.max()) + dense,
        float(memory_limit(program)),
        {},
        binding,
        duals.memory * kept,
    )
    rows = list(enumerate(problem.resources))
    for name in dict.fromkeys(row.tier for row in problem.resources):
        mine = [(e, row) for e, row in rows if row.tier == name]
        used = stored = limit = price = 0.0
        seconds: dict[str, float] = {}
        tight: list[str] = []
        for e, row in mine:
            priced = float(duals.extra[e])
            if row.stretched:
                seconds[row.kind] = float(solution.extra[:, e].max())
            else:
                # a rank may use its share of the host's tier
                stored = float(solution.extra[:, e].reshape(-1, size).sum(axis=1).max())
                used, limit, price = stored, row.limit * size, priced * kept / size
            if priced > 0:
                tight.append("capacity" if row.kind == "bytes" else row.kind)
        yield TierUse(name, used, limit, seconds, tuple(tight), price)
