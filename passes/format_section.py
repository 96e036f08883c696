"""A joint solution's formats as the section ``decisions.formats``: every tensor with its next choice and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from cost_models.embedding import state_bytes, stored_bytes
from cost_models.formats import bits_per_element
from ir.format_plan import FormatPlan, FormatRequest, TensorFormat
from ir.program import Program
from ir.units import format_bytes
from passes.assignment import Option
from passes.assignment.joint import Joint
from passes.assignment.master import Master
from passes.dense_formats import DenseChoice
from passes.format_menu import has_kernel
from passes.joint import JointProblem

Formats = tuple[str, ...]
ONLY = {"runner_up": "", "reason": "the only format allowed"}


@dataclass(frozen=True, slots=True)
class Resolved:
    """A request whose objective is the step, and what was proved about the objective that was asked."""

    request: FormatRequest
    value: float | None = None  # of the objective asked, when it is not the step
    bound: float | None = None
    price: float = 0.0
    following: Mapping[str, dict[str, str]] = field(default_factory=dict)  # tensor -> runner_up and reason


def total_loss(problem: JointProblem, joint: Joint) -> float:
    """Predicted loss increase of a joint solution, traffic included."""
    return sum(tensor.loss for tensor in tensor_formats(problem, joint))


def stored_size(problem: JointProblem, joint: Joint) -> float:
    """Bytes of all tables with their optimizer state and of all GEMM weights."""
    program = problem.program
    size = sum(t.elements * t.bits / 8 for t in tensor_formats(problem, joint) if t.kind == "weight")
    for t, table in enumerate(program.model.tables):
        chosen = problem.meaning(joint, t)
        size += table.rows * _row_bytes(program, table.dim, chosen.format, chosen.state)
    return size


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
                **_next_of_table(problem, joint, t),
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
        following = _next_of_member(problem, joint, i)
        for k, tensor in enumerate(dense_choice(problem, joint, i).tensors):
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
                    **following[k],
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


def _next_of_table(problem: JointProblem, joint: Joint, t: int) -> dict[str, str]:
    """The runner-up format of a table, and why the chosen one was taken."""
    made = next(c for c in problem.classes if t in c.members)
    chosen = (problem.meaning(joint, t).format,)
    owner = problem.classes.index(made)
    found = _dearer(problem, joint, owner, chosen, lambda option: (made.meaning[option].format,))
    if found is None:
        return ONLY
    (other,), delta = found
    return {"runner_up": other, "reason": _why(other, delta, joint)}


def _next_of_member(problem: JointProblem, joint: Joint, member: int) -> list[dict[str, str]]:
    """The same for each tensor of a dense member; those that would not change have no runner-up."""
    owner = len(problem.classes) + member
    chosen = dense_choice(problem, joint, member)
    mine = tuple(tensor.format for tensor in chosen.tensors)
    found = _dearer(problem, joint, owner, mine, lambda option: problem.formats_of(owner, option))
    if found is None:
        return [ONLY] * len(mine)
    other, delta = found
    words = _why(" x ".join(dict.fromkeys(other)), delta, joint)
    return [
        {"runner_up": b if b != a else "", "reason": words if b != a else ""}
        for a, b in zip(mine, other, strict=True)
    ]


def _dearer(
    problem: JointProblem, joint: Joint, owner: int, chosen: Formats, formats_of: Callable[[Option], Formats]
) -> tuple[Formats, float] | None:
    """The other formats of a menu of the least reduced cost, and how much more than the chosen they cost."""
    relaxed = joint.relaxed
    best: dict[Formats, float] = {}
    for made, (c, o) in zip(relaxed.columns, relaxed.index, strict=True):
        if c == owner:
            formats = formats_of(problem.menus[c].options[o])
            best[formats] = min(best.get(formats, math.inf), Master.reduced(made, relaxed.duals))
    others = [formats for formats in best if formats != chosen]
    if not others:
        return None
    other = min(others, key=lambda formats: (best[formats], formats))
    return other, best[other] - best.get(chosen, 0.0)


def _why(other: str, delta: float, joint: Joint) -> str:
    if delta > 1e-9 * joint.step:
        return (
            f"{other} would cost {delta * 1e6:.3g} us of the step more, at the prices of memory and accuracy"
        )
    return f"{other} would cost the same, at the prices of memory and accuracy"


def trade(other: str, loss: float, size: float) -> str:
    """Why a knapsack did not take ``other``: what it would add to the loss and to the bytes."""
    parts = [f"lose {abs(loss):.2g} {'more' if loss > 0 else 'less'}"] if loss else []
    if size:
        parts.append(f"{'take' if size > 0 else 'save'} {format_bytes(abs(size))}")
    return f"{other} would {' and '.join(parts) or 'be the same'}"


def format_section(problem: JointProblem, joint: Joint, bound: float, resolved: Resolved) -> FormatPlan:
    """The section ``decisions.formats``, without a sweep."""
    asked = problem.program.options.constraints.formats
    menu = problem.maker.formats
    assert asked is not None
    assert menu is not None
    known = resolved.following
    tensors = tuple(
        replace(t, runner_up=known[t.name]["runner_up"], reason=known[t.name]["reason"])
        if t.name in known
        else t
        for t in tensor_formats(problem, joint)
    )
    stored = [t for t in tensors if t.kind in ("table", "weight")]
    elements = sum(t.elements for t in stored)
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
        bytes=stored_size(problem, joint),
        cast_seconds=sum(dense_choice(problem, joint, i).price.cast for i in range(len(problem.members))),
        sensitivity=f"{given.method}, {given.metric}"
        if given
        else "data-free: 10^(-QSNR/10) on a standard normal",
        tensors=tensors,
        loss_price=price if step else resolved.price,
    )


def _row_bytes(program: Program, dim: int, format: str, state: str) -> float:
    kept = stored_bytes(format, dim)
    return kept + (
        state_bytes(program.workload.optimizer, dim, state) if program.options.mode == "train" else 0.0
    )
