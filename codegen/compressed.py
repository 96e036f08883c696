"""A plan's compression section as it runs: TorchRec's quantised communication, or the compressed exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from codegen.torchrec_check import Collection, check, collections_of, group_for, locate
from ir.compression import CodecName, Compression, Direction, torchrec_refuses
from ir.errors import InputError
from ir.plan import Plan
from ir.sharding import ROW_SPLIT
from ir.workload import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import nn


def runs_exchange(plan: Plan) -> bool:
    """Whether the plan compresses an exchange by the project's own codecs."""
    section = plan.decisions.compression
    return section is not None and section.engine == "exchange" and any(e.used for e in section.exchanges)


def sharders(plan: Plan, device: str) -> list[Any]:
    """TorchRec's sharders for the plan, with its quantised communication where the plan has narrow vectors.

    Raises:
        InputError: as :func:`wire_types`.
    """
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

    registry = codecs_registry(plan, device)
    return [
        EmbeddingBagCollectionSharder(qcomm_codecs_registry=registry),
        EmbeddingCollectionSharder(qcomm_codecs_registry=registry),
    ]


def codecs_registry(plan: Plan, device: str) -> Any:
    """TorchRec's codecs registry; None where vectors travel as float32. Raises InputError as :func:`wire_types`."""
    forward, backward = wire_types(plan, device)
    if forward == backward == "none":
        return None
    import torch
    from torchrec.distributed.fbgemm_qcomm_codec import (
        CommType,
        QCommsConfig,
        get_qcomm_codecs_registry,
    )

    config = QCommsConfig(
        forward_precision=CommType("fp32" if forward == "none" else forward),
        backward_precision=CommType("fp32" if backward == "none" else backward),
    )
    # For a CPU it would put fp16 in the place of bf16, which gloo of torch 2.13 carries and sums. The device has no
    # other effect there.
    return get_qcomm_codecs_registry(config, device=torch.device("cuda"))


def wire_types(plan: Plan, device: str) -> tuple[CodecName, CodecName]:
    """TorchRec's codec of vectors (forward) and of their gradients (backward), ``"none"`` for float32.

    That is the workload's exchange type, both ways, where it is narrow; else what the compression section says.

    Raises:
        InputError: the section is for the compressed exchange, or a codec is one that TorchRec would replace silently.
    """
    split = any(table.sharding_type in ROW_SPLIT for table in plan.table_plans)
    declared = plan.workload.exchange_dtype
    if declared != "fp32":
        refused = torchrec_refuses(declared, device, split)
        if refused:
            raise InputError(
                f"vectors cannot travel as {declared}: {refused}; set the workload's exchange_dtype to fp16"
            )
        return declared, declared
    section = plan.decisions.compression
    if section is None or not any(exchange.used for exchange in section.exchanges):
        return "none", "none"
    if section.engine != "torchrec":
        raise InputError(
            "the plan compresses exchanges by codecs whose messages have no fixed size, which TorchRec cannot carry; "
            "run it with plan.apply(module, process_group), or compile with the engine 'torchrec'"
        )
    return _one_codec(section, "forward", device, split), _one_codec(section, "backward", device, split)


def _one_codec(section: Compression, direction: Direction, device: str, row_split: bool) -> CodecName:
    """The codec of every table in a direction."""
    codecs = {table.codec for table in section.tables if table.direction == direction} or {"none"}
    if len(codecs) > 1:
        raise InputError(f"TorchRec has one codec for all tables, the plan has {', '.join(sorted(codecs))}")
    codec = codecs.pop()
    refused = torchrec_refuses(codec, device, row_split)
    if refused:
        raise InputError(f"TorchRec cannot run codec {codec!r}: {refused}; compile for this device")
    return codec


