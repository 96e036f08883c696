"""Sharding, number formats and memory tiers decided together.

    minimise    base + sum_p max_r load[r, p]            ("step": embedding phases, and the dense GEMMs)
    subject to  device memory and, for every host tier, bytes, bandwidth, IOPS and endurance on every rank
                predicted loss, bits, bytes of all tensors within the request's budgets

over sharding option x number format x tier split of every table, the formats of every dense tensor, and the
format of embedding traffic (tried one by one, best bound first). The bound is that of the master program
(:mod:`passes.assignment.master`) over all of them.

Limits, by the names that errors use: ``hbm_budget``, ``tiers[NAME].bytes`` and the like, ``formats.max_loss``,
``formats.average_bits``, ``formats.max_bytes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cost_models.calibration import Calibration
from cost_models.dense import planned_dense_memory
from cost_models.dense_prices import sharded_dense
from cost_models.embedding import PHASES, phase_overheads
from cost_models.gemm_formats import COMPUTE_FORMATS, cache_read_seconds, gemm_price
from cost_models.memory import MASTER_BYTES
from cost_models.step import step_timeline
from ir.errors import InfeasibleError
from ir.format_plan import FormatRequest, LossChange
from ir.program import Program
from ir.tier_plan import TierRequest
from ir.workload import ExchangeType
from passes.assignment import Option
from passes.assignment.column_generation import Frame, Menu, Relaxation, relax
from passes.assignment.joint import Joint
from passes.assignment.master import Duals
from passes.dense_formats import DenseFormats, DenseMember
from passes.format_menu import FormatMenu
from passes.joint_menus import Chosen, MenuMaker, TableClass
from passes.sharding_prices import room_beside
from passes.tier_mixtures import with_mixtures
from passes.tier_options import Resource, TierModel

_FREE = LossChange(0.0)


@dataclass(frozen=True, slots=True, eq=False)
class JointProblem:
    """One program with one format of embedding traffic, stated as a joint problem."""

    program: Program
    frame: Frame
    classes: tuple[TableClass, ...]
    members: tuple[DenseMember, ...]
    menus: tuple[Menu, ...]
    maker: MenuMaker
    resources: tuple[Resource, ...]
    budgets: tuple[str, ...]
    scale: tuple[float, ...]  # what one unit of each budget stands for
    traffic: LossChange

    def price(self, duals: Duals) -> list[tuple[int, Option]]:
        """Options of tables that the prices ask for."""
        return [
            (c, option)
            for c, made in enumerate(self.classes)
            for option in self.maker.best_splits(c, made, duals)
        ]

    def relax(self) -> Relaxation:
        """The master program's optimum."""
        if self.maker.tiers is None:
            return relax(self.frame, self.menus)
        relaxed = relax(self.frame, self.menus, self.price)
        return with_mixtures(self.frame, self.classes, self.maker, relaxed)

    def meaning(self, joint: Joint, t: int, position: int | None = None) -> Chosen:
        """What table ``t``'s chosen option (or the one at ``position`` of its list) stands for."""
        at = joint.solution.choice[t] if position is None else position
        return self.meaning_of(t, joint.problem.options[t][at])

    def meaning_of(self, t: int, option: Option) -> Chosen:
        """What an option of a table stands for."""
        return next(made for made in self.classes if t in made.members).meaning[option]

    def formats_of(self, c: int, option: Option) -> tuple[str, ...]:
        """Formats of a menu's option: weights and state of a table, or the tensors of a dense member."""
        if c < len(self.classes):
            chosen = self.classes[c].meaning[option]
            return chosen.format, chosen.state
        member = self.members[c - len(self.classes)]
        return tuple(tensor.format for tensor in member.meaning[member.options.index(option)].tensors)


def step_base(program: Program, calibration: Calibration) -> float:
    """Seconds of the step besides the embedding phases: overheads, and the dense part when not overlapped."""
    mode = program.options.mode
    empty = dict.fromkeys(PHASES, 0.0)
    split = sharded_dense(program.decisions.dense, program.topology, calibration, program.workload)
    dense = step_timeline(
        program.model, empty, program.topology, program.workload, calibration, mode, reduction=split
    ).step
    return dense + sum(phase_overheads(program.topology, program.workload, calibration, mode).values())


