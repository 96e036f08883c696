"""How much each tensor suffers in each format: sensitivities for the format pass.

Three ways, from cheap to faithful; all give an :class:`ir.format_plan.Sensitivity`:

* :func:`from_weights` reads weights only: relative squared error ``10^(-QSNR / 10)`` from sampled rows. By the
  linearity theorem (Malinovskii et al., NAACL 2025) the loss grows in proportion to it, with a factor for
  each layer that data-free methods take as the same for all.
* :func:`from_gradients` runs each batch forward and backward once, whatever the number of formats, and takes
  the second-order term of the loss with the empirical Fisher matrix as the Hessian.
* :func:`from_losses` puts one tensor at a time into one format and measures the loss on the same batches.

A format can lower the loss of the batches at hand by luck, and choosing by that does not last on others. To
choose formats, let the model be its own label (``labels = model(...).sigmoid()``): the loss then changes by
the divergence from the wide model, which is never negative. To predict a loss, use true labels.

Losses are then taken to add up over tensors; :func:`predict` adds, :func:`measure` measures, so that
the additive model can be checked on the model at hand. Standard errors are over batches (or sampled rows).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from codegen.formats import Site, formats_applied, sites
from cost_models.formats import qsnr_normal
from ir.errors import InputError, did_you_mean
from ir.format_plan import LossChange, Sensitivity
from ir.formats import Format, parse_format

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Loss = Callable[["nn.Module", Any], "Tensor"]
"""``loss(model, batch)``: the mean loss of a batch, a scalar with a gradient."""

SAMPLED_ELEMENTS = 1 << 18  # of one tensor: half a millisecond a format, and a few thousandths of a dB
LEAST_ROWS = 64  # so that the standard error over rows means something
MEASURED_KINDS = ("table", "weight", "activation")


def from_weights(
    model: nn.Module,
    formats: Sequence[str],
    *,
    popularity: Mapping[str, Any] | None = None,
    elements: int = SAMPLED_ELEMENTS,
    seed: int = 0,
) -> Sensitivity:
    """Relative squared error of every table and GEMM weight, without data.

    Whole rows are sampled (blocks lie within rows): noise and signal are summed over the sample, and the
    standard error is that of a ratio of sums (Cochran, Sampling Techniques, 1977, equation 2.39).

    Args:
        model: with weights; tensors on the meta device are taken as normal, as activations are.
        formats: ids.
        popularity: table name -> accesses of each row (:func:`row_popularity`): rows are then drawn by it, so
            that a row counts as often as it is read. Tables that are missing count all rows alike.
        elements: sampled of each tensor, about; at least 64 rows, or all of a smaller tensor.
        seed: of the sample.

    Raises:
        InputError: an unknown format or table, popularity of the wrong length, or weights that are not finite.
    """
    import torch

    known = _measurable(sites(model))
    parsed = parse_formats(formats)
    counts = dict(popularity or {})
    for name in counts:
        if name not in known or known[name].kind != "table":
            raise InputError(
                f"popularity of a table {name!r} that the model lacks{did_you_mean(name, known)}"
            )
    random = torch.Generator().manual_seed(seed)
    found: dict[str, dict[str, LossChange]] = {}
    for name, site in known.items():
        weight = model.get_parameter(f"{site.path}.weight").detach()
        if site.kind == "activation" or weight.is_meta:
            found[name] = {format.id: LossChange(_normal_error(format)) for format in parsed}
            continue
        rows = _sample(weight, counts.get(name), name, elements, random)
        # rows drawn with replacement are a sample however many they are
        population = None if name in counts else len(weight)
        found[name] = {f.id: _relative_error(weight, rows, population, f, name) for f in parsed}
    return Sensitivity(found, "qsnr", "relative squared error", f"rows sampled with seed {seed}")


def parse_formats(formats: Sequence[str]) -> list[Format]:
    """The formats of ids; raises InputError for none at all or an unknown one."""
    if isinstance(formats, str) or not formats:
        raise InputError("formats must be a list with at least one id, such as ['mx9', 'mx6']")
    return [parse_format(format) for format in formats]


def _measurable(known: Mapping[str, Site]) -> dict[str, Site]:
    return {name: site for name, site in known.items() if site.kind in MEASURED_KINDS}


def _normal_error(format: Format) -> float:
    known = qsnr_normal(format)
    if known is None:
        raise InputError(
            f"the QSNR of {format.id} on a standard normal is not tabulated; measure with from_losses or use "
            "the format's default options"
        )
    return float(10 ** (-known / 10))


def _sample(weight: Tensor, counts: Any, name: str, elements: int, random: torch.Generator) -> Tensor:
    """Rows of a (rows, n) weight: without replacement, or by popularity with replacement."""
    import torch

    rows = weight.shape[0]
    wanted = min(rows, max(LEAST_ROWS, elements // max(1, weight[0].numel())))
    if counts is None and rows > 100 * wanted:  # repeats are too few to matter, a permutation is too long
        return torch.randint(rows, (wanted,), generator=random)
    if counts is None:
        return torch.arange(rows) if wanted == rows else torch.randperm(rows, generator=random)[:wanted]
    weights = torch.as_tensor(counts, dtype=torch.float64)
    if weights.shape != (rows,) or not bool((weights >= 0).all()) or not float(weights.sum()) > 0:
        raise InputError(
            f"popularity of table {name!r} must be {rows} counts >= 0 and not all zero, one for each row"
        )
    wanted = max(wanted, min(4 * rows, elements // max(1, weight[0].numel())))  # repeats count
    # torch.multinomial takes at most 2^24 rows
    edges = weights.cumsum(0)
    draws = torch.rand(wanted, generator=random, dtype=torch.float64) * edges[-1]
    return torch.searchsorted(edges, draws, right=True).clamp_(max=rows - 1)


def _relative_error(
    weight: Tensor, rows: Tensor, population: int | None, format: Format, name: str
) -> LossChange:
    """sum of noise / sum of signal over the sampled rows, with the standard error of that ratio."""
    import torch

    from codegen.runtime.mx_fake import fake_quantize

    sample = weight[rows].float()
    whole = format.granularity == "tensor" or format.scale == "e4m3"  # a scale from the largest of all rows
    fed = sample
    if whole:
        largest = weight.abs().amax().float().expand(1, sample.shape[1])
        fed = torch.cat([sample, largest])
    kept = fake_quantize(fed, format, -1)[: len(sample)]
    noise = (kept.double() - sample.double()).square().sum(-1)
    signal = sample.double().square().sum(-1)
    if not bool(torch.isfinite(noise).all()):
        raise InputError(f"tensor {name!r} has weights that are not finite; train it again or leave it out")
    total = float(signal.sum())
    if total == 0:
        return LossChange(0.0)
    ratio = float(noise.sum()) / total
    m = len(rows)
    left_out = 1.0 if population is None else 1 - m / population  # finite population correction
    if left_out == 0 or m < 2:
        return LossChange(ratio)
    residual = noise - ratio * signal
    error = math.sqrt(left_out * m / (m - 1) * float(residual.square().sum())) / total
    return LossChange(ratio, error)


def row_popularity(model: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Any], Any]) -> Any:
    """Accesses of each row of each table: table name -> int64 counts, one a row.

    Args:
        model: the model, or anything that reads its tables.
        batches: the user's.
        run: ``run(model, batch)`` makes the model read a batch.
    """
    import torch

    found: dict[str, Tensor] = {}
    hooks = []
    for name, site in sites(model).items():
        if site.kind == "table":
            table: Any = model.get_submodule(site.path)
            found[name] = torch.zeros(table.num_embeddings, dtype=torch.int64)
            hooks.append(table.register_forward_pre_hook(_counter(found[name]), with_kwargs=True))
    try:
        with torch.no_grad():
            for batch in batches:
                run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _counter(counts: Tensor) -> Any:
    def count(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = args[0] if args else named["input"]
        counts.add_(ids.reshape(-1).long().cpu().bincount(minlength=len(counts)))

    return count


def from_losses(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    formats: Sequence[str],
    *,
    tensors: Iterable[str] | None = None,
) -> Sensitivity:
    """Measured change of the loss when one tensor alone takes one format.

    Args:
        model: trained; left as it was.
        batches: the user's, two or more; every measurement uses all of them.
        loss: ``loss(model, batch)``, the mean over the batch.
        formats: ids.
        tensors: names; by default every table, GEMM weight and GEMM input.

    Raises:
        InputError: fewer than two batches, an unknown tensor or format, or a loss that is not finite.
    """
    known = sites(model)
    parsed = parse_formats(formats)
    chosen = choose(known, tensors)
    wide = batch_losses(model, batches, loss)
    found: dict[str, dict[str, LossChange]] = {}
    for name in chosen:
        found[name] = {}
        for format in parsed:
            with formats_applied(model, {name: format.id}, known):
                found[name][format.id] = _change(batch_losses(model, batches, loss), wide)
    return Sensitivity(found, "loss change", "loss", f"{len(batches)} batches")


def choose(known: Mapping[str, Site], tensors: Iterable[str] | None) -> list[str]:
    """The names asked for, or those of all tables, GEMM weights and inputs; raises InputError."""
    if tensors is None:
        return list(_measurable(known))
    names = list(tensors)
    for name in names:
        if name not in known:
            raise InputError(f"the model has no tensor {name!r}{did_you_mean(name, known)}")
    return names


def batch_losses(model: nn.Module, batches: Sequence[Any], loss: Loss) -> list[float]:
    import torch

    if len(batches) < 2:
        raise InputError(f"a standard error needs two batches or more, not {len(batches)}")
    with torch.no_grad():
        values = [float(loss(model, batch)) for batch in batches]
    if not all(math.isfinite(value) for value in values):
        raise InputError("the loss of a batch is not finite; check the model and the batches")
    return values


def _change(narrow: Sequence[float], wide: Sequence[float]) -> LossChange:
    """Mean difference over batches, with its standard error: batches are paired."""
    return mean_of([a - b for a, b in zip(narrow, wide, strict=True)])


def mean_of(values: Sequence[float]) -> LossChange:
    """Mean and standard error of two or more independent values."""
    n = len(values)
    mean = math.fsum(values) / n
    return LossChange(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n))


def measure(model: nn.Module, batches: Sequence[Any], loss: Loss, chosen: Mapping[str, str]) -> LossChange:
    """Measured change of the loss when all tensors of ``chosen`` (name -> format) are narrow together.

    Raises:
        InputError: as :func:`from_losses`.
    """
    known = sites(model)
    wide = batch_losses(model, batches, loss)
    with formats_applied(model, chosen, known):
        return _change(batch_losses(model, batches, loss), wide)


def predict(sensitivity: Sensitivity, chosen: Mapping[str, str]) -> LossChange:
    """The additive model: the changes of single tensors, summed; their errors are taken as independent.

    Tensors in fp32 add nothing.

    Raises:
        InputError: a tensor or format that was not measured.
    """
    total, variance = 0.0, 0.0
    for name, text in chosen.items():
        format = parse_format(text).id
        if format == "fp32":
            continue
        change = sensitivity.tensors.get(name, {}).get(format)
        if change is None:
            raise InputError(f"the sensitivity of {name!r} to {format} was not measured; measure it too")
        total, variance = total + change.mean, variance + change.stderr**2
    return LossChange(total, math.sqrt(variance))
