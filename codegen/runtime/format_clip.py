"""Clipping that minimises the L2 error of integer rows, before they are quantised.

A row's largest and smallest value set its scale; giving up a few outliers makes every step finer. The
search is the greedy one of Guan et al. 2019 ("Post-Training 4-bit Quantization on Embedding Tables", arXiv
1911.02079, algorithm 1), for all rows at once: from the whole range, move the end whose move hurts less, and
keep the range with the least error on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codegen.runtime.mx_fake import fake_quantize
from codegen.runtime.mx_tensor import like_source, rows_of
from ir.errors import InputError
from ir.formats import Format, parse_format

BINS = 200  # Guan et al., section 3: steps are 1/200 of a row's range
RATIO = 0.16  # Guan et al., section 3: at most 16 % of the range is given up


def clip_rows(x: Tensor, format: str | Format, *, bins: int = BINS, ratio: float = RATIO) -> Tensor:
    """``x`` with each row clamped to the range whose quantisation has the least squared error.

    Quantise the result as usual: its rows now end where their codes should. The error of a row never
    exceeds that without clipping.

    Args:
        x: floating-point; rows run along the format's axis.
        format: an integer row format: int8, int4, int2 or int8_fused. In the others a scale is a power of
            two, or elements are floating-point, and the ends of a row matter little.
        bins: steps that a row's range is divided into.
        ratio: share of the range that may be given up.

    Raises:
        InputError: a format of another family.
    """
    spec = parse_format(format)
    if spec.scale not in ("fp16_bias", "fp32_bias"):
        raise InputError(
            f"rows are clipped for integer formats (int8, int4, int2, int8_fused), not {spec.id}"
        )
    if bins < 1 or not 0 <= ratio < 1:
        raise InputError(f"clipping needs bins >= 1 and 0 <= ratio < 1, not {bins} and {ratio:g}")
    if x.numel() == 0:
        return x.detach().clone()
    rows = rows_of(x.detach(), spec.axis)
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    step = (high - low) / bins
    best_low, best_high, best = low, high, _error(rows, low, high, spec)
    for _ in range(int(bins * ratio)):
        with_low, with_high = (
            _error(rows, low + step, high, spec),
            _error(rows, low, high - step, spec),
        )
        move_low = with_low < with_high
        low, high = torch.where(move_low, low + step, low), torch.where(move_low, high, high - step)
        error = torch.minimum(with_low, with_high)
        better = error < best
        best = torch.where(better, error, best)
        best_low, best_high = torch.where(better, low, best_low), torch.where(better, high, best_high)
    return like_source(rows.clamp(best_low, best_high), x.shape, spec.axis % x.dim(), x.dtype)


def _error(rows: Tensor, low: Tensor, high: Tensor, spec: Format) -> Tensor:
    """Squared error of each row (rows, 1) when it is clamped and quantised."""
    kept = fake_quantize(rows.clamp(low, high), spec, -1)
    return (kept - rows).square().sum(-1, keepdim=True)
