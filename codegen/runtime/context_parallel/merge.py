"""Exact merging of partial attention outputs by their log-sum-exp.

Attention over a union of disjoint key sets is the mean of the outputs over each set, weighted by
exp(LSE): O = sum_s O_s exp(LSE_s - m) / sum_s exp(LSE_s - m), LSE = m + log sum_s exp(LSE_s - m),
m = max_s LSE_s (arXiv 2411.01783, equation 4; online softmax, arXiv 1805.02867). A set that a query cannot
see has LSE = -inf and weight 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The element type sums are kept in: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weights(lse: Tensor, total: Tensor) -> Tensor:
    """exp(lse - total), 0 where nothing is visible (both -inf)."""
    return torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0))


class Accumulator:
    """A running output (t, H, D) and its LSE (t, H), to which partial results are added."""

    def __init__(
        self, rows: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        kind = work_dtype(dtype)
        self.out = torch.zeros(rows, heads, head_dim, dtype=kind, device=device)
        self.lse = torch.full((rows, heads), -torch.inf, dtype=kind, device=device)

    def add(self, start: int, stop: int, out: Tensor, lse: Tensor) -> None:
        """Merge a partial result of rows start..stop-1: ``out`` (stop - start, H, D), ``lse`` (.., H)."""
        old = self.lse[start:stop]
        lse = lse.to(old.dtype)
        total = torch.logaddexp(old, lse)
        kept = self.out[start:stop]
        kept.mul_(weights(old, total).unsqueeze(-1))
        kept.add_(out.to(kept.dtype) * weights(lse, total).unsqueeze(-1))
        old.copy_(total)


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge S partial results at once.

    Args:
        outs: (S, t, H, D), each normalised over its own keys.
        lses: (S, t, H), -inf where a set has no visible key.

    Returns:
        (t, H, D) and (t, H), in the element type of ``lses``; 0 and -inf for rows that see nothing.
    """
    total = torch.logsumexp(lses, dim=0)
    return (outs.to(lses.dtype) * weights(lses, total).unsqueeze(-1)).sum(dim=0), total
