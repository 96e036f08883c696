"""What a model is fed: batch, pooling factors and access statistics of each feature.

``pooling_factor`` is the mean number of ids a sample carries for a feature. Row popularity is an
inverse cumulative distribution (ICDF, as in RecShard, ASPLOS 22): ``icdf[k]`` is the fraction of the
table's rows, hottest first, that receives the fraction ``k / (len(icdf) - 1)`` of all accesses. It
starts at 0, ends at 1 at most and never falls. ``unique_fraction`` is distinct rows divided by ids
in one global batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, ConfigDict, Field

from ir.decoder import LlmWorkload
from ir.errors import InputError
from ir.reading import STRICT, digest, dump_record, parse_record
from ir.sessions import SessionStats

ICDF_STEPS = 100  # as many as RecShard uses

DEFAULT_GLOBAL_BATCH = 65536  # the batch of the public 856-table data set and of NVIDIA's synthetic models
DEFAULT_POOLING = 1.0  # one-hot


def _monotone(icdf: tuple[float, ...]) -> tuple[float, ...]:
    if icdf and (any(not 0 <= x <= 1 for x in icdf) or list(icdf) != sorted(icdf)):
        raise ValueError("an ICDF must rise from 0 to at most 1")
    return icdf


Optimizer = Literal["sgd", "adagrad", "rowwise_adagrad", "adam"]
ComputeType = Literal["fp32", "tf32", "bf16", "fp16", "fp8"]
ExchangeType = Literal["fp32", "bf16", "fp16", "fp8", "int8"]


@dataclass(frozen=True, slots=True)
class FeatureStats:
    """Statistics of one sparse feature."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    pooling_factor: Annotated[float, Field(ge=0, le=1e9)] = DEFAULT_POOLING  # ids per sample, mean
    icdf: Annotated[tuple[float, ...], AfterValidator(_monotone)] = ()  # empty: unknown
    unique_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # distinct rows / ids, one global batch
    weighted: bool = False  # per-sample weights travel with the ids

    def hit_rate(self, rows: float) -> float:
        """Fraction of accesses served by the hottest fraction ``rows`` of the rows."""
        if not self.icdf:
            return rows
        steps = len(self.icdf) - 1
        xs, keep = np.unique(np.asarray(self.icdf), return_index=True)
        # of several access fractions with the same rows, the largest is served
        last = np.append(keep[1:], steps + 1) - 1
        return float(np.interp(rows, xs, last / steps))


@dataclass(frozen=True, slots=True)
class Workload:
    """The input stream of one training (or serving) job."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    global_batch: Annotated[int, Field(ge=1, le=2**40)] = DEFAULT_GLOBAL_BATCH  # samples per step, all ranks
    features: dict[str, FeatureStats] = field(default_factory=dict)
    id_bytes: Annotated[int, Field(ge=1, le=16)] = 8  # int64 ids
    optimizer: Optimizer = "adagrad"  # of the embedding tables; element-wise, as MLPerf DLRM-DCNv2 trains
    compute_dtype: ComputeType = "fp32"  # element type of dense GEMMs
    exchange_dtype: ExchangeType = "fp32"  # element type of pooled embeddings and their gradients on the wire
    # Samples a distinct sample stands for, by feature, where the input is deduplicated before the index
    # exchange (RecD, MLSys 23); absent: 1. Filled by the dedup pass.
    dedup: dict[str, Annotated[float, Field(ge=1, le=1e6)]] = field(default_factory=dict)
    # The same by dense operation, where it runs once a distinct sample.
    dedup_ops: dict[str, Annotated[float, Field(ge=1, le=1e6)]] = field(default_factory=dict)
    sessions: SessionStats | None = None  # how samples repeat within a session; None: unknown
    origin: str = "defaults"  # "defaults", "file", "measured from N batches"
    llm: LlmWorkload | None = None  # for decoders, whose sample is a sequence

    def stats(self, feature: str) -> FeatureStats:
        """Statistics of ``feature``, the documented defaults when it is not listed."""
        return self.features.get(feature, _DEFAULT_STATS)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; :meth:`from_dict` reads it back."""
        return dump_record(self)

    @classmethod
    def from_dict(cls, data: object, what: str = "workload") -> Workload:
        """Read plain data; raises InputError that names each bad key."""
        return parse_record(cls, data, what)

    @property
    def digest(self) -> str:
        """Content digest, for the provenance of a plan."""
        return digest(self.to_dict())

    @classmethod
    def from_batches(
        cls,
        batches: Iterable[object],
        rows: Mapping[str, int] | None = None,
        *,
        world_size: int = 1,
    ) -> Workload:
        """Measure a workload from real batches.

        Args:
            batches: each one a TorchRec ``KeyedJaggedTensor``, or a mapping from feature name to
                ``(values, lengths)`` (1-D arrays or tensors: ids, and ids per sample), or to a 2-D array
                ``(batch, ids)`` of a fixed number of ids.
            rows: rows of each feature's table. Without it the ICDF is over the largest id seen.
            world_size: ranks over which one global batch is spread; each batch given is one rank's.

        Raises:
            InputError: no batches, or batches that disagree about features, or ids out of range.
        """
        counter = _Counter(dict(rows or {}))
        for batch in batches:
            counter.add(as_jagged(batch))
        return counter.workload(world_size)


_DEFAULT_STATS = FeatureStats()

Array = npt.NDArray[np.int64]


