"""Random global batches with the statistics of a workload, and a rank's slice of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ir.errors import InputError
from ir.plan import TablePlan
from ir.workload import FeatureStats, Workload


@dataclass(frozen=True, slots=True)
class Batch:
    """Arguments of the model's ``forward`` and one label (0 or 1) a sample."""

    inputs: tuple[Any, ...]
    labels: Tensor

    @property
    def size(self) -> int:
        """Samples."""
        return len(self.labels)

    def to(self, dtype: torch.dtype) -> Batch:
        """Floating-point inputs, weights of ids and labels in another type."""
        inputs = tuple(
            v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in self.inputs
        )
        return Batch(
            tuple(_with_weights(v, dtype) if is_jagged(v) else v for v in inputs), self.labels.to(dtype)
        )

    def part(self, index: int, parts: int) -> Batch:
        """Slice ``index`` of ``parts`` equal ones; raises InputError when they cannot be equal."""
        if self.size % parts:
            raise InputError(
                f"a global batch of {self.size} samples does not divide over {parts} ranks; use a multiple of {parts}"
            )
        each = self.size // parts
        start = index * each
        inputs = tuple(cut(value, start, each) for value in self.inputs)
        return Batch(inputs, self.labels[start : start + each])


def _with_weights(value: Any, dtype: torch.dtype) -> Any:
    weights = value.weights_or_none()
    if weights is None:
        return value
    return type(value)(
        keys=value.keys(), values=value.values(), lengths=value.lengths(), weights=weights.to(dtype)
    )


def cut(value: Any, start: int, count: int) -> Any:
    """Samples ``start`` to ``start + count`` of one input: a tensor, or a ``KeyedJaggedTensor``."""
    if isinstance(value, Tensor):
        return value[start : start + count]
    if not is_jagged(value):
        raise InputError(f"an input of type {type(value).__name__} cannot be cut into slices; use tensors")
    lengths, values, weights = [], [], []
    weighted = value.weights_or_none() is not None
    for jagged in value.to_dict().values():
        offsets = jagged.offsets()
        first, last = int(offsets[start]), int(offsets[start + count])
        lengths.append(jagged.lengths()[start : start + count])
        values.append(jagged.values()[first:last])
        if weighted:
            weights.append(jagged.weights()[first:last])
    return type(value)(
        keys=value.keys(),
        values=torch.cat(values),
        lengths=torch.cat(lengths),
        weights=torch.cat(weights) if weighted else None,
    )


def is_jagged(value: Any) -> bool:
    """Whether ``value`` is a TorchRec ``KeyedJaggedTensor``."""
    return type(value).__name__ == "KeyedJaggedTensor"


class RandomBatches:
    """Makes random global batches for a model; the same seed gives the same batch in every process.

    The model's own ``random_batch(size, workload, seed)`` is used if it has one (it returns the inputs
    and then the labels). Otherwise the inputs are those it can be traced with, filled at random: floats
    are normal, ids follow each feature's pooling factor and ICDF. Make this before the model is sharded.

    Args:
        module: the unsharded model.
        tables: with the rows behind each feature.
        workload: statistics of the features.
        size: samples of a global batch.
        example_inputs: arguments of ``forward`` whose kinds and shapes to follow, for any batch.
    """

    def __init__(
        self,
        module: nn.Module,
        tables: Sequence[TablePlan],
        workload: Workload,
        size: int,
        example_inputs: Any = None,
    ) -> None:
        self._own = getattr(module, "random_batch", None)
        self._shapes = [] if callable(self._own) else input_shapes(module, size, example_inputs)
        self._rows = {feature: table.rows for table in tables for feature in table.features}
        self._workload = workload
        self._size = size

    def __call__(self, seed: int) -> Batch:
        """One global batch."""
        if callable(self._own):
            *own_inputs, labels = self._own(self._size, self._workload, seed)
            return Batch(tuple(own_inputs), labels)
        random = np.random.default_rng(seed)
        inputs = [_fill(value, self._rows, self._workload, self._size, random) for value in self._shapes]
        return Batch(tuple(inputs), torch.from_numpy(random.integers(0, 2, self._size).astype(np.float32)))


def input_shapes(module: nn.Module, size: int, example_inputs: Any = None) -> list[Any]:
    """Inputs of ``forward`` in order: tensors with ``size`` samples, and jagged ones for their keys."""
    from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

    from ir.capture_inputs import bind, constants, infer, own_inputs
    from ir.capture_trace import trace
    from ir.capture_untouched import untouched

    if isinstance(module, EmbeddingBagCollection | EmbeddingCollection):
        from ir.capture_inputs import jagged_ids

        return [jagged_ids([module], size)]
    given = own_inputs(module, size) if example_inputs is None else example_inputs
    if given is not None:
        values = bind(module, given).values()
        return [v.new_empty(size, *v.shape[1:]) if isinstance(v, Tensor) else v for v in values]
    with untouched(module):
        graph, _ = trace(module, constants(module, None))
    return list(infer(graph, module, size).values())


def _fill(
    value: Any, rows: Mapping[str, int], workload: Workload, size: int, random: np.random.Generator
) -> Any:
    if is_jagged(value):
        return _random_ids(value, rows, workload, size, random)
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.from_numpy(random.standard_normal(tuple(value.shape)).astype(np.float32))
    raise InputError(
        f"cannot make up an input of type {type(value).__name__}; give the model a method "
        "random_batch(size, workload, seed) that returns its inputs and the labels"
    )


def _random_ids(
    like: Any, rows: Mapping[str, int], workload: Workload, size: int, random: np.random.Generator
) -> Any:
    values, lengths = [], []
    for key in like.keys():  # noqa: SIM118 - not a mapping
        if key not in rows:
            raise InputError(
                f"feature {key!r} of the model is looked up by no table of the plan; compile it again"
            )
        stats = workload.stats(key)
        lengths.append(random_lengths(stats, size, random))
        values.append(random_rows(stats, rows[key], int(lengths[-1].sum()), random))
    weights = None
    if like.weights_or_none() is not None:
        weights = torch.from_numpy(random.random(sum(len(v) for v in values)).astype(np.float32))
    return type(like)(
        keys=like.keys(),
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.from_numpy(np.concatenate(lengths)),
        weights=weights,
    )


def random_lengths(stats: FeatureStats, size: int, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Ids of each of ``size`` samples: the pooling factor, rounded up or down at random to keep its mean."""
    whole, part = divmod(stats.pooling_factor, 1.0)
    return (int(whole) + (random.random(size) < part)).astype(np.int32)


def random_rows(
    stats: FeatureStats, rows: int, count: int, random: np.random.Generator
) -> np.ndarray[Any, Any]:
    """``count`` ids below ``rows``; the row of popularity rank ``k`` is id ``k``, so hot rows come first."""
    draws = random.random(count)
    if stats.icdf:
        steps = np.linspace(0.0, 1.0, len(stats.icdf))
        draws = np.interp(draws, steps, np.asarray(stats.icdf))
    ids: np.ndarray[Any, Any] = np.minimum((draws * rows).astype(np.int64), rows - 1)
    return ids
