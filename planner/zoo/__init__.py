"""Models to plan, with the workload each was published with.

Listing the zoo imports no torch; building a model does.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ir.errors import InputError, did_you_mean
from ir.workload import Workload

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ZooModel:
    """A model of the zoo: the module, on the meta device unless asked otherwise, and its workload."""

    name: str
    module: nn.Module
    workload: Workload
    description: str
    source: str


@dataclass(frozen=True)
class ZooEntry:
    """What is known of a model before it is built."""

    name: str
    description: str
    source: str
    builder: str  # "module:function"; the function returns (module, workload)
    preset: dict[str, Any]  # arguments that make this model of the builder's family

    def load(self) -> Callable[..., tuple[nn.Module, Workload]]:
        """The builder; imports torch."""
        module, _, function = self.builder.partition(":")
        made: Callable[..., tuple[nn.Module, Workload]] = getattr(importlib.import_module(module), function)
        return made


_DLRM = "planner.zoo.dlrm:build_dlrm"
_DCNV2 = "planner.zoo.dlrm_dcnv2:build_dlrm_dcnv2"

_ENTRIES = (
    ZooEntry(
        "dlrm",
        "MLPerf DLRM (v0.7 to v2.1): 26 Criteo 1TB tables of dim 128, dot interaction",
        "Naumov et al. 2019 (arXiv 1906.00091); MLPerf Training v0.7-v2.1, rows capped at 40 M",
        _DLRM,
        {},
    ),
    ZooEntry(
        "dlrm-dcnv2",
        "MLPerf DLRM-DCNv2 (v3.0 on): 26 multi-hot tables of dim 128, low-rank cross network",
        "mlcommons/training recommendation_v2; Wang et al. 2021 (arXiv 2008.13535)",
        _DCNV2,
        {},
    ),
    ZooEntry(
        "dlrm-kaggle",
        "DLRM on Criteo Kaggle: 26 tables of dim 16, 33.8 M rows",
        "Naumov et al. 2019 (arXiv 1906.00091), the Kaggle configuration of facebookresearch/dlrm",
        _DLRM,
        {"tables": "criteo_kaggle.json", "bottom": (512, 256, 64, 16), "top": (512, 256, 1)},
    ),
    ZooEntry(
        "dlrm-small",
        "DLRM on Criteo Kaggle with at most 10,000 rows a table, for a laptop",
        "dlrm-kaggle with capped rows",
        _DLRM,
        {
            "tables": "criteo_kaggle.json",
            "bottom": (512, 256, 64, 16),
            "top": (512, 256, 1),
            "row_cap": 10_000,
            "global_batch": 4096,
        },
    ),
    ZooEntry(
        "dlrm-dcnv2-small",
        "DLRM-DCNv2 with at most 20,000 rows a table, for a laptop",
        "dlrm-dcnv2 with capped rows",
        _DCNV2,
        {"row_cap": 20_000, "global_batch": 4096},
    ),
)


def zoo_names() -> tuple[str, ...]:
    """Names of the models, in the order they are listed to people."""
    return tuple(entry.name for entry in _ENTRIES)


def descriptions() -> dict[str, str]:
    """What each model is, by name, in one line."""
    return {entry.name: entry.description for entry in _ENTRIES}


def zoo_entry(name: str) -> ZooEntry:
    """What is known of a model without building it; raises InputError for an unknown name."""
    for entry in _ENTRIES:
        if entry.name == name:
            return entry
    raise InputError(
        f"no model {name!r} in the zoo{did_you_mean(name, zoo_names())}; it has {', '.join(zoo_names())}"
    )


def build(name: str, **overrides: Any) -> ZooModel:
    """Build a model.

    Args:
        name: one of :func:`zoo_names`.
        overrides: ``row_cap`` (at most so many rows a table), ``device`` ("meta"), ``embeddings``
            ("torchrec", "plain"; by default TorchRec's collection where it is installed), ``tables``,
            ``dense_features``, ``bottom``, ``top`` and others of the family's builder.

    Raises:
        InputError: unknown model or override, or sizes that do not fit together.
    """
    entry = zoo_entry(name)
    builder = entry.load()
    known = list(inspect.signature(builder).parameters)
    for key in overrides:
        if key not in known:
            raise InputError(
                f"{name} has no option {key!r}{did_you_mean(key, known)}; it has {', '.join(known)}"
            )
    module, workload = builder(**{**entry.preset, **overrides})
    return ZooModel(name, module, workload, entry.description, entry.source)
