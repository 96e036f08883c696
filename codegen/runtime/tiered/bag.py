"""A trainable embedding bag over a :class:`~codegen.runtime.tiered.table.TieredTable`.

The optimizer's update is part of the backward pass, as with fused kernels: it is applied to the rows of the batch
in their cache slots. Forward and backward are PyTorch's own kernels on the batch's distinct rows in the order of
their ids, so that sums are added in the order in which a whole table would add them: the results are bit-equal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codegen.runtime.optimizers import ADAGRAD_EPS
from codegen.runtime.tiered.native import Ints
from codegen.runtime.tiered.pages import Floats
from codegen.runtime.tiered.table import Batch, Counters, Policy, Range, TieredTable
from ir.errors import InputError
from ir.workload import Optimizer

MAX_PENDING = 8  # forward passes that may wait for their backward pass
BETAS = (0.9, 0.999)  # of Adam: Kingma and Ba 2015, and torch's default


class TieredEmbeddingBag(nn.Module):
    """Sums or means of rows that live in several memory tiers, float32, on the CPU.

    Args:
        table: an open table.
        lr, eps: of its optimizer; ``lr`` may be changed between steps.
        mode: "sum" or "mean".

    Adam updates only the rows of a batch (as ``torch.optim.SparseAdam``); the other optimizers equal those of
    a whole table. All features that share the table go through one call a step.
    """

    def __init__(
        self,
        table: TieredTable,
        *,
        lr: float = 0.01,
        eps: float = ADAGRAD_EPS,
        mode: Literal["sum", "mean"] = "sum",
    ) -> None:
        super().__init__()
        self.table, self.lr, self.eps, self.mode = table, lr, eps, mode
        self._weights = torch.from_numpy(table.weights)
        self._state = torch.from_numpy(table.state)
        self._pending: list[Batch] = []

    @classmethod
    def create(
        cls,
        folder: str | Path,
        rows: int,
        dim: int,
        ranges: Iterable[Range],
        *,
        optimizer: Optimizer = "adagrad",
        cache_rows: int,
        policy: Policy = "lru",
        order: npt.ArrayLike | None = None,
        weights: Tensor | None = None,
        seed: int = 0,
        lr: float = 0.01,
        eps: float = ADAGRAD_EPS,
        mode: Literal["sum", "mean"] = "sum",
    ) -> Self:
        """Make a table (see :meth:`TieredTable.create`) and a bag over it.

        Args:
            weights: (rows, dim) initial weights; default uniform in +-1/sqrt(rows), TorchRec's default.
            seed: of the default weights.

        Raises:
            InputError: ranges that do not fit, a folder in use, or weights of another shape.
        """
        if weights is not None and tuple(weights.shape) != (rows, dim):
            raise InputError(f"the weights are {tuple(weights.shape)} but the table is ({rows}, {dim})")
        given = None if weights is None else weights.detach().float().numpy()
        table = TieredTable.create(
            folder,
            rows,
            dim,
            optimizer,
            ranges,
            init=_initializer(rows, dim, optimizer, given, seed),
            cache_rows=cache_rows,
            policy=policy,
            order=order,
        )
        return cls(table, lr=lr, eps=eps, mode=mode)

    @property
    def counters(self) -> Counters:
        """What the table did since it was opened."""
        return self.table.counters

    def prefetch(self, ids: Tensor) -> None:
        """Start to fetch the rows of a later batch, in the order of use."""
        self.table.prefetch(_ids(ids))

    def pipeline(self, batches: Iterable[tuple[Any, ...]], depth: int) -> Iterator[tuple[Any, ...]]:
        """The batches, each a tuple with its ids first, with the rows of the next ``depth`` under way."""
        waiting: deque[tuple[Any, ...]] = deque()
        for batch in batches:
            self.prefetch(batch[0])
            waiting.append(batch)
            if len(waiting) > depth:
                yield waiting.popleft()
        yield from waiting

    def forward(self, ids: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None) -> Tensor:
        """Pooled rows (bags, dim).

        Args:
            ids: (n,) of all bags.
            offsets: (bags,) first id of each bag.
            per_sample_weights: (n,) factors, with mode "sum" only.

        Raises:
            InputError: ids out of range or not those that were prefetched, a cache too small for the batches in
                flight, or forward passes whose backward pass never comes.
        """
        batch = self.table.take(_ids(ids))
        slots = torch.from_numpy(batch.slots)
        rows = self._weights.index_select(0, slots)
        if torch.is_grad_enabled():
            if len(self._pending) >= MAX_PENDING:
                self.table.release(batch, changed=False)
                raise InputError(
                    f"{MAX_PENDING} forward passes wait for their backward pass; wrap evaluation in torch.no_grad()"
                )
            self._pending.append(batch)
            rows.requires_grad_()
            rows.register_post_accumulate_grad_hook(self._updater(batch, slots))  # type: ignore[no-untyped-call]
        inverse = torch.from_numpy(batch.inverse)
        pooled = F.embedding_bag(
            inverse, self.read(rows), offsets, mode=self.mode, per_sample_weights=per_sample_weights
        )
        if not torch.is_grad_enabled():
            self.table.release(batch, changed=False)
        return pooled

    def read(self, rows: Tensor) -> Tensor:
        """What the lookup sees of (n, dim) stored rows; for subclasses."""
        return rows

    def keep(self, state: Tensor) -> Tensor:
        """What is stored of (n, width) updated optimizer state; for subclasses."""
        return state

    def _updater(self, batch: Batch, slots: Tensor) -> Callable[[Tensor], None]:
        def update(rows: Tensor) -> None:
            assert rows.grad is not None
            with torch.no_grad():
                weights, state = self._weights.index_select(0, slots), self._state.index_select(0, slots)
                if self.table.shape.optimizer == "adam":
                    self.table.steps += 1
                apply_update(
                    self.table.shape.optimizer, weights, state, rows.grad, self.lr, self.eps, self.table.steps
                )
                self._weights.index_copy_(0, slots, weights)
                self._state.index_copy_(0, slots, self.keep(state))
            rows.grad = None
            self._pending.remove(batch)
            self.table.release(batch, changed=True)

        return update

    def flush(self, tag: int | None = None) -> int:
        """See :meth:`TieredTable.flush`."""
        return self.table.flush(tag)

    def weight(self) -> Tensor:
        """(rows, dim) all weights as they are now, by id; needs memory for the whole table."""
        every = self.table.read_all(np.arange(self.table.shape.rows))
        return torch.from_numpy(every[:, : self.table.shape.dim].copy())

    def close(self) -> None:
        """See :meth:`TieredTable.close`."""
        self.table.close()


def _ids(ids: Tensor) -> Ints:
    array: Ints = ids.detach().to("cpu", torch.int64).contiguous().numpy()
    return array


def _initializer(
    rows: int, dim: int, optimizer: Optimizer, weights: Floats | None, seed: int
) -> Callable[[Ints], Floats]:
    random = np.random.default_rng(seed)
    width = {"sgd": 1, "adagrad": 2, "adam": 3, "rowwise_adagrad": 1}[optimizer] * dim
    width += optimizer == "rowwise_adagrad"
    bound = rows**-0.5

    def init(ids: Ints) -> Floats:
        records = np.zeros((len(ids), width), np.float32)
        if weights is not None:
            records[:, :dim] = weights[ids]
        else:
            records[:, :dim] = random.uniform(-bound, bound, (len(ids), dim))
        return records

    return init


def overwrite(table: TieredTable, first: int, column: int, values: Floats) -> None:
    """Set some columns of the records (weights, then state) of consecutive ids, between batches.

    Args:
        table: with nothing prefetched; rows outside memory go through its cache.
        first: id of the first row.
        column: first column of the record.
        values: (rows, columns).
    """
    dim = table.shape.dim
    step = table.cache_rows or len(values)
    for start in range(0, len(values), step):
        part = values[start : start + step]
        batch = table.take(np.arange(first + start, first + start + len(part)))
        weights = max(0, min(dim - column, part.shape[1]))  # columns of the part that are weights
        table.weights[batch.slots, column : column + weights] = part[:, :weights]
        state = max(0, column - dim)
        table.state[batch.slots, state : state + part.shape[1] - weights] = part[:, weights:]
        table.release(batch, changed=True)


def apply_update(
    optimizer: Optimizer, weights: Tensor, state: Tensor, gradient: Tensor, lr: float, eps: float, steps: int
) -> None:
    """One step of an optimizer on rows (n, dim) and their state, in place, as in codegen.runtime.optimizers."""
    if optimizer == "sgd":
        weights.add_(gradient, alpha=-lr)
    elif optimizer == "adagrad":
        state.addcmul_(gradient, gradient, value=1)
        weights.addcdiv_(gradient, state.sqrt().add_(eps), value=-lr)
    elif optimizer == "rowwise_adagrad":
        state.add_(gradient.pow(2).mean(dim=1, keepdim=True))
        weights.addcdiv_(gradient, state.sqrt() + eps, value=-lr)
    else:
        mean, square = state.chunk(2, dim=1)
        mean.add_(gradient - mean, alpha=1 - BETAS[0])
        square.add_(gradient.pow(2) - square, alpha=1 - BETAS[1])
        size = lr * (1 - BETAS[1] ** steps) ** 0.5 / (1 - BETAS[0] ** steps)
        weights.addcdiv_(mean, square.sqrt().add_(eps), value=-size)
