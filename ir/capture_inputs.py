"""Inputs to trace a model with: the caller's, the model's own, or inferred from the graph.

Tensors become meta tensors, so that propagation costs no memory; TorchRec's jagged tensors stay
real, because their code reads lengths, and are as small as the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ir.capture_embeddings import is_collection, is_jagged, is_pooled_collection
from ir.errors import InputError

DEFAULT_BATCH = 16  # samples to trace with when nobody says; records are per sample


def own_inputs(model: nn.Module, batch: int | None) -> Any:
    """What the model's own ``example_inputs(batch_size)`` gives, or None without one."""
    method = getattr(model, "example_inputs", None)
    return method(batch or DEFAULT_BATCH) if callable(method) else None


def bind(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Positional or named example inputs as a mapping from parameter of ``forward`` to value.

    Raises:
        InputError: they do not fit the signature.
    """
    if isinstance(model, torch.fx.GraphModule):
        return _bind_graph(model, inputs)
    signature = inspect.signature(model.forward)
    try:
        named = isinstance(inputs, Mapping)
        bound = signature.bind(**inputs) if named else signature.bind(*_positional(inputs))
    except TypeError as error:
        names = list(signature.parameters)
        raise InputError(
            f"example_inputs does not fit {type(model).__name__}.forward({', '.join(names)}): {error}"
        ) from None
    return _spread(bound, signature)


def _bind_graph(model: torch.fx.GraphModule, inputs: Any) -> dict[str, Any]:
    holders = {str(node.target): node for node in model.graph.find_nodes(op="placeholder")}
    named = dict(inputs) if isinstance(inputs, Mapping) else {}
    values = () if isinstance(inputs, Mapping) else _positional(inputs)
    named.update(zip(holders, values, strict=False))
    missing = [name for name, node in holders.items() if name not in named and not node.args]
    if missing or len(values) > len(holders) or not named.keys() <= holders.keys():
        raise InputError(
            f"example_inputs does not fit the graph, which takes ({', '.join(holders)})"
            + (f": {missing[0]!r} is missing" if missing else "")
        )
    return named


def _positional(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def _spread(bound: inspect.BoundArguments, signature: inspect.Signature) -> dict[str, Any]:
    """Variadic parameters under the names that ``fx`` gives their placeholders."""
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    return {stars.get(kinds[name], "") + name: value for name, value in bound.arguments.items()}


def constants(model: nn.Module, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Parameters of ``forward`` that take their default: fixed while tracing, so that tests on them work."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty and name not in (given or {})
    }


def to_meta(value: Any) -> Any:
    """Tensors inside tuples, lists and mappings as meta tensors of the same shape."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_meta(item) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(to_meta(item) for item in value)
    if isinstance(value, Mapping):
        return {key: to_meta(item) for key, item in value.items()}
    return value


def batch_of(values: Any) -> int | None:
    """The batch of example inputs: of jagged ids, else the first dimension of the first floating tensor.

    None for plain ids only: there may be as many of them as ids rather than as samples.
    """
    leaves = list(_leaves(values))
    for leaf in leaves:
        if is_jagged(leaf) and hasattr(leaf, "stride"):
            return int(leaf.stride())
    tensors = (leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim)
    return next((int(tensor.shape[0]) for tensor in tensors if tensor.is_floating_point()), None)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def infer(graph: torch.fx.Graph, model: nn.Module, batch: int) -> dict[str, Any]:
    """Example inputs from the modules that read each placeholder.

    Raises:
        InputError: a placeholder is read by nothing that says its shape.
    """
    values = {}
    for node in graph.find_nodes(op="placeholder"):
        if node.args:
            values[str(node.target)] = node.args[0]
            continue
        readers = [model.get_submodule(str(user.target)) for user in node.users if user.op == "call_module"]
        collections = [module for module in readers if is_collection(module)]
        if collections:
            values[str(node.target)] = jagged_ids(collections, batch)
            continue
        value = next((v for user in node.users for v in _from_user(node, user, model, batch)), None)
        if value is None:
            raise InputError(
                f"the shape of input {str(node.target)!r} of {type(model).__name__} is not evident from the "
                "model; pass example_inputs=(...) or give the model a method example_inputs(batch_size)"
            )
        values[str(node.target)] = value
    return values


def _from_user(node: torch.fx.Node, user: torch.fx.Node, model: nn.Module, batch: int) -> Sequence[Any]:
    """What ``user`` takes in the place of ``node``: an empty sequence when it does not say."""
    if user.op != "call_module":
        return ()
    module: Any = model.get_submodule(str(user.target))
    if isinstance(module, nn.EmbeddingBag):
        ragged = len(user.args) > 1 or "offsets" in user.kwargs
        return (torch.empty((batch,) if ragged else (batch, 1), dtype=torch.int64, device="meta"),)
    if not user.args or user.args[0] is not node:
        return ()
    if isinstance(module, nn.Embedding):
        return (torch.empty((batch,), dtype=torch.int64, device="meta"),)
    if isinstance(module, nn.Linear):
        return (torch.empty((batch, module.in_features), dtype=module.weight.dtype, device="meta"),)
    if isinstance(module, nn.LayerNorm):
        return (torch.empty((batch, *module.normalized_shape), dtype=torch.float32, device="meta"),)
    if isinstance(module, nn.BatchNorm1d):
        return (torch.empty((batch, module.num_features), dtype=torch.float32, device="meta"),)
    return ()


def jagged_ids(collections: Sequence[Any], batch: int) -> Any:
    """One id (0) per sample for every feature that TorchRec collections read, as a ``KeyedJaggedTensor``."""
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    pooled = [collection for collection in collections if is_pooled_collection(collection)]
    configs = [
        config
        for collection in collections
        for config in (
            collection.embedding_bag_configs() if collection in pooled else collection.embedding_configs()
        )
    ]
    keys = list(dict.fromkeys(feature for config in configs for feature in config.feature_names))
    count = len(keys) * batch
    weighted = any(collection.is_weighted() for collection in pooled)
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.zeros(count, dtype=torch.int64),
        lengths=torch.ones(count, dtype=torch.int32),
        weights=torch.ones(count) if weighted else None,
    )
