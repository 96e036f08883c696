"""The optimizers of tables, in three forms that compute the same update.

``fused`` is FBGEMM's update inside the backward pass; ``ordinary`` is a ``torch.optim`` class for
parameters with a gradient; row-wise Adagrad over column blocks is written here, because a table that
is split by columns keeps one state per row and block.

========================= =====================================================================
sgd                       w -= lr g
adagrad                   s += g^2;            w -= lr g / (sqrt(s) + eps)   (Duchi et al. 2011)
rowwise_adagrad           s += mean_row(g^2);  w -= lr g / (sqrt(s) + eps)   (one s per row)
adam                      Kingma and Ba 2015; on a GPU the fused kernel skips rows without a gradient
========================= =====================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ir.workload import Optimizer

ADAGRAD_EPS = 1e-8  # FBGEMM's default for its Adagrad kernels, and for Adam (torch's Adagrad: 1e-10)


class BlockRowWiseAdagrad(torch.optim.Optimizer):
    """Row-wise Adagrad with one state per row and column block.

    Args:
        params: 2-D tables.
        lr: learning rate.
        eps: added to the root of the state.
        widths: columns of each block, one sequence a table; default one block.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        eps: float = ADAGRAD_EPS,
        widths: Sequence[Sequence[int]] | None = None,
    ) -> None:
        tables = list(params)
        blocks = widths if widths is not None else [(table.shape[1],) for table in tables]
        groups = [
            {"params": [table], "widths": tuple(block)} for table, block in zip(tables, blocks, strict=True)
        ]
        super().__init__(groups, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Apply the gradients."""
        for group in self.param_groups:
            (table,) = group["params"]
            if table.grad is None:
                continue
            state = self.state[table]
            if not state:
                state["sum"] = [table.new_zeros(table.shape[0], 1) for _ in group["widths"]]
            weights = table.split(group["widths"], dim=1)
            gradients = table.grad.split(group["widths"], dim=1)
            for weight, gradient, total in zip(weights, gradients, state["sum"], strict=True):
                total += gradient.pow(2).mean(dim=1, keepdim=True)
                weight.addcdiv_(gradient, total.sqrt() + group["eps"], value=-group["lr"])


def fused_state(operator: Any) -> list[dict[str, Tensor]]:
    """State of the tables of an FBGEMM operator, by ``torch.optim``'s names; writing into it changes the operator's."""
    slots = {1: ("sum",), 2: ("exp_avg", "exp_avg_sq")}
    states = [list(table) for table in operator.split_optimizer_states()]
    made = [dict(zip(slots[len(table)], table, strict=True)) for table in states]
    if not made:
        return [{} for _ in operator.embedding_specs]  # SGD has none
    if len(states[0]) == 2:  # Adam: one count for all tables
        made = [{**table, "step": operator.iter.view(())} for table in made]
    return made


def make_optimizer(
    name: Optimizer,
    params: Sequence[Tensor],
    lr: float,
    widths: Sequence[Sequence[int]] | None = None,
    eps: float = ADAGRAD_EPS,
) -> torch.optim.Optimizer:
    """An ordinary optimizer; ``widths`` (columns of each block of each table) matter to row-wise Adagrad."""
    if name == "sgd":
        return torch.optim.SGD(params, lr=lr)
    if name == "adagrad":
        return torch.optim.Adagrad(params, lr=lr, eps=eps)
    if name == "rowwise_adagrad":
        return BlockRowWiseAdagrad(params, lr, eps, widths)
    return torch.optim.Adam(params, lr=lr, eps=eps)


def ordinary_optimizers(
    tables: Sequence[Tensor],
    rest: Sequence[Tensor],
    of_tables: tuple[Optimizer, float],
    of_rest: tuple[Optimizer | None, float | None],
    eps: float = ADAGRAD_EPS,
) -> tuple[torch.optim.Optimizer, ...]:
    """One optimizer for the tables that no fused kernel updates and one for the rest, where there are any.

    ``of_tables`` and ``of_rest`` are (optimizer, learning rate); None: the like of the tables'.
    """
    optimizer, lr = of_tables
    kind, rate = of_rest[0] or dense_counterpart(optimizer), lr if of_rest[1] is None else of_rest[1]
    return tuple(
        make_optimizer(name, parameters, speed, eps=eps)
        for name, parameters, speed in ((optimizer, tables, lr), (kind, rest, rate))
        if parameters
    )


def fused_optimizer(
    name: Optimizer, lr: float, eps: float = ADAGRAD_EPS
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Class and arguments for ``apply_optimizer_in_backward``, which FBGEMM turns into its own kernel."""
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

    if name == "sgd":
        return torch.optim.SGD, {"lr": lr}
    if name == "adagrad":
        return torch.optim.Adagrad, {"lr": lr, "eps": eps}
    if name == "rowwise_adagrad":
        return RowWiseAdagrad, {"lr": lr, "eps": eps}
    return torch.optim.Adam, {"lr": lr, "eps": eps}


def dense_counterpart(name: Optimizer) -> Optimizer:
    """The optimizer of the dense part beside tables under ``name``: its biases have no rows."""
    return "adagrad" if name == "rowwise_adagrad" else name
