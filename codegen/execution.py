"""Which runtime runs a plan on a process group, and its weights whole again.

======== ==================================================================================================
torchrec TorchRec's ``DistributedModelParallel`` (:func:`codegen.torchrec.sharded_model`)
coded    the compressed exchange (:func:`codegen.compressed.compressed_model`)
towers   the two-step exchange of towers (:func:`codegen.towers.tower_model`)
composed several of towers, deduplication, codecs, formats and tiers (:func:`codegen.composed.composed_model`)
======== ==================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from codegen.composed import composed_model, composes
from codegen.compressed import CompressedModel, compressed_model, runs_exchange
from codegen.dense import groups_of
from ir.compression import codec_of
from ir.dtypes import nbytes
from ir.plan import Plan

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Form = Literal["torchrec", "coded", "towers", "composed"]


class Running(Protocol):
    """What all runtimes give: a model whose optimizers are its own."""

    module: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def zero_grad(self) -> None: ...

    def step(self) -> None: ...


def form_of(plan: Plan, device: str = "cpu") -> Form:
    """The runtime that does all that the plan decides about tables."""
    if composes(plan, device):
        return "composed"
    if plan.decisions.towers is not None and plan.decisions.towers.applied:
        return "towers"
    return "coded" if runs_exchange(plan) else "torchrec"


def executed(plan: Plan, module: nn.Module, process_group: Any = None, **kwargs: Any) -> Any:
    """``module`` (with the plan's tower modules, if it has any) as the plan runs it on a process group; consumed.

    ``kwargs`` are those of the runtime's function, and what it raises is raised.
    """
    from codegen.torchrec import sharded_model
    from codegen.towers import tower_model

    run: dict[Form, Any] = {
        "composed": composed_model,
        "towers": tower_model,
        "coded": compressed_model,
        "torchrec": sharded_model,
    }
    return run[form_of(plan, kwargs.get("device", "cpu"))](plan, module, process_group, **kwargs)


def losses_of(plan: Plan) -> str:
    """What makes a run differ from the unsharded model by more than rounding; empty where nothing does."""
    section = plan.decisions.compression
    used = set() if section is None else {t.codec for t in section.tables if section.uses(t.direction)}
    lossy = sorted(name for name in used if codec_of(name).bounded or codec_of(name).format)
    if lossy:
        return f"vectors travel in {', '.join(lossy)}"
    if nbytes(plan.workload.exchange_dtype) < 4 and any(
        table.sharding_type != "data_parallel" for table in plan.table_plans
    ):
        return f"vectors travel in {plan.workload.exchange_dtype}"
    return ""


def gathered(
    model: Any, plan: Plan, weights: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """All weights whole, on every rank, by their names before the plan was applied.

    Args:
        model: what :func:`executed` gave.
        plan: its plan.
        weights: table -> name of its parameter.
        shapes: of every parameter.
    """
    from codegen.runtime.gather import whole_weights

    if isinstance(model, CompressedModel):
        return _of_coded(model, weights, shapes)
    if form_of(plan) in ("towers", "composed"):
        return _of_towers(model, plan, weights, shapes)
    replicas = groups_of(plan)
    return whole_weights(model.module, replicas.groups if replicas is not None else 1)


def _of_coded(
    model: CompressedModel, weights: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    import torch
    import torch.distributed as dist

    found = {name: p.detach().clone() for name, p in model.module.named_parameters() if name in shapes}
    for exchange in model.embeddings:
        tables = {piece.table for pieces in exchange.by_rank for piece in pieces}
        parts = {table: torch.zeros(shapes[weights[table]]) for table in sorted(tables)}
        for piece, held in exchange.held():
            parts[piece.table][:, piece.col : piece.col + piece.cols] = held.detach()
        for table, whole in parts.items():
            dist.all_reduce(whole, group=model.group)
            found[weights[table]] = whole
        for piece, copy in zip(exchange.copies, exchange.replicated(), strict=True):
            found[weights[piece.table]] = copy.detach().clone()
    return found


def _of_towers(
    model: Any, plan: Plan, weights: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    import torch
    import torch.distributed as dist

    from codegen.runtime.dense.shard import whole
    from codegen.towers import whole_tables

    names = ((name.removeprefix("module."), p) for name, p in model.module.named_parameters())
    found = {name: whole(p).detach().clone() for name, p in names if name in shapes}
    tables = whole_tables(model, {t.name: (t.rows, t.dim) for t in plan.table_plans})
    copied = [table.name for table in plan.table_plans if table.sharding_type == "data_parallel"]
    if copied:
        held = model.lookup.copies.parameters()
        tables |= {name: whole(p).detach() for name, p in zip(copied, held, strict=True)}
    found |= {weights[table]: value for table, value in tables.items()}
    members = model.lookup.layout.members
    for tower, path in model.moved.items():
        mine = dict(model.lookup.module.named_parameters()) if model.lookup.tower == tower else {}
        for name in (n for n in shapes if n.startswith(f"{path}.")):
            value = (
                mine[name.removeprefix(f"{path}.")].detach().clone() if mine else torch.zeros(shapes[name])
            )
            dist.broadcast(value, src=tower * members, group=model.lookup.groups.world)
            found[name] = value
    return found
