"""The low-precision workflow for serving recommenders: rank by error, keep what is sensitive wide, watch the metric.

Deng et al. 2021, "Low-Precision Hardware Architectures Meet Recommendation Model Inference at Scale" (arXiv
2105.12676): row-wise scales, clipping by least L2 error, first and last layers left wide, then the layers of
largest error, until the end metric has drifted by no more than 0.02 to 0.05 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from codegen.formats import Site, apply_formats, narrow_modules, sites
from ir.errors import InputError
from ir.format_plan import LossChange
from ir.formats import parse_format
from planner.sensitivity import Loss, batch_losses, mean_of

if TYPE_CHECKING:
    from torch import Tensor, nn

MAX_DRIFT = 5e-4  # of the normalised entropy, arXiv 2105.12676: 0.02 to 0.05 %


@dataclass(frozen=True, slots=True)
class LayerError:
    """A layer in its formats, on the user's batches."""

    path: str
    tensors: tuple[str, ...]  # as in ir.format_plan
    formats: tuple[str, ...]
    qsnr: float  # dB of what the layer returns: 10 log10(sum y^2 / sum dy^2)


@dataclass(frozen=True, slots=True)
class FormatReport:
    """Per-layer errors, worst first, and what became of the end metric.

    ``drift`` is relative: the change of the loss divided by the wide loss, which is also the change of the
    normalised entropy (loss over the entropy of the base rate).
    """

    layers: tuple[LayerError, ...]
    wide_loss: float
    drift: LossChange

    def lines(self) -> list[str]:
        """The report as text."""
        rows = [
            f"{layer.qsnr:8.2f} dB  {layer.path}: {', '.join(dict.fromkeys(layer.formats))}"
            for layer in self.layers
        ]
        drift, error = 100 * self.drift.mean, 100 * self.drift.stderr
        return [*rows, f"loss {self.wide_loss:.6f} wide, drift {drift:+.4f} % (standard error {error:.4f} %)"]


def format_report(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    chosen: Mapping[str, str],
    *,
    clip: bool = True,
) -> FormatReport:
    """What a choice of formats does to each layer, alone, and to the loss, together, when served.

    Args:
        model: trained, wide.
        batches: the user's, two or more.
        loss: ``loss(model, batch)``, the mean over the batch.
        chosen: tensor name -> format id.
        clip: clip integer rows to the range of least squared error.

    Raises:
        InputError: unknown tensors, fewer than two batches, a loss that is not finite.
    """
    known = sites(model)
    wide = batch_losses(model, batches, loss)
    served = apply_formats(model, chosen, training=False, clip=clip, known=known)
    narrow = batch_losses(served, batches, loss)
    mean = math.fsum(wide) / len(wide)
    if mean <= 0:
        raise InputError(f"a relative drift needs a positive loss, not {mean:g}")
    drift = mean_of([(b - a) / mean for a, b in zip(wide, narrow, strict=True)])
    layers = _layer_errors(model, batches, loss, chosen, known, clip)
    return FormatReport(tuple(sorted(layers, key=lambda layer: (layer.qsnr, layer.path))), mean, drift)


def _layer_errors(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    chosen: Mapping[str, str],
    known: Mapping[str, Site],
    clip: bool,
) -> list[LayerError]:
    """Error of each narrow layer on the inputs that it has in the wide model."""
    import torch

    held = {known[name]: text for name, text in chosen.items() if name in known and known[name].path}
    held = {site: text for site, text in held.items() if site.kind != "state"}
    made = narrow_modules(model, held, training=False, clip=clip)
    sums = {path: [0.0, 0.0] for path in made}
    hooks = [
        model.get_submodule(path).register_forward_hook(_comparer(narrow, sums[path]), with_kwargs=True)
        for path, narrow in made.items()
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                loss(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    from codegen.runtime.mx_qsnr import decibels

    found = []
    for path, (signal, noise) in sums.items():
        mine = [(site.name, parse_format(text).id) for site, text in held.items() if site.path == path]
        names, formats = zip(*mine, strict=True)
        found.append(LayerError(path, names, formats, decibels(signal, noise)))
    return found


def _comparer(narrow: nn.Module, sums: list[float]) -> Any:
    def compare(_: Any, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        wide = output.double()
        sums[0] += float(wide.square().sum())
        sums[1] += float((narrow(*args, **named).double() - wide).square().sum())

    return compare


def low_precision(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    *,
    tables: str = "int4",
    layers: str = "int8",
    max_drift: float = MAX_DRIFT,
    wide_first: int = 1,
    wide_last: int = 1,
) -> tuple[dict[str, str], FormatReport]:
    """Formats by the paper's workflow, and the report of the result.

    All tables and all GEMMs but the first and last become narrow; then the layer with the lowest QSNR goes
    back to fp32 until the loss has drifted by no more than ``max_drift``.

    Args:
        model, batches, loss: as :func:`format_report`.
        tables: format of tables.
        layers: format of weights and inputs of GEMMs, with a scale for each row.
        max_drift: relative change of the loss that is allowed.
        wide_first, wide_last: GEMMs at either end, in the model's order, that stay fp32.

    Raises:
        InputError: as :func:`format_report`, or a bound that is not positive.
    """
    if not max_drift > 0:
        raise InputError(f"max_drift must be positive, not {max_drift:g}; the paper uses 2e-4 to 5e-4")
    known = sites(model)
    gemms = list(dict.fromkeys(site.path for site in known.values() if site.kind == "weight"))
    kept = set(gemms[wide_first : max(wide_first, len(gemms) - wide_last)])
    chosen = {name: tables for name, site in known.items() if site.kind == "table"}
    chosen |= {
        name: layers
        for name, site in known.items()
        if site.kind in ("weight", "activation") and site.path in kept
    }
    report = format_report(model, batches, loss, chosen)
    while report.drift.mean > max_drift and report.layers:
        for name in report.layers[0].tensors:
            del chosen[name]
        report = format_report(model, batches, loss, chosen)
    return chosen, report
