"""Formats for the linear layers that a glob names, in any module: no plan and no capture needed.

Llama 3 (arXiv 2407.21783, section 6.2) serves its feed-forward layers in FP8 with a scale per row, keeps those
of the first and last layer and all of attention wide, and bounds the scales at 1200.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ir.errors import InputError
from ir.formats import LLAMA3_SCALE_BOUND

if TYPE_CHECKING:
    from torch import nn

    from codegen.runtime.format_modules import GemmFormats

FEED_FORWARD = ("*feed_forward.*", "*ffn.*", "*mlp.*")
"""Names of feed-forward layers in Meta's and Hugging Face's Llama and in this project's."""


def linears(
    model: nn.Module, globs: Sequence[str], *, wide_first: int = 0, wide_last: int = 0
) -> tuple[str, ...]:
    """Paths of the ``nn.Linear`` that a glob matches, without those of the first and last layers.

    A layer is what shares the first number in a path: ``layers.0.feed_forward.w1`` is of layer 0. Where
    no path has a number, each linear is a layer of its own.

    Raises:
        InputError: nothing matches, or nothing is left.
    """
    from torch import nn as modules

    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, modules.Linear) and any(fnmatchcase(path, glob) for glob in globs)
    ]
    if not found:
        raise InputError(f"no linear layer is called like {', '.join(globs)}; see model.named_modules()")
    if wide_first < 0 or wide_last < 0:
        raise InputError(f"wide_first={wide_first} and wide_last={wide_last} must be >= 0")
    layer = {path: next((int(part) for part in path.split(".") if part.isdigit()), None) for path in found}
    if None in layer.values():
        layer = {path: number for number, path in enumerate(found)}
    order = sorted({number for number in layer.values() if number is not None})
    kept = set(order[wide_first : len(order) - wide_last])
    left = tuple(path for path in found if layer[path] in kept)
    if not left:
        raise InputError(
            f"all {len(order)} layers are among the first {wide_first} or last {wide_last} that stay wide; lower these"
        )
    return left


def narrow_linears(
    model: nn.Module,
    formats: GemmFormats,
    globs: Sequence[str],
    *,
    wide_first: int = 0,
    wide_last: int = 0,
    training: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """``model`` with the linear layers that a glob matches computing in ``formats``.

    Args:
        model: any module.
        formats: of weights, activations and, when training, gradients.
        globs: over the paths of modules, such as ``"layers.*.feed_forward.*"``.
        wide_first, wide_last: layers at either end that stay as they are (see :func:`linears`).
        training: straight-through training of float32 master weights; otherwise narrow copies.
        inplace: change ``model`` itself.

    Raises:
        InputError: as :func:`linears`, or a layer that cannot compute in the formats.
    """
    from codegen.runtime.format_modules import narrow_linear, replace_modules

    paths = linears(model, globs, wide_first=wide_first, wide_last=wide_last)
    model = model if inplace else copy.deepcopy(model)
    # deepcopy keeps paths
    made = {
        path: narrow_linear(model.get_submodule(path), formats, training=training)  # type: ignore[arg-type]
        for path in paths
    }
    replace_modules(model, made)
    return model


def row_wise_fp8(
    model: nn.Module,
    globs: Sequence[str] = FEED_FORWARD,
    *,
    wide_first: int = 1,
    wide_last: int = 1,
    bound: float = LLAMA3_SCALE_BOUND,
    inplace: bool = False,
) -> nn.Module:
    """``model`` with row-wise FP8 feed-forward layers as Llama 3 serves them, for inference.

    A scale for each output row of a weight, and a dynamic one for each token, from an absolute maximum of
    at most ``bound``. Widths that are multiples of 16 run in ``torch._scaled_mm``.

    Raises:
        InputError: as :func:`narrow_linears`, or a bound that is not positive and finite.
    """
    from codegen.runtime.format_modules import GemmFormats

    rows = f"fp8_row:bound={bound:g}"
    return narrow_linears(
        model, GemmFormats(rows, rows), globs, wide_first=wide_first, wide_last=wide_last, inplace=inplace
    )