def _numpy(values: Any) -> Array:
    if hasattr(values, "detach"):  # a torch tensor, without importing torch
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise InputError(f"ids and lengths must be integers, not {array.dtype}; convert them first")
    return array.astype(np.int64, copy=False)


def as_jagged(batch: Any) -> dict[str, tuple[Array, Array]]:
    """Feature -> (ids, ids per sample), from a KeyedJaggedTensor or a mapping."""
    if hasattr(batch, "to_dict") and hasattr(batch, "keys") and callable(batch.keys):
        batch = {key: (jagged.values(), jagged.lengths()) for key, jagged in batch.to_dict().items()}
    if not isinstance(batch, Mapping):
        raise InputError(
            f"a batch must be a KeyedJaggedTensor or a mapping of features, not {type(batch).__name__}"
        )
    jagged: dict[str, tuple[Array, Array]] = {}
    for name, value in batch.items():
        if isinstance(value, tuple):
            ids, lengths = (_numpy(part) for part in value)
        else:
            table = _numpy(value)
            table = table.reshape(len(table), -1)
            ids, lengths = table.reshape(-1), np.full(len(table), table.shape[1], np.int64)
        if (lengths < 0).any() or int(lengths.sum()) != len(ids):
            raise InputError(
                f"feature {name!r}: the lengths add up to {int(lengths.sum())} ids but there are {len(ids)}"
            )
        jagged[str(name)] = (ids, lengths)
    return jagged


class _Counter:
    """Accumulates ids per feature over batches."""

    def __init__(self, rows: dict[str, int]) -> None:
        self.rows = rows
        self.ids: dict[str, list[Array]] = {}
        self.samples = 0
        self.batches = 0
        self.unique: dict[str, list[float]] = {}

    def add(self, batch: dict[str, tuple[Array, Array]]) -> None:
        sizes = {len(lengths) for _, lengths in batch.values()}
        if len(sizes) != 1:
            raise InputError(f"the features of one batch have different numbers of samples: {sorted(sizes)}")
        if self.batches and set(batch) != set(self.ids):
            odd = sorted(set(batch) ^ set(self.ids))
            raise InputError(f"batch {self.batches} does not have the same features as the first: {odd[:5]}")
        for name, (ids, _) in batch.items():
            limit = self.rows.get(name)
            if len(ids) and (ids.min() < 0 or (limit is not None and ids.max() >= limit)):
                raise InputError(
                    f"feature {name!r} has an id outside 0..{(limit or 2**63) - 1}; check the table size"
                )
            self.ids.setdefault(name, []).append(ids)
            if len(ids):
                self.unique.setdefault(name, []).append(len(np.unique(ids)) / len(ids))
        self.samples += sizes.pop()
        self.batches += 1

    def workload(self, world_size: int) -> Workload:
        if not self.batches or not self.samples:
            raise InputError(
                "no samples to measure a workload from; pass at least one batch that is not empty"
            )
        features = {}
        for name, parts in self.ids.items():
            ids = np.concatenate(parts)
            features[name] = FeatureStats(
                pooling_factor=len(ids) / self.samples,
                icdf=icdf_from_ids(ids, self.rows.get(name)),
                unique_fraction=float(np.mean(self.unique[name])) if name in self.unique else 1.0,
            )
        return Workload(
            global_batch=math.ceil(self.samples / self.batches) * world_size,
            features=features,
            origin=f"measured from {self.batches} batches",
        )


def icdf_from_ids(ids: Array, rows: int | None = None) -> tuple[float, ...]:
    """The ICDF of a stream of ids over a table of ``rows`` rows (default: largest id + 1)."""
    if not len(ids):
        return ()
    counts = np.sort(np.unique(ids, return_counts=True)[1])[::-1]
    total_rows = rows or int(ids.max()) + 1
    served = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    wanted = np.linspace(0, 1, ICDF_STEPS + 1)
    needed = np.interp(wanted, served, np.arange(len(served)) / total_rows)
    return tuple(float(round(x, 9)) for x in np.minimum(needed, 1.0))


def icdf_from_zipf(rows: int, exponent: float) -> tuple[float, ...]:
    """The ICDF of a Zipf law p(rank) ~ rank**-exponent over ``rows`` rows.

    Exact sums up to 1e6 ranks; beyond, the Euler-Maclaurin integral of the tail.
    """
    if rows < 1 or exponent < 0 or not math.isfinite(exponent):
        raise InputError(f"a Zipf law needs rows >= 1 and a finite exponent >= 0, not {rows} and {exponent}")
    head = np.arange(1, min(rows, 1_000_000) + 1, dtype=np.float64)
    ranks, mass = head, np.cumsum(head**-exponent)
    if rows > len(head):
        edge = float(len(head))
        tail = np.unique(np.geomspace(edge, rows, 2000))[1:]
        if abs(exponent - 1) < 1e-12:
            extra = np.log((tail + 0.5) / (edge + 0.5))
        else:
            extra = ((tail + 0.5) ** (1 - exponent) - (edge + 0.5) ** (1 - exponent)) / (1 - exponent)
        ranks = np.concatenate([head, tail])
        mass = np.concatenate([mass, mass[-1] + extra])
    served = np.concatenate([[0.0], mass / mass[-1]])
    needed = np.interp(np.linspace(0, 1, ICDF_STEPS + 1), served, np.concatenate([[0.0], ranks]) / rows)
    return tuple(float(round(x, 12)) for x in np.minimum(needed, 1.0))
