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
_WUKONG = "planner.zoo.wukong:build_wukong"
_WUKONG_INTERNAL = "planner.zoo.wukong_internal:build_wukong_internal"
_DHEN = "planner.zoo.dhen:build_dhen"

_SMALL = {"tables": "criteo_kaggle.json", "row_cap": 10_000, "global_batch": 4096}


def _table5(name: str, layers: int, vectors: int, rank: int, width: int, gflop: str) -> ZooEntry:
    """A row of Wukong's table 5: n_F = n_L = ``vectors``, MLPs of three layers of ``width``."""
    return ZooEntry(
        name,
        f"Wukong of table 5, {gflop} GFLOP a sample: l={layers} n={vectors} k={rank} MLP 3x{width}, 627 B sparse",
        "Zhang et al. 2024 (arXiv 2403.02545v4), table 5; tables and input vectors are stand-ins",
        _WUKONG_INTERNAL,
        {"layers": layers, "fmb": vectors, "lcb": vectors, "rank": rank, "width": width},
    )


def _dhen(layers: int) -> ZooEntry:
    """DHEN over the tables of MLPerf's multi-hot set, all five interaction modules a layer."""
    return ZooEntry(
        f"dhen-{layers}",
        f"DHEN of {layers} layers on MLPerf's multi-hot tables, five interaction modules a layer",
        "Zhang et al. 2022 (arXiv 2203.11014); the widths inside the modules are this zoo's",
        _DHEN,
        {"layers": layers},
    )


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
    ZooEntry(
        "wukong-criteo",
        "Wukong on MLPerf's multi-hot tables: 28 M dense parameters, 174 MFLOP a sample trained",
        "Zhang et al. 2024 (arXiv 2403.02545v4), table 3; the sizes are one fit to its counts",
        _WUKONG,
        {},
    ),
    _table5("wukong-l2", 2, 8, 24, 2048, "0.53"),
    _table5("wukong-l4", 4, 32, 24, 2048, "1.25"),
    _table5("wukong-l8", 8, 32, 24, 2048, "2.12"),
    _table5("wukong-l8-n48", 8, 48, 48, 4096, "5.6"),
    _table5("wukong-l8-n96", 8, 96, 96, 8192, "22.2"),
    _table5("wukong-l8-n96-wide", 8, 96, 96, 16384, "61"),
    _table5("wukong-l8-n192", 8, 192, 192, 16384, "108"),
    ZooEntry(
        "wukong-small",
        "Wukong on Criteo Kaggle with at most 10,000 rows a table, for a laptop",
        "Zhang et al. 2024 (arXiv 2403.02545), two small layers",
        _WUKONG,
        {**_SMALL, "bottom": (64, 16), "layers": 2, "fmb": 8, "lcb": 8, "rank": 8, "hidden": (128,)}
        | {"top": (128, 1)},
    ),
    _dhen(2),
    _dhen(4),
    _dhen(8),
    ZooEntry(
        "dhen-small",
        "DHEN on Criteo Kaggle with at most 10,000 rows a table, for a laptop",
        "Zhang et al. 2022 (arXiv 2203.11014), two small layers",
        _DHEN,
        {
            **_SMALL,
            "global_batch": 1024,
            "bottom": (64, 16),
            "layers": 2,
            "vectors": 4,
            "modules": ("dlrm", "attention", "linear", "cross"),  # a convolution is slow on a CPU
            "hidden": (128,),
            "heads": 2,
            "top": (128, 1),
        },
    ),
)


def _llama(size: str, layers: int, hidden: int, ffn: int, heads: int) -> ZooEntry:
    return ZooEntry(
        f"llama3-{size}",
        f"Llama 3 {size.upper()}: {layers} layers of width {hidden}, {heads} heads sharing 8 of keys and values",
        "The Llama 3 Herd of Models (arXiv 2407.21783), table 3",
        "planner.zoo.llama:build_llama",
        {"layers": layers, "hidden": hidden, "ffn": ffn, "heads": heads},
    )


_DECODERS = (
    _llama("8b", 32, 4096, 14336, 32),
    _llama("70b", 80, 8192, 28672, 64),
    _llama("405b", 126, 16384, 53248, 128),
    ZooEntry(
        "llama-tiny",
        "a Llama of 8 layers of width 64, 8 heads sharing 4 of keys and values, to run on a laptop in fp32",
        "The Llama 3 Herd of Models (arXiv 2407.21783), the same layers made small",
        "planner.zoo.llama_tiny:build_llama_tiny",
        {},
    ),
)


def zoo_names() -> tuple[str, ...]:
    """Names of the recommenders, in the order they are listed to people."""
    return tuple(entry.name for entry in _ENTRIES)


def decoder_names() -> tuple[str, ...]:
    """Names of the decoder language models."""
    return tuple(entry.name for entry in _DECODERS)


def descriptions() -> dict[str, str]:
    """What each recommender is, by name, in one line."""
    return {entry.name: entry.description for entry in _ENTRIES}


def decoder_descriptions() -> dict[str, str]:
    """What each decoder is, by name, in one line."""
    return {entry.name: entry.description for entry in _DECODERS}


def zoo_entry(name: str) -> ZooEntry:
    """What is known of a model without building it; raises InputError for an unknown name."""
    for entry in (*_ENTRIES, *_DECODERS):
        if entry.name == name:
            return entry
    known = (*zoo_names(), *decoder_names())
    raise InputError(f"no model {name!r} in the zoo{did_you_mean(name, known)}; it has {', '.join(known)}")


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
