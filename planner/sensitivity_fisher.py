"""Sensitivity from gradients: one backward pass a batch, any number of formats.

A narrow tensor changes the output y of its layer by dy. To second order the mean loss changes by

    mean over samples of  g_s . dy_s + 1/2 (g_s . dy_s)^2

with g_s the gradient of sample s's loss with respect to y, and the empirical Fisher matrix ``E[g g^T]`` in the
place of the Hessian (Martens 2020, JMLR 21(146), section 5). The first term vanishes in the mean at a minimum only:
a model stopped early has a slope, and a format that shrinks what it rounds (saturation) runs along it.
Unlike the diagonal form ``sum (g dy)^2``, the inner product lets errors cancel within a layer, as they do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from codegen.formats import Site, narrow_modules, sites
from ir.errors import InputError
from ir.format_plan import Sensitivity
from ir.formats import Format
from planner.sensitivity import Loss, choose, mean_of, parse_formats

if TYPE_CHECKING:
    from torch import Tensor, nn


def from_gradients(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    formats: Sequence[str],
    *,
    tensors: Iterable[str] | None = None,
    slope: bool = True,
) -> Sensitivity:
    """Change of the loss, to second order, when one tensor alone takes one format.

    Layers are read row by row: a row of a layer's output belongs to one sample (or token) and the loss is
    the mean over rows. The model's parameters keep their gradients as they were.

    Args:
        model: trained; parameters must require gradients.
        batches, loss, formats, tensors: as :func:`planner.sensitivity.from_losses`.
        slope: count the first order too. Without it changes are never negative: use that to choose formats,
            and the slope to predict the loss of a choice.

    Raises:
        InputError: as there; or the loss does not depend on the model's layers.
    """
    known = sites(model)
    parsed = parse_formats(formats)
    chosen = [known[name] for name in choose(known, tensors)]
    for site in chosen:
        if not site.path or site.kind == "state":
            raise InputError(f"{site.name!r} is not read by one layer; measure it with from_losses")
    if len(batches) < 2:
        raise InputError(f"a standard error needs two batches or more, not {len(batches)}")
    found: dict[str, dict[str, list[float]]] = {
        site.name: {format.id: [] for format in parsed} for site in chosen
    }
    saved = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for batch in batches:
            with _recorded(model, {site.path for site in chosen}) as calls:
                model.zero_grad(set_to_none=True)
                loss(model, batch).backward()  # type: ignore[no-untyped-call]
            for site in chosen:
                for format in parsed:
                    found[site.name][format.id].append(_expansion(model, site, format, calls, slope))
    finally:
        for parameter, gradient in saved:
            parameter.grad = gradient
    changes = {
        name: {format: mean_of(values) for format, values in by_format.items()}
        for name, by_format in found.items()
    }
    return Sensitivity(changes, "fisher", "loss", f"{len(batches)} batches")


@contextmanager
def _recorded(model: nn.Module, paths: set[str]) -> Iterator[dict[str, list[_Call]]]:
    """Calls of the modules at ``paths``: arguments, output, and after the backward pass its gradient."""
    calls: dict[str, list[_Call]] = {path: [] for path in paths}
    hooks = [
        model.get_submodule(path).register_forward_hook(_recorder(calls[path]), with_kwargs=True)
        for path in paths
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


class _Call:
    """One call of a module."""

    def __init__(self, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        self.args, self.named, self.output = args, named, output
        output.retain_grad()


def _recorder(calls: list[_Call]) -> Any:
    def record(_: Any, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        if not output.requires_grad:
            raise InputError("a layer's output has no gradient; let the model's parameters require one")
        calls.append(_Call(args, named, output))

    return record


def _expansion(
    model: nn.Module, site: Site, format: Format, calls: Mapping[str, list[_Call]], slope: bool
) -> float:
    import torch

    total = 0.0
    narrow = narrow_modules(model, {site: format.id}, training=True).get(site.path)
    if narrow is None:  # fp32: nothing changes
        return total
    for call in calls[site.path]:
        gradient = call.output.grad
        if gradient is None:
            raise InputError(f"the loss does not depend on layer {site.path!r}; leave {site.name!r} out")
        with torch.no_grad():
            change = narrow(*call.args, **call.named) - call.output
        samples = gradient.numel() // gradient.shape[-1]
        along = (gradient.double() * change.double()).reshape(samples, -1).sum(-1) * samples
        total += float(0.5 * along.square().mean() + (along.mean() if slope else 0.0))
    return total
