"""Embedding tables of a module: which parameters are tables, and which nodes look them up.

Recognised: ``nn.Embedding``, ``nn.EmbeddingBag``, TorchRec ``EmbeddingBagCollection`` and
``EmbeddingCollection``, and ``embedding`` / ``embedding_bag`` called as functions on a parameter (as
in graphs made by ``torch.export``). A parameter shared by several modules is one table.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ir.errors import InputError
from ir.ops import EmbeddingTable

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int8: "int8",
    torch.uint8: "int8",
    torch.bool: "int8",
}


def dtype_name(dtype: torch.dtype) -> str:
    """The project's short name of an element type; torch's own name for one without."""
    return DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def _torchrec_class(module: str, name: str) -> Any:
    """A class of TorchRec if it is loaded: a model that holds one has imported it."""
    loaded = sys.modules.get(module)
    return getattr(loaded, name, None) if loaded is not None else None


def is_pooled_collection(module: object) -> bool:
    """Whether ``module`` is a TorchRec ``EmbeddingBagCollection``."""
    cls = _torchrec_class("torchrec.modules.embedding_modules", "EmbeddingBagCollection")
    return cls is not None and isinstance(module, cls)


def is_sequence_collection(module: object) -> bool:
    """Whether ``module`` is a TorchRec ``EmbeddingCollection``."""
    cls = _torchrec_class("torchrec.modules.embedding_modules", "EmbeddingCollection")
    return cls is not None and isinstance(module, cls)


def is_collection(module: object) -> bool:
    """Whether ``module`` is one of TorchRec's collections of tables."""
    return is_pooled_collection(module) or is_sequence_collection(module)


def is_jagged(value: object) -> bool:
    """Whether ``value`` is a TorchRec jagged or keyed tensor, which carries tensors but is none."""
    names = ("KeyedJaggedTensor", "JaggedTensor", "KeyedTensor")
    classes = [_torchrec_class("torchrec.sparse.jagged_tensor", name) for name in names]
    return any(cls is not None and isinstance(value, cls) for cls in classes)


@dataclass(slots=True)
class TableDraft:
    """A table while its graph is being read."""

    name: str
    weight: torch.Tensor
    pooling: str
    module: str
    parameter: str
    weighted: bool = False
    features: list[str] = field(default_factory=list)

    def add_feature(self, feature: str | None) -> None:
        """A lookup by ``feature``; without a name, the table's own name and the number of the call."""
        if feature is None:
            calls = len(self.features)
            feature = self.name if not calls else f"{self.name}[{calls}]"
        if feature not in self.features:
            self.features.append(feature)

    def finish(self) -> EmbeddingTable:
        """The record; raises InputError on a table without rows or columns."""
        shape = tuple(int(size) for size in self.weight.shape)
        if len(shape) != 2 or 0 in shape:
            raise InputError(
                f"table {self.name!r} has shape {shape}; a table needs at least one row and one column"
            )
        return EmbeddingTable(
            name=self.name,
            rows=shape[0],
            dim=shape[1],
            features=tuple(self.features),
            pooling=self.pooling,
            dtype=dtype_name(self.weight.dtype),
            module=self.module,
            parameter=self.parameter,
            weighted=self.weighted,
        )


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


class TableIndex:
    """All tables of a model, found by module or by parameter."""

    def __init__(self, model: nn.Module, wrapper: str = "") -> None:
        self.wrapper = wrapper  # where a model that is itself an embedding hangs; no part of its paths
        self.drafts: dict[int, TableDraft] = {}  # by id of the parameter, in the model's order
        self.of_module: dict[int, list[TableDraft]] = {}  # by id of the module
        inside: set[int] = set()
        for path, module in model.named_modules():
            if id(module) in inside:
                continue
            if is_collection(module):
                inside.update(id(child) for child in module.modules())
                self.of_module[id(module)] = self._collection(self.own_path(path), module)
            elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
                own = self.own_path(path)
                pooling = module.mode if isinstance(module, nn.EmbeddingBag) else "none"
                draft = self._draft(own, own, _join(own, "weight"), module.weight, pooling)
                self.of_module[id(module)] = [draft]

    def own_path(self, path: str) -> str:
        """A path of the traced module as the user's model spells it."""
        if not self.wrapper:
            return path
        return "" if path == self.wrapper else path.removeprefix(f"{self.wrapper}.")

    def _draft(self, name: str, path: str, parameter: str, weight: torch.Tensor, pooling: str) -> TableDraft:
        draft = self.drafts.get(id(weight))
        if draft is None:
            draft = TableDraft(name or "embedding", weight, pooling, path, parameter)
            self.drafts[id(weight)] = draft
        return draft

    def _collection(self, path: str, module: Any) -> list[TableDraft]:
        pooled = is_pooled_collection(module)
        configs = module.embedding_bag_configs() if pooled else module.embedding_configs()
        attribute = "embedding_bags" if pooled else "embeddings"
        owners = getattr(module, attribute)
        drafts = []
        for config in configs:
            parameter = _join(path, attribute, config.name, "weight")
            pooling = config.pooling.value.lower() if pooled else "none"
            draft = self._draft(config.name, path, parameter, owners[config.name].weight, pooling)
            draft.weighted = pooled and bool(module.is_weighted())
            draft.features.extend(config.feature_names)
            drafts.append(draft)
        return drafts

    def of_parameter(self, path: str, weight: torch.Tensor, pooling: str) -> TableDraft:
        """The table behind a parameter that a function looks up."""
        name = path.removesuffix(".weight")
        module = path.rpartition(".")[0]
        return self._draft(name, module, path, weight, pooling)

    def tables(self) -> tuple[EmbeddingTable, ...]:
        """The records, in the model's order; raises InputError on a name used twice."""
        tables = tuple(draft.finish() for draft in self.drafts.values())
        seen: dict[str, str] = {}
        for table in tables:
            if table.name in seen:
                raise InputError(
                    f"two tables are called {table.name!r} (in {seen[table.name] or 'the model'!r} and "
                    f"{table.module or 'the model'!r}); rename one, because a plan is keyed by table name"
                )
            seen[table.name] = table.module
        return tables