def state_problem(
    program: Program,
    calibration: Calibration,
    *,
    step: float | None = None,
    request: FormatRequest | None = None,
    traffic: LossChange = _FREE,
) -> JointProblem:
    """The joint problem of a program.

    Args:
        program: model, machine, workload (its exchange type is the traffic's format).
        calibration: constants.
        step: the step may last that long (a throughput to keep); None minimises it.
        request: formats asked for; default the constraints'.
        traffic: loss that the format of the traffic costs already.

    Raises:
        InfeasibleError: a table without options or a dense part that leaves no memory.
    """
    constraints, mode = program.options.constraints, program.options.mode
    formats = request if request is not None else constraints.formats
    menu = FormatMenu(formats, program.topology.device, mode) if formats else None
    budgets, scale = _budgets(program, formats, traffic.mean)
    base = step_base(program, calibration)
    tiers: TierModel | None = None
    if constraints.tiers is not None:
        tiers = _tier_model(program, constraints.tiers, step if step is not None else base)
    phases = (*PHASES, "dense") if menu is not None else PHASES
    maker = MenuMaker(program, calibration, menu, tiers, budgets, scale, phases)
    classes = tuple(maker.classes())
    members: tuple[DenseMember, ...] = ()
    if menu is not None:
        members = tuple(DenseFormats(program, calibration, menu, budgets, scale, phases).members())
    first = len(program.model.tables)
    menus = [made.menu for made in classes]
    menus += [Menu((first + i,), list(member.options)) for i, member in enumerate(members)]
    for one in menus:
        _within_budgets(program, one, budgets)
    rows = tiers.rows if tiers else ()
    frame = Frame(
        names=(*(t.name for t in program.model.tables), *(m.name for m in members)),
        hosts=program.topology.hosts,
        host_size=program.topology.host_size,
        capacity=_capacity(program, members),
        phases=phases,
        limits=tuple(row.limit for row in rows),
        stretched=tuple(row.stretched for row in rows),
        budgets=(1.0,) * len(budgets),
        base=base - _plain_dense(program, calibration, members),
        step=step,
    )
    return JointProblem(program, frame, classes, members, tuple(menus), maker, rows, budgets, scale, traffic)


def _tier_model(program: Program, request: TierRequest, step: float) -> TierModel:
    options = program.options
    return TierModel.build(
        program.topology,
        program.workload,
        request,
        options.constraints.memory_reserve,
        step,
        options.mode == "train",
    )


