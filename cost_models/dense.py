"""Layouts of the dense part: units that are gathered together, bytes on each rank, bytes on the wire.

Symbols: P bytes of the dense parameters, N ranks that split them, R replicas of each shard, T = N R ranks.

=========  ==============================================  ====================================
strategy   messages of a step (an all-reduce counts twice)  weights, gradients, state on a rank
=========  ==============================================  ====================================
ddp        2 P                                             all
fsdp       2 P, or 3 P with reshard after forward          1/T, and what is gathered at a time
hsdp       the same + 2 P / N across hosts                 1/N, and what is gathered at a time
=========  ==============================================  ====================================

With N = 8 and one gather, HSDP moves (2 + 2/8) / 2 = 1.125 times the messages of data parallelism, the figure of
DHEN (arXiv 2203.11014). On the wire a ring sends (N-1)/N of a gather, so the ratio of bytes sent is lower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cost_models.memory import dense_memory
from ir.dense_plan import DensePlan, DenseStrategy
from ir.dtypes import nbytes
from ir.ops import Op
from ir.program import Mode, Model, Program
from ir.topology import Topology

IN_FLIGHT = 2  # units gathered at a time: the one that computes, and the next, prefetched beside it


@dataclass(frozen=True, slots=True)
class DenseLayout:
    """``shard`` ranks split the weights, ``replicas`` ranks hold the same shard."""

    strategy: DenseStrategy
    shard: int
    replicas: int
    reshard_after_forward: bool
    unit_bytes: int

    @property
    def gathers(self) -> int:
        """All-gathers of all weights in a step."""
        return 0 if self.shard == 1 else 2 if self.reshard_after_forward else 1


def layout_of(plan: DensePlan) -> DenseLayout:
    """The layout that was decided."""
    return DenseLayout(plan.strategy, plan.shard, plan.replicas, plan.reshard_after_forward, plan.unit_bytes)


def make_layout(
    strategy: DenseStrategy, topology: Topology, reshard_after_forward: bool = False, unit_bytes: int = 0
) -> DenseLayout:
    """``strategy`` on all ranks of ``topology``; ddp takes neither of the last two."""
    world = topology.world_size
    if strategy == "ddp":
        return DenseLayout("ddp", 1, world, False, 0)
    shard = world if strategy == "fsdp" else topology.host_size
    return DenseLayout(strategy, shard, world // shard, reshard_after_forward, unit_bytes)


def in_order(model: Model) -> list[Op]:
    """Ops in the order of the modelled forward pass: bottom, then top."""
    return [
        *(op for op in model.ops if op.phase == "bottom"),
        *(op for op in model.ops if op.phase != "bottom"),
    ]


def dense_units(model: Model, unit_bytes: float, item: float) -> tuple[tuple[str, ...], ...]:
    """Modules that are gathered together: consecutive ones of one phase, until ``unit_bytes`` are reached.

    Parameters that no leaf module owns (of functional ops, or of a module with parametrised children) are in
    no unit. A module that runs more than once a step is a unit of its own.
    """
    called = [op.module for op in model.ops if op.module and op.kind != "lookup"]
    units: list[tuple[str, ...]] = []
    held: list[str] = []
    size, phase = 0.0, ""

    def close() -> None:
        nonlocal held, size
        if held:
            units.append(tuple(held))
        held, size = [], 0.0

    seen: set[str] = set()
    for op in in_order(model):
        if not op.params or not _leaf(op.module, called) or op.module in seen:
            continue
        seen.add(op.module)
        alone = called.count(op.module) > 1
        if alone or op.phase != phase:
            close()
        phase = op.phase
        held.append(op.module)
        size += op.params * item
        if alone or size >= unit_bytes:
            close()
    close()
    return tuple(units)


def _leaf(module: str, called: Sequence[str]) -> bool:
    return bool(module) and not any(other.startswith(f"{module}.") for other in called)


def unit_params(model: Model, units: Sequence[Sequence[str]]) -> tuple[list[int], int]:
    """Parameters of each unit, and of none."""
    of = {module: i for i, unit in enumerate(units) for module in unit}
    sizes = [0] * len(units)
    rest = 0
    for op in model.ops:
        if op.module in of:
            sizes[of[op.module]] += op.params
        else:
            rest += op.params
    return sizes, rest


def gathered_params(sizes: Sequence[int], rest: int, reshard_after_forward: bool) -> int:
    """Parameters gathered on a rank at the fullest moment."""
    if not reshard_after_forward:
        return sum(sizes) + rest
    pairs = [sum(sizes[i : i + IN_FLIGHT]) for i in range(len(sizes))]
    return rest + max(pairs, default=0)


def planned_dense_memory(program: Program) -> dict[str, int]:
    """Bytes by purpose of the dense part on each rank, as decided so far (replicated before that)."""
    from cost_models.dense_tensor import tensor_memory  # which needs in_order of this file

    whole = dense_memory(program.model, program.workload, program.topology, program.options.mode)
    plan = program.decisions.dense
    if plan is not None and plan.tensor > 1 and program.options.mode == "train":
        samples = program.workload.global_batch / program.topology.world_size
        item = nbytes(program.workload.compute_dtype)
        return tensor_memory(whole, plan, program.model.dense_params, samples, item)
    return laid_memory(
        whole,
        plan,
        program.model,
        nbytes(program.workload.compute_dtype),
        program.options.mode,
    )


def laid_memory(
    whole: dict[str, int], plan: DensePlan | None, model: Model, item: float, mode: Mode = "train"
) -> dict[str, int]:
    """``whole`` (of a replicated dense part) under ``plan``.

    A rank keeps 1/N of weights, gradients and state (each unit's padded to N, which is not counted), and what is
    gathered for the moment: weights, and whole gradients of :data:`IN_FLIGHT` units, in the compute type. A split
    over one rank is a replica.
    """
    if plan is None or plan.shard == 1 or mode != "train":
        return whole
    sizes, rest = unit_params(model, plan.units)
    split = ("dense_weights", "dense_gradients", "dense_optimizer")
    used = {name: math.ceil(size / plan.shard) if name in split else size for name, size in whole.items()}
    weights = gathered_params(sizes, rest, plan.reshard_after_forward)
    used["dense_gathered"] = math.ceil((weights + gathered_params(sizes, rest, True)) * item)
    return used


def message_bytes(layout: DenseLayout, size: float) -> float:
    """Bytes of the buffers of a step's collectives for ``size`` bytes of parameters, all-reduces counted twice."""
    if layout.shard == 1:
        return 2 * size if layout.replicas > 1 else 0.0
    across = 2 * size / layout.shard if layout.replicas > 1 else 0.0
    return (layout.gathers + 1) * size + across


def wire_bytes(layout: DenseLayout, size: float) -> float:
    """Bytes that ring collectives send from each rank in a step for ``size`` bytes of parameters."""
    n, r = layout.shard, layout.replicas
    return (
        (layout.gathers + 1) * (n - 1) / n * size + 2 * (r - 1) / r * size / n
        if n > 1
        else 2 * (r - 1) / r * size
    )


def replication_bytes(table_bytes: float, groups: int, ranks: int) -> float:
    """Bytes that ``groups`` copies of tables of S bytes add to each of T ranks on average: S (M - 1) / T."""
    return table_bytes * (groups - 1) / ranks
