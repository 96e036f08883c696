"""Bytes of device memory, by purpose, of embedding units and of the dense part of a model.

Purposes: ``weights``, ``optimizer``, ``gradients``, ``io`` (ids received, outputs of the global batch
and their gradients) for units; ``dense_weights``, ``dense_gradients``, ``dense_optimizer``,
``activations`` for the dense part. Optimizer state: sgd 0, row-wise Adagrad 4 bytes a row, Adagrad 4
and Adam 8 bytes an element. Fused kernels apply gradients as they compute them and keep none; a
data-parallel table keeps a dense one.
"""

from __future__ import annotations

import math

from cost_models.embedding import LENGTH_BYTES, state_bytes, stored_bytes, traffic
from ir.dtypes import nbytes
from ir.ops import EmbeddingTable
from ir.program import Mode, Model
from ir.sharding import ShardingOption, Unit
from ir.topology import Topology
from ir.workload import Workload

DENSE_STATE_BYTES = 8  # Adam's two fp32 moments per dense parameter, the largest in common use
MASTER_BYTES = 4  # dense weights and gradients are kept in fp32, also under automatic mixed precision


def unit_memory(
    table: EmbeddingTable,
    option: ShardingOption,
    unit: Unit,
    topology: Topology,
    workload: Workload,
    mode: Mode,
    state: str = "fp32",
) -> dict[str, int]:
    """Bytes by purpose on each rank that holds ``unit``, its largest block counted.

    ``table.dtype`` and ``state`` are as in :func:`cost_models.embedding.unit_seconds`.
    """
    rows, width = unit.blocks[0].rows, unit.blocks[0].cols  # the first block of a row split is the largest
    train = mode == "train"
    copied = option.sharding_type == "data_parallel"
    moved = traffic(table, option, unit, topology, workload)
    outputs = moved.outputs * width * nbytes(workload.exchange_dtype)
    ids = moved.ids * workload.id_bytes + moved.lengths * LENGTH_BYTES + moved.weight_bytes
    used = {
        "weights": math.ceil(rows * stored_bytes(table.dtype, width)),
        "io": math.ceil(ids + outputs * (2 if train else 1)),
    }
    if train:
        used["optimizer"] = math.ceil(rows * state_bytes(workload.optimizer, width, state))
        if copied:
            # gradients of rows that are stored with scales are fp32
            used["gradients"] = math.ceil(rows * width * nbytes(_gradient_type(table.dtype)))
    return used


def _gradient_type(dtype: str) -> str:
    return dtype if dtype in ("fp64", "fp32", "bf16", "fp16") else "fp32"


def dense_memory(model: Model, workload: Workload, topology: Topology, mode: Mode) -> dict[str, int]:
    """Bytes by purpose of the dense part, the same on every rank (it is replicated).

    Activations are the outputs of all dense ops and the pooled embeddings received, for one rank's
    samples; training keeps them all until the backward pass, inference only the two largest.
    """
    samples = math.ceil(workload.global_batch / topology.world_size)
    scale = {op.name: nbytes(workload.compute_dtype) / nbytes(op.dtype) for op in model.ops}
    kept = [op.activation_bytes * scale[op.name] for op in model.ops if op.kind not in ("lookup", "input")]
    received = _received_bytes(model, workload)
    params = model.dense_params
    if mode == "inference":
        live = received + sum(sorted(kept)[-2:])
        return {"dense_weights": params * MASTER_BYTES, "activations": math.ceil(samples * live)}
    return {
        "dense_weights": params * MASTER_BYTES,
        "dense_gradients": params * MASTER_BYTES,
        "dense_optimizer": params * DENSE_STATE_BYTES,
        "activations": math.ceil(samples * (sum(kept) + 2 * received)),
    }


def _received_bytes(model: Model, workload: Workload) -> float:
    """Bytes of looked-up embeddings one sample receives."""
    item = nbytes(workload.exchange_dtype)
    total = 0.0
    for table in model.tables:
        for feature in table.features:
            rows = workload.stats(feature).pooling_factor if table.pooling == "none" else 1.0
            total += rows * table.dim * item
    return total