@dataclass(slots=True)
class CompressedModel:
    """A module whose tables exchange compressed vectors, with its optimizers.

    :meth:`step` first averages the gradients of everything replicated over ranks.
    """

    module: Any
    embeddings: tuple[Any, ...]  # codegen.runtime.compressed_exchange.ShardedEmbeddings
    replicated: tuple[Any, ...]
    optimizers: tuple[torch.optim.Optimizer, ...]
    group: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass on this rank's slice of the batch."""
        return self.module(*args, **kwargs)

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Average replicated gradients and apply all of them."""
        from codegen.runtime.compressed_exchange import average_gradients

        average_gradients(self.replicated, self.group)
        for optimizer in self.optimizers:
            optimizer.step()


def compressed_model(
    plan: Plan,
    module: nn.Module,
    process_group: Any = None,
    *,
    optimizer: Optimizer | None = None,
    lr: float = 0.01,
    dense_optimizer: Optimizer | None = None,
    dense_lr: float | None = None,
    eps: float = 1e-8,
) -> CompressedModel:
    """``module`` with each ``EmbeddingBagCollection`` replaced by its sharded, compressing form.

    Arguments and averaging of gradients are those of :func:`codegen.torchrec.sharded_model`, on CPUs. With a
    plan without a compression section vectors travel as float32.

    Raises:
        InputError: the plan is not for this module or group, or has tables that the exchange does not run.
    """

    from codegen.runtime.compressed_exchange import ShardedEmbeddings, pieces_of
    from codegen.runtime.compressed_lookup import Update
    from codegen.runtime.optimizers import ordinary_optimizers

    group = group_for(plan, process_group)
    name: Optimizer = optimizer or plan.workload.optimizer
    check(plan, module, device="cpu", optimizer=name)
    collections = collections_of(module)
    made: list[Any] = []
    for collection in collections:
        mine = [t for t in plan.table_plans if locate(t, collections)[0] is collection]
        weights = {t.name: collection.weight(locate(t, collections)[1].name).detach() for t in mine}
        sharded = ShardedEmbeddings(
            pieces_of(replace(plan, table_plans=tuple(mine))),
            weights,
            plan.decisions.compression,
            group=group,
            update=Update(name, lr, eps),
        )
        made.append(sharded)
        _put(module, collection, _adapter(sharded, collection))
    tables = [p for s in made for _, p in s.held() if p.requires_grad]
    copied = [p for s in made for p in s.replicated()]
    inside = {id(p) for p in (*tables, *copied)}
    dense = [p for p in module.parameters() if id(p) not in inside and p.requires_grad]
    optimizers = ordinary_optimizers([*tables, *copied], dense, (name, lr), (dense_optimizer, dense_lr), eps)
    return CompressedModel(module, tuple(made), (*dense, *copied), optimizers, group)


def _put(module: Any, collection: Collection, adapter: Any) -> None:
    path, _, last = collection.path.rpartition(".")
    if not collection.path:
        raise InputError("the module is itself a collection; wrap it in a module that calls it")
    setattr(module.get_submodule(path), last, adapter)


def _adapter(sharded: Any, collection: Collection) -> Any:
    """A module in the place of a collection: ``KeyedJaggedTensor`` in, awaitable ``KeyedTensor`` out."""
    from torch import cat, nn
    from torchrec import KeyedTensor
    from torchrec.distributed.types import LazyAwaitable

    class Awaited(LazyAwaitable):  # type: ignore[misc]
        """Waits for the exchange where the vectors are first used."""

        def __init__(self, lookup: Any) -> None:
            super().__init__()
            self._lookup = lookup

        def _wait_impl(self) -> Any:
            found: Mapping[str, Any] = self._lookup.wait()
            widths = [found[feature].shape[1] for feature in sharded.features]
            return KeyedTensor(list(sharded.features), widths, cat(list(found.values()), dim=1))

    class CompressedCollection(nn.Module):
        """Stands where the unsharded collection stood."""

        def __init__(self) -> None:
            super().__init__()
            self.sharded = sharded

        def forward(self, features: Any) -> Any:
            """Start the lookup of a KeyedJaggedTensor."""
            return Awaited(self.sharded.start(_ids(features, sharded.features)))

    return CompressedCollection()


def _ids(features: Any, wanted: Sequence[str]) -> dict[str, Any]:
    if features.weights_or_none() is not None:
        raise InputError("weighted ids are not exchanged under codecs; leave compression out for this model")
    jagged = features.to_dict()
    return {name: (jagged[name].values(), jagged[name].lengths()) for name in wanted if name in jagged}