def _budgets(
    program: Program, request: FormatRequest | None, spent: float
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Names of the sums that are bounded and what they may amount to; costs are stated as fractions."""
    if request is None:
        return (), ()
    model = program.model
    elements = model.embedding_params + sum(op.params for op in model.ops if op.gemm is not None)
    found: list[tuple[str, float]] = []
    if request.max_loss is not None:
        if spent > request.max_loss:
            raise InfeasibleError(
                "the format of embedding traffic alone exceeds formats.max_loss; allow a wider one",
                conflict=("formats.max_loss",),
            )
        found.append(("loss", max(request.max_loss - spent, 1e-300)))
    if request.average_bits is not None:
        found.append(("bits", request.average_bits * elements))
    if request.max_bytes is not None:
        found.append(("bytes", float(request.max_bytes)))
    return tuple(name for name, _ in found), tuple(value for _, value in found)


def _within_budgets(program: Program, menu: Menu, budgets: tuple[str, ...]) -> None:
    """Drop options that exceed a budget alone; raises InfeasibleError when none is left."""
    fine = [option for option in menu.options if all(cost <= 1.0 for cost in option.cost)]
    if not fine:
        worst = {"loss": "max_loss", "bits": "average_bits", "bytes": "max_bytes"}
        names = [*(t.name for t in program.model.tables), "a dense tensor"]
        name = names[min(menu.tables[0], len(names) - 1)]
        raise InfeasibleError(
            f"no format of {name!r} fits the budgets {', '.join('formats.' + worst[b] for b in budgets)}; "
            "raise a budget or allow other formats",
            conflict=tuple(f"formats.{worst[b]}" for b in budgets),
        )
    menu.options[:] = fine


def _capacity(program: Program, members: Sequence[DenseMember]) -> float:
    """Bytes of a rank for what is decided here; raises InfeasibleError when the dense part leaves none."""
    mode = program.options.mode
    dense = sum(planned_dense_memory(program).values())
    if mode == "inference" and members:
        # these weights are members of the problem
        dense -= MASTER_BYTES * sum(op.params for op in program.model.ops if op.gemm is not None)
    return room_beside(dense, program)


def _plain_dense(program: Program, calibration: Calibration, members: Sequence[DenseMember]) -> float:
    """Seconds that the members' GEMMs take in the plain type, which the base holds already."""
    if not members:
        return 0.0
    workload, topology = program.workload, program.topology
    plain = COMPUTE_FORMATS[workload.compute_dtype]
    samples = workload.global_batch / topology.world_size
    total = 0.0
    caches = {member.name for member in members}
    for op in program.model.ops:
        if f"{op.name}.kv" in caches:
            ops = program.model.ops
            total += cache_read_seconds(ops, op, plain, samples, topology.device, calibration)[0]
        if op.gemm is not None and op.params > 0:
            total += gemm_price(
                samples * op.gemm_rows,
                *op.gemm,
                plain,
                plain,
                workload.compute_dtype,
                topology.device,
                calibration,
                train=program.options.mode == "train",
            ).seconds
    return total


def relax_all(
    program: Program,
    calibration: Calibration,
    *,
    step: float | None = None,
    request: FormatRequest | None = None,
) -> tuple[list[tuple[JointProblem, Relaxation]], InfeasibleError | None]:
    """Relaxations under each format of embedding traffic, least bound first, and why others were refused."""
    stated: list[tuple[float, int, JointProblem, Relaxation]] = []
    refused: InfeasibleError | None = None
    try:
        programs = traffic_programs(program, request)
    except InfeasibleError as error:
        return [], error
    for order, (one, loss) in enumerate(programs):
        try:
            problem = state_problem(one, calibration, step=step, request=request, traffic=loss)
        except InfeasibleError as error:
            refused = refused or error
            continue
        relaxed = problem.relax()
        if not relaxed.exceeded:
            stated.append((relaxed.bound, order, problem, relaxed))
        elif refused is None:
            refused = too_little(problem, relaxed)
    stated.sort(key=lambda item: item[:2])
    return [(problem, relaxed) for _, _, problem, relaxed in stated], refused


def traffic_programs(program: Program, request: FormatRequest | None) -> list[tuple[Program, LossChange]]:
    """The program with each format of embedding traffic that may be used, and what the format loses."""
    formats = request if request is not None else program.options.constraints.formats
    declared = program.workload.exchange_dtype
    if formats is None or not program.model.tables:
        return [(program, LossChange(0.0))]
    menu = FormatMenu(formats, program.topology.device, program.options.mode)
    offered = [
        set(menu.formats(name, "traffic", declared)) for name in ("traffic.forward", "traffic.backward")
    ]
    made = []
    # where compression is asked for, it chooses what travels
    free = program.options.constraints.compression is None
    types: tuple[ExchangeType, ...] = ("fp32", "bf16", "fp16") if free else (declared,)
    for name in types:
        if not all(name in names for names in offered):
            continue
        mean, square = 0.0, 0.0
        for tensor in ("traffic.forward", "traffic.backward") if name != declared else ():
            change = menu.loss(tensor, name, 1.0)
            mean, square = mean + max(0.0, change.mean), square + change.stderr**2
        one = replace(program, workload=replace(program.workload, exchange_dtype=name))
        made.append((one, LossChange(mean, square**0.5)))
    if not made:
        raise InfeasibleError(
            "formats.rules leave no format for embedding traffic; allow fp32, bf16 or fp16",
            conflict=("formats.rules[traffic.forward]",),
        )
    return made


def too_little(problem: JointProblem, relaxed: Relaxation) -> InfeasibleError:
    """Which limits even averages cannot keep."""
    prices = [("hbm_budget", relaxed.duals.memory * problem.frame.capacity)]
    prices += [
        (f"tiers[{row.tier}].{row.kind}", float(price) * max(limit, problem.frame.step or 0.0))
        for row, price, limit in zip(
            problem.resources, relaxed.duals.extra, problem.frame.limits, strict=True
        )
    ]
    words = {"loss": "formats.max_loss", "bits": "formats.average_bits", "bytes": "formats.max_bytes"}
    prices += [
        (words[name], float(price)) for name, price in zip(problem.budgets, relaxed.duals.cost, strict=True)
    ]
    binding = tuple(name for name, price in prices if price > 0) or ("hbm_budget",)
    return InfeasibleError(
        f"the tables do not fit: {', '.join(binding)} would have to be larger, even if every rank were filled "
        "alike; add hosts, tiers or budget",
        conflict=binding,
        relaxation=f"more of {binding[0]}",
    )
