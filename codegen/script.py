"""A plan as a training script for ``torchrun`` that needs torch and TorchRec only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from codegen.collectives import advice, bucket_mib
from codegen.compressed import wire_types
from codegen.dense import group_plan, script_values
from codegen.emission import plain
from codegen.script_parts import build_lines, declare, features, input_names, template
from codegen.torchrec import in_torchrec_order
from codegen.torchrec_check import check, collections_of, locate
from ir.plan import Plan, TablePlan
from ir.workload import Optimizer

if TYPE_CHECKING:
    from torch import nn

_EPS = 1e-8  # FBGEMM's default for its Adagrad kernels
_CLASSES: dict[Optimizer, tuple[str, str]] = {
    "sgd": ("torch.optim.SGD", '{"lr": lr}'),
    "adagrad": ("torch.optim.Adagrad", f'{{"lr": lr, "eps": {_EPS}}}'),
    "rowwise_adagrad": ("RowWiseAdagrad", f'{{"lr": lr, "eps": {_EPS}}}'),
    "adam": ("torch.optim.Adam", '{"lr": lr}'),
}
_DEFAULT_LR = 0.01


def emit_torchrec(plan: Plan, model: str, options: dict[str, Any] | None = None) -> str:
    """The text of a script that trains ``model`` under ``plan``.

    The model is built once here, on the meta device, to find its inputs and its collections.

    Args:
        plan: the plan.
        model: a zoo name, ``"file.py:callable"`` or ``"module:callable"``.
        options: of the zoo model or the callable.

    Raises:
        InputError: the model cannot be built, is another one than the plan's, or TorchRec cannot run the
            plan; or the model's inputs are neither floating tensors nor one ``KeyedJaggedTensor``.
    """
    options = dict(options or {})
    module, inputs = declare(model, options)
    device = "cpu" if plan.topology.device.kind == "cpu" else "cuda"
    check(plan, module, device=device)
    why_cpu = _needs_cpu(module)
    dense, arguments = input_names(module, inputs)
    collections = collections_of(module)
    entire, plan = plan, group_plan(plan)
    tables = []
    for table in plan.table_plans:
        collection, config = locate(table, collections)
        row = (collection.path, table.rows, table.sharding_type, table.compute_kernel, _blocks(table, plan))
        tables.append((config.name, *row))
    optimizer = plan.workload.optimizer
    counterpart: Optimizer = "adagrad" if optimizer == "rowwise_adagrad" else optimizer
    return template("torchrec.py.j2").render(
        model_name=plain(plan.model.name),
        world_size=entire.world_size,
        hosts=entire.topology.hosts,
        host_size=entire.topology.host_size,
        global_batch=entire.workload.global_batch,
        digest=entire.digest,
        needs="" if ":" in model else ", and planner for its zoo",
        features=features(plan),
        tables=tables,
        on_meta=not why_cpu,
        why_cpu=why_cpu,
        build=[f"    {line}".rstrip() for line in build_lines(model, options, "cpu" if why_cpu else "meta")],
        dense=dense,
        arguments=arguments,
        optimizer=optimizer,
        table_class=_CLASSES[optimizer][0],
        table_arguments=_CLASSES[optimizer][1],
        dense_class=_CLASSES[counterpart][0],
        dense_arguments=_CLASSES[counterpart][1],
        lr=_DEFAULT_LR,
        bucket_mib=bucket_mib(plan),
        advice=advice(plan),
        wire=wire_types(plan, device),
        **script_values(entire),
    )


def script_limits(plan: Plan) -> tuple[str, ...]:
    """What the plan decides and the script of :func:`emit_torchrec` leaves to its reader, one sentence each."""
    decided, found = plan.decisions, []
    if decided.towers is not None and decided.towers.applied:
        found.append("it exchanges vectors between all ranks, without towers; the target 'script' has them")
    if decided.dedup is not None and decided.dedup.chosen:
        found.append(
            "its batches hold every sample's ids; put codegen.dedup.deduplicator(plan) into your data loader"
        )
    if decided.formats is not None and any(
        tensor.format != "fp32" for tensor in decided.formats.tensors if tensor.kind != "traffic"
    ):
        found.append("tables and GEMMs compute in the model's own types; plan.apply has those of the plan")
    if any(table.tiers is not None for table in plan.table_plans):
        found.append("all rows of tables are in device memory; plan.apply has memory tiers")
    if decided.growth is not None:
        found.append("it trains at full size throughout; codegen.phased.PhasedModel has the phases")
    return tuple(found)


def _needs_cpu(module: nn.Module) -> str:
    """Why the model cannot be built on the meta device and filled by TorchRec; empty if it can."""
    for name, _ in module.named_buffers():
        return f"its buffer {plain(name)} holds values that a meta tensor would lose"
    held = {id(inner) for collection in collections_of(module) for inner in collection.module.modules()}
    for path, child in module.named_modules():
        own = next(iter(child.named_parameters(recurse=False)), None)
        if own is not None and id(child) not in held and not hasattr(child, "reset_parameters"):
            return f"{plain(path) or 'the model'} has no reset_parameters to draw its weights with"
    return ""


def _blocks(table: TablePlan, plan: Plan) -> list[tuple[int, int, int]]:
    """(first column, columns, first rank) of each column block, narrow ones first; none for copies."""
    if table.sharding_type == "data_parallel":
        return []
    ranks = {"row_wise": plan.world_size, "table_row_wise": plan.topology.host_size}
    step = ranks.get(
        table.sharding_type, plan.topology.host_size if table.sharding_type == "grid_shard" else 1
    )
    return [(shard.col, shard.cols, shard.rank) for shard in in_torchrec_order(table)[::step]]
