"""A plan's number formats in TorchRec's terms: the ``DataType`` of tables, to train and to serve."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from codegen.formats import apply_formats
from codegen.torchrec_check import Collection, check, collections_of, locate
from ir.errors import InputError
from ir.formats import parse_format
from ir.plan import Plan, TablePlan

if TYPE_CHECKING:
    from torch import nn

_TRAINED = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# TorchRec 1.8, modules/embedding_configs.py: the torch types that stand for its DataType
_SERVED = {"fp32": "float32", "fp16": "float16", "int8": "int8", "int4": "quint4x2", "int2": "quint2x4"}


def set_formats(plan: Plan, module: nn.Module, collections: Iterable[Collection], device: str) -> None:
    """Give ``module`` the formats of the plan, before it is sharded for training, in place.

    Tables get their ``DataType`` and weights of that type; GEMMs compute in their formats with
    straight-through gradients. A plan without formats changes nothing.

    Raises:
        InputError: a table format that TorchRec cannot train on the device; before anything is changed.
    """
    import torch

    collections = tuple(collections)
    narrow = {t.name: _trainable(t, device) for t in plan.table_plans if t.format is not None}
    decided = plan.decisions.formats
    if decided is not None:
        dense = {t.name: t.format for t in decided.tensors if t.kind in ("weight", "activation")}
        if any(format != "fp32" for format in dense.values()):
            apply_formats(module, dense, training=True, inplace=True)
    for table in plan.table_plans:
        if table.name in narrow:
            collection, config = locate(table, collections)
            weight = collection.weight(config.name)
            weight.data = weight.data.to(getattr(torch, _TRAINED[narrow[table.name]]))
            _set_data_type(collection.module, config.name, narrow[table.name].upper())


def _trainable(table: TablePlan, device: str) -> str:
    base = parse_format(table.format or "fp32").base
    if base not in _TRAINED:
        raise InputError(
            f"table {table.name!r} is planned as {table.format}, and TorchRec trains fp32, fp16 and bf16 tables only; "
            "serve it with codegen.torchrec_formats.quantized, or emulate it with plan.apply(model)"
        )
    if base == "bf16" and device == "cpu":
        raise InputError(
            f"table {table.name!r} is planned as bf16, which TorchRec trains on CUDA only; allow fp16 or fp32 for it"
        )
    return base


def _set_data_type(module: Any, name: str, data_type: str) -> None:
    from torchrec.types import DataType

    configs = (
        module.embedding_bag_configs if hasattr(module, "embedding_bag_configs") else module.embedding_configs
    )
    for config in configs():
        if config.name == name:
            config.data_type = DataType[data_type]


def quantized(plan: Plan, module: nn.Module, *, inplace: bool = False) -> nn.Module:
    """``module`` with TorchRec's quantised collections for serving, each table in the plan's format.

    The result computes on one device, and TorchRec's ``shard_quant_model`` shards it. GEMMs are left
    alone; see :func:`codegen.formats.apply` and :mod:`codegen.torchao`.

    Args:
        plan: a plan whose tables are those of ``module``; tables without a format keep the declared type.
        module: with ``EmbeddingBagCollection`` or ``EmbeddingCollection``.
        inplace: change ``module`` itself.

    Raises:
        InputError: the plan is not for this module, or a format that TorchRec cannot serve.
    """
    import torch
    import torchrec
    from torchrec.inference.modules import quantize_embeddings
    from torchrec.quant import embedding_modules as narrow

    check(plan, module)
    collections = collections_of(module)
    types: dict[str, Any] = {}
    for table in plan.table_plans:
        _, config = locate(table, collections)
        kind = getattr(torch, _served(table))
        if types.setdefault(config.name, kind) != kind:
            raise InputError(
                f"tables called {config.name!r} in two collections are planned in different formats, and TorchRec "
                "finds formats by name; rename one or give both one format"
            )
    made: nn.Module = quantize_embeddings(
        module if inplace else copy.deepcopy(module),
        torch.int8,  # of tables that are not listed: there are none
        inplace=True,
        additional_qconfig_spec_keys=[torchrec.EmbeddingCollection],
        additional_mapping={torchrec.EmbeddingCollection: narrow.EmbeddingCollection},
        per_table_weight_dtype=types,
    )
    return made


def _served(table: TablePlan) -> str:
    base = parse_format(table.format or table.dtype).base
    found: Mapping[str, str] = _SERVED
    if base not in found:
        raise InputError(
            f"table {table.name!r} is planned as {base}, and TorchRec serves {', '.join(found)} tables; allow one of them"
        )
    return found[base]
